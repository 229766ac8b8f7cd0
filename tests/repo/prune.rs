//! Forgetting and pruning: what goes, what stays, what is had back, and what a full disk or damage changes.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use nbdbackup::repo::{
    LocalStorage, MemoryStorage, PruneOptions, Pruned, RepoError, Repository, SnapshotId, Storage,
};

use crate::support::*;

/// Removes all at once that may go.
pub(crate) fn at_once() -> PruneOptions {
    PruneOptions {
        max_unused_percent: 0.0,
        max_freed_percent: 100,
        undelete_window: Duration::ZERO,
        now_unix_nanos: 10,
        pack_bytes: 200 << 10,
        ..PruneOptions::default()
    }
}

fn names(storage: &dyn Storage) -> HashSet<String> {
    let files = storage.list("").unwrap().into_iter();
    files.map(|f| f.name).collect()
}

fn packs(storage: &dyn Storage) -> usize {
    storage.list("packs/").unwrap().len() + storage.list("meta/").unwrap().len()
}

pub(crate) fn noise(seed: u64, chunks: usize) -> Vec<u8> {
    let mut disk = vec![0; chunks * CHUNK];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut disk);
    disk
}

#[test]
fn only_what_no_snapshot_needs_goes() {
    for encrypted in [false, true] {
        let (storage, repo) = match encrypted {
            true => new_encrypted_repo(),
            false => new_repo(),
        };
        let disks: Vec<_> = (0..3).map(|n| noise(n, 20)).collect();
        let mut shared = disks[0].clone();
        shared[10 * CHUNK..].copy_from_slice(&noise(9, 10));
        let ids: Vec<_> = [&disks[0], &disks[1], &shared, &disks[2]]
            .iter()
            .map(|disk| backup(&repo, disk).unwrap().id)
            .collect();
        let none = repo.prune(&at_once()).unwrap();
        assert_eq!((none.packs_removed, none.packs_repacked), (0, 0));
        repo.forget(&ids[..2], 1).unwrap();
        let listed = repo.snapshots().unwrap();
        let left: Vec<_> = listed.snapshots.iter().map(|s| s.id).collect();
        assert_eq!(left.len(), 2);
        assert!(left.contains(&ids[2]) && left.contains(&ids[3]));
        assert_eq!(listed.forgotten.len(), 2);
        let before: u64 = repo_bytes(&storage);
        let pruned = repo.prune(&at_once()).unwrap();
        assert_eq!(pruned.snapshots_removed, 2);
        assert!(pruned.packs_removed > 0 && pruned.waiting_for.is_empty());
        assert_eq!(
            before - pruned.removed_bytes + pruned.written_bytes,
            repo_bytes(&storage)
        );
        // Half of the first disk lives on in the third, and all of the second went: 20 of 50 chunks stay beside 20.
        let chunks = 40 * (CHUNK as u64 + 200);
        assert!(repo_bytes(&storage) < chunks, "{}", repo_bytes(&storage));
        let fresh = open_any(Arc::new(storage.clone())).unwrap();
        for (id, disk) in [(ids[2], &shared), (ids[3], &disks[2])] {
            assert!(restore(&repo, &id).unwrap() == *disk, "by an old reader");
            assert!(restore(&fresh, &id).unwrap() == *disk, "by a new reader");
        }
        // Nothing is left to do, and nothing is stored again.
        let again = repo.prune(&at_once()).unwrap();
        assert_eq!((again.packs_removed, again.packs_repacked), (0, 0));
        assert_eq!(backup(&fresh, &shared).unwrap().packs, []);
    }
}

