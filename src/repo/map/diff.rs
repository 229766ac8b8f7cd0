//! What differs between two maps: equal subtrees are skipped by their identifiers.

use std::ops::Range;
use std::sync::Arc;

use super::super::error::RepoError;
use super::super::format::node::{Child, FAN_OUT, Node};
use super::super::snapshot::{MapRoot, span_of};
use super::nodes::Nodes;
use super::reader::MapReader;
use super::walker::node_ref;

/// Calls `each` with the ranges of chunk numbers where two disks of one repository differ, in order and apart.
///
/// A disk reads as zeros past its end, so that growing by zeros is no difference.
pub fn changed(
    before: &MapReader,
    after: &MapReader,
    each: &mut dyn FnMut(Range<u64>) -> Result<(), RepoError>,
) -> Result<(), RepoError> {
    let level = before.root().level.max(after.root().level);
    let mut diff = Diff {
        nodes: before.nodes(),
        each,
        open: 0..0,
    };
    let (before, after) = (Side::of(before, level), Side::of(after, level));
    diff.compare(&before, &after, level, 0)?;
    diff.end()
}

struct Diff<'a> {
    nodes: &'a Arc<Nodes>,
    each: &'a mut dyn FnMut(Range<u64>) -> Result<(), RepoError>,
    /// A range that may still grow.
    open: Range<u64>,
}

/// One map at one level.
enum Side {
    Zeros,
    Node(Child),
    /// A root that stands lower than the other map's: the first child of what would be above it.
    Lower {
        root: Child,
        level: u8,
    },
}

impl Side {
    fn of(map: &MapReader, level: u8) -> Self {
        let MapRoot { node, level: own } = map.root();
        match node {
            None => Self::Zeros,
            Some(node) => {
                let root = Child {
                    id: *node.id.as_bytes(),
                    place: node.place,
                };
                match own == level {
                    true => Self::Node(root),
                    false => Self::Lower { root, level: own },
                }
            }
        }
    }

    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Zeros, Self::Zeros) => true,
            (Self::Node(a), Self::Node(b)) => a.id == b.id,
            // At most one of the two is lower than the level at which both are looked at.
            _ => false,
        }
    }

    fn open(&self, nodes: &Nodes, level: u8) -> Result<Opened, RepoError> {
        Ok(match self {
            Self::Zeros => Opened::Zeros,
            Self::Node(child) => Opened::Node(nodes.load(&node_ref(child), level)?),
            Self::Lower { root, level } => Opened::Lower {
                root: *root,
                level: *level,
            },
        })
    }
}

enum Opened {
    Zeros,
    Node(Arc<Node>),
    Lower { root: Child, level: u8 },
}

impl Opened {
    /// Returns the child `slot` of this side at `level`.
    fn child(&self, slot: usize, level: u8) -> Side {
        match self {
            Self::Zeros => Side::Zeros,
            Self::Node(node) => match node.child(slot) {
                Some(child) => Side::Node(*child),
                None => Side::Zeros,
            },
            Self::Lower { .. } if slot > 0 => Side::Zeros,
            Self::Lower { root, level: own } if *own + 1 == level => Side::Node(*root),
            Self::Lower { root, level: own } => Side::Lower {
                root: *root,
                level: *own,
            },
        }
    }
}

impl Diff<'_> {
    fn compare(
        &mut self,
        before: &Side,
        after: &Side,
        level: u8,
        first: u64,
    ) -> Result<(), RepoError> {
        if before.same(after) {
            return Ok(());
        }
        let opened = (
            before.open(self.nodes, level)?,
            after.open(self.nodes, level)?,
        );
        for slot in 0..FAN_OUT {
            let (before, after) = (opened.0.child(slot, level), opened.1.child(slot, level));
            if before.same(&after) {
                continue;
            }
            let slot = slot as u64;
            match level.checked_sub(1) {
                None => self.add(first + slot)?,
                Some(below) => {
                    self.compare(&before, &after, below, first + slot * span_of(below))?;
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, number: u64) -> Result<(), RepoError> {
        if self.open.end != number {
            self.end()?;
            self.open = number..number;
        }
        self.open.end = number + 1;
        Ok(())
    }

    fn end(&mut self) -> Result<(), RepoError> {
        match self.open.is_empty() {
            true => Ok(()),
            false => (self.each)(std::mem::take(&mut self.open)),
        }
    }
}
