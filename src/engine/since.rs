//! What changed on a disk since an earlier snapshot of it, told as QEMU tells a dirty bitmap.

use super::catalog::Catalog;
use super::disk::Disk;
use super::export::{Extents, MOST_RUNS};
use super::{DiskRecord, EngineError, Snapshot};
use crate::nbd::session::{Extent, limits};
use crate::range::ByteRange;
use crate::repo::{MapReader, SnapshotId};

/// A disk as it was in an earlier snapshot; nothing of its map is read before a client asks what changed.
#[derive(Clone, Debug)]
pub(super) struct Earlier {
    snapshot: SnapshotId,
    map: MapReader,
    size_bytes: u64,
}

impl Earlier {
    /// Finds the newest earlier snapshots of a disk, the newest first.
    ///
    /// What is earlier is told by the disk's generations, not by clocks.
    pub(super) fn of(
        catalog: &Catalog,
        snapshots: &[Snapshot],
        name: &str,
        record: &DiskRecord,
    ) -> Result<Vec<Self>, EngineError> {
        let disks = |s: &Snapshot| {
            let found = s.draft.disks.iter().find(|d| d.disk == record.disk);
            found.map(|disk| (s.id, disk.generation, disk.root, disk.size_bytes))
        };
        let mut earlier: Vec<_> = snapshots
            .iter()
            .filter(|s| s.draft.name == name)
            .filter_map(disks)
            .filter(|(_, generation, ..)| *generation < record.generation)
            .collect();
        earlier.sort_by_key(|(id, generation, ..)| (std::cmp::Reverse(*generation), *id));
        let newest = earlier.into_iter().take(limits::MAX_EARLIER_OFFERED);
        newest
            .map(|(snapshot, _, root, size_bytes)| {
                let map = catalog.repository().map(&root, size_bytes);
                Ok(Self {
                    snapshot,
                    map: map.map_err(catalog.failed())?,
                    size_bytes,
                })
            })
            .collect()
    }

    /// The name of the metadata context.
    pub(super) fn context(&self) -> String {
        context(&self.snapshot)
    }

    /// Tells which chunks of a range differ, and what the disk grew by as dirty.
    pub(super) fn extents(
        &self,
        disk: &Disk,
        range: ByteRange,
        most: usize,
    ) -> Result<Vec<Extent>, EngineError> {
        let geometry = disk.geometry();
        let mut extents = Extents::new(range, most);
        let common = ByteRange::new(0, geometry.size_bytes.min(self.size_bytes));
        if let Some(common) = common.and_then(|common| common.intersect(range)) {
            // As with the allocation: what lies further on is told when it is asked for.
            for run in disk
                .compared(&self.map, geometry.chunks_of(common))
                .take(MOST_RUNS)
            {
                let run = run?;
                let Some(bytes) = geometry.bytes(&run.chunks).intersect(common) else {
                    continue;
                };
                if !extents.add(bytes, u64::from(!run.same)) {
                    return Ok(extents.found);
                }
            }
            if extents
                .found
                .last()
                .is_none_or(|last| last.range.end() < common.end())
            {
                return Ok(extents.found);
            }
        }
        if let Some(grown) = ByteRange::new(self.size_bytes, geometry.size_bytes) {
            extents.add(grown, DIRTY);
        }
        Ok(extents.found)
    }
}

/// The metadata context that tells what changed since a snapshot.
pub(super) fn context(snapshot: &SnapshotId) -> String {
    format!("qemu:dirty-bitmap:since-{snapshot}")
}

/// The bit of a dirty bitmap.
const DIRTY: u64 = 1;
