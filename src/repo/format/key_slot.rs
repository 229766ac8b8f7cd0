//! The files `keys/<slot>`: the master key, in kind 0 as it is.

use super::envelope::{self, PAYLOAD_AT};
use super::tlv::{TlvWriter, once, read_tlvs, required};
use super::{DecodeError, FileKind};
use crate::repo::error::RepoError;

/// A key slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeySlot {
    /// The master key itself: the repository is not encrypted, and the key makes its ids unpredictable.
    Clear { master: [u8; 32] },
}

impl KeySlot {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        match self {
            Self::Clear { master } => {
                tlv.put(TAG_KIND, &[KIND_CLEAR])?;
                tlv.put(TAG_MASTER, master)?;
            }
        }
        envelope::wrap(FileKind::KeySlot, &tlv.finish(), None).map_err(|e| e.in_file("keys/"))
    }

    pub(crate) fn decode(file: &[u8]) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::KeySlot, false)?;
        let (mut kind, mut master) = (None, None);
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_KIND => once(&mut kind, tlv.u8("kind of key slot")?, &tlv)?,
                TAG_MASTER => once(&mut master, tlv.array("master key")?, &tlv)?,
                _ => {}
            }
        }
        match required(kind, PAYLOAD_AT, "kind of key slot")? {
            KIND_CLEAR => Ok(Self::Clear {
                master: required(master, PAYLOAD_AT, "master key")?,
            }),
            other => Err(DecodeError::unsupported(format!("key slot kind {other}"))),
        }
    }
}

const TAG_KIND: u16 = 1;
const TAG_MASTER: u16 = 2;
const KIND_CLEAR: u8 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_survives_its_bytes_and_a_flipped_bit_is_seen() {
        let slot = KeySlot::Clear { master: [5; 32] };
        let mut file = slot.encode().unwrap();
        assert_eq!(KeySlot::decode(&file), Ok(slot));
        for bit in 0..file.len() * 8 {
            file[bit / 8] ^= 1 << (bit % 8);
            assert!(KeySlot::decode(&file).is_err(), "bit {bit}");
            file[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
