//! A snapshot's disk as an NBD export: each chunk is checked against its id before its bytes leave.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use tokio::sync::Semaphore;

use super::disk::Disk;
use super::plan::Geometry;
use super::since::Earlier;
use super::workers::blocking;
use super::{Catalog, DiskRecord, EngineError, Snapshot};
use crate::nbd::server::{ExportSource, NbdError, SourceRead};
use crate::nbd::session::Extent;
use crate::range::ByteRange;
use crate::repo::Run;

/// A read-only export with `base:allocation`, and a `qemu:dirty-bitmap:since-ID` for each earlier snapshot of the disk
/// that it was given.
pub struct SnapshotExport {
    disk: Disk,
    earlier: Arc<[Earlier]>,
    description: String,
    chunks: Arc<Chunks>,
    ahead: Ahead,
    fault: Arc<Mutex<Option<EngineError>>>,
}

impl SnapshotExport {
    /// Makes the export of one disk of a snapshot.
    ///
    /// # Errors
    /// When the disk's record contradicts itself.
    pub fn new(
        catalog: &Catalog,
        snapshot: &Snapshot,
        record: &DiskRecord,
    ) -> Result<Self, EngineError> {
        let disk = Disk::open(catalog, snapshot, record)?;
        let description = format!(
            "disk {} of snapshot {} of {}",
            record.disk, snapshot.id, snapshot.draft.name
        );
        Ok(Self::of(disk, description))
    }

    /// Offers what changed since each of these.
    pub(super) fn since(self, earlier: Vec<Earlier>) -> Self {
        Self {
            earlier: earlier.into(),
            ..self
        }
    }

    pub(super) fn of(disk: Disk, mut description: String) -> Self {
        let mut most = MOST_DESCRIPTION.min(description.len());
        while !description.is_char_boundary(most) {
            most -= 1;
        }
        description.truncate(most);
        let chunks = Chunks::new(disk.geometry().chunk_bytes);
        Self {
            disk,
            earlier: Arc::default(),
            description,
            chunks: Arc::new(chunks),
            ahead: Ahead::default(),
            fault: Arc::default(),
        }
    }

    /// The first failure that a client was only told of as EIO.
    pub(super) fn fault(&self) -> Arc<Mutex<Option<EngineError>>> {
        Arc::clone(&self.fault)
    }
}

impl ExportSource for SnapshotExport {
    fn size_bytes(&self) -> u64 {
        self.disk.geometry().size_bytes
    }

    fn description(&self) -> Option<String> {
        Some(self.description.clone())
    }

    fn contexts(&self) -> Vec<String> {
        let earlier = self.earlier.iter().map(Earlier::context);
        std::iter::once("base:allocation".to_owned())
            .chain(earlier)
            .collect()
    }

    fn read(&self, range: ByteRange, buf: Vec<u8>) -> BoxFuture<'_, Result<SourceRead, NbdError>> {
        let buf = match self.chunks.read(self.disk.geometry(), range, buf) {
            Ok(read) => return std::future::ready(Ok(read)).boxed(),
            Err(buf) => buf,
        };
        let (disk, chunks) = (self.disk.clone(), Arc::clone(&self.chunks));
        let fault = Arc::clone(&self.fault);
        let geometry = disk.geometry();
        // Whoever asks for much at a time reads ahead himself.
        let idle = TURNS.available_permits() > READS_AT_ONCE / 2;
        if let Some(next) = self.ahead.follow(geometry, range).filter(|_| idle) {
            let (disk, chunks) = (disk.clone(), Arc::clone(&chunks));
            // Nobody waits for it, and whoever comes to what cannot be read is told so.
            tokio::spawn(async move { drop(read_all(&disk, &chunks, next).await) });
        }
        async move {
            let found = read_all(&disk, &chunks, range)
                .await
                .map_err(|error| told(error, &fault))?;
            let mut read = SourceRead::new(buf);
            for part in found.into_iter().flatten() {
                match part {
                    Part::Hole(bytes) => read.push_hole(bytes),
                    Part::Data(bytes) => read.push_shared(bytes),
                }
            }
            Ok(read)
        }
        .boxed()
    }

    fn extents(
        &self,
        context: usize,
        range: ByteRange,
        most: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdError>> {
        let (disk, earlier) = (self.disk.clone(), Arc::clone(&self.earlier));
        let fault = Arc::clone(&self.fault);
        async move {
            let found = in_turn(
                move || match context.checked_sub(1).map(|at| earlier.get(at)) {
                    None => extents(&disk, range, most),
                    Some(Some(earlier)) => earlier.extents(&disk, range, most),
                    Some(None) => Ok(Vec::new()),
                },
            );
            let extents = found.await.and_then(|found| found);
            extents.map_err(|error| told(error, &fault))
        }
        .boxed()
    }
}

