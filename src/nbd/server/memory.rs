//! A disk in memory with dirty bitmaps, for tests, examples and trials.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use futures::FutureExt;
use futures::future::BoxFuture;

use super::super::session::{Extent, Zeroing};
use super::super::wire::TransmissionFlags;
use super::{ExportSource, NbdError, SourceRead, all_abilities};
use crate::range::ByteRange;

/// A disk that its owner and clients may write and discard; to be resized only while it is not offered.
///
/// It has `base:allocation`, and a `qemu:dirty-bitmap:` for each bitmap, which behave as QEMU's: a discard is dirty, and
/// what a disk grows by is clean.
pub struct MemoryDisk {
    state: Mutex<State>,
}

struct State {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
    bitmaps: BTreeMap<String, Vec<bool>>,
}

impl MemoryDisk {
    /// Makes a disk of zeros, none of them allocated.
    pub fn new(size_bytes: u64) -> Self {
        let state = State {
            bytes: Vec::new(),
            allocated: Vec::new(),
            bitmaps: BTreeMap::new(),
        };
        let disk = Self {
            state: Mutex::new(state),
        };
        disk.resize(size_bytes);
        disk
    }

    /// Returns a copy of all bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// Writes bytes.
    ///
    /// # Panics
    /// When they do not fit the disk; as all calls here, since it is the disk's owner who makes them.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let at = offset as usize;
        let mut state = self.state();
        state.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        state.touch(at..at + bytes.len(), Some(true));
    }

    /// Zeroes a range and gives up the blocks that lie in it whole.
    pub fn discard(&self, range: ByteRange) {
        let (start, end) = (range.start() as usize, range.end() as usize);
        let mut state = self.state();
        state.bytes[start..end].fill(0);
        state.touch(start..end, None);
        let last = if end == state.bytes.len() {
            end.div_ceil(BLOCK)
        } else {
            end / BLOCK
        };
        let first = start.div_ceil(BLOCK);
        if first < last {
            state.allocated[first..last].fill(false);
        }
    }

    /// Grows the disk by zeros that are not allocated, or cuts it.
    pub fn resize(&self, size_bytes: u64) {
        let size = size_bytes as usize;
        let mut state = self.state();
        state.bytes.resize(size, 0);
        state.allocated.resize(size.div_ceil(BLOCK), false);
        state
            .bitmaps
            .values_mut()
            .for_each(|bits| bits.resize(size.div_ceil(GRANULE), false));
    }

    /// Starts to record writes; a bitmap of that name starts anew.
    pub fn add_bitmap(&self, name: &str) {
        let mut state = self.state();
        let granules = state.bytes.len().div_ceil(GRANULE);
        state.bitmaps.insert(name.to_owned(), vec![false; granules]);
    }

    /// Forgets what was recorded, and goes on recording.
    pub fn clear_bitmap(&self, name: &str) {
        if let Some(bits) = self.state().bitmaps.get_mut(name) {
            bits.fill(false);
        }
    }

    /// Stops to record.
    pub fn remove_bitmap(&self, name: &str) {
        self.state().bitmaps.remove(name);
    }

    /// Does a client's change, unless the owner has cut the disk meanwhile.
    fn with_room<'a, T: Send + 'a>(
        &'a self,
        range: Option<ByteRange>,
        change: impl FnOnce(&Self, ByteRange) -> T,
    ) -> BoxFuture<'a, Result<T, NbdError>> {
        let size = self.state().bytes.len() as u64;
        let done = match range.filter(|range| range.end() <= size) {
            Some(range) => Ok(change(self, range)),
            None => Err(NbdError::io("the disk has shrunk")),
        };
        std::future::ready(done).boxed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl State {
    /// Marks a range dirty, and allocated where that is told.
    fn touch(&mut self, range: std::ops::Range<usize>, allocated: Option<bool>) {
        if range.is_empty() {
            return;
        }
        for bits in self.bitmaps.values_mut() {
            bits[range.start / GRANULE..range.end.div_ceil(GRANULE)].fill(true);
        }
        if let Some(allocated) = allocated {
            self.allocated[range.start / BLOCK..range.end.div_ceil(BLOCK)].fill(allocated);
        }
    }

    /// Returns the extents of a range of bits, `unit` bytes each.
    fn extents(
        bits: &[bool],
        unit: usize,
        flags: [u64; 2],
        range: ByteRange,
        most: usize,
    ) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        for piece in range.split(unit as u64) {
            let bit = bits
                .get(piece.start() as usize / unit)
                .copied()
                .unwrap_or(false);
            let flags = flags[usize::from(bit)];
            let full = extents.len() == most;
            match extents.last_mut() {
                Some(last) if last.flags == flags => {
                    last.range =
                        ByteRange::new(last.range.start(), piece.end()).unwrap_or(last.range);
                }
                _ if full => break,
                _ => extents.push(Extent {
                    range: piece,
                    flags,
                }),
            }
        }
        extents
    }
}

impl ExportSource for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.state().bytes.len() as u64
    }

    fn contexts(&self) -> Vec<String> {
        let state = self.state();
        let bitmaps = state
            .bitmaps
            .keys()
            .map(|name| format!("qemu:dirty-bitmap:{name}"));
        std::iter::once("base:allocation".to_owned())
            .chain(bitmaps)
            .collect()
    }

    fn abilities(&self) -> TransmissionFlags {
        all_abilities()
    }

    fn read(&self, range: ByteRange, buf: Vec<u8>) -> BoxFuture<'_, Result<SourceRead, NbdError>> {
        let mut read = SourceRead::new(buf);
        let state = self.state();
        for piece in range.split(BLOCK as u64) {
            match state.allocated.get(piece.start() as usize / BLOCK) {
                Some(false) => read.push_hole(piece.len()),
                _ => read.push_copy(&state.bytes[piece.start() as usize..piece.end() as usize]),
            }
        }
        std::future::ready(Ok(read)).boxed()
    }

    fn extents(
        &self,
        context: usize,
        range: ByteRange,
        most: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdError>> {
        let state = self.state();
        let extents = match context.checked_sub(1) {
            None => State::extents(&state.allocated, BLOCK, [HOLE_ZERO, 0], range, most),
            Some(nth) => match state.bitmaps.values().nth(nth) {
                Some(bits) => State::extents(bits, GRANULE, [0, 1], range, most),
                None => return std::future::ready(Err(NbdError::io("the bitmap is gone"))).boxed(),
            },
        };
        std::future::ready(Ok(extents)).boxed()
    }

    fn write(
        &self,
        offset: u64,
        data: Vec<u8>,
        _durable: bool,
    ) -> BoxFuture<'_, Result<Vec<u8>, NbdError>> {
        self.with_room(ByteRange::at(offset, data.len() as u64), |disk, range| {
            disk.write(range.start(), &data);
            data
        })
    }

    fn zero(&self, range: ByteRange, how: Zeroing) -> BoxFuture<'_, Result<(), NbdError>> {
        self.with_room(Some(range), |disk, range| {
            disk.discard(range);
            if how.keep_allocated {
                let (start, end) = (range.start() as usize, range.end() as usize);
                disk.state().touch(start..end, Some(true));
            }
        })
    }

    fn trim(&self, range: ByteRange, _durable: bool) -> BoxFuture<'_, Result<(), NbdError>> {
        self.with_room(Some(range), Self::discard)
    }
}

/// The unit of allocation, in bytes.
const BLOCK: usize = 4096;
/// The unit of bitmaps, in bytes.
const GRANULE: usize = 65_536;
/// Both bits of `base:allocation`.
const HOLE_ZERO: u64 = 3;
