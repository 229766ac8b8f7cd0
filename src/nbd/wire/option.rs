//! The headers of options and of their answers, and the entries of a list of exports.

use super::bytes::{Fields, length32, put_name, utf8};
use super::greeting::OPTION_MAGIC;
use super::{DecodeError, EncodeError, OptionCode, OptionReplyCode};

/// The head of an option that a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option.
    pub option: OptionCode,
    /// The length of the payload that follows.
    pub length: u32,
}

impl OptionHeader {
    /// The encoded length.
    pub const LEN: usize = 16;

    /// Decodes exactly [`OptionHeader::LEN`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("option", bytes);
        fields.magic(OPTION_MAGIC)?;
        let option = OptionCode(fields.u32()?);
        let length = fields.u32()?;
        fields.finish()?;
        Ok(Self { option, length })
    }
}

/// Appends an option with its payload.
pub fn encode_option(
    option: OptionCode,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let length = length32("option", payload.len())?;
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.0.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

/// The head of a server's answer to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: OptionCode,
    /// The kind of answer.
    pub code: OptionReplyCode,
    /// The length of the payload that follows.
    pub length: u32,
}

impl OptionReplyHeader {
    /// The encoded length.
    pub const LEN: usize = 20;

    /// Decodes exactly [`OptionReplyHeader::LEN`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("option reply", bytes);
        fields.magic(REPLY_MAGIC)?;
        let option = OptionCode(fields.u32()?);
        let code = OptionReplyCode(fields.u32()?);
        let length = fields.u32()?;
        fields.finish()?;
        Ok(Self {
            option,
            code,
            length,
        })
    }
}

/// Appends an answer with its payload.
pub fn encode_reply(
    option: OptionCode,
    code: OptionReplyCode,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let length = length32("option reply", payload.len())?;
    out.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.0.to_be_bytes());
    out.extend_from_slice(&code.0.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

/// One export in the answer to `LIST`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// The export's name.
    pub name: String,
    /// What the server adds for people to read; often empty.
    pub description: String,
}

impl ListedExport {
    /// Decodes the payload of a reply of type `SERVER`.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("listed export", payload);
        let len = fields.u32()?;
        let name = utf8("export name", fields.bytes(len)?)?;
        let description = String::from_utf8_lossy(fields.rest()).into_owned();
        Ok(Self { name, description })
    }

    /// Returns the payload.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let mut out = Vec::new();
        put_name("export name", &self.name, &mut out)?;
        out.extend_from_slice(self.description.as_bytes());
        Ok(out)
    }
}

const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_is_the_spec_s_bytes() {
        let mut out = Vec::new();
        encode_option(OptionCode::EXPORT_NAME, b"x", &mut out).unwrap();
        assert_eq!(out, b"IHAVEOPT\0\0\0\x01\0\0\0\x01x");
        let header = OptionHeader::decode(&out[..16]).unwrap();
        assert_eq!((header.option.0, header.length), (1, 1));
    }

    #[test]
    fn reply_is_the_spec_s_bytes() {
        let mut out = Vec::new();
        encode_reply(OptionCode::GO, OptionReplyCode::ACK, b"", &mut out).unwrap();
        assert_eq!(
            out,
            b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0"
        );
        assert_eq!(OptionReplyHeader::decode(&out).unwrap().code.0, 1);
    }

    #[test]
    fn listed_export_with_a_name_longer_than_the_reply_is_refused() {
        assert!(ListedExport::decode(b"\xff\xff\xff\xffab").is_err());
        assert!(ListedExport::decode(b"\0\0\0\x01\xff").is_err());
        let listed = ListedExport::decode(b"\0\0\0\x01abc").unwrap();
        assert_eq!(listed.encode().unwrap(), b"\0\0\0\x01abc");
        assert_eq!(
            (listed.name.as_str(), listed.description.as_str()),
            ("a", "bc")
        );
    }
}
