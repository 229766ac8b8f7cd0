//! Reading chunks: by hint, else by the index, each checked against its identifier before its bytes are returned.

use std::cell::RefCell;
use std::collections::VecDeque;

use super::chunk::{ChunkEntry, Place};
use super::error::RepoError;
use super::format::pack::PackKind;
use super::ids::PackId;
use super::record::{self, Decoded, Expected};
use super::repository::Repository;

/// A chunk that is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRead {
    /// The chunk's number, for the caller.
    pub number: u64,
    /// Its identifier and place.
    pub entry: ChunkEntry,
    /// Its length in bytes.
    pub plain_len: u32,
}

/// Chunks that one read of a pack brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadBatch {
    pack: PackId,
    offset: u64,
    end: u64,
    chunks: Vec<ChunkRead>,
}

impl ReadBatch {
    /// The chunks, in the order in which they were asked for.
    pub fn chunks(&self) -> &[ChunkRead] {
        &self.chunks
    }

    /// The bytes that are read from the pack.
    pub fn stored_bytes(&self) -> u64 {
        self.end - self.offset
    }

    /// Takes a chunk in, when it is near.
    fn take(&mut self, read: ChunkRead) -> bool {
        let offset = u64::from(read.entry.place.offset);
        let end = offset + u64::from(read.entry.place.len);
        let (low, high) = (self.offset.min(offset), self.end.max(end));
        let fits = self.pack == read.entry.place.pack
            && offset <= self.end + MAX_GAP
            && self.offset <= end + MAX_GAP
            && high - low <= MAX_BATCH_BYTES
            && self.chunks.len() < MAX_BATCH_CHUNKS;
        if fits {
            (self.offset, self.end) = (low, high);
            self.chunks.push(read);
        }
        fits
    }
}

/// Gathers neighbours into batches.
///
/// Threads that stored a disk together overtook each other, so that neighbours on the disk are near each other in a
/// pack, but in no strict order: a few batches are open at once, and come out in nearly the order of the disk.
#[derive(Debug, Default)]
pub struct Batcher {
    open: VecDeque<ReadBatch>,
}

impl Batcher {
    /// Adds a chunk; returns the oldest batch when there are too many.
    pub fn push(&mut self, read: ChunkRead) -> Option<ReadBatch> {
        // The youngest first, which mostly takes it.
        if self.open.iter_mut().rev().any(|batch| batch.take(read)) {
            return None;
        }
        let Place { pack, .. } = read.entry.place;
        let offset = u64::from(read.entry.place.offset);
        self.open.push_back(ReadBatch {
            pack,
            offset,
            end: offset + u64::from(read.entry.place.len),
            chunks: vec![read],
        });
        match self.open.len() > OPEN_BATCHES {
            true => self.open.pop_front(),
            false => None,
        }
    }

    /// Returns the batches that are still open.
    pub fn finish(&mut self) -> impl Iterator<Item = ReadBatch> + use<> {
        std::mem::take(&mut self.open).into_iter()
    }
}

/// Buffers for reading, to be used again and again.
#[derive(Debug, Default)]
pub struct ReadBuffers {
    stored: Vec<u8>,
    opened: Vec<u8>,
    plain: Vec<u8>,
}

impl Repository {
    /// Reads a chunk of `plain_len` bytes into `out`, in place of what was there.
    pub fn read_chunk(
        &self,
        entry: &ChunkEntry,
        plain_len: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), RepoError> {
        let first = match self.read_from(entry, &entry.place, plain_len, out) {
            Ok(()) => return Ok(()),
            Err(first) => first,
        };
        let mut tried = vec![entry.place];
        for look_again in [false, true] {
            // A prune may have moved it since the index was read.
            if look_again {
                self.index().refresh()?;
            }
            for (kind, place) in self.index().find_all(entry.id.as_bytes())? {
                if kind != PackKind::Data || tried.contains(&place) {
                    continue;
                }
                tried.push(place);
                if self.read_from(entry, &place, plain_len, out).is_ok() {
                    return Ok(());
                }
            }
        }
        out.clear();
        Err(match first {
            RepoError::Missing { .. } => RepoError::Lost {
                what: "chunk",
                id: entry.id.to_string(),
                tried: tried.len(),
                last: Some(Box::new(first)),
            },
            other => other,
        })
    }

    /// Reads the chunks of a batch and calls `each` with the bytes of each; ends at the first failure.
    pub fn read_batch<E: From<RepoError>>(
        &self,
        batch: &ReadBatch,
        buffers: &mut ReadBuffers,
        mut each: impl FnMut(&ChunkRead, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let ReadBuffers {
            stored,
            opened,
            plain,
        } = buffers;
        let file = PackKind::Data.file_name(&batch.pack);
        stored.resize(batch.stored_bytes() as usize, 0);
        let read = self.storage().read_at(&file, batch.offset, stored);
        for chunk in &batch.chunks {
            let place = &chunk.entry.place;
            let from = (u64::from(place.offset) - batch.offset) as usize;
            let record = &stored[from..from + place.len as usize];
            let found = match &read {
                Ok(()) => self
                    .open_record(&chunk.entry, place, chunk.plain_len, record, opened, plain)
                    .ok(),
                Err(_) => None,
            };
            match found {
                Some(found) => each(chunk, found.of(record, opened, plain))?,
                None => {
                    // One by one, which also knows what to say when a chunk is not to be had at all.
                    self.read_chunk(&chunk.entry, chunk.plain_len, plain)?;
                    each(chunk, plain)?;
                }
            }
        }
        Ok(())
    }

    fn read_from(
        &self,
        entry: &ChunkEntry,
        place: &Place,
        plain_len: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), RepoError> {
        BUFFERS.with_borrow_mut(|(stored, opened)| {
            record::read_stored(&**self.storage(), PackKind::Data, place, stored)?;
            match self.open_record(entry, place, plain_len, stored, opened, out)? {
                Decoded::Plain => {}
                Decoded::Opened => std::mem::swap(out, opened),
                Decoded::Stored => std::mem::swap(out, stored),
            }
            Ok(())
        })
    }

    /// Finds the plain bytes of a chunk's record, checked against its identifier.
    fn open_record(
        &self,
        entry: &ChunkEntry,
        place: &Place,
        plain_len: u32,
        stored: &[u8],
        opened: &mut Vec<u8>,
        plain: &mut Vec<u8>,
    ) -> Result<Decoded, RepoError> {
        let fault = |what: String| {
            let file = PackKind::Data.file_name(&place.pack);
            RepoError::corrupt(file, place.offset.into(), what)
        };
        let expected = Expected {
            repo: self.uuid(),
            kind: PackKind::Data,
            id: entry.id.as_bytes(),
            place,
            limit: plain_len as usize,
        };
        let decoded =
            record::decode(self.keys(), &expected, stored, opened, plain).map_err(fault)?;
        let bytes = decoded.of(stored, opened, plain);
        if bytes.len() != plain_len as usize {
            return Err(fault(format!(
                "a chunk of {} bytes stands where one of {plain_len} belongs",
                bytes.len()
            )));
        }
        if self.keys().chunk_id(bytes) != entry.id {
            return Err(fault(format!("this is not chunk {}", entry.id)));
        }
        Ok(decoded)
    }
}

thread_local! {
    /// What was stored, and what was decrypted of it.
    static BUFFERS: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

const MAX_BATCH_BYTES: u64 = 4 << 20;
const MAX_BATCH_CHUNKS: usize = 128;
const OPEN_BATCHES: usize = 4;

/// Reading this many useless bytes costs less than another call.
const MAX_GAP: u64 = 128 << 10;
