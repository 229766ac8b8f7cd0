//! The header of a request in the transmission phase, compact and extended.

use super::bytes::Fields;
use super::{Command, CommandFlags, DecodeError, Dialect, EncodeError};

/// A request ("Request message"); a payload may follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How the command is to be done.
    pub flags: CommandFlags,
    /// What is to be done.
    pub command: Command,
    /// The number that the reply will carry.
    pub cookie: u64,
    /// The first byte's offset.
    pub offset: u64,
    /// The length of the range, or of the payload.
    pub length: u64,
}

impl Request {
    /// The encoded length of a request.
    pub const fn len(dialect: Dialect) -> usize {
        match dialect {
            Dialect::Simple | Dialect::Structured => 28,
            Dialect::Extended => 32,
        }
    }

    /// Decodes exactly [`Request::len`] bytes.
    pub fn decode(dialect: Dialect, bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("request", bytes);
        let magic = match dialect {
            Dialect::Simple | Dialect::Structured => COMPACT_MAGIC,
            Dialect::Extended => EXTENDED_MAGIC,
        };
        let found = fields.u32()?;
        if found != magic {
            return Err(DecodeError::Magic {
                what: "request",
                found: u64::from(found),
            });
        }
        let flags = CommandFlags(fields.u16()?);
        let command = Command(fields.u16()?);
        let cookie = fields.u64()?;
        let offset = fields.u64()?;
        let length = match dialect {
            Dialect::Simple | Dialect::Structured => u64::from(fields.u32()?),
            Dialect::Extended => fields.u64()?,
        };
        fields.finish()?;
        Ok(Self {
            flags,
            command,
            cookie,
            offset,
            length,
        })
    }

    /// Appends the header.
    pub fn encode(&self, dialect: Dialect, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match dialect {
            Dialect::Simple | Dialect::Structured => {
                let length = u32::try_from(self.length).map_err(|_| EncodeError {
                    what: "the length of a compact request",
                    value: self.length,
                })?;
                self.encode_start(COMPACT_MAGIC, out);
                out.extend_from_slice(&length.to_be_bytes());
            }
            Dialect::Extended => {
                self.encode_start(EXTENDED_MAGIC, out);
                out.extend_from_slice(&self.length.to_be_bytes());
            }
        }
        Ok(())
    }

    fn encode_start(&self, magic: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        out.extend_from_slice(&self.command.0.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
    }
}

/// The payload of `BLOCK_STATUS`, which only an extended request can carry: it asks some of the chosen contexts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusFilter {
    /// The length of the range, since the request's own length is that of the payload.
    pub length: u64,
    /// The numbers of the contexts.
    pub contexts: Vec<u32>,
}

impl StatusFilter {
    /// The length of a payload that names this many contexts.
    pub const fn len(contexts: usize) -> usize {
        contexts.saturating_mul(4).saturating_add(8)
    }

    /// Decodes the payload.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("block status filter", payload);
        let length = fields.u64()?;
        let rest = fields.rest();
        let (ids, odd) = rest.as_chunks::<4>();
        if !odd.is_empty() {
            return Err(DecodeError::Trailing {
                what: "block status filter",
                extra: odd.len(),
            });
        }
        let contexts = ids.iter().map(|id| u32::from_be_bytes(*id)).collect();
        Ok(Self { length, contexts })
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.length.to_be_bytes());
        for id in &self.contexts {
            out.extend_from_slice(&id.to_be_bytes());
        }
    }
}

const COMPACT_MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Request = Request {
        flags: CommandFlags::DF,
        command: Command::READ,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1000,
        length: 0x200,
    };

    #[test]
    fn compact_request_is_the_spec_s_bytes() {
        let mut out = Vec::new();
        READ.encode(Dialect::Structured, &mut out).unwrap();
        assert_eq!(
            out,
            b"\x25\x60\x95\x13\0\x04\0\0\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x10\0\0\0\x02\0"
        );
        assert_eq!(Request::decode(Dialect::Simple, &out), Ok(READ));
    }

    #[test]
    fn extended_request_is_the_spec_s_bytes() {
        let mut out = Vec::new();
        READ.encode(Dialect::Extended, &mut out).unwrap();
        assert_eq!(
            out,
            b"\x21\xe4\x1c\x71\0\x04\0\0\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x02\0"
        );
        assert_eq!(Request::decode(Dialect::Extended, &out), Ok(READ));
        assert!(Request::decode(Dialect::Structured, &out[..28]).is_err());
    }

    #[test]
    fn filter_is_the_spec_s_bytes() {
        let bytes = b"\0\0\x01\0\0\0\0\0\0\0\0\x07\0\0\0\x01";
        let filter = StatusFilter::decode(bytes).unwrap();
        assert_eq!(filter.length, 1 << 40);
        assert_eq!(filter.contexts, [7, 1]);
        let mut out = Vec::new();
        filter.encode(&mut out);
        assert_eq!(out, bytes);
        assert_eq!(StatusFilter::len(2), bytes.len());
        for cut in [0, 7, 9, 11, 15] {
            assert!(StatusFilter::decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn compact_request_cannot_hold_four_gibibytes() {
        let long = Request {
            length: 1 << 32,
            ..READ
        };
        let mut out = Vec::new();
        assert!(long.encode(Dialect::Structured, &mut out).is_err());
        assert!(out.is_empty());
        assert!(long.encode(Dialect::Extended, &mut out).is_ok());
    }
}
