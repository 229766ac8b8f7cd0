//! Bringing packs into the index that no segment names: all of them, should the index be lost.

use super::error::RepoError;
use super::format::pack::{MAX_RECORDS, PackKind};
use super::format::segment::{SegmentEntry, prefix_of};
use super::ids::PackId;
use super::pack::{Footer, read_footer};
use super::repository::Repository;

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
        let mut entries: Vec<SegmentEntry> = Vec::new();
        let mut table: Vec<(PackKind, PackId)> = Vec::new();
        // The packs that are listed here may be seen before they are durable.
        self.storage().barrier()?;
        for kind in [PackKind::Data, PackKind::Meta] {
            for file in self.storage().list(kind.folder())? {
                let Some(pack) = kind.parse_file_name(&file.name) else {
                    continue;
                };
                if known.contains(&(kind, pack)) {
                    continue;
                }
                match read_footer(&**self.storage(), self.uuid(), kind, pack) {
                    Ok(footer) => {
                        rebuilt.packs += 1;
                        rebuilt.records += footer.entries.len() as u64;
                        let number = table.len() as u32;
                        table.push((kind, pack));
                        add_all(&mut entries, number, &footer);
                    }
                    Err(error @ RepoError::Io { .. }) if !error.is_bad_medium() => {
                        return Err(error);
                    }
                    Err(error) => rebuilt.unreadable.push((file.name, error)),
                }
                if entries.len() >= SEGMENT_ENTRIES {
                    self.index().add(std::mem::take(&mut entries), &table)?;
                    table.clear();
                }
            }
        }
        if !entries.is_empty() {
            self.index().add(entries, &table)?;
        }
        self.storage().barrier()?;
        Ok(rebuilt)
    }
}

pub(super) fn add_all(entries: &mut Vec<SegmentEntry>, pack: u32, footer: &Footer) {
    entries.extend(footer.entries.iter().map(|record| SegmentEntry {
        prefix: prefix_of(&record.id),
        pack,
        offset: record.offset,
        len: record.len,
        flags: record.flags.0,
    }));
}

/// How many entries are gathered into one segment.
pub(super) const SEGMENT_ENTRIES: usize = 4 * MAX_RECORDS;
