//! The server's half of a session.
//!
//! [`Handshake`] answers options from a [`Catalog`] until both sides have [`Agreed`]; then [`Rules`] judges each
//! request.

mod answers;
mod catalog;
mod handshake;
mod rules;
mod tls;

pub use catalog::{Catalog, Offer, OfferError};
pub use handshake::{Agreed, Handshake, Step};
pub use rules::{Judged, Rules, Verdict};
pub use tls::Tls;
