//! What must cost little however large the disk and however many the snapshots.

use std::sync::Arc;

use nbdbackup::repo::{
    ChunkSize, InitOptions, MemoryStorage, PruneOptions, Repository, Run, Session, SnapshotDraft,
    Storage,
};

use crate::support::*;

const DISK: u64 = 10 << 40;

fn large_repo() -> (MemoryStorage, Arc<Repository>) {
    let storage = MemoryStorage::new();
    let options = InitOptions {
        chunk_size: ChunkSize::default(),
        ..InitOptions::default()
    };
    let repo = Repository::init(Arc::new(storage.clone()), &options).unwrap();
    (storage, repo)
}

fn chunk(session: &Session, seed: u64) -> nbdbackup::repo::ChunkEntry {
    let mut bytes = vec![0; 128 << 10];
    Rng(seed).fill(&mut bytes);
    session.store_chunk(&bytes).unwrap().entry.unwrap()
}

#[test]
fn one_dirty_chunk_of_ten_tebibytes_writes_a_node_per_level() {
    let (storage, repo) = large_repo();
    let session = repo.begin(&small_session()).unwrap();
    let chunks = repo.chunk_size().count(DISK);
    let mut map = session.map_writer(None, DISK).unwrap();
    // Every 100,000th chunk, so that nodes stand all over the disk.
    for number in (0..chunks).step_by(100_000) {
        map.zero(map.position()..number).unwrap();
        map.put(number, chunk(&session, number)).unwrap();
    }
    map.zero(map.position()..chunks).unwrap();
    let parent = map.finish().unwrap();
    let parent_id = session.commit(draft("d", DISK, parent)).unwrap().id;

    let calls = FaultStorage::new(Arc::new(storage), u64::MAX, Fault::Once);
    let repo = Repository::open(Arc::new(calls.clone())).unwrap();
    let session = repo.begin(&session_after(&[parent_id])).unwrap();
    let entry = chunk(&session, 77);
    let before = calls.calls();
    let mut map = session.map_writer(Some((&parent, DISK)), DISK).unwrap();
    let number = 54_321_987;
    map.keep(0..number).unwrap();
    map.put(number, entry).unwrap();
    map.keep(number + 1..chunks).unwrap();
    assert!(map.nodes_written() <= 4);
    let root = map.finish().unwrap();
    // Reads the path in the parent; writes the header and four nodes of the meta pack.
    assert!(calls.calls() - before < 12, "{}", calls.calls() - before);
    let snapshot = session.commit(draft("d", DISK, root)).unwrap();
    let meta: u64 = snapshot
        .packs
        .iter()
        .filter(|p| p.kind == nbdbackup::repo::PackKind::Meta)
        .map(|p| p.len)
        .sum();
    assert!(meta < 24 << 10, "{meta}");
    let map = repo.map(&root, DISK).unwrap();
    let runs: Vec<Run> = map
        .runs(number - 1..number + 2)
        .collect::<Result<_, _>>()
        .unwrap();
    assert!(
        matches!(&runs[..], [Run::Hole { .. }, Run::Chunk { number: n, .. }, Run::Hole { .. }] if *n == number)
    );
}

#[test]
fn keeping_all_of_ten_tebibytes_reads_and_writes_nothing() {
    let (storage, repo) = large_repo();
    let session = repo.begin(&small_session()).unwrap();
    let mut map = session.map_writer(None, DISK).unwrap();
    map.put(0, chunk(&session, 1)).unwrap();
    map.zero(1..map.chunks()).unwrap();
    let parent = map.finish().unwrap();
    let parent_id = session.commit(draft("d", DISK, parent)).unwrap().id;
    let calls = FaultStorage::new(Arc::new(storage), u64::MAX, Fault::Once);
    let repo = Repository::open(Arc::new(calls.clone())).unwrap();
    let session = repo.begin(&session_after(&[parent_id])).unwrap();
    let before = calls.calls();
    let mut map = session.map_writer(Some((&parent, DISK)), DISK).unwrap();
    map.keep(0..map.chunks()).unwrap();
    assert_eq!(map.finish().unwrap(), parent);
    assert_eq!(calls.calls(), before);
    // Growing to the largest disk keeps the old root as it is.
    let mut map = session
        .map_writer(Some((&parent, DISK)), u64::MAX / 2)
        .unwrap();
    map.keep(0..map.keepable()).unwrap();
    map.zero(map.position()..map.chunks()).unwrap();
    let grown = map.finish().unwrap();
    session.commit(draft("d", u64::MAX / 2, grown)).unwrap();
    let map = repo.map(&grown, u64::MAX / 2).unwrap();
    assert!(map.chunk(0).unwrap().is_some());
}

