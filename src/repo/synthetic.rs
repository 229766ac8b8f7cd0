//! A repository of very many chunks of which none is stored: what the index, the maps and a prune cost at that size.
//!
//! `NBDBACKUP_SYNTHETIC_CHUNKS` says how many, `NBDBACKUP_SYNTHETIC_DIR` where it stays for the program to work on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chunk::{ChunkEntry, Place, RecordFlags};
use super::format::pack::PackKind;
use super::format::segment::{SegmentEntry, prefix_of};
use super::ids::{ChunkId, PackId};
use super::prune::PruneOptions;
use super::repository::{InitOptions, Repository};
use super::session::SessionOptions;
use super::snapshot::{DiskRecord, DiskStats, SnapshotDraft};
use super::storage::LocalStorage;
use crate::repo::BackupKind;

/// Makes the repository: one snapshot of one disk, all of whose chunks differ.
fn make(folder: &Path, chunks: u64) -> Arc<Repository> {
    let storage = LocalStorage::create(folder).unwrap();
    let repo = Repository::init(Arc::new(storage), &InitOptions::default()).unwrap();
    let disk_bytes = chunks * u64::from(repo.chunk_size().bytes());
    let session = repo.begin(&SessionOptions::default()).unwrap();
    let mut map = session.map_writer(None, disk_bytes).unwrap();
    let (mut entries, mut packs) = (Vec::new(), Vec::new());
    for number in 0..chunks {
        let slot = number % CHUNKS_PER_PACK;
        if slot == 0 {
            packs.push((PackKind::Data, pack_of(number)));
            make_pack(folder, &pack_of(number));
        }
        let place = Place {
            pack: pack_of(number),
            offset: 4096 + slot as u32 * STORED,
            len: STORED,
            flags: RecordFlags::ZSTD,
        };
        let id = ChunkId::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes());
        map.put(number, ChunkEntry { id, place }).unwrap();
        entries.push(SegmentEntry {
            prefix: prefix_of(id.as_bytes()),
            pack: packs.len() as u32 - 1,
            offset: place.offset,
            len: place.len,
            flags: place.flags.0,
        });
        if entries.len() == SEGMENT_ENTRIES || number + 1 == chunks {
            repo.index()
                .add(std::mem::take(&mut entries), &packs)
                .unwrap();
            packs = vec![(PackKind::Data, pack_of(number))];
        }
    }
    let root = map.finish().unwrap();
    let disk = DiskRecord {
        disk: "vda".to_owned(),
        size_bytes: disk_bytes,
        root,
        kind: BackupKind::Full,
        reason: None,
        parent: None,
        generation: 1,
        bitmap_used: None,
        bitmaps_started: vec!["bm0".to_owned()],
        bitmaps_lost: Vec::new(),
        source: "synthetic".to_owned(),
        stats: DiskStats::default(),
    };
    let draft = SnapshotDraft {
        name: "large".to_owned(),
        complete: true,
        disks: vec![disk],
        ..SnapshotDraft::default()
    };
    session.commit(draft).unwrap();
    repo
}

fn pack_of(chunk: u64) -> PackId {
    let hash = blake3::hash(&(chunk / CHUNKS_PER_PACK).to_be_bytes());
    let (id, _) = hash.as_bytes().split_first_chunk().unwrap();
    PackId::from_bytes(*id)
}

/// A file of a pack's length, of holes only.
fn make_pack(folder: &Path, pack: &PackId) {
    let path = folder.join(PackKind::Data.file_name(pack));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let records = CHUNKS_PER_PACK * u64::from(STORED);
    file.set_len(8192 + records).unwrap();
}

#[test]
fn repository_of_many_chunks_is_looked_up_and_pruned() {
    let chunks = std::env::var("NBDBACKUP_SYNTHETIC_CHUNKS");
    let chunks = chunks.map_or(20_000, |text| text.parse().expect("a number of chunks"));
    let scratch = tempfile::tempdir().unwrap();
    let folder = match std::env::var_os("NBDBACKUP_SYNTHETIC_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => scratch.path().join("repository"),
    };
    let repo = make(&folder, chunks);
    for number in [0, 1, chunks / 2, chunks - 1] {
        let id = blake3::hash(&number.to_le_bytes());
        let (_, place) = repo.index().find(id.as_bytes()).unwrap().unwrap();
        assert_eq!(place.pack, pack_of(number));
    }
    assert_eq!(repo.index().find(&[7; 32]).unwrap(), None);
    let options = PruneOptions {
        dry_run: true,
        ..PruneOptions::default()
    };
    let pruned = repo.prune(&options).unwrap();
    assert_eq!((pruned.packs_removed, pruned.packs_repacked), (0, 0));
    assert!(pruned.total_bytes > chunks * u64::from(STORED));
}

const CHUNKS_PER_PACK: u64 = 1000;
/// The length of a record.
const STORED: u32 = 60_000;
const SEGMENT_ENTRIES: usize = 4 << 20;
