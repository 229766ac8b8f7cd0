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
use crate::repo::{ChunkId, Run};

/// A read-only export with `base:allocation`.
pub struct SnapshotExport {
    disk: Disk,
    description: String,
    chunks: Arc<Cache<ChunkId, Bytes, ByLength>>,
    fault: Arc<Mutex<Option<EngineError>>>,
}

#[derive(Clone)]
struct ByLength;

impl Weighter<ChunkId, Bytes> for ByLength {
    fn weight(&self, _: &ChunkId, bytes: &Bytes) -> u64 {
        bytes.len() as u64
    }
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
        let chunk_bytes = disk.geometry().chunk_bytes;
        let items = (CACHE_BYTES / chunk_bytes) as usize;
        let chunks = Arc::new(Cache::with_weighter(items, CACHE_BYTES, ByLength));
        Self {
            disk,
            description,
            chunks,
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
    cache: &Cache<ChunkId, Bytes, ByLength>,
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
                let bytes = match cache.get(&entry.id) {
                    Some(bytes) => bytes,
                    None => {
                        let bytes = Bytes::from(disk.read_chunk(number, &entry)?);
                        cache.insert(entry.id, bytes.clone());
                        bytes
                    }
                };
                let start = geometry.bytes(&(number..number + 1)).start();
                let (from, to) = (
                    (wanted.start() - start) as usize,
                    (wanted.end() - start) as usize,
                );
                read.push_shared(bytes.slice(from..to));
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

/// Logs a failure in full, keeps the first, and tells the client its short form.
fn told(error: EngineError, fault: &Mutex<Option<EngineError>>) -> NbdError {
    let short = error.to_string();
    tracing::error!("{}", super::error::chain(&error));
    fault.lock().expect("no holder panics").get_or_insert(error);
    NbdError::io(short)
}

/// The bytes of chunks that one export keeps.
const CACHE_BYTES: u64 = 64 << 20;
/// The protocol's limit of a description.
const MOST_DESCRIPTION: usize = 4096;
/// Both bits of `base:allocation`.
const HOLE_ZERO: u64 = 3;
