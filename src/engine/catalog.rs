//! An open repository and the questions that its snapshots answer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{EngineError, repository};
use super::outcome::{DiffOutcome, InitOutcome};
use super::plan::Geometry;
use super::selector::select;
use super::workers::blocking;
use crate::range::{ByteRange, RangeSet};
use crate::repo::{
    ChunkSize, Compression, DiskRecord, InitOptions, LocalStorage, Parity, PasswordCost, Pin,
    RepoError, Repository, Secret, Snapshot, SnapshotList, changed,
};

/// An open repository.
#[derive(Clone)]
pub struct Catalog {
    repository: Arc<Repository>,
    path: String,
}

/// What a new repository is to be.
#[derive(Debug)]
pub struct InitRequest {
    /// The size of its chunks in bytes.
    pub chunk_bytes: u64,
    /// Its usual compression, where it is not the program's.
    pub compression: Option<Compression>,
    /// What opens it, and what a guess at that costs; `None` stores all in the clear.
    pub secret: Option<(Secret, PasswordCost)>,
    /// How much of each pack can be computed again when it is damaged.
    pub parity: Parity,
}

/// Which snapshots a listing shows; what is `None` does not filter.
#[derive(Clone, Debug, Default)]
pub struct SnapshotFilter {
    /// The machine's name.
    pub name: Option<String>,
    /// A disk that the snapshot holds.
    pub disk: Option<String>,
    /// A tag that it has.
    pub tag: Option<String>,
    /// The newest of each machine, so many.
    pub latest: Option<usize>,
}

/// A listing of snapshots, oldest first.
#[derive(Clone, Debug)]
pub struct SnapshotsOutcome {
    /// Where the repository lies.
    pub repository: String,
    /// The snapshots.
    pub snapshots: Vec<Snapshot>,
    /// What could not be read, with the reason, a line each.
    pub unreadable: Vec<String>,
}

impl Catalog {
    /// Creates a repository in an empty or new directory.
    ///
    /// # Errors
    /// When the chunk size is not allowed, or the directory holds something or refuses.
    pub async fn init(path: PathBuf, request: InitRequest) -> Result<InitOutcome, EngineError> {
        let InitRequest {
            chunk_bytes,
            compression,
            secret,
            parity,
        } = request;
        let chunk_size = u32::try_from(chunk_bytes)
            .ok()
            .and_then(ChunkSize::new)
            .ok_or_else(|| {
                EngineError::Usage("the chunk size is a power of two from 64KiB to 4MiB".to_owned())
            })?;
        let options = InitOptions {
            chunk_size,
            compression: compression.unwrap_or_default(),
            parity,
        };
        let text = shown(&path);
        let failed = repository(&text);
        blocking(move || {
            let storage = Arc::new(LocalStorage::create(&path)?);
            let made = match secret {
                None => Repository::init(storage, &options),
                Some((secret, cost)) => {
                    Repository::init_encrypted(storage, &options, &secret, cost)
                }
            }?;
            made.make_reserve()?;
            Ok(made)
        })
        .await?
        .map(|made| InitOutcome {
            repository: text,
            uuid: made.uuid().to_string(),
            chunk_bytes,
            compression: options.compression.to_string(),
            encryption: made.encryption().as_str(),
            parity: made.parity().shards(),
        })
        .map_err(failed)
    }

    /// Opens the repository in a directory; an encrypted one needs a secret, and another one takes none.
    ///
    /// # Errors
    /// When there is none, it does not open with the secret, or it cannot be read.
    pub async fn open(path: PathBuf, secret: Option<Secret>) -> Result<Self, EngineError> {
        let text = shown(&path);
        let opened = blocking(
            move || match LocalStorage::open(&path).map_err(RepoError::from) {
                Ok(storage) => Repository::open_with(Arc::new(storage), secret.as_ref()),
                Err(RepoError::Missing { file }) => Err(RepoError::NotARepository { place: file }),
                Err(error) => Err(error),
            },
        )
        .await?;
        let repository = opened.map_err(repository(&text))?;
        Ok(Self {
            repository,
            path: text,
        })
    }

    /// Takes a repository that is open, wherever it lies; `place` is what messages call it.
    pub fn over(repository: Arc<Repository>, place: &str) -> Self {
        Self {
            repository,
            path: place.to_owned(),
        }
    }

    /// Keeps a snapshot from being removed as long as what is returned lives, whoever forgets it meanwhile.
    ///
    /// Where the repository cannot be written to, it is read without that.
    pub(super) async fn pin(&self, snapshot: &Snapshot) -> Result<Option<Pin>, EngineError> {
        let (repository, id) = (Arc::clone(&self.repository), snapshot.id);
        match blocking(move || repository.pin(&[id])).await? {
            Ok(pin) => Ok(Some(pin)),
            Err(error @ (RepoError::Io { .. } | RepoError::NoRoom { .. })) => {
                tracing::warn!(%error, "the snapshot is read without being kept from a prune");
                Ok(None)
            }
            Err(other) => Err(self.failed()(other)),
        }
    }

    /// Where the repository lies, as the user gave it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The repository itself.
    pub fn repository(&self) -> &Arc<Repository> {
        &self.repository
    }

    /// The error of this repository with a cause.
    pub(crate) fn failed(&self) -> impl Fn(RepoError) -> EngineError + Clone + Send + use<> {
        repository(&self.path)
    }

