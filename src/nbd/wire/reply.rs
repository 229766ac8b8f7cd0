//! The headers of replies in the transmission phase: simple, structured, extended.

use super::bytes::Fields;
use super::{ChunkFlags, ChunkType, DecodeError, Dialect, EncodeError, ErrorCode};

/// A reply that carries an error code and, for a read, the bytes ("Simple reply message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// Why the request failed; [`ErrorCode::OK`] if it did not.
    pub error: ErrorCode,
    /// The request's number.
    pub cookie: u64,
}

impl SimpleReply {
    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.error.0.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
    }
}

/// The head of one chunk of a reply ("Structured reply chunk message", "Extended reply message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// What holds for the chunk.
    pub flags: ChunkFlags,
    /// What the chunk carries.
    pub kind: ChunkType,
    /// The request's number.
    pub cookie: u64,
    /// The request's offset, which only the extended header repeats.
    pub offset: Option<u64>,
    /// The length of the payload that follows.
    pub length: u64,
}

impl ChunkHeader {
    /// Appends the header: extended if it has an offset, else structured.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self.offset {
            None => {
                let length = u32::try_from(self.length).map_err(|_| EncodeError {
                    what: "the length of a structured reply chunk",
                    value: self.length,
                })?;
                self.encode_start(STRUCTURED_MAGIC, out);
                out.extend_from_slice(&length.to_be_bytes());
            }
            Some(offset) => {
                self.encode_start(EXTENDED_MAGIC, out);
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&self.length.to_be_bytes());
            }
        }
        Ok(())
    }

    fn encode_start(&self, magic: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        out.extend_from_slice(&self.kind.0.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
    }
}

/// The head of any reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply.
    Simple(SimpleReply),
    /// A chunk of a structured or extended reply.
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// The length of the longest header.
    pub const LONGEST: usize = 32;

    /// The length of the shortest header that a server may send; enough to know the header's own length.
    pub const fn shortest(dialect: Dialect) -> usize {
        match dialect {
            Dialect::Simple | Dialect::Structured => 16,
            Dialect::Extended => 32,
        }
    }

    /// Returns the header's whole length by its first bytes; an error if the magic is none that the dialect allows.
    pub fn length(dialect: Dialect, start: &[u8]) -> Result<usize, DecodeError> {
        let magic = Fields::new("reply", start).u32()?;
        match (magic, dialect) {
            (SIMPLE_MAGIC, Dialect::Simple | Dialect::Structured) => Ok(16),
            (STRUCTURED_MAGIC, Dialect::Structured) => Ok(20),
            (EXTENDED_MAGIC, Dialect::Extended) => Ok(32),
            _ => Err(DecodeError::Magic {
                what: "reply",
                found: u64::from(magic),
            }),
        }
    }

    /// Decodes exactly one header.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("reply", bytes);
        let magic = fields.u32()?;
        let header = match magic {
            SIMPLE_MAGIC => Self::Simple(SimpleReply {
                error: ErrorCode(fields.u32()?),
                cookie: fields.u64()?,
            }),
            STRUCTURED_MAGIC => Self::Chunk(ChunkHeader {
                flags: ChunkFlags(fields.u16()?),
                kind: ChunkType(fields.u16()?),
                cookie: fields.u64()?,
                offset: None,
                length: u64::from(fields.u32()?),
            }),
            EXTENDED_MAGIC => Self::Chunk(ChunkHeader {
                flags: ChunkFlags(fields.u16()?),
                kind: ChunkType(fields.u16()?),
                cookie: fields.u64()?,
                offset: Some(fields.u64()?),
                length: fields.u64()?,
            }),
            found => {
                return Err(DecodeError::Magic {
                    what: "reply",
                    found: u64::from(found),
                });
            }
        };
        fields.finish()?;
        Ok(header)
    }
}

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_the_spec_s_bytes() {
        let simple = b"\x67\x44\x66\x98\0\0\0\x16\0\0\0\0\0\0\0\x09";
        let structured = b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\0\x09\0\0\x02\x08";
        let extended =
            b"\x6e\x8a\x27\x8c\0\x01\0\0\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0";
        for bytes in [&simple[..], structured, extended] {
            let mut out = Vec::new();
            match ReplyHeader::decode(bytes).unwrap() {
                ReplyHeader::Simple(simple) => simple.encode(&mut out),
                ReplyHeader::Chunk(chunk) => chunk.encode(&mut out).unwrap(),
            }
            assert_eq!(out, bytes);
        }
    }

    #[test]
    fn dialect_decides_which_magic_is_allowed() {
        let simple = SIMPLE_MAGIC.to_be_bytes();
        let structured = STRUCTURED_MAGIC.to_be_bytes();
        let extended = EXTENDED_MAGIC.to_be_bytes();
        assert_eq!(ReplyHeader::length(Dialect::Simple, &simple), Ok(16));
        assert_eq!(
            ReplyHeader::length(Dialect::Structured, &structured),
            Ok(20)
        );
        assert_eq!(ReplyHeader::length(Dialect::Extended, &extended), Ok(32));
        assert!(ReplyHeader::length(Dialect::Simple, &structured).is_err());
        assert!(ReplyHeader::length(Dialect::Structured, &extended).is_err());
        assert!(ReplyHeader::length(Dialect::Extended, &simple).is_err());
    }
}
