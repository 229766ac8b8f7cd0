//! Checkpoints: what a session that never commits has stored stays for a while, for the run that comes after it.
//!
//! They are hints. A prune spares the packs that they name; that nothing committed loses anything does not depend on
//! them, and one that is lost or damaged costs storing chunks again.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use super::error::RepoError;
use super::forget::age_nanos;
use super::format::checkpoint::{Checkpoint, file_name, parse_file_name};
use super::format::generation::PackName;
use super::ids::SnapshotId;
use super::presence::{Dead, OpenSession, open_sessions};
use super::repository::{Repository, create};
use super::snapshot::Snapshot;
use super::storage::StorageError;

/// Whose checkpoints a session writes, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// The machine's name.
    pub name: String,
    /// The disks' names, and the generation that each of them will have in the snapshot.
    pub disks: Vec<(String, u64)>,
    /// The bytes of packs after which the next checkpoint is due.
    pub interval_bytes: u64,
}

impl CheckpointOptions {
    /// Writes the checkpoint of a number; returns when it is durable.
    pub(super) fn write(
        &self,
        repo: &Repository,
        session: SnapshotId,
        number: u64,
        packs: Vec<PackName>,
    ) -> Result<(), RepoError> {
        let checkpoint = Checkpoint {
            session,
            name: self.name.clone(),
            disks: self.disks.clone(),
            written_unix_nanos: unix_nanos(SystemTime::now()).unwrap_or(0),
            packs,
        };
        let file = checkpoint.encode(repo.keys())?;
        create(&**repo.storage(), &file_name(&session, number), &file)?;
        repo.storage().barrier()?;
        Ok(())
    }

    fn is_about_one_of(&self, checkpoint: &Checkpoint) -> bool {
        let has = |disk: &String| self.disks.iter().any(|(name, _)| name == disk);
        checkpoint.name == self.name && checkpoint.disks.iter().any(|(disk, _)| has(disk))
    }
}

/// Returns the packs that earlier runs of these disks stored and never committed.
pub(super) fn interrupted(
    repo: &Repository,
    options: &CheckpointOptions,
) -> Result<HashSet<PackName>, RepoError> {
    let mut packs = HashSet::new();
    let found = list(repo)?;
    if found.is_empty() {
        return Ok(packs);
    }
    let open = ids(&open_sessions(repo, Dead::LeaveOut)?);
    for file in found.iter().filter(|f| !open.contains(&f.session)) {
        if let Read::Good(checkpoint) = read(repo, file)?
            && options.is_about_one_of(&checkpoint)
        {
            packs.extend(checkpoint.packs);
        }
    }
    Ok(packs)
}

/// What a prune finds about the checkpoints of sessions that ended.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    /// The packs that a later run may want.
    pub(super) packs: HashSet<PackName>,
    /// The files of no use to anybody.
    over: Vec<String>,
}

/// Sorts the checkpoints: one is over when its disks have all been stored since, when it is older than `window`, or when it
/// is damaged. Those of open sessions are left alone, as are their packs.
///
/// `found` was listed before `open`, so that a session whose checkpoint is seen is among the open ones or has ended.
pub(super) fn sort(
    repo: &Repository,
    found: &[Found],
    open: &[OpenSession],
    snapshots: &[Snapshot],
    window: Duration,
    now_unix_nanos: i64,
) -> Result<Checkpoints, RepoError> {
    let mut sorted = Checkpoints::default();
    let open = ids(open);
    let mut stored: HashMap<(&str, &str), u64> = HashMap::new();
    for snapshot in snapshots {
        for disk in &snapshot.draft.disks {
            let of_disk = (snapshot.draft.name.as_str(), disk.disk.as_str());
            let last = stored.entry(of_disk).or_default();
            *last = (*last).max(disk.generation);
        }
    }
    for file in found.iter().filter(|f| !open.contains(&f.session)) {
        let checkpoint = match read(repo, file)? {
            Read::Good(checkpoint) => checkpoint,
            Read::Damaged => {
                sorted.over.push(file.name.clone());
                continue;
            }
            Read::Nothing => continue,
        };
        let is_stored = checkpoint.disks.iter().all(|(disk, generation)| {
            let last = stored.get(&(checkpoint.name.as_str(), disk.as_str()));
            last.is_some_and(|last| last >= generation)
        });
        let age = age_nanos(checkpoint.written_unix_nanos, file.modified, now_unix_nanos);
        match is_stored || age >= window.as_nanos() {
            true => sorted.over.push(file.name.clone()),
            false => sorted.packs.extend(checkpoint.packs),
        }
    }
    Ok(sorted)
}

/// Removes the checkpoints that are over.
pub(super) fn remove_over(repo: &Repository, checkpoints: &Checkpoints) -> Result<(), RepoError> {
    for name in &checkpoints.over {
        match repo.storage().remove(name) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

/// Removes those of a session that has committed: `0..count`.
pub(super) fn remove_own(repo: &Repository, session: &SnapshotId, count: u64) {
    for number in 0..count {
        match repo.storage().remove(&file_name(session, number)) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(error) => {
                tracing::warn!(%error, "a checkpoint stays; a prune removes it");
                return;
            }
        }
    }
}

/// A checkpoint's file.
#[derive(Debug)]
pub(super) struct Found {
    session: SnapshotId,
    name: String,
    modified: Option<SystemTime>,
}

/// Lists all checkpoints.
pub(super) fn list(repo: &Repository) -> Result<Vec<Found>, RepoError> {
    let files = repo.storage().list("ckpt/")?.into_iter();
    let found = files.filter_map(|file| {
        let (session, _) = parse_file_name(&file.name)?;
        Some(Found {
            session,
            name: file.name,
            modified: file.modified,
        })
    });
    Ok(found.collect())
}

enum Read {
    Good(Checkpoint),
    Damaged,
    /// It is gone, or a later version's.
    Nothing,
}

fn read(repo: &Repository, file: &Found) -> Result<Read, RepoError> {
    let decode = |bytes: &[u8]| Checkpoint::decode(bytes, repo.keys());
    let error = match repo.read_hint(&file.name, decode)? {
        None => return Ok(Read::Nothing),
        Some(Ok(checkpoint)) if checkpoint.session == file.session => {
            return Ok(Read::Good(checkpoint));
        }
        Some(Ok(_)) => RepoError::corrupt(&file.name, 0, "it is another session's"),
        Some(Err(error)) => error,
    };
    tracing::warn!(%error, "a checkpoint is of no use; chunks may be stored again");
    match error {
        RepoError::Unsupported { .. } => Ok(Read::Nothing),
        _ => Ok(Read::Damaged),
    }
}

fn ids(open: &[OpenSession]) -> HashSet<SnapshotId> {
    open.iter().map(|s| s.id).collect()
}

/// The nanoseconds since 1970; 64 bits hold them until the year 2262.
fn unix_nanos(time: SystemTime) -> Option<i64> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    i64::try_from(since.as_nanos()).ok()
}
