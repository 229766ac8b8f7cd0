//! Races that a schedule makes certain: readers that are announced, sessions taken for dead, clocks that jump.

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nbdbackup::repo::{
    LocalStorage, MapWriter, MemoryStorage, PruneOptions, RepoError, Repository, Storage,
};

use crate::interleave::{Did, base, did, disk, pruner, rules, some, writer};
use crate::prune::{at_once, noise};
use crate::scheduler::{Process, explore};
use crate::support::*;

#[test]
fn reader_keeps_its_snapshot_though_it_is_forgotten_and_pruned() {
    let (storage, repo) = new_repo();
    let (kept, other) = (noise(1, 6), noise(2, 6));
    let id = backup(&repo, &kept).unwrap().id;
    let gone = backup(&repo, &other).unwrap().id;
    let reader = open(&storage);
    let pin = reader.pin(&[id]).unwrap();
    repo.forget(&[id, gone], 1).unwrap();
    // Nobody waits for a reader, and what it does not read goes.
    let pruned = repo.prune(&at_once()).unwrap();
    assert_eq!((pruned.snapshots_removed, pruned.packs_waiting), (1, 0));
    assert!(pruned.waiting_for.is_empty() && pruned.packs_removed > 0);
    assert!(restore(&reader, &id).unwrap() == kept);
    drop(pin);
    assert_eq!(repo.prune(&at_once()).unwrap().snapshots_removed, 1);
    assert!(storage.list("packs/").unwrap().is_empty());
    assert!(storage.list("sess/").unwrap().is_empty());
    // Who reads without being announced is told what is wrong.
    let refused = reader.pin(&[id]);
    assert!(matches!(refused, Err(RepoError::NoSuchSnapshot { .. })));
    assert!(storage.list("sess/").unwrap().is_empty(), "announced still");
}

#[test]
fn reader_that_was_killed_keeps_nothing_and_leaves_no_fence() {
    let (storage, repo) = new_repo();
    let id = backup(&repo, &noise(1, 3)).unwrap().id;
    let pin = repo.pin(&[id]).unwrap();
    repo.forget(&[id], 1).unwrap();
    let left = storage.after_power_failure(|_| true);
    drop(pin);
    assert_eq!(left.list("sess/").unwrap().len(), 1);
    assert_eq!(open(&left).prune(&at_once()).unwrap().snapshots_removed, 1);
    for folder in ["sess/", "snap/", "packs/", "meta/"] {
        assert!(left.list(folder).unwrap().is_empty(), "{folder}");
    }
}

/// A reader of a forgotten snapshot reads all of it or is told that it is gone, whatever a prune does meanwhile.
#[test]
fn announced_reader_reads_all_or_is_refused() {
    let base = base();
    let read = std::cell::Cell::new(0);
    let start = || {
        let (snapshot, want) = base.forgotten.clone();
        let reader: Process<Did> = Box::new(move |repo: Arc<Repository>| {
            let pin = match repo.pin(&[snapshot.id]) {
                Ok(pin) => pin,
                Err(error) => return Did::Refused(error),
            };
            let found = restore(&repo, &snapshot.id).unwrap();
            assert!(found == want);
            drop(pin);
            Did::HadIt
        });
        (base.copy(), vec![reader, pruner()])
    };
    explore(rules(2), start, |storage, did, told| {
        read.set(read.get() + usize::from(matches!(did[0], Did::HadIt)));
        base.check(storage, did, told);
    });
    assert!(read.get() > 0);
}

/// What was had back can be read at once, though a prune had just made up its mind to remove it.
#[test]
fn snapshot_that_is_had_back_can_be_read_whatever_a_prune_had_in_mind() {
    let base = base();
    let read = std::cell::Cell::new(0);
    let start = || {
        let (snapshot, want) = base.forgotten.clone();
        let undelete: Process<Did> = Box::new(move |repo: Arc<Repository>| {
            if let Err(error) = repo.unforget(&snapshot.id) {
                return Did::Refused(error);
            }
            let pin = repo.pin(&[snapshot.id]).unwrap();
            assert!(restore(&repo, &snapshot.id).unwrap() == want);
            drop(pin);
            Did::HadBack(snapshot.id, want)
        });
        (base.copy(), vec![undelete, pruner()])
    };
    explore(some(2, 2), start, |storage, did, told| {
        read.set(read.get() + usize::from(matches!(did[0], Did::HadBack(..))));
        base.check(storage, did, told);
    });
    assert!(read.get() > 0);
}

