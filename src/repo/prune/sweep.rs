//! The end of a generation: what is needed after all is rescued, the rest is removed.

use std::collections::{HashMap, HashSet};

use super::mark::{join, needed_beyond};
use super::packs::PackList;
use super::plan::Snapshots;
use super::{PruneOptions, Pruned};
use crate::repo::bad::BadRecords;
use crate::repo::checkpoint;
use crate::repo::error::RepoError;
use crate::repo::forget::{Forgotten, mark_file};
use crate::repo::format::generation::{Condemned, PackName, Sweep};
use crate::repo::format::parity;
use crate::repo::format::snapshot::file_name;
use crate::repo::generations::{self, Generations};
use crate::repo::ids::{PackId, SnapshotId};
use crate::repo::pack::list_packs;
use crate::repo::presence::{Dead, open_sessions};
use crate::repo::repository::Repository;
use crate::repo::snapshot::{DiskRecord, Snapshot};
use crate::repo::storage::{FileInfo, StorageError};

/// Removes what a generation condemned, once no session can refer to it any more; false when another process decided
/// otherwise meanwhile.
pub(super) fn finish(
    repo: &Repository,
    generation: u64,
    state: &Generations,
    pruned: &mut Pruned,
) -> Result<bool, RepoError> {
    let sweep = match (&state.decided, &state.pending) {
        (Some(decided), _) => decided.clone(),
        (None, Some(condemned)) => {
            let sweep = decide(repo, condemned)?;
            let storage = &**repo.storage();
            if !generations::decide(storage, repo.keys().mac(), generation, &sweep)? {
                return Ok(false);
            }
            sweep
        }
        (None, None) => return Ok(false),
    };
    carry_out(repo, &sweep, pruned)?;
    generations::end(&**repo.storage(), repo.keys().mac(), generation)?;
    Ok(true)
}

/// Decides what is removed. All sessions that may refer to what is condemned have ended before this is called, so
/// that their snapshots are listed here; no later one refers to it.
fn decide(repo: &Repository, condemned: &Condemned) -> Result<Sweep, RepoError> {
    let forgotten = repo.forgotten()?;
    let still: HashSet<SnapshotId> = forgotten.snapshots.iter().map(|m| m.snapshot.id).collect();
    // Who announces now to read one that is dropped sees that it is, and gives up.
    let open = open_sessions(repo, Dead::LeaveOut)?;
    let read: HashSet<SnapshotId> = open.into_iter().flat_map(|s| s.parents).collect();
    let drop = condemned.dropped.iter().copied();
    let drop = drop.filter(|id| still.contains(id) && !read.contains(id));
    let snapshots = Snapshots::load(repo, &drop.collect())?;
    // What stayed for the roots may have been found damaged since, and a condemned copy be the only good one.
    let known: HashSet<SnapshotId> = match BadRecords::load(repo)?.is_empty() {
        true => condemned.roots.iter().copied().collect(),
        false => HashSet::new(),
    };
    let (known, new): (Vec<&Snapshot>, Vec<&Snapshot>) =
        snapshots.roots.iter().partition(|s| known.contains(&s.id));
    repo.index().refresh()?;
    let mut needed = needed_beyond(repo, &new, &known)?;
    let packs = PackList::load(repo, &[])?;
    let doomed = condemned.packs.iter().filter_map(|name| packs.number(name));
    let doomed: HashSet<u32> = doomed.collect();
    let mut rescued: HashSet<u32> = HashSet::new();
    let may_go = join(repo, &packs, &mut needed, &mut |copies| {
        let theirs = copies.places.iter().map(|copied| copied.pack);
        if copies.damaged {
            rescued.extend(theirs);
            return;
        }
        let safe = |pack: u32| !doomed.contains(&pack) || rescued.contains(&pack);
        if !theirs.clone().any(safe) {
            rescued.extend(theirs.min());
        }
    })?
    .check(repo)?;
    let is_rescued = |name: &PackName| packs.number(name).is_some_and(|n| rescued.contains(&n));
    let goes = condemned.packs.iter().copied();
    let goes = goes.filter(|name| may_go.includes(name) && !is_rescued(name));
    Ok(Sweep {
        packs: goes.collect(),
        snapshots: snapshots.dropped,
    })
}

