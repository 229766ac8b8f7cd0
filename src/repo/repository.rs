//! A repository: making one, opening one, its snapshots and maps.

use std::sync::Arc;

use super::chunk::ChunkSize;
use super::cipher::Encryption;
use super::compress::Compression;
use super::error::{RepoError, unless_refused};
use super::forget::Forgotten;
use super::format::config::Config;
use super::format::envelope::MAX_SMALL_FILE;
use super::format::generation::is_fence;
use super::format::key_slot::{ClearKey, Master};
use super::format::snapshot::file_name;
use super::format::{DecodeError, FileKind};
use super::ids::{RepoUuid, SnapshotId};
use super::index::Index;
use super::key_slots::{Unlocked, damaged_slots, first_slot, is_first_slot, unlock};
use super::keys::Keys;
use super::map::{MapReader, Nodes};
use super::parity::Parity;
use super::secret::{PasswordCost, Secret};
use super::session::{Session, SessionOptions};
use super::snapshot::{MapRoot, Snapshot};
use super::storage::{Storage, StorageError};

/// An opened repository; shared between threads.
#[derive(Debug)]
pub struct Repository {
    storage: Arc<dyn Storage>,
    config: Config,
    keys: Arc<Keys>,
    master: ClearKey,
    slot: Option<u32>,
    index: Arc<Index>,
    nodes: Arc<Nodes>,
    damaged: Vec<(String, RepoError)>,
}

/// What a new repository is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InitOptions {
    /// The size of all chunks, for good.
    pub chunk_size: ChunkSize,
    /// How chunks are compressed unless a session says otherwise.
    pub compression: Compression,
    /// How much of each pack can be computed again when it is damaged.
    pub parity: Parity,
}

/// The snapshots of a repository.
#[derive(Clone, Debug, Default)]
pub struct SnapshotList {
    /// Those that can be read and are not forgotten, by their start, then by id.
    pub snapshots: Vec<Snapshot>,
    /// Those that are forgotten, as far as that still matters to anybody: what a disk's chain of bitmaps went through.
    pub forgotten: Vec<Forgotten>,
    /// The files that cannot be read, with the reasons.
    pub unreadable: Vec<(String, RepoError)>,
}

impl Repository {
    /// Makes a repository that is not encrypted in an empty place.
    pub fn init(storage: Arc<dyn Storage>, options: &InitOptions) -> Result<Arc<Self>, RepoError> {
        Self::make(storage, options, None)
    }

    /// Makes an encrypted repository in an empty place, which the secret opens; a guess at a password costs `cost`.
    pub fn init_encrypted(
        storage: Arc<dyn Storage>,
        options: &InitOptions,
        secret: &Secret,
        cost: PasswordCost,
    ) -> Result<Arc<Self>, RepoError> {
        Self::make(storage, options, Some((secret, cost)))
    }

    fn make(
        storage: Arc<dyn Storage>,
        options: &InitOptions,
        secret: Option<(&Secret, PasswordCost)>,
    ) -> Result<Arc<Self>, RepoError> {
        let found = storage.list("")?;
        if let Some(file) = found.iter().find(|file| !is_first_slot(&file.name)) {
            return Err(not_empty(&*storage, &file.name));
        }
        let unlocked = first_slot(&*storage, secret, !found.is_empty())?;
        let encryption = match secret {
            None => Encryption::None,
            Some(_) => Encryption::Aes256Gcm,
        };
        let keys = Keys::derive(&unlocked.master.0, encryption);
        let config = Config::new(
            options.chunk_size,
            options.compression,
            encryption,
            options.parity,
        )?;
        let file = config.encode(keys.mac())?;
        storage.barrier()?;
        create(&*storage, CONFIG_FILES[1], &file)?;
        storage.barrier()?;
        create(&*storage, CONFIG_FILES[0], &file)?;
        storage.barrier()?;
        Self::open_unlocked(storage, unlocked)
    }

