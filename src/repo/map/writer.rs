//! Writing a disk's map in one pass: memory for one open node per level, untouched subtrees kept unread.

use std::ops::Range;
use std::sync::Arc;

use super::super::chunk::{ChunkEntry, ChunkSize};
use super::super::error::RepoError;
use super::super::format::node::{Child, FAN_OUT, FAN_OUT_LOG2, Node};
use super::super::format::pack::PackKind;
use super::super::session::SessionCore;
use super::super::snapshot::{MapRoot, NodeRef, level_for, span_of};
use super::nodes::Nodes;
use super::walker::{Found, Walker};

/// Writes the map of one disk, told in order what each of its chunks is.
#[derive(Debug)]
pub struct MapWriter {
    session: Arc<SessionCore>,
    nodes: Arc<Nodes>,
    parent: Option<Parent>,
    chunks: u64,
    /// The level of the root.
    level: u8,
    /// The chunks that were told.
    at: u64,
    /// An open node for each level, the leaf first.
    open: Vec<OpenNode>,
    root: Option<NodeRef>,
    written: u64,
}

#[derive(Debug)]
struct Parent {
    walker: Walker,
    chunks: u64,
    /// The chunks that have the same length on both disks.
    keepable: u64,
}

#[derive(Debug)]
struct OpenNode {
    slots: Box<[Option<Child>; FAN_OUT]>,
    used: bool,
}

impl MapWriter {
    pub(crate) fn new(
        session: Arc<SessionCore>,
        nodes: Arc<Nodes>,
        parent: Option<(&MapRoot, u64)>,
        chunk_size: ChunkSize,
        disk_bytes: u64,
    ) -> Result<Self, RepoError> {
        let chunks = chunk_size.count(disk_bytes);
        let level = level_for(chunks);
        let parent = match parent {
            None => None,
            Some((root, parent_bytes)) => {
                let parent_chunks = chunk_size.count(parent_bytes);
                root.check(parent_chunks)?;
                // Where one disk ends within a chunk, the other's chunk is longer and has another identifier.
                let keepable = match parent_bytes == disk_bytes {
                    true => chunks,
                    false => parent_bytes.min(disk_bytes) / u64::from(chunk_size.bytes()),
                };
                Some(Parent {
                    walker: Walker::new(Arc::clone(&nodes), *root),
                    chunks: parent_chunks,
                    keepable,
                })
            }
        };
        let open = (0..=level)
            .map(|_| OpenNode {
                slots: Box::new([None; FAN_OUT]),
                used: false,
            })
            .collect();
        Ok(Self {
            session,
            nodes,
            parent,
            chunks,
            level,
            at: 0,
            open,
            root: None,
            written: 0,
        })
    }

    /// The number of the chunk that must be told next.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The number of chunks of the disk.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// The chunks that can be kept from the parent: those before this number, which both disks have in one length.
    pub fn keepable(&self) -> u64 {
        self.parent.as_ref().map_or(0, |p| p.keepable)
    }

    /// The number of map nodes that were stored, as far as they were not known.
    pub fn nodes_written(&self) -> u64 {
        self.written
    }

    /// Says that the next chunks are as in the parent.
    pub fn keep(&mut self, chunks: Range<u64>) -> Result<(), RepoError> {
        self.check(&chunks)?;
        if !chunks.is_empty() && chunks.end > self.keepable() {
            return Err(RepoError::misuse(format!(
                "chunks {chunks:?} cannot be kept: only {} are the same length in the parent",
                self.keepable()
            )));
        }
        let whole = self.parent.as_ref().map(|p| p.chunks) == Some(self.chunks);
        let end = self.reach(chunks.end, whole);
        while self.at < chunks.end {
            let step = self.step(end);
            let found = match &mut self.parent {
                Some(parent) => parent.walker.child_at(self.at, step)?,
                None => Found::Hole { chunks: 1 },
            };
            match found {
                Found::Child(child) => self.put_child(step, Some(child))?,
                Found::Hole { .. } => self.put_child(step, None)?,
            }
        }
        Ok(())
    }

    /// Says that the next chunks are zeros.
    pub fn zero(&mut self, chunks: Range<u64>) -> Result<(), RepoError> {
        self.check(&chunks)?;
        let end = self.reach(chunks.end, true);
        while self.at < chunks.end {
            let step = self.step(end);
            self.put_child(step, None)?;
        }
        Ok(())
    }

