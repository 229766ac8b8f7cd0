//! TLS for both sides: certificates by rustls, pre-shared keys by OpenSSL.
//!
//! Nothing here speaks NBD: a session says when TLS begins, and gets a stream back that it goes on with. A peer is either
//! authenticated as it was asked for, or there is no stream.

mod client;
mod error;
mod files;
#[cfg(feature = "tls-psk")]
mod keys;
#[cfg(feature = "tls-psk")]
mod psk;
mod server;
mod stream;
mod x509;

pub use client::TlsClient;
pub use error::TlsError;
pub use server::TlsServer;
