//! Merging sorted segments into one of the next level.

use std::collections::{HashMap, HashSet};
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
/// is `still_there`. Holds one page of each input.
pub(super) fn merge(
    storage: &dyn Storage,
    inputs: &[Arc<Segment>],
    level: u8,
    still_there: &HashSet<(u8, SegmentId)>,
) -> Result<(u8, SegmentId), RepoError> {
    // In the order of their names, so that all who merge the same write the same.
    let mut inputs: Vec<&Segment> = inputs.iter().map(|s| &**s).collect();
    inputs.sort_unstable_by_key(|s| s.name());
    let mut packs = Vec::new();
    let mut numbers: HashMap<(PackKind, PackId), u32> = HashMap::new();
    let mut streams = Vec::with_capacity(inputs.len());
    for segment in &inputs {
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
        streams.push(Stream::open(storage, segment, mapped)?);
    }
    let mut writer = SegmentWriter::create(storage, level)?;
    let mut last = None;
    while let Some(stream) = streams
        .iter_mut()
        .filter(|s| s.next.is_some())
        .min_by_key(|s| s.next)
    {
        let entry = stream.take(storage)?;
        // The same record of two segments; another place of the same identifier is kept.
        if entry.is_some() && entry != last {
            if let Some(entry) = entry {
                writer.push(entry)?;
            }
            last = entry;
        }
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

/// The entries of one input, with the numbers of packs that the output has.
struct Stream<'a> {
    segment: &'a Segment,
    packs: Vec<u32>,
    page: u64,
    entries: std::vec::IntoIter<SegmentEntry>,
    next: Option<SegmentEntry>,
}

impl<'a> Stream<'a> {
    fn open(
        storage: &dyn Storage,
        segment: &'a Segment,
        packs: Vec<u32>,
    ) -> Result<Self, RepoError> {
        let mut stream = Self {
            segment,
            packs,
            page: 0,
            entries: Vec::new().into_iter(),
            next: None,
        };
        stream.take(storage)?;
        Ok(stream)
    }

    fn take(&mut self, storage: &dyn Storage) -> Result<Option<SegmentEntry>, RepoError> {
        let mut next = self.entries.next();
        while next.is_none() && self.page < self.segment.page_count() {
            self.entries = self.segment.page(storage, self.page)?.into_iter();
            self.page += 1;
            next = self.entries.next();
        }
        let next = match next {
            None => None,
            Some(entry) => {
                // Checks that the number is in the table.
                let (_, Place { .. }) = self.segment.place(&entry)?;
                let pack = self.packs[entry.pack as usize];
                Some(SegmentEntry { pack, ..entry })
            }
        };
        Ok(std::mem::replace(&mut self.next, next))
    }
}
