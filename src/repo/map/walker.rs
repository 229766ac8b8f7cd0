//! Finding children in a map, with the path of the last one kept.

use std::sync::Arc;

use super::super::error::RepoError;
use super::super::format::node::{Child, FAN_OUT, FAN_OUT_LOG2, MAX_LEVEL, Node};
use super::super::ids::NodeId;
use super::super::snapshot::{MapRoot, NodeRef, span_of};
use super::nodes::Nodes;

/// Looks children up; neighbours cost no read.
#[derive(Debug)]
pub(super) struct Walker {
    nodes: Arc<Nodes>,
    root: MapRoot,
    /// For each level the node last used, and the number of its first chunk.
    path: [Option<(u64, Arc<Node>)>; MAX_LEVEL as usize + 1],
}

/// What stands at a place of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A child.
    Child(Child),
    /// Zeros, at least this many chunks from the aligned start of the place.
    Hole { chunks: u64 },
}

impl Walker {
    pub(super) fn new(nodes: Arc<Nodes>, root: MapRoot) -> Self {
        Self {
            nodes,
            root,
            path: [const { None }; MAX_LEVEL as usize + 1],
        }
    }

    /// Returns the child that covers the chunk `number` in the node of `level`; a level above the root's sees the
    /// root itself as the first child, and zeros behind it.
    pub(super) fn child_at(&mut self, number: u64, level: u8) -> Result<Found, RepoError> {
        let Some(root) = self.root.node else {
            return Ok(Found::Hole { chunks: u64::MAX });
        };
        if level > self.root.level {
            let child_span = span_of(level - 1);
            return Ok(match (number < child_span, level - 1 == self.root.level) {
                (true, true) => Found::Child(Child {
                    id: *root.id.as_bytes(),
                    place: root.place,
                }),
                _ => Found::Hole { chunks: child_span },
            });
        }
        if number >= span_of(self.root.level) {
            return Ok(Found::Hole { chunks: u64::MAX });
        }
        // Down from the lowest level whose node is known.
        let mut at = level;
        while at < self.root.level && !self.has(number, at) {
            at += 1;
        }
        if !self.has(number, at) {
            let node = self.nodes.load(&root, at)?;
            self.keep(number, at, node);
        }
        loop {
            let Some((_, node)) = &self.path[usize::from(at)] else {
                return Ok(Found::Hole { chunks: 1 });
            };
            let slot = (number >> (u32::from(at) * FAN_OUT_LOG2)) as usize % FAN_OUT;
            match node.child(slot) {
                None => {
                    return Ok(Found::Hole {
                        chunks: 1 << (u32::from(at) * FAN_OUT_LOG2),
                    });
                }
                Some(child) if at == level => return Ok(Found::Child(*child)),
                Some(child) => {
                    let child = node_ref(child);
                    at -= 1;
                    let node = self.nodes.load(&child, at)?;
                    self.keep(number, at, node);
                }
            }
        }
    }

    /// As [`Walker::child_at`] at any level; `None` where the root lies further below.
    pub(super) fn look(&mut self, number: u64, level: u8) -> Result<Option<Found>, RepoError> {
        let lies_below = self.root.node.is_some() && level > self.root.level + 1;
        if !lies_below {
            return self.child_at(number, level).map(Some);
        }
        Ok(match number < span_of(self.root.level) {
            true => None,
            false => Some(Found::Hole { chunks: u64::MAX }),
        })
    }

    /// The root's level.
    pub(super) fn top(&self) -> u8 {
        self.root.level
    }

    fn has(&self, number: u64, level: u8) -> bool {
        match &self.path[usize::from(level)] {
            Some((first, _)) => *first == first_of(number, level),
            None => false,
        }
    }

    fn keep(&mut self, number: u64, level: u8, node: Arc<Node>) {
        self.path[usize::from(level)] = Some((first_of(number, level), node));
    }
}

/// Takes a child of a node above the leaves for what it is.
pub(crate) fn node_ref(child: &Child) -> NodeRef {
    NodeRef {
        id: NodeId::from_bytes(child.id),
        place: child.place,
    }
}

fn first_of(number: u64, level: u8) -> u64 {
    number - number % span_of(level)
}
