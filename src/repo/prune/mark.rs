//! Finding what snapshots need: all identifiers of their maps, and the packs that hold them.

use std::collections::{HashMap, HashSet};

use super::ids::{IdSorter, SortedIds};
use super::packs::PackList;
use crate::repo::bad::BadRecords;
use crate::repo::error::RepoError;
use crate::repo::format::generation::PackName;
use crate::repo::format::node::FAN_OUT;
use crate::repo::format::segment::{Prefix, SegmentEntry, prefix_of};
use crate::repo::ids::NodeId;
use crate::repo::index::Merged;
use crate::repo::map::node_ref;
use crate::repo::repository::Repository;
use crate::repo::snapshot::{DiskRecord, NodeRef, Snapshot};

/// Collects the identifiers of all nodes and chunks of snapshots.
pub(super) fn needed_by<'a>(
    repo: &Repository,
    snapshots: impl IntoIterator<Item = &'a Snapshot>,
) -> Result<SortedIds, RepoError> {
    let mut walk = Walk::new(repo);
    for snapshot in snapshots {
        for disk in &snapshot.draft.disks {
            if let Some(root) = &disk.root.node {
                walk.node(root, disk.root.level, None)?;
            }
        }
    }
    Ok(walk.ids.finish())
}

/// Collects the identifiers of the nodes and chunks of snapshots, but not those that are at the same place of the same
/// disk's last snapshot among `known` ones: what is looked through is in proportion to what changed since.
pub(super) fn needed_beyond(
    repo: &Repository,
    snapshots: &[&Snapshot],
    known: &[&Snapshot],
) -> Result<SortedIds, RepoError> {
    let mut last: HashMap<(&str, &str), &DiskRecord> = HashMap::new();
    for snapshot in known {
        for disk in &snapshot.draft.disks {
            let of_disk = (snapshot.draft.name.as_str(), disk.disk.as_str());
            let best = last.entry(of_disk).or_insert(disk);
            if best.generation < disk.generation {
                *best = disk;
            }
        }
    }
    let mut walk = Walk::new(repo);
    for snapshot in snapshots {
        for disk in &snapshot.draft.disks {
            let of_disk = (snapshot.draft.name.as_str(), disk.disk.as_str());
            let beside = last.get(&of_disk).map(|known| &known.root);
            let beside = beside.and_then(|root| Some((root.node?, root.level)));
            if let Some(root) = &disk.root.node {
                walk.node(root, disk.root.level, beside)?;
            }
        }
    }
    Ok(walk.ids.finish())
}

/// A node of a known map and its level.
type Beside = (NodeRef, u8);

struct Walk<'a> {
    repo: &'a Repository,
    /// Nodes that were gone through: snapshots share most of theirs.
    seen: HashSet<NodeId>,
    ids: IdSorter,
}

impl<'a> Walk<'a> {
    fn new(repo: &'a Repository) -> Self {
        Self {
            repo,
            seen: HashSet::new(),
            ids: IdSorter::new(IDS_IN_MEMORY),
        }
    }

    /// Goes through a node; `beside` is what starts at the same place in a map of which all is known.
    fn node(&mut self, node: &NodeRef, level: u8, beside: Option<Beside>) -> Result<(), RepoError> {
        let beside = self.at_level(beside, level)?;
        if beside.is_some_and(|(known, at)| at == level && known.id == node.id) {
            return Ok(());
        }
        // Forgetting costs going through some again, and keeps memory bounded.
        if self.seen.len() >= SEEN_NODES {
            self.seen.clear();
        }
        if !self.seen.insert(node.id) {
            return Ok(());
        }
        self.ids.push(prefix_of(node.id.as_bytes()))?;
        let loaded = self.repo.nodes().load(node, level)?;
        let known = match beside {
            Some((known, at)) if at == level => Some(self.repo.nodes().load(&known, level)?),
            _ => None,
        };
        for slot in 0..FAN_OUT {
            let Some(child) = loaded.child(slot) else {
                continue;
            };
            let same_place = known.as_ref().and_then(|known| known.child(slot));
            let Some(below) = level.checked_sub(1) else {
                if same_place.is_none_or(|known| known.id != child.id) {
                    self.ids.push(prefix_of(&child.id))?;
                }
                continue;
            };
            let beside = match beside {
                // The disk grew: what is known is all at its start.
                Some((_, at)) if at < level => beside.filter(|_| slot == 0),
                _ => same_place.map(|known| (node_ref(known), below)),
            };
            self.node(&node_ref(child), below, beside)?;
        }
        Ok(())
    }

