//! Parity: a file beside each pack, from which damaged parts of the pack can be computed again.

use reed_solomon_simd::engine::DefaultEngine;
use reed_solomon_simd::rate::{HighRateDecoder, HighRateEncoder, RateDecoder, RateEncoder};

use super::cursor::Cursor;
use super::generation::PackName;
use super::pack::PackKind;
use super::{DecodeError, FileKind, decode_header, encode_header, first};
use crate::repo::error::RepoError;
use crate::repo::ids::{PackId, RepoUuid};

/// The folder of all parity files.
pub(crate) const FOLDER: &str = "parity/";

/// The most parts that can be made up for.
pub(crate) const MAX_PARITY: u8 = 16;

/// The name of the file with a pack's parity.
pub(crate) fn file_name(pack: &PackId) -> String {
    let [first, ..] = pack.as_bytes();
    format!("{FOLDER}{first:02x}/{pack}")
}

/// Reads the name of a file with a pack's parity.
pub(crate) fn parse_file_name(name: &str) -> Option<PackId> {
    let (_, pack) = name.rsplit_once('/')?;
    let pack = pack.parse().ok()?;
    (file_name(&pack) == name).then_some(pack)
}

/// How a pack is cut into data shards, and how many parity shards it has.
///
/// Data shards are the pack's bytes in order, the last one filled up with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pack_len: u32,
    shard_len: u32,
    data: u8,
    parity: u8,
}

impl Shape {
    /// Cuts a pack of `pack_len` bytes so that up to `most` lost shards can be made up for; `None` when it cannot be cut.
    pub(crate) fn of(pack_len: u64, most: u8) -> Option<Self> {
        let pack_len = u32::try_from(pack_len).ok().filter(|len| *len > 0)?;
        let shard_len = pack_len
            .div_ceil(MAX_DATA)
            .checked_next_multiple_of(BLOCK)?
            .max(LEAST_SHARD);
        let data = u8::try_from(pack_len.div_ceil(shard_len)).ok()?;
        (1..=MAX_PARITY).contains(&most).then_some(Self {
            pack_len,
            shard_len,
            data,
            parity: most.min(data),
        })
    }

    /// The length of the pack.
    pub(crate) fn pack_len(&self) -> u64 {
        self.pack_len.into()
    }

    /// The length of each shard.
    pub(crate) fn shard_len(&self) -> u64 {
        self.shard_len.into()
    }

    /// The number of data shards.
    pub(crate) fn data(&self) -> usize {
        self.data.into()
    }

    /// The number of parity shards, which is how many lost shards can be made up for.
    pub(crate) fn parity(&self) -> usize {
        self.parity.into()
    }

    /// The number of all shards.
    pub(crate) fn shards(&self) -> usize {
        self.data().saturating_add(self.parity())
    }

    /// Where a data shard starts in the pack.
    pub(crate) fn data_at(&self, shard: usize) -> u64 {
        self.shard_len().saturating_mul(shard as u64)
    }

    /// How many bytes of a data shard stand in the pack; the others are zeros.
    pub(crate) fn stored_len(&self, shard: usize) -> u64 {
        let left = self.pack_len().saturating_sub(self.data_at(shard));
        left.min(self.shard_len())
    }

    /// Where a parity shard starts in the file of the parity.
    pub(crate) fn parity_at(&self, shard: usize) -> u64 {
        self.data_at(shard).saturating_add(self.header_len() as u64)
    }

    /// The length of the header of the file of the parity.
    pub(crate) fn header_len(&self) -> usize {
        FIXED_LEN.saturating_add(SUM_LEN.saturating_mul(self.shards()))
    }

    /// The length of the file of the parity.
    pub(crate) fn file_len(&self) -> u64 {
        self.parity_at(self.parity())
    }
}

/// The start of a parity file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParityHeader {
    pub(crate) repo: RepoUuid,
    pub(crate) pack: PackName,
    pub(crate) shape: Shape,
    /// The sums of the data shards, then those of the parity shards.
    pub(crate) sums: Vec<ShardSum>,
}

/// The first bytes of a shard's BLAKE3 hash.
pub(crate) type ShardSum = [u8; SUM_LEN];

