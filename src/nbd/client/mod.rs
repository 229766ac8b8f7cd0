//! An async NBD client: many requests in flight, over several connections where the server allows it.

mod changes;
mod connection;
mod error;
mod handshake;
mod list;
mod pool;
mod reader;
mod reads;
mod reply;
mod writer;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use super::session::{BlockSize, limits};
use super::tls::TlsClient;
use super::transport::Stream;
use super::uri::NbdUri;
use super::wire::{CommandFlags, Dialect, TransmissionFlags};
use crate::range::ByteRange;
use connection::{Connection, Opened};
use pool::{Pool, Redial};

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
    /// How long to try to connect anew when the last connection is lost; zero takes each failure as final.
    ///
    /// Reads are then made again, if the server still offers the same size, flags and contexts. A client that has
    /// written gives a lost connection up in any case.
    pub retry_time: Duration,
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
            retry_time: Duration::ZERO,
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
    /// Whether the server speaks extended headers, with which a request may ask for the extents of the whole disk.
    pub extended: bool,
    /// The number of connections.
    pub connections: usize,
}

impl Export {
    /// What one connection tells of the export that was asked for by this name.
    fn of(asked: &str, opened: &Opened) -> Self {
        let details = &opened.details;
        Self {
            name: details.name.clone().unwrap_or_else(|| asked.to_owned()),
            size_bytes: details.size,
            flags: details.flags,
            block_size: details.block_size,
            description: details.description.clone(),
            contexts: opened.contexts.iter().map(|c| c.name.clone()).collect(),
            structured: opened.dialect != Dialect::Simple,
            extended: opened.dialect == Dialect::Extended,
            connections: 1,
        }
    }

    /// Whether another connection sees this disk; what is only for people may differ.
    fn is_same_disk(&self, other: &Self) -> bool {
        self.size_bytes == other.size_bytes
            && self.flags == other.flags
            && self.block_size == other.block_size
            && self.contexts == other.contexts
            && self.structured == other.structured
            && self.extended == other.extended
    }

    /// Whether one context's extents can be asked for without those of the others.
    pub fn asks_one_context(&self) -> bool {
        self.extended && self.flags.has(TransmissionFlags::BLOCK_STATUS_PAYLOAD)
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
    pool: Pool,
    /// The number of each granted context, in the order of [`Export::contexts`].
    context_ids: Vec<u32>,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    most_bytes: usize,
    /// The longest range of one read or write, in whole blocks.
    longest: u64,
    /// Whether a read that failed is made again.
    retries: bool,
    /// Held by the one read that is made again in pieces.
    care: Mutex<()>,
    /// Whether each read is to be answered in one chunk, since the server hung up at one.
    careful: AtomicBool,
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
        Self::assemble(
            &uri.export,
            peer,
            opened,
            options,
            Some((uri, tls.cloned())),
        )
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
        Self::assemble(export, peer, vec![first], options, None)
    }

    /// Returns what is known of the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// How often all connections were lost and made anew.
    pub fn reconnects(&self) -> u32 {
        self.pool.reconnects()
    }

    /// Asks for the extents of a range, one list for each granted context in the order of [`Export::contexts`].
    ///
    /// Each list starts at the range's start and ascends without a gap; it may end before the range does, each list at
    /// another place, but is never empty. Without a granted context there is nothing to ask for, which is an error.
    pub async fn block_status(&self, range: ByteRange) -> Result<Vec<ContextExtents>, ClientError> {
        self.status(range, None, CommandFlags::NONE).await
    }

    /// Asks for the first extent of a range only, in each granted context (NBD_CMD_FLAG_REQ_ONE).
    pub async fn first_block_status(
        &self,
        range: ByteRange,
    ) -> Result<Vec<ContextExtents>, ClientError> {
        let mut lists = self.status(range, None, CommandFlags::REQ_ONE).await?;
        // Where a server tells more all the same, the rest is as true, but not what was asked for.
        lists.iter_mut().for_each(|list| list.extents.truncate(1));
        Ok(lists)
    }

