//! What is told before a session ends: packs in the index, and checkpoints that an interrupted run continues from.

use std::sync::TryLockError;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::checkpoint::CheckpointOptions;
use super::super::error::RepoError;
use super::super::pack::Packs;
use super::{MERGE_AT_COMMIT, SessionCore, lock};

impl SessionCore {
    /// Puts what is published into the index and writes a checkpoint that says so; others go on storing meanwhile.
    pub(super) fn checkpoint(&self, checkpoints: &Checkpointing) -> Result<(), RepoError> {
        let _one = match self.spilling.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        if !checkpoints.is_due(&self.packs) {
            return Ok(());
        }
        let known = checkpoints.packs.load(Ordering::SeqCst);
        let written_bytes = self.packs.written_bytes();
        let packs = self.packs.written_after(known as usize);
        // All that is in these packs is among the entries, or was spilled before.
        let (entries, table) = self.packs.published();
        self.repo.storage().barrier()?;
        if !entries.is_empty() {
            self.repo.index().add(entries.clone(), &table)?;
            self.packs.forget(&entries);
        }
        let number = checkpoints.count.fetch_add(1, Ordering::SeqCst);
        let all = known + packs.len() as u64;
        checkpoints
            .options
            .write(&self.repo, self.id, number, packs)?;
        checkpoints.packs.store(all, Ordering::SeqCst);
        checkpoints.bytes.store(written_bytes, Ordering::SeqCst);
        // A long session has many, and each look-up asks all that are not merged.
        if let Err(error) = self.repo.merge_index(MERGE_AT_COMMIT) {
            tracing::warn!(%error, "index segments were not merged");
        }
        Ok(())
    }

    /// Writes what is remembered of published packs to the index; others that come to the limit wait meanwhile.
    pub(super) fn spill(&self) -> Result<(), RepoError> {
        let _one = lock(&self.spilling);
        if self.packs.remembered() < self.remembered {
            return Ok(());
        }
        let (mut entries, mut table) = self.packs.published();
        if entries.len() < self.remembered / 4 {
            self.packs.drain()?;
            (entries, table) = self.packs.published();
        }
        if entries.len() < self.remembered / 4 {
            // All is in packs that are open; only with limits far below the usual ones.
            self.packs.finish()?;
            (entries, table) = self.packs.published();
        }
        // No segment may name a pack that a power failure could take away.
        self.repo.storage().barrier()?;
        self.repo.index().add(entries.clone(), &table)?;
        self.packs.forget(&entries);
        Ok(())
    }
}

/// How far a session's checkpoints have come.
#[derive(Debug)]
pub(super) struct Checkpointing {
    options: CheckpointOptions,
    /// How many were written or begun.
    pub(super) count: AtomicU64,
    /// How many packs they name.
    packs: AtomicU64,
    /// The bytes that were published when the last one was begun.
    bytes: AtomicU64,
}

impl Checkpointing {
    pub(super) fn new(options: CheckpointOptions) -> Self {
        Self {
            options,
            count: AtomicU64::new(0),
            packs: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn is_due(&self, packs: &Packs) -> bool {
        let done = self.bytes.load(Ordering::SeqCst);
        packs.written_bytes() >= done.saturating_add(self.options.interval_bytes.max(1))
    }
}
