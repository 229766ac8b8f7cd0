//! The file `config`: what this repository is and what a program must know to use it.

use super::cursor::Cursor;
use super::envelope::{self, PAYLOAD_AT};
use super::tlv::{TlvWriter, once, read_tlvs, required};
use super::{DecodeError, FileKind};
use crate::repo::chunk::ChunkSize;
use crate::repo::cipher::Encryption;
use crate::repo::compress::Compression;
use crate::repo::error::RepoError;
use crate::repo::ids::RepoUuid;
use crate::repo::parity::Parity;

/// What `config` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) features: Features,
    pub(crate) uuid: RepoUuid,
    pub(crate) chunk_size: ChunkSize,
    pub(crate) compression: Compression,
    pub(crate) encryption: Encryption,
    /// How many lost parts of each pack its parity makes up for.
    pub(crate) parity: Parity,
}

impl Config {
    /// Makes the configuration of a new repository.
    pub(crate) fn new(
        chunk_size: ChunkSize,
        compression: Compression,
        encryption: Encryption,
        parity: Parity,
    ) -> Result<Self, RepoError> {
        Ok(Self {
            features: Features::of(encryption),
            uuid: RepoUuid::random()?,
            chunk_size,
            compression,
            encryption,
            parity,
        })
    }

    pub(crate) fn encode(&self, mac_key: &[u8; 32]) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        self.features.put(TAG_FEATURES, &mut tlv)?;
        tlv.put(TAG_UUID, self.uuid.as_bytes())?;
        tlv.put(TAG_CHUNK_LOG2, &[self.chunk_size.log2()])?;
        tlv.put(TAG_HASH, &[HASH_KEYED_BLAKE3])?;
        tlv.put(TAG_CIPHER, &[self.encryption.code()])?;
        let (code, level) = self.compression.code();
        let mut compression = vec![code];
        compression.extend_from_slice(&level.to_le_bytes());
        tlv.put(TAG_COMPRESSION, &compression)?;
        // Absent as in repositories that were made before there was parity.
        if self.parity != Parity::NONE {
            tlv.put(TAG_PARITY, &[self.parity.shards()])?;
        }
        envelope::wrap(FileKind::Config, &tlv.finish(), Some(mac_key))
            .map_err(|e| e.in_file("config"))
    }

    /// Reads the fields of a file whose MAC fits.
    pub(crate) fn decode(file: &[u8], mac_key: &[u8; 32]) -> Result<Self, DecodeError> {
        envelope::unwrap(file, FileKind::Config, true)?.check_mac(mac_key)?;
        Self::decode_keyless(file)
    }

    /// Reads the fields of a file that anybody may have written.
    pub(crate) fn decode_keyless(file: &[u8]) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::Config, true)?;
        let (mut features, mut uuid, mut chunk, mut compression) = (None, None, None, None);
        let (mut hash, mut cipher, mut parity) = (None, None, None);
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_FEATURES => once(&mut features, tlv.whole("features", Features::read)?, &tlv)?,
                TAG_UUID => once(&mut uuid, tlv.array("uuid")?, &tlv)?,
                TAG_CHUNK_LOG2 => {
                    let log2 = tlv.u8("chunk size")?;
                    let size = ChunkSize::from_log2(log2).ok_or_else(|| {
                        DecodeError::corrupt(tlv.at, format!("chunks of 2^{log2} bytes"))
                    })?;
                    once(&mut chunk, size, &tlv)?;
                }
                TAG_HASH => once(&mut hash, tlv.u8("hash")?, &tlv)?,
                TAG_CIPHER => once(&mut cipher, tlv.u8("cipher")?, &tlv)?,
                TAG_COMPRESSION => {
                    let (code, level) = tlv.whole("compression", |c| {
                        Ok((c.u8("compression")?, c.u32("compression level")?))
                    })?;
                    let level = i32::from_le_bytes(level.to_le_bytes());
                    let known = Compression::from_code(code, level).ok_or_else(|| {
                        DecodeError::unsupported(format!("compression {code} level {level}"))
                    })?;
                    once(&mut compression, known, &tlv)?;
                }
                TAG_PARITY => {
                    let most = tlv.u8("parity")?;
                    let known = Parity::new(most)
                        .ok_or_else(|| DecodeError::unsupported(format!("{most} parity shards")))?;
                    once(&mut parity, known, &tlv)?;
                }
                _ => {}
            }
        }
        let features: Features = required(features, PAYLOAD_AT, "list of features")?;
        features.check()?;
        match required(hash, PAYLOAD_AT, "hash")? {
            HASH_KEYED_BLAKE3 => {}
            other => return Err(DecodeError::unsupported(format!("hash {other}"))),
        }
        let code = required(cipher, PAYLOAD_AT, "cipher")?;
        let encryption = Encryption::from_code(code)
            .ok_or_else(|| DecodeError::unsupported(format!("cipher {code}")))?;
        Ok(Self {
            features,
            uuid: RepoUuid::from_bytes(required(uuid, PAYLOAD_AT, "uuid")?),
            chunk_size: required(chunk, PAYLOAD_AT, "chunk size")?,
            compression: required(compression, PAYLOAD_AT, "compression")?,
            encryption,
            parity: parity.unwrap_or(Parity::NONE),
        })
    }
}

