//! What a failure means for the caller: its code, exit code, hint, and whether to try again.

use std::error::Error;

use crate::engine::{EngineError, RepoFault, chain};

/// A failed run, as people and programs are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A stable word for programs.
    pub code: &'static str,
    /// The process's exit code.
    pub exit_code: u8,
    /// The whole chain of causes, joined by `: `.
    pub message: String,
    /// What to do next, where there is something.
    pub hint: Option<&'static str>,
    /// Whether the same command may succeed later.
    pub retryable: bool,
}

impl Failure {
    /// The command line was wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            code: "usage",
            exit_code: 2,
            message: message.into(),
            hint: Some("see nbdbackup --help"),
            retryable: false,
        }
    }

    /// A signal ended the run; `number` is 2 for SIGINT and 15 for SIGTERM.
    pub fn signal(number: u8) -> Self {
        let (code, name) = if number == 2 {
            ("interrupted", "SIGINT")
        } else {
            ("terminated", "SIGTERM")
        };
        Self {
            code,
            exit_code: 128 + number,
            message: format!("ended by {name}; nothing of this run is visible in the repository"),
            hint: None,
            retryable: true,
        }
    }

    /// The program itself failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self {
            code: "failed",
            exit_code: 1,
            message: message.into(),
            hint: Some("this is a fault of nbdbackup; please report it with this message"),
            retryable: false,
        }
    }
}

impl From<&EngineError> for Failure {
    fn from(error: &EngineError) -> Self {
        let (code, exit_code, retryable, hint) = match error {
            EngineError::Usage(_) => return Self::usage(chain(error)),
            EngineError::SourceUnreachable { .. } => (
                "source-unreachable",
                20,
                true,
                Some(
                    "check the address, that the server runs, and the export's name with nbdbackup info",
                ),
            ),
            EngineError::SourceFailed { .. } => (
                "source-failed",
                22,
                true,
                Some(
                    "check the source's disk and log; earlier snapshots and the bitmap are untouched",
                ),
            ),
            EngineError::IncrementalImpossible { .. } => (
                "incremental-impossible",
                21,
                false,
                Some("run nbdbackup full, or leave out --no-fallback"),
            ),
            EngineError::Repository { .. } => match error.repo_fault() {
                Some(fault) if fault != RepoFault::Internal => repository(fault),
                _ => return Self::internal(chain(error)),
            },
            EngineError::Unrestorable { .. } => match error.repo_fault() {
                Some(RepoFault::Refused) => repository(RepoFault::Refused),
                _ => (
                    "repository-damaged",
                    13,
                    false,
                    Some(
                        "other ranges, disks and snapshots may be whole: restore --serve still serves them",
                    ),
                ),
            },
            EngineError::SnapshotNotFound(_) | EngineError::SnapshotAmbiguous { .. } => (
                "snapshot-not-found",
                1,
                false,
                Some("see nbdbackup snapshots"),
            ),
            EngineError::DiskUnknown { .. } => {
                ("disk-not-found", 1, false, Some("name one with --disk"))
            }
            EngineError::LastSnapshot { .. } => (
                "last-snapshot",
                1,
                false,
                Some("--force forgets it all the same"),
            ),
            EngineError::TargetExists(_) => ("target-exists", 1, false, None),
            EngineError::Target { cause, .. } if is_full(cause.as_ref()) => (
                "no-room",
                14,
                true,
                Some("free room on the target's file system"),
            ),
            EngineError::Target { .. } => {
                ("target-failed", 1, false, Some("the target is incomplete"))
            }
            EngineError::Serve { .. } => ("serve-failed", 1, false, None),
            EngineError::Overlay { cause, .. } if is_full(cause) => (
                "no-room",
                14,
                true,
                Some("free room where the overlay lies"),
            ),
            EngineError::Overlay { .. } => (
                "overlay-failed",
                1,
                false,
                Some("what was flushed before is kept; another folder starts a new overlay"),
            ),
            _ => return Self::internal(chain(error)),
        };
        Self {
            code,
            exit_code,
            message: chain(error),
            hint,
            retryable,
        }
    }
}

fn repository(fault: RepoFault) -> (&'static str, u8, bool, Option<&'static str>) {
    match fault {
        RepoFault::NotFound => (
            "repository-missing",
            10,
            false,
            Some("check --repo, or create the repository with nbdbackup init"),
        ),
        RepoFault::Exists => (
            "repository-exists",
            1,
            false,
            Some("choose an empty directory"),
        ),
        RepoFault::Damaged => (
            "repository-damaged",
            13,
            false,
            Some("the message names the file; other snapshots may be whole"),
        ),
        RepoFault::Unsupported => (
            "repository-unsupported",
            1,
            false,
            Some("use a newer nbdbackup"),
        ),
        RepoFault::NoRoom => (
            "no-room",
            14,
            true,
            Some("free room where the repository lies"),
        ),
        RepoFault::Refused => (
            "storage-refused",
            14,
            true,
            Some("check the repository's permissions and its disk"),
        ),
        RepoFault::SecretNeeded => (
            "password-needed",
            12,
            false,
            Some("give --password-file, --password-command or --key-file"),
        ),
        RepoFault::WrongSecret => (
            "wrong-password",
            12,
            false,
            Some(
                "check where the password comes from: --password-file, the environment, a credential",
            ),
        ),
        RepoFault::NotEncrypted => (
            "not-encrypted",
            12,
            false,
            Some("check --repo; a repository without encryption is used without a password"),
        ),
        RepoFault::KeySlot => ("key-slot", 1, false, Some("see nbdbackup key list")),
        RepoFault::Brake => (
            "brake",
            1,
            false,
            Some("look at nbdbackup prune --dry-run; prune --force removes it"),
        ),
        RepoFault::Busy => ("repository-busy", 11, true, Some("try again")),
        RepoFault::Memory => (
            "memory-suspect",
            1,
            false,
            Some("nothing wrong was stored; test this machine's memory before trusting it"),
        ),
        RepoFault::Internal => ("failed", 1, false, None),
    }
}

fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind::{QuotaExceeded, StorageFull};
            return matches!(io.kind(), StorageFull | QuotaExceeded);
        }
        next = cause.source();
    }
    false
}