impl ParityHeader {
    /// The most bytes that a header has.
    pub(crate) const MAX_LEN: usize =
        FIXED_LEN + SUM_LEN * (MAX_DATA as usize + MAX_PARITY as usize);

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.shape.header_len());
        bytes.extend_from_slice(&encode_header(FileKind::Parity));
        bytes.extend_from_slice(self.repo.as_bytes());
        bytes.extend_from_slice(self.pack.1.as_bytes());
        bytes.push(self.pack.0.code());
        bytes.extend_from_slice(&[self.shape.data, self.shape.parity, 0]);
        bytes.extend_from_slice(&self.shape.shard_len.to_le_bytes());
        bytes.extend_from_slice(&self.shape.pack_len().to_le_bytes());
        for sum in &self.sums {
            bytes.extend_from_slice(sum);
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes
    }

    /// Reads the header from the start of a file of `file_len` bytes.
    pub(crate) fn decode(bytes: &[u8], file_len: u64) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        decode_header(&mut cursor, FileKind::Parity)?;
        let repo = RepoUuid::from_bytes(cursor.array("repository uuid")?);
        let pack = PackId::from_bytes(cursor.array("pack id")?);
        let at = cursor.at();
        let kind = cursor.u8("kind of the pack")?;
        let kind = PackKind::from_code(kind)
            .ok_or_else(|| DecodeError::corrupt(at, format!("a pack of kind {kind}")))?;
        let (data, parity) = (cursor.u8("data shards")?, cursor.u8("parity shards")?);
        let zero = cursor.u8("reserved byte")?;
        let shard_len = cursor.u32("length of a shard")?;
        let pack_len = cursor.u64("length of the pack")?;
        let shape = Shape::of(pack_len, parity).filter(|shape| {
            (shape.data, shape.parity, shape.shard_len, 0) == (data, parity, shard_len, zero)
        });
        let shape = shape.ok_or_else(|| {
            let what = format!(
                "a pack of {pack_len} bytes has no {data} + {parity} shards of {shard_len} bytes"
            );
            DecodeError::corrupt(at, what)
        })?;
        let mut sums = Vec::with_capacity(shape.shards());
        for _ in 0..shape.shards() {
            sums.push(cursor.array("sum of a shard")?);
        }
        let at = cursor.at();
        let signed = bytes.get(..at as usize).unwrap_or_default();
        let hash: [u8; 32] = cursor.array("hash of the header")?;
        if blake3::hash(signed) != blake3::Hash::from(hash) {
            return Err(DecodeError::corrupt(at, "the hash of the header differs"));
        }
        if file_len != shape.file_len() {
            let what = format!("it has {file_len} bytes, not {}", shape.file_len());
            return Err(DecodeError::corrupt(file_len, what));
        }
        Ok(Self {
            repo,
            pack: (kind, pack),
            shape,
            sums,
        })
    }

    /// Whether bytes are those of a shard, by its number among all.
    pub(crate) fn fits(&self, shard: usize, hasher: &blake3::Hasher) -> bool {
        self.sums.get(shard) == Some(&sum_of(hasher))
    }
}

/// The sum of a shard that went into a hasher.
fn sum_of(hasher: &blake3::Hasher) -> ShardSum {
    first(hasher.finalize().as_bytes())
}

/// Computes parity of a pack, of which `read` gives any part; returns the sums of all shards, and the parity shards.
///
/// The pack is gone through in columns: the same part of each shard. So all of the pack need not be in memory.
pub(crate) fn compute(
    shape: &Shape,
    read: &mut dyn FnMut(u64, &mut [u8]) -> Result<(), RepoError>,
) -> Result<(Vec<ShardSum>, Vec<Vec<u8>>), RepoError> {
    let (data, parity) = (shape.data(), shape.parity());
    let mut hashers = vec![blake3::Hasher::new(); shape.shards()];
    let mut shards: Vec<Vec<u8>> = vec![Vec::with_capacity(shape.shard_len as usize); parity];
    let mut buffer = vec![0; ENCODE_COLUMN];
    let mut encoder: Option<HighRateEncoder<DefaultEngine>> = None;
    for (at, width) in columns(shape, ENCODE_COLUMN) {
        let encoder = match &mut encoder {
            Some(encoder) => {
                encoder.reset(data, parity, width).map_err(refused)?;
                encoder
            }
            none => none.insert(
                HighRateEncoder::new(data, parity, width, DefaultEngine::new(), None)
                    .map_err(refused)?,
            ),
        };
        let buffer = buffer.get_mut(..width).unwrap_or_default();
        for (shard, hasher) in (0..data).zip(&mut hashers) {
            let stored = shape.stored_len(shard).saturating_sub(at);
            let stored = usize::try_from(stored).unwrap_or(width).min(width);
            let (bytes, zeros) = buffer.split_at_mut(stored);
            if !bytes.is_empty() {
                read(shape.data_at(shard).saturating_add(at), bytes)?;
            }
            zeros.fill(0);
            hasher.update(buffer);
            encoder.add_original_shard(&*buffer).map_err(refused)?;
        }
        let encoded = encoder.encode().map_err(refused)?;
        let columns = shards.iter_mut().zip(hashers.iter_mut().skip(data));
        for ((shard, hasher), column) in columns.zip(encoded.recovery_iter()) {
            hasher.update(column);
            shard.extend_from_slice(column);
        }
    }
    Ok((hashers.iter().map(sum_of).collect(), shards))
}

