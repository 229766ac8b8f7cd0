//! The files `snap/<session>`: tagged values, nested for each disk, under a MAC.

use super::config::Features;
use super::cursor::Cursor;
use super::envelope::{self, PAYLOAD_AT};
use super::pack::PackKind;
use super::tlv::{Tlv, TlvWriter, once, read_tlvs, required};
use super::{DecodeError, FileKind};
use crate::repo::chunk::{ChunkSize, Place, RecordFlags};
use crate::repo::cipher::{Encryption, open_text, seal_text};
use crate::repo::error::RepoError;
use crate::repo::ids::{NodeId, PackId, RepoUuid, SnapshotId};
use crate::repo::keys::Keys;
use crate::repo::snapshot::{
    BackupKind, DiskRecord, DiskStats, MapRoot, NodeRef, Origin, Snapshot, SnapshotDraft,
    WrittenPack, level_for,
};

/// The name of a snapshot's file.
pub(crate) fn file_name(id: &SnapshotId) -> String {
    format!("snap/{id}")
}

impl Snapshot {
    /// Encodes it as a file of its own kind, or as what is left of it once it is forgotten.
    pub(crate) fn encode(&self, kind: FileKind, keys: &Keys) -> Result<Vec<u8>, RepoError> {
        let mut tlv = TlvWriter::default();
        Features::of(keys.encryption()).put(TAG_FEATURES, &mut tlv)?;
        tlv.put(TAG_ID, self.id.as_bytes())?;
        tlv.put(TAG_REPO, self.repo.as_bytes())?;
        match keys.encryption() {
            Encryption::None => self.put_fields(&mut tlv)?,
            Encryption::Aes256Gcm => {
                let mut fields = TlvWriter::default();
                self.put_fields(&mut fields)?;
                let sealed = seal_text(keys.texts(), &sealed_for(&self.id), fields.finish())?;
                tlv.put(TAG_SEALED, &sealed)?;
            }
        }
        envelope::wrap(kind, &tlv.finish(), Some(keys.mac()))
            .map_err(|e| e.in_file(&file_name(&self.id)))
    }

    fn put_fields(&self, tlv: &mut TlvWriter) -> Result<(), RepoError> {
        let draft = &self.draft;
        tlv.put(TAG_NAME, draft.name.as_bytes())?;
        for tag in &draft.tags {
            tlv.put(TAG_TAG, tag.as_bytes())?;
        }
        tlv.put(TAG_STARTED, &draft.started_unix_nanos.to_le_bytes())?;
        tlv.put(TAG_FINISHED, &draft.finished_unix_nanos.to_le_bytes())?;
        tlv.put(TAG_TOOL, draft.tool.as_bytes())?;
        tlv.put(TAG_COMPLETE, &[u8::from(draft.complete)])?;
        if let Some(origin) = &draft.origin {
            let bytes = [&origin.repo.as_bytes()[..], origin.snapshot.as_bytes()].concat();
            tlv.put(TAG_ORIGIN, &bytes)?;
        }
        for pack in &self.packs {
            tlv.put(TAG_PACK, &encode_pack(pack))?;
        }
        for disk in &draft.disks {
            tlv.put(TAG_DISK, &encode_disk(disk)?)?;
        }
        Ok(())
    }

