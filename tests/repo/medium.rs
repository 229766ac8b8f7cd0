//! What a medium does over time: sectors that it cannot read any more, and files of old that are back.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nbdbackup::repo::{
    CheckOptions, Checked, FileInfo, Hold, MemoryStorage, NewFile, RepoError, Repository,
    SnapshotId, Storage, StorageError,
};

use crate::prune::{at_once, noise};
use crate::support::*;

/// Storage of which one range cannot be read.
#[derive(Debug)]
struct BadSector {
    inner: MemoryStorage,
    file: String,
    range: Range<u64>,
    errno: i32,
    /// Whether the file was removed: one that takes its place lies in other sectors.
    gone: AtomicBool,
}

impl BadSector {
    fn call(&self, name: &str, range: Range<u64>) -> Result<(), StorageError> {
        if self.gone.load(Ordering::SeqCst)
            || name != self.file
            || range.start >= self.range.end
            || range.end <= self.range.start
        {
            return Ok(());
        }
        let error = std::io::Error::from_raw_os_error(self.errno);
        Err(StorageError::from_io("read", name, error))
    }
}

impl Storage for BadSector {
    fn create(&self) -> Result<Box<dyn NewFile>, StorageError> {
        self.inner.create()
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, StorageError> {
        self.call(name, 0..u64::MAX)?;
        self.inner.read(name, limit)
    }

    fn read_at(&self, name: &str, at: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        self.call(name, at..at + buf.len() as u64)?;
        self.inner.read_at(name, at, buf)
    }

    fn len(&self, name: &str) -> Result<u64, StorageError> {
        self.inner.len(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<FileInfo>, StorageError> {
        self.inner.list(prefix)
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        if name == self.file {
            self.gone.store(true, Ordering::SeqCst);
        }
        self.inner.remove(name)
    }

    fn barrier(&self) -> Result<(), StorageError> {
        self.inner.barrier()
    }

    fn hold(&self, name: &str) -> Result<Box<dyn Hold>, StorageError> {
        self.inner.hold(name)
    }

    fn is_held(&self, name: &str) -> Result<Option<bool>, StorageError> {
        self.inner.is_held(name)
    }

    fn sweep(&self) -> Result<u64, StorageError> {
        self.inner.sweep()
    }

    fn place(&self) -> String {
        self.inner.place()
    }
}

const ESTALE: i32 = 116;

fn check(repo: &Repository, repair: bool) -> Result<Checked, RepoError> {
    let options = CheckOptions {
        read_data_percent: Some(100.0),
        repair,
        now_unix_nanos: 5,
    };
    repo.check(&options, &|_, _| {})
}

#[test]
fn sector_that_cannot_be_read_is_computed_from_parity() {
    let (whole, repo) = new_repo();
    let disk = noise(1, 3);
    let id = backup(&repo, &disk).unwrap().id;
    for pack in [whole.list("packs/").unwrap(), whole.list("meta/").unwrap()].concat() {
        let good = whole.read(&pack.name, u64::MAX).unwrap();
        for at in [0, 100, pack.len - 60, pack.len - 1] {
            let what = format!("{} at {at}", pack.name);
            let storage = copy(&whole);
            // The pages of the sector hold nothing of use.
            let mut bytes = good.clone();
            bytes[at as usize] ^= 0xff;
            storage.damage(&pack.name, bytes);
            let bad = Arc::new(BadSector {
                inner: storage.clone(),
                file: pack.name.clone(),
                range: at..at + 1,
                errno: EIO,
                gone: AtomicBool::new(false),
            });
            let repo = Repository::open(bad).unwrap();
            check(&repo, true).unwrap();
            // The new file stands on the same bad sector here, which is seen.
            let done = repo.repair(None).unwrap();
            assert_eq!(done.failed.len(), 1, "{what}: {done:?}");
            assert!(
                storage.read(&pack.name, u64::MAX).unwrap() == good,
                "{what}"
            );
            // On another disk, or when it has taken another sector for it, all is well.
            let repo = open(&storage);
            assert_eq!(
                repo.repair(None).unwrap().whole,
                std::slice::from_ref(&pack.name),
                "{what}"
            );
            assert!(check(&repo, false).unwrap().is_whole(), "{what}");
            assert!(restore(&repo, &id).unwrap() == disk, "{what}");
        }
    }
}

#[test]
fn sector_of_any_pack_that_cannot_be_read_is_damage_that_the_next_backup_heals() {
    let (whole, repo) = new_repo();
    let disk = noise(1, 3);
    let id = backup(&repo, &disk).unwrap().id;
    drop(repo);
    let packs = [whole.list("packs/").unwrap(), whole.list("meta/").unwrap()].concat();
    assert_eq!(packs.len(), 2);
    for pack in packs {
        // The header, a record, the footer, the trailer.
        for at in [0, 100, pack.len - 60, pack.len - 1] {
            let what = format!("{} at {at}", pack.name);
            let storage = copy(&whole);
            let bad = |errno| -> Arc<dyn Storage> {
                Arc::new(BadSector {
                    inner: storage.clone(),
                    file: pack.name.clone(),
                    range: at..at + 1,
                    errno,
                    gone: AtomicBool::new(false),
                })
            };
            let found = check(&Repository::open(bad(EIO)).unwrap(), false).unwrap();
            assert!(!found.is_whole(), "{what}");
            let named = found.files.iter().any(|f| f.file == pack.name);
            assert!(named, "{what}: {found:?}");
            // Whoever cannot reach the storage says nothing about it, but for records, which are marked at most.
            if at != 100 {
                let failed = check(&Repository::open(bad(ESTALE)).unwrap(), true);
                assert!(matches!(failed, Err(RepoError::Io { .. })), "{what}");
            }
            check(&Repository::open(bad(EIO)).unwrap(), true).unwrap();
            let repo = Repository::open(bad(EIO)).unwrap();
            backup(&repo, &disk).unwrap();
            let repo = Repository::open(bad(EIO)).unwrap();
            assert!(restore(&repo, &id).unwrap() == disk, "{what}");
            let found = check(&repo, true).unwrap();
            assert_eq!(found.ranges_total, 0, "{what}: {found:?}");
        }
    }
}

#[test]
fn file_that_is_back_is_noticed_or_does_no_harm() {
    for encrypted in [false, true] {
        let (storage, repo) = match encrypted {
            true => new_encrypted_repo(),
            false => new_repo(),
        };
        // A life in which files of each kind came and went.
        let mut known: BTreeMap<SnapshotId, Vec<u8>> = BTreeMap::new();
        let mut old: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut keep = |storage: &MemoryStorage| {
            for file in storage.list("").unwrap() {
                old.insert(
                    file.name.clone(),
                    storage.read(&file.name, u64::MAX).unwrap(),
                );
            }
        };
        for n in 0..4 {
            let disk = [noise(n, 3), noise(9, 2)].concat();
            known.insert(backup(&repo, &disk).unwrap().id, disk);
            keep(&storage);
        }
        let gone: Vec<SnapshotId> = known.keys().take(2).copied().collect();
        for id in &gone {
            check(&repo, false).unwrap();
            repo.forget(&[*id], 1).unwrap();
            keep(&storage);
            let open_session = repo.begin(&small_session()).unwrap();
            repo.prune(&at_once()).unwrap();
            keep(&storage);
            drop(open_session);
            repo.prune(&at_once()).unwrap();
            keep(&storage);
        }
        repo.merge_index(u64::MAX).unwrap();
        check(&repo, true).unwrap();
        drop(repo);

        let mut kinds = std::collections::BTreeSet::new();
        for (file, bytes) in &old {
            if storage.read(file, u64::MAX).is_ok_and(|now| now == *bytes) {
                continue;
            }
            kinds.insert(file.split('/').next().unwrap().to_owned());
            let storage = copy(&storage);
            storage.damage(file, bytes.clone());
            let what = format!("{file}, encrypted {encrypted}");
            let open = || open_any(Arc::new(storage.clone())).unwrap();
            let whole = check(&open(), false).unwrap().is_whole();
            let reads = |when: &str| {
                let repo = open();
                for snapshot in repo.snapshots().unwrap().snapshots {
                    let Some(disk) = known.get(&snapshot.id) else {
                        continue;
                    };
                    match restore(&repo, &snapshot.id) {
                        Ok(read) => assert!(read == *disk, "{what}, {when}: wrong data"),
                        // Only what was removed for good, and that is said.
                        Err(error) => {
                            assert!(gone.contains(&snapshot.id), "{what}, {when}: {error}");
                            assert!(!whole, "{what}, {when}: a check finds nothing");
                        }
                    }
                }
                for id in known.keys().filter(|id| !gone.contains(id)) {
                    assert!(restore(&repo, id).unwrap() == known[id], "{what}, {when}");
                }
            };
            reads("at once");
            // Of what was removed: nothing that is back may make anyone believe that it is still there.
            let new = known[&gone[0]].clone();
            let id = backup(&open(), &new).unwrap().id;
            reads("after a backup");
            for _ in 0..2 {
                match open().prune(&at_once()) {
                    Ok(_) => {}
                    // What the returned snapshot needs is in no pack.
                    Err(RepoError::RecordsMissing { .. }) => assert!(!whole, "{what}"),
                    Err(error) => panic!("{what}: {error}"),
                }
                reads("after a prune");
            }
            assert!(restore(&open(), &id).unwrap() == new, "{what}");
        }
        for kind in ["gc", "idx", "meta", "packs", "sess", "snap", "verify"] {
            assert!(kinds.contains(kind), "{kind} of {kinds:?}");
        }
    }
}

#[test]
fn help_that_cannot_be_read_any_more_stops_nobody() {
    let (whole, repo) = new_repo();
    let disk = noise(1, 12);
    let id = backup(&repo, &disk).unwrap().id;
    let pack = whole.list("packs/").unwrap().remove(0);
    let mut bytes = whole.read(&pack.name, u64::MAX).unwrap();
    bytes[100] ^= 1;
    whole.damage(&pack.name, bytes);
    // A mark and a journal, then a run that heals the mark's record and dies with a checkpoint.
    check(&repo, true).unwrap();
    backup(&Repository::open(Arc::new(whole.clone())).unwrap(), &disk).unwrap();
    let repo = Repository::open(Arc::new(whole.clone())).unwrap();
    crate::resume::interrupt(&repo, &noise(50, 60));
    drop(repo);
    for folder in ["verify/", "ckpt/"] {
        let files = whole.list(folder).unwrap();
        assert!(!files.is_empty(), "{folder}");
        for file in files {
            let storage = copy(&whole);
            let repo = Repository::open(Arc::new(BadSector {
                inner: storage,
                file: file.name.clone(),
                range: 0..u64::MAX,
                errno: EIO,
                gone: AtomicBool::new(false),
            }));
            let repo = repo.unwrap();
            check(&repo, false).unwrap();
            let session = repo.begin(&crate::resume::checkpointed(9)).unwrap();
            let (root, _) = store_disk(&session, &disk).unwrap();
            let draft = draft("disk", disk.len() as u64, root);
            session.commit(draft).unwrap();
            repo.prune(&at_once()).unwrap();
            assert!(restore(&repo, &id).unwrap() == disk, "{}", file.name);
            check(&repo, true).unwrap();
        }
    }
    // Without its mark a damaged record looks as good as the one that healed it: none of the two may go.
    let mark = whole.list("bad/").unwrap().remove(0);
    let mut bytes = whole.read(&mark.name, u64::MAX).unwrap();
    bytes[30] ^= 1;
    whole.damage(&mark.name, bytes);
    let repo = Repository::open(Arc::new(whole.clone())).unwrap();
    let refused = repo.prune(&at_once());
    assert!(
        matches!(refused, Err(RepoError::Corrupt { .. })),
        "{refused:?}"
    );
    check(&repo, true).unwrap();
    let repo = Repository::open(Arc::new(whole.clone())).unwrap();
    repo.prune(&at_once()).unwrap();
    repo.prune(&at_once()).unwrap();
    assert!(restore(&repo, &id).unwrap() == disk);
}

#[test]
fn copy_that_is_condemned_stays_once_the_other_one_is_found_damaged() {
    let (storage, repo) = new_repo();
    let disk = noise(1, 4);
    // Two at once, of which none knows what the other one stores.
    let other = Repository::open(Arc::new(storage.clone())).unwrap();
    let sessions = [&repo, &other].map(|repo| repo.begin(&small_session()).unwrap());
    let roots = sessions.each_ref().map(|s| store_disk(s, &disk).unwrap().0);
    let commit = |(session, root): (&nbdbackup::repo::Session, _)| {
        let draft = draft("disk", disk.len() as u64, root);
        session.commit(draft).unwrap().id
    };
    let ids: Vec<SnapshotId> = sessions.iter().zip(roots).map(commit).collect();
    let waited_for = repo.begin(&small_session()).unwrap();
    let other = Repository::open(Arc::new(storage.clone())).unwrap();
    let pruned = other.prune(&at_once()).unwrap();
    assert!(pruned.packs_waiting > 0, "{pruned:?}");

    let condemned = storage.read("gc/0.condemned", u64::MAX).unwrap();
    let is_condemned = |name: &str| {
        let id: nbdbackup::repo::PackId = name[name.len() - 32..].parse().unwrap();
        condemned.windows(16).any(|bytes| bytes == id.as_bytes())
    };
    let packs = storage.list("packs/").unwrap();
    let (doomed, kept): (Vec<_>, Vec<_>) = packs.iter().partition(|p| is_condemned(&p.name));
    assert!(!doomed.is_empty() && !kept.is_empty());
    for pack in kept {
        let mut bytes = storage.read(&pack.name, u64::MAX).unwrap();
        for at in (73..bytes.len() - 400).step_by(1000) {
            bytes[at] ^= 1;
        }
        storage.damage(&pack.name, bytes);
    }
    assert!(check(&other, true).unwrap().marked > 0);
    drop(waited_for);
    for _ in 0..2 {
        let repo = Repository::open(Arc::new(storage.clone())).unwrap();
        repo.prune(&at_once()).unwrap();
    }
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    for id in ids {
        assert!(restore(&repo, &id).unwrap() == disk);
    }
}

/// Stores two disks and forgets the first; returns both.
fn one_of_two_is_forgotten(
    repo: &Arc<Repository>,
) -> ((SnapshotId, Vec<u8>), (SnapshotId, Vec<u8>)) {
    let [gone, kept] = [noise(1, 4), noise(2, 4)].map(|d| (backup(repo, &d).unwrap().id, d));
    repo.forget(&[gone.0], 1).unwrap();
    (gone, kept)
}

#[test]
fn prune_s_list_that_is_damaged_stops_backups_until_the_next_prune_and_loses_nothing() {
    let (storage, repo) = new_repo();
    let ((forgotten, _), (id, kept)) = one_of_two_is_forgotten(&repo);
    let waited_for = repo.begin(&small_session()).unwrap();
    let open = || Repository::open(Arc::new(storage.clone())).unwrap();
    assert!(open().prune(&at_once()).unwrap().packs_waiting > 0);
    let mut bytes = storage.read("gc/0.condemned", u64::MAX).unwrap();
    bytes[40] ^= 1;
    storage.damage("gc/0.condemned", bytes);
    // Nobody knows what must not be referred to.
    let refused = open().begin(&small_session());
    assert!(matches!(refused, Err(RepoError::Corrupt { .. })));
    drop(waited_for);
    open().prune(&at_once()).unwrap();
    backup(&open(), &noise(3, 2)).unwrap();
    assert!(restore(&open(), &id).unwrap() == kept);
    // What it was about goes with a prune of its own.
    open().prune(&at_once()).unwrap();
    assert!(open().snapshot(&forgotten).is_err());
    assert!(check(&open(), false).unwrap().is_whole());
}

#[test]
fn prune_s_decision_that_is_damaged_is_made_again_once_it_is_removed_by_hand() {
    let (start, repo) = new_repo();
    let ((_, gone), (id, kept)) = one_of_two_is_forgotten(&repo);
    start.barrier().unwrap();
    let mut decided = 0;
    for at in 1.. {
        let storage = copy(&start);
        let dying = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Dead);
        let pruned = Repository::open(Arc::new(dying)).and_then(|repo| repo.prune(&at_once()));
        let decision = "gc/0.sweep";
        let pending = storage.len("gc/0.done").is_err();
        if let (Ok(mut bytes), true) = (storage.read(decision, u64::MAX), pending) {
            decided += 1;
            bytes[40] ^= 1;
            storage.damage(decision, bytes);
            let open = || Repository::open(Arc::new(storage.clone())).unwrap();
            for refused in [
                open().prune(&at_once()).map(drop),
                open().begin(&small_session()).map(drop),
            ] {
                assert!(matches!(refused, Err(RepoError::Corrupt { .. })), "{at}");
            }
            storage.remove(decision).unwrap();
            open().prune(&at_once()).unwrap();
            assert!(restore(&open(), &id).unwrap() == kept, "{at}");
            assert!(check(&open(), false).unwrap().is_whole(), "{at}");
            backup(&open(), &gone).unwrap();
        }
        if pruned.is_ok() {
            break;
        }
    }
    assert!(decided > 3, "{decided}");
}

/// A life that leaves files of every kind; returns what is stored.
pub(crate) fn every_kind(
    new: (MemoryStorage, Arc<Repository>),
) -> (MemoryStorage, BTreeMap<SnapshotId, Vec<u8>>) {
    let (storage, repo) = new;
    let open = || open_any(Arc::new(storage.clone())).unwrap();
    let mut known = BTreeMap::new();
    for n in 0..3 {
        let disk = [noise(n, 3), noise(9, 2)].concat();
        known.insert(backup(&repo, &disk).unwrap().id, disk);
    }
    let (first, disk) = known.pop_first().unwrap();
    known.insert(backup(&repo, &disk).unwrap().id, disk);
    repo.forget(&[first], 1).unwrap();
    repo.prune(&at_once()).unwrap();
    // A damaged record that was marked and stored again, and one more forgotten snapshot.
    let pack = storage.list("packs/").unwrap().remove(0).name;
    let mut bytes = storage.read(&pack, u64::MAX).unwrap();
    bytes[100] ^= 1;
    storage.damage(&pack, bytes);
    assert!(check(&open(), true).unwrap().marked > 0);
    for disk in known.clone().into_values() {
        known.insert(backup(&open(), &disk).unwrap().id, disk);
    }
    let gone = backup(&open(), &noise(20, 3)).unwrap().id;
    open().forget(&[gone], 1).unwrap();
    // What dies leaves a beat and a checkpoint, and a prune that waits for somebody a list of what it condemned.
    crate::resume::interrupt(&open(), &noise(50, 60));
    let session = open().begin(&small_session()).unwrap();
    assert!(open().prune(&at_once()).unwrap().packs_waiting > 0);
    let left = copy(&storage);
    drop(session);
    crate::resume::interrupt(&open_any(Arc::new(left.clone())).unwrap(), &noise(60, 60));
    let kinds = [
        "bad", "ckpt", "forget", "gc", "idx", "keys", "meta", "packs", "sess", "snap", "verify",
    ];
    for kind in kinds {
        assert!(
            !left.list(&format!("{kind}/")).unwrap().is_empty(),
            "{kind}"
        );
    }
    (left, known)
}

#[test]
fn sector_of_any_file_that_cannot_be_read_loses_at_most_what_it_alone_holds() {
    let (whole, known) = every_kind(new_repo());
    for file in whole.list("").unwrap() {
        let what = &file.name;
        let kind = what.split('/').next().unwrap();
        let storage = copy(&whole);
        let bad: Arc<dyn Storage> = Arc::new(BadSector {
            inner: storage.clone(),
            file: what.clone(),
            range: 0..u64::MAX,
            errno: EIO,
            gone: AtomicBool::new(false),
        });
        let open = || Repository::open(Arc::clone(&bad)).unwrap_or_else(|e| panic!("{what}: {e}"));
        // Only the index knows where the good copy of a damaged record is.
        let alone = ["snap", "packs", "meta", "idx"].contains(&kind);
        let reads = |when: &str| {
            for (id, disk) in &known {
                match restore(&open(), id) {
                    Ok(read) => assert!(read == *disk, "{what}, {when}: wrong data"),
                    Err(error) => assert!(alone, "{what}, {when}: {error}"),
                }
            }
        };
        reads("at once");
        // It is damage, and not a storage that is gone.
        let found = check(&open(), false).unwrap_or_else(|e| panic!("{what}: {e}"));
        let named = found
            .files
            .iter()
            .chain(&found.parity)
            .any(|f| f.file == *what || f.file == format!("{kind}/"));
        let silent = ["ckpt", "sess", "reserve"].contains(&kind) || what.ends_with(".done");
        assert!(named || silent, "{what}: {found:?}");
        let disk = noise(70, 2);
        // What says which packs are going, or which records are damaged, stops those who have to know.
        let stored = backup(&open(), &disk);
        match &stored {
            Ok(_) => {}
            Err(RepoError::Io { .. } | RepoError::Corrupt { .. })
                if kind == "gc" || kind == "bad" => {}
            Err(error) => panic!("{what}: {error}"),
        }
        for _ in 0..2 {
            let pruned = open().prune(&at_once());
            if !["snap", "meta", "gc", "bad", "forget", "idx"].contains(&kind) {
                pruned.unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            reads("after a prune");
        }
        check(&open(), true).unwrap_or_else(|e| panic!("{what}: {e}"));
        for disk in known.values() {
            backup(&open(), disk).unwrap_or_else(|e| panic!("{what}, mended: {e}"));
        }
        reads("mended");
        if let Ok(stored) = stored {
            assert!(restore(&open(), &stored.id).unwrap() == disk, "{what}");
        }
        if kind != "snap" {
            for (id, disk) in &known {
                let read = restore(&open(), id).unwrap_or_else(|e| panic!("{what}, healed: {e}"));
                assert!(read == *disk, "{what}");
            }
        }
    }
}
