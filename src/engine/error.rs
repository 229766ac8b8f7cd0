//! What can go wrong in a backup or a restore, sorted by what the caller can do about it.

use std::error::Error;
use std::io;

use super::chain::Reason;
use crate::range::ByteRange;
use crate::repo::RepoError;

/// A cause from another layer.
pub type Cause = Box<dyn Error + Send + Sync>;

/// A failure of the engine; the text says what happened to which disk and range, the source says why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// What was asked for contradicts itself or what was found.
    #[error("{0}")]
    Usage(String),
    /// The source cannot be reached, refuses, or lacks the export.
    #[error("source {name} cannot be opened")]
    SourceUnreachable {
        /// The source as the user gave it.
        name: String,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The source failed while it was read.
    #[error("disk {disk}: {doing} {range} failed; nothing was committed")]
    SourceFailed {
        /// The disk's name.
        disk: String,
        /// `reading` or `asking the extents of`.
        doing: &'static str,
        /// Where.
        range: ByteRange,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// An incremental was not possible and a full read was not allowed instead.
    #[error("disk {disk}: an incremental is not possible ({reason}: {}); nothing was written", reason.explain())]
    IncrementalImpossible {
        /// The disk's name.
        disk: String,
        /// Why.
        reason: Reason,
    },
    /// No snapshot is addressed by the words given.
    #[error("no snapshot matches `{0}`")]
    SnapshotNotFound(String),
    /// Several snapshots are addressed by the words given.
    #[error("`{selector}` matches {count} snapshots; give more characters of the id")]
    SnapshotAmbiguous {
        /// The words given.
        selector: String,
        /// How many match.
        count: usize,
    },
    /// The snapshot lacks the disk, or has several and none was named.
    #[error("snapshot {snapshot} {problem}; it holds: {}", disks.join(", "))]
    DiskUnknown {
        /// The snapshot's id.
        snapshot: String,
        /// What is wrong.
        problem: String,
        /// The disks that it holds.
        disks: Vec<String>,
    },
    /// A range of a snapshot's disk cannot be read back.
    #[error("snapshot {snapshot}, disk {disk}: {range} cannot be restored")]
    Unrestorable {
        /// The snapshot's id.
        snapshot: String,
        /// The disk's name.
        disk: String,
        /// Where.
        range: ByteRange,
        /// Why.
        #[source]
        cause: Box<RepoError>,
    },
    /// The repository failed or is damaged.
    #[error("repository {path}")]
    Repository {
        /// Where it lies.
        path: String,
        /// Why.
        #[source]
        cause: Box<RepoError>,
    },
    /// A disk would be left without any snapshot.
    #[error("{name}'s disk {disk} would lose its last snapshot; nothing was forgotten")]
    LastSnapshot {
        /// The machine's name.
        name: String,
        /// The disk's name.
        disk: String,
    },
    /// The restore's target exists and may not be overwritten.
    #[error("target {0} exists; --force overwrites it")]
    TargetExists(String),
    /// The restore's target failed.
    #[error("target {path}: {doing} failed")]
    Target {
        /// The target as the user gave it.
        path: String,
        /// What was being done.
        doing: String,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The embedded server could not serve.
    #[error("cannot serve at {address}")]
    Serve {
        /// The address as the user gave it.
        address: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// What clients write over a disk cannot be kept, or is not this disk's.
    #[error("overlay of disk {disk} in {folder}")]
    Overlay {
        /// The folder as the user gave it.
        folder: String,
        /// The disk's name.
        disk: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The caller stopped the run.
    #[error("stopped")]
    Stopped,
    /// A worker thread ended without a result: a fault of this program.
    #[error("a worker ended without a result; this is a fault of nbdbackup")]
    WorkerLost,
}

/// Makes an error for a repository at `path` out of its cause.
pub(crate) fn repository(path: &str) -> impl Fn(RepoError) -> EngineError + Clone + Send + use<> {
    let path = path.to_owned();
    move |cause| EngineError::Repository {
        path: path.clone(),
        cause: Box::new(cause),
    }
}

/// Joins an error and its causes with `: `, once each.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// What a repository's failure means for its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoFault {
    /// There is no repository.
    NotFound,
    /// There is something already where a repository was to be made.
    Exists,
    /// Stored bytes are wrong or gone.
    Damaged,
    /// The repository was written by a newer program.
    Unsupported,
    /// There is no room left.
    NoRoom,
    /// The storage refused a call.
    Refused,
    /// The repository is encrypted, and neither a password nor a key file was given.
    SecretNeeded,
    /// The password or key file is not one of the repository's.
    WrongSecret,
    /// It was taken for encrypted, and is not.
    NotEncrypted,
    /// A brake holds: more would be removed than was allowed.
    Brake,
    /// The key slot is not there, or must stay.
    KeySlot,
    /// Another process stands in the way.
    Busy,
    /// What was to be stored changed in this machine's memory.
    Memory,
    /// The repository was used wrongly: a fault of this program.
    Internal,
}

impl EngineError {
    /// What the repository's part in this failure means; `None` when it has none.
    pub fn repo_fault(&self) -> Option<RepoFault> {
        let (Self::Repository { cause, .. } | Self::Unrestorable { cause, .. }) = self else {
            return None;
        };
        Some(match **cause {
            RepoError::NotARepository { .. } => RepoFault::NotFound,
            RepoError::NotEmpty { .. } => RepoFault::Exists,
            RepoError::Corrupt { .. }
            | RepoError::Missing { .. }
            | RepoError::Lost { .. }
            | RepoError::RecordsMissing { .. }
            | RepoError::SnapshotsUnreadable { .. } => RepoFault::Damaged,
            RepoError::TooMuch { .. } => RepoFault::Brake,
            RepoError::Unsupported { .. } => RepoFault::Unsupported,
            RepoError::NoRoom { .. } => RepoFault::NoRoom,
            RepoError::Io { .. } => RepoFault::Refused,
            RepoError::AlreadyExists { .. }
            | RepoError::Fenced { .. }
            | RepoError::ParentGone { .. }
            | RepoError::TooLate { .. }
            | RepoError::PruneBusy
            | RepoError::NoSuchSnapshot { .. } => RepoFault::Busy,
            RepoError::Misread { .. } => RepoFault::Memory,
            RepoError::SecretNeeded => RepoFault::SecretNeeded,
            RepoError::WrongSecret { .. } => RepoFault::WrongSecret,
            RepoError::NotEncrypted => RepoFault::NotEncrypted,
            RepoError::NoSuchKey { .. } | RepoError::LastKey { .. } => RepoFault::KeySlot,
            RepoError::SessionFinished { .. } | RepoError::Misuse { .. } => RepoFault::Internal,
        })
    }
}
