//! Records that a check found damaged: nothing new may refer to them, so that what is stored again heals all.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use super::chunk::{Place, RecordFlags};
use super::error::RepoError;
use super::format::generation::PackName;
use super::format::health::{BadPack, BadRecord};
use super::format::node::FAN_OUT;
use super::format::pack::{PackKind, PackTrailer};
use super::format::segment::{Prefix, prefix_of};
use super::ids::{NodeId, PackId, random_bytes, to_hex};
use super::map::node_ref;
use super::repository::{Repository, create};
use super::snapshot::{MapRoot, NodeRef, span_of};
use super::storage::StorageError;

/// All marks of damaged records.
#[derive(Clone, Debug, Default)]
pub(crate) struct BadRecords {
    whole: HashSet<PackName>,
    slots: HashSet<(PackKind, PackId, u32)>,
    ids: HashSet<Prefix>,
    files: Vec<(String, BadPack)>,
    /// The marks that cannot be read.
    pub(crate) unreadable: Vec<(String, RepoError)>,
}

impl BadRecords {
    /// Reads all marks; one that cannot be read is reported, since without it nothing is wrong, only less is healed.
    pub(crate) fn load(repo: &Repository) -> Result<Self, RepoError> {
        let mut bad = Self::default();
        for file in repo.storage().list(FOLDER)? {
            let decode = |bytes: &[u8]| BadPack::decode(bytes, repo.keys().mac());
            match repo.read_hint(&file.name, decode)? {
                None => {}
                Some(Ok(mark)) => bad.add(file.name, mark),
                Some(Err(error)) => {
                    tracing::error!(%error, "a list of damaged records is unreadable; check --repair makes it again");
                    bad.unreadable.push((file.name, error));
                }
            }
        }
        Ok(bad)
    }

    fn add(&mut self, file: String, mark: BadPack) {
        let (kind, pack) = mark.pack;
        if mark.whole {
            self.whole.insert(mark.pack);
        }
        for record in &mark.records {
            self.slots.insert((kind, pack, record.offset));
            self.ids.insert(prefix_of(&record.id));
        }
        self.files.push((file, mark));
    }

    /// Whether nothing is marked.
    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Whether the record at an offset of a pack is damaged.
    pub(crate) fn holds(&self, pack: &PackName, offset: u32) -> bool {
        !self.is_empty()
            && (self.whole.contains(pack) || self.slots.contains(&(pack.0, pack.1, offset)))
    }

    /// Whether all records of a pack are marked.
    pub(crate) fn is_whole(&self, pack: &PackName) -> bool {
        self.whole.contains(pack)
    }

    /// Whether a record of this identifier was found damaged somewhere.
    pub(crate) fn names(&self, id: Prefix) -> bool {
        self.ids.contains(&id)
    }

    /// The marks, with the files that hold them.
    pub(crate) fn files(&self) -> &[(String, BadPack)] {
        &self.files
    }
}

/// Gathers what is to be marked.
#[derive(Debug, Default)]
pub(crate) struct NewMarks {
    packs: BTreeMap<PackName, (bool, BTreeMap<u32, [u8; 32]>)>,
}

impl NewMarks {
    /// Marks one record.
    pub(crate) fn add(&mut self, pack: PackName, id: [u8; 32], offset: u32) {
        self.packs.entry(pack).or_default().1.insert(offset, id);
    }

    /// Marks all records of a pack.
    pub(crate) fn add_whole(&mut self, pack: PackName) {
        self.packs.entry(pack).or_default().0 = true;
    }

    /// Writes what is not marked yet; returns how many records and whole packs that is.
    pub(crate) fn write(self, repo: &Repository, known: &BadRecords) -> Result<u64, RepoError> {
        let mut new = 0;
        for (pack, (whole, records)) in self.packs {
            let whole = whole && !known.whole.contains(&pack);
            let records: Vec<BadRecord> = records
                .into_iter()
                .filter(|(offset, id)| {
                    !known.slots.contains(&(pack.0, pack.1, *offset))
                        || !known.ids.contains(&prefix_of(id))
                })
                .map(|(offset, id)| BadRecord { id, offset })
                .collect();
            if !whole && records.is_empty() {
                continue;
            }
            new += records.len() as u64 + u64::from(whole);
            for records in split(records) {
                let mark = BadPack {
                    pack,
                    whole,
                    records,
                };
                let name: [u8; 16] = random_bytes()?;
                let file = mark.encode(repo.keys().mac())?;
                create(
                    &**repo.storage(),
                    &format!("{FOLDER}{}", to_hex(&name)),
                    &file,
                )?;
            }
        }
        repo.storage().barrier()?;
        Ok(new)
    }
}

fn split(mut records: Vec<BadRecord>) -> Vec<Vec<BadRecord>> {
    let mut parts = Vec::new();
    while records.len() > MARKED_AT_ONCE {
        let rest = records.split_off(MARKED_AT_ONCE);
        parts.push(std::mem::replace(&mut records, rest));
    }
    parts.push(records);
    parts
}

