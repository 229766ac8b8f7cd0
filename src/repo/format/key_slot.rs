//! The files `keys/<slot>`: the master key, in the clear or wrapped with the key of a password or a key file.

use zeroize::{Zeroize, Zeroizing};

use super::envelope::{self, PAYLOAD_AT};
use super::tlv::{TlvWriter, once, read_tlvs, required};
use super::{DecodeError, FileKind};
use crate::repo::cipher::{open_once, open_text, seal_once, seal_text};
use crate::repo::error::RepoError;
use crate::repo::ids::random_bytes;
use crate::repo::keys::Keys;
use crate::repo::secret::{PasswordCost, Secret, SlotLock};

/// The key that all others are derived from.
pub(crate) type Master = Zeroizing<[u8; 32]>;

/// A key slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeySlot {
    /// The master key itself: the repository is not encrypted, and the key makes its ids unpredictable.
    Clear(ClearKey),
    /// The master key, wrapped.
    Wrapped(WrappedKey),
}

/// A master key that does not show in messages.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ClearKey(pub(crate) Master);

impl std::fmt::Debug for ClearKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClearKey")
    }
}

/// A wrapped master key; nothing of it is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WrappedKey {
    pub(crate) lock: SlotLock,
    salt: [u8; 16],
    wrapped: Vec<u8>,
    label: Option<Vec<u8>>,
}

impl WrappedKey {
    /// Wraps the master key.
    pub(crate) fn wrap(
        master: &Master,
        secret: &Secret,
        lock: SlotLock,
        label: Option<&str>,
    ) -> Result<Self, RepoError> {
        let salt = random_bytes()?;
        let key = secret.wrapping_key(&lock, &salt)?;
        let mut wrapped = Vec::with_capacity(WRAPPED_LEN);
        wrapped.extend_from_slice(&**master);
        seal_once(&key, WRAPPED_FOR, &mut wrapped)?;
        let label = match label {
            Some(label) => {
                let keys = Keys::derive(master, crate::repo::cipher::Encryption::None);
                let text = label.as_bytes().to_vec();
                Some(seal_text(keys.texts(), &label_of(&salt), text)?)
            }
            None => None,
        };
        Ok(Self {
            lock,
            salt,
            wrapped,
            label,
        })
    }

    /// Returns the master key; `None` when the secret is not this slot's.
    pub(crate) fn unwrap(&self, secret: &Secret) -> Result<Option<Master>, RepoError> {
        if secret.kind() != self.lock.kind() {
            return Ok(None);
        }
        let key = secret.wrapping_key(&self.lock, &self.salt)?;
        let Some(mut opened) = open_once(&key, WRAPPED_FOR, self.wrapped.clone()) else {
            return Ok(None);
        };
        let master = <[u8; 32]>::try_from(&opened[..]).ok().map(Zeroizing::new);
        opened.zeroize();
        Ok(master)
    }

    /// Returns the label, when there is one and it is this repository's.
    pub(crate) fn label(&self, keys: &Keys) -> Option<String> {
        let sealed = self.label.as_ref()?;
        let text = open_text(keys.texts(), &label_of(&self.salt), sealed)?;
        String::from_utf8(text).ok()
    }
}

impl KeySlot {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        match self {
            Self::Clear(key) => {
                tlv.put(TAG_KIND, &[KIND_CLEAR])?;
                tlv.put(TAG_MASTER, &*key.0)?;
            }
            Self::Wrapped(slot) => {
                let kind = match slot.lock {
                    SlotLock::Password(_) => KIND_PASSWORD,
                    SlotLock::KeyFile => KIND_KEY_FILE,
                };
                tlv.put(TAG_KIND, &[kind])?;
                tlv.put(TAG_SALT, &slot.salt)?;
                if let SlotLock::Password(cost) = slot.lock {
                    let mut bytes = Vec::new();
                    for number in [cost.memory_kib(), cost.passes(), cost.lanes()] {
                        bytes.extend_from_slice(&number.to_le_bytes());
                    }
                    tlv.put(TAG_COST, &bytes)?;
                }
                tlv.put(TAG_WRAPPED, &slot.wrapped)?;
                if let Some(label) = &slot.label {
                    tlv.put(TAG_LABEL, label)?;
                }
            }
        }
        envelope::wrap(FileKind::KeySlot, &tlv.finish(), None).map_err(|e| e.in_file("keys/"))
    }

    pub(crate) fn decode(file: &[u8]) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::KeySlot, false)?;
        let (mut kind, mut master, mut salt) = (None, None, None);
        let (mut cost, mut wrapped, mut label) = (None, None, None);
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_KIND => once(&mut kind, tlv.u8("kind of key slot")?, &tlv)?,
                TAG_MASTER => {
                    let key = Zeroizing::new(tlv.array("master key")?);
                    once(&mut master, key, &tlv)?;
                }
                TAG_SALT => once(&mut salt, tlv.array("salt")?, &tlv)?,
                TAG_COST => {
                    let numbers = tlv.whole("cost", |c| {
                        Ok((c.u32("memory")?, c.u32("passes")?, c.u32("lanes")?))
                    })?;
                    let (memory, passes, lanes) = numbers;
                    let known =
                        PasswordCost::with_lanes(memory, passes, lanes).ok_or_else(|| {
                            DecodeError::corrupt(
                                tlv.at,
                                format!("a cost of {memory} KiB, {passes} passes, {lanes} lanes"),
                            )
                        })?;
                    once(&mut cost, known, &tlv)?;
                }
                TAG_WRAPPED => {
                    let key = tlv.array::<WRAPPED_LEN>("wrapped key")?.to_vec();
                    once(&mut wrapped, key, &tlv)?;
                }
                TAG_LABEL => once(&mut label, tlv.value.to_vec(), &tlv)?,
                _ => {}
            }
        }
        let lock = match required(kind, PAYLOAD_AT, "kind of key slot")? {
            KIND_CLEAR => {
                let key = required(master, PAYLOAD_AT, "master key")?;
                return Ok(Self::Clear(ClearKey(key)));
            }
            KIND_PASSWORD => SlotLock::Password(required(cost, PAYLOAD_AT, "cost")?),
            KIND_KEY_FILE => SlotLock::KeyFile,
            other => {
                return Err(DecodeError::unsupported(format!("key slot kind {other}")));
            }
        };
        Ok(Self::Wrapped(WrappedKey {
            lock,
            salt: required(salt, PAYLOAD_AT, "salt")?,
            wrapped: required(wrapped, PAYLOAD_AT, "wrapped key")?,
            label,
        }))
    }
}

