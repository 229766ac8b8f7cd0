//! Index segments: sorted entries in pages, filters, and a directory of what is where.

use super::cursor::Cursor;
use super::filter::FilterShape;
use super::pack::PackKind;
use super::{DecodeError, END_MAGIC, FileKind, encode_header};
use crate::repo::chunk::RecordFlags;
use crate::repo::ids::{PackId, SegmentId};

/// The length of a page in bytes.
pub(crate) const PAGE_LEN: usize = 4096;

/// The most entries of a page.
pub(crate) const PAGE_ENTRIES: usize = 146;

/// The number of pages that share a filter.
pub(crate) const BLOCK_PAGES: u64 = 512;

/// The most bytes of a directory.
pub(crate) const MAX_DIRECTORY: u64 = 1 << 30;

/// The start of an identifier, by which entries are sorted; compared as a big-endian number.
pub(crate) type Prefix = u128;

/// Returns the start of an identifier.
pub(crate) fn prefix_of(id: &[u8; 32]) -> Prefix {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, ..] = *id;
    Prefix::from_be_bytes([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
}

/// The part of a prefix that filters and fences hold.
pub(crate) fn key_of(prefix: Prefix) -> u64 {
    (prefix >> 64) as u64
}

/// An entry of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SegmentEntry {
    pub(crate) prefix: Prefix,
    /// The place in the segment's table of packs.
    pub(crate) pack: u32,
    pub(crate) offset: u32,
    pub(crate) len: u32,
    pub(crate) flags: u8,
}

impl SegmentEntry {
    pub(crate) fn flags(&self) -> RecordFlags {
        RecordFlags(self.flags)
    }
}

/// Where a whole segment's parts are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) level: u8,
    pub(crate) entries: u64,
    pub(crate) packs: Vec<(PackKind, PackId)>,
    /// For each page the key of its first entry.
    pub(crate) fences: Vec<u64>,
    /// For each [`BLOCK_PAGES`] pages where they are, and their filter.
    pub(crate) blocks: Vec<BlockAt>,
    /// The segments that this one takes the place of.
    pub(crate) supersedes: Vec<(u8, SegmentId)>,
}

/// Where the pages of a block are; the filter, when there is one, follows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockAt {
    pub(crate) pages_at: u64,
    pub(crate) filter: Option<FilterShape>,
    pub(crate) filter_sum: [u8; 8],
}

/// The name of a segment's file.
pub(crate) fn file_name(level: u8, segment: &SegmentId) -> String {
    format!("idx/{level}/{segment}")
}

/// Reads the name of a segment's file.
pub(crate) fn parse_file_name(name: &str) -> Option<(u8, SegmentId)> {
    let (level, segment) = name.strip_prefix("idx/")?.split_once('/')?;
    let parsed = (level.parse().ok()?, segment.parse().ok()?);
    // `idx/+1/..` and `idx/01/..` are not names that this program gives.
    (file_name(parsed.0, &parsed.1) == name).then_some(parsed)
}

/// Writes the first page, which only says what the file is.
pub(crate) fn encode_first_page() -> Vec<u8> {
    let mut page = encode_header(FileKind::Segment).to_vec();
    page.resize(PAGE_LEN, 0);
    page
}

/// Writes a page of at most [`PAGE_ENTRIES`] entries.
pub(crate) fn encode_page(entries: &[SegmentEntry]) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE_LEN);
    for entry in entries.iter().take(PAGE_ENTRIES) {
        page.extend_from_slice(&entry.prefix.to_be_bytes());
        page.extend_from_slice(&entry.pack.to_le_bytes());
        page.extend_from_slice(&entry.offset.to_le_bytes());
        let [a, b, c, _] = entry.len.to_le_bytes();
        page.extend_from_slice(&[a, b, c, entry.flags]);
    }
    page.resize(SUMMED_PAGE - 2, 0);
    page.extend_from_slice(&(entries.len().min(PAGE_ENTRIES) as u16).to_le_bytes());
    seal_page(page)
}

/// Puts the checksum behind the content of a page, which is cut or filled up to its length.
pub(crate) fn seal_page(mut page: Vec<u8>) -> Vec<u8> {
    page.resize(SUMMED_PAGE, 0);
    let sum = page_sum(&page);
    page.extend_from_slice(&sum);
    page
}