/// Does blocking work when it is its turn.
async fn in_turn<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, EngineError> {
    // Nobody closes it.
    let _turn = TURNS.acquire().await;
    blocking(work).await
}

/// A part of a range.
enum Part {
    Hole(u64),
    Data(Bytes),
}

/// Reads a range, the pieces of a long one at once.
async fn read_all(
    disk: &Disk,
    chunks: &Arc<Chunks>,
    range: ByteRange,
) -> Result<Vec<Vec<Part>>, EngineError> {
    let pieces = range.split(PIECE_BYTES.max(disk.geometry().chunk_bytes));
    let reads = pieces.map(|piece| {
        let (disk, chunks) = (disk.clone(), Arc::clone(chunks));
        async move { in_turn(move || read(&disk, &chunks, piece)).await? }
    });
    stream::iter(reads)
        .buffered(PIECES_AT_ONCE)
        .try_collect()
        .await
}

fn read(disk: &Disk, chunks: &Chunks, range: ByteRange) -> Result<Vec<Part>, EngineError> {
    let geometry = disk.geometry();
    let mut parts = Vec::new();
    for run in disk.runs(geometry.chunks_of(range)) {
        let run = run?;
        let Some(wanted) = bytes_of(&run, geometry).intersect(range) else {
            continue;
        };
        parts.push(match run {
            Run::Hole { .. } => Part::Hole(wanted.len()),
            Run::Chunk { number, entry } => {
                let bytes =
                    chunks.find_or(number, |plain| disk.read_chunk(number, &entry, plain))?;
                Part::Data(within(geometry, number, &bytes, wanted))
            }
        });
    }
    Ok(parts)
}

fn extents(disk: &Disk, range: ByteRange, most: usize) -> Result<Vec<Extent>, EngineError> {
    let geometry = disk.geometry();
    let mut extents = Extents::new(range, most);
    // An extended request may ask for all of a disk, and may be told of less.
    for run in disk.runs(geometry.chunks_of(range)).take(MOST_RUNS) {
        let run = run?;
        let flags = match run {
            Run::Hole { .. } => HOLE_ZERO,
            Run::Chunk { .. } => 0,
        };
        if !extents.add(bytes_of(&run, geometry), flags) {
            break;
        }
    }
    Ok(extents.found)
}

/// The extents of a range, as they are found in their order.
pub(super) struct Extents {
    pub(super) found: Vec<Extent>,
    range: ByteRange,
    most: usize,
}

impl Extents {
    pub(super) fn new(range: ByteRange, most: usize) -> Self {
        Self {
            found: Vec::new(),
            range,
            most,
        }
    }

    /// Adds the part that lies in the range, behind the others, as part of the last one if it is alike; false if that
    /// would be one too many.
    pub(super) fn add(&mut self, range: ByteRange, flags: u64) -> bool {
        let Some(range) = range.intersect(self.range) else {
            return true;
        };
        let full = self.found.len() == self.most;
        match self.found.last_mut() {
            Some(last) if last.flags == flags => {
                last.range = ByteRange::new(last.range.start(), range.end()).unwrap_or(last.range);
            }
            _ if full => return false,
            _ => self.found.push(Extent { range, flags }),
        }
        true
    }
}

fn bytes_of(run: &Run, geometry: Geometry) -> ByteRange {
    match run {
        Run::Hole { chunks } => geometry.bytes(chunks),
        Run::Chunk { number, .. } => geometry.bytes(&(*number..number + 1)),
    }
}

/// The part of a chunk's bytes that lies in a range, which holds some of the chunk.
fn within(geometry: Geometry, number: u64, bytes: &Bytes, range: ByteRange) -> Bytes {
    let start = geometry.bytes(&(number..number + 1)).start();
    let from = range.start().saturating_sub(start) as usize;
    let to = (range.end() - start).min(bytes.len() as u64) as usize;
    bytes.slice(from..to)
}

