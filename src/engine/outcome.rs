//! What each command of the engine found or did, as plain values.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::chain::Reason;
use super::event::Warning;
use super::stages::StageTime;
use crate::range::ByteRange;
use crate::repo::BackupKind;

/// What a backup did with one disk; all sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskBackup {
    /// The disk's name.
    pub disk: String,
    /// How it was read.
    pub kind: BackupKind,
    /// Why an incremental read it in full.
    pub reason: Option<Reason>,
    /// The snapshot from which clean chunks were inherited.
    pub parent: Option<String>,
    /// The bitmap that was followed or started.
    pub bitmap: Option<String>,
    /// The disk's size.
    pub size_bytes: u64,
    /// The bytes that the bitmap called dirty; none without a bitmap.
    pub dirty_bytes: Option<u64>,
    /// The bytes that were read from the source.
    pub read_bytes: u64,
    /// The bytes that were stored as zeros without being read.
    pub zero_bytes: u64,
    /// What the bitmap called clean and was read all the same, because the parent has lost it.
    pub reread_bytes: u64,
    /// The disk's chunks.
    pub chunks_total: u64,
    /// Those of them that the repository did not have.
    pub chunks_new: u64,
    /// The bytes of the new chunks, before compression.
    pub new_bytes: u64,
    /// The bytes of the new chunks in packs.
    pub stored_bytes: u64,
}

/// A finished backup.
#[derive(Clone, Debug, PartialEq)]
pub struct BackupOutcome {
    /// `full` or `incremental`, as it was asked for.
    pub asked: BackupKind,
    /// Where the repository lies.
    pub repository: String,
    /// The new snapshot's id.
    pub snapshot: String,
    /// The machine's name.
    pub name: String,
    /// When the run started.
    pub started: DateTime<Utc>,
    /// When the snapshot was durable.
    pub finished: DateTime<Utc>,
    /// How long it took, by a clock that does not jump.
    pub duration: Duration,
    /// Each disk.
    pub disks: Vec<DiskBackup>,
    /// The bytes of chunks that interrupted runs of the same disks had stored, so that this one did not.
    pub resumed_bytes: u64,
    /// Where the time went.
    pub stages: Vec<StageTime>,
    /// What a person should know.
    pub warnings: Vec<Warning>,
}

/// A finished restore to a target.
#[derive(Clone, Debug, PartialEq)]
pub struct RestoreOutcome {
    /// Where the repository lies.
    pub repository: String,
    /// The snapshot's id.
    pub snapshot: String,
    /// The disk's name.
    pub disk: String,
    /// The target as the user gave it.
    pub target: String,
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// The bytes of data that were written.
    pub written_bytes: u64,
    /// The bytes that are holes or were made zeros.
    pub zero_bytes: u64,
    /// How long it took.
    pub duration: Duration,
}

/// A served snapshot, once the server has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct ServeOutcome {
    /// Where the repository lies.
    pub repository: String,
    /// The snapshot's id.
    pub snapshot: String,
    /// The address as the user gave it.
    pub address: String,
    /// How long it served.
    pub duration: Duration,
}

/// A new repository.
#[derive(Clone, Debug, PartialEq)]
pub struct InitOutcome {
    /// Where it lies.
    pub repository: String,
    /// Its id.
    pub uuid: String,
    /// The size of its chunks in bytes.
    pub chunk_bytes: u64,
    /// Its compression.
    pub compression: String,
    /// Its encryption.
    pub encryption: &'static str,
    /// How many lost parts of each pack its parity makes up for.
    pub parity: u8,
}

/// The difference of one disk between two snapshots.
#[derive(Clone, Debug, PartialEq)]
pub struct DiffOutcome {
    /// The one snapshot's id.
    pub a: String,
    /// The other's.
    pub b: String,
    /// The disk's name.
    pub disk: String,
    /// The disk's size in each, in bytes.
    pub sizes_bytes: [u64; 2],
    /// The ranges of chunks that differ, in order; what only the larger disk has counts as different.
    pub ranges: Vec<ByteRange>,
}
