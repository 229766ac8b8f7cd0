//! How sessions and readers show that they are there, and how sessions that are dead are fenced off.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::error::RepoError;
use super::format::FileKind;
use super::format::generation::{Beat, PackName, encode_mark};
use super::format::snapshot;
use super::generations;
use super::ids::SnapshotId;
use super::repository::{Repository, create};
use super::storage::{Hold, StorageError};

/// A session's announcement; dropping it ends that.
#[derive(Debug)]
pub(crate) struct Presence {
    id: SnapshotId,
    beat: Beat,
    next: AtomicU64,
    started: Instant,
    /// When the last beat was, in seconds since the start.
    last: AtomicU64,
    /// The packs that must not be referred to.
    condemned: HashSet<PackName>,
    _hold: Box<dyn Hold>,
}

impl Presence {
    /// Announces a session, then looks which packs are condemned, then says that it has looked.
    ///
    /// A prune that condemned packs before the first step is seen by the second; one that does so afterwards sees the
    /// announcement, and waits for the session to end before it removes anything.
    pub(crate) fn announce(
        repo: &Repository,
        id: SnapshotId,
        parents: Vec<SnapshotId>,
    ) -> Result<Self, RepoError> {
        Self::announce_as(repo, id, None, parents)
    }

    /// Announces somebody who only reads these snapshots: none of them is dropped from now on, and no prune waits.
    pub(crate) fn announce_reader(
        repo: &Repository,
        id: SnapshotId,
        snapshots: Vec<SnapshotId>,
    ) -> Result<Self, RepoError> {
        Self::announce_as(repo, id, Some(READS_ONLY), snapshots)
    }

    fn announce_as(
        repo: &Repository,
        id: SnapshotId,
        seen: Option<u64>,
        parents: Vec<SnapshotId>,
    ) -> Result<Self, RepoError> {
        let mut presence = Self {
            id,
            beat: Beat { seen, parents },
            next: AtomicU64::new(0),
            started: Instant::now(),
            last: AtomicU64::new(0),
            condemned: HashSet::new(),
            _hold: repo.storage().hold(&hold_name(&id))?,
        };
        match presence.look(repo) {
            Ok(()) => Ok(presence),
            Err(error) => {
                presence.withdraw(repo);
                Err(error)
            }
        }
    }

    fn look(&mut self, repo: &Repository) -> Result<(), RepoError> {
        self.send(repo)?;
        let state = generations::load(&**repo.storage(), repo.keys().mac())?;
        let pending = state.pending.unwrap_or_default();
        let reads_only = self.beat.seen == Some(READS_ONLY);
        for parent in &self.beat.parents {
            // One that was had back in the instant in which a prune dropped it stays, as that prune will see. To read
            // it there is enough; a session would not be waited for if that were taken back once more.
            if pending.dropped.contains(parent) && !(reads_only && repo.is_had_back(parent)?) {
                return Err(RepoError::ParentGone { id: *parent });
            }
        }
        if reads_only {
            return Ok(());
        }
        self.condemned = pending.packs.into_iter().collect();
        self.beat.seen = Some(state.last.map_or(0, |last| last.saturating_add(1)));
        self.send(repo)
    }

    /// Whether a pack is going to be removed, so that nothing may refer to it.
    pub(crate) fn is_condemned(&self, pack: &PackName) -> bool {
        self.condemned.contains(pack)
    }

    /// Shows that the session lives, where the last time is long ago.
    pub(crate) fn beat_if_due(&self, repo: &Repository) -> Result<(), RepoError> {
        let now = self.started.elapsed().as_secs();
        let last = self.last.load(Ordering::Relaxed);
        let due = now.saturating_sub(last) >= BEAT.as_secs()
            && self
                .last
                .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        match due {
            true => self.send(repo),
            false => Ok(()),
        }
    }

