//! Compression of records with zstd, with contexts that each thread keeps.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::str::FromStr;

use super::chunk::RecordFlags;

/// How new chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// With zstd.
    Zstd {
        /// The level, from the library's lowest to 22.
        level: i32,
    },
}

impl Compression {
    /// The code and the level that `config` holds.
    pub(crate) fn code(self) -> (u8, i32) {
        match self {
            Self::None => (0, 0),
            Self::Zstd { level } => (1, level),
        }
    }

    /// Takes the code and the level that `config` holds.
    pub(crate) fn from_code(code: u8, level: i32) -> Option<Self> {
        match (code, level) {
            (0, 0) => Some(Self::None),
            (1, level) if zstd::compression_level_range().contains(&level) => {
                Some(Self::Zstd { level })
            }
            _ => None,
        }
    }
}

impl Default for Compression {
    fn default() -> Self {
        Self::Zstd { level: 1 }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Zstd { level } => write!(f, "zstd:{level}"),
        }
    }
}

impl FromStr for Compression {
    type Err = NotACompression;

    fn from_str(text: &str) -> Result<Self, NotACompression> {
        let fault = || NotACompression(text.to_owned());
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("zstd", level)) => {
                let level = level.parse().map_err(|_| fault())?;
                Self::from_code(1, level).ok_or_else(fault)
            }
            _ => Err(fault()),
        }
    }
}

/// A text names no compression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither `none` nor `zstd:LEVEL` with a level up to 22")]
pub struct NotACompression(String);

/// Compresses into `out` when that is worth it; when it is not, `out` is of no use and the record is stored raw.
pub(crate) fn compress(
    plain: &[u8],
    compression: Compression,
    out: &mut Vec<u8>,
) -> io::Result<RecordFlags> {
    let Compression::Zstd { level } = compression else {
        return Ok(RecordFlags::RAW);
    };
    // A high level spends its time on bytes that do not shrink; the fast level tells from a few of them.
    if level > PROBE_ABOVE_LEVEL && plain.len() >= PROBE_MIN && !sample_shrinks(plain, out)? {
        return Ok(RecordFlags::RAW);
    }
    match zstd_into(plain, level, out)? {
        true => Ok(RecordFlags::ZSTD),
        false => Ok(RecordFlags::RAW),
    }
}

/// Decompresses a whole zstd frame of at most `limit` bytes into `out`.
pub(crate) fn decompress(stored: &[u8], limit: usize, out: &mut Vec<u8>) -> io::Result<()> {
    out.clear();
    out.reserve(limit);
    DECOMPRESSOR.with_borrow_mut(|context| {
        let context = match context {
            Some(context) => context,
            None => context.insert(zstd::bulk::Decompressor::new()?),
        };
        // The vector's capacity may be above the limit, which is checked by the caller's length or by this.
        context.decompress_to_buffer(stored, out)?;
        match out.len() <= limit {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::InvalidData)),
        }
    })
}

/// Whether a few pieces of the bytes shrink.
fn sample_shrinks(plain: &[u8], scratch: &mut Vec<u8>) -> io::Result<bool> {
    let step = plain.len() / PROBE_PIECES;
    let mut sample = [0; PROBE_PIECES * PROBE_PIECE];
    for (piece, from) in sample.chunks_mut(PROBE_PIECE).zip(plain.chunks(step)) {
        piece.copy_from_slice(&from[..PROBE_PIECE]);
    }
    zstd_into(&sample, PROBE_LEVEL, scratch)
}

/// Compresses into `out`; false when it would not be smaller by 3 %.
fn zstd_into(plain: &[u8], level: i32, out: &mut Vec<u8>) -> io::Result<bool> {
    out.clear();
    out.reserve(zstd::zstd_safe::compress_bound(plain.len()));
    COMPRESSOR.with_borrow_mut(|slot| {
        let context = match slot {
            Some((known, context)) if *known == level => context,
            Some((known, context)) => {
                context.set_compression_level(level)?;
                *known = level;
                context
            }
            None => &mut slot.insert((level, zstd::bulk::Compressor::new(level)?)).1,
        };
        let len = context.compress_to_buffer(plain, out)?;
        Ok(len < plain.len() - plain.len() / 32)
    })
}

thread_local! {
    static COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

const PROBE_ABOVE_LEVEL: i32 = 2;
const PROBE_LEVEL: i32 = 1;
const PROBE_MIN: usize = 64 << 10;
const PROBE_PIECES: usize = 8;
const PROBE_PIECE: usize = 1 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_names_a_compression_or_is_refused() {
        for text in ["none", "zstd:1", "zstd:-5", "zstd:22"] {
            assert_eq!(text.parse::<Compression>().unwrap().to_string(), text);
        }
        for text in ["", "zstd", "zstd:23", "zstd:x", "lz4:1", "none:1"] {
            assert!(text.parse::<Compression>().is_err(), "{text}");
        }
    }

    #[test]
    fn random_bytes_stay_raw_and_text_shrinks_at_each_level() {
        let mut noise = vec![0; 128 << 10];
        getrandom::fill(&mut noise).unwrap();
        let text: Vec<u8> = (0..20_000)
            .flat_map(|i| format!("line {i}\n").into_bytes())
            .take(128 << 10)
            .collect();
        let (mut out, mut back) = (Vec::new(), Vec::new());
        for level in [-5, 1, 3, 9] {
            let zstd = Compression::Zstd { level };
            assert_eq!(compress(&noise, zstd, &mut out).unwrap(), RecordFlags::RAW);
            assert_eq!(compress(&text, zstd, &mut out).unwrap(), RecordFlags::ZSTD);
            assert!(out.len() < text.len() / 2);
            decompress(&out, text.len(), &mut back).unwrap();
            assert_eq!(back, text);
            assert!(decompress(&out, text.len() - 1, &mut back).is_err());
        }
    }

    #[test]
    fn hostile_frame_is_an_error_and_allocates_no_more_than_the_limit() {
        let mut back = Vec::new();
        // A frame header that promises 2^62 bytes.
        let frame = [
            0x28, 0xb5, 0x2f, 0xfd, 0xc0, 0x00, 0, 0, 0, 0, 0, 0, 0, 0x40,
        ];
        assert!(decompress(&frame, 4096, &mut back).is_err());
        assert!(back.capacity() < 1 << 20);
    }
}
