//! Reading one index segment, page by page.

use std::sync::Arc;

use super::super::cache::Cache;
use super::super::chunk::Place;
use super::super::error::RepoError;
use super::super::format::filter::Filter;
use super::super::format::pack::PackKind;
use super::super::format::segment::{
    self as format, BLOCK_PAGES, Directory, PAGE_LEN, SegmentEntry, SegmentTrailer, key_of,
    prefix_of,
};
use super::super::format::{FileKind, cursor::Cursor, decode_header, short_sum};
use super::super::ids::{PackId, SegmentId};
use super::super::storage::Storage;

/// Decoded pages, by segment and page number.
pub(super) type Pages = Cache<(SegmentId, u64), Vec<SegmentEntry>>;

/// An opened segment: its directory and, when there was room, its filters.
#[derive(Debug)]
pub(super) struct Segment {
    name: (u8, SegmentId),
    file: String,
    directory: Directory,
    filters: Vec<Option<Filter>>,
    filter_bytes: u64,
}

impl Segment {
    /// Opens a segment and loads its filters when they take at most `filter_room` bytes.
    pub(super) fn open(
        storage: &dyn Storage,
        name: (u8, SegmentId),
        filter_room: u64,
    ) -> Result<Self, RepoError> {
        let file = format::file_name(name.0, &name.1);
        let len = storage.len(&file)?;
        let least = (PAGE_LEN + SegmentTrailer::LEN) as u64;
        if len < least {
            return Err(RepoError::corrupt(file, len, "an index segment is longer"));
        }
        let mut header = [0; super::super::format::HEADER_LEN];
        storage.read_at(&file, 0, &mut header)?;
        decode_header(&mut Cursor::new(&header), FileKind::Segment)
            .map_err(|e| e.in_file(&file))?;
        let mut trailer = [0; SegmentTrailer::LEN];
        storage.read_at(&file, len - SegmentTrailer::LEN as u64, &mut trailer)?;
        let (trailer, directory_len) =
            SegmentTrailer::decode(&trailer, len).map_err(|e| e.in_file(&file))?;
        let mut bytes = vec![0; directory_len as usize];
        storage.read_at(&file, trailer.directory_at, &mut bytes)?;
        if blake3::hash(&bytes) != blake3::Hash::from(trailer.directory_hash) {
            return Err(RepoError::corrupt(
                file,
                trailer.directory_at,
                "the directory's hash differs",
            ));
        }
        let directory =
            Directory::decode(&bytes, trailer.directory_at).map_err(|e| e.in_file(&file))?;
        if directory.level != name.0 {
            return Err(RepoError::corrupt(
                file,
                trailer.directory_at,
                format!("a segment of level {} stands here", directory.level),
            ));
        }
        let mut segment = Self {
            name,
            file,
            directory,
            filters: Vec::new(),
            filter_bytes: 0,
        };
        segment.load_filters(storage, filter_room);
        Ok(segment)
    }

    pub(super) fn name(&self) -> (u8, SegmentId) {
        self.name
    }

    pub(super) fn entries(&self) -> u64 {
        self.directory.entries
    }

    pub(super) fn supersedes(&self) -> &[(u8, SegmentId)] {
        &self.directory.supersedes
    }

    pub(super) fn packs(&self) -> &[(PackKind, PackId)] {
        &self.directory.packs
    }

    pub(super) fn page_count(&self) -> u64 {
        self.directory.fences.len() as u64
    }

    pub(super) fn filter_bytes(&self) -> u64 {
        self.filter_bytes
    }

    /// Whether the filters leave it open that the record `id` is in this segment.
    pub(super) fn may_hold(&self, id: &[u8; 32]) -> bool {
        let key = key_of(prefix_of(id));
        let mut blocks = self
            .pages_of(key)
            .map(|page| (page / BLOCK_PAGES) as usize)
            .collect::<Vec<_>>();
        blocks.dedup();
        blocks
            .into_iter()
            .any(|block| match self.filters.get(block) {
                Some(Some(filter)) => filter.may_hold(key),
                _ => true,
            })
    }

