//! The task that receives a connection's replies, data straight into the callers' buffers.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BufMut;
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use super::super::session::Extent;
use super::super::session::client::{Event, Finished, Outcome, Replies, RequestFailed};
use super::super::transport::ReadHalf;
use super::super::wire::ErrorCode;
use super::connection::Shared;
use super::{ClientError, ClientErrorKind, Permits, Phase};
use crate::range::ByteRange;

/// Who waits for a reply; it lives until the reply has come, even if nobody waits any more.
pub(super) struct Owner {
    answer: Answer,
    _permits: Permits,
}

/// Where a reply goes.
pub(super) enum Answer {
    /// The bytes of a read: to the buffer's place `base` and behind it.
    Read {
        buf: Vec<u8>,
        base: usize,
        send: oneshot::Sender<Result<Filled, ClientError>>,
    },
    /// The extents of each context.
    Status {
        send: oneshot::Sender<Result<Vec<Vec<Extent>>, ClientError>>,
    },
    /// That it is done.
    Effect {
        send: oneshot::Sender<Result<(), ClientError>>,
    },
}

/// A buffer with the bytes of a read, and the holes among them, which may lack at its end.
pub(super) type Filled = (Vec<u8>, Vec<ByteRange>);

impl Owner {
    pub(super) fn new(answer: Answer, permits: Permits) -> Self {
        Self {
            answer,
            _permits: permits,
        }
    }

    /// Tells whoever waits that it was in vain.
    pub(super) fn fail(self, fault: ClientError) {
        // Whoever gave up waiting needs no telling.
        match self.answer {
            Answer::Read { send, .. } => drop(send.send(Err(fault))),
            Answer::Status { send } => drop(send.send(Err(fault))),
            Answer::Effect { send } => drop(send.send(Err(fault))),
        }
    }

    fn finish(self, outcome: Outcome, peer: &Arc<str>) {
        match (self.answer, outcome) {
            (Answer::Read { buf, send, .. }, Outcome::Read(holes)) => {
                drop(send.send(Ok((buf, holes))));
            }
            (Answer::Status { send }, Outcome::Status(lists)) => drop(send.send(Ok(lists))),
            (Answer::Effect { send }, Outcome::Done) => drop(send.send(Ok(()))),
            (answer, outcome) => {
                let kind = match outcome {
                    Outcome::Failed(failed) => ClientErrorKind::Request(failed),
                    Outcome::Read(_) | Outcome::Status(_) | Outcome::Done => {
                        ClientErrorKind::Misuse("the reply is another request's")
                    }
                };
                Self::new(answer, self._permits).fail(kind.at(peer, Phase::Transmission));
            }
        }
    }
}

/// Receives a connection's replies.
pub(super) struct Reader {
    read: BufReader<ReadHalf>,
    shared: Arc<Shared>,
    replies: Replies,
    heard: Heard,
    reply_timeout: Duration,
}

impl Reader {
    pub(super) fn new(
        read: ReadHalf,
        shared: Arc<Shared>,
        replies: Replies,
        reply_timeout: Duration,
    ) -> Self {
        Self {
            read: BufReader::with_capacity(HEADER_BUFFER, read),
            shared,
            replies,
            heard: Heard::new(),
            reply_timeout,
        }
    }

    /// Receives until the connection is over.
    pub(super) async fn run(mut self, writer: AbortHandle) {
        let shared = Arc::clone(&self.shared);
        let fault = tokio::select! {
            fault = receive(&mut self.read, &mut self.replies, &shared, &self.heard) => match fault {
                Err(ClientErrorKind::Closed) if left(&shared) => None,
                Err(fault) => Some(fault),
            },
            fault = watch(&shared, &self.heard, self.reply_timeout) => fault,
            () = shared.over.notified() => None,
        };
        writer.abort();
        match fault {
            Some(fault) => shared.fail(fault),
            None => shared.fail(ClientErrorKind::Left),
        }
    }
}

/// When the last byte came.
struct Heard {
    start: Instant,
    nanos: AtomicU64,
}

impl Heard {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            nanos: AtomicU64::new(0),
        }
    }

    fn now(&self) {
        let nanos = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.nanos.store(nanos, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.start + Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }
}