/// What a program must know: `compat` may be ignored, `ro_compat` forbids writing, `incompat` forbids reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    pub(crate) compat: u64,
    pub(crate) ro_compat: u64,
    pub(crate) incompat: u64,
}

impl Features {
    pub(crate) fn put(&self, tag: u16, tlv: &mut TlvWriter) -> Result<(), RepoError> {
        let mut bytes = Vec::with_capacity(24);
        for bits in [self.compat, self.ro_compat, self.incompat] {
            bytes.extend_from_slice(&bits.to_le_bytes());
        }
        tlv.put(tag, &bytes)
    }

    pub(crate) fn read(cursor: &mut Cursor<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            compat: cursor.u64("compatible features")?,
            ro_compat: cursor.u64("features for writing")?,
            incompat: cursor.u64("features for reading")?,
        })
    }

    /// The features of what is encrypted so.
    pub(crate) fn of(encryption: Encryption) -> Self {
        Self {
            incompat: match encryption {
                Encryption::None => 0,
                Encryption::Aes256Gcm => ENCRYPTED,
            },
            ..Self::default()
        }
    }

    /// Fails when reading needs a feature that this program does not know.
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        match self.incompat & !ENCRYPTED {
            0 => Ok(()),
            bits => Err(DecodeError::unsupported(format!(
                "features {bits:#x} for reading"
            ))),
        }
    }

    /// Whether this program knows all that it must to write.
    pub(crate) fn writable(&self) -> bool {
        self.ro_compat == 0
    }
}

const TAG_FEATURES: u16 = 1;
const TAG_UUID: u16 = 2;
const TAG_CHUNK_LOG2: u16 = 3;
const TAG_HASH: u16 = 4;
const TAG_CIPHER: u16 = 5;
const TAG_COMPRESSION: u16 = 6;
const TAG_PARITY: u16 = 7;

/// The `incompat` bit of what is encrypted.
const ENCRYPTED: u64 = 1;

const HASH_KEYED_BLAKE3: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Config {
        Config {
            features: Features::of(Encryption::Aes256Gcm),
            uuid: RepoUuid::from_bytes([7; 16]),
            chunk_size: ChunkSize::default(),
            compression: Compression::Zstd { level: -3 },
            encryption: Encryption::Aes256Gcm,
            parity: Parity::default(),
        }
    }

    #[test]
    fn config_survives_its_bytes() {
        let file = sample().encode(&[1; 32]).unwrap();
        assert_eq!(Config::decode(&file, &[1; 32]), Ok(sample()));
        assert!(Config::decode(&file, &[2; 32]).is_err());
    }

    #[test]
    fn unknown_feature_for_reading_is_refused_and_for_writing_is_seen() {
        let mut config = sample();
        config.features.incompat = 1 << 40;
        let file = config.encode(&[1; 32]).unwrap();
        let read = Config::decode(&file, &[1; 32]);
        assert!(
            matches!(read, Err(DecodeError::Unsupported { .. })),
            "{read:?}"
        );
        config.features = Features {
            compat: 1,
            ro_compat: 2,
            incompat: 0,
        };
        let file = config.encode(&[1; 32]).unwrap();
        assert!(!Config::decode(&file, &[1; 32]).unwrap().features.writable());
    }

    proptest! {
        #[test]
        fn random_payload_never_panics(payload: Vec<u8>) {
            let file = envelope::wrap(FileKind::Config, &payload, Some(&[1; 32])).unwrap();
            prop_assert!(Config::decode(&file, &[1; 32]).is_err());
        }
    }
}
