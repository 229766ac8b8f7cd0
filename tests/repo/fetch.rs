//! A death, a failed call, a failed sync or a full disk at every single call of fetching files from a copy.

use std::sync::Arc;

use nbdbackup::repo::{MemoryStorage, RepoError, Storage};

use crate::mending::{Known, assert_reads, check, flip, names};
use crate::prune::{at_once, noise};
use crate::support::*;
use crate::sweeps::fail_at_each;

/// A repository that lost packs and a snapshot, and a copy of its files that has them.
fn torn() -> (MemoryStorage, MemoryStorage, Known) {
    let (whole, repo) = without_parity();
    let mut known = Known::new();
    for n in 0..3 {
        let disk = noise(n, 3);
        known.push((backup(&repo, &disk).unwrap().id, disk));
    }
    whole.barrier().unwrap();
    let storage = copy(&whole);
    flip(&storage, &format!("snap/{}", known[2].0), 60);
    let packs = names(&storage, "packs/");
    flip(&storage, &packs[0], 100);
    storage.remove(&packs[1]).unwrap();
    let meta = names(&storage, "meta/");
    storage.remove(&meta[0]).unwrap();
    let last = storage.len(&meta[1]).unwrap() as usize - 1;
    flip(&storage, &meta[1], last);
    storage.barrier().unwrap();
    (storage, whole, known)
}

/// Fetches until nothing more is fetched, as the command does.
fn fetch(storage: Arc<dyn Storage>, from: &dyn Storage) -> Result<(), RepoError> {
    let repo = open_any(storage)?;
    for _ in 0..5 {
        check(&repo, true)?;
        let done = repo.repair(Some(from))?;
        if done.fetched.is_empty() && done.mended.is_empty() {
            break;
        }
    }
    Ok(())
}

#[test]
fn repair_from_a_copy_that_dies_or_fails_at_any_call_is_ended_by_the_next() {
    let (start, whole, known) = torn();
    let ids = |storage: &MemoryStorage| {
        let list = open(storage).snapshots().unwrap();
        (list.snapshots.len(), list.unreadable.len())
    };
    assert_eq!(ids(&start), (2, 1));
    for fault in [Fault::Dead, Fault::Once, Fault::NoSync, Fault::NoRoom] {
        let looked_at = std::cell::Cell::new(0);
        let op = |storage: Arc<dyn Storage>| fetch(storage, &whole);
        let (calls, states) = fail_at_each(&start, fault, op, |storage, result, what| {
            // A snapshot that nobody knows of any more is lost: an incremental would follow an older one.
            let (there, unreadable) = ids(storage);
            assert!(there == 3 || unreadable > 0, "{what}: a snapshot is gone");
            if result.is_ok() && fault != Fault::Once {
                assert_reads(storage, &known, what);
            }
            // What it costs to mend and check is paid for one state in three.
            looked_at.set(looked_at.get() + 1);
            if !thorough() && looked_at.get() % 3 > 0 {
                return;
            }
            let _ = open(storage).prune(&at_once());
            fetch(Arc::new(storage.clone()), &whole).unwrap();
            assert_reads(storage, &known, &format!("{what}, fetched again"));
            for _ in 0..2 {
                open(storage).prune(&at_once()).unwrap();
            }
            assert_reads(storage, &known, &format!("{what}, pruned"));
            let found = check(&open(storage), true).unwrap();
            assert!(found.is_whole(), "{what}: {found:?}");
            assert!(found.strangers.is_empty(), "{what}: {found:?}");
        });
        println!("repair --from, {fault:?}: {calls} calls, {states} states");
    }
}

#[test]
fn copy_that_fails_at_any_call_takes_nothing_from_what_it_was_to_mend() {
    let (start, whole, known) = torn();
    for at in 1.. {
        let storage = copy(&start);
        let failing = FaultStorage::new(Arc::new(whole.clone()), at, Fault::Dead);
        let done = fetch(Arc::new(storage.clone()), &failing);
        let list = open(&storage).snapshots().unwrap();
        assert_eq!(list.snapshots.len() + list.unreadable.len(), 3, "call {at}");
        fetch(Arc::new(storage.clone()), &whole).unwrap();
        assert_reads(&storage, &known, &format!("call {at}"));
        if done.is_ok() && failing.calls() < at {
            println!("the copy of repair --from: {} calls", at - 1);
            break;
        }
    }
}
