//! What was stored is read again, in any way of reading, and nothing is stored twice.

use std::sync::Arc;

use nbdbackup::repo::{
    ChunkSize, Compression, InitOptions, LocalStorage, RepoError, Repository, SessionOptions,
    SnapshotDraft, Storage,
};

use crate::support::*;

#[test]
fn disk_is_restored_from_a_local_directory_without_any_index() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(LocalStorage::create(dir.path().join("r")).unwrap());
    let repo = Repository::init(Arc::clone(&storage), &options()).unwrap();
    let disk = some_disk(&mut Rng(1), 300 * CHUNK + 777);
    let id = backup(&repo, &disk).unwrap().id;
    assert_eq!(storage.list("tmp/").unwrap(), []);
    for file in storage.list("idx/").unwrap() {
        storage.remove(&file.name).unwrap();
    }
    let storage = Arc::new(LocalStorage::open(dir.path().join("r")).unwrap());
    let repo = Repository::open(storage).unwrap();
    let list = repo.snapshots().unwrap();
    assert_eq!(list.snapshots.len(), 1);
    assert!(list.unreadable.is_empty());
    assert!(restore(&repo, &id).unwrap() == disk);
}

#[test]
fn same_disk_again_stores_nothing_new() {
    let (storage, repo) = new_repo();
    let disk = some_disk(&mut Rng(2), 400 * CHUNK + 5);
    let first = backup(&repo, &disk).unwrap();
    assert!(!first.packs.is_empty());
    let packs = |storage: &dyn Storage| {
        storage.list("packs/").unwrap().len() + storage.list("meta/").unwrap().len()
    };
    let before = packs(&storage);
    for repo in [
        Arc::clone(&repo),
        Repository::open(Arc::new(storage.clone())).unwrap(),
    ] {
        let session = repo.begin(&small_session()).unwrap();
        let (root, new) = store_disk(&session, &disk).unwrap();
        assert_eq!(new, 0);
        let again = session
            .commit(draft("disk", disk.len() as u64, root))
            .unwrap();
        assert_eq!(again.packs, []);
        assert_eq!(
            again.draft.disks[0].root.id(),
            first.draft.disks[0].root.id()
        );
        assert!(restore(&repo, &again.id).unwrap() == disk);
    }
    assert_eq!(packs(&storage), before);
}

#[test]
fn each_chunk_is_read_alone_and_checked() {
    let (_, repo) = new_repo();
    let disk = some_disk(&mut Rng(3), 20 * CHUNK + 1);
    let snapshot = backup(&repo, &disk).unwrap();
    let record = &snapshot.draft.disks[0];
    let map = repo.map(&record.root, record.size_bytes).unwrap();
    let mut out = vec![1; 10];
    for (number, want) in disk.chunks(CHUNK).enumerate() {
        match map.chunk(number as u64).unwrap() {
            Some(entry) => {
                repo.read_chunk(&entry, want.len() as u32, &mut out)
                    .unwrap();
                assert!(out == want);
                let wrong = repo.read_chunk(&entry, want.len() as u32 + 1, &mut out);
                assert!(matches!(wrong, Err(RepoError::Corrupt { .. })), "{wrong:?}");
            }
            None => assert!(want.iter().all(|b| *b == 0)),
        }
    }
    assert_eq!(map.chunk(map.chunks()).unwrap(), None);
}

#[test]
fn disks_of_each_awkward_size_and_compression_are_restored() {
    for compression in [
        Compression::None,
        Compression::Zstd { level: -3 },
        Compression::Zstd { level: 5 },
    ] {
        let (_, repo) = new_repo();
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 128 * CHUNK, 129 * CHUNK] {
            let mut disk = vec![0; len];
            Rng(len as u64).fill(&mut disk);
            let session = repo
                .begin(&SessionOptions {
                    compression: Some(compression),
                    ..small_session()
                })
                .unwrap();
            let (root, _) = store_disk(&session, &disk).unwrap();
            let id = session.commit(draft("d", len as u64, root)).unwrap().id;
            assert!(restore(&repo, &id).unwrap() == disk, "{compression} {len}");
        }
    }
}

#[test]
fn dropped_session_leaves_no_snapshot_and_no_temporary_file() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(LocalStorage::create(dir.path()).unwrap());
    let repo = Repository::init(Arc::clone(&storage), &options()).unwrap();
    let session = repo.begin(&small_session()).unwrap();
    store_disk(&session, &some_disk(&mut Rng(4), 40 * CHUNK)).unwrap();
    drop(session);
    assert!(repo.snapshots().unwrap().snapshots.is_empty());
    let left = std::fs::read_dir(dir.path().join("tmp")).unwrap().count();
    assert_eq!(left, 0);
}

