//! An async NBD client: many requests in flight, over several connections where the server allows it.

mod connection;
mod error;
mod handshake;
mod list;
mod reader;
mod reply;
mod writer;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::session::{BlockSize, limits};
use super::tls::TlsClient;
use super::transport::Stream;
use super::uri::NbdUri;
use super::wire::{Dialect, TransmissionFlags};
use crate::range::ByteRange;
use connection::{Connection, Opened};

pub use error::{ClientError, ClientErrorKind, Phase};
pub use list::{ListedExport, list};
pub use reply::{ContextExtents, ReadReply};

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// The most connections; more than one is used only if the server says that they see one coherent disk.
    pub connections: usize,
    /// The metadata contexts to ask for, by their exact names.
    pub contexts: Vec<String>,
    /// How long connecting and the handshake may take together.
    pub connect_timeout: Duration,
    /// How long a server may stay silent while requests wait.
    pub reply_timeout: Duration,
    /// The most requests in flight on one connection; QEMU works on 16 at a time.
    pub requests_per_connection: usize,
    /// The most bytes asked for and not yet received on one connection.
    pub bytes_per_connection: usize,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            contexts: Vec::new(),
            connect_timeout: Duration::from_secs(30),
            reply_timeout: Duration::from_secs(120),
            requests_per_connection: 16,
            bytes_per_connection: 16 << 20,
        }
    }
}

/// What is known of the export that a client is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The name, as the server tells it, or as it was asked for.
    pub name: String,
    /// The size in bytes.
    pub size_bytes: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// The block sizes.
    pub block_size: BlockSize,
    /// The server's text for people.
    pub description: Option<String>,
    /// The metadata contexts that were granted, in the order in which they were asked for.
    pub contexts: Vec<String>,
    /// Whether the server speaks structured replies, without which there are no contexts.
    pub structured: bool,
    /// The number of connections.
    pub connections: usize,
}

impl Export {
    /// Whether another connection sees this disk; what is only for people may differ.
    fn is_same_disk(&self, other: &Self) -> bool {
        self.size_bytes == other.size_bytes
            && self.flags == other.flags
            && self.block_size == other.block_size
            && self.contexts == other.contexts
            && self.structured == other.structured
    }

    /// Returns a granted context's place in the answers of [`Client::block_status`].
    pub fn context(&self, name: &str) -> Option<usize> {
        self.contexts.iter().position(|context| context == name)
    }
}

/// A client in the transmission phase; its requests may be made from many tasks at once.
///
/// Dropping the future of a request leaves the connection sound: the reply is read and thrown away. Dropping the client
/// drains what is in flight and says goodbye in the background; [`Client::close`] waits for that.
pub struct Client {
    export: Export,
    peer: Arc<str>,
    connections: Vec<Connection>,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    most_bytes: usize,
    longest_read: u64,
}

impl Client {
    /// Connects to a server and enters the transmission phase.
    pub async fn connect(uri: &NbdUri, options: &ClientOptions) -> Result<Self, ClientError> {
        let peer: Arc<str> = uri.to_string().into();
        let tls = load_tls(uri, &peer).await?;
        let tls = tls.as_ref();
        let first = Connection::dial(uri, tls, &peer, options, options.connect_timeout).await?;
        let coherent = first.details.flags.has(TransmissionFlags::CAN_MULTI_CONN);
        let mut opened = vec![first];
        if coherent && options.connections > 1 {
            // A server may have no room for more: that costs speed, and no more time than this.
            let wait = options.connect_timeout.min(MORE_CONNECTIONS_TIMEOUT);
            let more =
                (1..options.connections).map(|_| Connection::dial(uri, tls, &peer, options, wait));
            for more in futures::future::join_all(more).await {
                match more {
                    Ok(more) => opened.push(more),
                    Err(fault) => tracing::debug!(%fault, "no further connection"),
                }
            }
        }
        Self::assemble(&uri.export, peer, opened, options)
    }

