//! Why bytes are not the message that they should be, or a message has no bytes.

use std::error::Error;
use std::fmt;

/// Bytes that do not parse as the message that has to stand there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The message ends before its fields do.
    Short {
        /// The message.
        what: &'static str,
        /// The bytes that the next field needs.
        needs: usize,
        /// The bytes that are left.
        left: usize,
    },
    /// Bytes follow the last field.
    Trailing {
        /// The message.
        what: &'static str,
        /// The number of bytes too many.
        extra: usize,
    },
    /// The message does not start with its magic number.
    Magic {
        /// The message.
        what: &'static str,
        /// The number found.
        found: u64,
    },
    /// A name is not UTF-8.
    NotUtf8 {
        /// The field.
        what: &'static str,
    },
    /// A count or length field contradicts the message's length.
    Count {
        /// The message.
        what: &'static str,
        /// The value of the field.
        count: u64,
        /// The bytes that the field speaks of.
        bytes: usize,
    },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short { what, needs, left } => {
                write!(f, "{what} is cut short: {needs} bytes wanted, {left} left")
            }
            Self::Trailing { what, extra } => {
                write!(f, "{what} has {extra} bytes after its end")
            }
            Self::Magic { what, found } => {
                write!(f, "{what} starts with the wrong magic {found:#x}")
            }
            Self::NotUtf8 { what } => write!(f, "{what} is not UTF-8"),
            Self::Count { what, count, bytes } => {
                write!(f, "{what} claims {count} entries in {bytes} bytes")
            }
        }
    }
}

impl Error for DecodeError {}

/// A value that its field on the wire cannot hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodeError {
    /// The field.
    pub what: &'static str,
    /// The value that does not fit.
    pub value: u64,
}

impl fmt::Display for EncodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot hold {:#x}", self.what, self.value)
    }
}

impl Error for EncodeError {}
