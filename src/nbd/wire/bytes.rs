//! Takes big-endian fields off a message and puts them on one.

use super::{DecodeError, EncodeError};

/// The bytes of one message that are not decoded yet.
pub(super) struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        match self.rest.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(*head)
            }
            None => Err(self.short(N)),
        }
    }

    pub(super) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn bytes(&mut self, len: u32) -> Result<&'a [u8], DecodeError> {
        let wanted = usize::try_from(len).unwrap_or(usize::MAX);
        match self.rest.split_at_checked(wanted) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => Err(self.short(wanted)),
        }
    }

    /// Takes a string with a 32-bit length before it.
    pub(super) fn name(&mut self, what: &'static str) -> Result<String, DecodeError> {
        let len = self.u32()?;
        utf8(what, self.bytes(len)?)
    }

    /// Takes all that is left.
    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    pub(super) fn magic(&mut self, magic: u64) -> Result<(), DecodeError> {
        match self.u64()? {
            found if found == magic => Ok(()),
            found => Err(DecodeError::Magic {
                what: self.what,
                found,
            }),
        }
    }

    pub(super) fn finish(self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(DecodeError::Trailing {
                what: self.what,
                extra,
            }),
        }
    }

    fn short(&self, needs: usize) -> DecodeError {
        DecodeError::Short {
            what: self.what,
            needs,
            left: self.rest.len(),
        }
    }
}

/// Turns a name's bytes into a string.
pub(super) fn utf8(what: &'static str, bytes: &[u8]) -> Result<String, DecodeError> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(DecodeError::NotUtf8 { what }),
    }
}

/// Puts a string behind its 32-bit length.
pub(super) fn put_name(
    what: &'static str,
    name: &str,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    out.extend_from_slice(&length32(what, name.len())?.to_be_bytes());
    out.extend_from_slice(name.as_bytes());
    Ok(())
}

/// Gives a length that its 32-bit field can hold.
pub(super) fn length32(what: &'static str, len: usize) -> Result<u32, EncodeError> {
    u32::try_from(len).map_err(|_| EncodeError {
        what,
        value: len as u64,
    })
}
