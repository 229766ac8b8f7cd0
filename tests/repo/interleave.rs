//! Writers, readers and prunes in every order of their steps that a few switches make: the real code, model-checked.
//!
//! Each test is a race that destroyed data in some tool. The number of switches is what finds such races in practice;
//! `NBDBACKUP_TEST_SWITCHES` raises it for a longer run.

use std::sync::Arc;

use nbdbackup::repo::{
    CheckOptions, MemoryStorage, PasswordCost, RepoError, Repository, Secret, Snapshot, SnapshotId,
    Storage,
};

use crate::prune::at_once;
use crate::scheduler::{Process, Rules, explore};
use crate::support::*;

/// What a process came to.
#[derive(Debug)]
pub(crate) enum Did {
    /// It committed this snapshot.
    Stored(SnapshotId, Vec<u8>),
    /// It was told that it cannot, and why.
    Refused(RepoError),
    /// It read what it should.
    Read(Result<Vec<u8>, RepoError>),
    /// It had this snapshot back.
    HadBack(SnapshotId, Vec<u8>),
    /// It read a snapshot that may be gone since.
    HadIt,
    /// Something else, which must not matter.
    Ran,
}

fn switches(usual: usize) -> usize {
    match std::env::var("NBDBACKUP_TEST_SWITCHES") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => usual,
    }
}

pub(crate) fn rules(usual: usize) -> Rules {
    Rules {
        switches: switches(usual),
        ..Rules::default()
    }
}

/// The same, for so many orders that the usual run takes only some of them.
pub(crate) fn some(usual: usize, one_in: usize) -> Rules {
    match std::env::var_os("NBDBACKUP_TEST_SWITCHES") {
        Some(_) => rules(usual),
        None => Rules {
            one_in,
            ..rules(usual)
        },
    }
}

/// A disk of chunks of one byte each.
pub(crate) fn disk(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|b| vec![*b; CHUNK]).collect()
}

/// A repository with a disk that stays, and one that is forgotten and shares a chunk with it.
pub(crate) struct Base {
    storage: MemoryStorage,
    kept: (SnapshotId, Vec<u8>),
    pub(crate) forgotten: (Snapshot, Vec<u8>),
}

pub(crate) fn base() -> Base {
    let (storage, repo) = new_repo();
    let (kept, gone) = (disk(&[1, 2]), disk(&[2, 3, 4]));
    // The shared chunk lies in the pack of the one that is forgotten, so that this has to be written anew.
    let forgotten = backup(&repo, &gone).unwrap();
    let id = backup(&repo, &kept).unwrap().id;
    repo.forget(&[forgotten.id], 1).unwrap();
    // Once, rather than in each run.
    repo.make_reserve().unwrap();
    storage.barrier().unwrap();
    Base {
        storage,
        kept: (id, kept),
        forgotten: (forgotten, gone),
    }
}

impl Base {
    pub(crate) fn copy(&self) -> MemoryStorage {
        self.storage.after_power_failure(|_| true)
    }

    /// Checks what must hold whatever happened, then ends what is pending and checks again, and that no garbage stays.
    pub(crate) fn check(&self, storage: &MemoryStorage, did: &[Did], told: &str) {
        self.check_snapshots(storage, did, told);
        let repo = Repository::open(Arc::new(storage.clone())).unwrap();
        for turn in 0..3 {
            let pruned = repo.prune(&at_once());
            let pruned = pruned.unwrap_or_else(|e| panic!("prune {turn}: {e}\n{told}"));
            assert!(pruned.waiting_for.is_empty(), "{pruned:?}\n{told}");
        }
        self.check_snapshots(storage, did, told);
        let dry = repo.prune(&at_once()).unwrap();
        assert_eq!(dry.unused_bytes, 0, "{told}");
        assert!(storage.list("sess/").unwrap().is_empty(), "{told}");
        let left: Vec<_> = storage
            .list("gc/")
            .unwrap()
            .into_iter()
            .map(|f| f.name)
            .collect();
        assert!(
            left.iter().all(|n| n.ends_with(".done")),
            "{left:?}\n{told}"
        );
    }

    fn check_snapshots(&self, storage: &MemoryStorage, did: &[Did], told: &str) {
        let repo = Repository::open(Arc::new(storage.clone())).unwrap();
        let list = repo.snapshots().unwrap();
        assert!(list.unreadable.is_empty(), "{:?}\n{told}", list.unreadable);
        let whole = |id: &SnapshotId, disk: &Vec<u8>| {
            let listed = list.snapshots.iter().any(|s| s.id == *id);
            assert!(listed, "snapshot {id} is gone\n{told}");
            match restore(&repo, id) {
                Ok(read) => assert!(read == *disk, "snapshot {id} is wrong\n{told}"),
                Err(error) => panic!("snapshot {id}: {error}\n{told}"),
            }
        };
        whole(&self.kept.0, &self.kept.1);
        for did in did {
            match did {
                Did::Stored(id, disk) | Did::HadBack(id, disk) => whole(id, disk),
                Did::Read(Ok(read)) => assert!(*read == self.kept.1, "{told}"),
                Did::Read(Err(error)) => panic!("a reader failed: {error}\n{told}"),
                Did::Refused(
                    RepoError::Fenced { .. }
                    | RepoError::ParentGone { .. }
                    | RepoError::TooLate { .. }
                    | RepoError::NoSuchSnapshot { .. }
                    | RepoError::PruneBusy,
                ) => {}
                Did::Refused(error) => panic!("refused: {error}\n{told}"),
                Did::HadIt | Did::Ran => {}
            }
        }
    }
}