/// Makes lost data shards anew: `data` holds all of them, one after the other, `parity` those parity shards that are good.
///
/// `good` says which data shards are. What comes out is right if what went in was: it has to be compared with the sums.
pub(crate) fn restore(
    shape: &Shape,
    data: &mut [u8],
    good: &[bool],
    parity: &[Option<Vec<u8>>],
) -> Result<(), RepoError> {
    let mut decoder: Option<HighRateDecoder<DefaultEngine>> = None;
    for (at, width) in columns(shape, DECODE_COLUMN) {
        let decoder = match &mut decoder {
            Some(decoder) => {
                let counts = (shape.data(), shape.parity());
                decoder.reset(counts.0, counts.1, width).map_err(refused)?;
                decoder
            }
            none => none.insert(
                HighRateDecoder::new(
                    shape.data(),
                    shape.parity(),
                    width,
                    DefaultEngine::new(),
                    None,
                )
                .map_err(refused)?,
            ),
        };
        let at = at as usize;
        let column = |shard: &[u8]| -> Option<std::ops::Range<usize>> {
            let end = at.checked_add(width)?;
            (end <= shard.len()).then_some(at..end)
        };
        let shards = data.chunks_exact(shape.shard_len as usize);
        for ((number, shard), good) in shards.enumerate().zip(good) {
            if let Some(bytes) = column(shard).and_then(|column| shard.get(column))
                && *good
            {
                decoder.add_original_shard(number, bytes).map_err(refused)?;
            }
        }
        for (number, shard) in parity.iter().enumerate() {
            if let Some(shard) = shard
                && let Some(bytes) = column(shard).and_then(|column| shard.get(column))
            {
                decoder.add_recovery_shard(number, bytes).map_err(refused)?;
            }
        }
        let decoded = decoder.decode().map_err(refused)?;
        let shards = data.chunks_exact_mut(shape.shard_len as usize);
        for ((number, shard), good) in shards.enumerate().zip(good) {
            if let Some(bytes) = decoded.restored_original(number)
                && let Some(place) = column(shard).and_then(|column| shard.get_mut(column))
                && !*good
            {
                place.copy_from_slice(bytes);
            }
        }
    }
    Ok(())
}

/// The columns of a shape's shards: where each starts in a shard, and how wide it is.
fn columns(shape: &Shape, width: usize) -> impl Iterator<Item = (u64, usize)> + use<> {
    let len = shape.shard_len();
    (0..len).step_by(width).map(move |at| {
        let left = usize::try_from(len.saturating_sub(at)).unwrap_or(width);
        (at, left.min(width))
    })
}

fn refused(error: reed_solomon_simd::Error) -> RepoError {
    RepoError::misuse(format!("parity cannot be computed: {error}"))
}

/// The most data shards of a pack.
const MAX_DATA: u32 = 64;

/// The code works on blocks of so many bytes, each for itself.
const BLOCK: u32 = 64;

/// The least length of a shard, lest the sums be longer than the shards.
const LEAST_SHARD: u32 = 512;

/// The header without the sums.
const FIXED_LEN: usize = 96;

const SUM_LEN: usize = 16;

/// What is encoded at once of each shard: with 64 of them no more than the processor keeps near.
const ENCODE_COLUMN: usize = 16 << 10;

