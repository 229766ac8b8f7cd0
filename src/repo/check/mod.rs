//! Proving that a repository is whole: each file, each map, and as much of the records as is asked for.
//!
//! Nothing of the index is believed: a second one is made of the packs' footers in a temporary folder, and what the
//! snapshots need is looked for there.

mod files;
mod index;
mod maps;
mod packs;
mod parity;

use std::collections::HashSet;

use super::bad::{BadRecords, NewMarks};
use super::error::RepoError;
use super::format::generation::PackName;
use super::format::health::BadRecord;
use super::format::segment::{Prefix, prefix_of};
use super::format::snapshot;
use super::generations;
use super::ids::SnapshotId;
use super::repository::Repository;
use super::snapshot::Snapshot;
use super::storage::StorageError;
pub(crate) use index::hash_of;
use packs::Packs;
pub(crate) use parity::{check_files, compare, list as list_parity, tell_what_mends};

/// How to check.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CheckOptions {
    /// How much of the packs is read and proved record by record, in percent; `None` reads no records.
    pub read_data_percent: Option<f64>,
    /// Whether to mend what can be mended.
    pub repair: bool,
    /// Now, in nanoseconds since 1970; remembered for what was read.
    pub now_unix_nanos: i64,
}

/// A file that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedFile {
    /// Its name in the repository.
    pub file: String,
    /// What is wrong.
    pub problem: String,
    /// Whether this run mended it.
    pub repaired: bool,
    /// Whether its parity can mend it; `None` where there is none, or it was not looked at.
    pub parity: Option<bool>,
}

/// A range of a snapshot's disk that cannot be read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedRange {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The disk's name.
    pub disk: String,
    /// Where it starts on the disk, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The pack in which its first record should be.
    pub file: String,
    /// The offset of that record in the pack.
    pub at: u64,
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// The snapshots that were read.
    pub snapshots: u64,
    /// The map nodes that were read, each once.
    pub nodes: u64,
    /// The different chunks that the maps name.
    pub chunks: u64,
    /// The packs whose footers were read.
    pub packs: u64,
    /// The bytes of all packs.
    pub pack_bytes: u64,
    /// The packs of which every record was read and proved.
    pub read_packs: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// The damaged files: the first of them.
    pub files: Vec<DamagedFile>,
    /// How many there are in all.
    pub files_total: u64,
    /// The ranges of disks that are lost: the first of them.
    pub ranges: Vec<DamagedRange>,
    /// How many there are in all.
    pub ranges_total: u64,
    /// Their bytes.
    pub lost_bytes: u64,
    /// The packs whose parity is there, as far as its header tells.
    pub parity_files: u64,
    /// What is wrong with parity, which endangers no snapshot by itself: the first of these files.
    pub parity: Vec<DamagedFile>,
    /// How many there are in all.
    pub parity_total: u64,
    /// The files that are no part of a repository.
    pub strangers: Vec<String>,
    /// The records that this run marked as damaged.
    pub marked: u64,
    /// Whether this run wrote the index anew.
    pub index_rebuilt: bool,
}

impl Checked {
    /// Whether nothing is damaged, or all of it was mended.
    pub fn is_whole(&self) -> bool {
        self.ranges_total == 0 && self.open_files() == 0
    }

    /// The number of damaged files that were not mended.
    pub fn open_files(&self) -> u64 {
        let repaired = self.files.iter().filter(|f| f.repaired).count() as u64;
        self.files_total.saturating_sub(repaired)
    }

    pub(crate) fn file(&mut self, file: impl Into<String>, problem: impl Into<String>) {
        self.files_total += 1;
        if self.files.len() < LISTED {
            self.files.push(DamagedFile {
                file: file.into(),
                problem: problem.into(),
                repaired: false,
                parity: None,
            });
        }
    }

    pub(crate) fn fault(&mut self, file: impl Into<String>, error: &RepoError) {
        self.file(file, error.to_string());
    }

    fn range(&mut self, range: DamagedRange) {
        self.lost_bytes = self.lost_bytes.saturating_add(range.len);
        // Neighbours are one.
        if let Some(last) = self.ranges.last_mut()
            && last.snapshot == range.snapshot
            && last.disk == range.disk
            && last.offset + last.len == range.offset
        {
            last.len += range.len;
            return;
        }
        self.ranges_total += 1;
        if self.ranges.len() < LISTED {
            self.ranges.push(range);
        }
    }

    fn repaired(&mut self, which: impl Fn(&DamagedFile) -> bool) {
        for file in &mut self.files {
            file.repaired |= which(file);
        }
    }
}

