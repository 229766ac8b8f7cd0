//! The bytes at rest: what each kind of file holds, encoded and decoded without panic on any bytes.
//!
//! `docs/format.md` describes the same for an independent reader. All numbers are little-endian.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub(crate) mod checkpoint;
pub(crate) mod config;
pub(crate) mod cursor;
pub(crate) mod envelope;
pub(crate) mod filter;
pub mod fuzz;
pub(crate) mod generation;
pub(crate) mod health;
pub(crate) mod key_slot;
pub(crate) mod node;
pub(crate) mod pack;
pub(crate) mod parity;
pub(crate) mod segment;
pub(crate) mod snapshot;
pub(crate) mod tlv;

use cursor::Cursor;

use super::error::RepoError;

/// Starts each file; its first byte and its line ends show what a text-mode copy did.
pub(crate) const MAGIC: [u8; 8] = *b"\x89nbdbk\r\n";

/// Ends each file that is read from its end.
pub(crate) const END_MAGIC: [u8; 8] = *b"\x89kbdbn\r\n";

/// The length of the header that starts each file.
pub(crate) const HEADER_LEN: usize = 16;

/// What a file is, as its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Config,
    KeySlot,
    DataPack,
    MetaPack,
    Segment,
    Snapshot,
    Beat,
    Condemned,
    Sweep,
    Done,
    Fence,
    Forgotten,
    Bad,
    Verified,
    Checkpoint,
    Parity,
}

impl FileKind {
    const fn code(self) -> u8 {
        match self {
            Self::Config => 1,
            Self::KeySlot => 2,
            Self::DataPack => 3,
            Self::MetaPack => 4,
            Self::Segment => 5,
            Self::Snapshot => 6,
            Self::Beat => 7,
            Self::Condemned => 8,
            Self::Sweep => 9,
            Self::Done => 10,
            Self::Fence => 11,
            Self::Forgotten => 12,
            Self::Bad => 13,
            Self::Verified => 14,
            Self::Checkpoint => 15,
            Self::Parity => 16,
        }
    }
}

/// Why bytes are not what they should be; [`DecodeError::in_file`] adds the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DecodeError {
    /// The bytes are damaged or hostile.
    Corrupt { at: u64, what: String },
    /// The bytes are of a version or need a feature that is not known here.
    Unsupported { what: String },
}

impl DecodeError {
    pub(crate) fn corrupt(at: u64, what: impl Into<String>) -> Self {
        Self::Corrupt {
            at,
            what: what.into(),
        }
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }

    /// Names the file whose bytes these were.
    pub(crate) fn in_file(self, file: &str) -> RepoError {
        self.in_file_from(file, 0)
    }

    /// Names the file that held these bytes from the offset `start`.
    pub(crate) fn in_file_from(self, file: &str, start: u64) -> RepoError {
        match self {
            Self::Corrupt { at, what } => RepoError::corrupt(file, start.saturating_add(at), what),
            Self::Unsupported { what } => RepoError::Unsupported {
                file: file.to_owned(),
                what,
            },
        }
    }
}

/// Writes the header that starts each file.
pub(crate) fn encode_header(kind: FileKind) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    let fields = MAGIC
        .into_iter()
        .chain([kind.code(), 0])
        .chain(VERSION.to_le_bytes());
    for (to, from) in header.iter_mut().zip(fields) {
        *to = from;
    }
    let sum = header_sum(&header);
    for (to, from) in header.iter_mut().skip(SUM_AT).zip(sum) {
        *to = from;
    }
    header
}

/// Reads and checks the header that starts each file.
pub(crate) fn decode_header(cursor: &mut Cursor<'_>, kind: FileKind) -> Result<(), DecodeError> {
    let at = cursor.at();
    let header: [u8; HEADER_LEN] = cursor.array("header")?;
    let mut fields = Cursor::new(&header);
    if fields.array::<8>("magic")? != MAGIC {
        return Err(DecodeError::corrupt(
            at,
            "it does not start as a file of this program",
        ));
    }
    let code = fields.u8("kind")?;
    let zero = fields.u8("reserved byte")?;
    let version = fields.u16("version")?;
    if fields.array::<4>("header checksum")? != header_sum(&header) {
        return Err(DecodeError::corrupt(at, "the header checksum differs"));
    }
    if version != VERSION {
        return Err(DecodeError::unsupported(format!(
            "format version {version}"
        )));
    }
    if code != kind.code() || zero != 0 {
        return Err(DecodeError::corrupt(
            at,
            format!("a file of kind {code} stands where {kind:?} belongs"),
        ));
    }
    Ok(())
}

/// The first eight bytes of the BLAKE3 hash, where a short checksum is enough.
pub(crate) fn short_sum(bytes: &[u8]) -> [u8; 8] {
    first(blake3::hash(bytes).as_bytes())
}

fn header_sum(header: &[u8; HEADER_LEN]) -> [u8; 4] {
    let [fields @ .., _, _, _, _] = header;
    first(blake3::hash(fields).as_bytes())
}

fn first<const N: usize>(bytes: &[u8; 32]) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(bytes) {
        *to = *from;
    }
    out
}

const VERSION: u16 = 1;
const SUM_AT: usize = 12;