    /// Takes the announcement back, for a session that has committed or never will.
    pub(crate) fn withdraw(&self, repo: &Repository) {
        // The last first: what is left for a moment claims less than what is gone.
        for number in (0..self.next.swap(0, Ordering::SeqCst)).rev() {
            match repo.storage().remove(&beat_file(&self.id, number)) {
                Ok(()) | Err(StorageError::Missing { .. }) => {}
                Err(error) => {
                    tracing::warn!(%error, "a session's announcement stays; a prune removes it");
                    return;
                }
            }
        }
    }

    fn send(&self, repo: &Repository) -> Result<(), RepoError> {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        let file = self.beat.encode(repo.keys().mac())?;
        create(&**repo.storage(), &beat_file(&self.id, number), &file)
    }
}

/// Keeps snapshots from being removed while it lives, whoever forgets them; made by [`Repository::pin`].
#[derive(Debug)]
pub struct Pin {
    presence: Presence,
    repo: Arc<Repository>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.presence.withdraw(&self.repo);
    }
}

impl Repository {
    /// Keeps snapshots from being removed by prunes as long as what is returned lives, for whoever reads them.
    ///
    /// Fails with [`RepoError::NoSuchSnapshot`] when one is gone, and [`RepoError::TooLate`] when it is going.
    pub fn pin(self: &Arc<Self>, snapshots: &[SnapshotId]) -> Result<Pin, RepoError> {
        let id = SnapshotId::random()?;
        let presence = Presence::announce_reader(self, id, snapshots.to_vec());
        let pin = Pin {
            presence: presence.map_err(|e| match e {
                RepoError::ParentGone { id } => RepoError::TooLate { id },
                other => other,
            })?,
            repo: Arc::clone(self),
        };
        // What a prune dropped and removed before the announcement.
        for id in snapshots {
            self.snapshot(id)?;
        }
        Ok(pin)
    }
}

/// A session that may still commit, or somebody who reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenSession {
    pub(crate) id: SnapshotId,
    /// What it saw, in the way of [`Beat::seen`]; `None` also where that cannot be read.
    seen: Option<u64>,
    pub(crate) parents: Vec<SnapshotId>,
}

impl OpenSession {
    /// Whether it may refer to what this generation condemns.
    pub(crate) fn may_refer_to(&self, generation: u64) -> bool {
        self.seen.is_none_or(|seen| seen <= generation)
    }
}

/// What to do about sessions whose processes are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dead {
    /// Make it impossible for them to commit, and remove what announces them.
    Fence,
    /// Leave them out.
    LeaveOut,
}

/// Lists the sessions that may still commit, and those who read.
///
/// Who wants to know of their snapshots lists these afterwards: a session publishes its snapshot first, and takes its
/// announcement back then.
pub(crate) fn open_sessions(repo: &Repository, dead: Dead) -> Result<Vec<OpenSession>, RepoError> {
    let mut open = Vec::new();
    for found in announced(repo)? {
        if has_ended(repo, &found.id)? {
            if dead == Dead::Fence {
                remove_beats(repo, &found)?;
            }
            continue;
        }
        if is_dead(repo, &found)? {
            // Who ends in order takes the announcement back before letting go.
            if dead == Dead::Fence && is_announced(repo, &found)? {
                // Who only reads has nothing to commit.
                if last_beat(repo, &found)?.seen != Some(READS_ONLY) {
                    fence(repo, &found.id)?;
                }
                remove_beats(repo, &found)?;
            }
            continue;
        }
        let beat = last_beat(repo, &found)?;
        open.push(OpenSession {
            id: found.id,
            seen: beat.seen,
            parents: beat.parents,
        });
    }
    Ok(open)
}

