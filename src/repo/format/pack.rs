//! Packs: header, records, footer with an entry for each record, trailer.

use super::cursor::Cursor;
use super::{DecodeError, END_MAGIC, FileKind, decode_header, encode_header, short_sum};
use crate::repo::chunk::RecordFlags;
use crate::repo::ids::{PackId, RepoUuid, SnapshotId};

/// What a pack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PackKind {
    /// Chunks.
    Data,
    /// Map nodes.
    Meta,
}

impl PackKind {
    /// The folder of such packs.
    pub(crate) const fn folder(self) -> &'static str {
        match self {
            Self::Data => "packs/",
            Self::Meta => "meta/",
        }
    }

    /// The name of the file of such a pack.
    pub(crate) fn file_name(self, pack: &PackId) -> String {
        let [first, ..] = pack.as_bytes();
        format!("{}{first:02x}/{pack}", self.folder())
    }

    /// Reads the name of the file of such a pack.
    pub(crate) fn parse_file_name(self, name: &str) -> Option<PackId> {
        let (_, pack) = name.rsplit_once('/')?;
        let pack = pack.parse().ok()?;
        (self.file_name(&pack) == name).then_some(pack)
    }

    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Meta => 1,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Data),
            1 => Some(Self::Meta),
            _ => None,
        }
    }

    const fn file_kind(self) -> FileKind {
        match self {
            Self::Data => FileKind::DataPack,
            Self::Meta => FileKind::MetaPack,
        }
    }
}

/// The start of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackHeader {
    pub(crate) kind: PackKind,
    pub(crate) repo: RepoUuid,
    pub(crate) session: SnapshotId,
    pub(crate) pack: PackId,
}

impl PackHeader {
    pub(crate) const LEN: usize = 72;

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::LEN);
        bytes.extend_from_slice(&encode_header(self.kind.file_kind()));
        bytes.extend_from_slice(self.repo.as_bytes());
        bytes.extend_from_slice(self.session.as_bytes());
        bytes.extend_from_slice(self.pack.as_bytes());
        let sum = short_sum(&bytes);
        bytes.extend_from_slice(&sum);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8], kind: PackKind) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        decode_header(&mut cursor, kind.file_kind())?;
        let header = Self {
            kind,
            repo: RepoUuid::from_bytes(cursor.array("repository uuid")?),
            session: SnapshotId::from_bytes(cursor.array("session")?),
            pack: PackId::from_bytes(cursor.array("pack id")?),
        };
        let at = cursor.at();
        let signed = bytes.get(..at as usize).unwrap_or_default();
        if cursor.array::<8>("header checksum")? != short_sum(signed) {
            return Err(DecodeError::corrupt(
                at,
                "the pack header's checksum differs",
            ));
        }
        Ok(header)
    }
}

/// A record's entry in the footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FooterEntry {
    /// The chunk's or the node's identifier.
    pub(crate) id: [u8; 32],
    pub(crate) offset: u32,
    pub(crate) len: u32,
    pub(crate) flags: RecordFlags,
    /// The start of the BLAKE3 hash of the stored bytes, so that a host without keys can check them.
    pub(crate) sum: [u8; 8],
}

impl FooterEntry {
    pub(crate) const LEN: usize = 49;
}

/// Writes a footer.
pub(crate) fn encode_footer(entries: &[FooterEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len().saturating_mul(FooterEntry::LEN));
    for entry in entries {
        bytes.extend_from_slice(&entry.id);
        bytes.extend_from_slice(&entry.offset.to_le_bytes());
        bytes.extend_from_slice(&entry.len.to_le_bytes());
        bytes.push(entry.flags.0);
        bytes.extend_from_slice(&entry.sum);
    }
    bytes
}

/// Reads a footer whose hash fits, of a pack whose records end at `records_end`.
pub(crate) fn decode_footer(
    bytes: &[u8],
    records_end: u64,
) -> Result<Vec<FooterEntry>, DecodeError> {
    let mut cursor = Cursor::starting_at(bytes, records_end);
    let mut entries = Vec::with_capacity(bytes.len().div_euclid(FooterEntry::LEN));
    let mut from = PackHeader::LEN as u64;
    while cursor.left() > 0 {
        let at = cursor.at();
        let entry = FooterEntry {
            id: cursor.array("id")?,
            offset: cursor.u32("offset")?,
            len: cursor.u32("length")?,
            flags: RecordFlags(cursor.u8("flags")?),
            sum: cursor.array("checksum")?,
        };
        let end = u64::from(entry.offset).saturating_add(u64::from(entry.len));
        if u64::from(entry.offset) != from || end > records_end || entry.len > MAX_RECORD {
            return Err(DecodeError::corrupt(
                at,
                format!(
                    "a record at {:#x}..{end:#x} does not follow {from:#x} within {records_end:#x}",
                    entry.offset
                ),
            ));
        }
        from = end;
        entries.push(entry);
    }
    if from != records_end {
        return Err(DecodeError::corrupt(
            records_end,
            format!("the records end at {from:#x}, the footer starts at {records_end:#x}"),
        ));
    }
    Ok(entries)
}

