//! Disks in memory as the model, and storage that fails at a chosen call.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use nbdbackup::repo::{
    BackupKind, Batcher, ChunkRead, ChunkSize, DiskRecord, DiskStats, FileInfo, Hold, InitOptions,
    MapRoot, MemoryStorage, NewFile, Parity, PasswordCost, ReadBuffers, RepoError, Repository, Run,
    Secret, Session, SessionOptions, Snapshot, SnapshotDraft, SnapshotId, Storage, StorageError,
};

pub(crate) const CHUNK: usize = 64 << 10;

/// A generator of numbers that are the same in each run.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Fills bytes: some shrink, some do not.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        let noise = self.below(2) == 0;
        let mask = if noise {
            u64::MAX
        } else {
            0x0f0f_0000_0000_0f0f
        };
        for piece in bytes.chunks_mut(8) {
            let word = (self.next() & mask).to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }
}

pub(crate) fn options() -> InitOptions {
    InitOptions {
        chunk_size: ChunkSize::new(CHUNK as u32).unwrap(),
        ..InitOptions::default()
    }
}

/// Packs of few chunks, so that small tests have many.
pub(crate) fn small_session() -> SessionOptions {
    SessionOptions {
        pack_bytes: 200 << 10,
        ..SessionOptions::default()
    }
}

/// The same, with snapshots that it may inherit from.
pub(crate) fn session_after(parents: &[SnapshotId]) -> SessionOptions {
    SessionOptions {
        parents: parents.to_vec(),
        ..small_session()
    }
}

pub(crate) fn new_repo() -> (MemoryStorage, Arc<Repository>) {
    let storage = MemoryStorage::new();
    let repo = Repository::init(Arc::new(storage.clone()), &options()).unwrap();
    (storage, repo)
}

/// A repository for sweeps in which parity would only add calls; it has sweeps of its own.
pub(crate) fn without_parity() -> (MemoryStorage, Arc<Repository>) {
    let storage = MemoryStorage::new();
    let options = InitOptions {
        parity: Parity::NONE,
        ..options()
    };
    let repo = Repository::init(Arc::new(storage.clone()), &options).unwrap();
    (storage, repo)
}

/// The key file that opens the encrypted repositories of the tests.
pub(crate) fn key_file() -> Secret {
    Secret::key_file(vec![9; 64]).unwrap()
}

pub(crate) fn new_encrypted_repo() -> (MemoryStorage, Arc<Repository>) {
    let storage = MemoryStorage::new();
    let at = Arc::new(storage.clone());
    let cost = PasswordCost::default();
    let repo = Repository::init_encrypted(at, &options(), &key_file(), cost).unwrap();
    (storage, repo)
}

/// Opens a repository, with the key file if it is an encrypted one.
pub(crate) fn open_any(storage: Arc<dyn Storage>) -> Result<Arc<Repository>, RepoError> {
    match Repository::open(Arc::clone(&storage)) {
        Err(RepoError::SecretNeeded) => Repository::open_with(storage, Some(&key_file())),
        other => other,
    }
}

/// Opens a repository in memory.
pub(crate) fn open(storage: &MemoryStorage) -> Arc<Repository> {
    open_any(Arc::new(storage.clone())).unwrap()
}

/// A copy of all files.
pub(crate) fn copy(storage: &MemoryStorage) -> MemoryStorage {
    storage.after_power_failure(|_| true)
}

/// A repository with a full backup of a small disk and one of a changed disk.
pub(crate) struct Sample {
    pub(crate) storage: MemoryStorage,
    pub(crate) disks: Vec<(SnapshotId, Vec<u8>)>,
    /// The disk as it is after its next change.
    pub(crate) next: Vec<u8>,
}

impl Sample {
    pub(crate) fn two_backups((storage, repo): (MemoryStorage, Arc<Repository>)) -> Self {
        let mut rng = Rng(9);
        // Few and small chunks, so that every byte of every file can be damaged in turn.
        let mut disk = vec![0; 3 * CHUNK + 100];
        for at in [0, CHUNK, 3 * CHUNK] {
            rng.fill(&mut disk[at..at + 64]);
        }
        let mut disks = Vec::new();
        for _ in 0..2 {
            let id = backup(&repo, &disk).unwrap().id;
            disks.push((id, disk.clone()));
            rng.fill(&mut disk[CHUNK..CHUNK + 99]);
        }
        Self {
            storage,
            disks,
            next: disk,
        }
    }
}

