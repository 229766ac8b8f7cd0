//! Mending: the index made anew from packs alone, damaged packs from parity or a copy, damaged snapshots from a copy.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::bad::BadRecords;
use super::error::{RepoError, unless_refused};
use super::format::FileKind;
use super::format::envelope::MAX_SMALL_FILE;
use super::format::generation::PackName;
use super::format::pack::MAX_PACK;
use super::format::parity::file_name as parity_file;
use super::format::segment;
use super::format::snapshot::file_name as snapshot_file;
use super::pack::{Footer, list_packs, read_footer};
use super::parity::{self, Parity, Shards};
use super::rebuild::{Gather, Scratch};
use super::repository::Repository;
use super::snapshot::Snapshot;
use super::storage::{MemoryStorage, Storage, StorageError};
use super::verify::{RecordBuffers, read_verified_in};

/// What was mended, and what could not be.
#[derive(Clone, Debug, Default)]
pub struct Repaired {
    /// The packs that were computed from their parity and are whole now.
    pub mended: Vec<String>,
    /// The files that were fetched and are whole now.
    pub fetched: Vec<String>,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// The files that neither parity nor the copy can give, with the reasons.
    pub failed: Vec<(String, RepoError)>,
    /// The files that turned out to be whole.
    pub whole: Vec<String>,
}

/// What the index was made anew of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replaced {
    /// The segments that the new one takes the place of.
    pub(crate) replaced: usize,
}

impl Repository {
    /// Writes the index anew from the packs' footers, in the place of all segments that there are.
    pub(crate) fn replace_index(&self) -> Result<Replaced, RepoError> {
        // Listed before the packs: what these segments know of is there then. Later ones stay.
        let files = self.storage().list("idx/")?;
        let names: Vec<_> = files
            .iter()
            .filter_map(|f| segment::parse_file_name(&f.name))
            .collect();
        let scratch = Scratch::new()?;
        let mut gather = Gather::into(&scratch.index);
        // The packs that are listed here may be seen before they are durable.
        self.storage().barrier()?;
        for name in list_packs(&**self.storage())?.into_keys() {
            let footer = read_footer(&**self.storage(), self.uuid(), name.0, name.1);
            // A damaged one is reported by the check.
            if let Ok(footer) = unless_refused(footer)? {
                gather.add(name, &footer)?;
            }
        }
        gather.finish()?;
        let replaced = names.len();
        self.index().rewrite(&mut scratch.index.entries()?, names)?;
        Ok(Replaced { replaced })
    }

    /// Mends packs that are marked as damaged, from their parity or from a copy of this repository's files, and fetches
    /// snapshots that cannot be read from that copy; each is proved before it takes its place.
    pub fn repair(&self, copy: Option<&dyn Storage>) -> Result<Repaired, RepoError> {
        self.check_writable()?;
        let mut done = Repaired::default();
        if let Some(copy) = copy {
            self.fetch_snapshots(copy, &mut done)?;
        }
        let bad = BadRecords::load(self)?;
        let packs: BTreeSet<PackName> = bad.files().iter().map(|(_, mark)| mark.pack).collect();
        for name in packs {
            let file = name.0.file_name(&name.1);
            if unless_refused(self.prove(&**self.storage(), &name))?.is_ok() {
                done.whole.push(file);
            } else {
                match self.mend_pack(copy, &name)? {
                    Ok(Mended::Computed) => done.mended.push(file),
                    Ok(Mended::Fetched(bytes)) => {
                        done.fetched_bytes += bytes;
                        done.fetched.push(file);
                    }
                    Err(error) => {
                        done.failed.push((file, error));
                        continue;
                    }
                }
            }
            for (mark, _) in bad.files().iter().filter(|(_, m)| m.pack == name) {
                match self.storage().remove(mark) {
                    Ok(()) | Err(StorageError::Missing { .. }) => {}
                    Err(other) => return Err(other.into()),
                }
            }
        }
        self.storage().barrier()?;
        self.rebuild_index()?;
        Ok(done)
    }

    /// Writes the parity of packs anew that have none or a damaged one, where packs are to have it, and only of packs
    /// that are proved whole; returns the files.
    ///
    /// With `compare_packs` all of each pack is compared with the sums that its parity holds, and not the parity only.
    pub fn mend_parity(&self, compare_packs: bool) -> Result<Vec<String>, RepoError> {
        self.check_writable()?;
        let mut made = Vec::new();
        if self.parity() == Parity::NONE {
            return Ok(made);
        }
        let storage = &**self.storage();
        for name in list_packs(storage)?.into_keys() {
            let whole = parity::read_header(storage, self.uuid(), &name)
                .and_then(|header| Shards::read(storage, header, !compare_packs));
            let is_there = match unless_refused(whole)? {
                Ok(shards) if shards.lost() == 0 => continue,
                Err(RepoError::Missing { .. }) => false,
                Ok(_) | Err(_) => true,
            };
            // A damaged pack is reported by whoever looks for those; its parity stays as it is.
            let Ok(footer) = unless_refused(self.prove(storage, &name))? else {
                continue;
            };
            let parity = self.parity();
            parity::write(storage, self.uuid(), &name, footer.len, parity, is_there)?;
            made.push(parity_file(&name.1));
        }
        storage.barrier()?;
        Ok(made)
    }

