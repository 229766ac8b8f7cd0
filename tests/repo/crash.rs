//! A process that dies, storage that fails or fills up, at every single call of a backup.

use std::sync::Arc;

use nbdbackup::repo::{
    InitOptions, LocalStorage, MemoryStorage, RepoError, Repository, SessionOptions, Snapshot,
    SnapshotId, Storage,
};

use crate::support::*;

/// What was backed up before, and what is backed up when the fault strikes.
struct Scene {
    storage: MemoryStorage,
    before: (SnapshotId, Vec<u8>),
    after: Vec<u8>,
}

fn scene() -> Scene {
    let (storage, repo) = new_repo();
    let mut rng = Rng(21);
    let disk = some_disk(&mut rng, 24 * CHUNK + 9);
    let id = backup(&repo, &disk).unwrap().id;
    let mut after = disk.clone();
    rng.fill(&mut after[5 * CHUNK..11 * CHUNK]);
    Scene {
        storage,
        before: (id, disk),
        after,
    }
}

/// Backs up with a table so small that it spills, through the call that fails.
fn backup_with(storage: Arc<dyn Storage>, disk: &[u8]) -> Result<Snapshot, RepoError> {
    let repo = Repository::open(storage)?;
    let session = repo.begin(&SessionOptions {
        remembered: 4,
        ..crate::resume::checkpointed(1)
    })?;
    let (root, _) = store_disk(&session, disk)?;
    session.commit(draft("disk", disk.len() as u64, root))
}

/// Checks what must hold after any fault; `committed` says whether the backup was acknowledged.
fn assert_whole(scene: &Scene, storage: &MemoryStorage, committed: Option<SnapshotId>, what: &str) {
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    let (id, disk) = &scene.before;
    assert!(restore(&repo, id).unwrap() == *disk, "{what}: old snapshot");
    let list = repo.snapshots().unwrap();
    assert!(list.unreadable.is_empty(), "{what}: {:?}", list.unreadable);
    for snapshot in list.snapshots.iter().filter(|s| s.id != *id) {
        let read = restore(&repo, &snapshot.id).unwrap();
        assert!(read == scene.after, "{what}: a half snapshot is visible");
    }
    if let Some(committed) = committed {
        assert!(
            list.snapshots.iter().any(|s| s.id == committed),
            "{what}: an acknowledged snapshot is lost"
        );
    }
    let next = backup(&repo, &scene.after).unwrap();
    assert!(restore(&repo, &next.id).unwrap() == scene.after, "{what}");
}

#[test]
fn process_that_dies_at_any_call_leaves_all_whole() {
    let scene = scene();
    let mut died = 0;
    for at in 1.. {
        let storage = scene.storage.after_power_failure(|_| true);
        let faulty = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Dead);
        let result = backup_with(Arc::new(faulty.clone()), &scene.after);
        let committed = result.as_ref().ok().map(|s| s.id);
        // The machine goes down with it: names that no barrier covered are lost, or some of them.
        for kept in [
            "nothing",
            "snap/",
            "snap/ idx/",
            "snap/ meta/",
            "snap/ packs/",
            "idx/",
        ] {
            let after = storage.after_power_failure(|name| {
                let folder = name.split_inclusive('/').next().unwrap();
                kept.contains(folder)
            });
            let what = format!("call {at}, {kept} left");
            assert_whole(&scene, &after, committed, &what);
        }
        assert_whole(&scene, &storage, committed, &format!("call {at}"));
        match result {
            Ok(_) if faulty.calls() < at => break,
            Ok(_) => {}
            Err(_) => died += 1,
        }
    }
    assert!(died > 40, "{died} calls");
}

#[test]
fn one_failed_call_ends_the_session_and_later_ones_say_so() {
    let scene = scene();
    for at in 1.. {
        let storage = scene.storage.after_power_failure(|_| true);
        let faulty = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Once);
        let result = backup_with(Arc::new(faulty.clone()), &scene.after);
        let lost = storage.after_power_failure(|_| false);
        let committed = result.as_ref().ok().map(|s| s.id);
        assert_whole(&scene, &lost, committed, &format!("call {at}"));
        if faulty.calls() < at {
            break;
        }
    }
}

#[test]
fn no_room_is_said_whichever_write_finds_none() {
    let scene = scene();
    let mut seen = 0;
    for at in 1.. {
        let storage = scene.storage.after_power_failure(|_| true);
        let faulty = FaultStorage::new(Arc::new(storage.clone()), at, Fault::NoRoom);
        match backup_with(Arc::new(faulty.clone()), &scene.after) {
            Ok(_) if faulty.calls() < at => break,
            // Only the merging of segments after the commit may go without room.
            Ok(_) => {}
            Err(RepoError::NoRoom { .. }) => seen += 1,
            Err(other) => panic!("call {at}: {other:?}"),
        }
        assert_whole(&scene, &storage, None, &format!("call {at}"));
    }
    assert!(seen > 30, "{seen} calls");
}