/// The end of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackTrailer {
    pub(crate) footer_len: u32,
    /// The hash of header and footer; the footer's checksums vouch for the records between them.
    pub(crate) hash: [u8; 32],
}

impl PackTrailer {
    pub(crate) const LEN: usize = 44;

    pub(crate) fn new(header: &[u8], footer: &[u8]) -> Self {
        Self {
            footer_len: footer.len() as u32,
            hash: Self::hash_of(header, footer),
        }
    }

    pub(crate) fn hash_of(header: &[u8], footer: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(header);
        hasher.update(footer);
        *hasher.finalize().as_bytes()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::LEN);
        bytes.extend_from_slice(&self.footer_len.to_le_bytes());
        bytes.extend_from_slice(&self.hash);
        bytes.extend_from_slice(&END_MAGIC);
        bytes
    }

    /// Reads the trailer of a file of `file_len` bytes, and says where the footer starts.
    pub(crate) fn decode(bytes: &[u8], file_len: u64) -> Result<(Self, u64), DecodeError> {
        let start = file_len.saturating_sub(Self::LEN as u64);
        let mut cursor = Cursor::starting_at(bytes, start);
        let trailer = Self {
            footer_len: cursor.u32("footer length")?,
            hash: cursor.array("footer hash")?,
        };
        if cursor.array::<8>("end magic")? != END_MAGIC {
            return Err(DecodeError::corrupt(
                start,
                "it does not end as a pack does",
            ));
        }
        cursor.finish("trailer")?;
        let footer_at = start
            .checked_sub(u64::from(trailer.footer_len))
            .filter(|at| *at >= PackHeader::LEN as u64)
            .filter(|_| trailer.footer_len <= MAX_FOOTER);
        match footer_at {
            Some(at) => Ok((trailer, at)),
            None => Err(DecodeError::corrupt(
                start,
                format!("a footer of {} bytes does not fit", trailer.footer_len),
            )),
        }
    }
}

/// The most bytes of a stored record: three bytes hold its length.
pub(crate) const MAX_RECORD: u32 = (1 << 24) - 1;

/// The most records of a pack.
pub(crate) const MAX_RECORDS: usize = 1 << 16;

const MAX_FOOTER: u32 = (MAX_RECORDS * FooterEntry::LEN) as u32;

/// The longest pack: one is closed at 1 GiB, and a record and a footer add a few MiB.
pub(crate) const MAX_PACK: u64 = (1 << 30) + (32 << 20);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_of_another_kind_is_refused() {
        let header = PackHeader {
            kind: PackKind::Meta,
            repo: RepoUuid::from_bytes([1; 16]),
            session: SnapshotId::from_bytes([2; 16]),
            pack: PackId::from_bytes([3; 16]),
        };
        let bytes = header.encode();
        assert_eq!(bytes.len(), PackHeader::LEN);
        assert_eq!(PackHeader::decode(&bytes, PackKind::Meta), Ok(header));
        assert!(PackHeader::decode(&bytes, PackKind::Data).is_err());
    }

    #[test]
    fn footer_whose_records_leave_a_gap_is_refused() {
        let entry = |offset, len| FooterEntry {
            id: [4; 32],
            offset,
            len,
            flags: RecordFlags::RAW,
            sum: [0; 8],
        };
        let good = [entry(72, 10), entry(82, 5)];
        let bytes = encode_footer(&good);
        assert_eq!(bytes.len(), 2 * FooterEntry::LEN);
        assert_eq!(decode_footer(&bytes, 87).unwrap(), good);
        assert!(decode_footer(&bytes, 88).is_err());
        assert!(decode_footer(&encode_footer(&[entry(72, 10), entry(83, 4)]), 87).is_err());
        assert!(decode_footer(&encode_footer(&[entry(72, u32::MAX)]), 87).is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>, end: u64, len: u64) {
            let _ = decode_footer(&bytes, end);
            let _ = PackTrailer::decode(&bytes, len);
            let _ = PackHeader::decode(&bytes, PackKind::Data);
        }
    }
}
