//! A server's side of TLS.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;

use super::super::transport::Stream;
use super::stream::Secured;
use super::{TlsError, x509};

/// What a server authenticates itself and its clients with.
#[derive(Clone)]
pub struct TlsServer {
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    X509(TlsAcceptor),
    #[cfg(feature = "tls-psk")]
    Psk(super::psk::PskServer),
}

impl TlsServer {
    /// Reads `server-cert.pem` and `server-key.pem` of a folder.
    ///
    /// With `verify_peer` a client needs a certificate from an authority in `ca-cert.pem` that is not in `ca-crl.pem`.
    pub fn certificates(folder: &Path, verify_peer: bool) -> Result<Self, TlsError> {
        let config = x509::server(folder, verify_peer)?;
        Ok(Self {
            kind: Kind::X509(TlsAcceptor::from(Arc::new(config))),
        })
    }

    /// Reads a file of `identity:key` lines as psktool writes it, or `keys.psk` of a folder.
    #[cfg(feature = "tls-psk")]
    pub fn pre_shared_keys(file: &Path) -> Result<Self, TlsError> {
        let server = super::psk::PskServer::load(file)?;
        Ok(Self {
            kind: Kind::Psk(server),
        })
    }

    /// Says that this build has no pre-shared keys.
    #[cfg(not(feature = "tls-psk"))]
    pub fn pre_shared_keys(_: &Path) -> Result<Self, TlsError> {
        Err(TlsError::NoPsk)
    }

    /// Goes through the handshake on a stream on which TLS was agreed on.
    pub(in crate::nbd) async fn accept(&self, stream: Stream) -> Result<Stream, TlsError> {
        match &self.kind {
            Kind::X509(acceptor) => {
                let stream = acceptor.accept(stream).await;
                let stream = stream.map_err(TlsError::of_server)?;
                Ok(Stream::other(Secured(stream)))
            }
            #[cfg(feature = "tls-psk")]
            Kind::Psk(server) => {
                let stream = server.accept(stream).await;
                let stream = stream.map_err(TlsError::of_server)?;
                Ok(Stream::other(Secured(stream)))
            }
        }
    }
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What it holds is secret.
        f.write_str("TlsServer")
    }
}