#[test]
fn two_that_forget_the_same_snapshot_leave_one_mark() {
    let base = base();
    let again = disk(&[6, 7]);
    let forgets = |id| -> Process<Did> {
        Box::new(move |repo: Arc<Repository>| did(repo.forget(&[id], 2), |()| Did::Ran))
    };
    let storage = base.copy();
    let second = backup(&open(&storage), &again).unwrap().id;
    storage.barrier().unwrap();
    let start = || {
        let processes = vec![forgets(second), forgets(second), pruner()];
        (storage.after_power_failure(|_| true), processes)
    };
    explore(rules(1), start, |storage, did, told| {
        base.check(storage, did, told);
        let marked = storage.len(&format!("snap/{second}"));
        assert!(marked.is_err(), "it is forgotten and pruned by now\n{told}");
    });
}

#[test]
fn same_disk_backed_up_twice_at_once_is_stored_twice_at_most() {
    let base = base();
    let data = disk(&[6, 7, 6]);
    let start = || (base.copy(), vec![writer(&data), writer(&data)]);
    explore(rules(1), start, |storage, did, told| {
        assert!(did.iter().all(|d| matches!(d, Did::Stored(..))), "{told}");
        base.check(storage, did, told);
    });
}

/// Fence and commit create the same name: whoever comes first, the other one knows.
///
/// `place` makes a new storage each time that it is called.
fn fence_and_commit_at_once(place: impl Fn() -> Arc<dyn Storage>, times: u32) {
    let (mut committed, mut fenced) = (0_u32, 0_u32);
    let mut storage = place();
    let (mut rng, mut commit_took) = (Rng(3), Duration::ZERO);
    for time in 0..times {
        // In a repository of many snapshots each prune takes long.
        if time.is_multiple_of(50) {
            storage = place();
            let repo = Repository::init(Arc::clone(&storage), &options()).unwrap();
            repo.make_reserve().unwrap();
        }
        let repo = Repository::open(Arc::clone(&storage)).unwrap();
        let lying = FaultStorage::new(Arc::clone(&storage), 1, Fault::LocksLie);
        let pruner = Repository::open(Arc::new(lying)).unwrap();
        let session = repo.begin(&small_session()).unwrap();
        let data = noise(u64::from(time), 1);
        let (root, _) = store_disk(&session, &data).unwrap();
        let start = Barrier::new(2);
        let stored = std::thread::scope(|scope| {
            // Somewhere in the other one's steps.
            let after = Duration::from_nanos(rng.below(commit_took.as_nanos() as u64 + 1));
            let (start, pruner) = (&start, &pruner);
            scope.spawn(move || {
                start.wait();
                let began = Instant::now();
                while began.elapsed() < after {
                    std::hint::spin_loop();
                }
                pruner.prune(&at_once()).unwrap();
            });
            start.wait();
            let began = Instant::now();
            let stored = session.commit(draft("d", CHUNK as u64, root));
            commit_took = began.elapsed();
            stored
        });
        match stored {
            Ok(snapshot) => {
                committed += 1;
                assert!(restore(&pruner, &snapshot.id).unwrap() == data, "{time}");
            }
            Err(RepoError::Fenced { id }) => {
                fenced += 1;
                let gone = repo.snapshot(&id);
                assert!(matches!(gone, Err(RepoError::NoSuchSnapshot { .. })));
            }
            Err(other) => panic!("{time}: {other}"),
        }
        assert!(repo.snapshots().unwrap().unreadable.is_empty());
    }
    println!("of {times} sessions {committed} committed and {fenced} were fenced");
    assert!(committed > 0 && fenced > 0, "{committed} and {fenced}");
}

fn times(usual: u32) -> u32 {
    match std::env::var("NBDBACKUP_TEST_FENCES") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => usual,
    }
}

#[test]
fn fence_and_commit_in_the_same_instant_exclude_each_other() {
    fence_and_commit_at_once(|| Arc::new(MemoryStorage::new()), times(1000));
}

