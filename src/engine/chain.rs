//! The chain rule: which snapshot's chunks a dirty bitmap lets an incremental inherit, or why none.

use std::fmt;

use crate::repo::{DiskRecord, Snapshot, SnapshotId, SnapshotList};

/// Why an incremental reads a disk in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No snapshot of this disk started or used the bitmap.
    NoParent,
    /// The export does not offer the bitmap.
    BitmapMissing,
    /// QEMU calls the bitmap inconsistent: it was not closed cleanly.
    BitmapInconsistent,
    /// The bitmap is disabled, so that it missed writes.
    BitmapNotRecording,
    /// The parent does not exist any more, lacks the disk, or cannot be read.
    ParentMissing,
    /// Two runs used the bitmap at once, so that none provably came last.
    ParentAmbiguous,
    /// The disk is smaller than in the parent.
    DiskShrunk,
    /// The machine has snapshots, but none holds this disk.
    NewDisk,
}

impl Reason {
    /// The word for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoParent => "no-parent",
            Self::BitmapMissing => "bitmap-missing",
            Self::BitmapInconsistent => "bitmap-inconsistent",
            Self::BitmapNotRecording => "bitmap-not-recording",
            Self::ParentMissing => "parent-missing",
            Self::ParentAmbiguous => "parent-ambiguous",
            Self::DiskShrunk => "disk-shrunk",
            Self::NewDisk => "new-disk",
        }
    }

    /// A clause for people.
    pub const fn explain(self) -> &'static str {
        match self {
            Self::NoParent => "no snapshot of this disk started or used the bitmap",
            Self::BitmapMissing => "the export does not offer the bitmap",
            Self::BitmapInconsistent => "the bitmap was not closed cleanly and must be removed",
            Self::BitmapNotRecording => "the bitmap is disabled and missed writes",
            Self::ParentMissing => {
                "the snapshot that the bitmap follows, or that was asserted, is forgotten, lacks the disk or cannot be read"
            }
            Self::ParentAmbiguous => "two runs used the bitmap at once and none provably came last",
            Self::DiskShrunk => "the disk is smaller than in its parent",
            Self::NewDisk => "the machine's snapshots do not hold this disk yet",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a repository knows of the past: the chain goes through all of it, whatever of it can still be read.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    /// The snapshots that can be inherited from.
    pub(crate) snapshots: Vec<Snapshot>,
    /// Those that were forgotten.
    forgotten: Vec<Snapshot>,
    /// Whether there are some of which nothing is known.
    unreadable: bool,
}

impl From<SnapshotList> for History {
    fn from(list: SnapshotList) -> Self {
        Self {
            snapshots: list.snapshots,
            forgotten: list.forgotten.into_iter().map(|f| f.snapshot).collect(),
            unreadable: !list.unreadable.is_empty(),
        }
    }
}

/// The snapshot of a disk from which an incremental may inherit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parent<'a> {
    pub(crate) snapshot: SnapshotId,
    pub(crate) disk: &'a DiskRecord,
}

/// Returns the number that follows those of all snapshots of a disk: what orders them without a clock.
pub(crate) fn next_generation(history: &History, name: &str, disk: &str) -> u64 {
    let generations = [&history.snapshots, &history.forgotten];
    generations
        .into_iter()
        .flat_map(|all| of_disk(all, name, disk))
        .map(|p| p.disk.generation)
        .max()
        .map_or(1, |g| g.saturating_add(1))
}

/// Finds the parent that the bitmap proves: the latest snapshot of the disk that started or used it.
///
/// A later run that found the bitmap missing breaks the chain, since one of that name seen afterwards is another one.
/// So does a later one that is forgotten: the bitmap may have been cleared after it, and knows nothing of what was
/// before. One that cannot be read may be that one.
///
/// # Errors
/// The reason why the disk has to be read in full.
pub(crate) fn parent_by_bitmap<'a>(
    history: &'a History,
    name: &str,
    disk: &str,
    bitmap: &str,
) -> Result<Parent<'a>, Reason> {
    let touches = |d: &DiskRecord| {
        d.bitmap_used.as_deref() == Some(bitmap)
            || d.bitmaps_started
                .iter()
                .chain(&d.bitmaps_lost)
                .any(|b| b == bitmap)
    };
    let there = of_disk(&history.snapshots, name, disk).map(|p| (p, false));
    let gone = of_disk(&history.forgotten, name, disk).map(|p| (p, true));
    let mut latest: Option<(Parent<'a>, bool)> = None;
    let mut ties = 0;
    let mut seen = false;
    for (found, is_gone) in there.chain(gone) {
        seen = true;
        if !touches(found.disk) {
            continue;
        }
        match latest {
            Some((best, _)) if found.disk.generation < best.disk.generation => {}
            Some((best, _)) if found.disk.generation == best.disk.generation => ties += 1,
            _ => {
                latest = Some((found, is_gone));
                ties = 0;
            }
        }
    }
    let known = |s: &Snapshot| s.draft.name == name;
    match latest {
        Some(_) if history.unreadable => Err(Reason::ParentMissing),
        Some(_) if ties > 0 => Err(Reason::ParentAmbiguous),
        Some((best, _)) if best.disk.bitmaps_lost.iter().any(|b| b == bitmap) => {
            Err(Reason::NoParent)
        }
        Some((_, true)) => Err(Reason::ParentMissing),
        Some((best, false)) => Ok(best),
        None if !seen && history.snapshots.iter().any(known) => Err(Reason::NewDisk),
        None => Err(Reason::NoParent),
    }
}

/// Finds the parent that the caller asserts.
///
/// # Errors
/// [`Reason::ParentMissing`] when that snapshot does not hold the disk.
pub(crate) fn parent_asserted<'a>(
    asserted: Option<&'a Snapshot>,
    disk: &str,
) -> Result<Parent<'a>, Reason> {
    let snapshot = asserted.ok_or(Reason::ParentMissing)?;
    let disk = snapshot
        .draft
        .disks
        .iter()
        .find(|d| d.disk == disk)
        .ok_or(Reason::ParentMissing)?;
    Ok(Parent {
        snapshot: snapshot.id,
        disk,
    })
}

fn of_disk<'a>(
    snapshots: &'a [Snapshot],
    name: &str,
    disk: &str,
) -> impl Iterator<Item = Parent<'a>> {
    snapshots
        .iter()
        .filter(move |s| s.draft.name == name)
        .filter_map(move |s| {
            Some(Parent {
                snapshot: s.id,
                disk: s.draft.disks.iter().find(|d| d.disk == disk)?,
            })
        })
}