    /// Says what the next chunk is.
    pub fn put(&mut self, number: u64, entry: ChunkEntry) -> Result<(), RepoError> {
        self.check(&(number..number.saturating_add(1)))?;
        let child = Child {
            id: *entry.id.as_bytes(),
            place: entry.place,
        };
        self.put_child(0, Some(child))
    }

    /// Ends the map; all chunks must have been told.
    pub fn finish(mut self) -> Result<MapRoot, RepoError> {
        if self.at != self.chunks {
            return Err(RepoError::misuse(format!(
                "the map ends at chunk {} of {}",
                self.at, self.chunks
            )));
        }
        let last = self.chunks.saturating_sub(1);
        for level in 0..=self.level {
            self.close(level, last)?;
        }
        let root = MapRoot {
            node: self.root,
            level: self.level,
        };
        self.session.add_root(&root);
        Ok(root)
    }

    fn check(&self, chunks: &Range<u64>) -> Result<(), RepoError> {
        if chunks.start == self.at && chunks.start <= chunks.end && chunks.end <= self.chunks {
            return Ok(());
        }
        Err(RepoError::misuse(format!(
            "chunks {chunks:?} were told where {}..{} are left",
            self.at, self.chunks
        )))
    }

    /// Where a range ends that may run past the end of the disk, when it reaches that.
    fn reach(&self, end: u64, past_the_end: bool) -> u64 {
        match end == self.chunks && past_the_end {
            true => span_of(self.level),
            false => end,
        }
    }

    /// Returns the highest level whose node has a child that starts here and ends by `end`; one above the root's
    /// means the whole map.
    fn step(&self, end: u64) -> u8 {
        let mut level = 0;
        while level <= self.level {
            let span = span_of(level);
            if !self.at.is_multiple_of(span) || self.at.saturating_add(span) > end {
                break;
            }
            level += 1;
        }
        level
    }

    /// Sets the child that starts here in the node of `level`, and closes what it fills.
    fn put_child(&mut self, level: u8, child: Option<Child>) -> Result<(), RepoError> {
        if let Some(child) = child {
            self.set(level, self.at, child);
        }
        let span = 1 << (u32::from(level) * FAN_OUT_LOG2);
        let next = self.at.saturating_add(span);
        let last = next - 1;
        self.at = next.min(self.chunks);
        let mut level = level;
        while level <= self.level && next.is_multiple_of(span_of(level)) {
            self.close(level, last)?;
            level += 1;
        }
        Ok(())
    }

    /// Stores the open node of `level`, in which the chunk `last` is, and puts it in its parent.
    fn close(&mut self, level: u8, last: u64) -> Result<(), RepoError> {
        let Some(open) = self.open.get_mut(usize::from(level)).filter(|o| o.used) else {
            return Ok(());
        };
        let node = Node::new(level, &open.slots);
        open.slots.fill(None);
        open.used = false;
        let id = node.id(self.nodes.keys());
        // What did not change is in the parent map, whatever the index knows. A parent that cannot be read here
        // costs no more than a node that is stored again.
        let kept = match &mut self.parent {
            Some(parent) => match parent.walker.child_at(last, level + 1) {
                Ok(Found::Child(child))
                    if child.id == *id.as_bytes()
                        && !self.session.is_bad(PackKind::Meta, &child.place) =>
                {
                    Some(child)
                }
                _ => None,
            },
            None => None,
        };
        let child = match kept {
            Some(child) => child,
            None => {
                let (place, is_new) = self.session.store_node(&id, &node)?;
                self.written += u64::from(is_new);
                Child {
                    id: *id.as_bytes(),
                    place,
                }
            }
        };
        self.set(level + 1, last, child);
        Ok(())
    }

    fn set(&mut self, level: u8, number: u64, child: Child) {
        match self.open.get_mut(usize::from(level)) {
            Some(open) => {
                let slot = (number >> (u32::from(level) * FAN_OUT_LOG2)) as usize % FAN_OUT;
                open.slots[slot] = Some(child);
                open.used = true;
            }
            None => self.root = Some(super::walker::node_ref(&child)),
        }
    }
}
