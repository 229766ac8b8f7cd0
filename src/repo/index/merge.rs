//! Going through sorted segments together, and merging them into one.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

use super::super::chunk::Place;
use super::super::error::RepoError;
use super::super::format::pack::PackKind;
use super::super::format::segment::SegmentEntry;
use super::super::ids::{PackId, SegmentId};
use super::super::storage::Storage;
use super::segment::Segment;
use super::write::SegmentWriter;

/// Writes a segment that holds what `inputs` hold and supersedes them and what they superseded, as far as that
/// is `still_there`. Holds one page of each input. Entries of packs that `keep` refuses are left out.
pub(super) fn merge(
    storage: &dyn Storage,
    inputs: &[Arc<Segment>],
    level: u8,
    still_there: &HashSet<(u8, SegmentId)>,
    keep: &dyn Fn(&(PackKind, PackId)) -> bool,
) -> Result<(u8, SegmentId), RepoError> {
    let mut merged = Merged::open(storage, inputs)?;
    // Only packs of which something is kept are named.
    let mut numbers: Vec<Option<u32>> = vec![None; merged.packs().len()];
    let mut packs = Vec::new();
    let mut writer = SegmentWriter::create(storage, level)?;
    while let Some(entry) = merged.next()? {
        let from = entry.pack as usize;
        let pack = match numbers[from] {
            Some(pack) => pack,
            None if !keep(&merged.packs()[from]) => continue,
            None => {
                packs.push(merged.packs()[from]);
                let pack = (packs.len() - 1) as u32;
                numbers[from] = Some(pack);
                pack
            }
        };
        writer.push(SegmentEntry { pack, ..entry })?;
    }
    let mut supersedes: Vec<(u8, SegmentId)> = inputs
        .iter()
        .flat_map(|s| s.supersedes().iter().copied().chain([s.name()]))
        .filter(|name| still_there.contains(name))
        .collect();
    supersedes.sort_unstable();
    supersedes.dedup();
    writer.finish(packs, supersedes)
}

/// The entries of several segments in order, with the numbers of one table of packs for all.
pub(crate) struct Merged<'a> {
    storage: &'a dyn Storage,
    streams: Vec<Stream>,
    /// The next entry of each stream that has one, with the stream's number.
    heads: BinaryHeap<Reverse<(SegmentEntry, usize)>>,
    packs: Vec<(PackKind, PackId)>,
    /// What comes next, last first: different entries of one prefix.
    group: Vec<SegmentEntry>,
}

impl<'a> Merged<'a> {
    pub(super) fn open(
        storage: &'a dyn Storage,
        inputs: &[Arc<Segment>],
    ) -> Result<Self, RepoError> {
        // In the order of their names, so that all who merge the same write the same.
        let mut inputs = inputs.to_vec();
        inputs.sort_unstable_by_key(|s| s.name());
        let mut packs = Vec::new();
        let mut numbers: HashMap<(PackKind, PackId), u32> = HashMap::new();
        let mut streams = Vec::with_capacity(inputs.len());
        for segment in inputs {
            let mapped = segment
                .packs()
                .iter()
                .map(|pack| {
                    *numbers.entry(*pack).or_insert_with(|| {
                        packs.push(*pack);
                        (packs.len() - 1) as u32
                    })
                })
                .collect();
            streams.push(Stream::new(segment, mapped));
        }
        let mut merged = Self {
            storage,
            heads: BinaryHeap::with_capacity(streams.len()),
            streams,
            packs,
            group: Vec::new(),
        };
        for number in 0..merged.streams.len() {
            merged.advance(number)?;
        }
        Ok(merged)
    }

    /// The packs that entries name by their numbers.
    pub(crate) fn packs(&self) -> &[(PackKind, PackId)] {
        &self.packs
    }

    /// Returns the next entry; the same record of several segments comes once.
    pub(crate) fn next(&mut self) -> Result<Option<SegmentEntry>, RepoError> {
        if self.group.is_empty() {
            self.gather()?;
        }
        Ok(self.group.pop())
    }

    /// Takes all entries of the next prefix from all streams.
    ///
    /// Within a prefix each segment has an order of its own, that of its table of packs.
    fn gather(&mut self) -> Result<(), RepoError> {
        while let Some(Reverse((entry, number))) = self.heads.peek().copied() {
            let other = |first: &SegmentEntry| first.prefix != entry.prefix;
            // A segment that is nothing but copies of one record must not fill the memory.
            if self.group.first().is_some_and(other) || self.group.len() == MOST_COPIES {
                break;
            }
            self.heads.pop();
            self.group.push(entry);
            self.advance(number)?;
        }
        self.group.sort_unstable_by(|a, b| b.cmp(a));
        self.group.dedup();
        Ok(())
    }

    fn advance(&mut self, number: usize) -> Result<(), RepoError> {
        if let Some(entry) = self.streams[number].next(self.storage)? {
            self.heads.push(Reverse((entry, number)));
        }
        Ok(())
    }
}

/// How many copies of one record are compared with each other.
const MOST_COPIES: usize = 1 << 16;

/// The entries of one input, with the numbers of packs that the output has.
struct Stream {
    segment: Arc<Segment>,
    packs: Vec<u32>,
    page: u64,
    entries: std::vec::IntoIter<SegmentEntry>,
}

impl Stream {
    fn new(segment: Arc<Segment>, packs: Vec<u32>) -> Self {
        Self {
            segment,
            packs,
            page: 0,
            entries: Vec::new().into_iter(),
        }
    }

    fn next(&mut self, storage: &dyn Storage) -> Result<Option<SegmentEntry>, RepoError> {
        let mut next = self.entries.next();
        while next.is_none() && self.page < self.segment.page_count() {
            self.entries = self.segment.page(storage, self.page)?.into_iter();
            self.page += 1;
            next = self.entries.next();
        }
        let Some(entry) = next else {
            return Ok(None);
        };
        // Checks that the number is in the table.
        let (_, Place { .. }) = self.segment.place(&entry)?;
        let pack = self.packs[entry.pack as usize];
        Ok(Some(SegmentEntry { pack, ..entry }))
    }
}