pub(crate) fn draft(disk: &str, size_bytes: u64, root: MapRoot) -> SnapshotDraft {
    SnapshotDraft {
        name: "machine".to_owned(),
        tool: "test".to_owned(),
        complete: true,
        disks: vec![DiskRecord {
            disk: disk.to_owned(),
            size_bytes,
            root,
            kind: BackupKind::Full,
            reason: None,
            parent: None,
            bitmap_used: None,
            bitmaps_started: Vec::new(),
            bitmaps_lost: Vec::new(),
            generation: 1,
            source: "memory".to_owned(),
            stats: DiskStats::default(),
        }],
        ..SnapshotDraft::default()
    }
}

/// Stores a disk in full, and returns its map and the number of chunks that were new.
pub(crate) fn store_disk(session: &Session, disk: &[u8]) -> Result<(MapRoot, u64), RepoError> {
    let mut map = session.map_writer(None, disk.len() as u64)?;
    let mut new = 0;
    for (number, chunk) in disk.chunks(CHUNK).enumerate() {
        let number = number as u64;
        let stored = session.store_chunk(chunk)?;
        new += u64::from(stored.is_new);
        match stored.entry {
            Some(entry) => map.put(number, entry)?,
            None => map.zero(number..number + 1)?,
        }
    }
    Ok((map.finish()?, new))
}

/// Backs a disk up, of which some chunks are as in a parent.
pub(crate) fn backup_after(
    repo: &Arc<Repository>,
    parent: &Snapshot,
    disk: &[u8],
    same: std::ops::Range<u64>,
) -> Result<Snapshot, RepoError> {
    let session = repo.begin(&session_after(&[parent.id]))?;
    let before = &parent.draft.disks[0];
    let size = disk.len() as u64;
    let mut map = session.map_writer(Some((&before.root, before.size_bytes)), size)?;
    for (number, chunk) in disk.chunks(CHUNK).enumerate() {
        let number = number as u64;
        if same.contains(&number) {
            map.keep(number..number + 1)?;
            continue;
        }
        match session.store_chunk(chunk)?.entry {
            Some(entry) => map.put(number, entry)?,
            None => map.zero(number..number + 1)?,
        }
    }
    let root = map.finish()?;
    session.commit(draft("disk", size, root))
}

/// Backs a disk up in full.
pub(crate) fn backup(repo: &Arc<Repository>, disk: &[u8]) -> Result<Snapshot, RepoError> {
    let session = repo.begin(&small_session())?;
    let (root, _) = store_disk(&session, disk)?;
    session.commit(draft("disk", disk.len() as u64, root))
}

/// Reads the first disk of a snapshot, in batches.
pub(crate) fn restore(repo: &Repository, id: &SnapshotId) -> Result<Vec<u8>, RepoError> {
    let snapshot = repo.snapshot(id)?;
    restore_disk(repo, &snapshot.draft.disks[0])
}

pub(crate) fn restore_disk(repo: &Repository, record: &DiskRecord) -> Result<Vec<u8>, RepoError> {
    let mut disk = vec![0; record.size_bytes as usize];
    let map = repo.map(&record.root, record.size_bytes)?;
    let (mut batcher, mut batches) = (Batcher::default(), Vec::new());
    let mut at = 0;
    for run in map.runs(0..u64::MAX) {
        match run? {
            Run::Hole { chunks } => {
                assert_eq!(chunks.start, at, "runs leave no gap");
                at = chunks.end;
            }
            Run::Chunk { number, entry } => {
                assert_eq!(number, at, "runs leave no gap");
                at += 1;
                let plain_len = repo.chunk_size().chunk_len(number, record.size_bytes);
                batches.extend(batcher.push(ChunkRead {
                    number,
                    entry,
                    plain_len,
                }));
            }
        }
    }
    assert_eq!(at, map.chunks());
    batches.extend(batcher.finish());
    let mut buffers = ReadBuffers::default();
    for batch in batches {
        repo.read_batch(&batch, &mut buffers, |read, bytes| {
            let start = read.number as usize * CHUNK;
            disk[start..start + bytes.len()].copy_from_slice(bytes);
            Ok::<(), RepoError>(())
        })?;
    }
    Ok(disk)
}

/// A disk of chunks of which some are zeros and some repeat.
pub(crate) fn some_disk(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut disk = vec![0; len];
    let mut last: Option<Vec<u8>> = None;
    for chunk in disk.chunks_mut(CHUNK) {
        match (rng.below(4), &last) {
            (0, _) => {}
            (1, Some(old)) if old.len() == chunk.len() => chunk.copy_from_slice(old),
            _ => {
                rng.fill(chunk);
                last = Some(chunk.to_vec());
            }
        }
    }
    disk
}

