//! Chunks: their size, where one is stored, and whether one is all zeros.

use std::fmt;

use super::cipher::Encryption;
use super::ids::{ChunkId, PackId};

/// The size of a repository's chunks: a power of two of 64 KiB to 4 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChunkSize {
    log2: u8,
}

impl ChunkSize {
    /// Takes a size in bytes; `None` when it is no power of two of 64 KiB to 4 MiB.
    pub fn new(bytes: u32) -> Option<Self> {
        if !bytes.is_power_of_two() {
            return None;
        }
        Self::from_log2(bytes.ilog2() as u8)
    }

    /// Takes the base-two logarithm of a size in bytes.
    pub(crate) fn from_log2(log2: u8) -> Option<Self> {
        (MIN_LOG2..=MAX_LOG2)
            .contains(&log2)
            .then_some(Self { log2 })
    }

    pub(crate) const fn log2(self) -> u8 {
        self.log2
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u32 {
        1 << self.log2
    }

    /// The number of chunks of a disk.
    pub const fn count(self, disk_bytes: u64) -> u64 {
        disk_bytes.div_ceil(self.bytes() as u64)
    }

    /// The length in bytes of the chunk `number` of a disk: the last may be short, one past the end has none.
    pub const fn chunk_len(self, number: u64, disk_bytes: u64) -> u32 {
        let Some(start) = number.checked_mul(self.bytes() as u64) else {
            return 0;
        };
        let left = disk_bytes.saturating_sub(start);
        if left < self.bytes() as u64 {
            left as u32
        } else {
            self.bytes()
        }
    }
}

impl Default for ChunkSize {
    fn default() -> Self {
        Self { log2: 17 }
    }
}

impl fmt::Display for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB", self.bytes() >> 10)
    }
}

/// Where a record is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The pack.
    pub pack: PackId,
    /// The offset in the pack, in bytes.
    pub offset: u32,
    /// The length of the stored record, in bytes; below 2^24.
    pub len: u32,
    /// How the record is stored.
    pub flags: RecordFlags,
}

/// How a record is stored: the low four bits name the compression, the high four the cipher.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordFlags(pub u8);

impl RecordFlags {
    /// Neither compressed nor encrypted.
    pub const RAW: Self = Self(0x00);
    /// Compressed with zstd, not encrypted.
    pub const ZSTD: Self = Self(0x01);

    /// These flags of a record that is encrypted so.
    pub(crate) const fn encrypted(self, encryption: Encryption) -> Self {
        Self(self.0 | encryption.code() << 4)
    }

    /// Whether and how the record is encrypted; `None` when that way is unknown.
    pub(crate) const fn encryption(self) -> Option<Encryption> {
        Encryption::from_code(self.0 >> 4)
    }

    /// What is left when the encryption is undone.
    pub(crate) const fn compression(self) -> Self {
        Self(self.0 & 0x0f)
    }
}

impl fmt::Debug for RecordFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordFlags({:#04x})", self.0)
    }
}

/// A stored chunk: its identifier and a hint of its place, which a later repack may make stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkEntry {
    /// The identifier, which the bytes are checked against whenever they are read.
    pub id: ChunkId,
    /// Where the chunk was when this entry was made.
    pub place: Place,
}

/// Whether all bytes are zero; runs at the speed of memory.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Each byte equals its neighbour and the first is zero: one `memcmp` of the slice with itself.
    match bytes.split_first() {
        None => true,
        Some((0, rest)) => rest == &bytes[..rest.len()],
        Some(_) => false,
    }
}

const MIN_LOG2: u8 = 16;
const MAX_LOG2: u8 = 22;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_out_of_bounds_or_not_a_power_of_two_is_refused() {
        for bytes in [0, 1, 0x8000, 0x1_8000, 0x80_0000] {
            assert_eq!(ChunkSize::new(bytes), None, "{bytes:#x}");
        }
        assert_eq!(ChunkSize::new(0x2_0000), Some(ChunkSize::default()));
    }

    #[test]
    fn last_chunk_is_short_and_none_follows() {
        let size = ChunkSize::default();
        assert_eq!(size.count(0), 0);
        assert_eq!(size.count(0x2_0001), 2);
        assert_eq!(size.chunk_len(0, 0x2_0001), 0x2_0000);
        assert_eq!(size.chunk_len(1, 0x2_0001), 1);
        assert_eq!(size.chunk_len(2, 0x2_0001), 0);
        assert_eq!(size.chunk_len(u64::MAX, 0x2_0001), 0);
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut bytes = [0; 300];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }
}