    /// Puts a pack that proved to be whole in the place of a damaged one: computed from its parity, else from the copy.
    fn mend_pack(
        &self,
        copy: Option<&dyn Storage>,
        name: &PackName,
    ) -> Result<Result<Mended, RepoError>, RepoError> {
        let no_parity = match unless_refused(parity::rebuild(&**self.storage(), self.uuid(), name))?
        {
            Ok(bytes) => match self.replace_pack(name, bytes)? {
                Ok(_) => return Ok(Ok(Mended::Computed)),
                Err(error) => error,
            },
            Err(error) => error,
        };
        let Some(copy) = copy else {
            return Ok(Err(no_parity));
        };
        match unless_refused(read_pack(copy, self, name))? {
            Ok(bytes) => Ok(self.replace_pack(name, bytes)?.map(Mended::Fetched)),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Fetches the snapshots that cannot be read.
    fn fetch_snapshots(&self, copy: &dyn Storage, done: &mut Repaired) -> Result<(), RepoError> {
        let list = self.snapshots()?;
        let mut unreadable: Vec<String> = list.unreadable.into_iter().map(|(f, _)| f).collect();
        for gone in &list.forgotten {
            let id = &gone.snapshot.id;
            if self.snapshot(id).is_err_and(|error| error.is_damage()) {
                unreadable.push(snapshot_file(id));
            }
        }
        for file in unreadable.iter().filter(|file| file.starts_with("snap/")) {
            self.fetch_snapshot(copy, file, done)?;
        }
        Ok(())
    }

    fn fetch_snapshot(
        &self,
        copy: &dyn Storage,
        file: &str,
        done: &mut Repaired,
    ) -> Result<(), RepoError> {
        let fetched = copy
            .read(file, MAX_SMALL_FILE)
            .map_err(RepoError::from)
            .and_then(|bytes| {
                let snapshot =
                    Snapshot::decode(&bytes, FileKind::Snapshot, self.keys(), self.chunk_size())
                        .map_err(|e| e.in_file(file))?;
                let id = file.strip_prefix("snap/").and_then(|id| id.parse().ok());
                let id = id.ok_or_else(|| RepoError::corrupt(file, 0, "no snapshot's name"))?;
                self.check_identity(&snapshot, &id, file)?;
                Ok(bytes)
            });
        let bytes = match unless_refused(fetched)? {
            Ok(bytes) => bytes,
            Err(error) => {
                done.failed.push((file.to_owned(), error));
                return Ok(());
            }
        };
        let mut new = self.storage().create()?;
        new.write(&bytes)?;
        new.replace(file)?;
        done.fetched_bytes += bytes.len() as u64;
        done.fetched.push(file.to_owned());
        Ok(())
    }

    /// Proves the bytes of a pack, then puts them in the place of what is here; returns their number, or what is wrong
    /// with them. Fails when they cannot be written or made durable.
    fn replace_pack(
        &self,
        name: &PackName,
        bytes: Vec<u8>,
    ) -> Result<Result<u64, RepoError>, RepoError> {
        let file = name.0.file_name(&name.1);
        let bytes = Arc::new(bytes);
        let staged = MemoryStorage::holding(&file, Arc::clone(&bytes));
        let footer = match self.prove(&staged, name) {
            Ok(footer) => footer,
            Err(error) => return Ok(Err(error)),
        };
        let mut new = self.storage().create()?;
        new.write(&bytes)?;
        new.replace(&file)?;
        self.storage().barrier()?;
        // Read back: what the medium gives from now on is what counts.
        Ok(unless_refused(self.prove(&**self.storage(), name))?.map(|_| footer.len))
    }

    fn prove(&self, storage: &dyn Storage, name: &PackName) -> Result<Footer, RepoError> {
        let footer = read_footer(storage, self.uuid(), name.0, name.1)?;
        let mut buffers = RecordBuffers::default();
        for entry in &footer.entries {
            read_verified_in(self, storage, name, entry, &mut buffers)?;
        }
        Ok(footer)
    }
}

/// How a pack was mended.
enum Mended {
    /// It was computed from its parity.
    Computed,
    /// So many bytes were fetched from a copy.
    Fetched(u64),
}

/// Reads a pack of a copy, which is proved later.
fn read_pack(copy: &dyn Storage, repo: &Repository, name: &PackName) -> Result<Vec<u8>, RepoError> {
    // Its footer bounds its length.
    read_footer(copy, repo.uuid(), name.0, name.1)?;
    Ok(copy.read(&name.0.file_name(&name.1), MAX_PACK)?)
}
