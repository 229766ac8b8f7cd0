//! One disk of a snapshot, ready to be read: its runs of zeros and of chunks, each chunk checked against its id.

use std::ops::Range;
use std::sync::Arc;

use super::catalog::Catalog;
use super::plan::Geometry;
use super::{DiskRecord, EngineError, Snapshot};
use crate::range::ByteRange;
use crate::repo::{
    Batcher, ChunkEntry, ChunkRead, Compared, Comparison, MapReader, ReadBatch, ReadBuffers,
    RepoError, Repository, Run,
};

/// A disk of a snapshot; its calls block.
#[derive(Clone)]
pub(super) struct Disk {
    repository: Arc<Repository>,
    map: MapReader,
    geometry: Geometry,
    snapshot: String,
    name: String,
}

/// A part of a disk, in order.
#[derive(Debug)]
pub(super) enum Piece {
    Zeros(ByteRange),
    Data(ReadBatch),
}

impl Disk {
    pub(super) fn open(
        catalog: &Catalog,
        snapshot: &Snapshot,
        record: &DiskRecord,
    ) -> Result<Self, EngineError> {
        let repository = Arc::clone(catalog.repository());
        let map = repository
            .map(&record.root, record.size_bytes)
            .map_err(catalog.failed())?;
        Ok(Self {
            repository,
            map,
            geometry: catalog.geometry(record.size_bytes),
            snapshot: snapshot.id.to_string(),
            name: record.disk.clone(),
        })
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The runs of some chunks, holes as wide as the map knows them.
    pub(super) fn runs(
        &self,
        chunks: Range<u64>,
    ) -> impl Iterator<Item = Result<Run, EngineError>> {
        self.map
            .runs(chunks.clone())
            .map(move |run| run.map_err(|e| self.unrestorable(chunks.clone(), e)))
    }

    /// What some chunks have in common with those of another disk of the repository.
    pub(super) fn compared(
        &self,
        before: &MapReader,
        chunks: Range<u64>,
    ) -> impl Iterator<Item = Result<Compared, EngineError>> {
        Comparison::of(before, &self.map, chunks.clone())
            .map(move |run| run.map_err(|e| self.unrestorable(chunks.clone(), e)))
    }

    /// Some chunks as zeros, and as batches that one read of a pack brings; in nearly the disk's order.
    pub(super) fn pieces(
        &self,
        chunks: Range<u64>,
    ) -> impl Iterator<Item = Result<Piece, EngineError>> {
        let mut runs = self.runs(chunks);
        let mut batcher = Batcher::default();
        let mut last = None;
        std::iter::from_fn(move || {
            loop {
                match runs.next() {
                    None => {
                        return last
                            .get_or_insert_with(|| batcher.finish())
                            .next()
                            .map(|b| Ok(Piece::Data(b)));
                    }
                    Some(Err(error)) => return Some(Err(error)),
                    Some(Ok(Run::Hole { chunks })) => {
                        return Some(Ok(Piece::Zeros(self.geometry.bytes(&chunks))));
                    }
                    Some(Ok(Run::Chunk { number, entry })) => {
                        let plain_len = self.chunk_len(number);
                        if let Some(batch) = batcher.push(ChunkRead {
                            number,
                            entry,
                            plain_len,
                        }) {
                            return Some(Ok(Piece::Data(batch)));
                        }
                    }
                }
            }
        })
    }

    /// Reads a batch and hands on the bytes of each chunk with their place on the disk.
    pub(super) fn read(
        &self,
        batch: &ReadBatch,
        buffers: &mut ReadBuffers,
        mut each: impl FnMut(ByteRange, &[u8]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let mut done = 0;
        self.repository
            .read_batch(batch, buffers, |chunk, bytes| {
                each(
                    self.geometry.bytes(&(chunk.number..chunk.number + 1)),
                    bytes,
                )
                .map_err(Failed::Caller)?;
                done += 1;
                Ok(())
            })
            .map_err(|failed| match failed {
                Failed::Caller(error) => error,
                // Chunks are handed on in order, so that the one after the last is the one that failed.
                Failed::Repository(cause) => {
                    let number = batch.chunks().get(done).map_or(0, |c| c.number);
                    self.unrestorable(number..number + 1, cause)
                }
            })
    }

    /// Reads one chunk into `bytes`, in place of what was there.
    pub(super) fn read_chunk(
        &self,
        number: u64,
        entry: &ChunkEntry,
        bytes: &mut Vec<u8>,
    ) -> Result<(), EngineError> {
        self.repository
            .read_chunk(entry, self.chunk_len(number), bytes)
            .map_err(|e| self.unrestorable(number..number + 1, e))
    }

    fn chunk_len(&self, number: u64) -> u32 {
        // A chunk is 4 MiB at most.
        self.geometry.bytes(&(number..number + 1)).len() as u32
    }

    fn unrestorable(&self, chunks: Range<u64>, cause: RepoError) -> EngineError {
        EngineError::Unrestorable {
            snapshot: self.snapshot.clone(),
            disk: self.name.clone(),
            range: self.geometry.bytes(&chunks),
            cause: Box::new(cause),
        }
    }
}

/// Whose failure ended a read.
enum Failed {
    Repository(RepoError),
    Caller(EngineError),
}

impl From<RepoError> for Failed {
    fn from(error: RepoError) -> Self {
        Self::Repository(error)
    }
}
