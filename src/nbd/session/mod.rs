//! What may follow what on an NBD connection, and what a peer may cost us: state machines without I/O, for both sides.
//!
//! A state says how many bytes it wants and is consumed by handling them, so nothing behind a message is ever taken
//! before its turn. The [`client`] half checks a server's replies, the [`server`] half a client's requests; every bound
//! that is put on a peer stands in [`limits`].

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod block_size;
pub mod client;
mod extent;
mod fault;
pub mod fuzz;
pub mod limits;
pub mod server;
mod zeroing;

pub use block_size::BlockSize;
pub use extent::{Extent, extents_of_reply};
pub use fault::{PeerIncompatible, PeerMisbehaved, Refused, SessionError};
pub use zeroing::Zeroing;