    /// Opens a repository that is not encrypted.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Arc<Self>, RepoError> {
        Self::open_with(storage, None)
    }

    /// Opens a repository; an encrypted one needs a secret, and another one takes none.
    pub fn open_with(
        storage: Arc<dyn Storage>,
        secret: Option<&Secret>,
    ) -> Result<Arc<Self>, RepoError> {
        if !is_present(&*storage)? {
            return Err(RepoError::NotARepository {
                place: storage.place(),
            });
        }
        let unlocked = unlock(&*storage, secret)?;
        Self::open_unlocked(storage, unlocked)
    }

    fn open_unlocked(
        storage: Arc<dyn Storage>,
        unlocked: Unlocked,
    ) -> Result<Arc<Self>, RepoError> {
        let Unlocked {
            master,
            slot,
            mut damaged,
        } = unlocked;
        let keys = Keys::derive(&master.0, Encryption::None);
        let config = first_good(&CONFIG_FILES, &mut damaged, |file| {
            let bytes = storage.read(file, MAX_SMALL_FILE)?;
            Config::decode(&bytes, keys.mac()).map_err(|e| e.in_file(file))
        })?;
        let keys = Arc::new(Keys::derive(&master.0, config.encryption));
        let index = Arc::new(Index::new(Arc::clone(&storage)));
        let nodes = Nodes::new(
            Arc::clone(&storage),
            config.uuid,
            Arc::clone(&keys),
            Arc::clone(&index),
        );
        for (file, error) in &damaged {
            tracing::error!(%error, file, "a copy of a small file is damaged; its other copy is used");
        }
        Ok(Arc::new(Self {
            storage,
            config,
            keys,
            master,
            slot,
            index,
            nodes: Arc::new(nodes),
            damaged,
        }))
    }

    /// The repository's identifier.
    pub fn uuid(&self) -> RepoUuid {
        self.config.uuid
    }

    /// The size of all of its chunks.
    pub fn chunk_size(&self) -> ChunkSize {
        self.config.chunk_size
    }

    /// How chunks are compressed unless a session says otherwise.
    pub fn compression(&self) -> Compression {
        self.config.compression
    }

    /// How many lost parts of each new pack its parity makes up for.
    pub fn parity(&self) -> Parity {
        self.config.parity
    }

    /// Whether and how it is encrypted.
    pub fn encryption(&self) -> Encryption {
        self.config.encryption
    }

    /// Returns what was found damaged so far and done without: copies of small files, and index segments.
    pub fn damaged(&self) -> Vec<(String, RepoError)> {
        let mut all = self.damaged.clone();
        all.extend(self.index.damaged());
        all
    }

    /// Reads all copies of the configuration and of key slots; returns those that are damaged or missing.
    pub(super) fn copies_damaged(&self) -> Result<Vec<(String, RepoError)>, RepoError> {
        let mut damaged = damaged_slots(&*self.storage)?;
        for file in CONFIG_FILES {
            let read = self
                .storage
                .read(file, MAX_SMALL_FILE)
                .map_err(RepoError::from);
            let decoded = read.and_then(|bytes| {
                Config::decode(&bytes, self.keys.mac()).map_err(|e| e.in_file(file))
            });
            match decoded {
                Ok(_) => {}
                Err(error) if error.is_refusal() => return Err(error),
                Err(error) => damaged.push((file.to_owned(), error)),
            }
        }
        Ok(damaged)
    }

    /// Reads all snapshots that are not forgotten; one that cannot be read does not hide the others.
    pub fn snapshots(&self) -> Result<SnapshotList, RepoError> {
        let mut list = SnapshotList::default();
        let files = self.storage.list("snap/")?;
        // Read after the list: what is forgotten meanwhile is left out.
        let forgotten = self.forgotten()?;
        list.unreadable = forgotten.unreadable;
        for file in files {
            let id = file.name.strip_prefix("snap/").map(str::parse);
            let read = match id {
                Some(Ok(id)) if forgotten.ids.contains(&id) => continue,
                Some(Ok(id)) => self.snapshot(&id),
                _ => Err(RepoError::corrupt(
                    &file.name,
                    0,
                    "this is no snapshot's name",
                )),
            };
            match read {
                Ok(snapshot) => list.snapshots.push(snapshot),
                // Removed since it was listed, or the fence of a session that never committed.
                Err(RepoError::NoSuchSnapshot { .. }) => {}
                // It says nothing about the file.
                Err(error) if error.is_refusal() => return Err(error),
                Err(error) => list.unreadable.push((file.name, error)),
            }
        }
        list.snapshots
            .sort_by_key(|s| (s.draft.started_unix_nanos, s.id));
        list.unreadable.sort_by(|a, b| a.0.cmp(&b.0));
        list.forgotten = forgotten.snapshots;
        Ok(list)
    }

    /// Reads one snapshot, forgotten or not.
    pub fn snapshot(&self, id: &SnapshotId) -> Result<Snapshot, RepoError> {
        let file = file_name(id);
        let bytes = match self.storage.read(&file, MAX_SMALL_FILE) {
            Ok(bytes) => bytes,
            Err(StorageError::Missing { .. }) => return Err(RepoError::NoSuchSnapshot { id: *id }),
            Err(other) => return Err(other.into()),
        };
        if is_fence(&bytes, self.keys.mac()) {
            return Err(RepoError::NoSuchSnapshot { id: *id });
        }
        let snapshot = Snapshot::decode(&bytes, FileKind::Snapshot, &self.keys, self.chunk_size())
            .map_err(|e| e.in_file(&file))?;
        self.check_identity(&snapshot, id, &file)?;
        Ok(snapshot)
    }

    /// Fails when a snapshot is another one than its file's name says.
    pub(super) fn check_identity(
        &self,
        snapshot: &Snapshot,
        id: &SnapshotId,
        file: &str,
    ) -> Result<(), RepoError> {
        if snapshot.id == *id && snapshot.repo == self.uuid() {
            return Ok(());
        }
        let what = format!(
            "it holds snapshot {} of repository {}",
            snapshot.id, snapshot.repo
        );
        Err(RepoError::corrupt(file, 0, what))
    }

    /// Opens the map of a disk of `disk_bytes` bytes.
    pub fn map(&self, root: &MapRoot, disk_bytes: u64) -> Result<MapReader, RepoError> {
        let chunks = self.chunk_size().count(disk_bytes);
        MapReader::new(Arc::clone(&self.nodes), *root, chunks)
    }

    /// Begins a session, which stores chunks and maps and ends by committing one snapshot.
    pub fn begin(self: &Arc<Self>, options: &SessionOptions) -> Result<Session, RepoError> {
        self.check_writable()?;
        let swept = self.storage.sweep()?;
        if swept > 0 {
            tracing::info!(files = swept, "removed what a killed session was writing");
        }
        Session::begin(Arc::clone(self), options)
    }

    /// Merges index segments, as long as no merge has more than `most_entries`, and returns how many merges there were.
    pub fn merge_index(&self, most_entries: u64) -> Result<u64, RepoError> {
        self.check_writable()?;
        self.index.merge(most_entries)
    }

    /// Fails when a newer program uses this repository in a way that this one, which does not know it, could break.
    pub(super) fn check_writable(&self) -> Result<(), RepoError> {
        match self.config.features.writable() {
            true => Ok(()),
            false => Err(RepoError::Unsupported {
                file: CONFIG_FILES[0].to_owned(),
                what: format!("features {:#x} for writing", self.config.features.ro_compat),
            }),
        }
    }

    /// The number of index segments that a look-up may have to ask.
    pub fn index_segments(&self) -> Result<usize, RepoError> {
        self.index.refresh()?;
        Ok(self.index.live_count())
    }

    /// Reads a small file without which nothing is wrong; `None` when it is gone.
    ///
    /// Why it cannot be read or decoded is told inside, and must stop nobody. Fails when the storage refuses in a way
    /// that may pass.
    pub(super) fn read_hint<T>(
        &self,
        name: &str,
        decode: impl FnOnce(&[u8]) -> Result<T, DecodeError>,
    ) -> Result<Option<Result<T, RepoError>>, RepoError> {
        let read = self.storage.read(name, MAX_SMALL_FILE);
        let decoded = read
            .map_err(RepoError::from)
            .and_then(|bytes| decode(&bytes).map_err(|e| e.in_file(name)));
        match unless_refused(decoded)? {
            Err(RepoError::Missing { .. }) => Ok(None),
            decoded => Ok(Some(decoded)),
        }
    }

    /// Says where the repository lies, for messages.
    pub fn place(&self) -> String {
        self.storage.place()
    }

    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    pub(crate) fn keys(&self) -> &Arc<Keys> {
        &self.keys
    }

    /// The key that all others are derived from.
    pub(super) fn master(&self) -> &Master {
        &self.master.0
    }

    /// The key slot that opened this.
    pub(super) fn slot(&self) -> Option<u32> {
        self.slot
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn nodes(&self) -> &Arc<Nodes> {
        &self.nodes
    }
}

