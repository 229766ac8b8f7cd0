//! Forgetting snapshots: a mark, which can be taken back until a prune removes what is marked.

use std::collections::{HashMap, HashSet};
use std::time::SystemTime;

use super::error::RepoError;
use super::format::FileKind;
use super::format::envelope::MAX_SMALL_FILE;
use super::generations;
use super::ids::SnapshotId;
use super::repository::{Repository, create};
use super::snapshot::Snapshot;
use super::storage::StorageError;

/// A snapshot that is forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forgotten {
    /// What it was, without its packs; its maps may be gone.
    pub snapshot: Snapshot,
    /// When it was forgotten, in nanoseconds since 1970.
    pub forgotten_unix_nanos: i64,
}

/// All marks.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    pub(crate) ids: HashSet<SnapshotId>,
    pub(crate) snapshots: Vec<Forgotten>,
    /// When the storage says that they were forgotten, where it says so.
    pub(crate) modified: HashMap<SnapshotId, SystemTime>,
    /// The marks that cannot be read, with the reasons; their snapshots count as forgotten.
    pub(crate) unreadable: Vec<(String, RepoError)>,
}

impl Repository {
    /// Forgets snapshots: they are listed no more, and a prune removes them later.
    ///
    /// The mark keeps what the snapshot said of its disks, since a later backup must know which one came last.
    pub fn forget(&self, ids: &[SnapshotId], now_unix_nanos: i64) -> Result<(), RepoError> {
        self.check_writable()?;
        for id in ids {
            let snapshot = self.snapshot(id)?;
            match self.mark(snapshot.clone(), now_unix_nanos) {
                // Who makes room needs a little.
                Err(RepoError::NoRoom { .. }) => {
                    self.spend_reserve()?;
                    self.mark(snapshot, now_unix_nanos)?;
                    // A prune, which makes room, needs the rest.
                    self.make_reserve()?;
                }
                other => other?,
            }
        }
        self.storage().barrier()?;
        Ok(())
    }

    /// Takes back that a snapshot was forgotten; fails once a prune has begun to remove it.
    pub fn unforget(&self, id: &SnapshotId) -> Result<Snapshot, RepoError> {
        self.check_writable()?;
        let snapshot = self.snapshot(id)?;
        let file = mark_file(id);
        let mark = match self.storage().read(&file, MAX_SMALL_FILE) {
            Ok(mark) => mark,
            Err(StorageError::Missing { .. }) => return Ok(snapshot),
            Err(other) => return Err(other.into()),
        };
        if self.is_dropped(id)? {
            return Err(RepoError::TooLate { id: *id });
        }
        match self.storage().remove(&file) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        self.storage().barrier()?;
        // A prune that dropped it after the first look may not have seen that the mark is gone. One that drops it after
        // this look does see that, before it decides.
        let failure = match (self.is_dropped(id), self.snapshot(id)) {
            (Ok(false), Ok(_)) => return Ok(snapshot),
            (Ok(true), _) | (_, Err(RepoError::NoSuchSnapshot { .. })) => {
                RepoError::TooLate { id: *id }
            }
            (Err(error), _) | (_, Err(error)) => error,
        };
        match create(&**self.storage(), &file, &mark) {
            Ok(()) | Err(RepoError::NotEmpty { .. }) => {}
            Err(other) => return Err(other),
        }
        self.storage().barrier()?;
        Err(failure)
    }

    /// Reads all marks.
    pub(crate) fn forgotten(&self) -> Result<Marks, RepoError> {
        let mut marks = Marks::default();
        for file in self.storage().list("forget/")? {
            let Some(id) = file
                .name
                .strip_prefix("forget/")
                .and_then(|id| id.parse().ok())
            else {
                continue;
            };
            match self.read_mark(&id) {
                Ok(Some(mark)) => marks.snapshots.push(mark),
                // Taken back since it was listed.
                Ok(None) => continue,
                Err(error) if error.is_refusal() => return Err(error),
                Err(error) => marks.unreadable.push((file.name, error)),
            }
            marks.ids.insert(id);
            marks.modified.extend(file.modified.map(|m| (id, m)));
        }
        marks
            .snapshots
            .sort_by_key(|m| (m.snapshot.draft.started_unix_nanos, m.snapshot.id));
        Ok(marks)
    }

    /// Writes the mark of a snapshot, unless there is one.
    pub(crate) fn mark(
        &self,
        mut snapshot: Snapshot,
        now_unix_nanos: i64,
    ) -> Result<(), RepoError> {
        let file = mark_file(&snapshot.id);
        snapshot.packs.clear();
        // What the mark needs no more makes room for when it was made.
        snapshot.draft.finished_unix_nanos = now_unix_nanos;
        let bytes = snapshot.encode(FileKind::Forgotten, self.keys())?;
        match create(&**self.storage(), &file, &bytes) {
            Ok(()) | Err(RepoError::NotEmpty { .. }) => Ok(()),
            Err(other) => Err(other),
        }
    }

    fn read_mark(&self, id: &SnapshotId) -> Result<Option<Forgotten>, RepoError> {
        let file = mark_file(id);
        let bytes = match self.storage().read(&file, MAX_SMALL_FILE) {
            Ok(bytes) => bytes,
            Err(StorageError::Missing { .. }) => return Ok(None),
            Err(other) => return Err(other.into()),
        };
        let snapshot =
            Snapshot::decode(&bytes, FileKind::Forgotten, self.keys(), self.chunk_size())
                .map_err(|e| e.in_file(&file))?;
        self.check_identity(&snapshot, id, &file)?;
        Ok(Some(Forgotten {
            forgotten_unix_nanos: snapshot.draft.finished_unix_nanos,
            snapshot,
        }))
    }

    /// Whether a snapshot has no mark, so that it is not forgotten or not any more.
    pub(crate) fn is_had_back(&self, id: &SnapshotId) -> Result<bool, RepoError> {
        match self.storage().len(&mark_file(id)) {
            Ok(_) => Ok(false),
            Err(StorageError::Missing { .. }) => Ok(true),
            Err(other) => Err(other.into()),
        }
    }

    fn is_dropped(&self, id: &SnapshotId) -> Result<bool, RepoError> {
        let state = generations::load(&**self.storage(), self.keys().mac())?;
        Ok(state.pending.is_some_and(|p| p.dropped.contains(id)))
    }
}

impl Marks {
    /// How long ago a snapshot was forgotten, in nanoseconds; a clock that was or is wrong makes it less, not more.
    pub(crate) fn age_nanos(&self, mark: &Forgotten, now_unix_nanos: i64) -> u128 {
        let modified = self.modified.get(&mark.snapshot.id).copied();
        age_nanos(mark.forgotten_unix_nanos, modified, now_unix_nanos)
    }
}

/// How old a file is that says when it was written, in nanoseconds; of what it says and what the storage says the later
/// counts.
pub(super) fn age_nanos(told: i64, modified: Option<SystemTime>, now_unix_nanos: i64) -> u128 {
    let nanos = |time: SystemTime| {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        i64::try_from(since.as_nanos()).ok()
    };
    let modified = modified.and_then(nanos);
    let since = modified.map_or(told, |modified| told.max(modified));
    u128::try_from(now_unix_nanos.saturating_sub(since)).unwrap_or(0)
}

/// The name of the mark of a snapshot that is forgotten.
pub(crate) fn mark_file(id: &SnapshotId) -> String {
    format!("forget/{id}")
}