    /// Reads the fields of a file whose MAC fits.
    pub(crate) fn decode(
        file: &[u8],
        kind: FileKind,
        keys: &Keys,
        chunk_size: ChunkSize,
    ) -> Result<Self, DecodeError> {
        let opened = envelope::unwrap(file, kind, true)?;
        opened.check_mac(keys.mac())?;
        let (mut features, mut id, mut repo, mut sealed) = (None, None, None, None);
        for tlv in read_tlvs(opened.payload, PAYLOAD_AT) {
            let tlv = tlv?;
            match tlv.tag {
                TAG_FEATURES => {
                    let found = tlv.whole("features", Features::read)?;
                    found.check()?;
                    once(&mut features, found, &tlv)?;
                }
                TAG_ID => once(&mut id, tlv.array("snapshot id")?, &tlv)?,
                TAG_REPO => once(&mut repo, tlv.array("repository uuid")?, &tlv)?,
                TAG_SEALED => once(&mut sealed, tlv.value, &tlv)?,
                _ => {}
            }
        }
        required(features, PAYLOAD_AT, "list of features")?;
        let id = SnapshotId::from_bytes(required(id, PAYLOAD_AT, "snapshot id")?);
        let repo = RepoUuid::from_bytes(required(repo, PAYLOAD_AT, "repository uuid")?);
        let (draft, packs) = match keys.encryption() {
            Encryption::None => read_fields(opened.payload, PAYLOAD_AT, chunk_size)?,
            Encryption::Aes256Gcm => {
                let sealed = required(sealed, PAYLOAD_AT, "sealed part")?;
                let fields =
                    open_text(keys.texts(), &sealed_for(&id), sealed).ok_or_else(|| {
                        DecodeError::corrupt(PAYLOAD_AT, "the sealed part does not open")
                    })?;
                // The offsets in messages are those in the sealed part.
                read_fields(&fields, 0, chunk_size)?
            }
        };
        Ok(Self {
            id,
            repo,
            draft,
            packs,
        })
    }
}

fn read_fields(
    bytes: &[u8],
    at: u64,
    chunk_size: ChunkSize,
) -> Result<(SnapshotDraft, Vec<WrittenPack>), DecodeError> {
    let (mut name, mut started, mut finished) = (None, None, None);
    let (mut tool, mut complete, mut origin) = (None, None, None);
    let (mut tags, mut packs, mut disks) = (Vec::new(), Vec::new(), Vec::new());
    for tlv in read_tlvs(bytes, at) {
        let tlv = tlv?;
        match tlv.tag {
            TAG_NAME => once(&mut name, tlv.text("name")?, &tlv)?,
            TAG_TAG => tags.push(tlv.text("tag")?),
            TAG_STARTED => once(&mut started, nanos(&tlv)?, &tlv)?,
            TAG_FINISHED => once(&mut finished, nanos(&tlv)?, &tlv)?,
            TAG_TOOL => once(&mut tool, tlv.text("tool")?, &tlv)?,
            TAG_COMPLETE => once(&mut complete, flag(&tlv)?, &tlv)?,
            TAG_ORIGIN => once(&mut origin, tlv.whole("origin", decode_origin)?, &tlv)?,
            TAG_PACK => packs.push(tlv.whole("pack", decode_pack)?),
            TAG_DISK => disks.push(decode_disk(&tlv, chunk_size)?),
            _ => {}
        }
    }
    let draft = SnapshotDraft {
        name: required(name, at, "name")?,
        tags,
        started_unix_nanos: required(started, at, "start")?,
        finished_unix_nanos: required(finished, at, "end")?,
        tool: required(tool, at, "tool")?,
        complete: required(complete, at, "flag of completeness")?,
        origin,
        disks,
    };
    Ok((draft, packs))
}

fn sealed_for(id: &SnapshotId) -> Vec<u8> {
    [&b"snapshot"[..], id.as_bytes()].concat()
}

fn decode_origin(cursor: &mut Cursor<'_>) -> Result<Origin, DecodeError> {
    Ok(Origin {
        repo: RepoUuid::from_bytes(cursor.array("repository uuid")?),
        snapshot: SnapshotId::from_bytes(cursor.array("snapshot id")?),
    })
}

fn encode_pack(pack: &WrittenPack) -> Vec<u8> {
    let mut bytes = vec![pack.kind.code()];
    bytes.extend_from_slice(pack.id.as_bytes());
    bytes.extend_from_slice(&pack.len.to_le_bytes());
    bytes.extend_from_slice(&pack.footer_hash);
    bytes
}

fn decode_pack(cursor: &mut Cursor<'_>) -> Result<WrittenPack, DecodeError> {
    let at = cursor.at();
    Ok(WrittenPack {
        kind: PackKind::from_code(cursor.u8("kind of pack")?)
            .ok_or_else(|| DecodeError::corrupt(at, "a pack of no known kind"))?,
        id: PackId::from_bytes(cursor.array("pack id")?),
        len: cursor.u64("pack length")?,
        footer_hash: cursor.array("footer hash")?,
    })
}

