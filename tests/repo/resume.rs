//! Runs that never commit, and the runs that come after them: what a checkpoint names is not stored again.

use std::sync::Arc;
use std::time::Duration;

use nbdbackup::repo::{
    CheckpointOptions, MemoryStorage, PruneOptions, RepoError, Repository, Session, SessionOptions,
    Snapshot, SnapshotId, Storage,
};

use crate::interleave::{Did, did, pruner, some};
use crate::prune::{at_once, noise};
use crate::scheduler::{Process, explore};
use crate::support::*;

const DISK: &str = "disk";

/// The chunks after which there is a checkpoint for certain: five packs of four, of which three may still be on their way
/// to the storage when the fifth is full.
const LEAST_CHECKPOINTED: usize = 20;

/// Checkpoints of the disk that [`backup`] stores, every two packs.
pub(crate) fn checkpointed(generation: u64) -> SessionOptions {
    SessionOptions {
        checkpoints: Some(CheckpointOptions {
            name: "machine".to_owned(),
            disks: vec![(DISK.to_owned(), generation)],
            interval_bytes: 400 << 10,
        }),
        ..small_session()
    }
}

/// Removes all that may go, but not yet what somebody may continue from.
fn within_the_window() -> PruneOptions {
    PruneOptions {
        undelete_window: Duration::from_secs(7 * 24 * 3600),
        ..at_once()
    }
}

fn count(storage: &MemoryStorage, folder: &str) -> usize {
    storage.list(folder).unwrap().len()
}

fn pack_bytes(storage: &MemoryStorage) -> u64 {
    storage.list("packs/").unwrap().iter().map(|f| f.len).sum()
}

/// Stores a disk, and dies before the commit.
pub(crate) fn interrupt(repo: &Arc<Repository>, disk: &[u8]) {
    let session = repo.begin(&checkpointed(1)).unwrap();
    store_disk(&session, disk).unwrap();
}

fn commit(session: &Session, disk: &[u8], generation: u64) -> Result<(Snapshot, u64), RepoError> {
    let (root, new) = store_disk(session, disk)?;
    let mut draft = draft(DISK, disk.len() as u64, root);
    draft.disks[0].generation = generation;
    Ok((session.commit(draft)?, new))
}

#[test]
fn interrupted_first_full_stores_nothing_again_that_was_checkpointed() {
    for encrypted in [false, true] {
        let (storage, repo) = match encrypted {
            true => new_encrypted_repo(),
            false => new_repo(),
        };
        let disk = noise(1, 40);
        interrupt(&repo, &disk);
        assert!(count(&storage, "ckpt/") > 0 && count(&storage, "snap/") == 0);
        // What no checkpoint names goes, the rest stays, however often somebody prunes.
        for _ in 0..2 {
            open(&storage).prune(&within_the_window()).unwrap();
        }
        let kept = pack_bytes(&storage);
        assert!(kept >= 8 * CHUNK as u64, "{kept}");
        // Whose disk it is not says nothing of it, and has it all the same.
        let other = open(&storage).begin(&SessionOptions {
            checkpoints: Some(CheckpointOptions {
                name: "another".to_owned(),
                disks: vec![(DISK.to_owned(), 1)],
                interval_bytes: u64::MAX,
            }),
            ..small_session()
        });
        let other = other.unwrap();
        assert!(!other.store_chunk(&disk[..CHUNK]).unwrap().is_new);
        assert_eq!(other.resumed_bytes(), 0);
        drop(other);

        let session = open(&storage).begin(&checkpointed(1)).unwrap();
        let (snapshot, new) = commit(&session, &disk, 1).unwrap();
        let resumed = session.resumed_bytes();
        assert_eq!(resumed, (40 - new) * CHUNK as u64);
        assert!(resumed > kept * 99 / 100 - 8 * 1024, "{resumed} of {kept}");
        assert!(pack_bytes(&storage) < 41 * CHUNK as u64, "stored twice");
        // The first prune that sees the snapshot takes the other session's checkpoints away, and nothing else.
        let pruned = open(&storage).prune(&within_the_window()).unwrap();
        assert_eq!((pruned.packs_removed, pruned.packs_repacked), (0, 0));
        assert_eq!(count(&storage, "ckpt/"), 0);
        assert!(restore(&open(&storage), &snapshot.id).unwrap() == disk);
        // Nobody resumes what was committed.
        let later = open(&storage).begin(&checkpointed(2)).unwrap();
        assert!(!later.store_chunk(&disk[..CHUNK]).unwrap().is_new);
        assert_eq!(later.resumed_bytes(), 0);
    }
}

