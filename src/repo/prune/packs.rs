//! The packs that are there, by numbers: what is counted for each of very many records must not cost a search for its pack.

use crate::repo::error::RepoError;
use crate::repo::format::generation::PackName;
use crate::repo::format::pack::PackTrailer;
use crate::repo::format::segment::SegmentEntry;
use crate::repo::pack::list_packs;
use crate::repo::repository::Repository;

/// Packs in the order of their names, with their lengths in bytes; a pack's number is its place among them.
pub(super) struct PackList {
    names: Vec<PackName>,
    lens: Vec<u64>,
}

impl PackList {
    /// Lists all but those of `gone`.
    pub(super) fn load(repo: &Repository, gone: &[PackName]) -> Result<Self, RepoError> {
        let mut packs = list_packs(&**repo.storage())?;
        for name in gone {
            packs.remove(name);
        }
        let (names, lens) = packs.into_iter().unzip();
        Ok(Self { names, lens })
    }

    /// The names, each at its number.
    pub(super) fn names(&self) -> &[PackName] {
        &self.names
    }

    pub(super) fn number(&self, name: &PackName) -> Option<u32> {
        let found = self.names.binary_search(name).ok()?;
        u32::try_from(found).ok()
    }

    pub(super) fn name(&self, number: u32) -> &PackName {
        &self.names[number as usize]
    }

    pub(super) fn len(&self, number: u32) -> u64 {
        self.lens[number as usize]
    }

    /// The lengths of those of some packs that are there.
    pub(super) fn lens_of<'a>(
        &self,
        names: impl IntoIterator<Item = &'a PackName>,
    ) -> impl Iterator<Item = u64> {
        let numbers = names.into_iter().filter_map(|name| self.number(name));
        numbers.map(|number| self.len(number))
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.lens.iter().sum()
    }

    /// Whether a pack is long enough to hold a record.
    pub(super) fn holds(&self, number: u32, record: &SegmentEntry) -> bool {
        let end = u64::from(record.offset) + u64::from(record.len) + PackTrailer::LEN as u64;
        end <= self.len(number)
    }
}
