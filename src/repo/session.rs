//! A session: chunks and maps are stored, then one snapshot is committed, or nothing of it is ever seen.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::bad::BadRecords;
use super::checkpoint::{self, CheckpointOptions};
use super::chunk::{ChunkEntry, Place, RecordFlags, is_zero};
use super::cipher::Encryption;
use super::compress::{Compression, compress};
use super::error::RepoError;
use super::format::generation::PackName;
use super::format::node::Node;
use super::format::pack::{PackKind, PackTrailer};
use super::format::snapshot::file_name;
use super::format::{FileKind, short_sum};
use super::ids::{ChunkId, NodeId, PackId, SnapshotId};
use super::map::MapWriter;
use super::pack::{Appended, Body, Packs, Record};
use super::presence::Presence;
use super::record::decode_body;
use super::repository::Repository;
use super::snapshot::{MapRoot, Snapshot, SnapshotDraft};
use super::storage::StorageError;
use crate::meter::Meter;

/// How a session stores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// How chunks are compressed; `None` for the repository's own way.
    pub compression: Option<Compression>,
    /// Whether each record is decoded again and checked against its identifier before it is stored.
    pub verify_writes: bool,
    /// The length in bytes at which a pack is closed.
    pub pack_bytes: u64,
    /// How many stored chunks and nodes are remembered before they are written to the index.
    pub remembered: usize,
    /// The snapshots whose maps may be given as parents: none of what they need is removed while the session is open.
    pub parents: Vec<SnapshotId>,
    /// Keeps what a long session has stored for the run that comes after it, should it never commit; `None` keeps nothing.
    pub checkpoints: Option<CheckpointOptions>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            compression: None,
            verify_writes: true,
            pack_bytes: 64 << 20,
            // What a hash table of 256 Ki buckets holds.
            remembered: (256 << 10) / 8 * 7,
            parents: Vec::new(),
            checkpoints: None,
        }
    }
}

/// A session; used from many threads at once.
///
/// The first failure to write ends it for good: each later call returns that failure. Dropping it without a commit
/// leaves nothing that anybody sees, at most packs that a prune removes and checkpoints that keep some of them for a while.
#[derive(Debug)]
pub struct Session {
    core: Arc<SessionCore>,
}

/// What storing a chunk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// What the map needs to know; `None` when all bytes are zero.
    pub entry: Option<ChunkEntry>,
    /// Whether the repository did not have it.
    pub is_new: bool,
    /// The bytes that it took in a pack; 0 when it is not new.
    pub stored_bytes: u64,
}

/// Where the time of storing goes, over all threads.
#[derive(Debug, Default)]
pub struct StoreMeters {
    /// Looking for zeros and hashing.
    pub hash: Meter,
    /// Asking whether the repository has a chunk.
    pub lookup: Meter,
    /// Compressing what is new.
    pub compress: Meter,
    /// Undoing that, and hashing again, to prove what will be stored.
    pub verify: Meter,
    /// Encrypting, and putting into a pack, with the wait for the disk when packs are written more slowly than filled.
    pub pack: Meter,
    /// Making all durable and publishing the snapshot.
    pub commit: Meter,
}

