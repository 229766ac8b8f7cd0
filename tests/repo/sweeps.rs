//! A death or a full disk at every single call of forget, undelete and prune, and of what repairs it afterwards.

use std::sync::Arc;

use nbdbackup::repo::{MemoryStorage, RepoError, Repository, SnapshotId, Storage};

use crate::prune::{at_once, noise};
use crate::support::*;

/// A repository with something to remove, something to write anew, and something that stays.
struct Scene {
    storage: MemoryStorage,
    kept: (SnapshotId, Vec<u8>),
    gone: SnapshotId,
}

/// The disk that goes shares a chunk with the one that stays, in a pack that is written anew.
fn scene() -> Scene {
    let (storage, repo) = new_repo();
    let disk = noise(1, 5);
    let gone = backup(&repo, &disk).unwrap().id;
    let mut after = noise(2, 3);
    after[..CHUNK].copy_from_slice(&disk[CHUNK..2 * CHUNK]);
    let kept = backup(&repo, &after).unwrap().id;
    // Once, rather than in each run.
    repo.make_reserve().unwrap();
    storage.barrier().unwrap();
    Scene {
        storage,
        kept: (kept, after),
        gone,
    }
}

/// The same, forgotten.
fn forgotten() -> Scene {
    let scene = scene();
    open(&scene.storage).forget(&[scene.gone], 1).unwrap();
    scene
}

/// The same, with a generation that waits for nobody any more and has to rescue what a session used meanwhile.
fn pending() -> (Scene, (SnapshotId, Vec<u8>)) {
    let scene = forgotten();
    let repo = open(&scene.storage);
    let session = repo.begin(&small_session()).unwrap();
    let disk = noise(1, 4);
    let (root, new) = store_disk(&session, &disk).unwrap();
    assert_eq!(new, 0);
    let waits = open(&scene.storage).prune(&at_once()).unwrap();
    assert_eq!(waits.waiting_for, [session.id()]);
    let size = disk.len() as u64;
    let id = session.commit(draft("disk", size, root)).unwrap().id;
    (scene, (id, disk))
}

/// Dies at each call of `op`, loses power in each of a few ways, and checks; returns the numbers of calls and checks.
///
/// `check` learns whether `op` said that it had succeeded.
pub(crate) fn die_at_each(
    start: &MemoryStorage,
    op: impl Fn(Arc<dyn Storage>) -> Result<(), RepoError>,
    check: impl Fn(&MemoryStorage, bool, &str),
) -> (u64, usize) {
    let check = |storage: &MemoryStorage, result: &Result<(), RepoError>, what: &str| {
        check(storage, result.is_ok(), what);
    };
    fail_at_each(start, Fault::Dead, op, check)
}

/// The same with any fault, of which those that nobody dies of are looked at with all and nothing left; `check` learns
/// what `op` returned.
pub(crate) fn fail_at_each<T>(
    start: &MemoryStorage,
    fault: Fault,
    op: impl Fn(Arc<dyn Storage>) -> Result<T, RepoError>,
    check: impl Fn(&MemoryStorage, &Result<T, RepoError>, &str),
) -> (u64, usize) {
    let mut checks = 0;
    for at in 1.. {
        let storage = start.after_power_failure(|_| true);
        let faulty = FaultStorage::new(Arc::new(storage.clone()), at, fault);
        let result = op(Arc::new(faulty.clone()));
        let states = if fault == Fault::Dead { usize::MAX } else { 2 };
        for (left, storage) in power_failures(&storage, at).into_iter().take(states) {
            let what = format!("{fault:?} at call {at}, {left} left");
            check(&storage, &result, &what);
            checks += 1;
        }
        if faulty.calls() < at {
            assert!(result.is_ok(), "nothing failed");
            return (at - 1, checks);
        }
    }
    unreachable!()
}

fn prune(storage: Arc<dyn Storage>) -> Result<(), RepoError> {
    Repository::open(storage)?.prune(&at_once()).map(drop)
}

