//! The files `ckpt/<session>.<n>`: what a session that has not committed yet has made durable.

use super::envelope::{self, PAYLOAD_AT};
use super::generation::{PackName, join_packs, split_packs};
use super::tlv::{Tlv, TlvWriter, once, read_tlvs, required};
use super::{DecodeError, FileKind};
use crate::repo::cipher::{Encryption, open_text, seal_text};
use crate::repo::error::RepoError;
use crate::repo::ids::SnapshotId;
use crate::repo::keys::Keys;

/// What a session has stored since its checkpoint before this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) session: SnapshotId,
    /// The machine's name.
    pub(crate) name: String,
    /// The disks' names, and the generation that each of them will have in the session's snapshot.
    pub(crate) disks: Vec<(String, u64)>,
    /// When it was written, in nanoseconds since 1970.
    pub(crate) written_unix_nanos: i64,
    /// The packs, all of them durable and in the index.
    pub(crate) packs: Vec<PackName>,
}

/// The name of a session's checkpoint of a number.
pub(crate) fn file_name(session: &SnapshotId, number: u64) -> String {
    format!("ckpt/{session}.{number}")
}

/// Reads what a file's name says; `None` when it is not exactly a checkpoint's.
pub(crate) fn parse_file_name(name: &str) -> Option<(SnapshotId, u64)> {
    let (session, number) = name.strip_prefix("ckpt/")?.split_once('.')?;
    let parsed = (session.parse().ok()?, number.parse().ok()?);
    (file_name(&parsed.0, parsed.1) == name).then_some(parsed)
}

impl Checkpoint {
    pub(crate) fn encode(&self, keys: &Keys) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        tlv.put(TAG_SESSION, self.session.as_bytes())?;
        match keys.encryption() {
            Encryption::None => self.put_fields(&mut tlv)?,
            Encryption::Aes256Gcm => {
                let mut fields = TlvWriter::default();
                self.put_fields(&mut fields)?;
                let to = sealed_for(&self.session);
                tlv.put(TAG_SEALED, &seal_text(keys.texts(), &to, fields.finish())?)?;
            }
        }
        envelope::wrap(FileKind::Checkpoint, &tlv.finish(), Some(keys.mac()))
            .map_err(|e| e.in_file("ckpt/"))
    }

    fn put_fields(&self, tlv: &mut TlvWriter) -> Result<(), RepoError> {
        tlv.put(TAG_NAME, self.name.as_bytes())?;
        tlv.put(TAG_WRITTEN, &self.written_unix_nanos.to_le_bytes())?;
        for (disk, generation) in &self.disks {
            let value = [&generation.to_le_bytes()[..], disk.as_bytes()].concat();
            tlv.put(TAG_DISK, &value)?;
        }
        tlv.put(TAG_PACKS, &join_packs(&self.packs))
    }

    pub(crate) fn decode(file: &[u8], keys: &Keys) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::Checkpoint, true)?;
        opened.check_mac(keys.mac())?;
        let (mut session, mut sealed) = (None, None);
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_SESSION => once(&mut session, tlv.array("session id")?, &tlv)?,
                TAG_SEALED => once(&mut sealed, tlv.value, &tlv)?,
                _ => {}
            }
        }
        let session = SnapshotId::from_bytes(required(session, PAYLOAD_AT, "session id")?);
        match keys.encryption() {
            Encryption::None => read_fields(session, opened.payload, PAYLOAD_AT),
            Encryption::Aes256Gcm => {
                let sealed = required(sealed, PAYLOAD_AT, "sealed part")?;
                let to = sealed_for(&session);
                let fields = open_text(keys.texts(), &to, sealed).ok_or_else(|| {
                    DecodeError::corrupt(PAYLOAD_AT, "the sealed part does not open")
                })?;
                // The offsets in messages are those in the sealed part.
                read_fields(session, &fields, 0)
            }
        }
    }
}

fn read_fields(session: SnapshotId, bytes: &[u8], at: u64) -> Result<Checkpoint, DecodeError> {
    let (mut name, mut written, mut packs) = (None, None, None);
    let mut disks = Vec::new();
    for tlv in read_tlvs(bytes, at) {
        let tlv = tlv?;
        match tlv.tag {
            TAG_NAME => once(&mut name, tlv.text("name")?, &tlv)?,
            TAG_WRITTEN => {
                let nanos = i64::from_le_bytes(tlv.array("time")?);
                once(&mut written, nanos, &tlv)?;
            }
            TAG_DISK => disks.push(read_disk(&tlv)?),
            TAG_PACKS => once(&mut packs, split_packs(tlv.value, tlv.at)?, &tlv)?,
            _ => {}
        }
    }
    Ok(Checkpoint {
        session,
        name: required(name, at, "name")?,
        disks,
        written_unix_nanos: required(written, at, "time")?,
        packs: required(packs, at, "list of packs")?,
    })
}

fn read_disk(tlv: &Tlv<'_>) -> Result<(String, u64), DecodeError> {
    let mut cursor = tlv.cursor();
    let generation = cursor.u64("generation")?;
    let name = cursor.bytes(cursor.left(), "disk name")?;
    let name = String::from_utf8(name.to_vec())
        .map_err(|_| DecodeError::corrupt(tlv.at, "disk name is not UTF-8"))?;
    Ok((name, generation))
}

fn sealed_for(session: &SnapshotId) -> Vec<u8> {
    [&b"checkpoint"[..], session.as_bytes()].concat()
}

const TAG_SESSION: u16 = 1;
const TAG_NAME: u16 = 2;
const TAG_WRITTEN: u16 = 3;
const TAG_DISK: u16 = 4;
const TAG_PACKS: u16 = 5;
const TAG_SEALED: u16 = 12;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::format::pack::PackKind;
    use crate::repo::ids::PackId;

    #[test]
    fn checkpoint_survives_its_bytes_and_hides_its_names_where_all_is_hidden() {
        let checkpoint = Checkpoint {
            session: SnapshotId::from_bytes([3; 16]),
            name: "machine".to_owned(),
            disks: vec![("vda".to_owned(), 7), (String::new(), u64::MAX)],
            written_unix_nanos: -5,
            packs: vec![
                (PackKind::Data, PackId::from_bytes([1; 16])),
                (PackKind::Meta, PackId::from_bytes([2; 16])),
            ],
        };
        for encryption in [Encryption::None, Encryption::Aes256Gcm] {
            let keys = Keys::derive(&[1; 32], encryption);
            let file = checkpoint.encode(&keys).unwrap();
            assert_eq!(Checkpoint::decode(&file, &keys), Ok(checkpoint.clone()));
            let shows = file.windows(7).any(|bytes| bytes == b"machine");
            assert_eq!(shows, encryption == Encryption::None);
            let other = Keys::derive(&[2; 32], encryption);
            assert!(Checkpoint::decode(&file, &other).is_err());
            for at in 0..file.len() {
                let mut bad = file.clone();
                bad[at] ^= 1;
                assert!(Checkpoint::decode(&bad, &keys).is_err(), "{at}");
            }
        }
    }

    #[test]
    fn name_that_is_not_exactly_ours_is_no_checkpoint() {
        let session = SnapshotId::from_bytes([0xab; 16]);
        let name = file_name(&session, 10);
        assert_eq!(parse_file_name(&name), Some((session, 10)));
        for bad in [
            name.replace(".10", ".010"),
            name.replace(".10", ".+1"),
            name.replace('a', "A"),
        ] {
            assert_eq!(parse_file_name(&bad), None, "{bad}");
        }
    }
}
