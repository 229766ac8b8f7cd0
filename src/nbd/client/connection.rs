//! One connection in the transmission phase: its requests, its two tasks, its end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::super::session::Extent;
use super::super::session::client::{Asked, ExportDetails, InFlight, Replies};
use super::super::tls::TlsClient;
use super::super::transport::Stream;
use super::super::uri::NbdUri;
use super::super::wire::{CommandFlags, Dialect, Request};
use super::handshake::Wire;
use super::reader::{Answer, Filled, Owner, Reader};
use super::{ClientError, ClientErrorKind, ClientOptions, Permits, Phase, writer};
use crate::range::ByteRange;

/// A connection whose handshake is done, and what was agreed on.
pub(super) struct Opened {
    pub(super) connection: Connection,
    pub(super) details: ExportDetails,
    pub(super) dialect: Dialect,
    pub(super) contexts: Vec<String>,
}

/// One connection in the transmission phase.
pub(super) struct Connection {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

/// What the callers, the reader and the writer of a connection share.
pub(super) struct Shared {
    pub(super) peer: Arc<str>,
    pub(super) dialect: Dialect,
    pub(super) state: Mutex<State>,
    /// Wakes the writer: there is something to send, or nothing in flight any more.
    pub(super) wake: Notify,
    /// Wakes the reader: the connection is over.
    pub(super) over: Notify,
    /// Wakes the watch over the server's silence: the goodbye was asked for.
    pub(super) leaving: Notify,
    load: AtomicUsize,
}

/// The part that is changed under a lock, which is never held across an await.
pub(super) struct State {
    pub(super) in_flight: InFlight<Owner>,
    pub(super) outgoing: Vec<u8>,
    /// When the first of the requests in flight was sent.
    pub(super) busy_since: Instant,
    /// When the goodbye was asked for.
    pub(super) closing: Option<Instant>,
    pub(super) fault: Option<ClientError>,
}

impl Connection {
    /// Connects to a server and goes through the handshake.
    pub(super) async fn dial(
        uri: &NbdUri,
        tls: Option<&TlsClient>,
        peer: &Arc<str>,
        options: &ClientOptions,
        wait: Duration,
    ) -> Result<Opened, ClientError> {
        let start = Instant::now();
        let stream = match timeout(wait, Stream::connect(&uri.endpoint)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(fault)) => {
                return Err(ClientErrorKind::io("connecting", fault).at(peer, Phase::Connect));
            }
            Err(_) => {
                return Err(ClientErrorKind::TimedOut {
                    during: "connecting",
                    after: wait,
                }
                .at(peer, Phase::Connect));
            }
        };
        let left = wait.saturating_sub(start.elapsed());
        Self::open(stream, tls, &uri.export, peer, options, left).await
    }

    /// Goes through the handshake and starts the connection's tasks.
    pub(super) async fn open(
        stream: Stream,
        tls: Option<&TlsClient>,
        export: &str,
        peer: &Arc<str>,
        options: &ClientOptions,
        wait: Duration,
    ) -> Result<Opened, ClientError> {
        let handshake = async {
            let (mut wire, opened) = Wire::open(stream, tls).await?;
            let agreed = wire.agree(opened, export, &options.contexts).await?;
            Ok((wire, agreed))
        };
        let (wire, agreed) = match timeout(wait, handshake).await {
            Ok(agreed) => {
                agreed.map_err(|kind: ClientErrorKind| kind.at(peer, Phase::Handshake))?
            }
            Err(_) => {
                return Err(ClientErrorKind::TimedOut {
                    during: "waiting for the handshake",
                    after: wait,
                }
                .at(peer, Phase::Handshake));
            }
        };
        let (read, write) = wire.split();
        let shared = Arc::new(Shared {
            peer: Arc::clone(peer),
            dialect: agreed.dialect,
            state: Mutex::new(State {
                in_flight: InFlight::default(),
                outgoing: Vec::new(),
                busy_since: Instant::now(),
                closing: None,
                fault: None,
            }),
            wake: Notify::new(),
            over: Notify::new(),
            leaving: Notify::new(),
            load: AtomicUsize::new(0),
        });
        let writer = tokio::spawn(writer::run(write, Arc::clone(&shared)));
        let replies = Replies::new(agreed.dialect, &agreed.contexts, agreed.details.block_size);
        let reader = Reader::new(read, Arc::clone(&shared), replies, options.reply_timeout);
        let reader = tokio::spawn(reader.run(writer.abort_handle()));
        Ok(Opened {
            connection: Self {
                shared,
                reader: Some(reader),
            },
            details: agreed.details,
            dialect: agreed.dialect,
            contexts: agreed.contexts.into_iter().map(|c| c.name).collect(),
        })
    }

