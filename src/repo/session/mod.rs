//! A session: chunks and maps are stored, then one snapshot is committed, or nothing of it is ever seen.

mod known;
mod spill;
mod store;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bad::BadRecords;
use super::checkpoint::{self, CheckpointOptions};
use super::chunk::ChunkEntry;
use super::compress::Compression;
use super::error::RepoError;
use super::format::FileKind;
use super::format::generation::PackName;
use super::format::pack::PackKind;
use super::format::snapshot::file_name;
use super::ids::{NodeId, PackId, SnapshotId};
use super::map::MapWriter;
use super::pack::Packs;
use super::presence::Presence;
use super::repository::Repository;
use super::snapshot::{MapRoot, Snapshot, SnapshotDraft};
use super::storage::StorageError;
use crate::meter::Meter;
use spill::Checkpointing;

/// How a session stores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// How chunks are compressed; `None` for the repository's own way.
    pub compression: Option<Compression>,
    /// Whether each record is decoded again and checked against its identifier before it is stored.
    pub verify_writes: bool,
    /// The length in bytes at which a pack is closed.
    pub pack_bytes: u64,
    /// How many stored chunks and nodes are remembered before they are written to the index.
    pub remembered: usize,
    /// The snapshots whose maps may be given as parents: none of what they need is removed while the session is open.
    pub parents: Vec<SnapshotId>,
    /// Keeps what a long session has stored for the run that comes after it, should it never commit; `None` keeps nothing.
    pub checkpoints: Option<CheckpointOptions>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            compression: None,
            verify_writes: true,
            pack_bytes: 64 << 20,
            // What a hash table of 256 Ki buckets holds.
            remembered: (256 << 10) / 8 * 7,
            parents: Vec::new(),
            checkpoints: None,
        }
    }
}

/// A session; used from many threads at once.
///
/// The first failure to write ends it for good: each later call returns that failure. Dropping it without a commit
/// leaves nothing that anybody sees, at most packs that a prune removes and checkpoints that keep some of them for a while.
#[derive(Debug)]
pub struct Session {
    core: Arc<SessionCore>,
}

/// What storing a chunk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// What the map needs to know; `None` when all bytes are zero.
    pub entry: Option<ChunkEntry>,
    /// Whether the repository did not have it.
    pub is_new: bool,
    /// The bytes that it took in a pack; 0 when it is not new.
    pub stored_bytes: u64,
}

/// Where the time of storing goes, over all threads.
#[derive(Debug, Default)]
pub struct StoreMeters {
    /// Looking for zeros and hashing.
    pub hash: Meter,
    /// Asking whether the repository has a chunk.
    pub lookup: Meter,
    /// Compressing what is new.
    pub compress: Meter,
    /// Undoing that, and hashing again, to prove what will be stored.
    pub verify: Meter,
    /// Encrypting, and putting into a pack, with the wait for the disk when packs are written more slowly than filled.
    pub pack: Meter,
    /// Making all durable and publishing the snapshot.
    pub commit: Meter,
}

impl Session {
    pub(crate) fn begin(
        repo: Arc<Repository>,
        options: &SessionOptions,
    ) -> Result<Self, RepoError> {
        let id = SnapshotId::random()?;
        let presence = Presence::announce(&repo, id, options.parents.clone())?;
        let begun = Self::begin_announced(&repo, id, options);
        let (packs, parent_roots, bad, interrupted) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                presence.withdraw(&repo);
                return Err(error);
            }
        };
        let core = SessionCore {
            compression: options.compression.unwrap_or(repo.compression()),
            verify_writes: options.verify_writes,
            remembered: options.remembered.max(1),
            id,
            repo,
            packs,
            presence,
            parent_roots,
            bad,
            packs_there: Mutex::default(),
            roots: Mutex::default(),
            spilling: Mutex::default(),
            checkpoints: options.checkpoints.clone().map(Checkpointing::new),
            interrupted,
            resumed_bytes: AtomicU64::new(0),
            meters: StoreMeters::default(),
            finished: AtomicBool::new(false),
        };
        Ok(Self {
            core: Arc::new(core),
        })
    }

    fn begin_announced(
        repo: &Arc<Repository>,
        id: SnapshotId,
        options: &SessionOptions,
    ) -> Result<(Packs, HashSet<Root>, BadRecords, HashSet<PackName>), RepoError> {
        let mut roots = HashSet::new();
        for parent in &options.parents {
            let snapshot = repo.snapshot(parent).map_err(|e| match e {
                RepoError::NoSuchSnapshot { id } => RepoError::ParentGone { id },
                other => other,
            })?;
            roots.extend(snapshot.draft.disks.iter().filter_map(|d| root_of(&d.root)));
        }
        let interrupted = match &options.checkpoints {
            Some(options) => checkpoint::interrupted(repo, options)?,
            None => HashSet::new(),
        };
        repo.index().refresh()?;
        let bad = BadRecords::load(repo)?;
        let packs = Packs::new(repo, id, options.pack_bytes)?;
        Ok((packs, roots, bad, interrupted))
    }

    /// The identifier that the snapshot will have.
    pub fn id(&self) -> SnapshotId {
        self.core.id
    }

    /// Stores a chunk, unless it is all zeros or the repository has it.
    ///
    /// The bytes are a whole chunk, or the last one of a disk.
    pub fn store_chunk(&self, plain: &[u8]) -> Result<StoredChunk, RepoError> {
        self.core.store_chunk(plain)
    }

    /// The bytes of the chunks that were found among what interrupted runs of the same disks had stored.
    pub fn resumed_bytes(&self) -> u64 {
        self.core.resumed_bytes.load(Ordering::Relaxed)
    }

    /// Where the time of storing went so far.
    pub fn meters(&self) -> &StoreMeters {
        &self.core.meters
    }

    /// Begins the map of a disk of `disk_bytes` bytes; the parent is a map of one of the session's parents, and its disk's
    /// size in bytes.
    pub fn map_writer(
        &self,
        parent: Option<(&MapRoot, u64)>,
        disk_bytes: u64,
    ) -> Result<MapWriter, RepoError> {
        self.core.check()?;
        let foreign = parent
            .and_then(|(root, _)| root_of(root))
            .is_some_and(|root| !self.core.parent_roots.contains(&root));
        if foreign {
            return Err(RepoError::misuse(
                "the parent's map is of none of the snapshots that the session was begun with",
            ));
        }
        MapWriter::new(
            Arc::clone(&self.core),
            Arc::clone(self.core.repo.nodes()),
            parent,
            self.core.repo.chunk_size(),
            disk_bytes,
        )
    }

    /// Makes all durable, then publishes the snapshot; returns when that is durable too.
    pub fn commit(&self, draft: SnapshotDraft) -> Result<Snapshot, RepoError> {
        self.core.meters.commit.time(|| self.core.commit(draft))
    }
}

