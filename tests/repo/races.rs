//! Races that a schedule makes certain: readers that are announced, sessions taken for dead, clocks that jump.

use std::sync::Arc;

use nbdbackup::repo::{MemoryStorage, RepoError, Repository, Storage};

use crate::interleave::{Did, base, did, disk, pruner, rules, writer};
use crate::prune::{at_once, noise};
use crate::scheduler::{Process, explore};
use crate::support::*;

fn open(storage: &MemoryStorage) -> Arc<Repository> {
    Repository::open(Arc::new(storage.clone())).unwrap()
}

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
