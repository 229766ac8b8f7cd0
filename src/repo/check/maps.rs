//! The maps: each node once, each chunk looked for, and what is lost named by snapshot, disk and range.

use std::collections::{HashMap, HashSet};

use super::index::IndexSays;
use super::packs::Packs;
use super::{Check, DamagedRange};
use crate::repo::chunk::{ChunkEntry, Place};
use crate::repo::error::RepoError;
use crate::repo::format::generation::PackName;
use crate::repo::format::node::{Child, FAN_OUT};
use crate::repo::format::pack::PackKind;
use crate::repo::format::segment::{Prefix, prefix_of};
use crate::repo::ids::{ChunkId, NodeId};
use crate::repo::map::node_ref;
use crate::repo::prune::ids::{IdSorter, SortedIds};
use crate::repo::snapshot::{DiskRecord, NodeRef, Snapshot, span_of};

impl Check<'_> {
    /// Reads all nodes that can be read, and collects the identifiers of the chunks that they name.
    pub(super) fn walk(&mut self, snapshots: &[Snapshot]) -> Result<SortedIds, RepoError> {
        let mut walk = Walk {
            check: self,
            seen: HashSet::new(),
            ids: IdSorter::new(IDS_IN_MEMORY),
        };
        for disk in snapshots.iter().flat_map(|s| &s.draft.disks) {
            if let Some(root) = &disk.root.node {
                walk.node(root, disk.root.level)?;
            }
        }
        Ok(walk.ids.finish())
    }

    /// Looks for all chunks in the packs that are whole; returns those that are in none.
    pub(super) fn resolve(
        &mut self,
        needed: &mut SortedIds,
        packs: &Packs,
        index: IndexSays,
    ) -> Result<HashSet<Prefix>, RepoError> {
        let mut missing = HashSet::new();
        let mut not_indexed: HashSet<PackName> = HashSet::new();
        let mut merged = packs.scratch.index.entries()?;
        let mut next = merged.next()?;
        let mut needed = needed.iter()?;
        while let Some(id) = needed.next()? {
            self.found.chunks += 1;
            let (mut found, mut indexed, mut example) = (false, false, None);
            while let Some(entry) = next.filter(|entry| entry.prefix <= id) {
                if entry.prefix == id {
                    let name = merged.packs()[entry.pack as usize];
                    let place = Place {
                        pack: name.1,
                        offset: entry.offset,
                        len: entry.len,
                        flags: entry.flags(),
                    };
                    if name.0 == PackKind::Data && packs.is_usable(self, &name, &place) {
                        found = true;
                        indexed |= index.knows(&name);
                        example = Some(name);
                    }
                }
                next = merged.next()?;
            }
            if !found && missing.len() < MISSING {
                missing.insert(id);
            }
            if found && !indexed {
                not_indexed.extend(example);
            }
        }
        let mut not_indexed: Vec<PackName> = not_indexed.into_iter().collect();
        not_indexed.sort_unstable();
        for (kind, pack) in not_indexed {
            let problem = format!("it does not know {}", kind.file_name(&pack));
            self.found.file("idx/", problem);
        }
        Ok(missing)
    }

    /// Names the ranges of all disks that hold something missing, and marks the records.
    pub(super) fn name_losses(
        &mut self,
        snapshots: &[Snapshot],
        missing: &HashSet<Prefix>,
    ) -> Result<(), RepoError> {
        let mut naming = Naming {
            missing,
            readable: HashMap::new(),
            clean: HashSet::new(),
            plain: Vec::new(),
            check: self,
        };
        for snapshot in snapshots {
            for disk in &snapshot.draft.disks {
                if let Some(root) = &disk.root.node {
                    let at = Disk { snapshot, disk };
                    naming.node(&at, root, disk.root.level, 0)?;
                }
            }
        }
        Ok(())
    }
}

struct Walk<'a, 'c> {
    check: &'a mut Check<'c>,
    seen: HashSet<NodeId>,
    ids: IdSorter,
}

impl Walk<'_, '_> {
    fn node(&mut self, node: &NodeRef, level: u8) -> Result<(), RepoError> {
        // Forgetting costs going through some again, and keeps memory bounded.
        if self.seen.len() >= SEEN_NODES {
            self.seen.clear();
        }
        if !self.seen.insert(node.id) {
            return Ok(());
        }
        let loaded = match self.check.repo.nodes().load(node, level) {
            Ok(loaded) => loaded,
            Err(error) if error.is_refusal() => return Err(error),
            // Named with its range later.
            Err(_) => return Ok(()),
        };
        self.check.found.nodes += 1;
        for child in loaded.children() {
            match level.checked_sub(1) {
                None => self.ids.push(prefix_of(&child.id))?,
                Some(below) => self.node(&node_ref(child), below)?,
            }
        }
        Ok(())
    }
}

