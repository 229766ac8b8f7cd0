//! Mending: the index made anew from packs alone, and damaged packs and snapshots fetched from a copy.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::bad::BadRecords;
use super::error::RepoError;
use super::format::FileKind;
use super::format::envelope::MAX_SMALL_FILE;
use super::format::generation::PackName;
use super::format::pack::PackKind;
use super::format::segment::{self, SegmentEntry};
use super::index::Index;
use super::pack::{Footer, read_footer};
use super::rebuild::{SEGMENT_ENTRIES, add_all};
use super::repository::{Repository, create};
use super::snapshot::Snapshot;
use super::storage::{LocalStorage, Storage, StorageError};
use super::verify::{RecordBuffers, read_verified_in};

/// What was fetched from a copy.
#[derive(Clone, Debug, Default)]
pub struct Repaired {
    /// The files that were fetched and are whole now.
    pub fetched: Vec<String>,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// The files that the copy cannot give, with the reasons.
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
        let folder =
            tempfile::tempdir().map_err(|e| RepoError::io("make a temporary folder", e))?;
        let scratch = Index::new(Arc::new(LocalStorage::create(folder.path())?));
        let (mut entries, mut table): (Vec<SegmentEntry>, Vec<PackName>) = Default::default();
        // The packs that are listed here may be seen before they are durable.
        self.storage().barrier()?;
        for kind in [PackKind::Data, PackKind::Meta] {
            for file in self.storage().list(kind.folder())? {
                let Some(pack) = kind.parse_file_name(&file.name) else {
                    continue;
                };
                match read_footer(&**self.storage(), self.uuid(), kind, pack) {
                    Ok(footer) => {
                        table.push((kind, pack));
                        add_all(&mut entries, table.len() as u32 - 1, &footer);
                    }
                    Err(error @ RepoError::Io { .. }) if !error.is_bad_medium() => {
                        return Err(error);
                    }
                    // Reported by the check.
                    Err(_) => {}
                }
                if entries.len() >= SEGMENT_ENTRIES {
                    scratch.add(std::mem::take(&mut entries), &table)?;
                    table.clear();
                }
            }
        }
        if !entries.is_empty() {
            scratch.add(entries, &table)?;
        }
        let replaced = names.len();
        self.index().rewrite(&mut scratch.entries()?, names)?;
        Ok(Replaced { replaced })
    }

    /// Fetches packs that are marked as damaged, and snapshots that cannot be read, from a copy of this repository's
    /// files; each is proved before it takes its place.
    pub fn repair_from(&self, copy: &dyn Storage) -> Result<Repaired, RepoError> {
        let mut done = Repaired::default();
        let list = self.snapshots()?;
        let mut unreadable: Vec<String> = list.unreadable.into_iter().map(|(f, _)| f).collect();
        for gone in &list.forgotten {
            if let Err(RepoError::Corrupt { file, .. }) = self.snapshot(&gone.snapshot.id) {
                unreadable.push(file);
            }
        }
        for file in unreadable.iter().filter(|file| file.starts_with("snap/")) {
            self.fetch_snapshot(copy, file, &mut done)?;
        }
        let bad = BadRecords::load(self)?;
        let packs: BTreeSet<PackName> = bad.files().iter().map(|(_, mark)| mark.pack).collect();
        for name in packs {
            let file = name.0.file_name(&name.1);
            if self.prove(&**self.storage(), &name).is_ok() {
                done.whole.push(file);
            } else {
                match self.fetch_pack(copy, &name) {
                    Ok(bytes) => {
                        done.fetched_bytes += bytes;
                        done.fetched.push(file);
                    }
                    Err(error @ (RepoError::NoRoom { .. } | RepoError::Io { .. })) => {
                        return Err(error);
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
        let bytes = match fetched {
            Ok(bytes) => bytes,
            Err(error) => {
                done.failed.push((file.to_owned(), error));
                return Ok(());
            }
        };
        match self.storage().remove(file) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        create(&**self.storage(), file, &bytes)?;
        done.fetched_bytes += bytes.len() as u64;
        done.fetched.push(file.to_owned());
        Ok(())
    }

    /// Proves all of a copy's pack, then puts it in the place of what is here.
    fn fetch_pack(&self, copy: &dyn Storage, name: &PackName) -> Result<u64, RepoError> {
        let footer = self.prove(copy, name)?;
        let file = name.0.file_name(&name.1);
        let mut new = self.storage().create()?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while at < footer.len {
            let piece = PIECE.min(usize::try_from(footer.len - at).unwrap_or(PIECE));
            copy.read_at(&file, at, &mut buffer[..piece])?;
            new.write(&buffer[..piece])?;
            at += piece as u64;
        }
        match self.storage().remove(&file) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        new.publish(&file)?;
        self.storage().barrier()?;
        // Read back: the copy may have changed between being proved and being read.
        self.prove(&**self.storage(), name)?;
        Ok(footer.len)
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

const PIECE: usize = 1 << 20;
