//! What the repository has already, and may be referred to.

use super::super::chunk::Place;
use super::super::error::RepoError;
use super::super::format::pack::{PackKind, PackTrailer};
use super::super::storage::StorageError;
use super::{SessionCore, lock};

impl SessionCore {
    /// Whether a check found the record at a place damaged.
    pub(crate) fn is_bad(&self, kind: PackKind, place: &Place) -> bool {
        self.bad.holds(&(kind, place.pack), place.offset)
    }

    /// Returns where a record is that this session or the repository has, in a pack that is there.
    pub(super) fn known(&self, kind: PackKind, id: &[u8; 32]) -> Result<Option<Place>, RepoError> {
        if let Some(place) = self.packs.find(id) {
            return Ok(Some(place));
        }
        let usable = |found: &(PackKind, Place)| -> Result<bool, RepoError> {
            Ok(found.0 == kind
                && !self.presence.is_condemned(&(kind, found.1.pack))
                && !self.is_bad(kind, &found.1)
                && self.is_there(kind, &found.1)?)
        };
        let index = self.repo.index();
        let Some(found) = index.find(id)? else {
            return Ok(None);
        };
        if usable(&found)? {
            return Ok(Some(found.1));
        }
        for found in index.find_all(id)? {
            if usable(&found)? {
                return Ok(Some(found.1));
            }
        }
        Ok(None)
    }

    /// Whether a pack that the index names is there and long enough; each is looked at once.
    fn is_there(&self, kind: PackKind, place: &Place) -> Result<bool, RepoError> {
        let key = (kind, place.pack);
        let known = lock(&self.packs_there).get(&key).copied();
        let len = match known {
            Some(len) => len,
            None => {
                let len = match self.repo.storage().len(&kind.file_name(&place.pack)) {
                    Ok(len) => Some(len),
                    Err(StorageError::Missing { .. }) => None,
                    Err(other) => return Err(other.into()),
                };
                lock(&self.packs_there).insert(key, len);
                len
            }
        };
        let end = u64::from(place.offset) + u64::from(place.len) + PackTrailer::LEN as u64;
        Ok(len.is_some_and(|len| end <= len))
    }
}