/// What the handles of a session share.
#[derive(Debug)]
pub(crate) struct SessionCore {
    repo: Arc<Repository>,
    id: SnapshotId,
    compression: Compression,
    verify_writes: bool,
    packs: Packs,
    presence: Presence,
    /// The maps of the parents.
    parent_roots: HashSet<Root>,
    /// What a check found damaged: nothing may refer to it.
    bad: BadRecords,
    /// How many records are remembered before they go to the index.
    remembered: usize,
    /// The lengths of packs that the index named; `None` for those that are not there.
    packs_there: Mutex<HashMap<(PackKind, PackId), Option<u64>>>,
    /// The roots that this session's map writers finished.
    roots: Mutex<HashSet<Root>>,
    spilling: Mutex<()>,
    checkpoints: Option<Checkpointing>,
    /// The packs of earlier runs that never committed.
    interrupted: HashSet<PackName>,
    resumed_bytes: AtomicU64,
    meters: StoreMeters,
    finished: AtomicBool,
}

impl SessionCore {
    /// Remembers a root whose nodes this session made durable or found durable.
    pub(crate) fn add_root(&self, root: &MapRoot) {
        if let Some(root) = root_of(root) {
            lock(&self.roots).insert(root);
        }
    }

    fn commit(&self, mut draft: SnapshotDraft) -> Result<Snapshot, RepoError> {
        self.check()?;
        for disk in &mut draft.disks {
            let chunks = self.repo.chunk_size().count(disk.size_bytes);
            disk.root.check(chunks)?;
            let ours = root_of(&disk.root).is_none_or(|root| lock(&self.roots).contains(&root));
            if !ours {
                return Err(RepoError::misuse(format!(
                    "the map of disk {} was not written in this session",
                    disk.disk
                )));
            }
        }
        if self.finished.swap(true, Ordering::SeqCst) {
            return Err(RepoError::SessionFinished { id: self.id });
        }
        let snapshot = self.publish(draft).map_err(|e| self.packs.fail(e))?;
        self.presence.withdraw(&self.repo);
        if let Some(checkpoints) = &self.checkpoints {
            let count = checkpoints.count.load(Ordering::SeqCst);
            checkpoint::remove_own(&self.repo, &self.id, count);
        }
        // The snapshot is durable: whatever happens to the index now is no failure of the backup.
        if let Err(error) = self.repo.merge_index(MERGE_AT_COMMIT) {
            tracing::warn!(%error, "index segments were not merged");
        }
        Ok(snapshot)
    }

    fn publish(&self, draft: SnapshotDraft) -> Result<Snapshot, RepoError> {
        let storage = self.repo.storage();
        let packs = self.packs.finish()?;
        storage.barrier()?;
        let (entries, table) = self.packs.published();
        if !entries.is_empty() {
            self.repo.index().add(entries, &table)?;
            storage.barrier()?;
        }
        let snapshot = Snapshot {
            id: self.id,
            repo: self.repo.uuid(),
            draft,
            packs,
        };
        let mut file = storage.create()?;
        file.write(&snapshot.encode(FileKind::Snapshot, self.repo.keys())?)?;
        match file.publish(&file_name(&self.id)) {
            Ok(()) => {}
            Err(StorageError::Exists { .. }) => return Err(RepoError::Fenced { id: self.id }),
            Err(other) => return Err(other.into()),
        }
        storage.barrier()?;
        Ok(snapshot)
    }

    fn check(&self) -> Result<(), RepoError> {
        self.packs.check()?;
        self.presence
            .beat_if_due(&self.repo)
            .map_err(|e| self.packs.fail(e))?;
        match self.finished.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(RepoError::SessionFinished { id: self.id }),
        }
    }
}

impl Drop for SessionCore {
    fn drop(&mut self) {
        self.presence.withdraw(&self.repo);
    }
}

/// What tells a map from all others.
type Root = (u8, NodeId);

fn root_of(root: &MapRoot) -> Option<Root> {
    root.id().map(|id| (root.level, id))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The most entries of a merge of index segments that a commit does by itself; takes a second or two.
const MERGE_AT_COMMIT: u64 = 4 << 20;
