//! Bringing packs into the index that no segment names: all of them, should the index be lost.

use std::sync::Arc;

use tempfile::TempDir;

use super::error::{RepoError, unless_refused};
use super::format::generation::PackName;
use super::format::pack::MAX_RECORDS;
use super::format::segment::{SegmentEntry, prefix_of};
use super::index::Index;
use super::pack::{Footer, list_packs, read_footer};
use super::repository::Repository;
use super::storage::LocalStorage;

/// What [`Repository::rebuild_index`] did.
#[derive(Clone, Debug, Default)]
pub struct Rebuilt {
    /// The number of packs that the index did not know.
    pub packs: u64,
    /// The number of their records.
    pub records: u64,
    /// The packs whose footers cannot be read, with the reasons.
    pub unreadable: Vec<(String, RepoError)>,
}

impl Repository {
    /// Reads the footers of all packs that the index does not know, and adds what they hold.
    ///
    /// Packs of running or killed sessions come in too: their chunks are as good as any.
    pub fn rebuild_index(&self) -> Result<Rebuilt, RepoError> {
        self.check_writable()?;
        self.index().refresh()?;
        let known = self.index().packs();
        let mut rebuilt = Rebuilt::default();
        let mut gather = Gather::into(self.index());
        // The packs that are listed here may be seen before they are durable.
        self.storage().barrier()?;
        for name in list_packs(&**self.storage())?.into_keys() {
            if known.contains(&name) {
                continue;
            }
            let footer = read_footer(&**self.storage(), self.uuid(), name.0, name.1);
            match unless_refused(footer)? {
                Ok(footer) => {
                    rebuilt.packs += 1;
                    rebuilt.records += footer.entries.len() as u64;
                    gather.add(name, &footer)?;
                }
                Err(error) => rebuilt.unreadable.push((name.0.file_name(&name.1), error)),
            }
        }
        gather.finish()?;
        self.storage().barrier()?;
        Ok(rebuilt)
    }
}

/// Puts what packs' footers say into an index, in segments of a bounded size.
pub(super) struct Gather<'a> {
    index: &'a Index,
    entries: Vec<SegmentEntry>,
    table: Vec<PackName>,
}

impl<'a> Gather<'a> {
    pub(super) fn into(index: &'a Index) -> Self {
        Self {
            index,
            entries: Vec::new(),
            table: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, name: PackName, footer: &Footer) -> Result<(), RepoError> {
        let pack = self.table.len() as u32;
        self.table.push(name);
        self.entries
            .extend(footer.entries.iter().map(|record| SegmentEntry {
                prefix: prefix_of(&record.id),
                pack,
                offset: record.offset,
                len: record.len,
                flags: record.flags.0,
            }));
        match self.entries.len() >= SEGMENT_ENTRIES {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Adds what is left.
    pub(super) fn finish(mut self) -> Result<(), RepoError> {
        match self.entries.is_empty() {
            true => Ok(()),
            false => self.flush(),
        }
    }

    fn flush(&mut self) -> Result<(), RepoError> {
        let entries = std::mem::take(&mut self.entries);
        let table = std::mem::take(&mut self.table);
        self.index.add(entries, &table)
    }
}

/// An index in a temporary folder, which goes with it.
pub(super) struct Scratch {
    pub(super) index: Index,
    _folder: TempDir,
}

impl Scratch {
    pub(super) fn new() -> Result<Self, RepoError> {
        let folder =
            tempfile::tempdir().map_err(|e| RepoError::io("make a temporary folder", e))?;
        let storage = LocalStorage::temporary(folder.path())?;
        Ok(Self {
            index: Index::new(Arc::new(storage)),
            _folder: folder,
        })
    }
}

/// How many entries are gathered into one segment.
const SEGMENT_ENTRIES: usize = 4 * MAX_RECORDS;
