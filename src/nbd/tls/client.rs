//! A client's side of TLS.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::super::transport::Stream;
use super::super::uri::{Endpoint, TlsParameters};
use super::stream::Secured;
use super::{TlsError, x509};

/// What a client authenticates itself and its server with, on each of its connections.
#[derive(Clone)]
pub struct TlsClient {
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    X509 {
        connector: TlsConnector,
        name: ServerName<'static>,
    },
    #[cfg(feature = "tls-psk")]
    Psk(super::psk::PskClient),
}

impl TlsClient {
    /// Reads what a URI's parameters name.
    ///
    /// A certificate has to name the URI's host, or what `tls-hostname` says; over a Unix socket, `localhost`. Without a
    /// folder of certificates those authorities are trusted that the system trusts.
    pub fn load(parameters: &TlsParameters, endpoint: &Endpoint) -> Result<Self, TlsError> {
        let kind = match (&parameters.certificates, &parameters.psk_file) {
            (Some(_), Some(_)) => return Err(TlsError::Both),
            (_, Some(file)) => psk(file, parameters.username.as_deref())?,
            (folder, None) => {
                let config = x509::client(folder.as_deref())?;
                Kind::X509 {
                    connector: TlsConnector::from(Arc::new(config)),
                    name: name(parameters, endpoint)?,
                }
            }
        };
        Ok(Self { kind })
    }

    /// Goes through the handshake on a stream on which the server has agreed to TLS.
    pub(in crate::nbd) async fn connect(&self, stream: Stream) -> Result<Stream, TlsError> {
        match &self.kind {
            Kind::X509 { connector, name } => {
                let stream = connector.connect(name.clone(), stream).await;
                let stream = stream.map_err(TlsError::of_client)?;
                Ok(Stream::other(Secured(stream)))
            }
            #[cfg(feature = "tls-psk")]
            Kind::Psk(client) => {
                let stream = client.connect(stream).await;
                let stream = stream.map_err(TlsError::of_client)?;
                Ok(Stream::other(Secured(stream)))
            }
        }
    }
}

/// The name that the server's certificate has to have.
fn name(parameters: &TlsParameters, endpoint: &Endpoint) -> Result<ServerName<'static>, TlsError> {
    let name = match (&parameters.hostname, endpoint) {
        (Some(name), _) => name,
        (None, Endpoint::Tcp { host, .. }) => host,
        (None, Endpoint::Unix(_)) => "localhost",
    };
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Hostname(name.to_owned()))
}

#[cfg(feature = "tls-psk")]
fn psk(file: &Path, identity: Option<&str>) -> Result<Kind, TlsError> {
    super::psk::PskClient::load(file, identity).map(Kind::Psk)
}

#[cfg(not(feature = "tls-psk"))]
fn psk(_: &Path, _: Option<&str>) -> Result<Kind, TlsError> {
    Err(TlsError::NoPsk)
}
