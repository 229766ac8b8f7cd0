//! Why TLS cannot be had.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::AlertDescription as Alert;

/// A fault of TLS: in what it was set up with, or with the peer. No text holds a secret.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{} cannot be read", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// A file's content is of no use.
    #[error("{}: {problem}", file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Certificates and keys do not go together.
    #[error("the TLS settings from {from} do not work together")]
    Settings {
        /// Where they come from.
        from: String,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The system trusts nobody.
    #[error("this system has no trusted certificates; name a folder with tls-certificates")]
    NoTrust,
    /// Two ways to authenticate at once.
    #[error("certificates and pre-shared keys exclude each other; name one of them")]
    Both,
    /// A program without pre-shared keys.
    #[error("this build has no TLS with pre-shared keys; build it with the feature tls-psk")]
    NoPsk,
    /// A host that no certificate can name.
    #[error("{0:?} is no name that a certificate could have; name one with tls-hostname")]
    Hostname(String),
    /// A file without the wanted key.
    #[error("{} has no key for {identity:?}", file.display())]
    NoKey {
        /// The file.
        file: PathBuf,
        /// The wanted identity.
        identity: String,
    },
    /// A file with more keys than one, and nothing that says which is meant.
    #[error("{} has {count} keys; name the identity in the URI, as in nbds://IDENTITY@HOST", file.display())]
    WhichKey {
        /// The file.
        file: PathBuf,
        /// The number of keys.
        count: usize,
    },
    /// The server does not take what the client authenticates with.
    #[error("credentials rejected by the server, or none given where it wants some")]
    Rejected {
        /// How it said so.
        #[source]
        source: Arc<io::Error>,
    },
    /// The handshake failed for another reason, such as a certificate that does not verify.
    #[error("TLS handshake failed")]
    Handshake {
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
}

impl TlsError {
    /// Sorts a client's failure until the server's first bytes have come.
    ///
    /// With TLS 1.3 a client is done before the server has looked at its certificate, so that a rejection comes when the
    /// client reads for the first time; and many servers just hang up.
    pub(in crate::nbd) fn of_client(source: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let hung_up = matches!(
            source.kind(),
            UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe
        );
        let rejected = hung_up || is_rejection(&source);
        let source = Arc::new(source);
        match rejected {
            true => Self::Rejected { source },
            false => Self::Handshake { source },
        }
    }

    /// A failure of a server's handshake.
    pub(super) fn of_server(source: io::Error) -> Self {
        Self::Handshake {
            source: Arc::new(source),
        }
    }
}

/// Whether a server's alert speaks of what the client authenticated with.
fn is_rejection(fault: &io::Error) -> bool {
    let Some(inner) = fault.get_ref() else {
        return false;
    };
    match inner.downcast_ref::<rustls::Error>() {
        Some(rustls::Error::AlertReceived(alert)) => REJECTIONS.contains(alert),
        Some(_) => false,
        None => is_rejection_to_openssl(inner),
    }
}

#[cfg(feature = "tls-psk")]
fn is_rejection_to_openssl(fault: &(dyn Error + Send + Sync + 'static)) -> bool {
    let stack = fault
        .downcast_ref::<openssl::ssl::Error>()
        .and_then(openssl::ssl::Error::ssl_error);
    let codes = stack.into_iter().flat_map(|stack| stack.errors());
    // OpenSSL counts the alerts that it received from 1000 on.
    codes
        .filter_map(|error| u8::try_from(error.reason_code().checked_sub(1000)?).ok())
        .any(|alert| REJECTIONS.contains(&Alert::from(alert)))
}

#[cfg(not(feature = "tls-psk"))]
fn is_rejection_to_openssl(_: &(dyn Error + Send + Sync + 'static)) -> bool {
    false
}

const REJECTIONS: &[Alert] = &[
    Alert::NoCertificate,
    Alert::BadCertificate,
    Alert::UnsupportedCertificate,
    Alert::CertificateRevoked,
    Alert::CertificateExpired,
    Alert::CertificateUnknown,
    Alert::UnknownCA,
    Alert::AccessDenied,
    Alert::DecryptError,
    Alert::UnknownPSKIdentity,
    Alert::CertificateRequired,
];
