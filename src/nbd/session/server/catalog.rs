//! What a server offers: its exports, as far as the handshake speaks of them.

use super::super::{BlockSize, limits};
use crate::nbd::wire::{Dialect, TransmissionFlags};

/// One export that is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The name.
    pub name: String,
    /// A text for people.
    pub description: Option<String>,
    /// The size in bytes.
    pub size: u64,
    /// The block sizes.
    pub block_size: BlockSize,
    /// The metadata contexts; a context's number is its place here.
    pub contexts: Vec<String>,
    /// What the disk can do, as far as it does not depend on what a client speaks.
    pub abilities: TransmissionFlags,
}

impl Offer {
    /// What a disk of a fixed content can do.
    pub const READ_ONLY: TransmissionFlags = TransmissionFlags(
        TransmissionFlags::READ_ONLY.0
            | TransmissionFlags::SEND_FLUSH.0
            | TransmissionFlags::SEND_CACHE.0
            | TransmissionFlags::CAN_MULTI_CONN.0,
    );

    /// What a disk may say that it can do.
    const ABILITIES: TransmissionFlags = TransmissionFlags(
        Self::READ_ONLY.0
            | TransmissionFlags::SEND_FUA.0
            | TransmissionFlags::ROTATIONAL.0
            | TransmissionFlags::SEND_TRIM.0
            | TransmissionFlags::SEND_WRITE_ZEROES.0
            | TransmissionFlags::SEND_FAST_ZERO.0,
    );

    /// What the export can do for a client that speaks `dialect`.
    pub fn flags(&self, dialect: Dialect) -> TransmissionFlags {
        let flags = TransmissionFlags::HAS_FLAGS | self.abilities.both(Self::ABILITIES);
        match dialect {
            Dialect::Simple => flags,
            Dialect::Structured | Dialect::Extended => flags | TransmissionFlags::SEND_DF,
        }
    }
}

/// The exports of a server, none with the name of another.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    offers: Vec<Offer>,
}

/// An export that cannot be offered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// Two exports with one name.
    #[error("two exports are named {name:?}")]
    NameTwice {
        /// The name.
        name: String,
    },
    /// A name, description or context that no client has to take.
    #[error(
        "{what} of {length} bytes is longer than {} or holds a zero byte",
        limits::MAX_STRING
    )]
    BadString {
        /// What the text is.
        what: &'static str,
        /// Its length.
        length: usize,
    },
    /// A size that no client has to take.
    #[error("export {name:?} has {size} bytes, which is more than 2^63-1 or no multiple of {min}")]
    BadSize {
        /// The export's name.
        name: String,
        /// Its size.
        size: u64,
        /// Its least block size.
        min: u32,
    },
}

impl Catalog {
    /// Checks the exports.
    pub fn new(offers: Vec<Offer>) -> Result<Self, OfferError> {
        for (at, offer) in offers.iter().enumerate() {
            string("export name", &offer.name)?;
            string(
                "description",
                offer.description.as_deref().unwrap_or_default(),
            )?;
            for context in &offer.contexts {
                string("metadata context name", context)?;
            }
            let min = offer.block_size.min();
            let whole = offer.size.checked_rem(u64::from(min)) == Some(0);
            if offer.size > limits::MAX_EXPORT_SIZE || !whole {
                return Err(OfferError::BadSize {
                    name: offer.name.clone(),
                    size: offer.size,
                    min,
                });
            }
            if offers.iter().take(at).any(|other| other.name == offer.name) {
                return Err(OfferError::NameTwice {
                    name: offer.name.clone(),
                });
            }
        }
        Ok(Self { offers })
    }

    /// Returns the exports in their order.
    pub fn offers(&self) -> &[Offer] {
        &self.offers
    }

    /// Finds an export; the empty name means the only one, if there is just one.
    pub fn find(&self, name: &str) -> Option<(usize, &Offer)> {
        let named = self.offers.iter().enumerate().find(|(_, o)| o.name == name);
        match (named, self.offers.as_slice()) {
            (None, [only]) if name.is_empty() => Some((0, only)),
            (named, _) => named,
        }
    }
}

fn string(what: &'static str, text: &str) -> Result<(), OfferError> {
    if text.len() > limits::MAX_STRING || text.contains('\0') {
        return Err(OfferError::BadString {
            what,
            length: text.len(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(name: &str, size: u64, min: u32) -> Offer {
        Offer {
            name: name.into(),
            description: None,
            size,
            block_size: BlockSize::new(min, 65536, 1 << 20).unwrap(),
            contexts: Vec::new(),
            abilities: Offer::READ_ONLY,
        }
    }

    #[test]
    fn empty_name_means_the_only_export() {
        let one = Catalog::new(vec![offer("a", 0, 1)]).unwrap();
        assert_eq!(one.find("").unwrap().1.name, "a");
        assert!(one.find("b").is_none());
        let two = Catalog::new(vec![offer("a", 0, 1), offer("b", 0, 1)]).unwrap();
        assert!(two.find("").is_none());
        assert_eq!(two.find("b").unwrap().0, 1);
    }

    #[test]
    fn exports_that_clients_would_choke_on_are_refused() {
        let refused = |offers| Catalog::new(offers).unwrap_err();
        refused(vec![offer("a", 0, 1), offer("a", 1, 1)]);
        refused(vec![offer(&"x".repeat(4097), 0, 1)]);
        refused(vec![offer("a\0", 0, 1)]);
        refused(vec![offer("a", 1 << 63, 1)]);
        refused(vec![offer("a", 1000, 512)]);
    }
}
