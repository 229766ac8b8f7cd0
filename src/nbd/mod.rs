//! The NBD protocol: messages, state machines, an async client and an async server.
//!
//! [`wire`] knows bytes, [`session`] knows what may follow what and what a peer may cost us; neither does I/O.
//! [`client`] and [`server`] drive them over a [`transport`], with [`tls`] where it is wanted.

pub mod client;
pub mod server;
pub mod session;
pub mod tls;
pub mod transport;
pub mod uri;
pub mod wire;
