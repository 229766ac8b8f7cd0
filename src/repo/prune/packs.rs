//! The packs that are there, by numbers: what is counted for each of very many records must not cost a search for its pack.

use std::collections::HashSet;

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
        let gone: HashSet<&PackName> = gone.iter().collect();
        let mut packs = list_packs(&**repo.storage())?;
        packs.retain(|(name, _)| !gone.contains(name));
        Ok(Self::of(packs))
    }

    fn of(mut packs: Vec<(PackName, u64)>) -> Self {
        packs.sort_unstable();
        // A folder that changes may list a file twice: the second number would be that of a pack that nobody needs.
        packs.dedup_by_key(|(name, _)| *name);
        let (names, lens) = packs.into_iter().unzip();
        Self { names, lens }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::format::pack::PackKind;
    use crate::repo::ids::PackId;

    #[test]
    fn pack_that_is_listed_twice_has_one_number() {
        let name = |n| (PackKind::Data, PackId::from_bytes([n; 16]));
        let list = PackList::of(vec![(name(2), 20), (name(1), 10), (name(2), 21)]);
        assert_eq!(list.names(), [name(1), name(2)]);
        for (number, name) in (0..).zip(list.names()) {
            assert_eq!(list.number(name), Some(number));
        }
        assert_eq!(list.number(&name(3)), None);
        // Of two lengths the one that proves less.
        assert_eq!(list.lens_of(&[name(2), name(3)]).sum::<u64>(), 20);
    }
}
