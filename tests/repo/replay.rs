//! Files that are gone, or stand in each other's places, in a repository that has files of every kind.

use std::collections::BTreeMap;
use std::sync::Arc;

use nbdbackup::repo::{
    CheckOptions, Checked, MemoryStorage, RepoError, Repository, Secret, SnapshotId, Storage,
};

use crate::medium::every_kind;
use crate::prune::{at_once, noise};
use crate::support::*;

type Known = BTreeMap<SnapshotId, Vec<u8>>;

fn check(repo: &Repository) -> Result<Checked, RepoError> {
    let options = CheckOptions {
        read_data_percent: Some(100.0),
        repair: true,
        now_unix_nanos: 5,
    };
    repo.check(&options, &|_, _| {})
}

/// Reads all; what cannot be read is an error, never other bytes. Returns how many could be.
fn reads(storage: &MemoryStorage, known: &Known, what: &str) -> usize {
    let Ok(repo) = open_any(Arc::new(storage.clone())) else {
        return 0;
    };
    let listed = repo.snapshots().unwrap().snapshots;
    let whole = known.iter().filter(|(id, disk)| {
        let read = restore(&repo, id);
        assert!(
            read.as_ref().is_ok_and(|r| r == *disk) || read.is_err(),
            "{what}: wrong data"
        );
        read.is_ok() && listed.iter().any(|s| s.id == **id)
    });
    whole.count()
}

/// Does everything to a repository that has something wrong; panics on wrong data.
fn live_on(storage: &MemoryStorage, known: &Known, what: &str) {
    reads(storage, known, what);
    let open = || open_any(Arc::new(storage.clone()));
    let disk = noise(70, 2);
    let stored = open().and_then(|repo| backup(&repo, &disk));
    for _ in 0..2 {
        let _ = open().and_then(|repo| repo.prune(&at_once()));
    }
    reads(storage, known, &format!("{what}, pruned"));
    let _ = open().and_then(|repo| check(&repo));
    for disk in known.values() {
        let _ = open().and_then(|repo| backup(&repo, disk));
    }
    let _ = open().and_then(|repo| repo.prune(&at_once()));
    reads(storage, known, &format!("{what}, mended"));
    if let (Ok(stored), Ok(repo)) = (stored, open()) {
        assert!(
            restore(&repo, &stored.id).unwrap() == disk,
            "{what}: a new backup is lost"
        );
    }
}