fn encode_disk(disk: &DiskRecord) -> Result<Vec<u8>, RepoError> {
    let mut tlv = TlvWriter::default();
    tlv.put(DISK_NAME, disk.disk.as_bytes())?;
    tlv.put(DISK_SIZE, &disk.size_bytes.to_le_bytes())?;
    tlv.put(DISK_ROOT, &encode_root(&disk.root))?;
    let kind = match disk.kind {
        BackupKind::Full => KIND_FULL,
        BackupKind::Incremental => KIND_INCREMENTAL,
    };
    tlv.put(DISK_KIND, &[kind])?;
    if let Some(reason) = &disk.reason {
        tlv.put(DISK_REASON, reason.as_bytes())?;
    }
    if let Some(parent) = &disk.parent {
        tlv.put(DISK_PARENT, parent.as_bytes())?;
    }
    if let Some(bitmap) = &disk.bitmap_used {
        tlv.put(DISK_BITMAP_USED, bitmap.as_bytes())?;
    }
    for bitmap in &disk.bitmaps_started {
        tlv.put(DISK_BITMAP_STARTED, bitmap.as_bytes())?;
    }
    for bitmap in &disk.bitmaps_lost {
        tlv.put(DISK_BITMAP_LOST, bitmap.as_bytes())?;
    }
    tlv.put(DISK_GENERATION, &disk.generation.to_le_bytes())?;
    tlv.put(DISK_SOURCE, disk.source.as_bytes())?;
    let stats = &disk.stats;
    let mut bytes = Vec::new();
    for number in [
        stats.dirty_bytes,
        stats.read_bytes,
        stats.zero_bytes,
        stats.chunks_total,
        stats.chunks_new,
        stats.new_bytes,
        stats.stored_bytes,
    ] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    tlv.put(DISK_STATS, &bytes)?;
    Ok(tlv.finish())
}

fn decode_disk(disk: &Tlv<'_>, chunk_size: ChunkSize) -> Result<DiskRecord, DecodeError> {
    let (mut name, mut size, mut root, mut kind) = (None, None, None, None);
    let (mut reason, mut parent, mut used, mut source) = (None, None, None, None);
    let (mut started, mut lost) = (Vec::new(), Vec::new());
    let (mut generation, mut stats) = (None, None);
    for tlv in read_tlvs(disk.value, disk.at) {
        let tlv = tlv?;
        match tlv.tag {
            DISK_NAME => once(&mut name, tlv.text("disk name")?, &tlv)?,
            DISK_SIZE => once(&mut size, tlv.u64("disk size")?, &tlv)?,
            DISK_ROOT => once(&mut root, tlv.whole("map root", decode_root)?, &tlv)?,
            DISK_KIND => {
                let found = match tlv.u8("kind of backup")? {
                    KIND_FULL => BackupKind::Full,
                    KIND_INCREMENTAL => BackupKind::Incremental,
                    other => {
                        let what = format!("a backup of kind {other}");
                        return Err(DecodeError::unsupported(what));
                    }
                };
                once(&mut kind, found, &tlv)?;
            }
            DISK_REASON => once(&mut reason, tlv.text("reason")?, &tlv)?,
            DISK_PARENT => once(&mut parent, tlv.array("parent")?, &tlv)?,
            DISK_BITMAP_USED => once(&mut used, tlv.text("bitmap")?, &tlv)?,
            DISK_BITMAP_STARTED => started.push(tlv.text("bitmap")?),
            DISK_BITMAP_LOST => lost.push(tlv.text("bitmap")?),
            DISK_GENERATION => once(&mut generation, tlv.u64("generation")?, &tlv)?,
            DISK_SOURCE => once(&mut source, tlv.text("source")?, &tlv)?,
            DISK_STATS => once(&mut stats, decode_stats(&tlv)?, &tlv)?,
            _ => {}
        }
    }
    let size_bytes = required(size, disk.at, "disk size")?;
    let root: MapRoot = required(root, disk.at, "map root")?;
    if root.level != level_for(chunk_size.count(size_bytes)) {
        return Err(DecodeError::corrupt(
            disk.at,
            format!(
                "a map of level {} for a disk of {size_bytes} bytes",
                root.level
            ),
        ));
    }
    Ok(DiskRecord {
        disk: required(name, disk.at, "disk name")?,
        size_bytes,
        root,
        kind: required(kind, disk.at, "kind of backup")?,
        reason,
        parent: parent.map(SnapshotId::from_bytes),
        bitmap_used: used,
        bitmaps_started: started,
        bitmaps_lost: lost,
        generation: required(generation, disk.at, "generation")?,
        source: required(source, disk.at, "source")?,
        stats: required(stats, disk.at, "statistics")?,
    })
}