#[test]
fn session_that_commits_leaves_no_checkpoint() {
    let (storage, repo) = new_repo();
    let disk = noise(1, 40);
    let session = repo.begin(&checkpointed(1)).unwrap();
    let (root, _) = store_disk(&session, &disk).unwrap();
    assert!(count(&storage, "ckpt/") > 0);
    let snapshot = session
        .commit(draft(DISK, disk.len() as u64, root))
        .unwrap();
    assert_eq!(count(&storage, "ckpt/"), 0);
    assert!(restore(&open(&storage), &snapshot.id).unwrap() == disk);
    // Each record stands in the index once: what a checkpoint wrote, the commit did not write again.
    let pruned = open(&storage).prune(&at_once()).unwrap();
    assert_eq!((pruned.packs_removed, pruned.unused_bytes), (0, 0));
}

#[test]
fn checkpoint_lasts_until_the_window_is_over_or_the_disk_is_stored() {
    let disk = noise(1, 40);
    let week = within_the_window();
    // Younger than the window by the later of two clocks: the one that wrote it, and the storage's.
    let far = PruneOptions {
        now_unix_nanos: i64::MAX,
        ..week
    };
    let zero = at_once();
    for over in [far, zero] {
        let (storage, repo) = new_repo();
        interrupt(&repo, &disk);
        open(&storage).prune(&week).unwrap();
        assert!(count(&storage, "ckpt/") > 0 && count(&storage, "packs/") > 0);
        open(&storage).prune(&over).unwrap();
        assert_eq!(
            (count(&storage, "ckpt/"), count(&storage, "packs/")),
            (0, 0)
        );
    }
    // Another disk's snapshot and an older one change nothing; a snapshot of the same generation does.
    for (name, generation, stays) in [("other", 9, true), (DISK, 0, true), (DISK, 1, false)] {
        let (storage, repo) = new_repo();
        interrupt(&repo, &disk);
        let session = open(&storage).begin(&small_session()).unwrap();
        let (root, _) = store_disk(&session, &noise(2, 1)).unwrap();
        let mut draft = draft(name, CHUNK as u64, root);
        draft.disks[0].generation = generation;
        session.commit(draft).unwrap();
        for _ in 0..2 {
            open(&storage).prune(&week).unwrap();
        }
        assert_eq!(count(&storage, "ckpt/") > 0, stays, "{name} {generation}");
        assert_eq!(count(&storage, "packs/") > 1, stays, "{name} {generation}");
    }
}

#[test]
fn damaged_checkpoint_costs_storing_again_and_nothing_else() {
    let (storage, repo) = new_repo();
    let disk = noise(1, 40);
    let kept = noise(2, 3);
    let id = backup(&repo, &kept).unwrap().id;
    let session = repo.begin(&checkpointed(2)).unwrap();
    store_disk(&session, &disk).unwrap();
    drop(session);
    for file in storage.list("ckpt/").unwrap() {
        let mut bytes = storage.read(&file.name, u64::MAX).unwrap();
        bytes[40] ^= 1;
        storage.damage(&file.name, bytes);
    }
    let session = open(&storage).begin(&checkpointed(2)).unwrap();
    assert_eq!(session.resumed_bytes(), 0);
    drop(session);
    open(&storage).prune(&within_the_window()).unwrap();
    assert_eq!(
        (count(&storage, "ckpt/"), count(&storage, "packs/")),
        (0, 1)
    );
    let session = open(&storage).begin(&checkpointed(2)).unwrap();
    let (snapshot, new) = commit(&session, &disk, 2).unwrap();
    assert_eq!(new, 40);
    for (id, disk) in [(snapshot.id, disk), (id, kept)] {
        assert!(restore(&open(&storage), &id).unwrap() == disk);
    }
}