#[test]
fn files_that_are_listed_twice_make_no_difference_to_a_prune() {
    let (storage, repo) = new_repo();
    let gone = backup(&repo, &noise(1, 20)).unwrap().id;
    let disk = [noise(1, 10), noise(2, 10)].concat();
    let kept = backup(&repo, &disk).unwrap().id;
    repo.forget(&[gone], 1).unwrap();
    let twice = copy(&storage);
    let doubled = FaultStorage::new(Arc::new(twice.clone()), 0, Fault::ListedTwice);
    let pruned = open_any(Arc::new(doubled)).unwrap().prune(&at_once());
    let once = repo.prune(&at_once()).unwrap();
    assert_eq!(numbers(&pruned.unwrap()), numbers(&once));
    assert!(once.packs_removed > 0 && once.packs_repacked > 0);
    for storage in [&storage, &twice] {
        assert!(restore(&open(storage), &kept).unwrap() == disk);
    }
}

fn repo_bytes(storage: &dyn Storage) -> u64 {
    let packs = storage.list("packs/").unwrap();
    let meta = storage.list("meta/").unwrap();
    packs.iter().chain(&meta).map(|f| f.len).sum()
}

#[test]
fn dry_run_says_exactly_what_is_done_and_does_nothing() {
    for max_unused_percent in [0.0, 5.0, 30.0, 100.0] {
        let (storage, repo) = new_repo();
        let mut rng = Rng(41);
        let mut disk = some_disk(&mut rng, 60 * CHUNK);
        let mut ids = Vec::new();
        for _ in 0..6 {
            ids.push(backup(&repo, &disk).unwrap().id);
            for _ in 0..12 {
                let at = rng.below(60) as usize * CHUNK;
                rng.fill(&mut disk[at..at + CHUNK]);
            }
        }
        repo.forget(&ids[..4], 1).unwrap();
        let options = PruneOptions {
            max_unused_percent,
            ..at_once()
        };
        let before = names(&storage);
        let dry = PruneOptions {
            dry_run: true,
            ..options
        };
        let said = repo.prune(&dry).unwrap();
        assert_eq!(names(&storage), before, "a dry run wrote something");
        let done = repo.prune(&options).unwrap();
        assert_eq!(numbers(&said), numbers(&done), "{max_unused_percent} %");
        let rest = repo.prune(&dry).unwrap();
        assert_eq!(rest.removed_bytes, 0, "{max_unused_percent} %");
        let limit = rest.total_bytes as f64 * max_unused_percent / 100.0;
        assert!(rest.unused_bytes as f64 <= limit, "{rest:?}");
        for id in &ids[4..] {
            restore(&repo, id).unwrap();
        }
    }
}

fn numbers(p: &Pruned) -> [u64; 8] {
    [
        p.snapshots_removed,
        p.packs_removed,
        p.removed_bytes,
        p.packs_repacked,
        p.written_bytes,
        p.packs_waiting,
        p.total_bytes,
        p.unused_bytes,
    ]
}

#[test]
fn forgotten_snapshot_can_be_had_back_until_its_time_is_over() {
    let (storage, repo) = new_repo();
    let disk = noise(1, 4);
    let id = backup(&repo, &disk).unwrap().id;
    let day = 24 * 3600 * 1_000_000_000;
    repo.forget(&[id], day).unwrap();
    assert!(repo.snapshots().unwrap().snapshots.is_empty());
    let week = |now| PruneOptions {
        now_unix_nanos: now,
        undelete_window: Duration::from_secs(7 * 24 * 3600),
        ..at_once()
    };
    for now in [0, day, 8 * day - 1] {
        assert_eq!(repo.prune(&week(now)).unwrap().snapshots_removed, 0);
    }
    repo.unforget(&id).unwrap();
    repo.unforget(&id).unwrap();
    assert_eq!(repo.snapshots().unwrap().snapshots[0].id, id);
    assert!(restore(&repo, &id).unwrap() == disk);
    repo.forget(&[id], day).unwrap();
    assert_eq!(repo.prune(&week(8 * day)).unwrap().snapshots_removed, 1);
    assert!(matches!(
        repo.unforget(&id),
        Err(RepoError::NoSuchSnapshot { .. })
    ));
    assert_eq!(packs(&storage), 0);
}