/// Checks that these are whole, that prunes end what was begun and leave nothing useless, and that a backup works.
pub(crate) fn assert_recovers(
    storage: &MemoryStorage,
    whole: &[&(SnapshotId, Vec<u8>)],
    what: &str,
) {
    let intact = |when: &str| {
        let repo = open(storage);
        let list = repo.snapshots().unwrap();
        assert!(list.unreadable.is_empty(), "{what}, {when}: {list:?}");
        for (id, disk) in whole {
            let listed = list.snapshots.iter().any(|s| s.id == *id);
            assert!(listed, "{what}, {when}: {id} is gone");
            let read = restore(&repo, id).unwrap_or_else(|e| panic!("{what}, {when}: {e}"));
            assert!(read == *disk, "{what}, {when}: {id} is wrong");
        }
    };
    intact("before");
    for _ in 0..2 {
        let pruned = open(storage).prune(&at_once());
        let pruned = pruned.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(pruned.waiting_for.is_empty(), "{what}: {pruned:?}");
    }
    intact("after");
    let rest = open(storage).prune(&at_once()).unwrap();
    assert_eq!((rest.unused_bytes, rest.removed_bytes), (0, 0), "{what}");
    assert!(storage.list("sess/").unwrap().is_empty(), "{what}");
    crate::parity::assert_no_orphans(storage, what);
    let decided = storage.list("gc/").unwrap();
    assert!(
        decided.iter().all(|f| f.name.ends_with(".done")),
        "{what}: {decided:?}"
    );
    let disk = noise(1, 3);
    let id = backup(&open(storage), &disk).unwrap().id;
    assert!(restore(&open(storage), &id).unwrap() == disk, "{what}");
}

#[test]
fn forget_that_dies_at_any_call_forgets_or_does_not() {
    let scene = scene();
    let op = |storage| Repository::open(storage)?.forget(&[scene.gone], 1);
    let (calls, checks) = die_at_each(&scene.storage, op, |storage, done, what| {
        let listed = open(storage).snapshots().unwrap();
        let is_forgotten = !listed.snapshots.iter().any(|s| s.id == scene.gone);
        assert!(is_forgotten || !done, "{what}: it was acknowledged");
        assert_eq!(is_forgotten, listed.forgotten.len() == 1, "{what}");
        assert_recovers(storage, &[&scene.kept], what);
    });
    println!("forget: {calls} calls, {checks} states");
    assert!(calls > 8, "{calls}");
}

#[test]
fn undelete_that_dies_at_any_call_has_it_back_or_not() {
    let scene = forgotten();
    let op = |storage| Repository::open(storage)?.unforget(&scene.gone).map(drop);
    let (calls, checks) = die_at_each(&scene.storage, op, |storage, done, what| {
        let listed = open(storage).snapshots().unwrap();
        let is_back = listed.snapshots.iter().any(|s| s.id == scene.gone);
        assert!(is_back || !done, "{what}: it was acknowledged");
        let gone = (scene.gone, noise(1, 5));
        match is_back {
            true => assert_recovers(storage, &[&scene.kept, &gone], what),
            false => assert_recovers(storage, &[&scene.kept], what),
        }
    });
    println!("undelete: {calls} calls, {checks} states");
    assert!(calls > 8, "{calls}");
}

#[test]
fn prune_that_dies_at_any_call_is_ended_by_the_next() {
    let scene = forgotten();
    let (calls, checks) = die_at_each(&scene.storage, prune, |storage, done, what| {
        let is_there = storage.len(&format!("snap/{}", scene.gone)).is_ok();
        assert!(!is_there || !done, "{what}: it was acknowledged");
        assert_recovers(storage, &[&scene.kept], what);
        assert!(storage.len(&format!("snap/{}", scene.gone)).is_err());
    });
    println!("prune: {calls} calls, {checks} states");
    assert!(calls > 60, "{calls}");
}

#[test]
fn prune_that_rescues_and_dies_at_any_call_rescues_again() {
    let (scene, late) = pending();
    let (calls, checks) = die_at_each(&scene.storage, prune, |storage, _, what| {
        assert_recovers(storage, &[&scene.kept, &late], what);
    });
    println!("prune with a rescue: {calls} calls, {checks} states");
    assert!(calls > 60, "{calls}");
}

