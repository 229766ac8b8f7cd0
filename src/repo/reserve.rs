//! A file that takes room while there is some, so that a full disk has room for the lists of what a prune removes.

use super::error::RepoError;
use super::ids::random_bytes;
use super::repository::{Repository, create};
use super::storage::StorageError;

impl Repository {
    /// Sets room aside, or as much of it as there is.
    pub fn make_reserve(&self) -> Result<(), RepoError> {
        self.check_writable()?;
        match self.storage().len(RESERVE) {
            Ok(len) if len >= RESERVE_BYTES as u64 => return Ok(()),
            // There was less room then.
            Ok(_) => self.spend_reserve()?,
            Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        // Some file systems store nothing for zeros, or little for what repeats.
        let mut noise = vec![0; RESERVE_BYTES];
        let seed = blake3::Hasher::new_keyed(&random_bytes()?);
        seed.finalize_xof().fill(&mut noise);
        while noise.len() >= LEAST_BYTES {
            match create(&**self.storage(), RESERVE, &noise) {
                Ok(()) | Err(RepoError::NotEmpty { .. }) => return Ok(()),
                Err(RepoError::NoRoom { .. }) => noise.truncate(noise.len() / 2),
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }

    /// Gives the room back.
    pub(crate) fn spend_reserve(&self) -> Result<(), RepoError> {
        match self.storage().remove(RESERVE) {
            Ok(()) | Err(StorageError::Missing { .. }) => Ok(()),
            Err(other) => Err(other.into()),
        }
    }
}

const RESERVE: &str = "reserve";

/// Room for the names of more than 200,000 packs.
const RESERVE_BYTES: usize = 4 << 20;

/// Room for a few thousand names.
const LEAST_BYTES: usize = 64 << 10;