/// What a [`FaultStorage`] does from its chosen call on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The process is dead: nothing works any more.
    Dead,
    /// Writing finds no room any more; the rest works.
    NoRoom,
    /// This one call fails, as where a sector is bad.
    Once,
    /// This one call is refused, as by a quota, or by a share that is gone or may only be read.
    Refused,
    /// Nothing that changed is made durable any more, and that is said.
    NoSync,
    /// Nothing fails, but the file that is read then has just been removed.
    Removed,
    /// Nothing fails, but each file is listed twice, as a folder that changes may do it.
    ListedTwice,
    /// Nothing fails, but from this call on nobody seems to hold what it holds.
    LocksLie,
    /// Nothing fails, but there are no locks, and by the storage's clock all was written so many seconds ago.
    NoLocks(i64),
}

/// What a medium says that cannot read any more.
pub(crate) const EIO: i32 = 5;

/// Why a write is refused: EROFS, EDQUOT; and any other call: ESTALE, ETIMEDOUT, EACCES.
const REFUSALS: [&[i32]; 2] = [&[30, 122], &[116, 110, 13]];

/// What is there for good, and folders.
const KEPT: [&str; 4] = ["config", "keys/", "tmp", FOLDERS];

/// What stands for a name where all folders are synced.
const FOLDERS: &str = "folders";

/// Storage that fails at the call of a chosen number, counted from 1.
#[derive(Clone, Debug)]
pub(crate) struct FaultStorage {
    inner: Arc<dyn Storage>,
    calls: Arc<AtomicU64>,
    read: Arc<AtomicU64>,
    at: u64,
    fault: Fault,
}

impl FaultStorage {
    pub(crate) fn new(inner: Arc<dyn Storage>, at: u64, fault: Fault) -> Self {
        Self {
            inner,
            calls: Arc::default(),
            read: Arc::default(),
            at,
            fault,
        }
    }

    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// The bytes that were read.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.read.load(Ordering::SeqCst)
    }

    fn call(&self, name: &str, writes: bool) -> Result<(), StorageError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let kind = match self.fault {
            Fault::Dead if call >= self.at => std::io::ErrorKind::Other,
            Fault::NoRoom if call >= self.at && writes => std::io::ErrorKind::StorageFull,
            Fault::Once if call == self.at => {
                let eio = std::io::Error::from_raw_os_error(EIO);
                return Err(StorageError::from_io("use", name, eio));
            }
            Fault::Refused if call == self.at => {
                let errors = REFUSALS[usize::from(!writes)];
                let error = errors[call as usize % errors.len()];
                let refusal = std::io::Error::from_raw_os_error(error);
                return Err(StorageError::from_io("use", name, refusal));
            }
            Fault::Removed if call == self.at && !KEPT.iter().any(|k| name.starts_with(k)) => {
                return match self.inner.remove(name) {
                    Ok(()) | Err(StorageError::Missing { .. }) => Ok(()),
                    Err(other) => Err(other),
                };
            }
            Fault::NoSync if call >= self.at && name == FOLDERS => std::io::ErrorKind::Other,
            _ => return Ok(()),
        };
        Err(StorageError::from_io("use", name, kind.into()))
    }
}