    /// Goes down at the start of a map that is higher than `level`, as that of a disk that shrank.
    fn at_level(&self, beside: Option<Beside>, level: u8) -> Result<Option<Beside>, RepoError> {
        let Some((mut node, mut at)) = beside else {
            return Ok(None);
        };
        while at > level {
            let loaded = self.repo.nodes().load(&node, at)?;
            let Some(first) = loaded.child(0) else {
                return Ok(None);
            };
            (node, at) = (node_ref(first), at - 1);
        }
        Ok(Some((node, at)))
    }
}

/// A record in a pack, which stands by its number.
#[derive(Clone, Copy)]
pub(super) struct Copied {
    pub(super) pack: u32,
    pub(super) offset: u32,
    pub(super) len: u32,
}

/// The places that hold one record.
#[derive(Clone, Copy)]
pub(super) struct Copies<'a> {
    pub(super) places: &'a [Copied],
    /// Whether all of them are marked as damaged: then none is as good as another, and all stay.
    pub(super) damaged: bool,
}

/// Goes through identifiers and index together, and calls `each` with the places of each identifier that are in
/// packs that are there. Returns how many have none, with one of them.
pub(super) fn join(
    repo: &Repository,
    packs: &PackList,
    needed: &mut SortedIds,
    each: &mut dyn FnMut(Copies<'_>),
) -> Result<Missing, RepoError> {
    let mut index = Entries::open(repo, packs)?;
    let mut bad = BadRecords::load(repo)?;
    if let Some((_, error)) = bad.unreadable.pop() {
        // Of two copies the one that is damaged might be kept.
        return Err(error);
    }
    let mut needed = needed.iter()?;
    let mut missing = Missing::default();
    let (mut places, mut damaged) = (Vec::new(), Vec::new());
    while let Some(id) = needed.next()? {
        places.clear();
        damaged.clear();
        index.places_of(id, &mut |pack, entry| {
            if !packs.holds(pack, entry) {
                return;
            }
            let copied = Copied {
                pack,
                offset: entry.offset,
                len: entry.len,
            };
            // Names are looked at only where something is marked.
            match !bad.is_empty() && bad.holds(packs.name(pack), entry.offset) {
                true => damaged.push(copied),
                false => places.push(copied),
            }
        })?;
        // Damaged copies stay as long as there is no other: one may have failed to be read only once, or may be had back.
        let all_damaged = places.is_empty();
        if all_damaged {
            std::mem::swap(&mut places, &mut damaged);
            // A good one may be in a pack that a lost segment of the index named.
            missing.lost += u64::from(!places.is_empty());
        }
        // What a check has called lost stops nothing, but calls for care.
        if places.is_empty() && bad.names(id) {
            missing.lost += 1;
            continue;
        }
        if places.is_empty() {
            missing.count += 1;
            missing.example.get_or_insert(id);
        } else {
            each(Copies {
                places: &places,
                damaged: all_damaged,
            });
        }
    }
    Ok(missing)
}

/// Identifiers that are in no pack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Missing {
    count: u64,
    /// How many more there are that a check has called lost, or damaged wherever they are.
    lost: u64,
    example: Option<Prefix>,
}