/// What is decoded at once of each shard; each time costs a millisecond by itself.
const DECODE_COLUMN: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A pack's bytes; only their length matters here.
    fn pack(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new()
            .update(&len.to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    fn parity_of(pack: &[u8], most: u8) -> (ParityHeader, Vec<Vec<u8>>) {
        let shape = Shape::of(pack.len() as u64, most).unwrap();
        let read = &mut |at, bytes: &mut [u8]| {
            bytes.copy_from_slice(&pack[at as usize..][..bytes.len()]);
            Ok(())
        };
        let (sums, shards) = compute(&shape, read).unwrap();
        let header = ParityHeader {
            repo: RepoUuid::from_bytes([3; 16]),
            pack: (PackKind::Meta, PackId::from_bytes([5; 16])),
            shape,
            sums,
        };
        (header, shards)
    }

    /// Loses shards and returns whether the pack is had back, byte for byte.
    fn survives(
        pack: &[u8],
        (header, shards): &(ParityHeader, Vec<Vec<u8>>),
        lost: &[usize],
    ) -> bool {
        let shape = header.shape;
        let len = shape.shard_len() as usize;
        let mut data = pack.to_vec();
        data.resize(len * shape.data(), 0);
        let mut good = vec![true; shape.data()];
        let mut parity: Vec<_> = shards.iter().cloned().map(Some).collect();
        for shard in lost {
            match shard.checked_sub(shape.data()) {
                None => {
                    data[shard * len..(shard + 1) * len].fill(0xee);
                    good[*shard] = false;
                }
                Some(shard) => parity[shard] = None,
            }
        }
        let done = restore(&shape, &mut data, &good, &parity);
        for (shard, bytes) in data.chunks(len).enumerate() {
            let fits = header.fits(shard, blake3::Hasher::new().update(bytes));
            assert_eq!(fits, done.is_ok() || good[shard], "shard {shard}");
        }
        done.is_ok() && data[..pack.len()] == *pack && data[pack.len()..].iter().all(|b| *b == 0)
    }

    #[test]
    fn each_length_is_cut_into_64_parts_at_most() {
        let lens = (1..40_000).chain([
            (1 << 20) - 1,
            1 << 20,
            (64 << 20) + 77,
            1 << 30,
            u64::from(u32::MAX) - 4096,
        ]);
        for len in lens {
            for most in [1, 4, 16] {
                let shape = Shape::of(len, most).unwrap();
                let (shard, data) = (shape.shard_len(), shape.data() as u64);
                assert!(shard >= 512 && shard % 64 == 0 && data <= 64, "{len}");
                assert!(shard == 512 || shard < len / 64 + 65, "{len}");
                assert!(shard * (data - 1) < len && len <= shard * data, "{len}");
                assert_eq!(shape.parity(), shape.data().min(most.into()));
                let stored = (0..shape.data()).map(|i| shape.stored_len(i));
                assert_eq!(stored.sum::<u64>(), len);
            }
        }
        for refused in [
            Shape::of(0, 4),
            Shape::of(1, 0),
            Shape::of(1, 17),
            Shape::of(1 << 32, 4),
            Shape::of(u64::from(u32::MAX), 4).filter(|s| s.data() > 64),
        ] {
            assert_eq!(refused, None);
        }
    }

    #[test]
    fn small_pack_survives_each_loss_of_as_many_shards_as_it_has_parity() {
        let around = |n: usize| [n * 512 - 1, n * 512, n * 512 + 1];
        let mut lens = vec![1, 2, 116, 300];
        lens.extend((1..=6).flat_map(around));
        for len in lens {
            let pack = pack(len);
            for most in [1, 2, 4, 5] {
                let whole = parity_of(&pack, most);
                let shape = whole.0.shape;
                assert!(
                    whole
                        .1
                        .iter()
                        .all(|shard| shard.len() == shape.shard_len() as usize)
                );
                if shape.data() == 1 {
                    assert!(whole.1[0].starts_with(&pack), "it is a copy");
                }
                for set in 0..1_u32 << shape.shards() {
                    let lost: Vec<usize> =
                        (0..shape.shards()).filter(|i| set >> i & 1 == 1).collect();
                    let enough = lost.len() <= shape.parity();
                    // Without a lost data shard there is nothing to be had back.
                    let nothing = lost.iter().all(|shard| *shard >= shape.data());
                    let had_back = survives(&pack, &whole, &lost);
                    assert_eq!(had_back, enough || nothing, "{len} bytes, {lost:?} lost");
                }
            }
        }
    }

    #[test]
    fn large_pack_survives_losses_in_any_place() {
        // Shards of one column, of several, and with a last column that is narrower.
        for len in [
            64 * 512 - 1,
            64 * 512 + 1,
            300_000,
            64 * (16 << 10),
            6_000_001,
        ] {
            let pack = pack(len);
            for most in [1, 3, 4, 16] {
                let whole = parity_of(&pack, most);
                let (data, parity) = (whole.0.shape.data(), whole.0.shape.parity());
                for start in [0, 1, data / 2, data - parity, data - 1, data] {
                    let lost: Vec<usize> = (start..start + parity).collect();
                    assert!(survives(&pack, &whole, &lost), "{len}: {lost:?}");
                    let spread: Vec<usize> = (0..parity).map(|i| i * (data / parity)).collect();
                    assert!(survives(&pack, &whole, &spread), "{len}: {spread:?}");
                }
                let many: Vec<usize> = (0..=parity).collect();
                assert!(!survives(&pack, &whole, &many), "{len}");
            }
        }
    }

    /// The element that two bytes stand for, as `docs/format.md` has it.
    fn element(word: u16) -> u16 {
        const BASIS: [u16; 16] = [
            0x0001, 0xacca, 0x3c0e, 0x163e, 0xc582, 0xed2e, 0x914c, 0x4012, 0x6c98, 0x10d8, 0x6a72,
            0xb900, 0xfdb8, 0xfb34, 0xff38, 0x991e,
        ];
        let bits = BASIS.iter().enumerate();
        bits.filter(|(bit, _)| word >> bit & 1 == 1)
            .fold(0, |sum, (_, element)| sum ^ element)
    }

    fn product(a: u16, b: u16) -> u16 {
        let (mut a, mut sum) = (u32::from(a), 0);
        for bit in 0..16 {
            if b >> bit & 1 == 1 {
                sum ^= a;
            }
            a <<= 1;
            if a > 0xffff {
                a ^= 0x1_002d;
            }
        }
        sum as u16
    }

    #[test]
    fn code_is_the_one_that_the_page_describes() {
        for (len, most) in [(40_000, 4), (40_000, 1), (20_000, 16), (3_000, 2), (300, 4)] {
            let pack = pack(len);
            let (header, shards) = parity_of(&pack, most);
            let (shape, len) = (header.shape, header.shape.shard_len() as usize);
            let mut data = pack.clone();
            data.resize(len * shape.data(), 0);
            // Of parity shards that are not a power of two in number the page says how the others are made up for: they
            // are unknowns. Here only powers of two are looked at.
            let count = shape.parity();
            assert!(count.is_power_of_two());
            let all: Vec<&[u8]> = shards
                .iter()
                .map(Vec::as_slice)
                .chain(data.chunks(len))
                .collect();
            for at in [0, 1, 31, 64, len - 33] {
                let at = at / 64 * 64 + at % 32;
                for power in 0..count {
                    let sum = all.iter().enumerate().fold(0, |sum, (place, shard)| {
                        let word = u16::from_le_bytes([shard[at], shard[at + 32]]);
                        let place = element(place as u16);
                        let factor = (0..power).fold(1, |factor, _| product(factor, place));
                        sum ^ product(element(word), factor)
                    });
                    assert_eq!(sum, 0, "{count} parity shards, word at {at}, power {power}");
                }
            }
        }
    }

    #[test]
    fn header_survives_its_bytes_and_no_other_byte_or_length_is_taken() {
        for len in [1, 700, 100_000] {
            let (header, shards) = parity_of(&pack(len), 4);
            let bytes = header.encode();
            assert_eq!(bytes.len(), header.shape.header_len());
            let file_len = bytes.len() + shards.iter().map(Vec::len).sum::<usize>();
            assert_eq!(header.shape.file_len(), file_len as u64);
            let file_len = file_len as u64;
            assert_eq!(ParityHeader::decode(&bytes, file_len), Ok(header.clone()));
            for at in 0..bytes.len() {
                for bit in 0..8 {
                    let mut bytes = bytes.clone();
                    bytes[at] ^= 1 << bit;
                    let read = ParityHeader::decode(&bytes, file_len);
                    assert!(read.is_err(), "byte {at}, bit {bit}");
                }
                assert!(ParityHeader::decode(&bytes[..at], file_len).is_err());
            }
            for file_len in [0, file_len - 1, file_len + 1, u64::MAX] {
                assert!(ParityHeader::decode(&bytes, file_len).is_err());
            }
        }
    }

    #[test]
    fn name_of_a_file_is_that_of_its_pack() {
        let pack = PackId::from_bytes([0xab; 16]);
        let name = file_name(&pack);
        assert_eq!(name, format!("parity/ab/{}", "ab".repeat(16)));
        assert_eq!(parse_file_name(&name), Some(pack));
        for other in ["parity/aa/", "packs/ab/", "parity/", "parity/ab/x"] {
            assert_eq!(parse_file_name(&format!("{other}{pack}")), None);
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>, len: u64) {
            prop_assert!(ParityHeader::decode(&bytes, len).is_err());
        }
    }
}