#[test]
fn fence_and_commit_in_the_same_instant_exclude_each_other_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let next = std::cell::Cell::new(0);
    let place = || -> Arc<dyn Storage> {
        next.set(next.get() + 1);
        let path = dir.path().join(next.get().to_string());
        Arc::new(LocalStorage::create(path).unwrap())
    };
    fence_and_commit_at_once(place, times(60).min(2000));
}

/// A machine sleeps for longer than the lease, without locks that would show that it lives.
#[test]
fn session_that_sleeps_past_its_lease_is_told_so_and_harms_nothing() {
    let base = base();
    let storage = base.copy();
    let repo = open(&storage);
    let session = repo.begin(&small_session()).unwrap();
    // It refers to chunks of what goes, and has stored some of its own.
    let data = disk(&[3, 4, 5]);
    let mut map = session.map_writer(None, data.len() as u64).unwrap();
    let put = |map: &mut MapWriter, number: usize| {
        let chunk = &data[number * CHUNK..(number + 1) * CHUNK];
        let entry = session.store_chunk(chunk).unwrap().entry.unwrap();
        map.put(number as u64, entry).unwrap();
    };
    put(&mut map, 0);
    put(&mut map, 1);
    let day = 24 * 3600;
    for (seconds, dies) in [
        (day - 60, false),
        (-20 * 365 * day, false),
        (day + 60, true),
    ] {
        let without_locks =
            FaultStorage::new(Arc::new(storage.clone()), 1, Fault::NoLocks(seconds));
        let pruner = Repository::open(Arc::new(without_locks)).unwrap();
        let pruned = pruner.prune(&at_once()).unwrap();
        assert_eq!(pruned.waiting_for.is_empty(), dies, "{seconds}");
        assert_eq!(pruned.snapshots_removed > 0, dies, "{seconds}");
    }
    // It wakes, and goes on with what is not there any more.
    put(&mut map, 2);
    let root = map.finish().unwrap();
    let told = session.commit(draft("d", data.len() as u64, root));
    assert!(matches!(told, Err(RepoError::Fenced { .. })), "{told:?}");
    let again = backup(&repo, &data).unwrap().id;
    base.check(&storage, &[Did::Stored(again, data)], "");
}

#[test]
fn wrong_clocks_make_a_prune_wait_longer_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let storage = || Arc::new(LocalStorage::open(dir.path()).unwrap());
    let repo = Repository::init(storage(), &options()).unwrap();
    let ten_years = 3650 * 24 * 3600 * 1_000_000_000_i64;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let now = i64::try_from(now.as_nanos()).unwrap();
    let week = |now_unix_nanos| PruneOptions {
        now_unix_nanos,
        undelete_window: Duration::from_secs(7 * 24 * 3600),
        ..at_once()
    };
    let kept = noise(1, 3);
    let id = backup(&repo, &kept).unwrap().id;
    // Whoever forgets with a wrong clock, or prunes with one that is behind, removes nothing too early.
    for forgotten_at in [now - ten_years, now, now + ten_years] {
        let gone = backup(&repo, &noise(2, 3)).unwrap().id;
        repo.forget(&[gone], forgotten_at).unwrap();
        for pruned_at in [now - ten_years, now] {
            let pruned = repo.prune(&week(pruned_at)).unwrap();
            assert_eq!(pruned.snapshots_removed, 0, "{forgotten_at} {pruned_at}");
        }
        repo.unforget(&gone).unwrap();
        // A clock that is ahead ends the time early, and touches only what is forgotten.
        repo.forget(&[gone], now).unwrap();
        let pruned = repo.prune(&week(now + ten_years)).unwrap();
        assert_eq!(pruned.snapshots_removed, 1);
        assert!(restore(&repo, &id).unwrap() == kept);
    }
    // What an open session used is waited for whatever the clocks say.
    let gone = backup(&repo, &noise(2, 3)).unwrap().id;
    let session = repo.begin(&small_session()).unwrap();
    let (root, new) = store_disk(&session, &noise(2, 3)).unwrap();
    assert_eq!(new, 0);
    repo.forget(&[gone], now - ten_years).unwrap();
    let pruned = repo.prune(&week(now + ten_years)).unwrap();
    assert_eq!(pruned.waiting_for, [session.id()]);
    let size = 3 * CHUNK as u64;
    let id = session.commit(draft("d", size, root)).unwrap().id;
    repo.prune(&week(now + ten_years)).unwrap();
    assert!(restore(&repo, &id).unwrap() == noise(2, 3));
}
