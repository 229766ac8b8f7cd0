//! The payloads of reply chunks: holes, errors, extents.

use super::bytes::Fields;
use super::{ChunkType, DecodeError, EncodeError, ErrorCode};

/// The payload of `OFFSET_HOLE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoleChunk {
    /// The offset of the first zero on the disk.
    pub offset: u64,
    /// The number of zeros.
    pub length: u32,
}

impl HoleChunk {
    /// The encoded length.
    pub const LEN: usize = 12;

    /// Decodes the payload.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("hole chunk", payload);
        let offset = fields.u64()?;
        let length = fields.u32()?;
        fields.finish()?;
        Ok(Self { offset, length })
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.offset.to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
    }
}

/// The payload of `ERROR` and `ERROR_OFFSET`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk {
    /// Why the request failed.
    pub code: ErrorCode,
    /// The server's own words; often empty.
    pub text: String,
    /// Where on the disk, if the server says so.
    pub offset: Option<u64>,
}

impl ErrorChunk {
    /// Decodes the payload of a chunk of any error type; a type that we do not know may carry more behind the text.
    pub fn decode(kind: ChunkType, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("error chunk", payload);
        let code = ErrorCode(fields.u32()?);
        let len = fields.u16()?;
        let text = String::from_utf8_lossy(fields.bytes(u32::from(len))?).into_owned();
        let mut offset = None;
        match kind {
            ChunkType::ERROR => fields.finish()?,
            ChunkType::ERROR_OFFSET => {
                offset = Some(fields.u64()?);
                fields.finish()?;
            }
            _ => {}
        }
        Ok(Self { code, text, offset })
    }

    /// Returns the chunk's type and appends its payload.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<ChunkType, EncodeError> {
        let len = u16::try_from(self.text.len()).map_err(|_| EncodeError {
            what: "the text of an error chunk",
            value: self.text.len() as u64,
        })?;
        out.extend_from_slice(&self.code.0.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(self.text.as_bytes());
        match self.offset {
            None => Ok(ChunkType::ERROR),
            Some(offset) => {
                out.extend_from_slice(&offset.to_be_bytes());
                Ok(ChunkType::ERROR_OFFSET)
            }
        }
    }
}

/// Length and status of one extent, as sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireExtent {
    /// The length in bytes.
    pub length: u64,
    /// The status; what its bits mean depends on the context.
    pub flags: u64,
}

/// The payload of `BLOCK_STATUS` and `BLOCK_STATUS_EXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusChunk {
    /// The number of the metadata context.
    pub context: u32,
    /// The extents, the first of which starts at the request's offset.
    pub extents: Vec<WireExtent>,
}

impl StatusChunk {
    /// Decodes the payload of a chunk of either type.
    pub fn decode(kind: ChunkType, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("block status chunk", payload);
        let context = fields.u32()?;
        let extents = match kind {
            ChunkType::BLOCK_STATUS_EXT => {
                let count = fields.u32()?;
                let rest = fields.rest();
                let (pairs, odd) = rest.as_chunks::<16>();
                if !odd.is_empty() || usize::try_from(count) != Ok(pairs.len()) {
                    return Err(DecodeError::Count {
                        what: "block status chunk",
                        count: u64::from(count),
                        bytes: rest.len(),
                    });
                }
                pairs.iter().map(wide).collect::<Result<_, _>>()?
            }
            _ => {
                let rest = fields.rest();
                let (pairs, odd) = rest.as_chunks::<8>();
                if !odd.is_empty() {
                    return Err(DecodeError::Trailing {
                        what: "block status chunk",
                        extra: odd.len(),
                    });
                }
                pairs.iter().map(narrow).collect::<Result<_, _>>()?
            }
        };
        Ok(Self { context, extents })
    }

    /// Appends the payload for 32-bit extents (`BLOCK_STATUS`).
    pub fn encode_compact(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        out.extend_from_slice(&self.context.to_be_bytes());
        for extent in &self.extents {
            for value in [extent.length, extent.flags] {
                let value = u32::try_from(value).map_err(|_| EncodeError {
                    what: "a 32-bit extent",
                    value,
                })?;
                out.extend_from_slice(&value.to_be_bytes());
            }
        }
        Ok(())
    }

    /// Appends the payload for 64-bit extents (`BLOCK_STATUS_EXT`).
    pub fn encode_extended(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let count = super::bytes::length32("block status chunk", self.extents.len())?;
        out.extend_from_slice(&self.context.to_be_bytes());
        out.extend_from_slice(&count.to_be_bytes());
        for extent in &self.extents {
            out.extend_from_slice(&extent.length.to_be_bytes());
            out.extend_from_slice(&extent.flags.to_be_bytes());
        }
        Ok(())
    }
}

fn wide(pair: &[u8; 16]) -> Result<WireExtent, DecodeError> {
    let mut fields = Fields::new("extent", pair);
    Ok(WireExtent {
        length: fields.u64()?,
        flags: fields.u64()?,
    })
}

fn narrow(pair: &[u8; 8]) -> Result<WireExtent, DecodeError> {
    let mut fields = Fields::new("extent", pair);
    Ok(WireExtent {
        length: u64::from(fields.u32()?),
        flags: u64::from(fields.u32()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_chunks_are_the_spec_s_bytes() {
        let plain = b"\0\0\0\x05\0\x02no";
        let chunk = ErrorChunk::decode(ChunkType::ERROR, plain).unwrap();
        assert_eq!((chunk.code, chunk.text.as_str()), (ErrorCode::EIO, "no"));
        let at = b"\0\0\0\x05\0\0\0\0\0\0\0\0\x10\0";
        let chunk = ErrorChunk::decode(ChunkType::ERROR_OFFSET, at).unwrap();
        assert_eq!(chunk.offset, Some(0x1000));
        let mut out = Vec::new();
        assert_eq!(chunk.encode(&mut out), Ok(ChunkType::ERROR_OFFSET));
        assert_eq!(out, at);
        assert!(ErrorChunk::decode(ChunkType::ERROR, b"\0\0\0\x05\0\x03no").is_err());
        assert!(ErrorChunk::decode(ChunkType::ERROR, b"\0\0\0\x05\0\x01no").is_err());
    }

    #[test]
    fn status_chunks_are_the_spec_s_bytes() {
        let compact = b"\0\0\0\x07\0\0\x10\0\0\0\0\x03";
        let chunk = StatusChunk::decode(ChunkType::BLOCK_STATUS, compact).unwrap();
        assert_eq!(chunk.context, 7);
        assert_eq!(
            chunk.extents,
            [WireExtent {
                length: 0x1000,
                flags: 3
            }]
        );
        let mut out = Vec::new();
        chunk.encode_compact(&mut out).unwrap();
        assert_eq!(out, compact);
        let wide = b"\0\0\0\x07\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x03";
        assert_eq!(
            StatusChunk::decode(ChunkType::BLOCK_STATUS_EXT, wide),
            Ok(chunk.clone())
        );
        let mut out = Vec::new();
        chunk.encode_extended(&mut out).unwrap();
        assert_eq!(out, wide);
    }

    #[test]
    fn status_chunk_with_half_an_extent_or_a_lying_count_is_refused() {
        let odd = b"\0\0\0\x07\0\0\x10\0\0\0\0";
        assert!(StatusChunk::decode(ChunkType::BLOCK_STATUS, odd).is_err());
        let lie = b"\0\0\0\x07\0\0\0\x02\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x03";
        assert!(StatusChunk::decode(ChunkType::BLOCK_STATUS_EXT, lie).is_err());
    }
}
