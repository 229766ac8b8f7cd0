//! A snapshot's disk as an NBD export: each chunk is checked against its id before its bytes leave.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::disk::Disk;
use super::plan::Geometry;
use super::workers::blocking;
use super::{Catalog, DiskRecord, EngineError, Snapshot};
use crate::nbd::server::{ExportSource, NbdError, SourceRead};
use crate::nbd::session::Extent;
use crate::range::ByteRange;
use crate::repo::Run;

/// A read-only export with `base:allocation`.
pub struct SnapshotExport {
    disk: Disk,
    description: String,
    chunks: Arc<Chunks>,
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

    pub(super) fn of(disk: Disk, mut description: String) -> Self {
        let mut most = MOST_DESCRIPTION.min(description.len());
        while !description.is_char_boundary(most) {
            most -= 1;
        }
        description.truncate(most);
        let chunks = Chunks::new(disk.geometry().chunk_bytes);
        Self {
            disk,
            description,
            chunks: Arc::new(chunks),
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
        vec!["base:allocation".to_owned()]
    }

    fn read(&self, range: ByteRange, buf: Vec<u8>) -> BoxFuture<'_, Result<SourceRead, NbdError>> {
        let buf = match self.chunks.read(self.disk.geometry(), range, buf) {
            Ok(read) => return std::future::ready(Ok(read)).boxed(),
            Err(buf) => buf,
        };
        let disk = self.disk.clone();
        let chunks = Arc::clone(&self.chunks);
        let fault = Arc::clone(&self.fault);
        async move {
            let read = blocking(move || read(&disk, &chunks, range, buf))
                .await
                .and_then(|read| read);
            read.map_err(|error| told(error, &fault))
        }
        .boxed()
    }

    fn extents(
        &self,
        _context: usize,
        range: ByteRange,
        most: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdError>> {
        let disk = self.disk.clone();
        let fault = Arc::clone(&self.fault);
        async move {
            let extents = blocking(move || extents(&disk, range, most))
                .await
                .and_then(|found| found);
            extents.map_err(|error| told(error, &fault))
        }
        .boxed()
    }
}

fn read(
    disk: &Disk,
    chunks: &Chunks,
    range: ByteRange,
    buf: Vec<u8>,
) -> Result<SourceRead, EngineError> {
    let geometry = disk.geometry();
    let mut read = SourceRead::new(buf);
    for run in disk.runs(geometry.chunks_of(range)) {
        let run = run?;
        let Some(wanted) = bytes_of(&run, geometry).intersect(range) else {
            continue;
        };
        match run {
            Run::Hole { .. } => read.push_hole(wanted.len()),
            Run::Chunk { number, entry } => {
                let bytes =
                    chunks.find_or(number, |plain| disk.read_chunk(number, &entry, plain))?;
                read.push_shared(within(geometry, number, &bytes, wanted));
            }
        }
    }
    Ok(read)
}

fn extents(disk: &Disk, range: ByteRange, most: usize) -> Result<Vec<Extent>, EngineError> {
    let geometry = disk.geometry();
    let mut extents: Vec<Extent> = Vec::new();
    for run in disk.runs(geometry.chunks_of(range)) {
        let run = run?;
        let Some(range) = bytes_of(&run, geometry).intersect(range) else {
            continue;
        };
        let full = extents.len() == most;
        let flags = if matches!(run, Run::Hole { .. }) {
            HOLE_ZERO
        } else {
            0
        };
        match extents.last_mut() {
            Some(last) if last.flags == flags => {
                last.range = ByteRange::new(last.range.start(), range.end()).unwrap_or(last.range);
            }
            _ if full => break,
            _ => extents.push(Extent { range, flags }),
        }
    }
    Ok(extents)
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
        let items = (CACHE_BYTES / chunk_bytes) as usize;
        Self {
            kept: Cache::with_weighter(items, CACHE_BYTES, ByLength),
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
        if let Some(bytes) = self.kept.get(&number) {
            return Ok(bytes);
        }
        let mut plain = Plain {
            bytes: self.free.take(),
            free: Arc::clone(&self.free),
        };
        read(&mut plain.bytes)?;
        let bytes = Bytes::from_owner(plain);
        self.kept.insert(number, bytes.clone());
        Ok(bytes)
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

/// Logs a failure in full, keeps the first, and tells the client its short form.
fn told(error: EngineError, fault: &Mutex<Option<EngineError>>) -> NbdError {
    let short = error.to_string();
    tracing::error!("{}", super::error::chain(&error));
    fault.lock().expect("no holder panics").get_or_insert(error);
    NbdError::io(short)
}

/// The bytes of chunks that one export keeps.
const CACHE_BYTES: u64 = 64 << 20;
/// The bytes of buffers that one export keeps for use again.
const FREE_BYTES: u64 = 8 << 20;
/// The protocol's limit of a description.
const MOST_DESCRIPTION: usize = 4096;
/// Both bits of `base:allocation`.
const HOLE_ZERO: u64 = 3;