pub(crate) fn did<T>(result: Result<T, RepoError>, then: impl FnOnce(T) -> Did) -> Did {
    match result {
        Ok(value) => then(value),
        Err(error) => Did::Refused(error),
    }
}

pub(crate) fn writer(disk: &[u8]) -> Process<Did> {
    let disk = disk.to_vec();
    Box::new(move |repo| {
        let stored = backup(&repo, &disk);
        did(stored, |snapshot| Did::Stored(snapshot.id, disk))
    })
}

pub(crate) fn pruner() -> Process<Did> {
    Box::new(|repo| {
        // It has looked at the index before, and may not believe that.
        did(repo.prune(&at_once()), |_| Did::Ran)
    })
}

fn reader(base: &Base) -> Process<Did> {
    let id = base.kept.0;
    Box::new(move |repo| Did::Read(restore(&repo, &id)))
}

/// A session uses the chunks of a snapshot that is removed while the prune looks around (PSA-2025-00019-1 of Proxmox).
#[test]
fn writer_that_uses_chunks_of_what_a_prune_removes_loses_nothing() {
    let base = base();
    let disk = disk(&[3, 4, 5]);
    let runs = explore(
        some(2, 2),
        || (base.copy(), vec![writer(&disk), pruner()]),
        |storage, did, told| base.check(storage, did, told),
    );
    assert!(runs > 500, "{runs}");
}

/// A prune that read the index long ago meets packs that it does not know (kopia#1242).
#[test]
fn prune_with_an_old_view_spares_what_is_new() {
    let base = base();
    let disk = disk(&[7, 8]);
    let start = || {
        let pruner: Process<Did> = Box::new(|repo: Arc<Repository>| {
            repo.index_segments().unwrap();
            did(repo.prune(&at_once()), |_| Did::Ran)
        });
        (base.copy(), vec![pruner, writer(&disk)])
    };
    explore(rules(1), start, |storage, did, told| {
        base.check(storage, did, told)
    });
}

/// Two prunes, one of which is exhaustive, run beside a backup (benji#119, duplicacy#323).
#[test]
fn two_prunes_and_a_writer_lose_nothing() {
    let base = base();
    let disk = disk(&[2, 3, 9]);
    let start = || (base.copy(), vec![pruner(), pruner(), writer(&disk)]);
    explore(rules(1), start, |storage, did, told| {
        base.check(storage, did, told)
    });
}

#[test]
fn two_prunes_never_remove_both_copies_of_a_chunk() {
    let base = base();
    let start = || (base.copy(), vec![pruner(), pruner()]);
    explore(some(2, 5), start, |storage, did, told| {
        base.check(storage, did, told)
    });
}

#[test]
fn writer_that_inherits_from_what_a_prune_removes_is_whole_or_refused() {
    let base = base();
    let start = || {
        let (parent, before) = base.forgotten.clone();
        let child: Process<Did> = Box::new(move |repo: Arc<Repository>| {
            let mut disk = before;
            disk[..CHUNK].fill(6);
            let stored = backup_after(&repo, &parent, &disk, 1..3);
            did(stored, |snapshot| Did::Stored(snapshot.id, disk))
        });
        (base.copy(), vec![child, pruner()])
    };
    explore(rules(2), start, |storage, did, told| {
        base.check(storage, did, told)
    });
}

#[test]
fn reader_of_what_stays_never_notices_a_prune() {
    let base = base();
    let start = || (base.copy(), vec![reader(&base), pruner()]);
    explore(rules(2), start, |storage, did, told| {
        base.check(storage, did, told)
    });
}

#[test]
fn check_beside_a_prune_or_a_writer_finds_nothing_damaged() {
    let base = base();
    let disk = disk(&[3, 4, 5]);
    let check: fn(Arc<Repository>) -> Did = |repo| {
        let found = repo.check(&CheckOptions::default(), &|_, _| {}).unwrap();
        assert!(found.is_whole(), "{found:?}");
        assert!(found.strangers.is_empty(), "{found:?}");
        Did::Ran
    };
    for writes in [false, true] {
        let start = || {
            let other = if writes { writer(&disk) } else { pruner() };
            (base.copy(), vec![Box::new(check), other])
        };
        explore(some(2, 8), start, |storage, did, told| {
            base.check(storage, did, told)
        });
    }
}