/// What must hold whatever died where.
fn assert_recovers(storage: &MemoryStorage, before: &(SnapshotId, Vec<u8>), what: &str) {
    let whole = |id: &SnapshotId, disk: &[u8], when: &str| {
        let read = restore(&open(storage), id);
        let read = read.unwrap_or_else(|e| panic!("{what}, {when}: {e}"));
        assert!(read == disk, "{what}, {when}");
    };
    whole(&before.0, &before.1, "before");
    open(storage).prune(&within_the_window()).unwrap();
    whole(&before.0, &before.1, "after a prune");
    let disk = noise(1, 20);
    let session = open(storage).begin(&checkpointed(2)).unwrap();
    let (snapshot, _) = commit(&session, &disk, 2).unwrap_or_else(|e| panic!("{what}: {e}"));
    for options in [within_the_window(), at_once(), at_once()] {
        let pruned = open(storage).prune(&options).unwrap();
        assert!(pruned.waiting_for.is_empty(), "{what}: {pruned:?}");
    }
    whole(&before.0, &before.1, "at the end");
    whole(&snapshot.id, &disk, "at the end");
    let rest = open(storage).prune(&at_once()).unwrap();
    assert_eq!((rest.unused_bytes, rest.removed_bytes), (0, 0), "{what}");
    assert_eq!(
        count(storage, "ckpt/") + count(storage, "sess/"),
        0,
        "{what}"
    );
}

#[test]
fn death_at_any_call_of_a_session_with_checkpoints_or_of_a_prune_of_them_loses_nothing() {
    let (start, repo) = new_repo();
    let kept = noise(2, 3);
    let before = (backup(&repo, &kept).unwrap().id, kept);
    repo.make_reserve().unwrap();
    start.barrier().unwrap();
    let interrupted = start.after_power_failure(|_| true);
    interrupt(&open(&interrupted), &noise(1, LEAST_CHECKPOINTED));
    interrupted.barrier().unwrap();
    let full = |storage: Arc<dyn Storage>| -> Result<(), RepoError> {
        let session = Repository::open(storage)?.begin(&checkpointed(2))?;
        commit(&session, &noise(1, 20), 2).map(drop)
    };
    let prune = |options: PruneOptions| {
        move |storage: Arc<dyn Storage>| Repository::open(storage)?.prune(&options).map(drop)
    };
    type Op<'a> = &'a dyn Fn(Arc<dyn Storage>) -> Result<(), RepoError>;
    let ops: [(&str, &MemoryStorage, Op<'_>); 4] = [
        ("full", &start, &full),
        ("resume", &interrupted, &full),
        ("prune", &interrupted, &prune(within_the_window())),
        ("prune all", &interrupted, &prune(at_once())),
    ];
    let stride = if thorough() { 1 } else { 3 };
    for (name, start, op) in ops {
        for at in (1..).step_by(stride) {
            let storage = start.after_power_failure(|_| true);
            let faulty = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Dead);
            let done = op(Arc::new(faulty.clone())).is_ok();
            for (left, storage) in power_failures(&storage, at) {
                assert_recovers(
                    &storage,
                    &before,
                    &format!("{name}, call {at}, {left} left"),
                );
            }
            if done && faulty.calls() < at {
                assert!(at > 40, "{name}: {at}");
                break;
            }
        }
    }
}

/// A run continues from packs that a prune gives up at the same time.
#[test]
fn run_that_continues_beside_a_prune_that_gives_the_checkpoint_up_is_whole() {
    let (start, repo) = new_repo();
    let disk = noise(1, LEAST_CHECKPOINTED);
    interrupt(&repo, &disk);
    repo.make_reserve().unwrap();
    start.barrier().unwrap();
    assert!(count(&start, "ckpt/") > 0);
    let writer = || -> Process<Did> {
        // One pack, if it has to be stored again: what is sealed beside the storing has no steps that repeat.
        let disk = disk[..3 * CHUNK].to_vec();
        Box::new(move |repo| {
            let stored = repo
                .begin(&checkpointed(1))
                .and_then(|session| commit(&session, &disk, 1));
            did(stored, |(snapshot, _)| Did::Stored(snapshot.id, disk))
        })
    };
    let runs = explore(
        some(2, 3),
        || {
            (
                start.after_power_failure(|_| true),
                vec![writer(), pruner()],
            )
        },
        |storage, did, told| {
            for turn in 0..3 {
                for did in did {
                    match did {
                        Did::Stored(id, disk) => {
                            let read = restore(&open(storage), id);
                            let read = read.unwrap_or_else(|e| panic!("{turn}: {e}\n{told}"));
                            assert!(read == *disk, "{turn}\n{told}");
                        }
                        Did::Ran => {}
                        other => panic!("{other:?}\n{told}"),
                    }
                }
                open(storage).prune(&at_once()).unwrap();
            }
            assert_eq!(count(storage, "ckpt/"), 0, "{told}");
        },
    );
    assert!(runs > 500, "{runs}");
}
