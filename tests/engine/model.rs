//! Random writes, discards, growth, shrinking and backups against a disk that is a `Vec<u8>`: each snapshot is restored
//! and compared.

use nbdbackup::engine::{BackupKind, EngineError, Reason};

use crate::rig::{Rig, Rng};

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

/// Runs one sequence; the caller clears its bitmap after each good incremental, or lets it grow, as the seed says.
async fn sequence(seed: u64) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let rig = Rig::new(&mut rng).await;
    let clears = rng.below(2) == 0;
    let mut reference: Vec<(String, Vec<u8>)> = Vec::new();
    rig.disk.add_bitmap("bm0");
    let first = rig
        .backup(None, &["bm0"])
        .await
        .map_err(|e| e.to_string())?;
    reference.push((first.snapshot, rig.disk.bytes()));
    let mut parent_size = rig.disk.bytes().len();

    for _ in 0..2 + rng.below(4) {
        for _ in 0..rng.below(8) {
            // A disk that shrank and grew again in one period looks, over NBD, like one whose bitmap is right:
            // docs/operations.md tells its owner to run a full then.
            let can_grow = rig.disk.bytes().len() >= parent_size;
            rig.change(&mut rng, can_grow);
        }
        let size = rig.disk.bytes().len();
        let plain_full = rng.below(6) == 0;
        let outcome = match plain_full {
            // A full that knows nothing of the bitmap must not disturb the chain.
            true => rig.backup(None, &[]).await,
            false => rig.backup(Some("bm0"), &[]).await,
        };
        let outcome = outcome.map_err(|e| e.to_string())?;
        let disk = &outcome.disks[0];
        let expected = match (plain_full, size < parent_size) {
            (true, _) => (BackupKind::Full, None),
            (false, true) => (BackupKind::Full, Some(Reason::DiskShrunk)),
            (false, false) => (BackupKind::Incremental, None),
        };
        if (disk.kind, disk.reason) != expected {
            return Err(format!(
                "{:?} {:?} and not {expected:?}",
                disk.kind, disk.reason
            ));
        }
        if !plain_full {
            parent_size = size;
            if clears {
                rig.disk.clear_bitmap("bm0");
            }
        }
        reference.push((outcome.snapshot, rig.disk.bytes()));
    }
    for (snapshot, bytes) in &reference {
        let restored = rig
            .restore(snapshot)
            .await
            .map_err(|e: EngineError| e.to_string())?;
        if restored != *bytes {
            let at = restored.iter().zip(bytes).position(|(a, b)| a != b);
            return Err(format!(
                "snapshot {snapshot} differs at {at:?} ({} and {} bytes)",
                restored.len(),
                bytes.len()
            ));
        }
    }
    Ok(())
}
