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
/// Its work depends on how many extents there are and its memory on the window's chunks at most, whatever a peer sends.
#[derive(Debug)]
pub struct WindowPlan {
    geometry: Geometry,
    chunks: Range<u64>,
    bytes: ByteRange,
    follows_bitmap: bool,
    /// Runs of chunks that hold a dirty byte.
    dirty: Vec<Range<u64>>,
    /// Runs of chunks that are read whatever the bitmap says.
    again: Vec<Range<u64>>,
    /// Runs of chunks that are zero all over.
    zero: Vec<Range<u64>>,
    /// Zeros that the next extent may go on with.
    open_zero: Option<ByteRange>,
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
        Self {
            geometry,
            chunks,
            bytes,
            follows_bitmap,
            dirty: Vec::new(),
            again: Vec::new(),
            zero: Vec::new(),
            open_zero: None,
            dirty_bytes: 0,
        }
    }

    /// Marks a range that the bitmap calls dirty; ranges ascend and do not overlap.
    pub fn dirty(&mut self, range: ByteRange) {
        let Some(range) = range.intersect(self.bytes) else {
            return;
        };
        self.dirty_bytes += range.len();
        push(&mut self.dirty, self.geometry.chunks_of(range));
    }

    /// Marks a range that reads as zeros; ranges ascend and do not overlap.
    pub fn zero(&mut self, range: ByteRange) {
        let Some(range) = range.intersect(self.bytes) else {
            return;
        };
        self.open_zero = match self.open_zero {
            Some(open) if open.end() == range.start() => ByteRange::new(open.start(), range.end()),
            _ => {
                self.close_zero();
                Some(range)
            }
        };
    }

    /// Marks runs of chunks that must not be kept, clean or not; they ascend.
    pub fn again(&mut self, runs: &[Range<u64>]) {
        for run in runs {
            let within = run.start.max(self.chunks.start)..run.end.min(self.chunks.end);
            push(&mut self.again, within);
        }
    }

    /// The bytes that the bitmap called dirty.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes
    }

    /// Returns the steps, which cover the window in order; neighbours differ in their action.
    ///
    /// A chunk is kept only when the bitmap calls all of it clean and its number is below `inheritable`.
    pub fn finish(mut self, inheritable: u64) -> Vec<Step> {
        self.close_zero();
        if !self.again.is_empty() {
            self.again.append(&mut self.dirty);
            self.again.sort_unstable_by_key(|run| run.start);
            for run in self.again.drain(..) {
                push(&mut self.dirty, run);
            }
        }
        let mut steps: Vec<Step> = Vec::new();
        let (mut dirty, mut zero) = (self.dirty.iter().peekable(), self.zero.iter().peekable());
        let mut at = self.chunks.start;
        while at < self.chunks.end {
            while dirty.next_if(|run| run.end <= at).is_some() {}
            while zero.next_if(|run| run.end <= at).is_some() {}
            let (is_dirty, dirty_until) = here(dirty.peek().copied(), at, self.chunks.end);
            let (is_zero, zero_until) = here(zero.peek().copied(), at, self.chunks.end);
            let clean = self.follows_bitmap && !is_dirty && at < inheritable;
            let mut until = dirty_until.min(zero_until);
            if at < inheritable {
                until = until.min(inheritable);
            }
            let action = match (clean, is_zero) {
                (true, _) => Action::Keep,
                (false, true) => Action::Zero,
                (false, false) => Action::Read,
            };
            match steps.last_mut() {
                Some(last) if last.action == action => last.chunks.end = until,
                _ => steps.push(Step {
                    chunks: at..until,
                    action,
                }),
            }
            at = until;
        }
        steps
    }

    /// Keeps of a run of zeros the chunks that lie in it whole: what is left of others must be read.
    fn close_zero(&mut self) {
        let Some(open) = self.open_zero.take() else {
            return;
        };
        let first = open.start().div_ceil(self.geometry.chunk_bytes);
        let end = match open.end() == self.geometry.size_bytes {
            true => self.geometry.chunks(),
            false => open.end() / self.geometry.chunk_bytes,
        };
        push(&mut self.zero, first..end);
    }
}

/// Adds a run behind the others, or to the last one.
fn push(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    if run.is_empty() {
        return;
    }
    match runs.last_mut() {
        Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
        _ => runs.push(run),
    }
}

/// Says whether `at` lies in the next run, and until where that holds.
fn here(run: Option<&Range<u64>>, at: u64, end: u64) -> (bool, u64) {
    match run {
        Some(run) if run.start <= at => (true, run.end),
        Some(run) => (false, run.start),
        None => (false, end),
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
    fn clean_chunk_that_must_be_read_again_is_not_kept() {
        let g = geometry(8 * CHUNK);
        let mut plan = WindowPlan::new(g, range(CHUNK, 8 * CHUNK), true);
        plan.dirty(range(5 * CHUNK, 5 * CHUNK + 1));
        plan.zero(range(3 * CHUNK, 4 * CHUNK));
        plan.again(&[0..2, 3..5, 7..100]);
        assert_eq!(plan.dirty_bytes(), 1);
        assert_eq!(
            plan.finish(8),
            [
                step(1..2, Action::Read),
                step(2..3, Action::Keep),
                step(3..4, Action::Zero),
                step(4..6, Action::Read),
                step(6..7, Action::Keep),
                step(7..8, Action::Read)
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

    #[test]
    fn plan_agrees_with_a_look_at_each_byte() {
        let mut seed = 9_u64;
        let mut below = |limit: u64| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 33) % limit
        };
        for _ in 0..2_000 {
            let size = 1 + below(12 * CHUNK);
            let g = geometry(size);
            let first = below(g.chunks());
            let window = g.bytes(&(first..first + 1 + below(g.chunks() - first)));
            let follows = below(2) == 0;
            let inheritable = below(g.chunks() + 1);
            let mut plan = WindowPlan::new(g, window, follows);
            let mut marks = vec![(false, false); size as usize];
            for zeros in [false, true] {
                let mut at = below(20);
                while at < size {
                    let end = (at + 1 + below(3 * CHUNK)).min(size);
                    match zeros {
                        false => plan.dirty(range(at, end)),
                        true => plan.zero(range(at, end)),
                    }
                    for mark in &mut marks[at as usize..end as usize] {
                        mark.0 |= !zeros;
                        mark.1 |= zeros;
                    }
                    at = end + below(3) * below(CHUNK);
                }
            }
            let mut expected: Vec<Step> = Vec::new();
            for number in g.chunks_of(window) {
                let bytes = g.bytes(&(number..number + 1));
                let bytes = &marks[bytes.start() as usize..bytes.end() as usize];
                let action = if follows && number < inheritable && bytes.iter().all(|b| !b.0) {
                    Action::Keep
                } else if bytes.iter().all(|b| b.1) {
                    Action::Zero
                } else {
                    Action::Read
                };
                match expected.last_mut() {
                    Some(last) if last.action == action => last.chunks.end += 1,
                    _ => expected.push(step(number..number + 1, action)),
                }
            }
            assert_eq!(plan.finish(inheritable), expected);
        }
    }
}