    /// Adds the places of the record `id` to `found`.
    pub(super) fn find(
        &self,
        storage: &dyn Storage,
        pages: &Pages,
        id: &[u8; 32],
        found: &mut Vec<(PackKind, Place)>,
    ) -> Result<(), RepoError> {
        let prefix = prefix_of(id);
        for page in self.pages_of(key_of(prefix)) {
            let entries = match pages.find(&(self.name.1, page)) {
                Some(entries) => entries,
                None => {
                    let entries = Arc::new(self.page(storage, page)?);
                    pages.add((self.name.1, page), Arc::clone(&entries));
                    entries
                }
            };
            let from = entries.partition_point(|e| e.prefix < prefix);
            for entry in entries.iter().skip(from).take_while(|e| e.prefix == prefix) {
                found.push(self.place(entry)?);
            }
        }
        Ok(())
    }

    /// Reads a page.
    pub(super) fn page(
        &self,
        storage: &dyn Storage,
        page: u64,
    ) -> Result<Vec<SegmentEntry>, RepoError> {
        let block = self.directory.blocks.get((page / BLOCK_PAGES) as usize);
        let at = block
            .and_then(|b| (page % BLOCK_PAGES * PAGE_LEN as u64).checked_add(b.pages_at))
            .ok_or_else(|| RepoError::corrupt(&self.file, 0, "a page lies past the end"))?;
        let mut bytes = [0; PAGE_LEN];
        storage.read_at(&self.file, at, &mut bytes)?;
        format::decode_page(&bytes, at).map_err(|e| e.in_file(&self.file))
    }

    /// Returns an entry's place.
    pub(super) fn place(&self, entry: &SegmentEntry) -> Result<(PackKind, Place), RepoError> {
        let pack = self.directory.packs.get(entry.pack as usize);
        let (kind, pack) = *pack.ok_or_else(|| {
            RepoError::corrupt(&self.file, 0, format!("there is no pack {}", entry.pack))
        })?;
        let place = Place {
            pack,
            offset: entry.offset,
            len: entry.len,
            flags: entry.flags(),
        };
        Ok((kind, place))
    }

    /// Returns the pages that may hold entries of this key.
    fn pages_of(&self, key: u64) -> std::ops::Range<u64> {
        let fences = &self.directory.fences;
        // A page's entries may start before the next page's first key and end at it.
        let from = fences.partition_point(|f| *f < key).saturating_sub(1);
        let to = fences.partition_point(|f| *f <= key);
        from as u64..to as u64
    }

    fn load_filters(&mut self, storage: &dyn Storage, room: u64) {
        let blocks = &self.directory.blocks;
        let lens = blocks
            .iter()
            .flat_map(|b| b.filter.map(|s| u64::from(s.len().unwrap_or(0))));
        let total = lens.fold(0_u64, u64::saturating_add);
        if total > room {
            return;
        }
        for block in 0..blocks.len() {
            let filter = self.load_filter(storage, block).unwrap_or_else(|error| {
                tracing::error!(%error, "an index filter is unreadable; its pages are asked instead");
                None
            });
            self.filters.push(filter);
        }
        self.filter_bytes = total;
    }

    fn load_filter(
        &self,
        storage: &dyn Storage,
        number: usize,
    ) -> Result<Option<Filter>, RepoError> {
        let Some(block) = self.directory.blocks.get(number) else {
            return Ok(None);
        };
        let Some(shape) = block.filter else {
            return Ok(None);
        };
        let first_page = number as u64 * BLOCK_PAGES;
        let pages = BLOCK_PAGES.min(self.page_count() - first_page);
        let at = block.pages_at.saturating_add(pages * PAGE_LEN as u64);
        let len = shape.len().map_err(|e| e.in_file(&self.file))?;
        let mut bytes = vec![0; len as usize];
        storage.read_at(&self.file, at, &mut bytes)?;
        if short_sum(&bytes) != block.filter_sum {
            return Err(RepoError::corrupt(
                &self.file,
                at,
                "the filter's checksum differs",
            ));
        }
        let filter =
            Filter::from_parts(shape, bytes).map_err(|e| e.in_file_from(&self.file, at))?;
        Ok(Some(filter))
    }
}