fn carry_out(repo: &Repository, sweep: &Sweep, pruned: &mut Pruned) -> Result<(), RepoError> {
    let storage = repo.storage();
    for id in &sweep.snapshots {
        // What it said of its disks' bitmaps must outlast it.
        if let Ok(snapshot) = repo.snapshot(id) {
            let finished = snapshot.draft.finished_unix_nanos;
            repo.mark(snapshot, finished)?;
        }
    }
    storage.barrier()?;
    for id in &sweep.snapshots {
        match storage.remove(&file_name(id)) {
            Ok(()) => pruned.snapshots_removed += 1,
            Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    // No power failure may bring a snapshot back whose packs are gone.
    storage.barrier()?;
    for (kind, pack) in &sweep.packs {
        let file = kind.file_name(pack);
        let len = match storage.len(&file) {
            Ok(len) => len,
            Err(StorageError::Missing { .. }) => continue,
            Err(other) => return Err(other.into()),
        };
        match storage.remove(&file) {
            Ok(()) => {
                pruned.packs_removed += 1;
                pruned.removed_bytes += len;
            }
            Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    storage.barrier()?;
    Ok(())
}

/// Removes the parity of packs that are gone, whichever prune removed them.
pub(super) fn remove_idle_parity(repo: &Repository, pruned: &mut Pruned) -> Result<(), RepoError> {
    for file in idle_parity(repo)? {
        match repo.storage().remove(&file.name) {
            Ok(()) => pruned.removed_parity_bytes += file.len,
            Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

/// Says how much parity goes with packs, or is left over.
pub(super) fn report_parity(
    repo: &Repository,
    packs: &[PackName],
    pruned: &mut Pruned,
) -> Result<(), RepoError> {
    let idle = idle_parity(repo)?.into_iter().map(|file| file.name);
    let mut goes: HashSet<String> = idle.collect();
    goes.extend(packs.iter().map(|(_, pack)| parity::file_name(pack)));
    let files = repo.storage().list(parity::FOLDER)?.into_iter();
    let goes = files.filter(|file| goes.contains(&file.name));
    pruned.removed_parity_bytes += goes.map(|file| file.len).sum::<u64>();
    Ok(())
}

/// Finds the parity of packs that are gone.
fn idle_parity(repo: &Repository) -> Result<Vec<FileInfo>, RepoError> {
    // Before the packs: a pack is there before its parity is, and none comes back under a name that was used.
    let files = repo.storage().list(parity::FOLDER)?;
    let packs = PackList::load(repo, &[])?;
    let mut there: HashSet<PackId> = packs.names().iter().map(|(_, pack)| *pack).collect();
    // A small pack that was lost can be computed from its parity alone.
    let bad = BadRecords::load(repo)?;
    there.extend(bad.files().iter().map(|(_, mark)| mark.pack.1));
    Ok(files
        .into_iter()
        .filter(|file| {
            let pack = parity::parse_file_name(&file.name);
            pack.is_some_and(|pack| !there.contains(&pack))
        })
        .collect())
}

/// Says what is condemned and cannot be removed yet.
pub(super) fn report_waiting(
    repo: &Repository,
    condemned: &Condemned,
    pruned: &mut Pruned,
) -> Result<(), RepoError> {
    for len in PackList::load(repo, &[])?.lens_of(&condemned.packs) {
        pruned.packs_waiting += 1;
        pruned.waiting_bytes += len;
    }
    Ok(())
}

/// Says what ending the pending generation would remove, and returns those packs and snapshots.
pub(super) fn report_finish(
    repo: &Repository,
    state: &Generations,
    pruned: &mut Pruned,
) -> Result<Sweep, RepoError> {
    let sweep = match (&state.decided, &state.pending) {
        (Some(decided), _) => decided.clone(),
        (None, Some(condemned)) => decide(repo, condemned)?,
        (None, None) => Sweep::default(),
    };
    for len in PackList::load(repo, &[])?.lens_of(&sweep.packs) {
        pruned.packs_removed += 1;
        pruned.removed_bytes += len;
    }
    for id in &sweep.snapshots {
        pruned.snapshots_removed += u64::from(repo.storage().len(&file_name(id)).is_ok());
    }
    Ok(sweep)
}

/// Removes the checkpoints that no run continues from any more.
pub(super) fn remove_checkpoints(
    repo: &Repository,
    options: &PruneOptions,
) -> Result<(), RepoError> {
    let found = checkpoint::list(repo)?;
    if found.is_empty() {
        return Ok(());
    }
    let open = open_sessions(repo, Dead::LeaveOut)?;
    let snapshots = match Snapshots::load(repo, &HashSet::new()) {
        Ok(snapshots) => snapshots.roots,
        // What an unreadable snapshot is of nobody knows.
        Err(RepoError::SnapshotsUnreadable { .. }) => return Ok(()),
        Err(other) => return Err(other),
    };
    let (window, now) = (options.undelete_window, options.now_unix_nanos);
    let sorted = checkpoint::sort(repo, &found, &open, &snapshots, window, now)?;
    checkpoint::remove_over(repo, &sorted)
}

/// Removes the marks of removed snapshots that no chain of bitmaps can come to any more.
pub(super) fn remove_idle_marks(repo: &Repository) -> Result<(), RepoError> {
    let marks = repo.forgotten()?;
    let files = repo.storage().list("snap/")?;
    let names: HashSet<&str> = files.iter().map(|f| f.name.as_str()).collect();
    let is_gone = |mark: &Forgotten| !names.contains(file_name(&mark.snapshot.id).as_str());
    if !marks.snapshots.iter().any(is_gone) {
        return Ok(());
    }
    let snapshots = match Snapshots::load(repo, &HashSet::new()) {
        Ok(found) => found.roots,
        // What an unreadable snapshot is of nobody knows.
        Err(RepoError::SnapshotsUnreadable { .. }) => return Ok(()),
        Err(other) => return Err(other),
    };
    let there: HashSet<SnapshotId> = snapshots.iter().map(|s| s.id).collect();
    let gone: Vec<&Snapshot> = marks
        .snapshots
        .iter()
        .map(|mark| &mark.snapshot)
        .filter(|s| !there.contains(&s.id))
        .collect();
    let mut histories: HashMap<(&str, &str), History<'_>> = HashMap::new();
    for (snapshot, is_there) in snapshots
        .iter()
        .map(|s| (s, true))
        .chain(gone.iter().map(|s| (*s, false)))
    {
        for disk in &snapshot.draft.disks {
            let of_disk = (snapshot.draft.name.as_str(), disk.disk.as_str());
            histories.entry(of_disk).or_default().add(disk, is_there);
        }
    }
    for snapshot in gone {
        let needed = snapshot.draft.disks.iter().any(|disk| {
            let of_disk = (snapshot.draft.name.as_str(), disk.disk.as_str());
            histories.get(&of_disk).is_none_or(|h| h.needs(disk))
        });
        if needed {
            continue;
        }
        match repo.storage().remove(&mark_file(&snapshot.id)) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

/// What is known of a disk's past.
#[derive(Default)]
struct History<'a> {
    /// The generation of its oldest snapshot.
    oldest: Option<u64>,
    /// The last generation of all.
    last: u64,
    /// For each bitmap the last generation that says something of it.
    told: HashMap<&'a str, u64>,
}

impl<'a> History<'a> {
    fn add(&mut self, disk: &'a DiskRecord, is_there: bool) {
        self.last = self.last.max(disk.generation);
        if is_there {
            let oldest = self.oldest.unwrap_or(u64::MAX);
            self.oldest = Some(oldest.min(disk.generation));
        }
        for bitmap in bitmaps(disk) {
            let last = self.told.entry(bitmap).or_default();
            *last = (*last).max(disk.generation);
        }
    }

    /// Whether the mark of a removed snapshot says something that nothing later says.
    ///
    /// Without an older snapshot it keeps nobody from anything. The last one tells which number comes next.
    fn needs(&self, gone: &DiskRecord) -> bool {
        let told_later = |bitmap: &str| {
            let last = self.told.get(bitmap);
            last.is_some_and(|last| *last > gone.generation)
        };
        self.oldest.is_some_and(|oldest| oldest <= gone.generation)
            && (gone.generation == self.last || !bitmaps(gone).all(told_later))
    }
}

/// The bitmaps of which a record of a disk says something.
fn bitmaps(disk: &DiskRecord) -> impl Iterator<Item = &str> {
    let started = disk.bitmaps_started.iter().chain(&disk.bitmaps_lost);
    let used = disk.bitmap_used.iter();
    used.chain(started).map(String::as_str)
}

/// Merges segments, and leaves out what packs held that are gone when that is much.
pub(super) fn tidy_index(repo: &Repository) -> Result<(), RepoError> {
    repo.index().merge(u64::MAX)?;
    match repo.index().compact(|| list_packs(&**repo.storage())) {
        // Another process merged and removed what was to be read.
        Ok(()) | Err(RepoError::Missing { .. }) => Ok(()),
        Err(other) => Err(other),
    }
}