/// Reads a page; the entries are in order.
pub(crate) fn decode_page(page: &[u8], at: u64) -> Result<Vec<SegmentEntry>, DecodeError> {
    let mut cursor = Cursor::starting_at(page, at);
    let summed = cursor.bytes(SUMMED_PAGE, "page")?;
    if cursor.array::<6>("page checksum")? != page_sum(summed) {
        return Err(DecodeError::corrupt(at, "the page's checksum differs"));
    }
    cursor.finish("page")?;
    let mut end = Cursor::starting_at(summed, at);
    let body = end.bytes(SUMMED_PAGE - 2, "page")?;
    let count = usize::from(end.u16("number of entries")?);
    if count > PAGE_ENTRIES {
        return Err(DecodeError::corrupt(
            at,
            format!("a page of {count} entries"),
        ));
    }
    let mut cursor = Cursor::starting_at(body, at);
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(SegmentEntry {
            prefix: Prefix::from_be_bytes(cursor.array("prefix")?),
            pack: cursor.u32("pack")?,
            offset: cursor.u32("offset")?,
            len: cursor.u24("length")?,
            flags: cursor.u8("flags")?,
        });
    }
    if !entries.is_sorted_by_key(|e| e.prefix) {
        return Err(DecodeError::corrupt(at, "the page is not in order"));
    }
    Ok(entries)
}

impl Directory {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.level, 0, 0, 0];
        bytes.extend_from_slice(&self.entries.to_le_bytes());
        for count in [
            self.packs.len(),
            self.fences.len(),
            self.blocks.len(),
            self.supersedes.len(),
        ] {
            bytes.extend_from_slice(&(count as u32).to_le_bytes());
        }
        for (kind, pack) in &self.packs {
            bytes.push(kind.code());
            bytes.extend_from_slice(pack.as_bytes());
        }
        for fence in &self.fences {
            bytes.extend_from_slice(&fence.to_le_bytes());
        }
        for block in &self.blocks {
            let shape = block.filter.unwrap_or(NO_FILTER);
            bytes.extend_from_slice(&block.pages_at.to_le_bytes());
            bytes.extend_from_slice(&shape.seed.to_le_bytes());
            bytes.extend_from_slice(&shape.segment_len.to_le_bytes());
            bytes.extend_from_slice(&shape.segment_count.to_le_bytes());
            bytes.extend_from_slice(&block.filter_sum);
        }
        for (level, segment) in &self.supersedes {
            bytes.push(*level);
            bytes.extend_from_slice(segment.as_bytes());
        }
        bytes
    }

    /// Reads a directory whose hash fits and that stands at the offset `at`.
    pub(crate) fn decode(bytes: &[u8], at: u64) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::starting_at(bytes, at);
        let [level, zeros @ ..] = cursor.array::<4>("level")?;
        if zeros != [0; 3] {
            return Err(DecodeError::corrupt(at, "the reserved bytes are not zero"));
        }
        let entries = cursor.u64("number of entries")?;
        let packs = counted(&mut cursor, "number of packs", 17)?;
        let fences = counted(&mut cursor, "number of pages", 8)?;
        let blocks = counted(&mut cursor, "number of blocks", 32)?;
        let supersedes = counted(&mut cursor, "number of superseded segments", 33)?;
        let fits = entries <= (fences as u64).saturating_mul(PAGE_ENTRIES as u64)
            && (blocks as u64) == (fences as u64).div_ceil(BLOCK_PAGES);
        if !fits {
            return Err(DecodeError::corrupt(
                at,
                format!("{entries} entries, {fences} pages and {blocks} blocks do not fit"),
            ));
        }
        let mut directory = Self {
            level,
            entries,
            packs: Vec::with_capacity(packs),
            fences: Vec::with_capacity(fences),
            blocks: Vec::with_capacity(blocks),
            supersedes: Vec::with_capacity(supersedes),
        };
        for _ in 0..packs {
            let at = cursor.at();
            let kind = PackKind::from_code(cursor.u8("kind of pack")?)
                .ok_or_else(|| DecodeError::corrupt(at, "a pack of no known kind"))?;
            let pack = PackId::from_bytes(cursor.array("pack id")?);
            directory.packs.push((kind, pack));
        }
        for _ in 0..fences {
            directory.fences.push(cursor.u64("fence")?);
        }
        if !directory.fences.is_sorted() {
            return Err(DecodeError::corrupt(at, "the pages are not in order"));
        }
        for _ in 0..blocks {
            directory.blocks.push(block_at(&mut cursor)?);
        }
        for _ in 0..supersedes {
            let level = cursor.u8("level")?;
            let segment = SegmentId::from_bytes(cursor.array("segment id")?);
            directory.supersedes.push((level, segment));
        }
        cursor.finish("directory")?;
        Ok(directory)
    }
}

/// The end of a segment: where the directory is, and its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentTrailer {
    pub(crate) directory_at: u64,
    pub(crate) directory_hash: [u8; 32],
}