/// `NBDBACKUP_TEST_SESSIONS=100000` takes minutes.
#[test]
fn segments_stay_few_however_many_sessions_there_are() {
    let sessions = std::env::var("NBDBACKUP_TEST_SESSIONS");
    let sessions: u64 = sessions.map_or(2_000, |text| text.parse().unwrap());
    let (memory, repo) = new_repo();
    let chunk = |seed: u64| seed.to_le_bytes().repeat(CHUNK / 8);
    let size = (sessions + 1) * CHUNK as u64;
    // A disk of which each session stores one more chunk; only the latest snapshot stays, and now and then there is a prune.
    let session = repo.begin(&small_session()).unwrap();
    let mut map = session.map_writer(None, size).unwrap();
    map.zero(0..map.chunks()).unwrap();
    let mut latest = session
        .commit(draft("d", size, map.finish().unwrap()))
        .unwrap();
    let (mut most, mut files) = (0, 0);
    for seed in 1..=sessions {
        let session = repo.begin(&session_after(&[latest.id])).unwrap();
        let parent = (&latest.draft.disks[0].root, size);
        let mut map = session.map_writer(Some(parent), size).unwrap();
        map.keep(0..seed).unwrap();
        let entry = session.store_chunk(&chunk(seed)).unwrap().entry.unwrap();
        map.put(seed, entry).unwrap();
        map.keep(seed + 1..map.chunks()).unwrap();
        let next = session
            .commit(draft("d", size, map.finish().unwrap()))
            .unwrap();
        memory.remove(&format!("snap/{}", latest.id)).unwrap();
        latest = next;
        if seed % 97 == 0 {
            most = most.max(repo.index_segments().unwrap());
            files = files.max(memory.list("idx/").unwrap().len());
        }
        if seed % 1_000 == 0 {
            let keep_packs = PruneOptions {
                max_unused_percent: 100.0,
                ..crate::prune::at_once()
            };
            repo.prune(&keep_packs).unwrap();
        }
    }
    println!("{sessions} sessions: at most {most} segments that count, {files} files");
    assert!(most < 40, "{most} segments after {sessions} sessions");
    // Another process sees as few, and knows all.
    let other = open(&memory);
    assert!(other.index_segments().unwrap() < 40);
    let session = other.begin(&small_session()).unwrap();
    for seed in (1..=sessions).step_by(sessions as usize / 100) {
        assert!(!session.store_chunk(&chunk(seed)).unwrap().is_new, "{seed}");
    }
}

#[test]
fn a_thousand_sessions_leave_few_segments_and_open_with_few_calls() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> =
        Arc::new(nbdbackup::repo::LocalStorage::create(dir.path()).unwrap());
    let memory = MemoryStorage::new();
    let repo = Repository::init(Arc::new(memory.clone()), &options()).unwrap();
    for seed in 1..=1000_u64 {
        let session = repo.begin(&small_session()).unwrap();
        let (root, _) = store_disk(&session, &seed.to_le_bytes().repeat(CHUNK / 8)).unwrap();
        session
            .commit(SnapshotDraft {
                started_unix_nanos: 1000 - seed as i64,
                ..draft("d", CHUNK as u64, root)
            })
            .unwrap();
    }
    // Nothing was merged twice.
    assert_eq!(memory.list("idx/").unwrap().len(), 1000 + 125 + 15 + 1);
    for file in memory.list("").unwrap() {
        let path = dir.path().join(&file.name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, memory.read(&file.name, u64::MAX).unwrap()).unwrap();
    }
    let counting = FaultStorage::new(storage, u64::MAX, Fault::Once);
    let repo = Repository::open(Arc::new(counting.clone())).unwrap();
    let opened = counting.calls();
    let list = repo.snapshots().unwrap();
    let listed = counting.calls() - opened;
    let segments = repo.index_segments().unwrap();
    let indexed = counting.calls() - opened - listed;
    assert_eq!(list.snapshots.len(), 1000);
    assert!(
        list.snapshots
            .is_sorted_by_key(|s| s.draft.started_unix_nanos)
    );
    assert!(segments < 32, "{segments} segments");
    // Opening reads the configuration and the key; a listing reads each snapshot once; the index reads a few pieces of
    // each segment that counts, and nothing of those that were merged.
    assert!(opened < 12, "{opened} calls to open");
    assert!(listed < 1000 + 5, "{listed} calls to list");
    assert!(
        indexed < 6 * segments as u64 + 5,
        "{indexed} calls for {segments} segments"
    );
    // Each of them is still known.
    let session = repo.begin(&small_session()).unwrap();
    for seed in (1..=1000_u64).step_by(50) {
        let stored = session
            .store_chunk(&seed.to_le_bytes().repeat(CHUNK / 8))
            .unwrap();
        assert!(!stored.is_new, "{seed}");
    }
}