/// Locks that lie make every session look dead: it is fenced, at worst in the instant in which it commits.
#[test]
fn session_that_is_taken_for_dead_is_fenced_or_has_committed() {
    let base = base();
    let disk = disk(&[3, 4, 5]);
    let rules = Rules {
        locks_lie: true,
        ..rules(2)
    };
    let fenced = std::cell::Cell::new(0);
    let start = || (base.copy(), vec![writer(&disk), pruner()]);
    explore(rules, start, |storage, did, told| {
        base.check(storage, did, told);
        let is_fenced = matches!(did[0], Did::Refused(RepoError::Fenced { .. }));
        fenced.set(fenced.get() + usize::from(is_fenced));
    });
    assert!(fenced.get() > 0);
}

#[test]
fn writer_that_is_killed_at_any_step_holds_nothing_up() {
    let base = base();
    let disk = disk(&[3, 4, 5]);
    for at in 1.. {
        let rules = Rules {
            switches: 0,
            kill: Some((0, at)),
            ..Rules::default()
        };
        let survived = std::cell::Cell::new(false);
        let start = || {
            let killed: Process<Did> = {
                let disk = disk.clone();
                Box::new(move |repo| match backup(&repo, &disk) {
                    Ok(snapshot) => Did::Stored(snapshot.id, disk),
                    Err(_) => Did::Ran,
                })
            };
            (base.copy(), vec![killed, pruner()])
        };
        explore(rules, start, |storage, did, told| {
            base.check(storage, did, told);
            survived.set(matches!(did[0], Did::Stored(..)));
        });
        // After its commit a session only takes back its announcement.
        if survived.get() && at > 60 {
            break;
        }
    }
}

#[test]
fn prune_that_is_killed_at_any_step_is_ended_by_the_next() {
    let base = base();
    let disk = disk(&[3, 4, 5]);
    let mut at = 1;
    loop {
        let rules = Rules {
            switches: 0,
            kill: Some((1, at)),
            ..Rules::default()
        };
        let ended = std::cell::Cell::new(false);
        let start = || {
            let killed: Process<Did> =
                Box::new(|repo: Arc<Repository>| match repo.prune(&at_once()) {
                    Ok(_) => Did::Read(Ok(crate::interleave::disk(&[1, 2]))),
                    Err(_) => Did::Ran,
                });
            (base.copy(), vec![writer(&disk), killed])
        };
        explore(rules, start, |storage, did, told| {
            base.check(storage, did, told);
            ended.set(matches!(did[1], Did::Read(_)));
        });
        if ended.get() {
            break;
        }
        at += 1;
    }
    assert!(at > 40, "{at}");
}

#[test]
fn forgotten_snapshot_is_had_back_whole_or_not_at_all() {
    let base = base();
    let start = || {
        let (snapshot, disk) = base.forgotten.clone();
        let undelete: Process<Did> = Box::new(move |repo: Arc<Repository>| {
            did(repo.unforget(&snapshot.id), |s| Did::HadBack(s.id, disk))
        });
        (base.copy(), vec![undelete, pruner()])
    };
    let had_back = std::cell::Cell::new(0);
    explore(rules(2), start, |storage, did, told| {
        had_back.set(had_back.get() + usize::from(matches!(did[0], Did::HadBack(..))));
        base.check(storage, did, told);
    });
    assert!(had_back.get() > 0);
}

/// A long session spans several prunes, each with something new to remove.
#[test]
fn long_session_spans_many_prunes() {
    let base = base();
    let storage = base.copy();
    let open = || Repository::open(Arc::new(storage.clone())).unwrap();
    let long = open();
    let session = long.begin(&small_session()).unwrap();
    let data = disk(&[2, 3, 4]);
    let (root, new) = store_disk(&session, &data).unwrap();
    assert_eq!(new, 0);
    for byte in 20..25 {
        let id = backup(&open(), &disk(&[byte])).unwrap().id;
        open().forget(&[id], 1).unwrap();
        let pruned = open().prune(&at_once()).unwrap();
        assert_eq!(pruned.waiting_for, [session.id()]);
    }
    let id = session
        .commit(draft("d", data.len() as u64, root))
        .unwrap()
        .id;
    base.check(&storage, &[Did::Stored(id, data)], "");
}

#[test]
fn two_that_remove_each_others_keys_leave_one() {
    let (storage, repo) = new_encrypted_repo();
    let cost = PasswordCost::new(1 << 10, 1).unwrap();
    let other = Secret::password(b"a".to_vec()).unwrap();
    repo.add_key(&other, cost, None).unwrap();
    let remove = |slot| -> Process<bool> {
        Box::new(move |repo: Arc<Repository>| repo.remove_key(slot).is_ok())
    };
    let start = || {
        (
            storage.after_power_failure(|_| true),
            vec![remove(0), remove(1)],
        )
    };
    let both_refused = std::cell::Cell::new(0);
    explore(rules(2), start, |storage, did, told| {
        let first = key_file();
        let opens = [&first, &other].into_iter().filter(|secret| {
            Repository::open_with(Arc::new(storage.clone()), Some(secret)).is_ok()
        });
        assert!(opens.count() > 0, "{did:?}\n{told}");
        both_refused.set(both_refused.get() + usize::from(!did[0] && !did[1]));
    });
    assert!(both_refused.get() > 0);
}