#[test]
fn finished_session_takes_nothing_more() {
    let (_, repo) = new_repo();
    let session = repo.begin(&small_session()).unwrap();
    session.commit(SnapshotDraft::default()).unwrap();
    let late = session.store_chunk(b"late");
    assert!(matches!(late, Err(RepoError::SessionFinished { .. })));
    let twice = session.commit(SnapshotDraft::default());
    assert!(matches!(twice, Err(RepoError::SessionFinished { .. })));
}

#[test]
fn map_of_another_session_is_refused_at_commit() {
    let (_, repo) = new_repo();
    let lost = repo.begin(&small_session()).unwrap();
    let (root, _) = store_disk(&lost, &[7; CHUNK]).unwrap();
    drop(lost);
    let session = repo.begin(&small_session()).unwrap();
    let refused = session.commit(draft("d", CHUNK as u64, root));
    assert!(matches!(refused, Err(RepoError::Misuse { .. })));
}

#[test]
fn place_that_is_not_empty_is_refused_and_an_interrupted_init_is_taken_up() {
    let (storage, _) = new_repo();
    let again = Repository::init(Arc::new(storage.clone()), &options());
    assert!(matches!(again, Err(RepoError::NotEmpty { .. })));
    for kept in [1, 2] {
        let broken = nbdbackup::repo::MemoryStorage::new();
        for name in ["keys/0", "keys/0.bak"].iter().take(kept) {
            broken.damage(name, storage.read(name, 1 << 20).unwrap());
        }
        let opened = Repository::open(Arc::new(broken.clone()));
        assert!(matches!(opened, Err(RepoError::NotARepository { .. })));
        let repo = Repository::init(Arc::new(broken), &options()).unwrap();
        backup(&repo, &[1; CHUNK]).unwrap();
    }
    let other = nbdbackup::repo::MemoryStorage::new();
    other.damage("holiday.jpg", vec![1]);
    let refused = Repository::init(Arc::new(other), &options());
    assert!(matches!(refused, Err(RepoError::NotEmpty { .. })));
}

#[test]
fn settings_of_the_repository_survive_and_disks_commit_together() {
    let storage = nbdbackup::repo::MemoryStorage::new();
    let options = InitOptions {
        chunk_size: ChunkSize::new(1 << 20).unwrap(),
        compression: Compression::Zstd { level: 7 },
        ..InitOptions::default()
    };
    let repo = Repository::init(Arc::new(storage.clone()), &options).unwrap();
    let again = Repository::open(Arc::new(storage)).unwrap();
    assert_eq!(again.uuid(), repo.uuid());
    assert_eq!(again.chunk_size(), options.chunk_size);
    assert_eq!(again.compression(), options.compression);
    let session = repo.begin(&SessionOptions::default()).unwrap();
    let mut disks = Vec::new();
    for name in ["a", "b"] {
        let root = {
            let mut map = session.map_writer(None, 100).unwrap();
            let stored = session.store_chunk(&[name.as_bytes()[0]; 100]).unwrap();
            map.put(0, stored.entry.unwrap()).unwrap();
            map.finish().unwrap()
        };
        disks.extend(draft(name, 100, root).disks);
    }
    let draft = SnapshotDraft {
        disks,
        started_unix_nanos: 5,
        ..SnapshotDraft::default()
    };
    let committed = session.commit(draft.clone()).unwrap();
    assert_eq!(committed.id, session.id());
    let read = again.snapshot(&committed.id).unwrap();
    assert_eq!(read, committed);
    assert_eq!(read.draft, draft);
}

#[test]
fn lowered_limit_spills_to_the_index_and_is_still_found() {
    let (storage, repo) = new_repo();
    let disk = some_disk(&mut Rng(6), 200 * CHUNK);
    let session = repo
        .begin(&SessionOptions {
            remembered: 10,
            ..small_session()
        })
        .unwrap();
    let (root, new) = store_disk(&session, &disk).unwrap();
    assert!(new > 50);
    assert!(storage.list("idx/0/").unwrap().len() > 3);
    let (same, none) = store_disk(&session, &disk).unwrap();
    assert_eq!((same.id(), none), (root.id(), 0));
    let id = session
        .commit(draft("d", disk.len() as u64, root))
        .unwrap()
        .id;
    let repo = Repository::open(Arc::new(storage)).unwrap();
    assert!(restore(&repo, &id).unwrap() == disk);
    let session = repo.begin(&small_session()).unwrap();
    assert_eq!(store_disk(&session, &disk).unwrap().1, 0);
}