/// A root is its level, then nothing for a disk of zeros, else the node's id and place.
fn encode_root(root: &MapRoot) -> Vec<u8> {
    let mut bytes = vec![root.level];
    if let Some(node) = &root.node {
        let place = &node.place;
        bytes.extend_from_slice(node.id.as_bytes());
        bytes.extend_from_slice(place.pack.as_bytes());
        bytes.extend_from_slice(&place.offset.to_le_bytes());
        bytes.extend_from_slice(&place.len.to_le_bytes());
        bytes.push(place.flags.0);
    }
    bytes
}

fn decode_root(cursor: &mut Cursor<'_>) -> Result<MapRoot, DecodeError> {
    let level = cursor.u8("level of the root")?;
    let node = match cursor.left() {
        0 => None,
        _ => Some(NodeRef {
            id: NodeId::from_bytes(cursor.array("root's id")?),
            place: Place {
                pack: PackId::from_bytes(cursor.array("root's pack")?),
                offset: cursor.u32("root's offset")?,
                len: cursor.u32("root's length")?,
                flags: RecordFlags(cursor.u8("root's flags")?),
            },
        }),
    };
    Ok(MapRoot { node, level })
}

/// Later versions may add numbers behind these.
fn decode_stats(tlv: &Tlv<'_>) -> Result<DiskStats, DecodeError> {
    let mut cursor = tlv.cursor();
    Ok(DiskStats {
        dirty_bytes: cursor.u64("dirty bytes")?,
        read_bytes: cursor.u64("read bytes")?,
        zero_bytes: cursor.u64("zero bytes")?,
        chunks_total: cursor.u64("number of chunks")?,
        chunks_new: cursor.u64("number of new chunks")?,
        new_bytes: cursor.u64("new bytes")?,
        stored_bytes: cursor.u64("stored bytes")?,
    })
}

fn nanos(tlv: &Tlv<'_>) -> Result<i64, DecodeError> {
    tlv.array("time").map(i64::from_le_bytes)
}

fn flag(tlv: &Tlv<'_>) -> Result<bool, DecodeError> {
    match tlv.u8("flag")? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(DecodeError::corrupt(tlv.at, format!("a flag of {other}"))),
    }
}

const TAG_FEATURES: u16 = 1;
const TAG_ID: u16 = 2;
const TAG_ORIGIN: u16 = 13;
const TAG_REPO: u16 = 3;
const TAG_NAME: u16 = 4;
const TAG_TAG: u16 = 5;
const TAG_STARTED: u16 = 6;
const TAG_FINISHED: u16 = 7;
const TAG_TOOL: u16 = 8;
const TAG_COMPLETE: u16 = 9;
const TAG_PACK: u16 = 10;
const TAG_DISK: u16 = 11;
const TAG_SEALED: u16 = 12;

const DISK_NAME: u16 = 1;
const DISK_SIZE: u16 = 2;
const DISK_ROOT: u16 = 3;
const DISK_KIND: u16 = 4;
const DISK_REASON: u16 = 5;
const DISK_PARENT: u16 = 6;
const DISK_BITMAP_USED: u16 = 7;
const DISK_BITMAP_STARTED: u16 = 8;
const DISK_SOURCE: u16 = 9;
const DISK_STATS: u16 = 10;
const DISK_BITMAP_LOST: u16 = 11;
const DISK_GENERATION: u16 = 12;