impl SegmentTrailer {
    pub(crate) const LEN: usize = 48;

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::LEN);
        bytes.extend_from_slice(&self.directory_at.to_le_bytes());
        bytes.extend_from_slice(&self.directory_hash);
        bytes.extend_from_slice(&END_MAGIC);
        bytes
    }

    /// Reads the trailer of a file of `file_len` bytes, and says how long the directory is.
    pub(crate) fn decode(bytes: &[u8], file_len: u64) -> Result<(Self, u64), DecodeError> {
        let start = file_len.saturating_sub(Self::LEN as u64);
        let mut cursor = Cursor::starting_at(bytes, start);
        let trailer = Self {
            directory_at: cursor.u64("place of the directory")?,
            directory_hash: cursor.array("directory hash")?,
        };
        if cursor.array::<8>("end magic")? != END_MAGIC {
            return Err(DecodeError::corrupt(
                start,
                "it does not end as an index segment does",
            ));
        }
        cursor.finish("trailer")?;
        match start.checked_sub(trailer.directory_at) {
            Some(len) if len <= MAX_DIRECTORY && trailer.directory_at >= PAGE_LEN as u64 => {
                Ok((trailer, len))
            }
            _ => Err(DecodeError::corrupt(
                start,
                format!("a directory at {:#x} does not fit", trailer.directory_at),
            )),
        }
    }
}

fn block_at(cursor: &mut Cursor<'_>) -> Result<BlockAt, DecodeError> {
    let at = cursor.at();
    let pages_at = cursor.u64("place of a block")?;
    let shape = FilterShape {
        seed: cursor.u64("filter seed")?,
        segment_len: cursor.u32("filter segment length")?,
        segment_count: cursor.u32("filter segment count")?,
    };
    let filter_sum = cursor.array("filter checksum")?;
    let filter = match shape {
        NO_FILTER => None,
        shape => {
            shape
                .len()
                .map_err(|_| DecodeError::corrupt(at, "a filter of an impossible shape"))?;
            Some(shape)
        }
    };
    Ok(BlockAt {
        pages_at,
        filter,
        filter_sum,
    })
}

/// Reads a count of things of `len` bytes each, which cannot be more than the bytes that are left.
fn counted(cursor: &mut Cursor<'_>, what: &str, len: usize) -> Result<usize, DecodeError> {
    let at = cursor.at();
    let count = cursor.u32(what)? as usize;
    match count.checked_mul(len) {
        Some(bytes) if bytes <= cursor.left() => Ok(count),
        _ => Err(DecodeError::corrupt(
            at,
            format!("{what} is {count}, {} bytes are left", cursor.left()),
        )),
    }
}

fn page_sum(bytes: &[u8]) -> [u8; 6] {
    let [a, b, c, d, e, f, ..] = *blake3::hash(bytes).as_bytes();
    [a, b, c, d, e, f]
}

const SUMMED_PAGE: usize = PAGE_LEN - 6;

const NO_FILTER: FilterShape = FilterShape {
    seed: 0,
    segment_len: 0,
    segment_count: 0,
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn name_that_is_not_exactly_ours_is_refused() {
        let id = SegmentId::from_bytes([0xab; 32]);
        let name = file_name(2, &id);
        assert_eq!(parse_file_name(&name), Some((2, id)));
        assert_eq!(parse_file_name(&name.replace("/2/", "/02/")), None);
        assert_eq!(parse_file_name(&name.replace("/2/", "/+2/")), None);
        assert_eq!(parse_file_name("idx/2/x"), None);
    }

    #[test]
    fn full_page_survives_its_bytes_and_each_flipped_bit_is_seen() {
        let entries: Vec<SegmentEntry> = (0..PAGE_ENTRIES as u32)
            .map(|i| SegmentEntry {
                prefix: Prefix::from(i) << 100,
                pack: i,
                offset: i * 7,
                len: 0xff_0000 + i,
                flags: 1,
            })
            .collect();
        let mut page = encode_page(&entries);
        assert_eq!(page.len(), PAGE_LEN);
        assert_eq!(decode_page(&page, 0).unwrap(), entries);
        for byte in 0..page.len() {
            page[byte] ^= 0x10;
            assert!(decode_page(&page, 0).is_err(), "{byte}");
            page[byte] ^= 0x10;
        }
    }

    #[test]
    fn directory_survives_its_bytes() {
        let directory = Directory {
            level: 1,
            entries: 3,
            packs: vec![(PackKind::Data, PackId::from_bytes([1; 16]))],
            fences: vec![1, 9],
            blocks: vec![BlockAt {
                pages_at: 4096,
                filter: Some(FilterShape {
                    seed: 3,
                    segment_len: 8,
                    segment_count: 2,
                }),
                filter_sum: [6; 8],
            }],
            supersedes: vec![(0, SegmentId::from_bytes([7; 32]))],
        };
        let bytes = directory.encode();
        assert_eq!(Directory::decode(&bytes, 0).unwrap(), directory);
        for len in 0..bytes.len() {
            assert!(Directory::decode(&bytes[..len], 0).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>, len: u64) {
            let _ = Directory::decode(&bytes, len);
            let _ = SegmentTrailer::decode(&bytes, len);
            let _ = decode_page(&bytes, len);
        }
    }
}
