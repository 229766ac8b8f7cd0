//! Random writes, discards, growth, shrinking, backups, forgets, undeletes, prunes, checks and copies against a disk that is
//! a `Vec<u8>`: each snapshot is restored and compared.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nbdbackup::engine::{BackupKind, Catalog, Reason};
use nbdbackup::repo::{CheckOptions, PruneOptions, SnapshotId};

use crate::rig::{Rig, Rng, new_repository};

/// How many sequences run; each is told by its seed alone.
const SEQUENCES: u64 = 1_000;

#[test]
fn each_snapshot_of_random_sequences_restores_identically() {
    let threads = 4;
    let failed: Vec<String> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    (thread..SEQUENCES)
                        .step_by(threads as usize)
                        .filter_map(|seed| {
                            runtime
                                .block_on(sequence(seed))
                                .err()
                                .map(|e| format!("seed {seed}: {e}"))
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        runs.into_iter()
            .flat_map(|run| run.join().unwrap())
            .collect()
    });
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// What is known of one snapshot.
struct Known {
    id: SnapshotId,
    disk: Vec<u8>,
    forgotten: bool,
}

/// The machine, its repository, and what both should hold.
struct Model {
    rig: Rig,
    rng: Rng,
    /// Whether the caller clears its bitmap after each good incremental, or lets it grow.
    clears: bool,
    known: Vec<Known>,
    /// The snapshot that the bitmap follows, and how long the disk was then.
    parent: (SnapshotId, usize),
    /// Where snapshots are copied to, and what is there.
    copy: Catalog,
    copied: BTreeMap<String, Vec<u8>>,
}

async fn sequence(seed: u64) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let rig = Rig::new(&mut rng).await;
    let clears = rng.below(2) == 0;
    rig.disk.add_bitmap("bm0");
    let first = rig.backup(None, &["bm0"]).await;
    let id = id_of(&first.map_err(text)?.snapshot);
    let disk = rig.disk.bytes();
    let mut model = Model {
        parent: (id, disk.len()),
        known: vec![Known {
            id,
            disk,
            forgotten: false,
        }],
        copy: new_repository().1,
        copied: BTreeMap::new(),
        rig,
        rng,
        clears,
    };
    for _ in 0..2 + model.rng.below(4) {
        for _ in 0..model.rng.below(8) {
            // A disk that shrank and grew again in one period looks, over NBD, like one whose bitmap is right:
            // docs/operations.md tells its owner to run a full then.
            let can_grow = model.rig.disk.bytes().len() >= model.parent.1;
            model.rig.change(&mut model.rng, can_grow);
        }
        model.back_up().await?;
        for _ in 0..model.rng.below(3) {
            model.maintain().await?;
        }
        model.compare().await?;
    }
    Ok(())
}

impl Model {
    async fn back_up(&mut self) -> Result<(), String> {
        let size = self.rig.disk.bytes().len();
        let plain_full = self.rng.below(6) == 0;
        let outcome = match plain_full {
            // A full that knows nothing of the bitmap must not disturb the chain.
            true => self.rig.backup(None, &[]).await,
            false => self.rig.backup(Some("bm0"), &[]).await,
        };
        let outcome = outcome.map_err(text)?;
        let disk = &outcome.disks[0];
        let follows = |k: &Known| k.id == self.parent.0 && !k.forgotten;
        let parent_is_there = self.known.iter().any(follows);
        let expected = match (plain_full, parent_is_there, size < self.parent.1) {
            (true, _, _) => (BackupKind::Full, None),
            (false, false, _) => (BackupKind::Full, Some(Reason::ParentMissing)),
            (false, true, true) => (BackupKind::Full, Some(Reason::DiskShrunk)),
            (false, true, false) => (BackupKind::Incremental, None),
        };
        // A prune that removed the parent takes its mark too, once no older snapshot is there to be followed by mistake.
        let no_parent = !plain_full && disk.reason == Some(Reason::NoParent);
        let unmarked = no_parent && !self.known.iter().any(|k| k.id == self.parent.0);
        if (disk.kind, disk.reason) != expected && !unmarked {
            return Err(format!(
                "{:?} {:?} and not {expected:?}",
                disk.kind, disk.reason
            ));
        }
        let id = id_of(&outcome.snapshot);
        if !plain_full {
            self.parent = (id, size);
            if self.clears {
                self.rig.disk.clear_bitmap("bm0");
            }
        }
        self.known.push(Known {
            id,
            disk: self.rig.disk.bytes(),
            forgotten: false,
        });
        Ok(())
    }

