//! A death, a failed call and a failed sync at every single call of what mends: checks, and the index.

use std::sync::Arc;

use nbdbackup::repo::{
    CheckOptions, Checked, MemoryStorage, RepoError, Repository, SnapshotId, Storage,
};

use crate::prune::{at_once, noise};
use crate::support::*;
use crate::sweeps::{die_at_each, fail_at_each};

pub(crate) fn check(repo: &Repository, repair: bool) -> Result<Checked, RepoError> {
    let options = CheckOptions {
        read_data_percent: Some(100.0),
        repair,
        now_unix_nanos: 5,
    };
    repo.check(&options, &|_, _| {})
}

pub(crate) fn flip(storage: &MemoryStorage, file: &str, at: usize) {
    let mut bytes = storage.read(file, u64::MAX).unwrap();
    bytes[at] ^= 1;
    storage.damage(file, bytes);
}

pub(crate) fn names(storage: &MemoryStorage, folder: &str) -> Vec<String> {
    let files = storage.list(folder).unwrap();
    files.into_iter().map(|f| f.name).collect()
}

/// Snapshots with the disks that they hold.
pub(crate) type Known = Vec<(SnapshotId, Vec<u8>)>;

pub(crate) fn assert_reads(storage: &MemoryStorage, known: &Known, what: &str) {
    let repo = open(storage);
    for (id, disk) in known {
        let read = restore(&repo, id).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(read == *disk, "{what}: wrong data");
    }
}

/// A repository of which a copy of each small file, the index, and records in two of three copies are damaged; the
/// mark of one of these is damaged as well.
fn damaged() -> (MemoryStorage, Known) {
    let (storage, repo) = without_parity();
    let (first, second) = (noise(1, 4), noise(2, 3));
    let mut known = vec![(backup(&repo, &first).unwrap().id, first.clone())];
    // The first record is damaged, marked, and stored again by the next backup.
    let pack = names(&storage, "packs/").remove(0);
    flip(&storage, &pack, 100);
    assert!(check(&open(&storage), true).unwrap().marked > 0);
    let start = copy(&storage);
    known.push((backup(&open(&storage), &first).unwrap().id, first));
    known.push((backup(&open(&storage), &second).unwrap().id, second));
    assert_reads(&storage, &known, "before");
    let marks = names(&storage, "bad/");
    assert_eq!(marks.len(), 1);
    flip(&storage, &marks[0], 30);
    flip(&storage, "config", 30);
    flip(&storage, "keys/0.bak", 30);
    // Not the segment that alone knows of the good copy.
    let before: Vec<String> = names(&start, "idx/");
    flip(&storage, &before[0], 5000);
    open(&storage).make_reserve().unwrap();
    storage.barrier().unwrap();
    (storage, known)
}

/// What must hold of [`damaged`] whatever was done about it: nothing gets worse, not even by a prune.
fn assert_mends(storage: &MemoryStorage, known: &Known, what: &str) {
    // What could not be read once may be missing from an index that was made anew, until it is made anew again.
    let unread = what.contains("Once");
    if !unread {
        assert_reads(storage, known, &format!("{what}, at once"));
    }
    let pruned = copy(storage);
    for _ in 0..2 {
        // It may refuse, but not lose anything.
        let _ = open(&pruned).prune(&at_once());
        if unread {
            check(&open(&pruned), true).unwrap();
        }
        assert_reads(&pruned, known, &format!("{what}, after a prune"));
    }
    let found = check(&open(storage), true).unwrap();
    assert_eq!(found.ranges_total, 0, "{what}: {found:?}");
    assert_reads(storage, known, &format!("{what}, mended"));
    // A sector that could not be read once is not counted on again: what it holds is stored anew.
    for (_, disk) in known {
        backup(&open(storage), disk).unwrap();
    }
    let found = check(&open(storage), true).unwrap();
    assert!(found.is_whole(), "{what}: {found:?}");
    for _ in 0..2 {
        let pruned = open(storage).prune(&at_once()).unwrap();
        assert!(pruned.waiting_for.is_empty(), "{what}");
    }
    assert_reads(storage, known, &format!("{what}, mended and pruned"));
    let disk = noise(7, 2);
    let next = backup(&open(storage), &disk).unwrap().id;
    assert!(restore(&open(storage), &next).unwrap() == disk, "{what}");
}

fn repair(storage: Arc<dyn Storage>) -> Result<(), RepoError> {
    check(&*open_any(storage)?, true).map(drop)
}

