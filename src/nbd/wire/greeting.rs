//! The bytes that open a connection, and the old way to end the handshake.

use super::bytes::Fields;
use super::{DecodeError, ServerFlags, TransmissionFlags};

/// The server's first message ("Newstyle negotiation").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Newstyle, fixed or not.
    Newstyle(ServerFlags),
    /// Oldstyle, which has no options; its remaining fields are not read.
    Oldstyle,
}

impl Greeting {
    /// The length of the newstyle message, and of as much of the oldstyle one as is read.
    pub const LEN: usize = 18;

    /// Decodes the first [`Greeting::LEN`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("greeting", bytes);
        fields.magic(NBD_MAGIC)?;
        match fields.u64()? {
            OPTION_MAGIC => {
                let flags = ServerFlags(fields.u16()?);
                fields.finish()?;
                Ok(Self::Newstyle(flags))
            }
            OLDSTYLE_MAGIC => Ok(Self::Oldstyle),
            found => Err(DecodeError::Magic {
                what: "greeting",
                found,
            }),
        }
    }

    /// Appends the newstyle greeting.
    pub fn encode_newstyle(flags: ServerFlags, out: &mut Vec<u8>) {
        out.extend_from_slice(&NBD_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&flags.0.to_be_bytes());
    }
}

/// The server's answer to `EXPORT_NAME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportNameAnswer {
    /// The export's size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
}

impl ExportNameAnswer {
    /// The length of the answer with or without the 124 zero bytes.
    pub const fn len(no_zeroes: bool) -> usize {
        if no_zeroes { 10 } else { 134 }
    }

    /// Decodes the answer; the zero bytes may be anything.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("answer to EXPORT_NAME", bytes);
        let size = fields.u64()?;
        let flags = TransmissionFlags(fields.u16()?);
        Ok(Self { size, flags })
    }

    /// Appends the answer.
    pub fn encode(&self, no_zeroes: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        if !no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
    }
}

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Opens the newstyle greeting and each option of a client.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_is_the_spec_s_bytes() {
        let mut out = Vec::new();
        Greeting::encode_newstyle(
            ServerFlags::FIXED_NEWSTYLE | ServerFlags::NO_ZEROES,
            &mut out,
        );
        assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(
            Greeting::decode(&out),
            Ok(Greeting::Newstyle(ServerFlags(3)))
        );
    }

    #[test]
    fn oldstyle_and_garbage_are_told_apart() {
        let old = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00";
        assert_eq!(Greeting::decode(old), Ok(Greeting::Oldstyle));
        let ssh = b"SSH-2.0-OpenSSH_9.2p1";
        assert!(matches!(
            Greeting::decode(&ssh[..18]),
            Err(DecodeError::Magic { .. })
        ));
    }
}
