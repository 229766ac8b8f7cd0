//! A death, a failed call, a failed sync or a full disk at every single call of a copy, in the place it goes to and in the one
//! it comes from.

use std::sync::Arc;

use nbdbackup::engine::{Catalog, CopyOutcome, CopyRequest, EngineError, Event, Observer};
use nbdbackup::repo::{MemoryStorage, RepoError, SnapshotId, Storage};

use crate::prune::{at_once, noise};
use crate::support::*;
use crate::sweeps::fail_at_each;

struct Silent;

impl Observer for Silent {
    fn observe(&self, _: Event) {}
}

fn copy_all(from: Arc<dyn Storage>, to: Arc<dyn Storage>) -> Result<CopyOutcome, RepoError> {
    let from = Catalog::over(open_any(from)?, "from");
    let to = Catalog::over(open_any(to)?, "to");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let copied = runtime.block_on(from.copy_to(&to, CopyRequest::default(), Arc::new(Silent)));
    copied.map_err(|error| match error {
        EngineError::Repository { cause, .. } | EngineError::Unrestorable { cause, .. } => *cause,
        other => panic!("{other}"),
    })
}

struct Scene {
    from: MemoryStorage,
    to: MemoryStorage,
    /// The disks, the first of which was copied before.
    disks: Vec<Vec<u8>>,
    /// What was stored in the target by itself.
    own: (SnapshotId, Vec<u8>),
}

fn scene() -> Scene {
    let ((from, source), (to, target)) = (without_parity(), new_encrypted_repo());
    let own = noise(40, 2);
    let own = (backup(&target, &own).unwrap().id, own);
    let mut disks = vec![noise(1, 5)];
    backup(&source, &disks[0]).unwrap();
    copy_all(Arc::new(from.clone()), Arc::new(to.clone())).unwrap();
    let mut changed = disks[0].clone();
    changed[CHUNK..2 * CHUNK].copy_from_slice(&noise(2, 1));
    disks.push(changed);
    disks.push([noise(3, 2), noise(40, 1)].concat());
    for disk in &disks[1..] {
        backup(&source, disk).unwrap();
    }
    open(&to).make_reserve().unwrap();
    for storage in [&from, &to] {
        storage.barrier().unwrap();
    }
    Scene {
        from,
        to,
        disks,
        own,
    }
}

impl Scene {
    /// Each copy that is listed is one of the disks, and whole; returns of how many.
    fn listed(&self, to: &MemoryStorage, what: &str) -> usize {
        let repo = open(to);
        let list = repo.snapshots().unwrap();
        assert!(list.unreadable.is_empty(), "{what}: {:?}", list.unreadable);
        let own = restore(&repo, &self.own.0).unwrap();
        assert!(own == self.own.1, "{what}: what was there before is wrong");
        let mut origins = std::collections::HashSet::new();
        for copy in list.snapshots.iter().filter(|s| s.id != self.own.0) {
            let origin = copy.draft.origin.expect("a copy");
            // One that could not be read when it was looked for is copied once more.
            let again = !origins.insert(origin.snapshot);
            assert!(!again || what.contains("Once"), "{what}: copied twice");
            let disk = restore(&open(&self.from), &origin.snapshot).unwrap();
            let read = restore(&repo, &copy.id).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(
                read == disk && self.disks.contains(&disk),
                "{what}: wrong data"
            );
        }
        origins.len()
    }

    /// A later run copies the rest, and prunes find nothing that is of no use in the end.
    fn recovers(&self, to: &MemoryStorage, what: &str) {
        self.listed(to, what);
        let done = copy_all(Arc::new(self.from.clone()), Arc::new(to.clone()));
        done.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(self.listed(to, what), self.disks.len(), "{what}");
        for _ in 0..2 {
            open(to).prune(&at_once()).unwrap();
        }
        assert_eq!(self.listed(to, what), self.disks.len(), "{what}, pruned");
        let rest = open(to).prune(&at_once()).unwrap();
        assert_eq!((rest.unused_bytes, rest.removed_bytes), (0, 0), "{what}");
        assert!(to.list("sess/").unwrap().is_empty(), "{what}");
    }
}

#[test]
fn copy_whose_target_dies_fails_or_fills_up_at_any_call_is_gone_on_with() {
    let scene = scene();
    for fault in [Fault::Dead, Fault::Once, Fault::NoSync, Fault::NoRoom] {
        let op = |to| copy_all(Arc::new(scene.from.clone()), to);
        let (calls, states) = fail_at_each(&scene.to, fault, op, |to, result, what| {
            match result {
                Ok(done) => {
                    let listed = scene.listed(to, what);
                    assert_eq!(listed, scene.disks.len(), "{what}: it was acknowledged");
                    assert!(done.failed.is_empty(), "{what}: {:?}", done.failed);
                }
                Err(RepoError::NoRoom { .. }) => assert_eq!(fault, Fault::NoRoom, "{what}"),
                Err(RepoError::Io { .. }) => {}
                Err(other) => panic!("{what}: {other:?}"),
            }
            scene.recovers(to, what);
        });
        println!("copy, target {fault:?}: {calls} calls, {states} states");
        assert!(calls > 60, "{calls}");
    }
}

#[test]
fn copy_whose_source_fails_at_any_call_is_gone_on_with_and_leaves_the_source_whole() {
    let scene = scene();
    for fault in [Fault::Dead, Fault::Once] {
        for at in 1.. {
            let (from, to) = (copy(&scene.from), copy(&scene.to));
            let failing = FaultStorage::new(Arc::new(from.clone()), at, fault);
            let done = copy_all(Arc::new(failing.clone()), Arc::new(to.clone()));
            let what = format!("{fault:?} at call {at} of the source");
            if let Ok(done) = &done {
                let told = done.copied.len() + done.skipped.len() + done.failed.len();
                assert_eq!(told, scene.disks.len(), "{what}: {done:?}");
            }
            scene.recovers(&to, &what);
            open(&from).prune(&at_once()).unwrap();
            assert!(from.list("sess/").unwrap().is_empty(), "{what}");
            if failing.calls() < at {
                println!("copy, source {fault:?}: {} calls", at - 1);
                break;
            }
        }
    }
}
