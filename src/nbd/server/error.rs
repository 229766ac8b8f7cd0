//! Why serving a client ended before the client left.

use std::io;
use std::time::Duration;

use super::super::session::SessionError;
use super::super::tls::TlsError;

/// A fault that ends one client's connection.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The client broke the protocol or is of no use.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The client was too slow in the handshake.
    #[error("client did not finish the handshake within {} seconds", .0.as_secs_f64())]
    HandshakeTimedOut(Duration),
    /// The client began a message and did not end it.
    #[error("client did not end a message within {} seconds", .0.as_secs_f64())]
    MessageTimedOut(Duration),
    /// The client did not get through the TLS handshake.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The system could not send or receive.
    #[error("{during} failed")]
    Io {
        /// What was tried.
        during: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl ServeError {
    pub(super) fn io(during: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { during, source }
    }
}