/// Reads the last beat; one that says nothing stands for one that cannot be read.
fn last_beat(repo: &Repository, found: &Announced) -> Result<Beat, RepoError> {
    let last = found.beats.keys().next_back().copied().unwrap_or(0);
    let name = beat_file(&found.id, last);
    Ok(
        match repo.read_hint(&name, |bytes| Beat::decode(bytes, repo.keys().mac()))? {
            Some(Ok(beat)) => beat,
            // It is ending. What it stored is seen in its snapshot, if it commits.
            None => Beat::default(),
            Some(Err(error)) => {
                tracing::error!(%error, "an open session cannot be read; it is waited for");
                Beat::default()
            }
        },
    )
}

/// Makes it impossible for a session to commit; one that has committed is left alone.
pub(crate) fn fence(repo: &Repository, session: &SnapshotId) -> Result<(), RepoError> {
    let fence = encode_mark(FileKind::Fence, repo.keys().mac())?;
    match create(&**repo.storage(), &snapshot::file_name(session), &fence) {
        Ok(()) => {
            tracing::warn!(%session, "ended a session whose process is gone");
            Ok(())
        }
        Err(RepoError::NotEmpty { .. }) => Ok(()),
        Err(other) => Err(other),
    }
}

/// An announcement that was found.
struct Announced {
    id: SnapshotId,
    /// Its beats, and when the storage says that each was written.
    beats: BTreeMap<u64, Option<SystemTime>>,
}

fn announced(repo: &Repository) -> Result<Vec<Announced>, RepoError> {
    let mut found: HashMap<SnapshotId, BTreeMap<u64, Option<SystemTime>>> = HashMap::new();
    for file in repo.storage().list("sess/")? {
        if let Some((id, number)) = parse(&file.name) {
            found.entry(id).or_default().insert(number, file.modified);
        }
    }
    let mut found: Vec<Announced> = found
        .into_iter()
        .map(|(id, beats)| Announced { id, beats })
        .collect();
    found.sort_unstable_by_key(|a| a.id);
    Ok(found)
}

fn has_ended(repo: &Repository, session: &SnapshotId) -> Result<bool, RepoError> {
    match repo.storage().len(&snapshot::file_name(session)) {
        Ok(_) => Ok(true),
        Err(StorageError::Missing { .. }) => Ok(false),
        Err(other) => Err(other.into()),
    }
}

fn is_announced(repo: &Repository, found: &Announced) -> Result<bool, RepoError> {
    for number in found.beats.keys() {
        match repo.storage().len(&beat_file(&found.id, *number)) {
            Ok(_) => return Ok(true),
            Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(false)
}

fn is_dead(repo: &Repository, found: &Announced) -> Result<bool, RepoError> {
    if let Some(held) = repo.storage().is_held(&hold_name(&found.id))? {
        return Ok(!held);
    }
    // Without locks only time tells. To be wrong costs the session its commit, never anybody's data.
    let last = found.beats.values().flatten().max();
    let age = last.and_then(|last| SystemTime::now().duration_since(*last).ok());
    Ok(age.is_some_and(|age| age > LEASE))
}

fn remove_beats(repo: &Repository, found: &Announced) -> Result<(), RepoError> {
    for number in found.beats.keys().rev() {
        match repo.storage().remove(&beat_file(&found.id, *number)) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

fn hold_name(session: &SnapshotId) -> String {
    format!("session-{session}")
}

fn beat_file(session: &SnapshotId, number: u64) -> String {
    format!("sess/{session}.{number}")
}

fn parse(name: &str) -> Option<(SnapshotId, u64)> {
    let (id, number) = name.strip_prefix("sess/")?.split_once('.')?;
    let parsed = (id.parse().ok()?, number.parse().ok()?);
    (beat_file(&parsed.0, parsed.1) == name).then_some(parsed)
}

/// What those have seen who refer to nothing that they store: no generation is of any interest to them.
const READS_ONLY: u64 = u64::MAX;

/// How often a session shows that it lives.
const BEAT: Duration = Duration::from_secs(600);

/// How long a session may be silent before it counts as dead, where locks do not tell.
const LEASE: Duration = Duration::from_secs(24 * 3600);