    /// Reads a range that the server takes in one request to the place `base` of the buffer.
    pub(super) async fn read(
        &self,
        range: ByteRange,
        buf: Vec<u8>,
        base: usize,
        permits: Permits,
    ) -> Result<Filled, ClientError> {
        let (send, reply) = oneshot::channel();
        let answer = Answer::Read { buf, base, send };
        self.start(Asked::Read(range), Owner::new(answer, permits))?;
        reply.await.unwrap_or_else(|_| Err(self.fault()))
    }

    /// Asks for the extents of a range, one list for each granted context.
    pub(super) async fn block_status(
        &self,
        range: ByteRange,
        permits: Permits,
    ) -> Result<Vec<Vec<Extent>>, ClientError> {
        let (send, reply) = oneshot::channel();
        let answer = Answer::Status { send };
        self.start(Asked::Status(range), Owner::new(answer, permits))?;
        reply.await.unwrap_or_else(|_| Err(self.fault()))
    }

    /// The number of requests in flight.
    pub(super) fn load(&self) -> usize {
        self.shared.load.load(Ordering::Relaxed)
    }

    /// Whether requests may be made.
    pub(super) fn is_alive(&self) -> bool {
        self.shared.lock().fault.is_none()
    }

    /// Why the connection is over.
    pub(super) fn fault(&self) -> ClientError {
        let fault = self.shared.lock().fault.clone();
        fault.unwrap_or_else(|| ClientErrorKind::Closed.at(&self.shared.peer, Phase::Transmission))
    }

    /// Waits for what is in flight, says goodbye and closes.
    pub(super) async fn close(mut self) -> Result<(), ClientError> {
        self.shared.say_goodbye();
        if let Some(reader) = self.reader.take() {
            // A panic of the reader has been reported where it happened.
            let _ = reader.await;
        }
        match self.shared.lock().fault.take() {
            None => Ok(()),
            Some(fault) => match fault.kind {
                ClientErrorKind::Left => Ok(()),
                _ => Err(fault),
            },
        }
    }

    fn start(&self, asked: Asked, owner: Owner) -> Result<(), ClientError> {
        let mut state = self.shared.lock();
        if let Some(fault) = &state.fault {
            return Err(fault.clone());
        }
        if state.in_flight.is_empty() {
            state.busy_since = Instant::now();
        }
        let cookie = state.in_flight.start(asked, owner);
        let range = asked.range();
        let request = Request {
            flags: CommandFlags::NONE,
            command: asked.command(),
            cookie,
            offset: range.start(),
            length: range.len(),
        };
        if let Err(fault) = request.encode(self.shared.dialect, &mut state.outgoing) {
            state.in_flight.forget(cookie);
            return Err(ClientErrorKind::Encode(fault).at(&self.shared.peer, Phase::Transmission));
        }
        self.shared.note_load(&state);
        drop(state);
        self.shared.wake.notify_one();
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.say_goodbye();
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // The state is changed in steps that cannot panic halfway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note_load(&self, state: &State) {
        self.load.store(state.in_flight.len(), Ordering::Relaxed);
    }

    /// Ends the connection: each request that waits, and each later one, gets this fault.
    pub(super) fn fail(&self, kind: ClientErrorKind) {
        let mut state = self.lock();
        let fault = kind.at(&self.peer, Phase::Transmission);
        let fault = state.fault.get_or_insert(fault).clone();
        let owners = state.in_flight.abandon();
        state.outgoing.clear();
        self.note_load(&state);
        drop(state);
        for owner in owners {
            owner.fail(fault.clone());
        }
        self.over.notify_one();
        self.wake.notify_one();
    }

    fn say_goodbye(&self) {
        self.lock().closing.get_or_insert_with(Instant::now);
        self.wake.notify_one();
        self.leaving.notify_one();
    }
}
