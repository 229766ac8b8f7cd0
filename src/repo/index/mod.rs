//! The index: from an identifier to the places that hold it, in immutable sorted segments.
//!
//! It is a cache: all that it says stands in the packs' footers too. An unreadable segment is reported and left out.

mod merge;
mod segment;
mod write;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::cache::Cache;
use super::chunk::Place;
use super::error::RepoError;
use super::format::pack::PackKind;
use super::format::segment::{self as format, SegmentEntry};
use super::ids::{PackId, SegmentId};
use super::storage::{Storage, StorageError};
pub(crate) use merge::Merged;
use segment::{Pages, Segment};
use write::SegmentWriter;

/// The index of an opened repository, shared by all of its sessions and readers.
#[derive(Debug)]
pub(crate) struct Index {
    storage: Arc<dyn Storage>,
    segments: RwLock<Arc<Vec<Arc<Segment>>>>,
    pages: Pages,
    loading: Mutex<Loading>,
}

#[derive(Debug, Default)]
struct Loading {
    loaded: bool,
    damaged: Vec<(String, RepoError)>,
}

impl Index {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        Self {
            storage,
            segments: RwLock::default(),
            pages: Cache::new(CACHED_PAGES),
            loading: Mutex::default(),
        }
    }

    /// Looks for segments that were published since the last look; the first look is the first use.
    pub(crate) fn refresh(&self) -> Result<(), RepoError> {
        let mut loading = lock(&self.loading);
        // A segment may be merged and removed between being listed and being opened: then the merged one is there.
        for _ in 0..LISTINGS {
            if self.load(&mut loading)? {
                break;
            }
        }
        loading.loaded = true;
        Ok(())
    }

    /// Lists and opens the segments; false when one was gone before it could be opened.
    fn load(&self, loading: &mut Loading) -> Result<bool, RepoError> {
        let mut names: Vec<(u8, SegmentId)> = self.listed()?.into_iter().collect();
        // The highest level first: what a segment supersedes needs not be opened.
        names.sort_unstable_by(|a, b| b.cmp(a));
        let known = self.live();
        let mut live: Vec<Arc<Segment>> = Vec::new();
        let mut superseded: HashSet<(u8, SegmentId)> = HashSet::new();
        let mut filter_bytes = 0;
        let mut whole = true;
        loading.damaged.clear();
        for name in names {
            if superseded.contains(&name) {
                continue;
            }
            let found = known.iter().find(|s| s.name() == name);
            let segment = match found {
                Some(segment) => Arc::clone(segment),
                None => match Segment::open(&*self.storage, name, FILTER_BYTES - filter_bytes) {
                    Ok(segment) => Arc::new(segment),
                    Err(RepoError::Missing { .. }) => {
                        whole = false;
                        continue;
                    }
                    Err(error)
                        if error.is_damage() || matches!(error, RepoError::Unsupported { .. }) =>
                    {
                        tracing::error!(%error, "an index segment is unreadable; chunks may be stored again");
                        let file = format::file_name(name.0, &name.1);
                        loading.damaged.push((file, error));
                        continue;
                    }
                    Err(other) => return Err(other),
                },
            };
            superseded.extend(segment.supersedes().iter().copied());
            filter_bytes = FILTER_BYTES.min(filter_bytes + segment.filter_bytes());
            live.push(segment);
        }
        // One of the same level may have been opened before what supersedes it.
        live.retain(|s| !superseded.contains(&s.name()));
        // Recent segments answer first.
        live.reverse();
        self.set_live(live);
        Ok(whole)
    }

    /// Returns a place that holds the record `id`, when the index knows one; a damaged page knows none.
    pub(crate) fn find(&self, id: &[u8; 32]) -> Result<Option<(PackKind, Place)>, RepoError> {
        let mut found = Vec::new();
        'listing: for _ in 0..LISTINGS {
            for segment in self.live().iter() {
                if !segment.may_hold(id) {
                    continue;
                }
                match segment.find(&*self.storage, &self.pages, id, &mut found) {
                    Ok(()) => {}
                    // Merged and removed.
                    Err(RepoError::Missing { .. }) => {
                        self.refresh()?;
                        continue 'listing;
                    }
                    Err(error) if error.is_damage() => {
                        tracing::error!(%error, "an index page is unreadable; chunks may be stored again");
                    }
                    Err(other) => return Err(other),
                }
                if let Some(first) = found.first() {
                    return Ok(Some(*first));
                }
            }
            break;
        }
        Ok(None)
    }

    /// Returns all places that hold the record `id`; asks no filter, since one may be damaged or wrong.
    pub(crate) fn find_all(&self, id: &[u8; 32]) -> Result<Vec<(PackKind, Place)>, RepoError> {
        if !lock(&self.loading).loaded {
            self.refresh()?;
        }
        let mut found = Vec::new();
        'listing: for _ in 0..LISTINGS {
            found.clear();
            for segment in self.live().iter() {
                match segment.find(&*self.storage, &self.pages, id, &mut found) {
                    Ok(()) => {}
                    Err(RepoError::Missing { .. }) => {
                        self.refresh()?;
                        continue 'listing;
                    }
                    Err(error) => tracing::error!(%error, "an index page is unreadable"),
                }
            }
            break;
        }
        found.dedup();
        Ok(found)
    }

    /// Publishes a segment of entries in any order, and uses it from now on.
    pub(crate) fn add(
        &self,
        mut entries: Vec<SegmentEntry>,
        packs: &[(PackKind, PackId)],
    ) -> Result<(), RepoError> {
        entries.sort_unstable();
        let name = write::write_sorted(&*self.storage, 0, &entries, packs)?;
        self.use_new(name, &[])
    }

    /// Merges segments where eight or more stand at one level, as long as no merge has more than `most` entries.
    ///
    /// Pure: two processes that merge the same segments write the same file. What was merged stays until a prune.
    pub(crate) fn merge(&self, most: u64) -> Result<u64, RepoError> {
        self.refresh()?;
        let mut merges = 0;
        for level in 0..MAX_MERGE_LEVEL {
            let inputs: Vec<Arc<Segment>> = self
                .live()
                .iter()
                .filter(|s| s.name().0 == level)
                .cloned()
                .collect();
            let entries: u64 = inputs.iter().map(|s| s.entries()).sum();
            if inputs.len() < MERGE_AT || entries > most {
                continue;
            }
            match self.merge_all(&inputs, level + 1, &|_| true) {
                Ok(()) => merges += 1,
                // Another process merged and removed them.
                Err(RepoError::Missing { .. }) => self.refresh()?,
                Err(other) => return Err(other),
            }
        }
        Ok(merges)
    }

    /// Rewrites the index into one segment without the entries of packs that are not there, when these are many.
    ///
    /// `list` is called once it is settled which segments are read: a pack is there before a segment names it.
    pub(crate) fn compact(
        &self,
        list: impl FnOnce() -> Result<BTreeMap<(PackKind, PackId), u64>, RepoError>,
    ) -> Result<(), RepoError> {
        self.refresh()?;
        let inputs = self.live().to_vec();
        let there = list()?;
        let named: HashSet<_> = inputs.iter().flat_map(|s| s.packs()).collect();
        let gone = named.iter().filter(|name| !there.contains_key(**name));
        let level = inputs.iter().map(|s| s.name().0).max();
        match level {
            Some(level) if gone.count() * 5 > named.len() => {
                self.merge_all(&inputs, level.max(1), &|name| there.contains_key(name))
            }
            _ => Ok(()),
        }
    }

    /// Writes all of another index as one segment that takes the place of the named ones, readable or not.
    pub(crate) fn rewrite(
        &self,
        from: &mut Merged<'_>,
        names: Vec<(u8, SegmentId)>,
    ) -> Result<(), RepoError> {
        let level = names.iter().map(|(level, _)| *level).max().unwrap_or(0);
        let mut writer = SegmentWriter::create(&*self.storage, level.max(1))?;
        while let Some(entry) = from.next()? {
            writer.push(entry)?;
        }
        writer.finish(from.packs().to_vec(), names)?;
        self.storage.barrier()?;
        self.remove_superseded()?;
        // What was read of the old ones is of no use any more.
        self.refresh()
    }

    /// Removes the segments that others have taken the place of; returns how many.
    pub(crate) fn remove_superseded(&self) -> Result<u64, RepoError> {
        self.refresh()?;
        // What takes their place must outlast a power failure that they would have.
        self.storage.barrier()?;
        let live = self.live();
        let superseded: HashSet<_> = live.iter().flat_map(|s| s.supersedes()).copied().collect();
        let mut removed = 0;
        for name in self.listed()?.intersection(&superseded) {
            match self.storage.remove(&format::file_name(name.0, &name.1)) {
                Ok(()) => removed += 1,
                Err(StorageError::Missing { .. }) => {}
                Err(other) => return Err(other.into()),
            }
        }
        Ok(removed)
    }

    /// Goes through all entries in order.
    pub(crate) fn entries(&self) -> Result<Merged<'_>, RepoError> {
        Merged::open(&*self.storage, &self.live())
    }

    /// Returns the packs that segments name.
    pub(crate) fn packs(&self) -> HashSet<(PackKind, PackId)> {
        let live = self.live();
        live.iter().flat_map(|s| s.packs()).copied().collect()
    }

    /// Returns the segments that could not be read, with the reasons.
    pub(crate) fn damaged(&self) -> Vec<(String, RepoError)> {
        lock(&self.loading).damaged.clone()
    }

    /// The number of segments that are asked.
    pub(crate) fn live_count(&self) -> usize {
        self.live().len()
    }

    fn merge_all(
        &self,
        inputs: &[Arc<Segment>],
        level: u8,
        keep: &dyn Fn(&(PackKind, PackId)) -> bool,
    ) -> Result<(), RepoError> {
        let name = merge::merge(&*self.storage, inputs, level, &self.listed()?, keep)?;
        self.storage.barrier()?;
        self.use_new(name, inputs)
    }

    /// Uses a segment that was written, in the place of those that it was made of.
    fn use_new(&self, name: (u8, SegmentId), gone: &[Arc<Segment>]) -> Result<(), RepoError> {
        match Segment::open(&*self.storage, name, self.filter_room()) {
            Ok(segment) => {
                self.replace(gone, Arc::new(segment));
                Ok(())
            }
            // A prune has merged and removed it already.
            Err(RepoError::Missing { .. }) => self.refresh(),
            Err(other) => Err(other),
        }
    }

    fn listed(&self) -> Result<HashSet<(u8, SegmentId)>, RepoError> {
        let files = self.storage.list("idx/")?;
        let names = files
            .iter()
            .filter_map(|f| format::parse_file_name(&f.name));
        Ok(names.collect())
    }

    fn live(&self) -> Arc<Vec<Arc<Segment>>> {
        Arc::clone(&self.segments.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_live(&self, live: Vec<Arc<Segment>>) {
        *self
            .segments
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(live);
    }

    fn replace(&self, gone: &[Arc<Segment>], new: Arc<Segment>) {
        let _one = lock(&self.loading);
        let gone: HashSet<_> = gone.iter().map(|s| s.name()).collect();
        let old = self.live();
        let kept = old
            .iter()
            .filter(|s| !gone.contains(&s.name()) && s.name() != new.name());
        let mut live = vec![Arc::clone(&new)];
        live.extend(kept.cloned());
        live.sort_by_key(|s| s.name().0);
        self.set_live(live);
    }

    fn filter_room(&self) -> u64 {
        let used: u64 = self.live().iter().map(|s| s.filter_bytes()).sum();
        FILTER_BYTES.saturating_sub(used)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The most bytes of filters in memory; a segment past that is asked by its pages alone.
const FILTER_BYTES: u64 = 24 << 20;

/// How often the index is listed again when a segment that was listed is gone.
const LISTINGS: usize = 8;

/// How many decoded pages are kept.
const CACHED_PAGES: usize = 256;

/// How many segments of one level are merged into one of the next.
const MERGE_AT: usize = 8;

/// Levels grow by a factor of eight, so that this is never reached.
const MAX_MERGE_LEVEL: u8 = 20;

#[cfg(test)]
mod tests {
    use super::super::chunk::RecordFlags;
    use super::super::storage::MemoryStorage;
    use super::*;

    /// Makes an identifier whose prefix is spread, or, for some, shares its filter key with others.
    fn id(n: u32) -> [u8; 32] {
        let mut id = *blake3::hash(&n.to_le_bytes()).as_bytes();
        if n.is_multiple_of(5) {
            let head = *blake3::hash(&(n / 1000).to_le_bytes()).as_bytes();
            id[..8].copy_from_slice(&head[..8]);
        }
        id
    }

    fn pack(n: u32) -> (PackKind, PackId) {
        let kind = match n.is_multiple_of(2) {
            true => PackKind::Data,
            false => PackKind::Meta,
        };
        (kind, PackId::from_bytes([n as u8; 16]))
    }

    fn place(n: u32, segment: u32) -> (PackKind, Place) {
        let (kind, pack) = pack(segment * 3 + n % 3);
        let place = Place {
            pack,
            offset: n * 2,
            len: n % 0xff_ffff,
            flags: RecordFlags::ZSTD,
        };
        (kind, place)
    }

    fn add(index: &Index, segment: u32, ids: std::ops::Range<u32>) {
        let packs: Vec<_> = (0..3).map(|n| pack(segment * 3 + n)).collect();
        let entries = ids.map(|n| {
            let (_, place) = place(n, segment);
            SegmentEntry {
                prefix: format::prefix_of(&id(n)),
                pack: n % 3,
                offset: place.offset,
                len: place.len,
                flags: place.flags.0,
            }
        });
        index.add(entries.collect(), &packs).unwrap();
    }

    #[test]
    fn each_record_is_found_before_and_after_merging() {
        const EACH: u32 = 25_000;
        let storage = MemoryStorage::new();
        let index = Index::new(Arc::new(storage.clone()));
        for segment in 0..8 {
            add(&index, segment, segment * EACH..(segment + 1) * EACH);
        }
        let check = |index: &Index| {
            for n in (0..8 * EACH).step_by(7) {
                let want = place(n, n / EACH);
                assert_eq!(index.find(&id(n)).unwrap(), Some(want), "{n}");
                assert_eq!(index.find_all(&id(n)).unwrap(), [want], "{n}");
            }
            for n in 8 * EACH..9 * EACH {
                assert_eq!(index.find(&id(n)).unwrap(), None);
            }
        };
        check(&index);
        assert_eq!(index.merge(u64::from(8 * EACH) - 1).unwrap(), 0);
        assert_eq!(index.merge(u64::MAX).unwrap(), 1);
        assert_eq!(index.live_count(), 1);
        check(&index);
        // Another process sees the merged segment and leaves out what that supersedes, also without filters.
        let fresh = Index::new(Arc::new(storage.clone()));
        fresh.refresh().unwrap();
        assert_eq!(fresh.live_count(), 1);
        check(&fresh);
        let (level, name) = fresh.live()[0].name();
        let bare = Segment::open(&storage, (level, name), 0).unwrap();
        assert_eq!(bare.filter_bytes(), 0);
        fresh.set_live(vec![Arc::new(bare)]);
        check(&fresh);
        // Merging the same again writes the same file.
        let files = storage.list("idx/").unwrap();
        let other = Index::new(Arc::new(storage.clone()));
        storage.remove(&format::file_name(level, &name)).unwrap();
        assert_eq!(other.merge(u64::MAX).unwrap(), 1);
        assert_eq!(storage.list("idx/").unwrap(), files);
    }

    #[test]
    fn record_that_two_segments_name_in_other_orders_comes_once() {
        let storage = MemoryStorage::new();
        let index = Index::new(Arc::new(storage));
        let both = |first: u32| {
            let records = [1, 2].map(|n| SegmentEntry {
                prefix: format::prefix_of(&id(n)),
                pack: first,
                offset: 0,
                len: 7,
                flags: 0,
            });
            let copies = records.map(|entry| SegmentEntry {
                pack: 1 - first,
                offset: 9,
                ..entry
            });
            [records, copies].concat()
        };
        index.add(both(0), &[pack(0), pack(1)]).unwrap();
        index.add(both(1), &[pack(1), pack(0)]).unwrap();
        let mut merged = index.entries().unwrap();
        let mut found = Vec::new();
        while let Some(entry) = merged.next().unwrap() {
            found.push(entry);
        }
        let mut different = found.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(found.len(), 4);
        assert_eq!(different.len(), 4);
    }

    #[test]
    fn all_places_of_one_record_are_kept_by_a_merge() {
        let storage = MemoryStorage::new();
        let index = Index::new(Arc::new(storage));
        for segment in 0..8 {
            add(&index, segment, 0..300);
        }
        index.merge(u64::MAX).unwrap();
        let found = index.find_all(&id(7)).unwrap();
        assert_eq!(found.len(), 8);
        for segment in 0..8 {
            assert!(found.contains(&place(7, segment)));
        }
    }
}