impl Session {
    pub(crate) fn begin(
        repo: Arc<Repository>,
        options: &SessionOptions,
    ) -> Result<Self, RepoError> {
        let id = SnapshotId::random()?;
        let presence = Presence::announce(&repo, id, options.parents.clone())?;
        let begun = Self::begin_announced(&repo, id, options);
        let (packs, parent_roots, bad, interrupted) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                presence.withdraw(&repo);
                return Err(error);
            }
        };
        let core = SessionCore {
            compression: options.compression.unwrap_or(repo.compression()),
            verify_writes: options.verify_writes,
            remembered: options.remembered.max(1),
            id,
            repo,
            packs,
            presence,
            parent_roots,
            bad,
            packs_there: Mutex::default(),
            roots: Mutex::default(),
            spilling: Mutex::default(),
            checkpoints: options.checkpoints.clone().map(Checkpointing::new),
            interrupted,
            resumed_bytes: AtomicU64::new(0),
            meters: StoreMeters::default(),
            finished: AtomicBool::new(false),
        };
        Ok(Self {
            core: Arc::new(core),
        })
    }

    fn begin_announced(
        repo: &Arc<Repository>,
        id: SnapshotId,
        options: &SessionOptions,
    ) -> Result<(Packs, HashSet<Root>, BadRecords, HashSet<PackName>), RepoError> {
        let mut roots = HashSet::new();
        for parent in &options.parents {
            let snapshot = repo.snapshot(parent).map_err(|e| match e {
                RepoError::NoSuchSnapshot { id } => RepoError::ParentGone { id },
                other => other,
            })?;
            roots.extend(snapshot.draft.disks.iter().filter_map(|d| root_of(&d.root)));
        }
        let interrupted = match &options.checkpoints {
            Some(options) => checkpoint::interrupted(repo, options)?,
            None => HashSet::new(),
        };
        repo.index().refresh()?;
        let bad = BadRecords::load(repo)?;
        let packs = Packs::new(repo, id, options.pack_bytes)?;
        Ok((packs, roots, bad, interrupted))
    }

    /// The identifier that the snapshot will have.
    pub fn id(&self) -> SnapshotId {
        self.core.id
    }

    /// Stores a chunk, unless it is all zeros or the repository has it.
    ///
    /// The bytes are a whole chunk, or the last one of a disk.
    pub fn store_chunk(&self, plain: &[u8]) -> Result<StoredChunk, RepoError> {
        self.core.store_chunk(plain)
    }

    /// The bytes of the chunks that were found among what interrupted runs of the same disks had stored.
    pub fn resumed_bytes(&self) -> u64 {
        self.core.resumed_bytes.load(Ordering::Relaxed)
    }

    /// Where the time of storing went so far.
    pub fn meters(&self) -> &StoreMeters {
        &self.core.meters
    }

    /// Begins the map of a disk of `disk_bytes` bytes; the parent is a map of one of the session's parents, and its disk's
    /// size in bytes.
    pub fn map_writer(
        &self,
        parent: Option<(&MapRoot, u64)>,
        disk_bytes: u64,
    ) -> Result<MapWriter, RepoError> {
        self.core.check()?;
        let foreign = parent
            .and_then(|(root, _)| root_of(root))
            .is_some_and(|root| !self.core.parent_roots.contains(&root));
        if foreign {
            return Err(RepoError::misuse(
                "the parent's map is of none of the snapshots that the session was begun with",
            ));
        }
        MapWriter::new(
            Arc::clone(&self.core),
            Arc::clone(self.core.repo.nodes()),
            parent,
            self.core.repo.chunk_size(),
            disk_bytes,
        )
    }

    /// Makes all durable, then publishes the snapshot; returns when that is durable too.
    pub fn commit(&self, draft: SnapshotDraft) -> Result<Snapshot, RepoError> {
        self.core.meters.commit.time(|| self.core.commit(draft))
    }
}

/// What the handles of a session share.
#[derive(Debug)]
pub(crate) struct SessionCore {
    repo: Arc<Repository>,
    id: SnapshotId,
    compression: Compression,
    verify_writes: bool,
    packs: Packs,
    presence: Presence,
    /// The maps of the parents.
    parent_roots: HashSet<Root>,
    /// What a check found damaged: nothing may refer to it.
    bad: BadRecords,
    /// How many records are remembered before they go to the index.
    remembered: usize,
    /// The lengths of packs that the index named; `None` for those that are not there.
    packs_there: Mutex<HashMap<(PackKind, PackId), Option<u64>>>,
    /// The roots that this session's map writers finished.
    roots: Mutex<HashSet<Root>>,
    spilling: Mutex<()>,
    checkpoints: Option<Checkpointing>,
    /// The packs of earlier runs that never committed.
    interrupted: HashSet<PackName>,
    resumed_bytes: AtomicU64,
    meters: StoreMeters,
    finished: AtomicBool,
}

impl SessionCore {
    /// Stores a map node, unless the repository has it; says where it is and whether it is new.
    pub(crate) fn store_node(&self, id: &NodeId, node: &Node) -> Result<(Place, bool), RepoError> {
        self.check()?;
        if let Some(place) = self.known(PackKind::Meta, id.as_bytes())? {
            return Ok((place, false));
        }
        let keys = self.repo.keys();
        let is_right =
            |bytes: &[u8]| Node::decode(bytes, node.level()).is_ok_and(|d| d.id(keys) == *id);
        for _ in 0..ATTEMPTS {
            let mut bytes = node.encode();
            #[cfg(test)]
            super::flip::at(super::flip::Point::Compressed, &mut bytes);
            let proved = self.verify_writes.then(|| short_sum(&bytes));
            if proved.is_some() && !self.meters.verify.time(|| is_right(&bytes)) {
                continue;
            }
            let record = Record {
                body: match self.repo.encryption() {
                    Encryption::None => Body::Clear(&bytes),
                    Encryption::Aes256Gcm => Body::ToSeal(&mut bytes),
                },
                // Nodes are made of hashes, which do not compress.
                flags: RecordFlags::RAW,
                proved,
            };
            match self.append(PackKind::Meta, id.as_bytes(), record)? {
                Appended::Now(place) => return Ok((place, true)),
                Appended::Before(place) => return Ok((place, false)),
                Appended::Changed => {}
            }
        }
        Err(self.misread(format!("map node {id}")))
    }