#[test]
fn mark_of_a_removed_snapshot_stays_while_an_older_one_of_its_disk_is_there() {
    let (storage, repo) = new_repo();
    let ids: Vec<SnapshotId> = (1..=3)
        .map(|generation| {
            let session = repo.begin(&small_session()).unwrap();
            let (root, _) = store_disk(&session, &noise(generation, 1)).unwrap();
            let mut draft = draft("vda", CHUNK as u64, root);
            draft.disks[0].generation = generation;
            let bitmap = if generation < 3 { "bm0" } else { "bm1" };
            draft.disks[0].bitmap_used = Some(bitmap.to_owned());
            session.commit(draft).unwrap().id
        })
        .collect();
    repo.forget(&[ids[1]], 1).unwrap();
    assert_eq!(repo.prune(&at_once()).unwrap().snapshots_removed, 1);
    let left = repo.snapshots().unwrap().forgotten;
    assert_eq!(left[0].snapshot.id, ids[1]);
    assert_eq!(left[0].snapshot.draft.disks[0].generation, 2);
    assert_eq!(
        left[0].snapshot.draft.disks[0].bitmap_used.as_deref(),
        Some("bm0")
    );
    repo.forget(&[ids[0]], 1).unwrap();
    repo.prune(&at_once()).unwrap();
    assert!(repo.snapshots().unwrap().forgotten.is_empty());
    assert!(storage.list("forget/").unwrap().is_empty());
}

#[test]
fn mark_goes_once_a_later_snapshot_says_all_that_it_says() {
    let (storage, repo) = new_repo();
    let store = |generation: u64, bitmap: Option<&str>| {
        let session = repo.begin(&small_session()).unwrap();
        let (root, _) = store_disk(&session, &noise(generation, 1)).unwrap();
        let mut draft = draft("vda", CHUNK as u64, root);
        draft.disks[0].generation = generation;
        draft.disks[0].bitmap_used = bitmap.map(str::to_owned);
        session.commit(draft).unwrap().id
    };
    let marks = || storage.list("forget/").unwrap().len();
    store(1, Some("bm0"));
    let gone: Vec<SnapshotId> = (2..=9).map(|g| store(g, Some("bm0"))).collect();
    repo.forget(&gone, 1).unwrap();
    repo.prune(&at_once()).unwrap();
    assert_eq!(marks(), 1, "only the last says which comes next");
    store(10, Some("bm1"));
    repo.prune(&at_once()).unwrap();
    assert_eq!(marks(), 1, "nothing later speaks of bm0");
    store(11, Some("bm0"));
    repo.prune(&at_once()).unwrap();
    assert_eq!(marks(), 0);
}

#[test]
fn what_killed_sessions_left_goes_and_open_ones_are_waited_for() {
    let (storage, repo) = new_repo();
    let kept = noise(1, 3);
    let id = backup(&repo, &kept).unwrap().id;
    let gone = noise(2, 8);
    let old = backup(&repo, &gone).unwrap().id;
    // A session that is killed leaves packs and its announcement.
    let dead = repo.begin(&small_session()).unwrap();
    store_disk(&dead, &noise(3, 10)).unwrap();
    let left = storage.after_power_failure(|_| true);
    drop(dead);
    let repo = Repository::open(Arc::new(left.clone())).unwrap();
    assert!(!left.list("sess/").unwrap().is_empty());
    // One that is open refers to what is forgotten.
    let open = repo.begin(&small_session()).unwrap();
    let (root, new) = store_disk(&open, &gone).unwrap();
    assert_eq!(new, 0);
    repo.forget(&[old], 1).unwrap();
    let waits = repo.prune(&at_once()).unwrap();
    assert_eq!(waits.waiting_for, [open.id()]);
    assert_eq!((waits.snapshots_removed, waits.packs_removed), (0, 0));
    assert!(waits.packs_waiting > 0 && waits.waiting_bytes > 0);
    // A later session sees that the packs are condemned and stores the chunks again.
    let late = repo.begin(&small_session()).unwrap();
    let (_, new) = store_disk(&late, &gone).unwrap();
    assert_eq!(new, 8);
    drop(late);
    let waits = repo.prune(&at_once()).unwrap();
    assert_eq!(waits.waiting_for, [open.id()]);
    let rescued = open.commit(draft("d", gone.len() as u64, root)).unwrap().id;
    let pruned = repo.prune(&at_once()).unwrap();
    assert_eq!((pruned.snapshots_removed, pruned.waiting_for.len()), (1, 0));
    repo.prune(&at_once()).unwrap();
    let repo = Repository::open(Arc::new(left.clone())).unwrap();
    assert!(restore(&repo, &rescued).unwrap() == gone);
    assert!(restore(&repo, &id).unwrap() == kept);
    assert!(left.list("sess/").unwrap().is_empty());
    let chunks = 11 * (CHUNK as u64 + 200);
    assert!(repo_bytes(&left) < chunks, "{}", repo_bytes(&left));
}

