//! Writing one index segment as a stream of sorted entries.

use super::super::error::RepoError;
use super::super::format::filter::Filter;
use super::super::format::pack::PackKind;
use super::super::format::segment::{
    self as format, BLOCK_PAGES, BlockAt, Directory, PAGE_ENTRIES, PAGE_LEN, SegmentEntry,
    SegmentTrailer, key_of,
};
use super::super::format::short_sum;
use super::super::ids::{PackId, SegmentId};
use super::super::storage::{NewFile, Storage, StorageError};

/// Writes a segment of sorted entries; of the table of packs only those that are named are kept.
pub(super) fn write_sorted(
    storage: &dyn Storage,
    level: u8,
    entries: &[SegmentEntry],
    packs: &[(PackKind, PackId)],
) -> Result<(u8, SegmentId), RepoError> {
    let mut numbers: Vec<u32> = entries.iter().map(|e| e.pack).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut writer = SegmentWriter::create(storage, level)?;
    for entry in entries {
        let pack = numbers.partition_point(|n| *n < entry.pack) as u32;
        writer.push(SegmentEntry { pack, ..*entry })?;
    }
    let named = numbers
        .iter()
        .filter_map(|n| packs.get(*n as usize).copied())
        .collect();
    writer.finish(named, Vec::new())
}

/// A segment that is being written; holds a page, and the keys of a block for its filter.
pub(super) struct SegmentWriter {
    file: Box<dyn NewFile>,
    hasher: blake3::Hasher,
    len: u64,
    directory: Directory,
    page: Vec<SegmentEntry>,
    block_at: u64,
    block_pages: u64,
    block_keys: Vec<u64>,
}

impl SegmentWriter {
    pub(super) fn create(storage: &dyn Storage, level: u8) -> Result<Self, RepoError> {
        let mut writer = Self {
            file: storage.create()?,
            hasher: blake3::Hasher::new(),
            len: 0,
            directory: Directory {
                level,
                ..Directory::default()
            },
            page: Vec::with_capacity(PAGE_ENTRIES),
            block_at: PAGE_LEN as u64,
            block_pages: 0,
            block_keys: Vec::new(),
        };
        writer.write(&format::encode_first_page())?;
        Ok(writer)
    }

    /// Adds the next entry.
    pub(super) fn push(&mut self, entry: SegmentEntry) -> Result<(), RepoError> {
        if self.page.len() == PAGE_ENTRIES {
            self.end_page()?;
        }
        self.page.push(entry);
        Ok(())
    }

    /// Ends and publishes the segment.
    pub(super) fn finish(
        mut self,
        packs: Vec<(PackKind, PackId)>,
        supersedes: Vec<(u8, SegmentId)>,
    ) -> Result<(u8, SegmentId), RepoError> {
        if !self.page.is_empty() {
            self.end_page()?;
        }
        if self.block_pages > 0 {
            self.end_block()?;
        }
        self.directory.packs = packs;
        self.directory.supersedes = supersedes;
        let directory = self.directory.encode();
        let trailer = SegmentTrailer {
            directory_at: self.len,
            directory_hash: *blake3::hash(&directory).as_bytes(),
        };
        self.write(&directory)?;
        self.write(&trailer.encode())?;
        let level = self.directory.level;
        let id = SegmentId::from_bytes(*self.hasher.finalize().as_bytes());
        match self.file.publish(&format::file_name(level, &id)) {
            // The name is the hash of the content: somebody wrote the same.
            Ok(()) | Err(StorageError::Exists { .. }) => Ok((level, id)),
            Err(other) => Err(other.into()),
        }
    }

    fn end_page(&mut self) -> Result<(), RepoError> {
        if self.block_pages == BLOCK_PAGES {
            self.end_block()?;
        }
        let keys = self.page.iter().map(|e| key_of(e.prefix));
        self.block_keys.extend(keys);
        if let Some(first) = self.page.first() {
            self.directory.fences.push(key_of(first.prefix));
        }
        self.directory.entries += self.page.len() as u64;
        let page = format::encode_page(&self.page);
        self.write(&page)?;
        self.page.clear();
        self.block_pages += 1;
        Ok(())
    }

    fn end_block(&mut self) -> Result<(), RepoError> {
        let filter = Filter::build(std::mem::take(&mut self.block_keys));
        let mut block = BlockAt {
            pages_at: self.block_at,
            filter: None,
            filter_sum: [0; 8],
        };
        // A filter that cannot be built is left out: the pages answer alone.
        if let Some(filter) = filter {
            block.filter = Some(filter.shape());
            block.filter_sum = short_sum(filter.bytes());
            self.write(filter.bytes())?;
            // Pages stay aligned to the page cache.
            let past = (self.len % PAGE_LEN as u64) as usize;
            if past > 0 {
                self.write(&[0; PAGE_LEN][past..])?;
            }
        }
        self.directory.blocks.push(block);
        self.block_at = self.len;
        self.block_pages = 0;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), RepoError> {
        self.file.write(bytes)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }
}
