//! The deduplicated chunk repository: formats at rest, storage, packs, index, maps and snapshots.
//!
//! A [`Repository`] lies in a [`Storage`]. A [`Session`] stores chunks and writes a map for each disk, then commits
//! one [`Snapshot`], the only thing that makes the rest count. `docs/format.md` says what the files hold.

mod bad;
mod cache;
mod check;
mod checkpoint;
mod chunk;
mod cipher;
mod compress;
mod error;
#[cfg(test)]
mod flip;
mod forget;
mod format;
mod generations;
mod ids;
mod index;
mod key_slots;
mod keys;
mod map;
mod pack;
mod parity;
mod presence;
mod prune;
mod read;
mod rebuild;
mod record;
mod repair;
mod repository;
mod reserve;
mod scrub;
mod secret;
mod session;
mod snapshot;
mod storage;
#[cfg(test)]
mod synthetic;
mod verified;
mod verify;

pub use check::{CheckOptions, Checked, DamagedFile, DamagedRange};
pub use checkpoint::CheckpointOptions;
pub use chunk::{ChunkEntry, ChunkSize, Place, RecordFlags, is_zero};
pub use cipher::Encryption;
pub use compress::{Compression, NotACompression};
pub use error::RepoError;
pub use forget::Forgotten;
pub use format::fuzz;
pub use format::pack::PackKind;
pub use ids::{ChunkId, NodeId, NotAnId, PackId, RepoUuid, SegmentId, SnapshotId};
pub use key_slots::SlotInfo;
pub use map::{Compared, Comparison, MapReader, MapWriter, Run, Runs, changed};
pub use parity::Parity;
pub use presence::Pin;
pub use prune::{PruneOptions, Pruned};
pub use read::{Batcher, ChunkRead, ReadBatch, ReadBuffers};
pub use rebuild::Rebuilt;
pub use repair::Repaired;
pub use repository::{InitOptions, Repository, SnapshotList};
pub use scrub::scrub;
pub use secret::{PasswordCost, Secret, SecretKind};
pub use session::{Session, SessionOptions, StoreMeters, StoredChunk};
pub use snapshot::{
    BackupKind, DiskRecord, DiskStats, MapRoot, Origin, Snapshot, SnapshotDraft, WrittenPack,
};
pub use storage::{FileInfo, Hold, LocalStorage, MemoryStorage, NewFile, Storage, StorageError};
