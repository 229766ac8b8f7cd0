//! The identifiers of stored things, each a type of its own, written in hexadecimal.

use std::fmt;
use std::str::FromStr;

use super::error::RepoError;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $len]);

        impl $name {
            /// The length in bytes.
            pub const LEN: usize = $len;

            /// Takes the identifier's bytes as they are.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// Returns the identifier's bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;

            fn from_str(text: &str) -> Result<Self, NotAnId> {
                let mut bytes = [0; $len];
                parse_hex(text, &mut bytes)?;
                Ok(Self(bytes))
            }
        }
    };
}

id! {
    /// A chunk's identifier: the keyed BLAKE3 hash of its plain bytes.
    ChunkId, 32
}
id! {
    /// A map node's identifier: the keyed BLAKE3 hash of its level, presence bits and children's identifiers.
    NodeId, 32
}
id! {
    /// A pack's identifier: random, chosen when the pack is begun, and the salt of its keys.
    PackId, 16
}
id! {
    /// An index segment's identifier: the BLAKE3 hash of the whole file.
    SegmentId, 32
}
id! {
    /// A snapshot's identifier, and that of the session that wrote it: random.
    SnapshotId, 16
}
id! {
    /// A repository's identifier: random, chosen when it is made.
    RepoUuid, 16
}

/// A text is not an identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an identifier of {digits} lower-case hexadecimal digits")]
pub struct NotAnId {
    text: String,
    digits: usize,
}

impl PackId {
    /// Chooses a new identifier.
    pub(crate) fn random() -> Result<Self, RepoError> {
        random_bytes().map(Self)
    }
}

impl SnapshotId {
    /// Chooses a new identifier.
    pub(crate) fn random() -> Result<Self, RepoError> {
        random_bytes().map(Self)
    }
}

impl RepoUuid {
    /// Chooses a new identifier.
    pub(crate) fn random() -> Result<Self, RepoError> {
        random_bytes().map(Self)
    }
}

/// Returns bytes from the system's random generator.
pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N], RepoError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| RepoError::io("draw random bytes", e.into()))?;
    Ok(bytes)
}

/// Writes bytes in hexadecimal.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn parse_hex(text: &str, bytes: &mut [u8]) -> Result<(), NotAnId> {
    let fault = || NotAnId {
        text: text.chars().take(100).collect(),
        digits: bytes.len() * 2,
    };
    if text.len() != bytes.len() * 2 {
        return Err(fault());
    }
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut parsed = Vec::with_capacity(bytes.len());
    for pair in text.as_bytes().chunks(2) {
        match pair {
            [high, low] => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => parsed.push(high << 4 | low),
                _ => return Err(fault()),
            },
            _ => return Err(fault()),
        }
    }
    bytes.copy_from_slice(&parsed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_survives_its_text() {
        let id = SnapshotId::from_bytes(std::array::from_fn(|i| i as u8 * 17));
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().len(), 32);
    }

    #[test]
    fn text_that_is_no_id_is_refused() {
        for text in ["", "00", "0123456789abcdef0123456789abcdeF", "\u{e9}\u{e9}"] {
            assert!(text.parse::<SnapshotId>().is_err(), "{text}");
        }
    }
}