    /// Whether a check found the record at a place damaged.
    pub(crate) fn is_bad(&self, kind: PackKind, place: &Place) -> bool {
        self.bad.holds(kind, place)
    }

    /// Remembers a root whose nodes this session made durable or found durable.
    pub(crate) fn add_root(&self, root: &MapRoot) {
        if let Some(root) = root_of(root) {
            lock(&self.roots).insert(root);
        }
    }

    fn store_chunk(&self, plain: &[u8]) -> Result<StoredChunk, RepoError> {
        self.check()?;
        if plain.is_empty() || plain.len() > self.repo.chunk_size().bytes() as usize {
            return Err(RepoError::misuse(format!(
                "a chunk of {} bytes is none of {}",
                plain.len(),
                self.repo.chunk_size()
            )));
        }
        let known = |entry| StoredChunk {
            entry,
            is_new: false,
            stored_bytes: 0,
        };
        let meters = &self.meters;
        let hash = || (!is_zero(plain)).then(|| self.repo.keys().chunk_id(plain));
        let Some(id) = meters.hash.time(hash) else {
            return Ok(known(None));
        };
        let lookup = || self.known(PackKind::Data, id.as_bytes());
        if let Some(place) = meters.lookup.time(lookup)? {
            if self.interrupted.contains(&(PackKind::Data, place.pack)) {
                let len = plain.len() as u64;
                self.resumed_bytes.fetch_add(len, Ordering::Relaxed);
            }
            return Ok(known(Some(ChunkEntry { id, place })));
        }
        self.store_new(id, plain)
    }

    /// Stores a chunk that the repository does not have.
    ///
    /// What goes into a pack is decoded and hashed again before. A bit that flips meanwhile is most often in a buffer
    /// that can be made again; when it is in the chunk itself, or comes back, nothing of this session can be trusted.
    fn store_new(&self, id: ChunkId, plain: &[u8]) -> Result<StoredChunk, RepoError> {
        for _ in 0..ATTEMPTS {
            let appended =
                BUFFERS.with_borrow_mut(|buffers| self.try_store(&id, plain, buffers))?;
            let (place, is_new) = match appended {
                Appended::Now(place) => (place, true),
                Appended::Before(place) => (place, false),
                Appended::Changed => continue,
            };
            return Ok(StoredChunk {
                entry: Some(ChunkEntry { id, place }),
                is_new,
                stored_bytes: if is_new { u64::from(place.len) } else { 0 },
            });
        }
        Err(self.misread(format!("chunk {id}")))
    }

    fn try_store(
        &self,
        id: &ChunkId,
        plain: &[u8],
        (compressed, again): &mut (Vec<u8>, Vec<u8>),
    ) -> Result<Appended, RepoError> {
        let (meters, encryption) = (&self.meters, self.repo.encryption());
        let flags = meters
            .compress
            .time(|| compress(plain, self.compression, compressed))
            .map_err(|e| RepoError::io("compress a chunk", e))?;
        if (encryption, flags) == (Encryption::Aes256Gcm, RecordFlags::RAW) {
            compressed.clear();
            compressed.extend_from_slice(plain);
        }
        #[cfg(test)]
        super::flip::at(super::flip::Point::Compressed, compressed);
        let body = match (encryption, flags) {
            (Encryption::None, RecordFlags::RAW) => plain,
            _ => compressed,
        };
        let mut proved = None;
        if self.verify_writes {
            proved = meters.verify.time(|| {
                // The sum comes first: whatever changes afterwards no longer fits it.
                let sum = short_sum(body);
                let plain = decode_body(body, flags, plain.len(), again).ok()?;
                (self.repo.keys().chunk_id(plain) == *id).then_some(sum)
            });
            if proved.is_none() {
                return Ok(Appended::Changed);
            }
        }
        #[cfg(test)]
        super::flip::at(super::flip::Point::Proved, compressed);
        let body = match (encryption, flags) {
            (Encryption::None, RecordFlags::RAW) => Body::Clear(plain),
            (Encryption::None, _) => Body::Clear(compressed),
            (Encryption::Aes256Gcm, _) => Body::ToSeal(compressed),
        };
        let record = Record {
            body,
            flags,
            proved,
        };
        let append = || self.append(PackKind::Data, id.as_bytes(), record);
        meters.pack.time(append)
    }

