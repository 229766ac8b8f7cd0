//! Reading a disk's map: one chunk, or the runs of chunks and holes in a range.

use std::ops::Range;
use std::sync::Arc;

use super::super::chunk::ChunkEntry;
use super::super::error::RepoError;
use super::super::format::node::Child;
use super::super::ids::ChunkId;
use super::super::snapshot::MapRoot;
use super::nodes::Nodes;
use super::walker::{Found, Walker};

/// The map of one disk of one snapshot; cheap to clone.
#[derive(Clone, Debug)]
pub struct MapReader {
    nodes: Arc<Nodes>,
    root: MapRoot,
    chunks: u64,
}

/// A part of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// Chunks of zeros.
    Hole {
        /// Their numbers.
        chunks: Range<u64>,
    },
    /// A stored chunk.
    Chunk {
        /// Its number.
        number: u64,
        /// Its identifier and place.
        entry: ChunkEntry,
    },
}

impl MapReader {
    pub(crate) fn new(nodes: Arc<Nodes>, root: MapRoot, chunks: u64) -> Result<Self, RepoError> {
        root.check(chunks)?;
        Ok(Self {
            nodes,
            root,
            chunks,
        })
    }

    /// The number of chunks of the disk.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Returns the chunk `number`; `None` for zeros.
    pub fn chunk(&self, number: u64) -> Result<Option<ChunkEntry>, RepoError> {
        if number >= self.chunks {
            return Ok(None);
        }
        match self.walker().child_at(number, 0)? {
            Found::Child(child) => Ok(Some(chunk_entry(&child))),
            Found::Hole { .. } => Ok(None),
        }
    }

    /// Returns what the chunks of a range are, in order and without gaps; holes are skipped as whole subtrees.
    pub fn runs(&self, chunks: Range<u64>) -> Runs {
        let end = chunks.end.min(self.chunks);
        Runs {
            walker: self.walker(),
            at: chunks.start.min(end),
            end,
            next: None,
        }
    }

    pub(super) fn root(&self) -> MapRoot {
        self.root
    }

    pub(super) fn walker(&self) -> Walker {
        Walker::new(Arc::clone(&self.nodes), self.root)
    }
}

/// The runs of a range; ends after an error.
#[derive(Debug)]
pub struct Runs {
    walker: Walker,
    at: u64,
    end: u64,
    /// A chunk that was found behind a hole.
    next: Option<Run>,
}

impl Iterator for Runs {
    type Item = Result<Run, RepoError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(run) = self.next.take() {
            return Some(Ok(run));
        }
        let start = self.at;
        while self.at < self.end {
            let number = self.at;
            match self.walker.child_at(number, 0) {
                Err(error) => {
                    self.at = self.end;
                    return Some(Err(error));
                }
                Ok(Found::Hole { chunks }) => {
                    let first = number - number % chunks;
                    self.at = first.saturating_add(chunks).min(self.end);
                }
                Ok(Found::Child(child)) => {
                    self.at += 1;
                    let entry = chunk_entry(&child);
                    let run = Run::Chunk { number, entry };
                    if start == number {
                        return Some(Ok(run));
                    }
                    self.next = Some(run);
                    let chunks = start..number;
                    return Some(Ok(Run::Hole { chunks }));
                }
            }
        }
        let chunks = start..self.end;
        (!chunks.is_empty()).then_some(Ok(Run::Hole { chunks }))
    }
}

/// Takes a child of a leaf for what it is.
pub(super) fn chunk_entry(child: &Child) -> ChunkEntry {
    ChunkEntry {
        id: ChunkId::from_bytes(child.id),
        place: child.place,
    }
}