    /// The chunk size and a disk's size.
    pub(crate) fn geometry(&self, size_bytes: u64) -> Geometry {
        Geometry {
            size_bytes,
            chunk_bytes: u64::from(self.repository.chunk_size().bytes()),
        }
    }

    /// Reads all snapshots, oldest first.
    pub(crate) async fn snapshots(&self) -> Result<SnapshotList, EngineError> {
        let repository = Arc::clone(&self.repository);
        blocking(move || repository.snapshots())
            .await?
            .map_err(self.failed())
    }

    /// Finds a snapshot by an id's first characters, `latest`, NAME, `NAME@latest` or `NAME@TIME`.
    ///
    /// # Errors
    /// When none or several match, or the repository cannot be read.
    pub async fn find(&self, words: &str) -> Result<Snapshot, EngineError> {
        self.find_among_all(words).await.map(|(found, _)| found)
    }

    /// As [`Catalog::find`], with all snapshots that could be read.
    pub(crate) async fn find_among_all(
        &self,
        words: &str,
    ) -> Result<(Snapshot, Vec<Snapshot>), EngineError> {
        let list = self.snapshots().await?;
        match select(&list.snapshots, words) {
            Ok(found) => Ok((found.clone(), list.snapshots)),
            // A damaged snapshot must not look like one that never was.
            Err(EngineError::SnapshotNotFound(_)) if !list.unreadable.is_empty() => {
                let (_, cause) = list
                    .unreadable
                    .into_iter()
                    .max_by_key(|(file, _)| file.contains(&words.to_ascii_lowercase()))
                    .expect("the list is not empty");
                Err(self.failed()(cause))
            }
            Err(error) => Err(error),
        }
    }

    /// Lists snapshots, oldest first.
    ///
    /// # Errors
    /// When the repository cannot be listed; a snapshot that cannot be read is only named.
    pub async fn list(&self, filter: &SnapshotFilter) -> Result<SnapshotsOutcome, EngineError> {
        let list = self.snapshots().await?;
        let mut snapshots = list.snapshots;
        snapshots.retain(|s| {
            filter.name.as_ref().is_none_or(|n| s.draft.name == *n)
                && filter
                    .disk
                    .as_ref()
                    .is_none_or(|d| s.draft.disks.iter().any(|r| r.disk == *d))
                && filter.tag.as_ref().is_none_or(|t| s.draft.tags.contains(t))
        });
        if let Some(most) = filter.latest {
            let mut seen: HashMap<String, usize> = HashMap::new();
            let mut keep: Vec<bool> = snapshots
                .iter()
                .rev()
                .map(|s| {
                    let count = seen.entry(s.draft.name.clone()).or_default();
                    *count += 1;
                    *count <= most
                })
                .collect();
            snapshots.retain(|_| keep.pop().unwrap_or(false));
        }
        let unreadable = list
            .unreadable
            .into_iter()
            .map(|(file, why)| format!("{file}: {why}"))
            .collect();
        Ok(SnapshotsOutcome {
            repository: self.path.clone(),
            snapshots,
            unreadable,
        })
    }

    /// Finds the ranges, rounded out to chunks, in which two snapshots of a disk differ.
    ///
    /// # Errors
    /// When a snapshot or the disk is unknown, or a map cannot be read.
    pub async fn diff(
        &self,
        a: &str,
        b: &str,
        disk: Option<&str>,
    ) -> Result<DiffOutcome, EngineError> {
        let (a, b) = (self.find(a).await?, self.find(b).await?);
        let left = disk_of(&a, disk)?.clone();
        let right = disk_of(&b, disk.or(Some(&left.disk)))?.clone();
        let repository = Arc::clone(&self.repository);
        let sizes_bytes = [left.size_bytes, right.size_bytes];
        let geometry = self.geometry(left.size_bytes.max(right.size_bytes));
        let name = left.disk.clone();
        let ranges = blocking(move || {
            let left = repository.map(&left.root, left.size_bytes)?;
            let right = repository.map(&right.root, right.size_bytes)?;
            let mut ranges = RangeSet::new();
            changed(&left, &right, &mut |chunks| {
                ranges.insert(geometry.bytes(&chunks));
                Ok(())
            })?;
            // A disk reads as nothing past its end, which is not the same as zeros.
            let [short, long] = if sizes_bytes[0] < sizes_bytes[1] {
                sizes_bytes
            } else {
                [sizes_bytes[1], sizes_bytes[0]]
            };
            ranges.extend(ByteRange::new(short, long));
            Ok(ranges.iter().collect())
        })
        .await?
        .map_err(self.failed())?;
        Ok(DiffOutcome {
            a: a.id.to_string(),
            b: b.id.to_string(),
            disk: name,
            sizes_bytes,
            ranges,
        })
    }
}

/// Picks a snapshot's disk: the one named, or the only one.
pub(crate) fn disk_of<'a>(
    snapshot: &'a Snapshot,
    disk: Option<&str>,
) -> Result<&'a DiskRecord, EngineError> {
    let unknown = |problem: String| EngineError::DiskUnknown {
        snapshot: snapshot.id.to_string(),
        problem,
        disks: snapshot
            .draft
            .disks
            .iter()
            .map(|d| d.disk.clone())
            .collect(),
    };
    match (disk, &snapshot.draft.disks[..]) {
        (Some(name), disks) => disks
            .iter()
            .find(|d| d.disk == name)
            .ok_or_else(|| unknown(format!("has no disk {name}"))),
        (None, [one]) => Ok(one),
        (None, _) => Err(unknown("has several disks".to_owned())),
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