const KIND_FULL: u8 = 0;
const KIND_INCREMENTAL: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Snapshot {
        let place = Place {
            pack: PackId::from_bytes([4; 16]),
            offset: 72,
            len: 61,
            flags: RecordFlags::RAW,
        };
        let disk = DiskRecord {
            disk: "vda".into(),
            size_bytes: 1 << 30,
            root: MapRoot {
                node: Some(NodeRef {
                    id: NodeId::from_bytes([5; 32]),
                    place,
                }),
                level: 1,
            },
            kind: BackupKind::Incremental,
            reason: Some("asked for".into()),
            parent: Some(SnapshotId::from_bytes([6; 16])),
            bitmap_used: Some("b0".into()),
            bitmaps_lost: vec!["bm2".to_owned()],
            generation: 3,
            bitmaps_started: vec!["b1".into(), "b2".into()],
            source: "nbd://host/vda".into(),
            stats: DiskStats {
                dirty_bytes: 1,
                read_bytes: 2,
                zero_bytes: 3,
                chunks_total: 4,
                chunks_new: 5,
                new_bytes: 6,
                stored_bytes: 7,
            },
        };
        Snapshot {
            id: SnapshotId::from_bytes([1; 16]),
            repo: RepoUuid::from_bytes([2; 16]),
            draft: SnapshotDraft {
                name: "web".into(),
                tags: vec!["daily".into()],
                started_unix_nanos: -1,
                finished_unix_nanos: i64::MAX,
                tool: "nbdbackup 0.1.0".into(),
                complete: true,
                origin: Some(Origin {
                    repo: RepoUuid::from_bytes([8; 16]),
                    snapshot: SnapshotId::from_bytes([9; 16]),
                }),
                disks: vec![disk],
            },
            packs: vec![WrittenPack {
                kind: PackKind::Data,
                id: PackId::from_bytes([8; 16]),
                len: 99,
                footer_hash: [9; 32],
            }],
        }
    }

    fn keys(byte: u8, encryption: Encryption) -> Keys {
        Keys::derive(&[byte; 32], encryption)
    }

    #[test]
    fn snapshot_survives_its_bytes() {
        for encryption in [Encryption::None, Encryption::Aes256Gcm] {
            survives_its_bytes(encryption);
        }
    }

    fn survives_its_bytes(encryption: Encryption) {
        let keys = keys(3, encryption);
        let mut snapshot = sample();
        let chunk_size = ChunkSize::default();
        let file = snapshot.encode(FileKind::Snapshot, &keys).unwrap();
        assert_eq!(
            Snapshot::decode(&file, FileKind::Snapshot, &keys, chunk_size).unwrap(),
            snapshot
        );
        snapshot.draft.disks[0].root.node = None;
        let file = snapshot.encode(FileKind::Snapshot, &keys).unwrap();
        assert_eq!(
            Snapshot::decode(&file, FileKind::Snapshot, &keys, chunk_size).unwrap(),
            snapshot
        );
        let other = super::tests::keys(4, encryption);
        assert!(Snapshot::decode(&file, FileKind::Snapshot, &other, chunk_size).is_err());
        let named = file.windows(3).any(|w| w == b"vda" || w == b"web");
        assert_eq!(named, encryption == Encryption::None);
    }

    #[test]
    fn snapshot_in_the_clear_is_refused_where_all_are_sealed() {
        let file = sample()
            .encode(FileKind::Snapshot, &keys(3, Encryption::None))
            .unwrap();
        let sealed = keys(3, Encryption::Aes256Gcm);
        assert!(
            Snapshot::decode(&file, FileKind::Snapshot, &sealed, ChunkSize::default()).is_err()
        );
    }

    #[test]
    fn map_whose_height_does_not_fit_the_disk_is_refused() {
        let keys = keys(3, Encryption::None);
        let mut snapshot = sample();
        snapshot.draft.disks[0].size_bytes = 1;
        let file = snapshot.encode(FileKind::Snapshot, &keys).unwrap();
        assert!(Snapshot::decode(&file, FileKind::Snapshot, &keys, ChunkSize::default()).is_err());
    }

    proptest! {
        #[test]
        fn damaged_payload_under_a_good_mac_never_panics(at: prop::sample::Index, to: u8, cut: prop::sample::Index) {
            let keys = keys(3, Encryption::None);
            let file = sample().encode(FileKind::Snapshot, &keys).unwrap();
            let mut payload = file[PAYLOAD_AT as usize..file.len() - 64].to_vec();
            let i = at.index(payload.len());
            payload[i] = to;
            payload.truncate(cut.index(payload.len()) + 1);
            let file = envelope::wrap(FileKind::Snapshot, &payload, Some(keys.mac())).unwrap();
            let _ = Snapshot::decode(&file, FileKind::Snapshot, &keys, ChunkSize::default());
        }
    }
}