impl Repository {
    /// Checks the repository, and mends it where that is asked for; `progress` is told of bytes read, and of how many.
    ///
    /// Safe beside anything else that goes on. What it mends: copies of small files, the index, and marks of damaged
    /// records, which let the next backup store them anew.
    pub fn check(
        &self,
        options: &CheckOptions,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Checked, RepoError> {
        if options.repair {
            self.check_writable()?;
        }
        let mut turn = 0;
        loop {
            let before = generations::load(&**self.storage(), self.keys().mac()).ok();
            let mut run = Check {
                repo: self,
                options,
                bad: BadRecords::load(self)?,
                marks: NewMarks::default(),
                marked_packs: HashSet::new(),
                needed_packs: HashSet::new(),
                lost: HashSet::new(),
                found: Checked::default(),
            };
            run.look(progress)?;
            let after = generations::load(&**self.storage(), self.keys().mac()).ok();
            // A prune may have removed what was about to be looked at.
            turn += 1;
            if !run.found.is_whole() && before != after && turn < TURNS {
                continue;
            }
            if options.repair {
                run.repair()?;
            }
            return Ok(run.found);
        }
    }
}

/// A check under way.
struct Check<'a> {
    repo: &'a Repository,
    options: &'a CheckOptions,
    bad: BadRecords,
    marks: NewMarks,
    /// The packs that something was found wrong with.
    marked_packs: HashSet<PackName>,
    /// Those of them that some snapshot still needs.
    needed_packs: HashSet<PackName>,
    /// What snapshots need and no whole pack holds.
    lost: HashSet<Prefix>,
    found: Checked,
}

impl Check<'_> {
    fn look(&mut self, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<(), RepoError> {
        self.small_files()?;
        let snapshots = self.snapshots()?;
        // Segments before packs, and snapshots before both: what these name is there before them.
        let segments = self.list_segments()?;
        let parity = list_parity(&**self.repo.storage())?;
        let mut packs = Packs::read(self, &snapshots)?;
        if let Some(percent) = self.options.read_data_percent {
            self.read_records(&mut packs, percent, progress)?;
        }
        let index_whole = self.check_segments(&segments, &packs)?;
        let mut needed = self.walk(&snapshots)?;
        let missing: HashSet<Prefix> = self.resolve(&mut needed, &packs, index_whole)?;
        self.name_losses(&snapshots, &missing)?;
        let (storage, uuid) = (&**self.repo.storage(), self.repo.uuid());
        let makes = self.repo.parity();
        check_files(
            storage,
            uuid,
            makes,
            &parity,
            &packs.listed,
            &mut self.found,
        )?;
        tell_what_mends(storage, uuid, &mut self.found)
    }

    fn snapshots(&mut self) -> Result<Vec<Snapshot>, RepoError> {
        let list = self.repo.snapshots()?;
        for (file, error) in &list.unreadable {
            self.found.fault(file, error);
        }
        // Forgotten ones can be had back, as long as their files are there.
        for gone in &list.forgotten {
            match self.repo.snapshot(&gone.snapshot.id) {
                Ok(_) | Err(RepoError::NoSuchSnapshot { .. }) => {}
                Err(error) if error.is_refusal() => return Err(error),
                Err(error) => {
                    self.found
                        .fault(snapshot::file_name(&gone.snapshot.id), &error);
                }
            }
        }
        self.found.snapshots = list.snapshots.len() as u64;
        Ok(list.snapshots)
    }

    fn repair(&mut self) -> Result<(), RepoError> {
        self.mend_copies()?;
        let is_index = |f: &DamagedFile| f.file.starts_with("idx/");
        if self.found.files.iter().any(is_index) {
            let rebuilt = self.repo.replace_index()?;
            self.found.index_rebuilt = true;
            tracing::warn!(segments = rebuilt.replaced, "the index was written anew");
            self.found.repaired(is_index);
        }
        self.remove_idle_marks()?;
        let marks = std::mem::take(&mut self.marks);
        self.found.marked = marks.write(self.repo, &self.bad)?;
        self.remove_unreadable_marks()?;
        // Marked is mended where nothing is lost with it: what needs the records finds them elsewhere.
        let mended: HashSet<String> = self
            .marked_packs
            .difference(&self.needed_packs)
            .map(|(kind, pack)| kind.file_name(pack))
            .collect();
        self.found.repaired(|f| mended.contains(&f.file));
        Ok(())
    }

    /// Removes the marks of packs that are gone, when no snapshot misses what they held.
    fn remove_idle_marks(&self) -> Result<(), RepoError> {
        for (file, mark) in self.bad.files() {
            let needed = |r: &BadRecord| self.lost.contains(&prefix_of(&r.id));
            let storage = self.repo.storage();
            match storage.len(&mark.pack.0.file_name(&mark.pack.1)) {
                Err(StorageError::Missing { .. }) if !mark.records.iter().any(needed) => {
                    match storage.remove(file) {
                        Ok(()) | Err(StorageError::Missing { .. }) => {}
                        Err(other) => return Err(other.into()),
                    }
                }
                Ok(_) | Err(StorageError::Missing { .. }) => {}
                Err(other) => return Err(other.into()),
            }
        }
        Ok(())
    }
}

/// How many damaged files and ranges are listed.
const LISTED: usize = 10_000;

/// How often a prune may come between before what was found is believed.
const TURNS: usize = 3;
