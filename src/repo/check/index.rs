//! The index: each segment against its own hash, and what all of them say against the packs' footers.

use std::collections::HashMap;

use super::Check;
use super::packs::{Digest, Packs};
use crate::repo::error::RepoError;
use crate::repo::format::generation::PackName;
use crate::repo::format::segment;
use crate::repo::ids::SegmentId;
use crate::repo::storage::Storage;

/// What the index says, once it is known to be readable.
#[derive(Debug, Default)]
pub(super) struct IndexSays {
    /// For each pack a hash of its entries; `None` when the index cannot be read whole.
    packs: Option<HashMap<PackName, Digest>>,
}

impl IndexSays {
    /// Whether the index knows a pack; it is given the benefit of the doubt where it was found damaged already.
    pub(super) fn knows(&self, name: &PackName) -> bool {
        self.packs.as_ref().is_none_or(|p| p.contains_key(name))
    }
}

impl Check<'_> {
    pub(super) fn list_segments(&self) -> Result<Vec<(u8, SegmentId)>, RepoError> {
        let files = self.repo.storage().list("idx/")?;
        let names = files.iter();
        let mut names: Vec<_> = names
            .filter_map(|f| segment::parse_file_name(&f.name))
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Checks all segments that were listed.
    pub(super) fn check_segments(
        &mut self,
        segments: &[(u8, SegmentId)],
        packs: &Packs,
    ) -> Result<IndexSays, RepoError> {
        let mut whole = true;
        for (level, id) in segments {
            let file = segment::file_name(*level, id);
            match hash_of(&**self.repo.storage(), &file) {
                Ok(hash) if hash == *id.as_bytes() => {}
                Ok(_) => {
                    whole = false;
                    self.found.file(file, "its hash is not its name");
                }
                // Merged and removed.
                Err(RepoError::Missing { .. }) => {}
                Err(error) if error.is_refusal() => return Err(error),
                Err(error) => {
                    whole = false;
                    self.found.fault(file, &error);
                }
            }
        }
        if !whole {
            return Ok(IndexSays::default());
        }
        let says = match self.digests() {
            Ok(says) => says,
            // A merge went on beside this; all that it wrote was hashed by whoever wrote it.
            Err(RepoError::Missing { .. }) => return Ok(IndexSays::default()),
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => {
                self.found.fault("idx/", &error);
                return Ok(IndexSays::default());
            }
        };
        for (name, digest) in &says {
            let Some(pack) = packs.whole.get(name) else {
                continue;
            };
            if pack.digest != *digest {
                let pack = name.0.file_name(&name.1);
                let problem = format!("it does not say what the footer of {pack} says");
                self.found.file("idx/", problem);
            }
        }
        Ok(IndexSays { packs: Some(says) })
    }

    fn digests(&self) -> Result<HashMap<PackName, Digest>, RepoError> {
        self.repo.index().refresh()?;
        let mut merged = self.repo.index().entries()?;
        let mut digests: Vec<Digest> = vec![Digest::default(); merged.packs().len()];
        while let Some(entry) = merged.next()? {
            if let Some(digest) = digests.get_mut(entry.pack as usize) {
                digest.add(&entry);
            }
        }
        Ok(merged.packs().iter().copied().zip(digests).collect())
    }
}

/// Hashes a whole file.
pub(crate) fn hash_of(storage: &dyn Storage, file: &str) -> Result<[u8; 32], RepoError> {
    let len = storage.len(file)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let piece = PIECE.min(usize::try_from(len - at).unwrap_or(PIECE));
        storage.read_at(file, at, &mut buffer[..piece])?;
        hasher.update(&buffer[..piece]);
        at += piece as u64;
    }
    Ok(*hasher.finalize().as_bytes())
}

const PIECE: usize = 1 << 20;
