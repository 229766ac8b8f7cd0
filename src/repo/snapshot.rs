//! Snapshots: one point in time of one or more disks, complete in itself.

use super::chunk::{ChunkSize, Place};
use super::error::RepoError;
use super::format::node::{FAN_OUT_LOG2, MAX_LEVEL};
use super::format::pack::PackKind;
use super::ids::{NodeId, PackId, RepoUuid, SnapshotId};

/// A snapshot, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The identifier, which is that of the session that wrote it.
    pub id: SnapshotId,
    /// The repository that it belongs to.
    pub repo: RepoUuid,
    /// What the writer said about it.
    pub draft: SnapshotDraft,
    /// The packs that this session wrote.
    pub packs: Vec<WrittenPack>,
}

/// What the writer of a snapshot says about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotDraft {
    /// The machine's name.
    pub name: String,
    /// Words for selecting snapshots.
    pub tags: Vec<String>,
    /// When the backup started, in nanoseconds since 1970; informative.
    pub started_unix_nanos: i64,
    /// When it finished, in nanoseconds since 1970; informative.
    pub finished_unix_nanos: i64,
    /// The program and version that wrote it.
    pub tool: String,
    /// Whether all that was asked for is in it.
    pub complete: bool,
    /// What it is a copy of, where it was copied from another repository.
    pub origin: Option<Origin>,
    /// The disks.
    pub disks: Vec<DiskRecord>,
}

/// The snapshot that another one is a copy of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// The repository in which it was made.
    pub repo: RepoUuid,
    /// The snapshot there.
    pub snapshot: SnapshotId,
}

/// One disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRecord {
    /// The disk's name.
    pub disk: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its map.
    pub root: MapRoot,
    /// How it was read.
    pub kind: BackupKind,
    /// Why it was read so.
    pub reason: Option<String>,
    /// The snapshot that an incremental started from.
    pub parent: Option<SnapshotId>,
    /// The dirty bitmap that told what to read.
    pub bitmap_used: Option<String>,
    /// The dirty bitmaps that were started at this point in time.
    pub bitmaps_started: Vec<String>,
    /// The dirty bitmaps that were to be used and were missing or useless: a later one of that name is another one.
    pub bitmaps_lost: Vec<String>,
    /// One more than that of any snapshot of this disk that the run saw: what orders them without a clock.
    pub generation: u64,
    /// Where the disk was read from.
    pub source: String,
    /// What reading and storing it came to.
    pub stats: DiskStats,
}

/// How a disk was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupKind {
    /// All of it.
    Full,
    /// What changed since the parent.
    Incremental,
}

/// What reading and storing a disk came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// The bytes that the bitmap called dirty.
    pub dirty_bytes: u64,
    /// The bytes that were read.
    pub read_bytes: u64,
    /// The bytes that are zeros or holes, as far as they were looked at.
    pub zero_bytes: u64,
    /// The number of chunks that were looked at.
    pub chunks_total: u64,
    /// The number of chunks that the repository did not have.
    pub chunks_new: u64,
    /// The plain bytes of these.
    pub new_bytes: u64,
    /// The bytes that these take in the repository.
    pub stored_bytes: u64,
}

/// A pack that a session wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenPack {
    /// What it holds.
    pub kind: PackKind,
    /// Its identifier.
    pub id: PackId,
    /// Its length in bytes.
    pub len: u64,
    /// The BLAKE3 hash of its header and footer.
    pub footer_hash: [u8; 32],
}

/// The root of a disk's map, enough to read the disk without any index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRoot {
    /// The root node; `None` when the whole disk is zeros.
    pub(crate) node: Option<NodeRef>,
    /// The root's level: the leaves are level 0.
    pub(crate) level: u8,
}

impl MapRoot {
    /// Makes the map of a disk that is all zeros.
    pub fn zeros(chunk_size: ChunkSize, disk_bytes: u64) -> Self {
        Self {
            node: None,
            level: level_for(chunk_size.count(disk_bytes)),
        }
    }

    /// The root node's identifier; equal ones mean equal disks. `None` when the whole disk is zeros.
    pub fn id(&self) -> Option<NodeId> {
        self.node.map(|node| node.id)
    }

    /// Fails when this cannot be the map of a disk of `chunks` chunks.
    pub(crate) fn check(&self, chunks: u64) -> Result<(), RepoError> {
        match self.level == level_for(chunks) {
            true => Ok(()),
            false => Err(RepoError::misuse(format!(
                "a map of level {} is not that of a disk of {chunks} chunks",
                self.level
            ))),
        }
    }
}

/// A map node's identifier and a hint of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeRef {
    pub(crate) id: NodeId,
    pub(crate) place: Place,
}

/// Returns the level of the root of a map of `chunks` chunks: the lowest that covers them.
pub(crate) fn level_for(chunks: u64) -> u8 {
    (0..MAX_LEVEL)
        .find(|level| chunks <= span_of(*level))
        .unwrap_or(MAX_LEVEL)
}

/// Returns the number of chunks below a node of a level.
pub(crate) fn span_of(level: u8) -> u64 {
    1 << ((u32::from(level) + 1) * FAN_OUT_LOG2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_is_the_lowest_that_covers_the_disk() {
        for (chunks, level) in [
            (0, 0),
            (128, 0),
            (129, 1),
            (1 << 14, 1),
            ((1 << 14) + 1, 2),
            (83_886_080, 3),
            (1 << 48, 6),
        ] {
            assert_eq!(level_for(chunks), level, "{chunks}");
        }
    }
}