impl Missing {
    /// Fails when there are any that were not known to be lost; returns whether a pack can be useless.
    ///
    /// What is lost may have been stored again, into a pack that a lost segment of the index named: where something is
    /// lost, no pack goes that the index does not know. All records of a pack are in one segment.
    pub(super) fn check(&self, repo: &Repository) -> Result<MayGo, RepoError> {
        let Some(example) = self.example else {
            return Ok(match self.lost {
                0 => MayGo::Any,
                _ => MayGo::Known(repo.index().packs()),
            });
        };
        Err(match repo.index().damaged().pop() {
            // Most likely that is where they stand.
            Some((_, unreadable)) => unreadable,
            None => RepoError::RecordsMissing {
                records: self.count,
                example: format!("{example:032x}"),
            },
        })
    }
}

/// The packs that may be removed, if nobody needs them.
pub(super) enum MayGo {
    Any,
    Known(HashSet<PackName>),
}

impl MayGo {
    pub(super) fn includes(&self, pack: &PackName) -> bool {
        match self {
            Self::Any => true,
            Self::Known(known) => known.contains(pack),
        }
    }
}

/// The index, gone through in order.
struct Entries<'a> {
    merged: Merged<'a>,
    next: Option<SegmentEntry>,
    /// For each pack that the index names its number, if it is there.
    numbers: Vec<Option<u32>>,
}

impl<'a> Entries<'a> {
    fn open(repo: &'a Repository, packs: &PackList) -> Result<Self, RepoError> {
        let mut merged = repo.index().entries()?;
        let next = merged.next()?;
        let numbers = merged.packs().iter().map(|name| packs.number(name));
        Ok(Self {
            numbers: numbers.collect(),
            merged,
            next,
        })
    }

    fn places_of(
        &mut self,
        id: Prefix,
        each: &mut dyn FnMut(u32, &SegmentEntry),
    ) -> Result<(), RepoError> {
        while let Some(entry) = self.next {
            if entry.prefix > id {
                return Ok(());
            }
            if entry.prefix == id
                && let Some(pack) = self.numbers[entry.pack as usize]
            {
                each(pack, &entry);
            }
            self.next = self.merged.next()?;
        }
        Ok(())
    }
}

/// What one pack must keep: bytes and records, each record counted for one pack only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) bytes: u64,
    pub(super) records: u64,
}

/// Picks for each identifier the pack that keeps it: of several whole ones the one of which most is needed.
pub(super) struct Keepers {
    /// The needed bytes of each pack, records that stand elsewhere too included.
    needed_bytes: Vec<u64>,
}

impl Keepers {
    pub(super) fn count(
        repo: &Repository,
        packs: &PackList,
        needed: &mut SortedIds,
    ) -> Result<Self, RepoError> {
        let mut needed_bytes = vec![0; packs.names().len()];
        join(repo, packs, needed, &mut |copies| {
            for copied in copies.places {
                needed_bytes[copied.pack as usize] += u64::from(copied.len);
            }
        })?
        .check(repo)?;
        Ok(Self { needed_bytes })
    }

    /// Picks among the places of one identifier: one, or all of them where all are damaged.
    pub(super) fn pick<'a>(&self, packs: &PackList, copies: Copies<'a>) -> &'a [Copied] {
        if copies.damaged || copies.places.len() == 1 {
            return copies.places;
        }
        let worth = |pack: u32| {
            let needed = self.needed_bytes[pack as usize];
            // In millionths of the pack, which is enough to tell packs apart.
            u128::from(needed) * 1_000_000 / u128::from(packs.len(pack).max(1))
        };
        let first = |copied: &&Copied| (worth(copied.pack), copied.pack, copied.offset);
        let best = copies.places.iter().max_by_key(first);
        best.map_or(&[], std::slice::from_ref)
    }
}

/// Identifiers that are sorted in memory before they go to a file: 64 MiB.
const IDS_IN_MEMORY: usize = 4 << 20;

/// Nodes that are remembered as gone through; some 50 MiB.
const SEEN_NODES: usize = 1 << 20;