    /// Asks for the extents of one context where the server can tell them alone, else of all.
    pub async fn block_status_of(
        &self,
        context: usize,
        range: ByteRange,
    ) -> Result<Vec<ContextExtents>, ClientError> {
        let id = self.context_ids.get(context).copied();
        let only = id.filter(|_| self.export.asks_one_context());
        self.status(range, only.map(|id| (context, id)), CommandFlags::NONE)
            .await
    }

    /// Waits for what is in flight, says goodbye and closes; an error if a connection had failed before.
    pub async fn close(self) -> Result<(), ClientError> {
        self.pool.close().await
    }

    async fn status(
        &self,
        range: ByteRange,
        only: Option<(usize, u32)>,
        flags: CommandFlags,
    ) -> Result<Vec<ContextExtents>, ClientError> {
        self.check(range)?;
        if self.export.contexts.is_empty() || range.is_empty() {
            return Err(self.misuse("block status needs a granted context and a range"));
        }
        let most = match self.export.extended {
            true => limits::MAX_STATUS_RANGE_EXTENDED,
            false => limits::MAX_STATUS_RANGE,
        };
        let whole = self.whole_blocks(range);
        let end = whole.end().min(whole.start().saturating_add(most));
        let asked = ByteRange::new(whole.start(), end).unwrap_or(whole);
        let mut losses = 0;
        let lists = loop {
            let permits = self.permits(0).await;
            let fault = match self.pool.pick() {
                Ok(connection) => {
                    match connection.block_status(asked, only, flags, permits).await {
                        Ok(lists) => break lists,
                        Err(fault) => fault,
                    }
                }
                Err(fault) => fault,
            };
            losses += 1;
            if losses == LOSSES_PER_STATUS || !self.pool.may_retry(&fault) {
                return Err(fault);
            }
            self.pool.revive(fault).await?;
        };
        let first = only.map_or(0, |(at, _)| at);
        let clipped = lists.into_iter().enumerate();
        Ok(clipped
            .map(|(at, extents)| ContextExtents::new(first + at, extents, range))
            .collect())
    }

    fn assemble(
        asked: &str,
        peer: Arc<str>,
        opened: Vec<Opened>,
        options: &ClientOptions,
        server: Option<(&NbdUri, Option<TlsClient>)>,
    ) -> Result<Self, ClientError> {
        let mut connections = Vec::new();
        let mut known: Option<(Export, Vec<u32>)> = None;
        for one in opened {
            let found = Export::of(asked, &one);
            let ids: Vec<u32> = one.contexts.iter().map(|context| context.id).collect();
            match &known {
                // A context has the same number on each connection, or requests could not be spread over them.
                Some((first, numbers)) if !first.is_same_disk(&found) || *numbers != ids => {
                    return Err(ClientErrorKind::Changed.at(&peer, Phase::Handshake));
                }
                Some(_) => {}
                None => known = Some((found, ids)),
            }
            connections.push(one.connection);
        }
        let Some((mut export, context_ids)) = known else {
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
        let redial = server.filter(|_| !options.retry_time.is_zero());
        let redial = redial.map(|(uri, tls)| Redial {
            uri: uri.clone(),
            tls,
            options: options.clone(),
            export: export.clone(),
            context_ids: context_ids.clone(),
            gave_up: Mutex::new(None),
        });
        Ok(Self {
            longest: u64::from(longest - longest % min),
            export,
            context_ids,
            pool: Pool::new(Arc::clone(&peer), connections, redial),
            peer,
            requests: Arc::new(Semaphore::new(requests)),
            bytes: Arc::new(Semaphore::new(most_bytes)),
            most_bytes,
            retries: !options.retry_time.is_zero(),
            care: Mutex::new(()),
            careful: AtomicBool::new(false),
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

    /// Widens a range to whole blocks.
    fn whole_blocks(&self, range: ByteRange) -> ByteRange {
        let min = u64::from(self.export.block_size.min());
        range.round_out(min, self.export.size_bytes)
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
/// A request for extents during which the connection is lost this often fails.
const LOSSES_PER_STATUS: u32 = 3;