async fn receive(
    read: &mut BufReader<ReadHalf>,
    replies: &mut Replies,
    shared: &Shared,
    heard: &Heard,
) -> Result<Infallible, ClientErrorKind> {
    let mut scratch = Vec::new();
    loop {
        scratch.clear();
        take_in(read, &mut scratch, 0, replies.wanted(), heard).await?;
        let mut event = replies.handle(&scratch, &mut shared.lock().in_flight)?;
        if scratch.capacity() > SCRATCH_KEPT {
            scratch = Vec::new();
        }
        while let Event::Data { cookie, at, length } = event {
            event = receive_data(read, replies, shared, heard, (cookie, at, length)).await?;
        }
        if let Event::Finished(Finished { owner, outcome }) = event {
            let state = shared.lock();
            shared.note_load(&state);
            let leaving = state.closing.is_some();
            drop(state);
            if leaving {
                shared.wake.notify_one();
            }
            if let Outcome::Failed(RequestFailed {
                code: ErrorCode::ESHUTDOWN,
                ..
            }) = outcome
            {
                // The server still answers what is in flight, and nothing that comes later.
                shared.say_goodbye();
            }
            owner.finish(outcome, &shared.peer);
        }
    }
}

/// Receives the bytes of one data chunk into the buffer of the request's owner.
async fn receive_data(
    read: &mut BufReader<ReadHalf>,
    replies: &mut Replies,
    shared: &Shared,
    heard: &Heard,
    (cookie, at, length): (u64, u64, u64),
) -> Result<Event<Owner>, ClientErrorKind> {
    let lent = match shared.lock().in_flight.owner(cookie) {
        Some(Owner {
            answer: Answer::Read { buf, base, .. },
            ..
        }) => Some((std::mem::take(buf), *base)),
        _ => None,
    };
    // The session hands out data only for reads in flight, and places only within them.
    let place = |base: usize| base.checked_add(usize::try_from(at).ok()?);
    let (Some((mut bytes, base)), Ok(length)) = (lent, usize::try_from(length)) else {
        return Err(ClientErrorKind::Misuse("data without a read"));
    };
    let Some(at) = place(base) else {
        return Err(ClientErrorKind::Misuse("data past the memory's end"));
    };
    take_in(read, &mut bytes, at, length, heard).await?;
    let mut state = shared.lock();
    if let Some(Owner {
        answer: Answer::Read { buf, .. },
        ..
    }) = state.in_flight.owner(cookie)
    {
        *buf = bytes;
    }
    Ok(replies.data_taken(&mut state.in_flight)?)
}

/// Reads `length` bytes to the place `at` of a buffer, which grows as they come; a gap before it becomes zeros.
async fn take_in(
    read: &mut (impl AsyncRead + Unpin),
    buf: &mut Vec<u8>,
    at: usize,
    length: usize,
    heard: &Heard,
) -> Result<(), ClientErrorKind> {
    if at > buf.len() {
        buf.resize(at, 0);
    }
    let end = at.saturating_add(length);
    let mut at = at;
    while at < end {
        let count = if let Some(within) = buf.get_mut(at..).filter(|rest| !rest.is_empty()) {
            let most = within.len().min(end - at);
            read.read(&mut within[..most]).await
        } else {
            let mut behind = buf.limit(end - at);
            read.read_buf(&mut behind).await
        };
        match count {
            Ok(0) => return Err(ClientErrorKind::Closed),
            Ok(count) => at += count,
            Err(fault) if fault.kind() == io::ErrorKind::Interrupted => {}
            Err(fault) => return Err(ClientErrorKind::io("receiving replies", fault)),
        }
        heard.now();
    }
    Ok(())
}

/// Waits until the server has been silent for too long; `None` if only its goodbye is missing.
async fn watch(shared: &Shared, heard: &Heard, reply_timeout: Duration) -> Option<ClientErrorKind> {
    loop {
        let now = Instant::now();
        let (deadline, fault) = {
            let state = shared.lock();
            if !state.in_flight.is_empty() {
                let fault = ClientErrorKind::TimedOut {
                    during: "waiting for a reply",
                    after: reply_timeout,
                };
                (
                    heard.last().max(state.busy_since) + reply_timeout,
                    Some(fault),
                )
            } else if let Some(closing) = state.closing {
                (heard.last().max(closing) + GOODBYE_TIMEOUT, None)
            } else {
                (now + reply_timeout, None)
            }
        };
        if now >= deadline {
            return fault;
        }
        tokio::select! {
            () = sleep_until(deadline) => {}
            () = shared.leaving.notified() => {}
        }
    }
}

/// Whether all is done and the goodbye was asked for.
fn left(shared: &Shared) -> bool {
    let state = shared.lock();
    state.closing.is_some() && state.in_flight.is_empty()
}

/// Small, since only headers should go through it: data goes past it.
const HEADER_BUFFER: usize = 8 << 10;
/// A longer buffer for one long reply is given back.
const SCRATCH_KEPT: usize = 64 << 10;
/// How long a server may take to hang up after the goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);