    /// Enters the transmission phase on a stream that is connected already.
    pub async fn over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        export: &str,
        options: &ClientOptions,
    ) -> Result<Self, ClientError> {
        let peer: Arc<str> = format!("export {export:?}").into();
        let stream = Stream::other(stream);
        let wait = options.connect_timeout;
        let first = Connection::open(stream, None, export, &peer, options, wait).await?;
        Self::assemble(export, peer, vec![first], options)
    }

    /// Returns what is known of the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Reads a range into `buf`, whose content is dropped and whose capacity is used.
    ///
    /// The bytes go from the socket straight into the buffer. A range that ends within a block is read with the rest of
    /// the block.
    pub async fn read(&self, range: ByteRange, mut buf: Vec<u8>) -> Result<ReadReply, ClientError> {
        self.check(range)?;
        buf.clear();
        let min = u64::from(self.export.block_size.min());
        let whole = range.round_out(min, self.export.size_bytes);
        let length = self.length(whole)?;
        if buf.capacity() < length {
            buf.reserve_exact(length);
        }
        let mut holes = Vec::new();
        let mut at = whole.start();
        while at < whole.end() {
            let end = whole.end().min(at + self.longest_read);
            let piece = ByteRange::new(at, end).unwrap_or(whole);
            let base = self.length(ByteRange::new(whole.start(), at).unwrap_or(whole))?;
            let permits = self.permits(piece.len()).await;
            let part = self.pick()?.read(piece, buf, base, permits).await?;
            buf = part.0;
            holes.extend(part.1);
            at = end;
        }
        Ok(ReadReply::new(range, whole, length, buf, holes))
    }

    /// Asks for the extents of a range, one list for each granted context in the order of [`Export::contexts`].
    ///
    /// Each list starts at the range's start and ascends without a gap; it may end before the range does, each list at
    /// another place, but is never empty. Without a granted context there is nothing to ask for, which is an error.
    pub async fn block_status(&self, range: ByteRange) -> Result<Vec<ContextExtents>, ClientError> {
        self.check(range)?;
        if self.export.contexts.is_empty() || range.is_empty() {
            return Err(self.misuse("block status needs a granted context and a range"));
        }
        let min = u64::from(self.export.block_size.min());
        let whole = range.round_out(min, self.export.size_bytes);
        let end = whole
            .end()
            .min(whole.start().saturating_add(limits::MAX_STATUS_RANGE));
        let asked = ByteRange::new(whole.start(), end).unwrap_or(whole);
        let permits = self.permits(0).await;
        let lists = self.pick()?.block_status(asked, permits).await?;
        let clipped = lists.into_iter().enumerate();
        Ok(clipped
            .map(|(context, extents)| ContextExtents::new(context, extents, range))
            .collect())
    }

    /// Waits for what is in flight, says goodbye and closes; an error if a connection had failed before.
    pub async fn close(mut self) -> Result<(), ClientError> {
        let connections = std::mem::take(&mut self.connections);
        let ends = futures::future::join_all(connections.into_iter().map(Connection::close)).await;
        ends.into_iter().collect()
    }

    fn assemble(
        asked: &str,
        peer: Arc<str>,
        opened: Vec<Opened>,
        options: &ClientOptions,
    ) -> Result<Self, ClientError> {
        let mut connections = Vec::new();
        let mut export: Option<Export> = None;
        for one in opened {
            let found = Export {
                name: one.details.name.unwrap_or_else(|| asked.to_owned()),
                size_bytes: one.details.size,
                flags: one.details.flags,
                block_size: one.details.block_size,
                description: one.details.description,
                contexts: one.contexts,
                structured: one.dialect != Dialect::Simple,
                connections: 0,
            };
            match &export {
                Some(first) if !first.is_same_disk(&found) => {
                    return Err(ClientErrorKind::Changed.at(&peer, Phase::Handshake));
                }
                Some(_) => {}
                None => export = Some(found),
            }
            connections.push(one.connection);
        }
        let Some(mut export) = export else {
            return Err(ClientErrorKind::Closed.at(&peer, Phase::Handshake));
        };
        export.connections = connections.len();
        let most_bytes = options
            .bytes_per_connection
            .saturating_mul(connections.len())
            .clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        let requests = options
            .requests_per_connection
            .saturating_mul(connections.len())
            .clamp(1, Semaphore::MAX_PERMITS);
        let longest = export.block_size.max().min(limits::DEFAULT_MAX_BLOCK);
        let min = export.block_size.min();
        Ok(Self {
            longest_read: u64::from(longest - longest % min),
            export,
            peer,
            connections,
            requests: Arc::new(Semaphore::new(requests)),
            bytes: Arc::new(Semaphore::new(most_bytes)),
            most_bytes,
        })
    }

    /// Waits until a request of this many bytes may start.
    async fn permits(&self, bytes: u64) -> Permits {
        // More than all there are would never come.
        let wanted = usize::try_from(bytes).map_or(self.most_bytes, |b| b.min(self.most_bytes));
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(wanted).await;
        let request = Arc::clone(&self.requests).acquire_owned().await;
        // Neither semaphore is ever closed.
        Permits {
            _bytes: bytes.ok(),
            _request: request.ok(),
        }
    }

    /// Picks the live connection with the fewest requests.
    fn pick(&self) -> Result<&Connection, ClientError> {
        let live = self.connections.iter().filter(|c| c.is_alive());
        match live.min_by_key(|c| c.load()) {
            Some(connection) => Ok(connection),
            None => Err(match self.connections.first() {
                Some(dead) => dead.fault(),
                None => ClientErrorKind::Closed.at(&self.peer, Phase::Transmission),
            }),
        }
    }

    fn check(&self, range: ByteRange) -> Result<(), ClientError> {
        let size_bytes = self.export.size_bytes;
        match range.end() <= size_bytes {
            true => Ok(()),
            false => {
                Err(ClientErrorKind::PastEnd { range, size_bytes }
                    .at(&self.peer, Phase::Transmission))
            }
        }
    }

    fn length(&self, range: ByteRange) -> Result<usize, ClientError> {
        usize::try_from(range.len()).map_err(|_| self.misuse("the range does not fit into memory"))
    }

    fn misuse(&self, what: &'static str) -> ClientError {
        ClientErrorKind::Misuse(what).at(&self.peer, Phase::Transmission)
    }
}

/// What a request holds until its reply has come: even if nobody waits for it any more.
struct Permits {
    _bytes: Option<OwnedSemaphorePermit>,
    _request: Option<OwnedSemaphorePermit>,
}

/// Reads what a URI's TLS needs, once for all connections; nothing for a URI without.
async fn load_tls(uri: &NbdUri, peer: &Arc<str>) -> Result<Option<TlsClient>, ClientError> {
    let Some(parameters) = uri.tls.clone() else {
        return Ok(None);
    };
    let endpoint = uri.endpoint.clone();
    let load = move || TlsClient::load(&parameters, &endpoint);
    let kind = match tokio::task::spawn_blocking(load).await {
        Ok(Ok(tls)) => return Ok(Some(tls)),
        Ok(Err(fault)) => ClientErrorKind::Tls(fault),
        // It panicked, or the runtime ends.
        Err(_) => ClientErrorKind::Misuse("reading the TLS settings did not end"),
    };
    Err(kind.at(peer, Phase::Connect))
}

const MORE_CONNECTIONS_TIMEOUT: Duration = Duration::from_secs(3);