    /// Ends the session: something did not come out right twice.
    fn misread(&self, what: String) -> RepoError {
        self.packs.fail(RepoError::Misread { what })
    }

    fn commit(&self, mut draft: SnapshotDraft) -> Result<Snapshot, RepoError> {
        self.check()?;
        for disk in &mut draft.disks {
            let chunks = self.repo.chunk_size().count(disk.size_bytes);
            disk.root.check(chunks)?;
            let ours = root_of(&disk.root).is_none_or(|root| lock(&self.roots).contains(&root));
            if !ours {
                return Err(RepoError::misuse(format!(
                    "the map of disk {} was not written in this session",
                    disk.disk
                )));
            }
        }
        if self.finished.swap(true, Ordering::SeqCst) {
            return Err(RepoError::SessionFinished { id: self.id });
        }
        let snapshot = self.publish(draft).map_err(|e| self.packs.fail(e))?;
        self.presence.withdraw(&self.repo);
        if let Some(checkpoints) = &self.checkpoints {
            let count = checkpoints.count.load(Ordering::SeqCst);
            checkpoint::remove_own(&self.repo, &self.id, count);
        }
        // The snapshot is durable: whatever happens to the index now is no failure of the backup.
        if let Err(error) = self.repo.merge_index(MERGE_AT_COMMIT) {
            tracing::warn!(%error, "index segments were not merged");
        }
        Ok(snapshot)
    }

    fn publish(&self, draft: SnapshotDraft) -> Result<Snapshot, RepoError> {
        let storage = self.repo.storage();
        let packs = self.packs.finish()?;
        storage.barrier()?;
        let (entries, table) = self.packs.published();
        if !entries.is_empty() {
            self.repo.index().add(entries, &table)?;
            storage.barrier()?;
        }
        let snapshot = Snapshot {
            id: self.id,
            repo: self.repo.uuid(),
            draft,
            packs,
        };
        let mut file = storage.create()?;
        file.write(&snapshot.encode(FileKind::Snapshot, self.repo.keys())?)?;
        match file.publish(&file_name(&self.id)) {
            Ok(()) => {}
            Err(StorageError::Exists { .. }) => return Err(RepoError::Fenced { id: self.id }),
            Err(other) => return Err(other.into()),
        }
        storage.barrier()?;
        Ok(snapshot)
    }

