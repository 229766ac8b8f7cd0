//! A storage that refuses a call, or cannot make anything durable any more, at every single call of every command.
//!
//! What was acknowledged is there after a power failure; what was not did no harm.

use std::sync::Arc;

use nbdbackup::repo::{MemoryStorage, RepoError, Repository, Secret, Storage};

use crate::encryption::{KEY_COMMANDS, assert_opens, cheap, password};
use crate::prune::{at_once, noise};
use crate::support::*;
use crate::sweeps::{assert_recovers, fail_at_each};

const FAULTS: [Fault; 3] = [Fault::Once, Fault::Refused, Fault::NoSync];

/// Fails when an error says something that is not so.
fn assert_told<T>(result: &Result<T, RepoError>, what: &str) {
    match result {
        Ok(_) | Err(RepoError::Io { .. } | RepoError::NoRoom { .. } | RepoError::Lost { .. }) => {}
        Err(other) => panic!("{what}: {other:?}"),
    }
}

#[test]
fn refused_call_or_sync_of_a_backup_is_told_and_what_is_acknowledged_is_durable() {
    let (start, repo) = new_repo();
    let kept = (backup(&repo, &noise(1, 5)).unwrap().id, noise(1, 5));
    repo.make_reserve().unwrap();
    start.barrier().unwrap();
    let disk = [noise(1, 2), noise(2, 4)].concat();
    let op = |storage: Arc<dyn Storage>| backup(&open_any(storage)?, &disk).map(|s| s.id);
    for fault in FAULTS {
        let (calls, states) = fail_at_each(&start, fault, op, |storage, result, what| {
            assert_told(result, what);
            let stored = result.as_ref().ok().map(|id| (*id, disk.clone()));
            assert_recovers(
                storage,
                &[&kept].into_iter().chain(&stored).collect::<Vec<_>>(),
                what,
            );
        });
        println!("backup, {fault:?}: {calls} calls, {states} states");
        assert!(calls > 30, "{calls}");
    }
}

#[test]
fn refused_call_or_sync_of_forget_and_undelete_is_told_and_what_is_acknowledged_is_durable() {
    let (start, repo) = new_repo();
    let kept = (backup(&repo, &noise(1, 3)).unwrap().id, noise(1, 3));
    let gone = (backup(&repo, &noise(2, 3)).unwrap().id, noise(2, 3));
    repo.make_reserve().unwrap();
    start.barrier().unwrap();
    let forgotten = copy(&start);
    open(&forgotten).forget(&[gone.0], 1).unwrap();
    forgotten.barrier().unwrap();
    let is_forgotten = |storage: &MemoryStorage| {
        let list = open(storage).snapshots().unwrap();
        !list.snapshots.iter().any(|s| s.id == gone.0)
    };
    for fault in FAULTS {
        let forget = |storage| open_any(storage)?.forget(&[gone.0], 1);
        let (calls, states) = fail_at_each(&start, fault, forget, |storage, result, what| {
            assert_told(result, what);
            let is_forgotten = is_forgotten(storage);
            assert!(
                is_forgotten || result.is_err(),
                "{what}: it was acknowledged"
            );
            assert_recovers(storage, &[&kept], what);
        });
        println!("forget, {fault:?}: {calls} calls, {states} states");
        let undelete = |storage| open_any(storage)?.unforget(&gone.0).map(drop);
        let (calls, states) = fail_at_each(&forgotten, fault, undelete, |storage, result, what| {
            assert_told(result, what);
            match is_forgotten(storage) {
                true => {
                    assert!(result.is_err(), "{what}: it was acknowledged");
                    assert_recovers(storage, &[&kept], what);
                }
                false => assert_recovers(storage, &[&kept, &gone], what),
            }
        });
        println!("undelete, {fault:?}: {calls} calls, {states} states");
    }
}

