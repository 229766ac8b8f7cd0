//! A reader of bytes that knows where it is and never reads past the end.

use super::DecodeError;

/// Reads fields from the front of a slice.
#[derive(Clone, Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    at: u64,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, at: 0 }
    }

    /// Reads bytes that stand at the offset `at` of a larger whole.
    pub(crate) fn starting_at(bytes: &'a [u8], at: u64) -> Self {
        Self { rest: bytes, at }
    }

    /// The offset of the next byte.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// The number of bytes that are left.
    pub(crate) fn left(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn bytes(&mut self, len: usize, what: &str) -> Result<&'a [u8], DecodeError> {
        match self.rest.split_at_checked(len) {
            Some((taken, rest)) => {
                self.rest = rest;
                self.at = self.at.saturating_add(len as u64);
                Ok(taken)
            }
            None => Err(DecodeError::corrupt(
                self.at,
                format!("{what} needs {len} bytes, {} are left", self.rest.len()),
            )),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], DecodeError> {
        let at = self.at;
        let taken = self.bytes(N, what)?;
        taken
            .try_into()
            .map_err(|_| DecodeError::corrupt(at, format!("{what} has the wrong length")))
    }

    pub(crate) fn u8(&mut self, what: &str) -> Result<u8, DecodeError> {
        self.array(what).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, what: &str) -> Result<u16, DecodeError> {
        self.array(what).map(u16::from_le_bytes)
    }

    /// Reads a number of three bytes.
    pub(crate) fn u24(&mut self, what: &str) -> Result<u32, DecodeError> {
        let [a, b, c] = self.array(what)?;
        Ok(u32::from_le_bytes([a, b, c, 0]))
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32, DecodeError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64, DecodeError> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self, what: &str) -> Result<u128, DecodeError> {
        self.array(what).map(u128::from_le_bytes)
    }

    /// Fails when bytes are left.
    pub(crate) fn finish(self, what: &str) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(DecodeError::corrupt(
            self.at,
            format!("{} bytes follow the {what}", self.rest.len()),
        ))
    }
}