    fn check(&self) -> Result<(), RepoError> {
        self.packs.check()?;
        self.presence
            .beat_if_due(&self.repo)
            .map_err(|e| self.packs.fail(e))?;
        match self.finished.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(RepoError::SessionFinished { id: self.id }),
        }
    }

    fn append(
        &self,
        kind: PackKind,
        id: &[u8; 32],
        record: Record<'_>,
    ) -> Result<Appended, RepoError> {
        let appended = self.packs.append(kind, id, record)?;
        if self.packs.remembered() >= self.remembered {
            self.spill().map_err(|e| self.packs.fail(e))?;
        }
        if let Some(checkpoints) = &self.checkpoints
            && checkpoints.is_due(&self.packs)
        {
            self.checkpoint(checkpoints)
                .map_err(|e| self.packs.fail(e))?;
        }
        Ok(appended)
    }

    /// Puts what is published into the index and writes a checkpoint that says so; others go on storing meanwhile.
    fn checkpoint(&self, checkpoints: &Checkpointing) -> Result<(), RepoError> {
        let _one = match self.spilling.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        if !checkpoints.is_due(&self.packs) {
            return Ok(());
        }
        let known = checkpoints.packs.load(Ordering::SeqCst);
        let written_bytes = self.packs.written_bytes();
        let packs = self.packs.written_after(known as usize);
        // All that is in these packs is among the entries, or was spilled before.
        let (entries, table) = self.packs.published();
        self.repo.storage().barrier()?;
        if !entries.is_empty() {
            self.repo.index().add(entries.clone(), &table)?;
            self.packs.forget(&entries);
        }
        let number = checkpoints.count.fetch_add(1, Ordering::SeqCst);
        let all = known + packs.len() as u64;
        checkpoints
            .options
            .write(&self.repo, self.id, number, packs)?;
        checkpoints.packs.store(all, Ordering::SeqCst);
        checkpoints.bytes.store(written_bytes, Ordering::SeqCst);
        // A long session has many, and each look-up asks all that are not merged.
        if let Err(error) = self.repo.merge_index(MERGE_AT_COMMIT) {
            tracing::warn!(%error, "index segments were not merged");
        }
        Ok(())
    }

    /// Writes what is remembered of published packs to the index; others that come to the limit wait meanwhile.
    fn spill(&self) -> Result<(), RepoError> {
        let _one = lock(&self.spilling);
        if self.packs.remembered() < self.remembered {
            return Ok(());
        }
        let (mut entries, mut table) = self.packs.published();
        if entries.len() < self.remembered / 4 {
            self.packs.drain()?;
            (entries, table) = self.packs.published();
        }
        if entries.len() < self.remembered / 4 {
            // All is in packs that are open; only with limits far below the usual ones.
            self.packs.finish()?;
            (entries, table) = self.packs.published();
        }
        // No segment may name a pack that a power failure could take away.
        self.repo.storage().barrier()?;
        self.repo.index().add(entries.clone(), &table)?;
        self.packs.forget(&entries);
        Ok(())
    }

    /// Returns where a record is that this session or the repository has, in a pack that is there.
    fn known(&self, kind: PackKind, id: &[u8; 32]) -> Result<Option<Place>, RepoError> {
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

impl Drop for SessionCore {
    fn drop(&mut self) {
        self.presence.withdraw(&self.repo);
    }
}

/// How far a session's checkpoints have come.
#[derive(Debug)]
struct Checkpointing {
    options: CheckpointOptions,
    /// How many were written or begun.
    count: AtomicU64,
    /// How many packs they name.
    packs: AtomicU64,
    /// The bytes that were published when the last one was begun.
    bytes: AtomicU64,
}

impl Checkpointing {
    fn new(options: CheckpointOptions) -> Self {
        Self {
            options,
            count: AtomicU64::new(0),
            packs: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    fn is_due(&self, packs: &Packs) -> bool {
        let done = self.bytes.load(Ordering::SeqCst);
        packs.written_bytes() >= done.saturating_add(self.options.interval_bytes.max(1))
    }
}

/// What tells a map from all others.
type Root = (u8, NodeId);

fn root_of(root: &MapRoot) -> Option<Root> {
    root.id().map(|id| (root.level, id))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// What a chunk is compressed into, and what that is decompressed into again.
    static BUFFERS: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// How often something is tried that does not come out right.
const ATTEMPTS: u32 = 2;

/// The most entries of a merge of index segments that a commit does by itself; takes a second or two.
const MERGE_AT_COMMIT: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::super::flip::{self, Point};
    use super::super::repository::InitOptions;
    use super::super::secret::{PasswordCost, Secret};
    use super::super::snapshot::{BackupKind, DiskRecord, DiskStats};
    use super::super::storage::{MemoryStorage, Storage};
    use super::*;

    fn repos() -> [Arc<Repository>; 2] {
        let storage = || -> Arc<dyn Storage> { Arc::new(MemoryStorage::new()) };
        let options = InitOptions::default();
        let key = Secret::key_file(vec![9; 64]).unwrap();
        let cost = PasswordCost::default();
        [
            Repository::init(storage(), &options).unwrap(),
            Repository::init_encrypted(storage(), &options, &key, cost).unwrap(),
        ]
    }

    fn chunks() -> [Vec<u8>; 2] {
        let mut noise = vec![0; 128 << 10];
        getrandom::fill(&mut noise).unwrap();
        let text = (0..).flat_map(|i: u32| format!("line {i}\n").into_bytes());
        [noise, text.take(128 << 10).collect()]
    }

    /// Stores the chunks and their map, reads everything back after the commit.
    fn backup(repo: &Arc<Repository>, chunks: &[Vec<u8>]) -> Result<(), RepoError> {
        let session = repo.begin(&SessionOptions::default())?;
        let size_bytes = chunks.iter().map(|c| c.len() as u64).sum();
        let mut map = session.map_writer(None, size_bytes)?;
        let mut entries = Vec::new();
        for (number, chunk) in chunks.iter().enumerate() {
            let entry = session.store_chunk(chunk)?.entry.unwrap();
            map.put(number as u64, entry)?;
            entries.push(entry);
        }
        let disk = DiskRecord {
            disk: "vda".to_owned(),
            size_bytes,
            root: map.finish()?,
            kind: BackupKind::Full,
            reason: None,
            parent: None,
            generation: 1,
            bitmap_used: None,
            bitmaps_started: Vec::new(),
            bitmaps_lost: Vec::new(),
            source: "test".to_owned(),
            stats: DiskStats::default(),
        };
        session.commit(SnapshotDraft {
            name: "machine".to_owned(),
            complete: true,
            disks: vec![disk],
            ..SnapshotDraft::default()
        })?;
        let mut read = Vec::new();
        for (entry, chunk) in entries.iter().zip(chunks) {
            repo.read_chunk(entry, chunk.len() as u32, &mut read)?;
            assert_eq!(&read, chunk);
        }
        Ok(())
    }

    #[test]
    fn bit_that_flips_once_is_made_good_and_one_that_comes_back_ends_the_session() {
        for repo in repos() {
            let encrypted = repo.encryption() != Encryption::None;
            for point in [Point::Compressed, Point::Proved, Point::Sealed] {
                // What is compressed goes through all points also where nothing is encrypted, but for the last.
                let [_, text] = chunks();
                if point == Point::Sealed && !encrypted {
                    continue;
                }
                let text = [text, format!("{point:?} {encrypted}").into_bytes()].concat();
                let text = [text[text.len() - (128 << 10)..].to_vec()];
                let committed = || repo.snapshots().unwrap().snapshots.len();
                let before = committed();
                flip::next(point, 2);
                let failed = backup(&repo, &text).unwrap_err();
                assert!(matches!(failed, RepoError::Misread { .. }), "{failed}");
                assert_eq!(flip::left(), 0, "{point:?}");
                assert_eq!(committed(), before);

                flip::next(point, 1);
                backup(&repo, &text).unwrap();
                assert_eq!(flip::left(), 0, "{point:?}");
                assert_eq!(committed(), before + 1);
            }
        }
    }

    #[test]
    fn chunk_that_changes_after_it_was_hashed_ends_the_session() {
        for repo in repos() {
            for mut chunk in chunks() {
                let session = repo.begin(&SessionOptions::default()).unwrap();
                let id = repo.keys().chunk_id(&chunk);
                chunk[77] ^= 1;
                let failed = session.core.store_new(id, &chunk).unwrap_err();
                assert!(matches!(failed, RepoError::Misread { .. }), "{failed}");
                let later = session.store_chunk(&[1; 4096]).unwrap_err();
                assert!(matches!(later, RepoError::Misread { .. }), "{later}");
            }
        }
    }

    #[test]
    fn map_node_that_changes_is_encoded_anew() {
        for repo in repos() {
            let session = repo.begin(&SessionOptions::default()).unwrap();
            let [noise, text] = chunks();
            let mut map = session.map_writer(None, 128 << 10).unwrap();
            map.put(0, session.store_chunk(&noise).unwrap().entry.unwrap())
                .unwrap();
            flip::next(Point::Compressed, 1);
            let root = map.finish().unwrap();
            assert_eq!(flip::left(), 0);
            session.core.packs.finish().unwrap();
            let entry = repo.map(&root, 1).unwrap().chunk(0).unwrap().unwrap();
            assert_eq!(entry.id, repo.keys().chunk_id(&noise));

            let mut map = session.map_writer(None, 128 << 10).unwrap();
            map.put(0, session.store_chunk(&text).unwrap().entry.unwrap())
                .unwrap();
            flip::next(Point::Compressed, 2);
            let failed = map.finish().unwrap_err();
            assert!(matches!(failed, RepoError::Misread { .. }), "{failed}");
        }
    }

    #[test]
    fn what_is_not_verified_is_stored_as_it_became() {
        let [repo, _] = repos();
        let options = SessionOptions {
            verify_writes: false,
            ..SessionOptions::default()
        };
        let session = repo.begin(&options).unwrap();
        let [_, text] = chunks();
        flip::next(Point::Compressed, 1);
        session.store_chunk(&text).unwrap();
        assert_eq!(session.meters().verify.total(), std::time::Duration::ZERO);
    }
}
