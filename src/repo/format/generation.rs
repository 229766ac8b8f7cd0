//! The files by which writers and prunes know of each other: beats of sessions, generations of condemned packs, fences.

use super::envelope::{self, PAYLOAD_AT};
use super::pack::PackKind;
use super::tlv::{TlvWriter, once, read_tlvs};
use super::{DecodeError, FileKind};
use crate::repo::error::RepoError;
use crate::repo::ids::{PackId, SnapshotId};

/// A pack, by what it holds and its identifier.
pub(crate) type PackName = (PackKind, PackId);

/// `sess/<session>.<n>`: a session is open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Beat {
    /// The session stored nothing before it had looked at all generations below this; `None` while it has not looked.
    /// The highest number stands for a reader, which stores nothing at all.
    pub(crate) seen: Option<u64>,
    /// The snapshots that it inherits from.
    pub(crate) parents: Vec<SnapshotId>,
}

/// `gc/<generation>.condemned`: packs that nobody may refer to any more, unless they are rescued.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Condemned {
    pub(crate) packs: Vec<PackName>,
    /// The snapshots that are removed with this generation.
    pub(crate) dropped: Vec<SnapshotId>,
    /// The snapshots all of whose records are in packs that are not condemned.
    pub(crate) roots: Vec<SnapshotId>,
}

/// `gc/<generation>.sweep`: what is removed, decided once and for good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sweep {
    pub(crate) packs: Vec<PackName>,
    pub(crate) snapshots: Vec<SnapshotId>,
}

impl Beat {
    pub(crate) fn encode(&self, mac_key: &[u8; 32]) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        if let Some(seen) = self.seen {
            tlv.put(TAG_SEEN, &seen.to_le_bytes())?;
        }
        tlv.put(TAG_SNAPSHOTS, &join_snapshots(&self.parents))?;
        wrap(FileKind::Beat, tlv, mac_key)
    }

    pub(crate) fn decode(file: &[u8], mac_key: &[u8; 32]) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::Beat, true)?;
        opened.check_mac(mac_key)?;
        let mut beat = Self::default();
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_SEEN => once(&mut beat.seen, tlv.u64("generation")?, &tlv)?,
                TAG_SNAPSHOTS => beat.parents = split_snapshots(tlv.value, tlv.at)?,
                _ => {}
            }
        }
        Ok(beat)
    }
}

impl Condemned {
    pub(crate) fn encode(&self, mac_key: &[u8; 32]) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        tlv.put(TAG_PACKS, &join_packs(&self.packs))?;
        tlv.put(TAG_SNAPSHOTS, &join_snapshots(&self.dropped))?;
        tlv.put(TAG_ROOTS, &join_snapshots(&self.roots))?;
        wrap(FileKind::Condemned, tlv, mac_key)
    }

    pub(crate) fn decode(file: &[u8], mac_key: &[u8; 32]) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::Condemned, true)?;
        opened.check_mac(mac_key)?;
        let mut condemned = Self::default();
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_PACKS => condemned.packs = split_packs(tlv.value, tlv.at)?,
                TAG_SNAPSHOTS => condemned.dropped = split_snapshots(tlv.value, tlv.at)?,
                TAG_ROOTS => condemned.roots = split_snapshots(tlv.value, tlv.at)?,
                _ => {}
            }
        }
        Ok(condemned)
    }
}

impl Sweep {
    pub(crate) fn encode(&self, mac_key: &[u8; 32]) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        tlv.put(TAG_PACKS, &join_packs(&self.packs))?;
        tlv.put(TAG_SNAPSHOTS, &join_snapshots(&self.snapshots))?;
        wrap(FileKind::Sweep, tlv, mac_key)
    }

    pub(crate) fn decode(file: &[u8], mac_key: &[u8; 32]) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, FileKind::Sweep, true)?;
        opened.check_mac(mac_key)?;
        let mut sweep = Self::default();
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_PACKS => sweep.packs = split_packs(tlv.value, tlv.at)?,
                TAG_SNAPSHOTS => sweep.snapshots = split_snapshots(tlv.value, tlv.at)?,
                _ => {}
            }
        }
        Ok(sweep)
    }
}

/// Writes a file that says all by its name and kind: a fence, or the end of a generation.
pub(crate) fn encode_mark(kind: FileKind, mac_key: &[u8; 32]) -> Result<Vec<u8>, RepoError> {
    wrap(kind, TlvWriter::default(), mac_key)
}