#[test]
fn file_of_any_kind_that_is_gone_is_made_up_for_or_loses_what_it_alone_holds() {
    for (whole, known) in [every_kind(new_repo()), every_kind(new_encrypted_repo())] {
        for file in whole.list("").unwrap() {
            let storage = copy(&whole);
            storage.remove(&file.name).unwrap();
            let what = format!("{} is gone", file.name);
            let kind = file.name.split('/').next().unwrap();
            // Only the index knows where the good copy of a damaged record is.
            let alone = ["snap", "packs", "meta"].contains(&kind);
            let read = reads(&storage, &known, &what);
            assert!(
                alone || kind == "idx" || read == known.len(),
                "{what}: {read}"
            );
            let open = || open(&storage);
            let found = check(&open()).unwrap_or_else(|e| panic!("{what}: {e}"));
            let lost = alone || file.name.starts_with("config") || file.name.starts_with("keys/");
            assert!(lost || found.is_whole(), "{what}: {found:?}");
            for disk in known.values() {
                backup(&open(), disk).unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            for _ in 0..2 {
                open()
                    .prune(&at_once())
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            // All is healed, but for the snapshot whose own file it was.
            let own = usize::from(known.keys().any(|id| file.name == format!("snap/{id}")));
            assert_eq!(reads(&storage, &known, &what), known.len() - own, "{what}");
            assert!(check(&open()).unwrap().is_whole(), "{what}");
        }
    }
}

#[test]
fn files_of_any_kinds_that_changed_places_give_no_wrong_data_and_nothing_is_lost_by_it() {
    let mut swaps = 0;
    for (whole, known) in [every_kind(new_repo()), every_kind(new_encrypted_repo())] {
        let files = whole.list("").unwrap();
        let bytes_of = |name: &str| whole.read(name, u64::MAX).unwrap();
        let kind = |n: usize| files[n].name.split('/').next().unwrap();
        for a in 0..files.len() {
            let later = a + 1..files.len();
            // The next of its kind, and the first of each other kind.
            let others = later.clone().filter(|b| {
                let first = |n: usize| n == 0 || kind(n) != kind(n - 1);
                thorough() || *b == a + 1 || first(*b)
            });
            for b in others {
                let (one, other) = (&files[a].name, &files[b].name);
                let storage = copy(&whole);
                storage.damage(one, bytes_of(other));
                storage.damage(other, bytes_of(one));
                let what = format!("{one} and {other} swapped");
                live_on(&storage, &known, &what);
                swaps += 1;
                // Each in its own place again, nothing else is missing.
                storage.damage(one, bytes_of(one));
                storage.damage(other, bytes_of(other));
                for file in storage.list("idx/").unwrap() {
                    storage.remove(&file.name).unwrap();
                }
                let repo = open(&storage);
                repo.rebuild_index().unwrap();
                for (id, disk) in &known {
                    let read = restore(&repo, id);
                    let read = read.unwrap_or_else(|e| panic!("{what}, and back: {e}"));
                    assert!(read == *disk, "{what}, and back");
                }
            }
        }
    }
    println!("{swaps} swaps");
    assert!(swaps > 300, "{swaps}");
}

#[test]
fn small_files_of_another_repository_open_nothing_or_say_so() {
    for encrypted in [false, true] {
        let new = || match encrypted {
            true => new_encrypted_repo(),
            false => new_repo(),
        };
        let (storage, repo) = new();
        let (other, _) = new();
        let disk = noise(1, 3);
        let id = backup(&repo, &disk).unwrap().id;
        let bytes_of = |name: &str| other.read(name, u64::MAX).unwrap();
        // One copy: the other one counts.
        for name in ["config", "config.bak", "keys/0", "keys/0.bak"] {
            let storage = copy(&storage);
            storage.damage(name, bytes_of(name));
            let repo = open_any(Arc::new(storage.clone()));
            match repo {
                Ok(repo) => assert!(restore(&repo, &id).unwrap() == disk, "{name}"),
                Err(error) => assert!(name == "keys/0", "{name}: {error}"),
            }
        }
        // All of them: nothing of what is there is taken for that repository's.
        let taken = copy(&storage);
        for name in ["config", "config.bak", "keys/0", "keys/0.bak"] {
            taken.damage(name, bytes_of(name));
        }
        let repo = open_any(Arc::new(taken.clone())).unwrap();
        let list = repo.snapshots().unwrap();
        assert_eq!((list.snapshots.len(), list.unreadable.len()), (0, 1));
        assert!(repo.prune(&at_once()).is_err());
        assert_eq!(
            taken.list("packs/").unwrap(),
            storage.list("packs/").unwrap()
        );
        // And back.
        for name in ["config", "config.bak", "keys/0", "keys/0.bak"] {
            taken.damage(name, storage.read(name, u64::MAX).unwrap());
        }
        assert!(restore(&open(&taken), &id).unwrap() == disk);
    }
}

#[test]
fn key_slot_that_is_back_is_listed_and_can_be_removed_again() {
    let (storage, repo) = new_encrypted_repo();
    let disk = noise(1, 3);
    let id = backup(&repo, &disk).unwrap().id;
    let cost = nbdbackup::repo::PasswordCost::new(1 << 10, 1).unwrap();
    let second = Secret::password(b"second".to_vec()).unwrap();
    let third = Secret::password(b"third".to_vec()).unwrap();
    let number = repo.add_key(&second, cost, None).unwrap();
    let old = copy(&storage);
    repo.remove_key(number).unwrap();
    for file in old.list("keys/").unwrap() {
        if storage.len(&file.name).is_err() {
            storage.damage(&file.name, old.read(&file.name, u64::MAX).unwrap());
        }
    }
    let repo = open(&storage);
    let slots: Vec<u32> = repo.key_slots().unwrap().iter().map(|s| s.number).collect();
    assert!(slots.contains(&number), "{slots:?}");
    repo.add_key(&third, cost, None).unwrap();
    repo.remove_key(number).unwrap();
    let refused = Repository::open_with(Arc::new(storage.clone()), Some(&second));
    assert!(matches!(refused, Err(RepoError::WrongSecret { .. })));
    for secret in [&key_file(), &third] {
        let repo = Repository::open_with(Arc::new(storage.clone()), Some(secret)).unwrap();
        assert!(restore(&repo, &id).unwrap() == disk);
    }
}