#[test]
fn parent_that_is_going_is_refused_and_one_in_use_stays() {
    let (storage, repo) = new_repo();
    let mut disk = noise(1, 6);
    let parent = backup(&repo, &disk).unwrap();
    repo.forget(&[parent.id], 1).unwrap();
    // In use: it is not dropped.
    let session = repo.begin(&session_after(&[parent.id])).unwrap();
    let size = disk.len() as u64;
    let before = &parent.draft.disks[0].root;
    let mut map = session.map_writer(Some((before, size)), size).unwrap();
    map.keep(0..6).unwrap();
    let root = map.finish().unwrap();
    assert_eq!(repo.prune(&at_once()).unwrap().snapshots_removed, 0);
    let child = session.commit(draft("disk", size, root)).unwrap();
    assert_eq!(repo.prune(&at_once()).unwrap().snapshots_removed, 1);
    assert!(restore(&repo, &child.id).unwrap() == disk);
    // Gone.
    let refused = repo.begin(&session_after(&[parent.id]));
    assert!(matches!(refused, Err(RepoError::ParentGone { .. })));
    assert!(storage.list("sess/").unwrap().is_empty(), "announced still");
    disk[..CHUNK].copy_from_slice(&noise(7, 1));
    backup_after(&repo, &child, &disk, 1..6).unwrap();
    // A map of another snapshot than the announced ones is no parent.
    let session = repo.begin(&small_session()).unwrap();
    let foreign = session.map_writer(Some((&child.draft.disks[0].root, size)), size);
    assert!(matches!(foreign, Err(RepoError::Misuse { .. })));
}

#[test]
fn prune_refuses_to_lose_what_it_does_not_understand() {
    let (storage, repo) = new_repo();
    let id = backup(&repo, &noise(1, 4)).unwrap().id;
    let other = backup(&repo, &noise(2, 4)).unwrap().id;
    repo.forget(&[other], 1).unwrap();
    let copy = || storage.after_power_failure(|_| true);
    let refuses = |storage: &MemoryStorage, what: &str| {
        let before = names(storage);
        let repo = Repository::open(Arc::new(storage.clone())).unwrap();
        let refused = repo.prune(&at_once());
        assert!(refused.is_err(), "{what}: {refused:?}");
        assert_eq!(names(storage), before, "{what}");
        refused.unwrap_err()
    };
    let damaged = copy();
    damaged.damage(&format!("snap/{id}"), vec![1; 100]);
    let error = refuses(&damaged, "damaged snapshot");
    assert!(matches!(error, RepoError::SnapshotsUnreadable { .. }));
    let damaged = copy();
    for file in damaged.list("idx/").unwrap() {
        damaged.remove(&file.name).unwrap();
    }
    let error = refuses(&damaged, "lost index");
    assert!(matches!(error, RepoError::RecordsMissing { .. }));
    Repository::open(Arc::new(damaged.clone()))
        .unwrap()
        .rebuild_index()
        .unwrap();
    let repo = Repository::open(Arc::new(damaged.clone())).unwrap();
    assert_eq!(repo.prune(&at_once()).unwrap().snapshots_removed, 1);
    assert!(restore(&repo, &id).is_ok());
    let brake = PruneOptions {
        max_freed_percent: 30,
        ..at_once()
    };
    let repo = Repository::open(Arc::new(copy())).unwrap();
    let held = repo.prune(&brake);
    assert!(matches!(held, Err(RepoError::TooMuch { .. })), "{held:?}");
}

