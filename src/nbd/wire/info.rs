//! What `INFO` and `GO` ask, and the pieces of information that answer them.

use super::bytes::{Fields, length32, put_name, utf8};
use super::{DecodeError, EncodeError, InfoCode, TransmissionFlags};

/// The payload of `INFO` and `GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export asked for; empty for the server's default.
    pub export: String,
    /// The pieces of information that the client wants, besides the one that always comes.
    pub wanted: Vec<InfoCode>,
}

impl InfoRequest {
    /// Decodes the payload.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("information request", payload);
        let export = fields.name("export name")?;
        let count = fields.u16()?;
        if fields.left() != usize::from(count).saturating_mul(2) {
            return Err(DecodeError::Count {
                what: "information request",
                count: u64::from(count),
                bytes: fields.left(),
            });
        }
        let mut wanted = Vec::new();
        for _ in 0..count {
            wanted.push(InfoCode(fields.u16()?));
        }
        Ok(Self { export, wanted })
    }

    /// Returns the payload.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let mut out = Vec::new();
        put_name("export name", &self.export, &mut out)?;
        let count = u16::try_from(self.wanted.len()).map_err(|_| EncodeError {
            what: "information request",
            value: self.wanted.len() as u64,
        })?;
        out.extend_from_slice(&count.to_be_bytes());
        for info in &self.wanted {
            out.extend_from_slice(&info.0.to_be_bytes());
        }
        Ok(out)
    }
}

/// Size and flags of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
}

/// The block sizes of an export, as sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizeInfo {
    /// Each request has to be a multiple of this.
    pub min: u32,
    /// Requests of this size work best.
    pub preferred: u32,
    /// No request with data may be longer.
    pub max: u32,
}

/// One piece of information about an export: the payload of a reply of type `INFO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    /// Size and flags.
    Export(ExportInfo),
    /// The canonical name.
    Name(String),
    /// A text for people.
    Description(String),
    /// The block sizes.
    BlockSize(BlockSizeInfo),
    /// A piece that this program does not know.
    Unknown(InfoCode),
}

impl Info {
    /// Decodes the payload.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("export information", payload);
        match InfoCode(fields.u16()?) {
            InfoCode::EXPORT => {
                let size = fields.u64()?;
                let flags = TransmissionFlags(fields.u16()?);
                fields.finish()?;
                Ok(Self::Export(ExportInfo { size, flags }))
            }
            InfoCode::NAME => Ok(Self::Name(utf8("export name", fields.rest())?)),
            InfoCode::DESCRIPTION => Ok(Self::Description(
                String::from_utf8_lossy(fields.rest()).into_owned(),
            )),
            InfoCode::BLOCK_SIZE => {
                let min = fields.u32()?;
                let preferred = fields.u32()?;
                let max = fields.u32()?;
                fields.finish()?;
                Ok(Self::BlockSize(BlockSizeInfo {
                    min,
                    preferred,
                    max,
                }))
            }
            other => Ok(Self::Unknown(other)),
        }
    }

    /// Returns the payload.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let mut out = Vec::new();
        match self {
            Self::Export(info) => {
                out.extend_from_slice(&InfoCode::EXPORT.0.to_be_bytes());
                out.extend_from_slice(&info.size.to_be_bytes());
                out.extend_from_slice(&info.flags.0.to_be_bytes());
            }
            Self::Name(name) => {
                length32("export name", name.len())?;
                out.extend_from_slice(&InfoCode::NAME.0.to_be_bytes());
                out.extend_from_slice(name.as_bytes());
            }
            Self::Description(text) => {
                length32("description", text.len())?;
                out.extend_from_slice(&InfoCode::DESCRIPTION.0.to_be_bytes());
                out.extend_from_slice(text.as_bytes());
            }
            Self::BlockSize(sizes) => {
                out.extend_from_slice(&InfoCode::BLOCK_SIZE.0.to_be_bytes());
                out.extend_from_slice(&sizes.min.to_be_bytes());
                out.extend_from_slice(&sizes.preferred.to_be_bytes());
                out.extend_from_slice(&sizes.max.to_be_bytes());
            }
            Self::Unknown(code) => out.extend_from_slice(&code.0.to_be_bytes()),
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_the_spec_s_bytes() {
        let request = InfoRequest {
            export: "disk".into(),
            wanted: vec![InfoCode::BLOCK_SIZE],
        };
        let bytes = request.encode().unwrap();
        assert_eq!(bytes, b"\0\0\0\x04disk\0\x01\0\x03");
        assert_eq!(InfoRequest::decode(&bytes).unwrap(), request);
    }

    #[test]
    fn request_with_junk_or_a_lying_count_is_refused() {
        assert!(InfoRequest::decode(b"\0\0\0\x04disk\0\x01\0\x03x").is_err());
        assert!(InfoRequest::decode(b"\0\0\0\x04disk\0\x02\0\x03").is_err());
        assert!(InfoRequest::decode(b"\xff\xff\xff\xffdisk\0\0").is_err());
    }

    #[test]
    fn infos_are_the_spec_s_bytes() {
        let export = Info::decode(b"\0\0\0\0\0\0\0\0\x10\0\x05\x0f").unwrap();
        assert_eq!(
            export,
            Info::Export(ExportInfo {
                size: 0x1000,
                flags: TransmissionFlags(0x50f),
            })
        );
        let sizes = Info::decode(b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0").unwrap();
        assert_eq!(
            sizes,
            Info::BlockSize(BlockSizeInfo {
                min: 512,
                preferred: 4096,
                max: 32 << 20,
            })
        );
        assert_eq!(
            Info::decode(b"\0\x77abc").unwrap(),
            Info::Unknown(InfoCode(0x77))
        );
        assert!(Info::decode(b"\0\0\0\0").is_err());
    }
}