/// Creates a small file; that it is there already means that another process made it.
pub(super) fn create(storage: &dyn Storage, name: &str, bytes: &[u8]) -> Result<(), RepoError> {
    let mut file = storage.create()?;
    file.write(bytes)?;
    match file.publish(name) {
        Ok(()) => Ok(()),
        Err(StorageError::Exists { .. }) => Err(not_empty(storage, name)),
        Err(other) => Err(other.into()),
    }
}

pub(super) fn not_empty(storage: &dyn Storage, file: &str) -> RepoError {
    RepoError::NotEmpty {
        place: storage.place(),
        file: file.to_owned(),
    }
}

/// Whether there is a repository; fails when the storage cannot tell.
fn is_present(storage: &dyn Storage) -> Result<bool, RepoError> {
    let mut refused = None;
    for file in CONFIG_FILES {
        match storage.len(file) {
            Ok(_) => return Ok(true),
            Err(StorageError::Missing { .. }) => {}
            Err(other) => refused = Some(other),
        }
    }
    refused.map_or(Ok(false), |error| Err(error.into()))
}

/// Returns the first copy that can be read, else what was wrong with the first.
fn first_good<T>(
    files: &[&str],
    damaged: &mut Vec<(String, RepoError)>,
    read: impl Fn(&str) -> Result<T, RepoError>,
) -> Result<T, RepoError> {
    for file in files {
        match read(file) {
            Ok(value) => return Ok(value),
            // Neither says that the file is damaged.
            Err(error @ RepoError::Unsupported { .. }) => return Err(error),
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => damaged.push(((*file).to_owned(), error)),
        }
    }
    Err(match damaged.iter().find(|(file, _)| *file == files[0]) {
        Some((_, error)) => error.clone(),
        None => RepoError::Missing {
            file: files[0].to_owned(),
        },
    })
}

/// The two copies of the configuration.
pub(super) const CONFIG_FILES: [&str; 2] = ["config", "config.bak"];