fn label_of(salt: &[u8; 16]) -> Vec<u8> {
    [&b"label"[..], salt].concat()
}

const TAG_KIND: u16 = 1;
const TAG_MASTER: u16 = 2;
const TAG_SALT: u16 = 3;
const TAG_COST: u16 = 4;
const TAG_WRAPPED: u16 = 5;
const TAG_LABEL: u16 = 6;

const KIND_CLEAR: u8 = 0;
const KIND_PASSWORD: u8 = 1;
const KIND_KEY_FILE: u8 = 2;

const WRAPPED_LEN: usize = 48;
const WRAPPED_FOR: &[u8] = b"nbdbackup master key";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::cipher::Encryption;
    use proptest::prelude::*;

    fn each_bit_counts(slot: KeySlot) {
        let mut file = slot.encode().unwrap();
        assert_eq!(KeySlot::decode(&file), Ok(slot));
        for bit in 0..file.len() * 8 {
            file[bit / 8] ^= 1 << (bit % 8);
            assert!(KeySlot::decode(&file).is_err(), "bit {bit}");
            file[bit / 8] ^= 1 << (bit % 8);
        }
    }

    fn password(text: &str) -> Secret {
        Secret::password(text.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn slots_survive_their_bytes_and_a_flipped_bit_is_seen() {
        let master = Zeroizing::new([5; 32]);
        each_bit_counts(KeySlot::Clear(ClearKey(master.clone())));
        let lock = SlotLock::Password(PasswordCost::new(1 << 10, 1).unwrap());
        let slot = WrappedKey::wrap(&master, &password("a"), lock, Some("laptop")).unwrap();
        let keys = Keys::derive(&master, Encryption::Aes256Gcm);
        assert_eq!(slot.label(&keys).as_deref(), Some("laptop"));
        assert_eq!(slot.unwrap(&password("a")).unwrap(), Some(master.clone()));
        assert_eq!(slot.unwrap(&password("b")).unwrap(), None);
        each_bit_counts(KeySlot::Wrapped(slot));
        let file = |byte| Secret::key_file(vec![byte; 40]).unwrap();
        let slot = WrappedKey::wrap(&master, &file(1), SlotLock::KeyFile, None).unwrap();
        assert_eq!(slot.unwrap(&file(1)).unwrap(), Some(master));
        assert_eq!(slot.unwrap(&file(2)).unwrap(), None);
        assert_eq!(slot.unwrap(&password("a")).unwrap(), None);
        each_bit_counts(KeySlot::Wrapped(slot));
    }

    #[test]
    fn slot_shows_no_secret() {
        let key = ClearKey(Zeroizing::new([0xab; 32]));
        let shown = format!("{:?}", KeySlot::Clear(key));
        assert!(
            !shown.contains("171") && !shown.contains("ab, ab"),
            "{shown}"
        );
    }

    #[test]
    fn cost_that_would_take_all_memory_is_refused() {
        let mut tlv = TlvWriter::default();
        tlv.put(TAG_KIND, &[KIND_PASSWORD]).unwrap();
        tlv.put(TAG_SALT, &[1; 16]).unwrap();
        tlv.put(TAG_COST, &[0xff; 12]).unwrap();
        tlv.put(TAG_WRAPPED, &[1; 48]).unwrap();
        let file = envelope::wrap(FileKind::KeySlot, &tlv.finish(), None).unwrap();
        let read = KeySlot::decode(&file);
        assert!(matches!(read, Err(DecodeError::Corrupt { .. })), "{read:?}");
    }

    proptest! {
        #[test]
        fn random_payload_never_panics(payload: Vec<u8>) {
            let file = envelope::wrap(FileKind::KeySlot, &payload, None).unwrap();
            prop_assert!(KeySlot::decode(&file).is_err());
        }
    }
}
