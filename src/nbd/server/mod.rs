//! An async NBD server: many clients, many requests of each at once.

mod connection;
mod error;
mod memory;
mod reply;
mod requests;
mod source;
mod stall;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::session::server::{Catalog, Offer, OfferError};
use super::tls::TlsServer;
use super::transport::{Listener, Stream};

use requests::Pool;

pub use error::ServeError;
pub use memory::MemoryDisk;
pub use source::{ExportSource, NbdError, SourceRead, all_abilities};

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The most clients at a time; further ones wait unanswered.
    pub max_connections: usize,
    /// What clients have to be authenticated with before anything is told to them; `None` serves in the clear.
    pub tls: Option<TlsServer>,
    /// How long a client may take for the handshake, that of TLS included.
    pub handshake_timeout: Duration,
    /// The most requests of one client that are worked on at a time; further ones wait in its socket.
    pub requests_per_connection: usize,
    /// The most bytes of one client's reads, and of its writes, that are held at a time.
    pub bytes_per_connection: usize,
    /// The most requests of all clients that are worked on at a time.
    pub requests_in_total: usize,
    /// The most bytes of all clients' reads, and of their writes, that are held at a time.
    pub bytes_in_total: usize,
    /// How long a client may take to go on with a message that it began, or to take a part of what it is sent.
    pub stall_timeout: Duration,
    /// After how long without a client the server ends by itself; `None` lets it wait for ever.
    pub idle_exit: Option<Duration>,
    /// How long clients may take to receive what is in flight once the server is to end.
    pub shutdown_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            tls: None,
            handshake_timeout: Duration::from_secs(10),
            requests_per_connection: 16,
            bytes_per_connection: 32 << 20,
            requests_in_total: 1024,
            bytes_in_total: 256 << 20,
            stall_timeout: Duration::from_secs(60),
            idle_exit: None,
            shutdown_timeout: Duration::from_secs(10),
        }
    }
}

/// A server of exports.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    catalog: Catalog,
    /// The disks behind the catalog's exports, in its order.
    sources: Vec<Arc<dyn ExportSource>>,
    options: ServerOptions,
    total: Totals,
}

/// What all clients share.
struct Totals {
    requests: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    writes: Arc<Semaphore>,
    pool: Pool,
}

impl Totals {
    fn new(options: &ServerOptions) -> Self {
        // No request may need more than there is.
        let bytes = options
            .bytes_in_total
            .max(options.bytes_per_connection)
            .min(Semaphore::MAX_PERMITS);
        Self {
            requests: Arc::new(Semaphore::new(options.requests_in_total.max(1))),
            reads: Arc::new(Semaphore::new(bytes)),
            // Their own: who is sent nothing, since it does not read, must not keep others from writing.
            writes: Arc::new(Semaphore::new(bytes)),
            pool: Pool::default(),
        }
    }
}

impl Server {
    /// Makes a server of named exports.
    pub fn new(
        exports: Vec<(String, Arc<dyn ExportSource>)>,
        options: ServerOptions,
    ) -> Result<Self, OfferError> {
        let offers = exports.iter().map(|(name, source)| Offer {
            name: name.clone(),
            description: source.description(),
            size: source.size_bytes(),
            block_size: source.block_size(),
            contexts: source.contexts(),
            abilities: source.abilities(),
        });
        let catalog = Catalog::new(offers.collect())?;
        let sources = exports.into_iter().map(|(_, source)| source).collect();
        Ok(Self {
            shared: Arc::new(Shared {
                catalog,
                sources,
                total: Totals::new(&options),
                options,
            }),
        })
    }

    /// Serves the clients of a socket until `shutdown` is done or no client comes for long, then lets them finish what is
    /// in flight.
    ///
    /// A client's fault ends that client only.
    pub async fn serve(&self, listener: Listener, shutdown: impl Future<Output = ()>) {
        let options = &self.shared.options;
        let (stop, stopping) = watch::channel(false);
        let mut clients = JoinSet::new();
        tokio::select! {
            () = self.accept(&listener, &mut clients, &stopping) => {}
            () = shutdown => {}
        }
        drop(listener);
        // Nobody listens if there is no client.
        let _ = stop.send(true);
        let finish = async { while clients.join_next().await.is_some() {} };
        if timeout(options.shutdown_timeout, finish).await.is_err() {
            clients.shutdown().await;
        }
    }

    /// Takes clients in until none has been there for long.
    async fn accept(
        &self,
        listener: &Listener,
        clients: &mut JoinSet<()>,
        stopping: &watch::Receiver<bool>,
    ) {
        let options = &self.shared.options;
        let places = Arc::new(Semaphore::new(options.max_connections.max(1)));
        let mut left = Instant::now();
        loop {
            let client = async {
                // The place is taken first, so that a client too many waits in the socket's queue.
                let place = Arc::clone(&places).acquire_owned().await;
                (place, listener.accept().await)
            };
            let idle = async {
                match options.idle_exit {
                    Some(wait) => sleep_until(left + wait).await,
                    None => std::future::pending().await,
                }
            };
            let (place, accepted) = tokio::select! {
                client = client => client,
                Some(_) = clients.join_next() => {
                    left = Instant::now();
                    continue;
                }
                () = idle, if clients.is_empty() => {
                    tracing::info!("no client for long");
                    return;
                }
            };
            match accepted {
                Ok((stream, peer)) => {
                    let shared = Arc::clone(&self.shared);
                    let stopping = stopping.clone();
                    clients.spawn(async move {
                        let ended = connection::serve(&shared, stream, stopping).await;
                        match ended {
                            Ok(()) => tracing::debug!(%peer, "NBD client left"),
                            Err(fault) => tracing::warn!(%peer, %fault, "NBD client failed"),
                        }
                        drop(place);
                    });
                }
                Err(fault) => {
                    // Such as too many open files: others may go on, and this may pass.
                    tracing::warn!(%fault, "no NBD client could be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Serves one client on a stream that is connected already, until it leaves.
    pub async fn serve_stream(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<(), ServeError> {
        let (_stop, stopping) = watch::channel(false);
        connection::serve(&self.shared, Stream::other(stream), stopping).await
    }
}

const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