    /// Does one of what is done to a repository beside backups.
    async fn maintain(&mut self) -> Result<(), String> {
        let repository = Arc::clone(self.rig.catalog.repository());
        let one = self.rng.below(self.known.len() as u64) as usize;
        match self.rng.below(8) {
            0..=2 => {
                let one = &mut self.known[one];
                repository.forget(&[one.id], 1).map_err(text)?;
                one.forgotten = true;
            }
            3 => {
                let one = &mut self.known[one];
                repository.unforget(&one.id).map_err(text)?;
                one.forgotten = false;
            }
            4 | 5 => {
                let options = PruneOptions {
                    max_unused_percent: self.rng.below(20) as f64,
                    max_freed_percent: 100,
                    undelete_window: Duration::ZERO,
                    now_unix_nanos: 10,
                    pack_bytes: 200 << 10,
                    ..PruneOptions::default()
                };
                let pruned = repository.prune(&options).map_err(text)?;
                let gone = self.known.iter().filter(|k| k.forgotten).count() as u64;
                if pruned.snapshots_removed != gone {
                    return Err(format!("{pruned:?}, and not {gone} removed"));
                }
                self.known.retain(|k| !k.forgotten);
            }
            6 => {
                let options = CheckOptions {
                    read_data_percent: Some(100.0),
                    repair: true,
                    now_unix_nanos: 5,
                };
                let found = repository.check(&options, &|_, _| {}).map_err(text)?;
                if !found.is_whole() || found.files_total > 0 || !found.strangers.is_empty() {
                    return Err(format!("{found:?}"));
                }
            }
            _ => {
                let done = self.rig.copy_to(&self.copy).await.map_err(text)?;
                if !done.failed.is_empty() {
                    return Err(format!("{done:?}"));
                }
                for copied in done.copied {
                    let from = id_of(&copied.from);
                    let known = self.known.iter().find(|k| k.id == from);
                    let known = known.filter(|k| !k.forgotten).ok_or("a ghost was copied")?;
                    self.copied.insert(copied.to, known.disk.clone());
                }
            }
        }
        Ok(())
    }

    /// Restores and compares all that is stored, in both repositories.
    async fn compare(&self) -> Result<(), String> {
        let list = self.rig.catalog.repository().snapshots().map_err(text)?;
        let there = self.known.iter().filter(|k| !k.forgotten);
        let there: Vec<_> = there.map(|k| (k.id, &k.disk)).collect();
        if list.snapshots.len() != there.len() || !list.unreadable.is_empty() {
            return Err(format!(
                "{} snapshots, and not {}",
                list.snapshots.len(),
                there.len()
            ));
        }
        for (id, disk) in there {
            let restored = self.rig.restore(&id.to_string()).await.map_err(text)?;
            same(&id.to_string(), &restored, disk)?;
        }
        for (id, disk) in &self.copied {
            let restored = self.rig.restore_from(&self.copy, id).await.map_err(text)?;
            same(id, &restored, disk)?;
        }
        Ok(())
    }
}

fn same(snapshot: &str, restored: &[u8], disk: &[u8]) -> Result<(), String> {
    if restored == disk {
        return Ok(());
    }
    let at = restored.iter().zip(disk).position(|(a, b)| a != b);
    let (restored, disk) = (restored.len(), disk.len());
    Err(format!(
        "snapshot {snapshot} differs at {at:?} ({restored} and {disk} bytes)"
    ))
}

fn id_of(text: &str) -> SnapshotId {
    text.parse().unwrap()
}

fn text(error: impl std::error::Error) -> String {
    nbdbackup::engine::chain(&error)
}
