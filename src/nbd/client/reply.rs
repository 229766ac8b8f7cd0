//! What a client's requests bring.

use super::super::session::Extent;
use crate::range::ByteRange;

/// The bytes of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadReply {
    /// The bytes, as many as were asked for, zeros where there are holes; empty if [`ReadReply::all_hole`].
    ///
    /// It is the buffer that was handed in, with its capacity.
    pub data: Vec<u8>,
    /// Whether the whole range is a hole, for which no byte of `data` is written.
    pub all_hole: bool,
    /// The ranges that the server sent as holes, ascending and apart from each other.
    pub holes: Vec<ByteRange>,
}

impl ReadReply {
    /// Makes the reply for `range` from that for `whole`, which contains it and has `length` bytes.
    pub(super) fn new(
        range: ByteRange,
        whole: ByteRange,
        length: usize,
        mut data: Vec<u8>,
        holes: Vec<ByteRange>,
    ) -> Self {
        let holes = clipped(holes, range);
        let all_hole = holes.first() == Some(&range);
        if all_hole {
            data.clear();
        } else {
            data.resize(length, 0);
            // Both differences are smaller than `length`, which is a `usize`.
            let head = (range.start() - whole.start()) as usize;
            if head > 0 {
                data.drain(..head);
            }
            data.truncate(range.len() as usize);
        }
        Self {
            data,
            all_hole,
            holes,
        }
    }
}

/// The extents of one metadata context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextExtents {
    /// The context's place in `Export::contexts`.
    pub context: usize,
    /// The extents: from the start of the range that was asked for, ascending, without a gap, neighbours with different
    /// flags.
    pub extents: Vec<Extent>,
}

impl ContextExtents {
    /// Keeps what lies within the range that was asked for.
    pub(super) fn new(context: usize, extents: Vec<Extent>, range: ByteRange) -> Self {
        let within = |extent: Extent| {
            let range = extent.range.intersect(range)?;
            Some(Extent { range, ..extent })
        };
        Self {
            context,
            extents: extents.into_iter().filter_map(within).collect(),
        }
    }

    /// Returns where the extents end, and the next request for this context has to start.
    pub fn end(&self) -> Option<u64> {
        self.extents.last().map(|extent| extent.range.end())
    }
}

/// Cuts ascending ranges to `range` and joins those that touch.
fn clipped(holes: Vec<ByteRange>, range: ByteRange) -> Vec<ByteRange> {
    let mut out: Vec<ByteRange> = Vec::new();
    for hole in holes.into_iter().filter_map(|hole| hole.intersect(range)) {
        match out.last_mut() {
            Some(last) if last.end() == hole.start() => {
                *last = ByteRange::new(last.start(), hole.end()).unwrap_or(*last);
            }
            _ => out.push(hole),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[test]
    fn unaligned_read_is_cut_from_whole_blocks() {
        let data: Vec<u8> = (0..16).collect();
        let reply = ReadReply::new(r(5, 11), r(0, 16), 16, data, vec![r(0, 6), r(6, 7)]);
        assert_eq!(reply.data, [5, 6, 7, 8, 9, 10]);
        assert_eq!(reply.holes, [r(5, 7)]);
        assert!(!reply.all_hole);
    }

    #[test]
    fn hole_at_the_end_becomes_zeros() {
        let reply = ReadReply::new(r(0, 8), r(0, 8), 8, vec![1, 2], vec![r(2, 8)]);
        assert_eq!(reply.data, [1, 2, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn one_hole_leaves_the_buffer_alone() {
        let buf = Vec::with_capacity(100);
        let reply = ReadReply::new(r(0, 8), r(0, 8), 8, buf, vec![r(0, 4), r(4, 8)]);
        assert!(reply.all_hole && reply.data.is_empty());
        assert_eq!(reply.data.capacity(), 100);
        let reply = ReadReply::new(r(0, 0), r(0, 0), 0, Vec::new(), vec![]);
        assert!(!reply.all_hole);
    }
}