/// The chunks that were read last, by their numbers.
struct Chunks {
    kept: Cache<u64, Bytes, ByLength>,
    free: Arc<Free>,
}

#[derive(Clone)]
struct ByLength;

impl Weighter<u64, Bytes> for ByLength {
    fn weight(&self, _: &u64, bytes: &Bytes) -> u64 {
        bytes.len() as u64
    }
}

impl Chunks {
    fn new(chunk_bytes: u64) -> Self {
        let options = OptionsBuilder::new()
            .estimated_items_capacity((CACHE_BYTES / chunk_bytes) as usize)
            .weight_capacity(CACHE_BYTES)
            // Half is for what is read anew: what was read ahead must not be gone before it is asked for.
            .hot_allocation(0.5)
            .build()
            .expect("all that is needed is set");
        Self {
            kept: Cache::with_options(
                options,
                ByLength,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
            free: Arc::new(Free {
                most: (FREE_BYTES / chunk_bytes) as usize,
                buffers: Mutex::default(),
            }),
        }
    }

    /// Reads a range that is kept whole, without waiting for anything; else returns the buffer.
    fn read(
        &self,
        geometry: Geometry,
        range: ByteRange,
        buf: Vec<u8>,
    ) -> Result<SourceRead, Vec<u8>> {
        let mut found = Vec::new();
        for number in geometry.chunks_of(range) {
            match self.kept.get(&number) {
                Some(bytes) => found.push(within(geometry, number, &bytes, range)),
                None => return Err(buf),
            }
        }
        let mut read = SourceRead::new(buf);
        found.into_iter().for_each(|bytes| read.push_shared(bytes));
        Ok(read)
    }

    /// Returns a chunk's bytes, and keeps them, read anew unless they are kept.
    fn find_or(
        &self,
        number: u64,
        read: impl FnOnce(&mut Vec<u8>) -> Result<(), EngineError>,
    ) -> Result<Bytes, EngineError> {
        // Whoever else wants the chunk meanwhile waits for it, rather than read it too.
        self.kept.get_or_insert_with(&number, || {
            let mut plain = Plain {
                bytes: self.free.take(),
                free: Arc::clone(&self.free),
            };
            read(&mut plain.bytes)?;
            Ok(Bytes::from_owner(plain))
        })
    }
}

/// A chunk's bytes, in a buffer that is used again once nobody has them any more.
struct Plain {
    bytes: Vec<u8>,
    free: Arc<Free>,
}

impl AsRef<[u8]> for Plain {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.free.put(std::mem::take(&mut self.bytes));
    }
}

