//! Why a client's work failed.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::super::session::client::RequestFailed;
use super::super::session::{PeerIncompatible, PeerMisbehaved, Refused, SessionError};
use super::super::tls::TlsError;
use super::super::wire::{DecodeError, EncodeError};
use crate::range::ByteRange;

/// A fault on the way to an export or while it was read.
#[derive(Clone, Debug)]
pub struct ClientError {
    /// The export and its server, as an NBD URI where there is one.
    pub peer: Arc<str>,
    /// When it happened.
    pub phase: Phase,
    /// What happened.
    pub kind: ClientErrorKind,
}

/// The part of a client's life in which a fault happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The server was being reached.
    Connect,
    /// The export and the ways to read it were being agreed on.
    Handshake,
    /// The export was being read.
    Transmission,
}

/// What went wrong.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientErrorKind {
    /// The server's bytes do not parse.
    #[error(transparent)]
    Decode(DecodeError),
    /// The server broke the protocol.
    #[error(transparent)]
    Misbehaved(PeerMisbehaved),
    /// The server keeps to the protocol and is of no use.
    #[error(transparent)]
    Incompatible(PeerIncompatible),
    /// A value of ours does not fit the protocol.
    #[error(transparent)]
    Encode(EncodeError),
    /// The server refused the export, in its own words.
    #[error(transparent)]
    Refused(Refused),
    /// The server could not do a request; the connection lives on.
    #[error(transparent)]
    Request(RequestFailed),
    /// The system could not send or receive.
    #[error("{during} failed")]
    Io {
        /// What was tried.
        during: &'static str,
        /// Why it failed.
        #[source]
        source: Arc<io::Error>,
    },
    /// The server stayed silent.
    #[error("no answer for {} seconds while {during}", after.as_secs_f64())]
    TimedOut {
        /// What was waited for.
        during: &'static str,
        /// How long.
        after: Duration,
    },
    /// The server hung up.
    #[error("server closed the connection")]
    Closed,
    /// The goodbye was said: nothing failed.
    #[error("the client has left")]
    Left,
    /// The connections of one client see different exports.
    #[error("export changed between two connections")]
    Changed,
    /// A range that the export does not have.
    #[error("range {range} passes the end of the export of {size_bytes} bytes")]
    PastEnd {
        /// The range.
        range: ByteRange,
        /// The export's size.
        size_bytes: u64,
    },
    /// A range at which the server hung up again and again.
    #[error("server closes the connection whenever {range} is read")]
    LostAt {
        /// The range.
        range: ByteRange,
    },
    /// A change of an export that refuses all.
    #[error("export is read-only")]
    ReadOnly,
    /// A change that the export does not know.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A request that makes no sense.
    #[error("{0}")]
    Misuse(&'static str),
    /// TLS cannot be set up, or failed.
    #[error(transparent)]
    Tls(TlsError),
}

impl ClientErrorKind {
    pub(super) fn at(self, peer: &Arc<str>, phase: Phase) -> ClientError {
        ClientError {
            peer: Arc::clone(peer),
            phase,
            kind: self,
        }
    }

    pub(super) fn io(during: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io {
                during,
                source: Arc::new(source),
            },
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.peer, self.kind)
    }
}

impl Error for ClientError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.kind.source()
    }
}

impl From<TlsError> for ClientErrorKind {
    fn from(fault: TlsError) -> Self {
        Self::Tls(fault)
    }
}

impl From<SessionError> for ClientErrorKind {
    fn from(fault: SessionError) -> Self {
        match fault {
            SessionError::Decode(fault) => Self::Decode(fault),
            SessionError::Misbehaved(fault) => Self::Misbehaved(fault),
            SessionError::Incompatible(fault) => Self::Incompatible(fault),
            SessionError::Encode(fault) => Self::Encode(fault),
        }
    }
}