#[test]
fn failure_to_seal_a_pack_surfaces_on_every_later_call() {
    let (storage, _) = new_repo();
    let faulty = FaultStorage::new(Arc::new(storage), 22, Fault::Once);
    let repo = Repository::open(Arc::new(faulty)).unwrap();
    let session = repo.begin(&small_session()).unwrap();
    let mut rng = Rng(3);
    let failed = (0..1000).any(|_| {
        let mut chunk = vec![0; CHUNK];
        rng.fill(&mut chunk);
        session.store_chunk(&chunk).is_err()
    });
    assert!(failed);
    for _ in 0..2 {
        assert!(matches!(
            session.store_chunk(&[1; CHUNK]),
            Err(RepoError::Io { .. })
        ));
        assert!(session.map_writer(None, 1).is_err());
        let commit = session.commit(Default::default());
        assert!(matches!(commit, Err(RepoError::Io { .. })), "{commit:?}");
    }
    assert!(repo.snapshots().unwrap().snapshots.is_empty());
}

#[test]
fn fenced_session_cannot_commit() {
    let (storage, repo) = new_repo();
    let session = repo.begin(&small_session()).unwrap();
    let (root, _) = store_disk(&session, &[1; CHUNK]).unwrap();
    let name = format!("snap/{}", session.id());
    storage.damage(&name, b"fence".to_vec());
    let fenced = session.commit(draft("d", CHUNK as u64, root));
    assert!(matches!(fenced, Err(RepoError::Fenced { id }) if id == session.id()));
    assert_eq!(storage.read(&name, 100).unwrap(), b"fence");
}

#[test]
fn init_that_dies_at_any_call_can_be_done_again() {
    for at in 1.. {
        let storage = MemoryStorage::new();
        let faulty = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Dead);
        let done = Repository::init(Arc::new(faulty.clone()), &options()).is_ok();
        for (left, after) in power_failures(&storage, at) {
            let repo = match Repository::open(Arc::new(after.clone())) {
                Ok(repo) => repo,
                Err(RepoError::NotARepository { .. }) => {
                    assert!(!done);
                    Repository::init(Arc::new(after), &options()).unwrap()
                }
                Err(other) => panic!("call {at}, {left} left: {other:?}"),
            };
            backup(&repo, &[7; 3 * CHUNK]).unwrap();
        }
        if done && faulty.calls() < at {
            println!("init: {} calls", at - 1);
            break;
        }
    }
}

#[test]
fn one_of_several_inits_at_once_wins() {
    for _ in 0..50 {
        let storage = MemoryStorage::new();
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    let storage = Arc::new(storage.clone());
                    scope.spawn(move || Repository::init(storage, &InitOptions::default()))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let won = results.iter().filter(|r| r.is_ok()).count();
        assert_eq!(won, 1, "{results:?}");
        let uuid = results.iter().flatten().next().unwrap().uuid();
        let opened = Repository::open(Arc::new(storage)).unwrap();
        assert_eq!(opened.uuid(), uuid);
        assert!(opened.damaged().is_empty());
    }
}

#[test]
fn concurrent_threads_and_sessions_store_each_chunk_whole() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Arc::new(LocalStorage::create(dir.path()).unwrap());
    let repo = Repository::init(storage, &options()).unwrap();
    let disk = some_disk(&mut Rng(5), 300 * CHUNK);
    std::thread::scope(|scope| {
        for writer in 0..3 {
            let (repo, disk) = (&repo, &disk);
            scope.spawn(move || {
                // Each through an opened repository of its own, as a process of its own would be.
                let storage = Arc::new(LocalStorage::open(dir_of(repo)).unwrap());
                let own = Repository::open(storage).unwrap();
                let session = own
                    .begin(&SessionOptions {
                        remembered: 50,
                        ..small_session()
                    })
                    .unwrap();
                let entries = store_in_threads(&session, disk);
                let mut map = session.map_writer(None, disk.len() as u64).unwrap();
                for (number, entry) in entries.into_iter().enumerate() {
                    let number = number as u64;
                    match entry {
                        Some(entry) => map.put(number, entry).unwrap(),
                        None => map.zero(number..number + 1).unwrap(),
                    }
                }
                let root = map.finish().unwrap();
                let name = format!("writer {writer}");
                let id = session
                    .commit(draft(&name, disk.len() as u64, root))
                    .unwrap()
                    .id;
                assert!(restore(&own, &id).unwrap() == *disk);
            });
        }
    });
    let list = repo.snapshots().unwrap();
    assert_eq!((list.snapshots.len(), list.unreadable.len()), (3, 0));
    for snapshot in list.snapshots {
        assert!(restore(&repo, &snapshot.id).unwrap() == disk);
    }
    assert_eq!(backup(&repo, &disk).unwrap().packs, []);
}

#[test]
fn same_chunk_from_many_threads_is_new_once() {
    let (_, repo) = new_repo();
    let session = repo.begin(&small_session()).unwrap();
    for seed in 1..20 {
        let mut chunk = vec![0; CHUNK];
        Rng(seed).fill(&mut chunk);
        let new: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| usize::from(session.store_chunk(&chunk).unwrap().is_new)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(new, 1);
    }
}

fn store_in_threads(
    session: &nbdbackup::repo::Session,
    disk: &[u8],
) -> Vec<Option<nbdbackup::repo::ChunkEntry>> {
    let chunks: Vec<&[u8]> = disk.chunks(CHUNK).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let entries = std::sync::Mutex::new(vec![None; chunks.len()]);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    let Some(chunk) = chunks.get(at) else {
                        return;
                    };
                    let stored = session.store_chunk(chunk).unwrap();
                    entries.lock().unwrap()[at] = stored.entry;
                }
            });
        }
    });
    entries.into_inner().unwrap()
}

fn dir_of(repo: &Repository) -> String {
    repo.place()
}
