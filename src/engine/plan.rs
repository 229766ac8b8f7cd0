//! The pure plan of a backup: from extents and the parent's reach to a list of steps, without any I/O.

use std::ops::Range;

use crate::range::ByteRange;

/// What a backup does with a run of chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Inherits the parent's chunks; nothing is read.
    Keep,
    /// Stores the run as zeros; nothing is read.
    Zero,
    /// Reads whole chunks from the export.
    Read,
}

/// One action on a run of chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The chunk numbers, first and one behind the last.
    pub chunks: Range<u64>,
    /// What is done with them.
    pub action: Action,
}

/// A disk cut into chunks: its size and the chunk size, both in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// The chunk size in bytes; not zero.
    pub chunk_bytes: u64,
}

impl Geometry {
    /// The number of chunks; the last one may be short.
    pub fn chunks(self) -> u64 {
        self.size_bytes.div_ceil(self.chunk_bytes)
    }

    /// The bytes of a run of chunks, cut at the disk's end.
    ///
    /// # Panics
    /// When the run starts past the disk's end.
    pub fn bytes(self, chunks: &Range<u64>) -> ByteRange {
        let end = chunks
            .end
            .saturating_mul(self.chunk_bytes)
            .min(self.size_bytes);
        ByteRange::new(chunks.start * self.chunk_bytes, end).expect("chunks lie on the disk")
    }

    /// The chunks that hold any byte of `range`.
    pub fn chunks_of(self, range: ByteRange) -> Range<u64> {
        range.start() / self.chunk_bytes..range.end().div_ceil(self.chunk_bytes)
    }
}

/// Folds the extents of one window of a disk into steps.
///
/// Its memory depends on the window's size in chunks, never on how many extents the peer sends.
#[derive(Debug)]
pub struct WindowPlan {
    geometry: Geometry,
    chunks: Range<u64>,
    bytes: ByteRange,
    dirty: Option<Vec<bool>>,
    zero_bytes: Vec<u32>,
    dirty_bytes: u64,
}

impl WindowPlan {
    /// Starts the plan of `bytes`, which must begin at a chunk and end at one or at the disk's end.
    ///
    /// With `follows_bitmap` each chunk is clean until [`WindowPlan::dirty`] says otherwise; without, all are dirty.
    pub fn new(geometry: Geometry, bytes: ByteRange, follows_bitmap: bool) -> Self {
        let chunks = geometry.chunks_of(bytes);
        debug_assert_eq!(
            geometry.bytes(&chunks),
            bytes,
            "window is not cut at chunks"
        );
        let count = (chunks.end - chunks.start) as usize;
        Self {
            geometry,
            chunks,
            bytes,
            dirty: follows_bitmap.then(|| vec![false; count]),
            zero_bytes: vec![0; count],
            dirty_bytes: 0,
        }
    }

    /// Marks a range that the bitmap calls dirty; ranges must not overlap.
    pub fn dirty(&mut self, range: ByteRange) {
        let Some(range) = range.intersect(self.bytes) else {
            return;
        };
        self.dirty_bytes += range.len();
        if let Some(dirty) = &mut self.dirty {
            let chunks = self.geometry.chunks_of(range);
            let first = self.chunks.start;
            dirty[(chunks.start - first) as usize..(chunks.end - first) as usize].fill(true);
        }
    }

    /// Marks a range that reads as zeros; ranges must not overlap.
    pub fn zero(&mut self, range: ByteRange) {
        let Some(range) = range.intersect(self.bytes) else {
            return;
        };
        for piece in range.split(self.geometry.chunk_bytes) {
            let at = (piece.start() / self.geometry.chunk_bytes - self.chunks.start) as usize;
            self.zero_bytes[at] = self.zero_bytes[at].saturating_add(piece.len() as u32);
        }
    }

