//! Byte ranges of a disk and sorted sets of them, with checked arithmetic.

use std::fmt;

/// A half-open range of bytes `start..end` on a disk; never reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// Makes the range `start..end`; `None` when `end` lies before `start`.
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start <= end {
            Some(Self { start, end })
        } else {
            None
        }
    }

    /// Makes the range of `len` bytes at `start`; `None` when its end does not fit 64 bits.
    pub const fn at(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// Makes the range of the first `len` bytes.
    pub const fn first(len: u64) -> Self {
        Self { start: 0, end: len }
    }

    /// The first byte's offset.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The offset behind the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// The length in bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether each byte of `other` lies in this range.
    pub const fn contains(self, other: ByteRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Returns the bytes that both ranges hold; `None` when there are none.
    pub fn intersect(self, other: ByteRange) -> Option<ByteRange> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self { start, end })
    }

    /// Widens both ends to multiples of `align`, the end at most to `limit`; a power of two is not required.
    ///
    /// # Panics
    /// When `align` is zero.
    pub fn round_out(self, align: u64, limit: u64) -> ByteRange {
        let start = self.start - self.start % align;
        let end = match self.end % align {
            0 => self.end,
            rest => self
                .end
                .saturating_add(align - rest)
                .min(limit)
                .max(self.end),
        };
        Self { start, end }
    }

    /// Cuts the range into pieces that end at multiples of `step`.
    ///
    /// # Panics
    /// When `step` is zero.
    pub fn split(self, step: u64) -> impl Iterator<Item = ByteRange> {
        let mut at = self.start;
        std::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let start = at;
            at = (at - at % step).saturating_add(step).min(self.end);
            Some(Self { start, end: at })
        })
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// A sorted set of byte ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<ByteRange>,
}

impl RangeSet {
    /// Makes an empty set.
    pub const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    /// Adds a range, merging it with those that it overlaps or touches.
    pub fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let from = self.ranges.partition_point(|r| r.end < range.start);
        let to = self.ranges.partition_point(|r| r.start <= range.end);
        let merged = self.ranges[from..to]
            .iter()
            .fold(range, |all, r| ByteRange {
                start: all.start.min(r.start),
                end: all.end.max(r.end),
            });
        self.ranges.splice(from..to, [merged]);
    }

    /// Returns the ranges in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.ranges.iter().copied()
    }

    /// The number of bytes in the set.
    pub fn len(&self) -> u64 {
        self.iter().map(ByteRange::len).sum()
    }

    /// Whether the set holds no byte.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether each byte of `range` is in the set.
    pub fn covers(&self, range: ByteRange) -> bool {
        range.is_empty() || {
            let at = self.ranges.partition_point(|r| r.end <= range.start);
            self.ranges.get(at).is_some_and(|r| r.contains(range))
        }
    }

    /// Whether any byte of `range` is in the set.
    pub fn overlaps(&self, range: ByteRange) -> bool {
        let at = self.ranges.partition_point(|r| r.end <= range.start);
        self.ranges
            .get(at)
            .is_some_and(|r| r.intersect(range).is_some())
    }
}

impl Extend<ByteRange> for RangeSet {
    fn extend<I: IntoIterator<Item = ByteRange>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert(range);
        }
    }
}

impl FromIterator<ByteRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = ByteRange>>(ranges: I) -> Self {
        let mut set = Self::new();
        set.extend(ranges);
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[test]
    fn range_with_an_end_past_64_bits_is_refused() {
        assert_eq!(ByteRange::at(u64::MAX, 1), None);
        assert_eq!(ByteRange::new(2, 1), None);
    }

    #[test]
    fn rounding_out_stops_at_the_limit() {
        assert_eq!(r(5, 6).round_out(4, 7), r(4, 7));
        assert_eq!(r(5, 6).round_out(4, 100), r(4, 8));
        assert_eq!(r(4, 8).round_out(4, 100), r(4, 8));
    }

    #[test]
    fn split_pieces_end_at_multiples_and_cover_all() {
        let pieces: Vec<_> = r(3, 11).split(4).collect();
        assert_eq!(pieces, [r(3, 4), r(4, 8), r(8, 11)]);
        assert_eq!(r(u64::MAX - 1, u64::MAX).split(4).count(), 1);
    }

    #[test]
    fn set_agrees_with_a_bit_vector() {
        let mut seed = 1_u64;
        let mut next = |below: u64| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        for _ in 0..200 {
            let mut set = RangeSet::new();
            let mut bits = [false; 64];
            for _ in 0..next(12) {
                let start = next(64);
                let end = start + next(65 - start);
                set.insert(r(start, end));
                bits[start as usize..end as usize].fill(true);
            }
            assert_eq!(set.len(), bits.iter().filter(|b| **b).count() as u64);
            for w in set.ranges.windows(2) {
                assert!(w[0].end < w[1].start);
            }
            for start in 0..64 {
                for end in start..=64 {
                    let want = &bits[start as usize..end as usize];
                    assert_eq!(set.covers(r(start, end)), want.iter().all(|b| *b));
                    assert_eq!(set.overlaps(r(start, end)), want.iter().any(|b| *b));
                }
            }
        }
    }
}