#[test]
fn refused_sync_of_a_prune_is_told_and_nothing_that_stays_is_lost() {
    let (start, repo) = new_repo();
    let gone = backup(&repo, &noise(1, 5)).unwrap().id;
    let disk = [noise(1, 1), noise(2, 3)].concat();
    let kept = (backup(&repo, &disk).unwrap().id, disk);
    repo.make_reserve().unwrap();
    repo.forget(&[gone], 1).unwrap();
    start.barrier().unwrap();
    let prune = |storage| open_any(storage)?.prune(&at_once()).map(drop);
    for fault in FAULTS {
        let (calls, states) = fail_at_each(&start, fault, prune, |storage, result, what| {
            assert_told(result, what);
            assert_recovers(storage, &[&kept], what);
        });
        println!("prune, {fault:?}: {calls} calls, {states} states");
        assert!(calls > 60, "{calls}");
    }
}

#[test]
fn refused_call_of_a_restore_gives_the_right_bytes_or_an_error() {
    for (start, repo) in [new_repo(), new_encrypted_repo()] {
        let disk = noise(1, 5);
        let id = backup(&repo, &disk).unwrap().id;
        let read = |storage| {
            let repo = open_any(storage)?;
            let pin = repo.pin(&[id])?;
            let read = restore(&repo, &id)?;
            drop(pin);
            repo.snapshots()
                .map(|list| (read, list.snapshots.len(), list.unreadable.len()))
        };
        for fault in [Fault::Once, Fault::Refused] {
            let (calls, _) = fail_at_each(&start, fault, read, |storage, result, what| {
                assert_told(result, what);
                if let Ok((read, there, unreadable)) = result {
                    assert!(*read == disk, "{what}: wrong data");
                    assert_eq!(there + unreadable, 1, "{what}: a snapshot is hidden");
                }
                assert!(restore(&open(storage), &id).unwrap() == disk, "{what}");
            });
            println!("restore, {fault:?}: {calls} calls");
            assert!(calls > 15, "{calls}");
        }
    }
}

#[test]
fn refused_call_or_sync_of_a_key_command_locks_nobody_out() {
    let (start, repo) = new_encrypted_repo();
    repo.add_key(&password("old"), cheap(), None).unwrap();
    start.barrier().unwrap();
    for (name, command) in KEY_COMMANDS {
        for fault in FAULTS {
            let op = |storage| command(&*Repository::open_with(storage, Some(&password("old")))?);
            let (calls, states) = fail_at_each(&start, fault, op, |storage, result, what| {
                let what = format!("key {name}, {what}");
                assert_told(result, &what);
                let opens = |secret: &Secret| {
                    Repository::open_with(Arc::new(storage.clone()), Some(secret)).is_ok()
                };
                let (old, new) = (opens(&password("old")), opens(&password("new")));
                assert!(opens(&key_file()), "{what}");
                assert_opens(name, result.is_ok(), old, new, &what);
            });
            println!("key {name}, {fault:?}: {calls} calls, {states} states");
        }
    }
}

#[test]
fn refused_call_or_sync_of_init_is_told_and_init_can_be_done_again() {
    let empty = MemoryStorage::new();
    for encrypted in [false, true] {
        let init = |storage: Arc<dyn Storage>| match encrypted {
            true => Repository::init_encrypted(storage, &options(), &key_file(), cheap()).map(drop),
            false => Repository::init(storage, &options()).map(drop),
        };
        for fault in FAULTS {
            let (calls, states) = fail_at_each(&empty, fault, init, |storage, result, what| {
                assert_told(result, what);
                let at = || Arc::new(storage.clone());
                match open_any(at()) {
                    Ok(_) => {}
                    Err(RepoError::NotARepository { .. }) if result.is_err() => {
                        init(at()).unwrap_or_else(|e| panic!("{what}: {e}"));
                    }
                    Err(other) => panic!("{what}: {other}"),
                }
                backup(&open(storage), &noise(1, 2)).unwrap();
            });
            println!("init, encrypted {encrypted}, {fault:?}: {calls} calls, {states} states");
        }
    }
}
