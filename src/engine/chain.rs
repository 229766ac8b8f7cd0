//! The chain rule: which snapshot's chunks a dirty bitmap lets an incremental inherit, or why none.

use std::fmt;

use crate::repo::{DiskRecord, Snapshot, SnapshotId};

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
    /// The parent that was asserted does not exist, lacks the disk, or cannot be read.
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
                "the asserted parent does not exist, lacks the disk or cannot be read"
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

/// The snapshot of a disk from which an incremental may inherit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parent<'a> {
    pub(crate) snapshot: SnapshotId,
    pub(crate) disk: &'a DiskRecord,
}

/// Returns the number that follows those of all snapshots of a disk: what orders them without a clock.
pub(crate) fn next_generation(snapshots: &[Snapshot], name: &str, disk: &str) -> u64 {
    of_disk(snapshots, name, disk)
        .map(|p| p.disk.generation)
        .max()
        .map_or(1, |g| g.saturating_add(1))
}

/// Finds the parent that the bitmap proves: the latest snapshot of the disk that started or used it.
///
/// A later run that found the bitmap missing breaks the chain, since one of that name seen afterwards is another one.
///
/// # Errors
/// The reason why the disk has to be read in full.
pub(crate) fn parent_by_bitmap<'a>(
    snapshots: &'a [Snapshot],
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
    let mut latest: Option<Parent<'a>> = None;
    let mut ties = 0;
    let mut seen = false;
    for found in of_disk(snapshots, name, disk) {
        seen = true;
        if !touches(found.disk) {
            continue;
        }
        match latest {
            Some(best) if found.disk.generation < best.disk.generation => {}
            Some(best) if found.disk.generation == best.disk.generation => ties += 1,
            _ => {
                latest = Some(found);
                ties = 0;
            }
        }
    }
    match latest {
        Some(_) if ties > 0 => Err(Reason::ParentAmbiguous),
        Some(best) if best.disk.bitmaps_lost.iter().any(|b| b == bitmap) => Err(Reason::NoParent),
        Some(best) => Ok(best),
        None if !seen && snapshots.iter().any(|s| s.draft.name == name) => Err(Reason::NewDisk),
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