/// The prune that ends what a dead one began dies too, anywhere.
#[test]
fn prune_that_dies_while_it_ends_another_dead_one_is_ended_by_the_next() {
    let (scene, late) = pending();
    let stride = if thorough() { 1 } else { 9 };
    let (mut states, mut at) = (0, 1);
    loop {
        let storage = scene.storage.after_power_failure(|_| true);
        let first = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Dead);
        let done = prune(Arc::new(first.clone())).is_ok();
        let mut then = 1 + at % stride;
        loop {
            let left =
                storage.after_power_failure(|name| !(name.len() as u64 + at).is_multiple_of(3));
            let second = FaultStorage::new(Arc::new(left.clone()), then, Fault::Dead);
            let ended = prune(Arc::new(second.clone())).is_ok();
            let mut rng = Rng(at << 20 | then);
            let left = left.after_power_failure(|_| rng.below(2) == 0);
            let what = format!("calls {at} and {then}");
            assert_recovers(&left, &[&scene.kept, &late], &what);
            states += 1;
            if ended {
                break;
            }
            then += stride;
        }
        if done && first.calls() < at {
            break;
        }
        at += if thorough() { 1 } else { 3 };
    }
    println!("prune after a dead prune: {states} states");
    assert!(states > 100, "{states}");
}

#[test]
fn failed_call_of_a_prune_is_said_and_the_next_one_ends_it() {
    let scene = forgotten();
    for at in 1.. {
        let storage = scene.storage.after_power_failure(|_| true);
        let faulty = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Once);
        let _ = prune(Arc::new(faulty.clone()));
        assert_recovers(&storage, &[&scene.kept], &format!("call {at}"));
        if faulty.calls() < at {
            println!("prune with one failed call: {} calls", at - 1);
            break;
        }
    }
}

/// However full the disk is, what is forgotten can be freed, and all is well once there is room again.
#[test]
fn disk_that_fills_up_at_any_byte_of_a_backup_is_freed_by_a_prune() {
    let scene = scene();
    let mut after = scene.kept.1.clone();
    after.extend_from_slice(&noise(7, 8));
    let start = bytes_in(&scene.storage);
    let step = if thorough() { 1 << 10 } else { 13 << 10 };
    let (mut points, mut no_room) = (0, 0);
    for room in (start..).step_by(step) {
        let storage = scene.storage.after_power_failure(|_| true);
        let open_full = |room| {
            let full = Arc::new(FullStorage(storage.clone(), room));
            Repository::open(full).unwrap()
        };
        let stored = backup(&open_full(room), &after);
        let mut whole = vec![&scene.kept];
        let added = stored.as_ref().ok().map(|s| (s.id, after.clone()));
        whole.extend(&added);
        match &stored {
            Ok(_) | Err(RepoError::NoRoom { .. }) => {}
            Err(other) => panic!("{room}: {other}"),
        }
        // Others filled the rest.
        let room = room.min(bytes_in(&storage));
        open_full(room).forget(&[scene.gone], 1).unwrap();
        assert!(bytes_in(&storage) <= room);
        // And once more.
        let room = bytes_in(&storage);
        let before = packs_in(&storage);
        let pruned = open_full(room).prune(&at_once()).unwrap();
        assert!(packs_in(&storage) < before, "{room}: {pruned:?}");
        no_room += usize::from(pruned.no_room);
        assert!(bytes_in(&storage) <= room);
        assert_recovers(&storage, &whole, &format!("room for {room}"));
        let reserve = storage.len("reserve").unwrap();
        assert_eq!(reserve, 4 << 20, "it is set aside again");
        points += 1;
        if stored.is_ok() {
            break;
        }
    }
    println!("full disk: {points} fillings, {no_room} of them without room to write packs anew");
    assert!(points > 20 && no_room > 20, "{points}, {no_room}");
}

fn packs_in(storage: &MemoryStorage) -> u64 {
    let packs = storage.list("packs/").unwrap();
    packs.iter().map(|f| f.len).sum()
}