impl Storage for FaultStorage {
    fn create(&self) -> Result<Box<dyn NewFile>, StorageError> {
        self.call("tmp", true)?;
        Ok(Box::new(FaultFile {
            inner: self.inner.create()?,
            storage: self.clone(),
        }))
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, StorageError> {
        self.call(name, false)?;
        let file = self.inner.read(name, limit)?;
        self.read.fetch_add(file.len() as u64, Ordering::SeqCst);
        Ok(file)
    }

    fn read_at(&self, name: &str, at: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        self.call(name, false)?;
        self.read.fetch_add(buf.len() as u64, Ordering::SeqCst);
        self.inner.read_at(name, at, buf)
    }

    fn len(&self, name: &str) -> Result<u64, StorageError> {
        self.call(name, false)?;
        self.inner.len(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<FileInfo>, StorageError> {
        self.call(prefix, false)?;
        let mut files = self.inner.list(prefix)?;
        if self.fault == Fault::ListedTwice {
            files.extend(files.clone());
        }
        if let Fault::NoLocks(seconds) = self.fault {
            let ago = Duration::from_secs(seconds.unsigned_abs());
            let now = SystemTime::now();
            let then = if seconds > 0 { now - ago } else { now + ago };
            files.iter_mut().for_each(|f| f.modified = Some(then));
        }
        Ok(files)
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        self.call(name, false)?;
        self.inner.remove(name)
    }

    fn barrier(&self) -> Result<(), StorageError> {
        self.call(FOLDERS, false)?;
        self.inner.barrier()
    }

    fn hold(&self, name: &str) -> Result<Box<dyn Hold>, StorageError> {
        self.call(name, false)?;
        self.inner.hold(name)
    }

    fn is_held(&self, name: &str) -> Result<Option<bool>, StorageError> {
        self.call(name, false)?;
        match self.fault {
            Fault::LocksLie => Ok(Some(false)),
            Fault::NoLocks(_) => Ok(None),
            _ => self.inner.is_held(name),
        }
    }

    fn sweep(&self) -> Result<u64, StorageError> {
        self.call("tmp", false)?;
        self.inner.sweep()
    }

    fn place(&self) -> String {
        self.inner.place()
    }
}

struct FaultFile {
    inner: Box<dyn NewFile>,
    storage: FaultStorage,
}

impl NewFile for FaultFile {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.storage.call("tmp", true)?;
        self.inner.write(bytes)
    }

    fn publish(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        self.storage.call(name, true)?;
        self.inner.publish(name)
    }

    fn replace(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        self.storage.call(name, true)?;
        self.inner.replace(name)
    }
}

/// What a power failure may leave of a storage: all, nothing, or any part of what no barrier made durable.
pub(crate) fn power_failures(storage: &MemoryStorage, seed: u64) -> Vec<(String, MemoryStorage)> {
    let mut left = vec![
        ("all".to_owned(), storage.after_power_failure(|_| true)),
        ("nothing".to_owned(), storage.after_power_failure(|_| false)),
    ];
    for mix in 0..3 {
        let mut rng = Rng(seed.wrapping_mul(31).wrapping_add(mix));
        let some = storage.after_power_failure(|_| rng.below(2) == 0);
        left.push((format!("mix {mix}"), some));
    }
    left
}

/// A longer run was asked for; else tests take samples of what takes minutes.
pub(crate) fn thorough() -> bool {
    std::env::var_os("NBDBACKUP_TEST_ALL").is_some()
}

/// Storage with room for so many bytes in all.
#[derive(Debug)]
pub(crate) struct FullStorage(pub(crate) MemoryStorage, pub(crate) u64);

impl Storage for FullStorage {
    fn create(&self) -> Result<Box<dyn NewFile>, StorageError> {
        Ok(Box::new(FullFile {
            inner: self.0.create()?,
            storage: self.0.clone(),
            room: self.1,
            len: 0,
        }))
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, StorageError> {
        self.0.read(name, limit)
    }

    fn read_at(&self, name: &str, at: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        self.0.read_at(name, at, buf)
    }

    fn len(&self, name: &str) -> Result<u64, StorageError> {
        self.0.len(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<FileInfo>, StorageError> {
        self.0.list(prefix)
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        self.0.remove(name)
    }

    fn barrier(&self) -> Result<(), StorageError> {
        self.0.barrier()
    }

    fn hold(&self, name: &str) -> Result<Box<dyn Hold>, StorageError> {
        self.0.hold(name)
    }

    fn is_held(&self, name: &str) -> Result<Option<bool>, StorageError> {
        self.0.is_held(name)
    }

    fn sweep(&self) -> Result<u64, StorageError> {
        self.0.sweep()
    }

    fn place(&self) -> String {
        self.0.place()
    }
}

struct FullFile {
    inner: Box<dyn NewFile>,
    storage: MemoryStorage,
    room: u64,
    len: u64,
}

impl NewFile for FullFile {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.len += bytes.len() as u64;
        match bytes_in(&self.storage) + self.len > self.room {
            true => Err(StorageError::from_io(
                "write",
                "a file",
                std::io::ErrorKind::StorageFull.into(),
            )),
            false => self.inner.write(bytes),
        }
    }

    fn publish(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        self.inner.publish(name)
    }

    fn replace(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        self.inner.replace(name)
    }
}

/// The bytes of all files.
pub(crate) fn bytes_in(storage: &MemoryStorage) -> u64 {
    storage.list("").unwrap().iter().map(|f| f.len).sum()
}