#[test]
fn brake_holds_for_what_forgotten_snapshots_held_and_for_nothing_else() {
    let brake = PruneOptions {
        max_freed_percent: PruneOptions::default().max_freed_percent,
        ..at_once()
    };
    let (storage, repo) = new_repo();
    let kept = backup(&repo, &noise(1, 16)).unwrap().id;
    let small = backup(&repo, &noise(2, 4)).unwrap().id;
    let large = backup(&repo, &noise(3, 12)).unwrap().id;
    // More than half of all is of a session that was killed: nobody ever named it.
    let dead = repo.begin(&small_session()).unwrap();
    store_disk(&dead, &noise(4, 40)).unwrap();
    drop(dead);
    repo.forget(&[small], 1).unwrap();
    let pruned = repo.prune(&brake).unwrap();
    assert_eq!(pruned.snapshots_removed, 1);
    assert!(repo_bytes(&storage) < 30 * CHUNK as u64);
    // Twelve chunks of 28 are too much, whether packs of theirs go whole or in part.
    repo.forget(&[large], 1).unwrap();
    for _ in 0..2 {
        let before = names(&storage);
        let held = repo.prune(&brake);
        let Err(RepoError::TooMuch { freed_bytes, .. }) = held else {
            panic!("{held:?}");
        };
        assert!(freed_bytes > 12 * CHUNK as u64, "{freed_bytes}");
        assert_eq!(names(&storage), before);
    }
    assert_eq!(repo.prune(&at_once()).unwrap().snapshots_removed, 1);
    assert!(restore(&repo, &kept).unwrap() == noise(1, 16));
}

#[test]
fn damaged_pack_is_not_written_anew_and_stays_readable_elsewhere() {
    let (storage, repo) = new_repo();
    let mut disk = noise(1, 8);
    let old = backup(&repo, &disk).unwrap().id;
    disk[CHUNK..2 * CHUNK].copy_from_slice(&noise(5, 1));
    disk[5 * CHUNK..6 * CHUNK].copy_from_slice(&noise(6, 1));
    let new = backup(&repo, &disk).unwrap().id;
    repo.forget(&[old], 1).unwrap();
    // The first record of each pack is damaged.
    let bad: Vec<String> = storage
        .list("packs/")
        .unwrap()
        .into_iter()
        .map(|f| f.name)
        .collect();
    let mut first = None;
    for name in &bad {
        let mut bytes = storage.read(name, u64::MAX).unwrap();
        bytes[72] ^= 1;
        if first.is_none() {
            first = Some(name.clone());
            storage.damage(name, bytes);
        }
    }
    let fresh = Repository::open(Arc::new(storage.clone())).unwrap();
    let was = restore(&fresh, &new).is_ok();
    let pruned = fresh.prune(&at_once()).unwrap();
    assert_eq!(restore(&fresh, &new).is_ok(), was);
    assert!(pruned.damaged.len() <= 1);
    if !was && !pruned.damaged.is_empty() {
        let name = first.unwrap();
        assert!(storage.len(&name).is_ok(), "{name} went with its records");
    }
}