/// A disk that is gone through.
struct Disk<'a> {
    snapshot: &'a Snapshot,
    disk: &'a DiskRecord,
}

struct Naming<'a, 'c> {
    check: &'a mut Check<'c>,
    missing: &'a HashSet<Prefix>,
    /// Whether chunks that no footer knows can be read all the same.
    readable: HashMap<[u8; 32], bool>,
    /// Nodes below which all is well.
    clean: HashSet<NodeId>,
    plain: Vec<u8>,
}

impl Naming<'_, '_> {
    /// Returns whether all below is well.
    fn node(
        &mut self,
        at: &Disk<'_>,
        node: &NodeRef,
        level: u8,
        first: u64,
    ) -> Result<bool, RepoError> {
        if self.clean.contains(&node.id) {
            return Ok(true);
        }
        let loaded = match self.check.repo.nodes().load(node, level) {
            Ok(loaded) => loaded,
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => {
                tracing::error!(%error, "a map node is lost");
                let chunks = first..first.saturating_add(span_of(level));
                self.lost(at, chunks, PackKind::Meta, node.id.as_bytes(), &node.place);
                return Ok(false);
            }
        };
        let mut clean = true;
        for slot in 0..FAN_OUT {
            let Some(child) = loaded.child(slot) else {
                continue;
            };
            let slot = slot as u64;
            clean &= match level.checked_sub(1) {
                None => self.chunk(at, child, first + slot)?,
                Some(below) => {
                    let first = first + slot * span_of(below);
                    self.node(at, &node_ref(child), below, first)?
                }
            };
        }
        if clean {
            if self.clean.len() >= SEEN_NODES {
                self.clean.clear();
            }
            self.clean.insert(node.id);
        }
        Ok(clean)
    }

    fn chunk(&mut self, at: &Disk<'_>, child: &Child, number: u64) -> Result<bool, RepoError> {
        if !self.missing.contains(&prefix_of(&child.id)) {
            return Ok(true);
        }
        // It may stand in a pack whose footer is damaged; then it is in danger and not lost.
        let name = (PackKind::Data, child.place.pack);
        self.check.marks.add(name, child.id, child.place.offset);
        let known = self.readable.get(&child.id).copied();
        let readable = match known {
            Some(known) => known,
            None => {
                let repo = self.check.repo;
                let plain_len = repo.chunk_size().chunk_len(number, at.disk.size_bytes);
                let entry = ChunkEntry {
                    id: ChunkId::from_bytes(child.id),
                    place: child.place,
                };
                let read = repo.read_chunk(&entry, plain_len, &mut self.plain).is_ok();
                self.readable.insert(child.id, read);
                read
            }
        };
        self.check.needed_packs.insert(name);
        self.check.lost.insert(prefix_of(&child.id));
        if readable {
            self.in_danger(name);
        } else {
            let chunks = number..number + 1;
            self.lost(at, chunks, PackKind::Data, &child.id, &child.place);
        }
        Ok(readable)
    }

    /// Reports a pack that holds the only copy of something, and no good footer.
    fn in_danger(&mut self, name: PackName) {
        if self.check.marked_packs.insert(name) {
            let problem = "a snapshot needs what only this pack holds, whose footer is damaged";
            let file = name.0.file_name(&name.1);
            self.check.found.file(file, problem);
        }
    }

    fn lost(
        &mut self,
        at: &Disk<'_>,
        chunks: std::ops::Range<u64>,
        kind: PackKind,
        id: &[u8; 32],
        place: &Place,
    ) {
        let chunk = u64::from(self.check.repo.chunk_size().bytes());
        let offset = chunks.start.saturating_mul(chunk);
        let end = chunks
            .end
            .saturating_mul(chunk)
            .min(at.disk.size_bytes)
            .max(offset);
        self.check.needed_packs.insert((kind, place.pack));
        self.check.lost.insert(prefix_of(id));
        self.check.marks.add((kind, place.pack), *id, place.offset);
        self.check.found.range(DamagedRange {
            snapshot: at.snapshot.id,
            disk: at.disk.disk.clone(),
            offset,
            len: end - offset,
            file: kind.file_name(&place.pack),
            at: place.offset.into(),
        });
    }
}

/// Identifiers that are sorted in memory before they go to a file: 64 MiB.
const IDS_IN_MEMORY: usize = 4 << 20;

/// Nodes that are remembered as gone through; some 50 MiB.
const SEEN_NODES: usize = 1 << 20;

/// How many missing chunks are followed to their disks.
const MISSING: usize = 1 << 20;
