//! The files in which checks remember what they found: `bad/` and `verify/`.

use super::cursor::Cursor;
use super::envelope::{self, PAYLOAD_AT};
use super::generation::{PackName, join_packs, split_packs};
use super::tlv::{TlvWriter, once, read_tlvs, required};
use super::{DecodeError, FileKind};
use crate::repo::error::RepoError;

/// `bad/<random>`: records of one pack that are damaged or gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadPack {
    pub(crate) pack: PackName,
    /// Whether no record of the pack may be referred to any more.
    pub(crate) whole: bool,
    pub(crate) records: Vec<BadRecord>,
}

/// A damaged record: what it was and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadRecord {
    pub(crate) id: [u8; 32],
    pub(crate) offset: u32,
}

impl BadPack {
    pub(crate) fn encode(&self, mac_key: &[u8; 32]) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        tlv.put(TAG_PACK, &join_packs(&[self.pack]))?;
        tlv.put(TAG_WHOLE, &[u8::from(self.whole)])?;
        let mut records = Vec::with_capacity(self.records.len().saturating_mul(RECORD_LEN));
        for record in &self.records {
            records.extend_from_slice(&record.id);
            records.extend_from_slice(&record.offset.to_le_bytes());
        }
        tlv.put(TAG_RECORDS, &records)?;
        envelope::wrap(FileKind::Bad, &tlv.finish(), Some(mac_key)).map_err(|e| e.in_file("bad/"))
    }

    pub(crate) fn decode(file: &[u8], mac_key: &[u8; 32]) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::Bad, true)?;
        opened.check_mac(mac_key)?;
        let (mut pack, mut whole, mut records) = (None, None, None);
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_PACK => match split_packs(tlv.value, tlv.at)?.as_slice() {
                    [one] => once(&mut pack, *one, &tlv)?,
                    _ => return Err(DecodeError::corrupt(tlv.at, "not exactly one pack")),
                },
                TAG_WHOLE => once(&mut whole, tlv.u8("flag")? != 0, &tlv)?,
                TAG_RECORDS => once(&mut records, read_records(tlv.value, tlv.at)?, &tlv)?,
                _ => {}
            }
        }
        Ok(Self {
            pack: required(pack, PAYLOAD_AT, "pack")?,
            whole: required(whole, PAYLOAD_AT, "flag")?,
            records: required(records, PAYLOAD_AT, "list of records")?,
        })
    }
}

/// `verify/<random>`: when the records of packs were last read and found whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verified {
    pub(crate) packs: Vec<(PackName, i64)>,
}

impl Verified {
    pub(crate) fn encode(&self, mac_key: &[u8; 32]) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        let mut bytes = Vec::with_capacity(self.packs.len().saturating_mul(VERIFIED_LEN));
        for (pack, unix_nanos) in &self.packs {
            bytes.extend_from_slice(&join_packs(&[*pack]));
            bytes.extend_from_slice(&unix_nanos.to_le_bytes());
        }
        tlv.put(TAG_VERIFIED, &bytes)?;
        envelope::wrap(FileKind::Verified, &tlv.finish(), Some(mac_key))
            .map_err(|e| e.in_file("verify/"))
    }

    pub(crate) fn decode(file: &[u8], mac_key: &[u8; 32]) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::Verified, true)?;
        opened.check_mac(mac_key)?;
        let mut packs = None;
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            if tlv.tag == TAG_VERIFIED {
                once(&mut packs, read_verified(tlv.value, tlv.at)?, &tlv)?;
            }
        }
        Ok(Self {
            packs: required(packs, PAYLOAD_AT, "list of packs")?,
        })
    }
}

fn read_records(bytes: &[u8], at: u64) -> Result<Vec<BadRecord>, DecodeError> {
    let mut cursor = Cursor::starting_at(bytes, at);
    let mut records = Vec::with_capacity(bytes.len().div_euclid(RECORD_LEN));
    while cursor.left() > 0 {
        records.push(BadRecord {
            id: cursor.array("id")?,
            offset: cursor.u32("offset")?,
        });
    }
    Ok(records)
}

fn read_verified(bytes: &[u8], at: u64) -> Result<Vec<(PackName, i64)>, DecodeError> {
    let mut cursor = Cursor::starting_at(bytes, at);
    let mut packs = Vec::with_capacity(bytes.len().div_euclid(VERIFIED_LEN));
    while cursor.left() > 0 {
        let at = cursor.at();
        let name = split_packs(cursor.bytes(VERIFIED_LEN - 8, "pack")?, at)?;
        let unix_nanos = i64::from_le_bytes(cursor.array("time")?);
        packs.extend(name.first().map(|name| (*name, unix_nanos)));
    }
    Ok(packs)
}

const TAG_PACK: u16 = 1;
const TAG_WHOLE: u16 = 2;
const TAG_RECORDS: u16 = 3;
const TAG_VERIFIED: u16 = 4;
const RECORD_LEN: usize = 36;
const VERIFIED_LEN: usize = 25;

#[cfg(test)]
mod tests {
    use super::super::pack::PackKind;
    use super::*;
    use crate::repo::ids::PackId;
    use proptest::prelude::*;

    const KEY: [u8; 32] = [1; 32];

    #[test]
    fn each_kind_survives_its_bytes_and_is_no_other() {
        let pack = (PackKind::Meta, PackId::from_bytes([7; 16]));
        let bad = BadPack {
            pack,
            whole: true,
            records: vec![BadRecord {
                id: [3; 32],
                offset: 72,
            }],
        };
        let verified = Verified {
            packs: vec![(pack, -5), ((PackKind::Data, pack.1), 9)],
        };
        let files = [bad.encode(&KEY).unwrap(), verified.encode(&KEY).unwrap()];
        assert_eq!(BadPack::decode(&files[0], &KEY), Ok(bad));
        assert_eq!(Verified::decode(&files[1], &KEY), Ok(verified));
        assert!(BadPack::decode(&files[1], &KEY).is_err());
        assert!(Verified::decode(&files[0], &KEY).is_err());
        assert!(BadPack::decode(&files[0], &[2; 32]).is_err());
        assert!(Verified::decode(&files[1], &[2; 32]).is_err());
    }

    proptest! {
        #[test]
        fn random_payload_never_panics(payload: Vec<u8>, value: Vec<u8>, tag in 1..5_u16) {
            let mut tlv = TlvWriter::default();
            tlv.put(tag, &value).unwrap();
            for payload in [payload, tlv.finish()] {
                for kind in [FileKind::Bad, FileKind::Verified] {
                    let file = envelope::wrap(kind, &payload, Some(&KEY)).unwrap();
                    let _ = BadPack::decode(&file, &KEY);
                    let _ = Verified::decode(&file, &KEY);
                }
            }
        }
    }
}