#[test]
fn full_disk_is_freed_by_removing_alone() {
    let (storage, repo) = new_repo();
    let mut disk = noise(1, 30);
    let old = backup(&repo, &disk).unwrap().id;
    disk[..5 * CHUNK].copy_from_slice(&noise(2, 5));
    disk[20 * CHUNK..].copy_from_slice(&noise(3, 10));
    let new = backup(&repo, &disk).unwrap().id;
    repo.make_reserve().unwrap();
    assert!(storage.len("reserve").unwrap() > 1 << 20);
    repo.forget(&[old], 1).unwrap();
    let before = repo_bytes(&storage);
    // Not a byte is left but what was set aside.
    let full = Arc::new(FullStorage(storage.clone(), bytes_in(&storage)));
    let repo = Repository::open(full).unwrap();
    let pruned = repo.prune(&at_once()).unwrap();
    assert!(pruned.no_room && pruned.packs_repacked == 0, "{pruned:?}");
    assert!(pruned.packs_removed > 0);
    assert!(storage.len("reserve").is_err());
    assert!(repo_bytes(&storage) < before);
    assert!(restore(&repo, &new).unwrap() == disk);
    // With room again the rest goes too, and room is set aside again.
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    let pruned = repo.prune(&at_once()).unwrap();
    assert!(pruned.packs_repacked > 0 && !pruned.no_room);
    assert!(storage.len("reserve").is_ok());
    assert!(restore(&repo, &new).unwrap() == disk);
}

#[test]
fn index_stays_small_and_superseded_segments_go() {
    let (storage, repo) = new_repo();
    let mut ids = Vec::new();
    for seed in 0..40 {
        ids.push(backup(&repo, &noise(seed, 1)).unwrap().id);
    }
    let before = storage.list("idx/").unwrap().len();
    assert!(before > 40);
    repo.forget(&ids[..38], 1).unwrap();
    repo.prune(&at_once()).unwrap();
    let segments = storage.list("idx/").unwrap();
    assert!(segments.len() < 12, "{segments:?}");
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    for seed in 38..40 {
        assert_eq!(backup(&repo, &noise(seed, 1)).unwrap().packs, []);
        assert!(restore(&repo, &ids[seed as usize]).is_ok());
    }
    repo.forget(&ids[38..], 1).unwrap();
    let rest: Vec<_> = repo
        .snapshots()
        .unwrap()
        .snapshots
        .iter()
        .map(|s| s.id)
        .collect();
    repo.forget(&rest, 1).unwrap();
    repo.prune(&at_once()).unwrap();
    assert_eq!(packs(&storage), 0);
    assert!(!backup(&repo, &noise(1, 1)).unwrap().packs.is_empty());
}

#[test]
fn prune_works_in_a_local_directory_with_a_session_of_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let storage = || Arc::new(LocalStorage::open(dir.path()).unwrap());
    let repo = Repository::init(storage(), &options()).unwrap();
    let disk = noise(1, 5);
    let old = backup(&repo, &disk).unwrap().id;
    let other = Repository::open(storage()).unwrap();
    let session = other.begin(&small_session()).unwrap();
    let (root, _) = store_disk(&session, &disk).unwrap();
    repo.forget(&[old], 1).unwrap();
    assert_eq!(repo.prune(&at_once()).unwrap().waiting_for, [session.id()]);
    let id = session
        .commit(draft("d", disk.len() as u64, root))
        .unwrap()
        .id;
    assert_eq!(repo.prune(&at_once()).unwrap().snapshots_removed, 1);
    assert!(restore(&repo, &id).unwrap() == disk);
    // A killed one: its file is there and nobody holds it.
    let killed = other.begin(&small_session()).unwrap();
    store_disk(&killed, &noise(2, 5)).unwrap();
    let id = killed.id();
    let beats: Vec<_> = storage().list("sess/").unwrap();
    let kept: Vec<_> = beats
        .iter()
        .map(|f| (f.name.clone(), storage().read(&f.name, 1 << 20).unwrap()))
        .collect();
    drop(killed);
    for (name, bytes) in kept {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    std::fs::write(dir.path().join(format!("tmp/session-{id}")), b"").unwrap();
    let pruned = repo.prune(&at_once()).unwrap();
    assert!(pruned.waiting_for.is_empty());
    assert!(storage().list("sess/").unwrap().is_empty());
    assert!(storage().len(&format!("snap/{id}")).is_ok(), "not fenced");
    assert!(repo.snapshots().unwrap().unreadable.is_empty());
}