#[test]
fn segment_that_alone_knew_of_the_good_copy_is_lost_and_no_prune_takes_that_copy() {
    let (storage, repo) = without_parity();
    let disk = noise(1, 4);
    let mut known = vec![(backup(&repo, &disk).unwrap().id, disk.clone())];
    let pack = names(&storage, "packs/").remove(0);
    flip(&storage, &pack, 100);
    check(&open(&storage), true).unwrap();
    let before = names(&storage, "idx/");
    known.push((backup(&open(&storage), &disk).unwrap().id, disk));
    for segment in names(&storage, "idx/") {
        if !before.contains(&segment) {
            storage.remove(&segment).unwrap();
        }
    }
    for _ in 0..2 {
        let _ = open(&storage).prune(&at_once());
    }
    check(&open(&storage), true).unwrap();
    assert_reads(&storage, &known, "the index made anew");
}

#[test]
fn check_that_mends_and_dies_or_fails_at_any_call_makes_nothing_worse() {
    let (start, known) = damaged();
    let (calls, states) = die_at_each(&start, repair, |storage, _, what| {
        assert_mends(storage, &known, what);
    });
    println!("check --repair: {calls} calls, {states} states");
    assert!(calls > 60, "{calls}");
    for fault in [Fault::Once, Fault::NoSync] {
        let (calls, states) = fail_at_each(&start, fault, repair, |storage, _, what| {
            assert_mends(storage, &known, what);
        });
        println!("check --repair, {fault:?}: {calls} calls, {states} states");
    }
}

#[test]
fn check_that_dies_while_it_ends_a_dead_one_is_ended_by_the_next() {
    let (start, known) = damaged();
    let stride = if thorough() { 1 } else { 9 };
    let states = std::cell::Cell::new(0);
    die_at_each(&start, repair, |left, done, what| {
        let number: u64 = what.bytes().map(u64::from).sum();
        if done || !number.is_multiple_of(stride) {
            return;
        }
        for then in (1 + number % 11..).step_by(11) {
            let storage = copy(left);
            let second = FaultStorage::new(Arc::new(storage.clone()), then, Fault::Dead);
            let ended = repair(Arc::new(second)).is_ok();
            let mut rng = Rng(number << 20 | then);
            let storage = storage.after_power_failure(|_| rng.below(2) == 0);
            assert_mends(&storage, &known, &format!("{what}, and call {then}"));
            states.set(states.get() + 1);
            if ended {
                break;
            }
        }
    });
    println!("check --repair after a dead one: {} states", states.get());
    assert!(states.get() > 50);
}

/// Ten sessions, of which the merged segment and one more are lost, so that there is something to make anew and to merge.
fn many_segments() -> (MemoryStorage, Known) {
    let (storage, repo) = without_parity();
    let mut known = Known::new();
    for n in 0..10 {
        let disk = noise(n, 1);
        known.push((backup(&repo, &disk).unwrap().id, disk));
    }
    // Those that the last session merged are there still; without the merged one they count again.
    let merged: Vec<_> = names(&storage, "idx/1");
    assert_eq!(merged.len(), 1);
    storage.remove(&merged[0]).unwrap();
    let lost = names(&storage, "idx/0").remove(3);
    storage.remove(&lost).unwrap();
    repo.make_reserve().unwrap();
    storage.barrier().unwrap();
    (storage, known)
}

#[test]
fn index_that_is_merged_or_made_anew_while_the_process_dies_or_fails_knows_all_in_the_end() {
    let (start, known) = many_segments();
    let rebuild = |storage: Arc<dyn Storage>| {
        let repo = open_any(storage)?;
        repo.rebuild_index()?;
        repo.merge_index(u64::MAX)?;
        // A prune removes what was merged.
        repo.prune(&at_once()).map(drop)
    };
    for fault in [Fault::Dead, Fault::Once, Fault::NoSync, Fault::NoRoom] {
        let (calls, states) = fail_at_each(&start, fault, rebuild, |storage, _, what| {
            assert_reads(storage, &known, what);
            let repo = open(storage);
            repo.rebuild_index().unwrap();
            repo.merge_index(u64::MAX).unwrap();
            let session = repo.begin(&small_session()).unwrap();
            for (_, disk) in &known {
                assert!(!session.store_chunk(disk).unwrap().is_new, "{what}");
            }
            drop(session);
            assert!(repo.index_segments().unwrap() < 40);
            let found = check(&open(storage), true).unwrap();
            assert!(found.is_whole(), "{what}: {found:?}");
            repo.prune(&at_once()).unwrap();
            assert_reads(storage, &known, &format!("{what}, pruned"));
        });
        println!("index, {fault:?}: {calls} calls, {states} states");
        assert!(calls > 60, "{calls}");
    }
}