/// Whether this file is a fence of this repository.
pub(crate) fn is_fence(file: &[u8], mac_key: &[u8; 32]) -> bool {
    envelope::unwrap(file, FileKind::Fence, true).is_ok_and(|o| o.check_mac(mac_key).is_ok())
}

fn wrap(kind: FileKind, tlv: TlvWriter, mac_key: &[u8; 32]) -> Result<Vec<u8>, RepoError> {
    envelope::wrap(kind, &tlv.finish(), Some(mac_key)).map_err(|e| e.in_file("gc/"))
}

fn join_snapshots(ids: &[SnapshotId]) -> Vec<u8> {
    ids.iter().flat_map(|id| *id.as_bytes()).collect()
}

fn split_snapshots(bytes: &[u8], at: u64) -> Result<Vec<SnapshotId>, DecodeError> {
    let (ids, rest) = bytes.as_chunks::<{ SnapshotId::LEN }>();
    match rest {
        [] => Ok(ids.iter().map(|id| SnapshotId::from_bytes(*id)).collect()),
        _ => Err(DecodeError::corrupt(
            at,
            "a list of snapshots ends inside an id",
        )),
    }
}

pub(super) fn join_packs(packs: &[PackName]) -> Vec<u8> {
    let bytes = |(kind, pack): &PackName| [&[kind.code()][..], pack.as_bytes()].concat();
    packs.iter().flat_map(bytes).collect()
}

pub(super) fn split_packs(bytes: &[u8], at: u64) -> Result<Vec<PackName>, DecodeError> {
    let (packs, rest) = bytes.as_chunks::<{ 1 + PackId::LEN }>();
    if !rest.is_empty() {
        return Err(DecodeError::corrupt(
            at,
            "a list of packs ends inside an id",
        ));
    }
    let name = |[kind, id @ ..]: &[u8; 17]| {
        let kind = PackKind::from_code(*kind)
            .ok_or_else(|| DecodeError::corrupt(at, "a pack of no known kind"))?;
        Ok((kind, PackId::from_bytes(*id)))
    };
    packs.iter().map(name).collect()
}

const TAG_SEEN: u16 = 1;
const TAG_SNAPSHOTS: u16 = 2;
const TAG_PACKS: u16 = 3;
const TAG_ROOTS: u16 = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn snapshots(bytes: &[u8]) -> Vec<SnapshotId> {
        bytes
            .iter()
            .map(|b| SnapshotId::from_bytes([*b; 16]))
            .collect()
    }

    fn packs(bytes: &[u8]) -> Vec<PackName> {
        let pack = |b: &u8| (PackKind::Meta, PackId::from_bytes([*b; 16]));
        bytes.iter().map(pack).collect()
    }

    #[test]
    fn each_kind_survives_its_bytes_and_is_no_other() {
        let key = [1; 32];
        let beat = Beat {
            seen: Some(7),
            parents: snapshots(&[1, 2]),
        };
        let condemned = Condemned {
            packs: packs(&[1, 2, 3]),
            dropped: snapshots(&[4]),
            roots: snapshots(&[5, 6]),
        };
        let sweep = Sweep {
            packs: packs(&[1]),
            snapshots: snapshots(&[4]),
        };
        let files = [
            beat.encode(&key).unwrap(),
            condemned.encode(&key).unwrap(),
            sweep.encode(&key).unwrap(),
        ];
        assert_eq!(Beat::decode(&files[0], &key), Ok(beat));
        assert_eq!(Condemned::decode(&files[1], &key), Ok(condemned));
        assert_eq!(Sweep::decode(&files[2], &key), Ok(sweep));
        assert!(Beat::decode(&files[1], &key).is_err());
        assert!(Condemned::decode(&files[2], &key).is_err());
        assert!(Sweep::decode(&files[0], &key).is_err());
        assert!(Beat::decode(&files[0], &[2; 32]).is_err());
        let fence = encode_mark(FileKind::Fence, &key).unwrap();
        let done = encode_mark(FileKind::Done, &key).unwrap();
        assert!(is_fence(&fence, &key) && !is_fence(&fence, &[2; 32]) && !is_fence(&done, &key));
    }

    proptest! {
        #[test]
        fn random_payload_never_panics(payload: Vec<u8>) {
            for kind in [FileKind::Beat, FileKind::Condemned, FileKind::Sweep] {
                let file = envelope::wrap(kind, &payload, Some(&[1; 32])).unwrap();
                let _ = Beat::decode(&file, &[1; 32]);
                let _ = Condemned::decode(&file, &[1; 32]);
                let _ = Sweep::decode(&file, &[1; 32]);
            }
        }
    }
}
