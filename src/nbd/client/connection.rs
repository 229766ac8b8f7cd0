//! One connection in the transmission phase: its requests, its two tasks, its end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::super::session::Extent;
use super::super::session::client::{Asked, ExportDetails, InFlight, Replies};
use super::super::tls::TlsClient;
use super::super::transport::Stream;
use super::super::uri::NbdUri;
use super::super::wire::{Command, CommandFlags, Dialect, MetaContext, Request, StatusFilter};
use super::handshake::Wire;
use super::reader::{Answer, Filled, Owner, Reader};
use super::writer::{self, Batch};
use super::{ClientError, ClientErrorKind, ClientOptions, Permits, Phase};
use crate::range::ByteRange;

/// A connection whose handshake is done, and what was agreed on.
pub(super) struct Opened {
    pub(super) connection: Connection,
    pub(super) details: ExportDetails,
    pub(super) dialect: Dialect,
    pub(super) contexts: Vec<MetaContext>,
}

/// One connection in the transmission phase.
pub(super) struct Connection {
    shared: Arc<Shared>,
    reader: Mutex<Option<JoinHandle<()>>>,
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
    pub(super) outgoing: Batch,
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
                outgoing: Batch::default(),
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
                reader: Mutex::new(Some(reader)),
            },
            details: agreed.details,
            dialect: agreed.dialect,
            contexts: agreed.contexts,
        })
    }

    /// Reads a range that the server takes in one request to the place `base` of the buffer.
    pub(super) async fn read(
        &self,
        range: ByteRange,
        in_one: bool,
        buf: Vec<u8>,
        base: usize,
        permits: Permits,
    ) -> Result<Filled, ClientError> {
        let (send, reply) = oneshot::channel();
        let answer = Answer::Read { buf, base, send };
        let flags = match in_one {
            true => CommandFlags::DF,
            false => CommandFlags::NONE,
        };
        let asked = Asked::Read(range);
        self.start(asked, flags, None, Owner::new(answer, permits))?;
        reply.await.unwrap_or_else(|_| Err(self.fault()))
    }

    /// Asks for the extents of a range: one list for each granted context, or the list of only one.
    pub(super) async fn block_status(
        &self,
        range: ByteRange,
        only: Option<(usize, u32)>,
        flags: CommandFlags,
        permits: Permits,
    ) -> Result<Vec<Vec<Extent>>, ClientError> {
        let (send, reply) = oneshot::channel();
        let owner = Owner::new(Answer::Status { send }, permits);
        let filter = only.map(|(_, id)| {
            let mut payload = Vec::with_capacity(StatusFilter::len(1));
            StatusFilter {
                length: range.len(),
                contexts: vec![id],
            }
            .encode(&mut payload);
            Bytes::from(payload)
        });
        let asked = Asked::Status {
            range,
            only: only.map(|(at, _)| at),
        };
        self.start(asked, flags, filter, owner)?;
        reply.await.unwrap_or_else(|_| Err(self.fault()))
    }

    /// Has something done to a range; the bytes of a write are its payload.
    pub(super) async fn effect(
        &self,
        command: Command,
        range: ByteRange,
        flags: CommandFlags,
        payload: Option<Bytes>,
        permits: Permits,
    ) -> Result<(), ClientError> {
        let (send, reply) = oneshot::channel();
        let owner = Owner::new(Answer::Effect { send }, permits);
        self.start(Asked::Effect { command, range }, flags, payload, owner)?;
        reply.await.unwrap_or_else(|_| Err(self.fault()))
    }

    /// The number of requests in flight.
    pub(super) fn load(&self) -> usize {
        self.shared.load.load(Ordering::Relaxed)
    }

    /// Whether requests may be made.
    pub(super) fn is_alive(&self) -> bool {
        let state = self.shared.lock();
        state.fault.is_none() && state.closing.is_none()
    }

    /// Why the connection is over.
    pub(super) fn fault(&self) -> ClientError {
        let fault = self.shared.lock().fault.clone();
        fault.unwrap_or_else(|| ClientErrorKind::Closed.at(&self.shared.peer, Phase::Transmission))
    }

    /// Waits for what is in flight, says goodbye and closes.
    pub(super) async fn close(&self) -> Result<(), ClientError> {
        self.shared.say_goodbye();
        let reader = {
            let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
            reader.take()
        };
        if let Some(reader) = reader {
            // A panic of the reader has been reported where it happened.
            let _ = reader.await;
        }
        match self.shared.lock().fault.clone() {
            None => Ok(()),
            Some(fault) => match fault.kind {
                ClientErrorKind::Left => Ok(()),
                _ => Err(fault),
            },
        }
    }

    fn start(
        &self,
        asked: Asked,
        mut flags: CommandFlags,
        payload: Option<Bytes>,
        owner: Owner,
    ) -> Result<(), ClientError> {
        let mut state = self.shared.lock();
        if let Some(fault) = &state.fault {
            return Err(fault.clone());
        }
        if state.in_flight.is_empty() {
            state.busy_since = Instant::now();
        }
        let cookie = state.in_flight.start(asked, owner);
        let range = asked.range();
        let mut length = range.len();
        if let Some(payload) = &payload
            && self.shared.dialect == Dialect::Extended
        {
            flags = flags | CommandFlags::PAYLOAD_LEN;
            length = payload.len() as u64;
        }
        let request = Request {
            flags,
            command: asked.command(),
            cookie,
            offset: range.start(),
            length,
        };
        if let Err(fault) = request.encode(self.shared.dialect, &mut state.outgoing.heads) {
            state.in_flight.forget(cookie);
            return Err(ClientErrorKind::Encode(fault).at(&self.shared.peer, Phase::Transmission));
        }
        if let Some(payload) = payload {
            state.outgoing.push_payload(payload);
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

    pub(super) fn say_goodbye(&self) {
        self.lock().closing.get_or_insert_with(Instant::now);
        self.wake.notify_one();
        self.leaving.notify_one();
    }
}
