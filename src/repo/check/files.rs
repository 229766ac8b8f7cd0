//! The small files: whether each is readable, and mending those that exist twice.

use super::{Check, DamagedFile};
use crate::repo::bad;
use crate::repo::error::RepoError;
use crate::repo::format::envelope::MAX_SMALL_FILE;
use crate::repo::format::pack::PackKind;
use crate::repo::format::parity;
use crate::repo::format::segment;
use crate::repo::generations;
use crate::repo::repository::create;
use crate::repo::storage::StorageError;
use crate::repo::verified::Journal;

impl Check<'_> {
    /// Looks at all that is neither a pack, nor index, nor snapshot.
    pub(super) fn small_files(&mut self) -> Result<(), RepoError> {
        for (file, error) in self.repo.copies_damaged()? {
            self.found.fault(file, &error);
        }
        let unreadable = std::mem::take(&mut self.bad.unreadable);
        for (file, error) in &unreadable {
            self.found.fault(file, error);
        }
        for (file, error) in &Journal::load(self.repo)?.unreadable {
            self.found.fault(file, error);
        }
        match generations::load(&**self.repo.storage(), self.repo.keys().mac()) {
            Ok(_) => {}
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => self.found.fault(file_of(&error, "gc/"), &error),
        }
        for file in self.repo.storage().list("")? {
            if !is_ours(&file.name) && self.found.strangers.len() < STRANGERS {
                self.found.strangers.push(file.name);
            }
        }
        self.found.strangers.sort();
        Ok(())
    }

    /// Writes damaged or lost copies of small files again, and removes lists that are of no use.
    pub(super) fn mend_copies(&mut self) -> Result<(), RepoError> {
        let storage = &**self.repo.storage();
        let damaged: Vec<String> = self.found.files.iter().map(|f| f.file.clone()).collect();
        for file in damaged {
            let useless = file.starts_with("verify/");
            let twin = twin(&file);
            if !useless && twin.is_none() {
                continue;
            }
            let good = match &twin {
                Some(twin) => match storage.read(twin, MAX_SMALL_FILE) {
                    Ok(bytes) if !self.found.files.iter().any(|f| f.file == *twin) => Some(bytes),
                    _ => continue,
                },
                None => None,
            };
            match storage.remove(&file) {
                Ok(()) | Err(StorageError::Missing { .. }) => {}
                Err(other) => return Err(other.into()),
            }
            if let Some(good) = good {
                create(storage, &file, &good)?;
            }
            self.found.repaired(|f: &DamagedFile| f.file == file);
        }
        storage.barrier()?;
        Ok(())
    }

    /// Removes the marks that cannot be read, once all records were read and what is damaged is marked anew.
    ///
    /// Never earlier: a prune that sees no mark of a damaged record may keep that one of two copies.
    pub(super) fn remove_unreadable_marks(&mut self) -> Result<(), RepoError> {
        if self.options.read_data_percent != Some(100.0) {
            return Ok(());
        }
        let is_mark = |f: &DamagedFile| f.file.starts_with(bad::FOLDER);
        let found = self.found.files.iter().filter(|f| is_mark(f));
        for file in found.map(|f| f.file.clone()).collect::<Vec<_>>() {
            match self.repo.storage().remove(&file) {
                Ok(()) | Err(StorageError::Missing { .. }) => {}
                Err(other) => return Err(other.into()),
            }
            self.found.repaired(|f| f.file == file);
        }
        Ok(())
    }
}

/// The other copy of a file that exists twice.
fn twin(file: &str) -> Option<String> {
    if file != "config" && file != "config.bak" && !file.starts_with("keys/") {
        return None;
    }
    Some(match file.strip_suffix(".bak") {
        Some(first) => first.to_owned(),
        None => format!("{file}.bak"),
    })
}

fn file_of(error: &RepoError, otherwise: &str) -> String {
    match error {
        RepoError::Corrupt { file, .. } | RepoError::Unsupported { file, .. } => file.clone(),
        _ => otherwise.to_owned(),
    }
}

/// Whether a file's name is one that a repository has.
fn is_ours(name: &str) -> bool {
    let Some((folder, rest)) = name.split_once('/') else {
        return ["config", "config.bak", "reserve"].contains(&name);
    };
    match folder {
        "packs" => PackKind::Data.parse_file_name(name).is_some(),
        "meta" => PackKind::Meta.parse_file_name(name).is_some(),
        "idx" => segment::parse_file_name(name).is_some(),
        "snap" | "forget" | "bad" | "verify" => {
            rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit())
        }
        "parity" => parity::parse_file_name(name).is_some(),
        "keys" | "sess" | "ckpt" | "gc" => true,
        _ => false,
    }
}

/// How many strange files are named.
const STRANGERS: usize = 100;
