//! What differs between two maps: equal subtrees are skipped by their identifiers, and no more is read than a range needs.

use std::ops::Range;

use super::super::error::RepoError;
use super::super::format::node::MAX_LEVEL;
use super::super::snapshot::span_of;
use super::reader::MapReader;
use super::walker::{Found, Walker};

/// Calls `each` with the ranges of chunk numbers where two disks of one repository differ, in order and apart.
///
/// A disk reads as zeros past its end, so that growing by zeros is no difference.
pub fn changed(
    before: &MapReader,
    after: &MapReader,
    each: &mut dyn FnMut(Range<u64>) -> Result<(), RepoError>,
) -> Result<(), RepoError> {
    let end = before.chunks().max(after.chunks());
    let mut open = 0..0;
    for found in Comparison::of(before, after, 0..end) {
        let Compared { chunks, same } = found?;
        if same {
            continue;
        }
        if open.end != chunks.start && !open.is_empty() {
            each(std::mem::replace(&mut open, chunks.start..chunks.start))?;
        }
        open = match open.is_empty() {
            true => chunks,
            false => open.start..chunks.end,
        };
    }
    match open.is_empty() {
        true => Ok(()),
        false => each(open),
    }
}

/// A run of chunks that two disks have in common, or that differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compared {
    /// Their numbers, at least one.
    pub chunks: Range<u64>,
    /// Whether all of them are the same on both disks, or all differ.
    pub same: bool,
}

/// The runs of a range of two disks of one repository, in order and without gaps; ends after an error.
///
/// A run goes no further than one look at the maps told, so that neighbours may be alike: each costs a few nodes at
/// most, whatever the disks' sizes.
#[derive(Debug)]
pub struct Comparison {
    before: Walker,
    after: Walker,
    at: u64,
    end: u64,
    /// The level to look at first.
    level: u8,
}

impl Comparison {
    /// Compares the chunks of a range; past a disk's end there are zeros.
    pub fn of(before: &MapReader, after: &MapReader, chunks: Range<u64>) -> Self {
        Self {
            level: before.root().level.max(after.root().level),
            before: before.walker(),
            after: after.walker(),
            at: chunks.start,
            end: chunks.end,
        }
    }

    fn look(&mut self) -> Result<Compared, RepoError> {
        let at = self.at;
        let mut level = self.level;
        loop {
            let before = self.before.look(at, level)?;
            let after = self.after.look(at, level)?;
            let same = match (before, after) {
                (Some(Found::Child(a)), Some(Found::Child(b))) if a.id == b.id => {
                    Some(child_span(level))
                }
                (Some(Found::Hole { chunks: a }), Some(Found::Hole { chunks: b })) => {
                    Some(a.min(b))
                }
                _ => None,
            };
            let (span, same) = match (same, level.checked_sub(1)) {
                (Some(span), _) => (span, true),
                (None, None) => (1, false),
                (None, Some(below)) => {
                    level = below;
                    continue;
                }
            };
            let first = at - at % span;
            let chunks = at..first.saturating_add(span).min(self.end);
            return Ok(Compared { chunks, same });
        }
    }
}

impl Iterator for Comparison {
    type Item = Result<Compared, RepoError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let found = self.look();
        self.at = match &found {
            Ok(compared) => compared.chunks.end,
            Err(_) => self.end,
        };
        // Below the lowest node that both ran into differs what is above: only a new child is looked at from its top.
        self.level = (0..=MAX_LEVEL)
            .rev()
            .find(|level| self.at.is_multiple_of(child_span(*level)))
            .unwrap_or(0)
            .min(self.before.top().max(self.after.top()));
        Some(found)
    }
}

/// The number of chunks below a child of a node of `level`.
fn child_span(level: u8) -> u64 {
    level.checked_sub(1).map_or(1, span_of)
}
