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
/// Its memory depends on the window's size in chunks, never on how many extents the peer sends. A window that is clean
/// or zero all over, of which a huge disk has many, costs no look at its chunks.
#[derive(Debug)]
pub struct WindowPlan {
    geometry: Geometry,
    chunks: Range<u64>,
    bytes: ByteRange,
    follows_bitmap: bool,
    /// Whether each chunk is dirty; empty while none is marked.
    dirty: Vec<bool>,
    dirty_bytes: u64,
    /// The zeros in each chunk; empty while none are marked but `all_zero`.
    zero_bytes: Vec<u32>,
    all_zero: bool,
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
        Self {
            geometry,
            chunks,
            bytes,
            follows_bitmap,
            dirty: Vec::new(),
            dirty_bytes: 0,
            zero_bytes: Vec::new(),
            all_zero: false,
        }
    }

    /// Marks a range that the bitmap calls dirty; ranges must not overlap.
    pub fn dirty(&mut self, range: ByteRange) {
        let Some(range) = range.intersect(self.bytes) else {
            return;
        };
        self.dirty_bytes += range.len();
        let (chunks, count) = (self.places(range), self.count());
        self.dirty.resize(count, false);
        self.dirty[chunks].fill(true);
    }

    /// Marks a range that reads as zeros; ranges must not overlap.
    pub fn zero(&mut self, range: ByteRange) {
        let Some(range) = range.intersect(self.bytes) else {
            return;
        };
        if range == self.bytes {
            self.all_zero = true;
            return;
        }
        let count = self.count();
        self.zero_bytes.resize(count, 0);
        for piece in range.split(self.geometry.chunk_bytes) {
            let at = self.places(piece).start;
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
        let mut add = |chunks: Range<u64>, action| match steps.last_mut() {
            _ if chunks.is_empty() => {}
            Some(last) if last.action == action => last.chunks.end = chunks.end,
            _ => steps.push(Step { chunks, action }),
        };
        let Range { start, end } = self.chunks;
        let mut at = start;
        if self.follows_bitmap && self.dirty.is_empty() {
            at = inheritable.clamp(start, end);
            add(start..at, Action::Keep);
        }
        if self.all_zero && (self.dirty.is_empty() || !self.follows_bitmap) {
            add(at..end, Action::Zero);
            at = end;
        }
        for number in at..end {
            let place = (number - start) as usize;
            let clean = self.follows_bitmap && !self.dirty.get(place).is_some_and(|dirty| *dirty);
            let len = self.geometry.bytes(&(number..number + 1)).len();
            let zero_bytes = self.zero_bytes.get(place).map_or(0, |bytes| *bytes);
            let action = if clean && number < inheritable {
                Action::Keep
            } else if self.all_zero || u64::from(zero_bytes) >= len {
                Action::Zero
            } else {
                Action::Read
            };
            add(number..number + 1, action);
        }
        steps
    }

    /// The places in the window of the chunks that hold any byte of a range.
    fn places(&self, range: ByteRange) -> Range<usize> {
        let chunks = self.geometry.chunks_of(range);
        (chunks.start - self.chunks.start) as usize..(chunks.end - self.chunks.start) as usize
    }

    fn count(&self) -> usize {
        (self.chunks.end - self.chunks.start) as usize
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
    fn window_that_is_all_of_one_kind_is_one_step_unless_the_parent_ends_in_it() {
        let g = geometry(8 * CHUNK);
        let window = range(2 * CHUNK, 8 * CHUNK);
        for (follows, inheritable, want) in [
            (true, 8, vec![step(2..8, Action::Keep)]),
            (true, 9, vec![step(2..8, Action::Keep)]),
            (true, 0, vec![step(2..8, Action::Zero)]),
            (false, 8, vec![step(2..8, Action::Zero)]),
            (
                true,
                5,
                vec![step(2..5, Action::Keep), step(5..8, Action::Zero)],
            ),
        ] {
            let mut plan = WindowPlan::new(g, window, follows);
            plan.zero(range(0, 9 * CHUNK));
            assert_eq!(plan.finish(inheritable), want, "{follows} {inheritable}");
        }
    }

    #[test]
    fn dirty_chunk_of_a_window_of_zeros_is_zero_and_the_rest_is_kept() {
        let g = geometry(4 * CHUNK);
        let mut plan = WindowPlan::new(g, ByteRange::first(4 * CHUNK), true);
        plan.zero(ByteRange::first(4 * CHUNK));
        plan.dirty(range(CHUNK, 2 * CHUNK));
        assert_eq!(
            plan.finish(3),
            [
                step(0..1, Action::Keep),
                step(1..2, Action::Zero),
                step(2..3, Action::Keep),
                step(3..4, Action::Zero)
            ]
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
