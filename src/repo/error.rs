//! What can go wrong in a repository, sorted by what its callers can do about it.

use std::io;
use std::sync::Arc;

use super::ids::SnapshotId;

/// A failure of the repository; cloneable, since a failed session repeats its first failure on each later call.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RepoError {
    /// A stored file's bytes are not what was written.
    #[error("{file} is damaged at {at:#x}: {what}")]
    Corrupt {
        /// The file's name in the repository.
        file: String,
        /// The offset in the file.
        at: u64,
        /// What does not hold.
        what: String,
    },
    /// A stored file is of a format that this program does not know.
    #[error("{file} needs a newer program: {what}")]
    Unsupported {
        /// The file's name in the repository.
        file: String,
        /// The version or the feature that is not known.
        what: String,
    },
    /// What was to be stored was not what it should be, twice; nothing of it was stored.
    #[error(
        "{what} was not what it should be when it was proved before being stored: memory or processor of this machine cannot be trusted"
    )]
    Misread {
        /// The kind of thing, with its identifier.
        what: String,
    },
    /// A file is not there.
    #[error("{file} is missing from the repository")]
    Missing {
        /// The file's name in the repository.
        file: String,
    },
    /// A chunk or a map node is not where its reference says, and the index knows no other copy.
    #[error("{what} {id} cannot be found: {tried} places were tried")]
    Lost {
        /// `chunk` or `map node`.
        what: &'static str,
        /// Its identifier.
        id: String,
        /// How many places were tried.
        tried: usize,
        /// What reading the last of these places said.
        #[source]
        last: Option<Box<RepoError>>,
    },
    /// The place holds no repository.
    #[error("{place} holds no repository")]
    NotARepository {
        /// The place.
        place: String,
    },
    /// A repository cannot be made where something is already.
    #[error("{place} is not empty: it holds {file}")]
    NotEmpty {
        /// The place.
        place: String,
        /// A file that is there.
        file: String,
    },
    /// A file that should be new is there already.
    #[error("{file} exists already")]
    AlreadyExists {
        /// The file's name in the repository.
        file: String,
    },
    /// The storage has no room left.
    #[error("no room left to write {file}")]
    NoRoom {
        /// The file that was being written.
        file: String,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The system refused a call.
    #[error("cannot {what}")]
    Io {
        /// What was tried, with the file's name.
        what: String,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// There is no snapshot of this id.
    #[error("there is no snapshot {id}")]
    NoSuchSnapshot {
        /// The id that was asked for.
        id: SnapshotId,
    },
    /// A snapshot that a session was to inherit from is gone, or going.
    #[error("snapshot {id}, the parent of this backup, was forgotten and is being removed")]
    ParentGone {
        /// The parent.
        id: SnapshotId,
    },
    /// Forgetting a snapshot cannot be undone any more.
    #[error("snapshot {id} is being removed already")]
    TooLate {
        /// The snapshot.
        id: SnapshotId,
    },
    /// A prune would lose what snapshots need; nothing was removed.
    #[error(
        "{records} records that snapshots need are in no pack, such as {example}...; nothing was removed"
    )]
    RecordsMissing {
        /// How many.
        records: u64,
        /// The start of the identifier of one of them.
        example: String,
    },
    /// Some snapshots cannot be read, so that a prune cannot know what they need.
    #[error(
        "{count} snapshots cannot be read, and what they need is not known; nothing was removed"
    )]
    SnapshotsUnreadable {
        /// How many.
        count: usize,
        /// What is wrong with one of them.
        #[source]
        one: Box<RepoError>,
    },
    /// A prune would free more than was allowed.
    #[error(
        "this would free {freed_bytes} of {total_bytes} bytes, more than {most_percent} %; nothing was removed"
    )]
    TooMuch {
        /// What it would free.
        freed_bytes: u64,
        /// What is stored.
        total_bytes: u64,
        /// What was allowed.
        most_percent: u8,
    },
    /// Another prune was faster.
    #[error("another prune ran at the same time")]
    PruneBusy,
    /// Another process declared this session dead, so that it may not commit.
    #[error("session {id} was ended by another process; start a new backup")]
    Fenced {
        /// The session.
        id: SnapshotId,
    },
    /// The repository is encrypted, and no password or key file was given.
    #[error("the repository is encrypted, and neither a password nor a key file was given")]
    SecretNeeded,
    /// No key slot opens with what was given.
    #[error("the {kind} opens none of the {slots} key slots")]
    WrongSecret {
        /// `password` or `key-file`.
        kind: &'static str,
        /// How many slots there are.
        slots: usize,
    },
    /// A password or key file was given for a repository that is not encrypted.
    #[error("the repository is not encrypted, but a password or key file was given")]
    NotEncrypted,
    /// There is no key slot of this number.
    #[error("there is no key slot {number}")]
    NoSuchKey {
        /// The number that was asked for.
        number: u32,
    },
    /// The last key slot cannot be removed: nothing would open the repository any more.
    #[error("key slot {number} is the last one that is not being removed; add another one first")]
    LastKey {
        /// The slot.
        number: u32,
    },
    /// The session has committed, so that nothing more can be stored in it.
    #[error("session {id} is finished")]
    SessionFinished {
        /// The session.
        id: SnapshotId,
    },
    /// The caller asked for what cannot be.
    #[error("{what}")]
    Misuse {
        /// What was asked.
        what: String,
    },
}

impl RepoError {
    /// Whether the storage refused, which may pass and says nothing about what is stored.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::NoRoom { .. } => true,
            Self::Io { .. } => !self.is_bad_medium(),
            _ => false,
        }
    }

    /// Whether what is stored is not what was written, or cannot be had any more.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::Corrupt { .. }) || self.is_bad_medium()
    }

    /// Whether the medium cannot read this any more, which is as bad as wrong bytes.
    fn is_bad_medium(&self) -> bool {
        let eio = Some(rustix::io::Errno::IO.raw_os_error());
        matches!(self, Self::Io { source, .. } if source.raw_os_error() == eio)
    }

    /// Makes an [`RepoError::Io`]; `what` follows "cannot".
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source: Arc::new(source),
        }
    }

    /// Makes a [`RepoError::Corrupt`].
    pub(crate) fn corrupt(file: impl Into<String>, at: u64, what: impl Into<String>) -> Self {
        Self::Corrupt {
            file: file.into(),
            at,
            what: what.into(),
        }
    }

    /// Makes a [`RepoError::Misuse`].
    pub(crate) fn misuse(what: impl Into<String>) -> Self {
        Self::Misuse { what: what.into() }
    }
}

/// Fails where the storage refused; what else went wrong is told inside.
pub(super) fn unless_refused<T>(
    result: Result<T, RepoError>,
) -> Result<Result<T, RepoError>, RepoError> {
    match result {
        Err(error) if error.is_refusal() => Err(error),
        other => Ok(other),
    }
}