    /// The bytes that the bitmap called dirty.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes
    }

    /// Returns the steps, which cover the window in order; neighbours differ in their action.
    ///
    /// A chunk is kept only when the bitmap calls all of it clean and its number is below `inheritable`.
    pub fn finish(self, inheritable: u64) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for (at, zero_bytes) in self.zero_bytes.iter().enumerate() {
            let number = self.chunks.start + at as u64;
            let clean = self.dirty.as_ref().is_some_and(|dirty| !dirty[at]);
            let len = self.geometry.bytes(&(number..number + 1)).len();
            let action = if clean && number < inheritable {
                Action::Keep
            } else if u64::from(*zero_bytes) >= len {
                Action::Zero
            } else {
                Action::Read
            };
            match steps.last_mut() {
                Some(last) if last.action == action => last.chunks.end = number + 1,
                _ => steps.push(Step {
                    chunks: number..number + 1,
                    action,
                }),
            }
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 64;

    fn geometry(size_bytes: u64) -> Geometry {
        Geometry {
            size_bytes,
            chunk_bytes: CHUNK,
        }
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    fn step(chunks: Range<u64>, action: Action) -> Step {
        Step { chunks, action }
    }

    #[test]
    fn full_reads_all_that_is_not_wholly_zero() {
        let g = geometry(4 * CHUNK);
        let mut plan = WindowPlan::new(g, ByteRange::first(4 * CHUNK), false);
        plan.zero(range(CHUNK, 2 * CHUNK));
        plan.zero(range(2 * CHUNK, 3 * CHUNK - 1));
        assert_eq!(
            plan.finish(4),
            [
                step(0..1, Action::Read),
                step(1..2, Action::Zero),
                step(2..4, Action::Read)
            ]
        );
    }

    #[test]
    fn dirty_and_zero_is_zero_and_clean_and_zero_is_kept() {
        let g = geometry(3 * CHUNK);
        let mut plan = WindowPlan::new(g, ByteRange::first(3 * CHUNK), true);
        plan.dirty(range(CHUNK, CHUNK + 1));
        plan.zero(range(0, 2 * CHUNK));
        assert_eq!(plan.dirty_bytes(), 1);
        assert_eq!(
            plan.finish(3),
            [
                step(0..1, Action::Keep),
                step(1..2, Action::Zero),
                step(2..3, Action::Keep)
            ]
        );
    }

    #[test]
    fn chunk_zero_in_two_extents_is_zero() {
        let g = geometry(CHUNK);
        let mut plan = WindowPlan::new(g, ByteRange::first(CHUNK), false);
        plan.zero(range(0, 10));
        plan.zero(range(10, CHUNK));
        assert_eq!(plan.finish(0), [step(0..1, Action::Zero)]);
    }

    #[test]
    fn short_last_chunk_is_zero_when_its_few_bytes_are() {
        let g = geometry(CHUNK + 5);
        let mut plan = WindowPlan::new(g, ByteRange::first(CHUNK + 5), false);
        plan.zero(range(CHUNK, CHUNK + 5));
        assert_eq!(
            plan.finish(0),
            [step(0..1, Action::Read), step(1..2, Action::Zero)]
        );
    }

    #[test]
    fn clean_chunk_past_the_parents_reach_is_read() {
        let plan = WindowPlan::new(geometry(4 * CHUNK), ByteRange::first(4 * CHUNK), true);
        assert_eq!(
            plan.finish(2),
            [step(0..2, Action::Keep), step(2..4, Action::Read)]
        );
    }

    #[test]
    fn extents_outside_the_window_do_not_count() {
        let g = geometry(8 * CHUNK);
        let mut plan = WindowPlan::new(g, range(2 * CHUNK, 4 * CHUNK), true);
        plan.dirty(range(0, 2 * CHUNK + 1));
        plan.dirty(range(4 * CHUNK, 8 * CHUNK));
        plan.zero(range(3 * CHUNK, 8 * CHUNK));
        assert_eq!(plan.dirty_bytes(), 1);
        assert_eq!(
            plan.finish(8),
            [step(2..3, Action::Read), step(3..4, Action::Keep)]
        );
    }
}