/// Buffers for chunks that are to be read: new ones would cost the system a page fault for each page.
struct Free {
    most: usize,
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Free {
    fn take(&self) -> Vec<u8> {
        let mut buffers = self.buffers.lock().expect("no holder panics");
        buffers.pop().unwrap_or_default()
    }

    fn put(&self, buffer: Vec<u8>) {
        let mut buffers = self.buffers.lock().expect("no holder panics");
        if buffers.len() < self.most {
            buffers.push(buffer);
        }
    }
}

/// Where the reader is, should one read in order.
#[derive(Default)]
struct Ahead {
    /// The end of the last read, and of what was read ahead of it.
    at: Mutex<(u64, u64)>,
}

impl Ahead {
    /// Notes a read; returns what to read ahead, if it goes on where the last one ended.
    fn follow(&self, geometry: Geometry, range: ByteRange) -> Option<ByteRange> {
        let mut at = self.at.lock().expect("no holder panics");
        let (before, reached) = *at;
        at.0 = range.end();
        if before != range.start() {
            at.1 = range.end();
            return None;
        }
        let least = AHEAD_BYTES.max(geometry.chunk_bytes);
        let end = range.end().saturating_add(least).min(geometry.size_bytes);
        let next = ByteRange::new(reached.max(range.end()), end)?;
        // In strides, so that it does not run one chunk ahead at a time.
        if next.len() < least / 2 {
            return None;
        }
        at.1 = end;
        Some(next)
    }
}

/// Logs a failure in full, keeps the first, and tells the client its short form.
fn told(error: EngineError, fault: &Mutex<Option<EngineError>>) -> NbdError {
    let short = error.to_string();
    tracing::error!("{}", super::error::chain(&error));
    fault.lock().expect("no holder panics").get_or_insert(error);
    NbdError::io(short)
}

/// Turns to read and to walk maps, of all exports: a thread for each of hundreds of requests would cost more than what
/// they do.
static TURNS: Semaphore = Semaphore::const_new(READS_AT_ONCE);

/// What is read at once, enough for a disk to sort it.
const READS_AT_ONCE: usize = 16;
/// The bytes of chunks that one export keeps.
const CACHE_BYTES: u64 = 64 << 20;
/// A longer read is cut into pieces of this size, unless chunks are larger.
const PIECE_BYTES: u64 = 256 << 10;
/// The pieces of one read that are read at once.
const PIECES_AT_ONCE: usize = 4;
/// What is read ahead of somebody who reads in order, or one chunk.
const AHEAD_BYTES: u64 = 2 << 20;
/// The bytes of buffers that one export keeps for use again.
const FREE_BYTES: u64 = 8 << 20;
/// The runs of a map that are walked for one answer of extents: 32 GiB of data in chunks of 128 KiB.
pub(super) const MOST_RUNS: usize = 1 << 18;
/// The protocol's limit of a description.
const MOST_DESCRIPTION: usize = 4096;
/// Both bits of `base:allocation`.
const HOLE_ZERO: u64 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    fn geometry(size_bytes: u64) -> Geometry {
        Geometry {
            size_bytes,
            chunk_bytes: 128 * KIB,
        }
    }

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::at(start, len).unwrap()
    }

    #[test]
    fn reader_in_order_is_read_ahead_of_in_strides_and_another_is_not() {
        let (ahead, disk) = (Ahead::default(), geometry(1 << 30));
        let start = 64 * KIB;
        assert_eq!(ahead.follow(disk, range(start, 4 * KIB)), None);
        let mut reached = 0;
        for read in 1..2000 {
            let read = range(start + read * 4 * KIB, 4 * KIB);
            if let Some(next) = ahead.follow(disk, read) {
                assert!(reached == 0 || next.start() == reached, "{read}: {next}");
                assert!(next.len() >= AHEAD_BYTES / 2, "{read}: {next}");
                reached = next.end();
            }
            assert!(reached > read.end() && reached <= read.end() + AHEAD_BYTES);
        }
        assert_eq!(ahead.follow(disk, range(0, 4 * KIB)), None);
        assert_eq!(ahead.follow(disk, range(100 * KIB, 4 * KIB)), None);
        // Back at the front, it is read ahead of from there.
        assert_eq!(
            ahead.follow(disk, range(104 * KIB, 4 * KIB)),
            Some(range(108 * KIB, AHEAD_BYTES))
        );
    }

    #[test]
    fn nothing_is_read_ahead_past_the_disks_end() {
        let (ahead, disk) = (Ahead::default(), geometry(3 << 20));
        assert_eq!(
            ahead.follow(disk, range(0, 1 << 20)),
            Some(range(1 << 20, 2 << 20))
        );
        assert_eq!(ahead.follow(disk, range(1 << 20, 2 << 20)), None);
    }

    #[test]
    fn chunk_is_read_once_and_its_buffer_is_used_again() {
        let chunks = Chunks::new(4 << 20);
        let disk = Geometry {
            size_bytes: 1 << 40,
            chunk_bytes: 4 << 20,
        };
        let fill = |byte: u8| {
            move |plain: &mut Vec<u8>| {
                plain.clear();
                plain.resize(4 << 20, byte);
                Ok(())
            }
        };
        for number in 0..64 {
            chunks.find_or(number, fill(number as u8)).unwrap();
        }
        assert!(!chunks.free.buffers.lock().unwrap().is_empty());
        let kept = chunks.find_or(63, |_| panic!("read again")).unwrap();
        let part = chunks.read(disk, range((63 << 22) + 5, 10), Vec::new());
        assert_eq!(part.unwrap().len(), 10);
        assert_eq!(kept[..], [63; 4 << 20]);
        // The bytes of a chunk that somebody still sends stay as they are, whatever is read meanwhile.
        for number in 100..200 {
            chunks.find_or(number, fill(0xff)).unwrap();
        }
        assert_eq!(kept[..], [63; 4 << 20]);
    }
}