impl Repository {
    /// Finds the chunks of a map that are damaged and not stored anew yet, in order: what a backup must read again.
    ///
    /// Costs nothing unless a check has marked something.
    pub fn damaged_chunks(&self, root: &MapRoot) -> Result<Vec<Range<u64>>, RepoError> {
        let bad = BadRecords::load(self)?;
        if bad.is_empty() {
            return Ok(Vec::new());
        }
        self.index().refresh()?;
        let mut walk = Walk {
            repo: self,
            bad: &bad,
            clean: HashSet::new(),
            lost: HashMap::new(),
            found: Vec::new(),
        };
        if let Some(node) = &root.node {
            walk.node(node, root.level, 0)?;
        }
        Ok(walk.found)
    }

    /// Removes the marks of packs that are gone, as far as all that they held is in another place.
    ///
    /// The mark of a chunk that is lost stays: it makes the next backup read that chunk again.
    pub(crate) fn tidy_bad(&self) -> Result<(), RepoError> {
        let bad = BadRecords::load(self)?;
        for (file, mark) in bad.files() {
            let (kind, pack) = mark.pack;
            match self.storage().len(&kind.file_name(&pack)) {
                Ok(_) => continue,
                Err(StorageError::Missing { .. }) => {}
                Err(other) => return Err(other.into()),
            }
            let mut healed = true;
            for record in &mark.records {
                let hint = Place {
                    pack,
                    offset: record.offset,
                    len: 0,
                    flags: RecordFlags::RAW,
                };
                healed &= self.has_good_copy(&bad, kind, &record.id, &hint)?;
            }
            if healed {
                match self.storage().remove(file) {
                    Ok(()) | Err(StorageError::Missing { .. }) => {}
                    Err(other) => return Err(other.into()),
                }
            }
        }
        Ok(())
    }

    /// Whether a record can be had from a place that is not marked, as far as lengths tell.
    pub(crate) fn has_good_copy(
        &self,
        bad: &BadRecords,
        kind: PackKind,
        id: &[u8; 32],
        hint: &Place,
    ) -> Result<bool, RepoError> {
        let mut places = vec![*hint];
        let found = self.index().find_all(id)?;
        places.extend(found.iter().filter(|(k, _)| *k == kind).map(|(_, p)| *p));
        for place in places {
            if bad.holds(&(kind, place.pack), place.offset) {
                continue;
            }
            match self.storage().len(&kind.file_name(&place.pack)) {
                Ok(len) => {
                    let end = u64::from(place.offset) + u64::from(place.len);
                    if end + PackTrailer::LEN as u64 <= len {
                        return Ok(true);
                    }
                }
                Err(StorageError::Missing { .. }) => {}
                Err(other) => return Err(other.into()),
            }
        }
        Ok(false)
    }
}

/// Looks for damage in one map.
struct Walk<'a> {
    repo: &'a Repository,
    bad: &'a BadRecords,
    /// Nodes below which nothing is damaged.
    clean: HashSet<NodeId>,
    /// What was looked up.
    lost: HashMap<[u8; 32], bool>,
    found: Vec<Range<u64>>,
}

impl Walk<'_> {
    fn node(&mut self, node: &NodeRef, level: u8, first: u64) -> Result<(), RepoError> {
        if self.clean.contains(&node.id) {
            return Ok(());
        }
        let before = self.found.last().map(|r| r.end);
        let lost = self.is_lost(PackKind::Meta, node.id.as_bytes(), &node.place)?;
        let loaded = match lost {
            true => None,
            false => match self.repo.nodes().load(node, level) {
                Ok(loaded) => Some(loaded),
                Err(error) if error.is_refusal() => return Err(error),
                Err(_) => None,
            },
        };
        let Some(loaded) = loaded else {
            self.add(first..first.saturating_add(span_of(level)));
            return Ok(());
        };
        for slot in 0..FAN_OUT {
            let Some(child) = loaded.child(slot) else {
                continue;
            };
            let slot = slot as u64;
            match level.checked_sub(1) {
                None if self.is_lost(PackKind::Data, &child.id, &child.place)? => {
                    self.add(first + slot..first + slot + 1);
                }
                None => {}
                Some(below) => {
                    self.node(&node_ref(child), below, first + slot * span_of(below))?;
                }
            }
        }
        if self.found.last().map(|r| r.end) == before {
            self.clean.insert(node.id);
        }
        Ok(())
    }

    fn is_lost(&mut self, kind: PackKind, id: &[u8; 32], hint: &Place) -> Result<bool, RepoError> {
        if !self.bad.holds(&(kind, hint.pack), hint.offset) && !self.bad.names(prefix_of(id)) {
            return Ok(false);
        }
        if let Some(known) = self.lost.get(id) {
            return Ok(*known);
        }
        let lost = !self.repo.has_good_copy(self.bad, kind, id, hint)?;
        self.lost.insert(*id, lost);
        Ok(lost)
    }

    fn add(&mut self, chunks: Range<u64>) {
        match self.found.last_mut() {
            Some(last) if last.end == chunks.start => last.end = chunks.end,
            _ => self.found.push(chunks),
        }
    }
}

pub(crate) const FOLDER: &str = "bad/";

/// A mark of 2.3 MB.
const MARKED_AT_ONCE: usize = 1 << 16;
