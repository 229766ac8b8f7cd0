//! The requests of one client that are being worked on, all at once and within bounds.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::super::session::server::Verdict;
use super::super::session::{Extent, limits};
use super::super::wire::{Dialect, EncodeError, ErrorCode};
use super::reply::{Answered, Reply};
use super::{ExportSource, NbdError, ServerOptions, SourceRead};
use crate::range::ByteRange;

/// The requests of one client that are being worked on.
pub(super) struct Requests {
    work: Arc<Work>,
    places: Arc<Semaphore>,
    /// The bytes of writes that may be held; their own, so that a write never waits for a reply to be taken.
    writes: Arc<Semaphore>,
    running: JoinSet<()>,
}

/// What a request brings along.
pub(super) struct Brought {
    /// The payload of a write.
    pub(super) data: Vec<u8>,
    /// What is held until the reply is sent.
    pub(super) permits: Vec<OwnedSemaphorePermit>,
}

/// What each request needs.
struct Work {
    source: Arc<dyn ExportSource>,
    bytes: Arc<Semaphore>,
    most_bytes: u32,
    replies: mpsc::Sender<Reply>,
    pool: Pool,
}

impl Requests {
    pub(super) fn new(
        source: Arc<dyn ExportSource>,
        options: &ServerOptions,
        replies: mpsc::Sender<Reply>,
        pool: Pool,
    ) -> Self {
        let most_bytes = u32::try_from(options.bytes_per_connection).unwrap_or(u32::MAX);
        let most_bytes = most_bytes.clamp(1, u32::MAX >> 3);
        Self {
            work: Arc::new(Work {
                source,
                bytes: Arc::new(Semaphore::new(most_bytes as usize)),
                most_bytes,
                replies,
                pool,
            }),
            writes: Arc::new(Semaphore::new(most_bytes as usize)),
            places: Arc::new(Semaphore::new(options.requests_per_connection.max(1))),
            running: JoinSet::new(),
        }
    }

    /// Waits for a place for one more request; `None` if no reply can be sent any more.
    pub(super) async fn place(&self) -> Option<OwnedSemaphorePermit> {
        tokio::select! {
            place = Arc::clone(&self.places).acquire_owned() => place.ok(),
            () = self.closed() => None,
        }
    }

    /// Waits for room for the payload of a write, and returns a buffer for it; the room is held with the place.
    pub(super) async fn room(&self, length: u64) -> (Vec<u8>, Option<OwnedSemaphorePermit>) {
        let most = self.work.most_bytes;
        let wanted = u32::try_from(length).map_or(most, |length| length.min(most));
        let held = Arc::clone(&self.writes).acquire_many_owned(wanted).await;
        (self.work.pool.take(), held.ok())
    }

    /// Waits until no reply can be sent any more.
    pub(super) async fn closed(&self) {
        self.work.replies.closed().await;
    }

    /// Starts on a request.
    pub(super) fn start(&mut self, to: Answered, verdict: Verdict, brought: Brought) {
        while self.running.try_join_next().is_some() {}
        let work = Arc::clone(&self.work);
        self.running.spawn(async move {
            let done = AssertUnwindSafe(work.answer(to, verdict, brought)).catch_unwind();
            if done.await.is_err() {
                // The client must not wait for ever because the source is at fault.
                let text = "the server failed at this request";
                work.send(to, Reply::error(to, ErrorCode::EIO, text)).await;
            }
        });
    }

    /// Waits until each request has its reply in the queue.
    pub(super) async fn finish(&mut self) {
        while self.running.join_next().await.is_some() {}
    }
}

impl Work {
    async fn answer(&self, to: Answered, verdict: Verdict, brought: Brought) {
        let Brought { data, permits } = brought;
        let reply = match verdict {
            Verdict::Read { range, in_one } if !range.is_empty() => {
                return self.read(to, range, in_one, permits).await;
            }
            Verdict::Read { .. } => Reply::empty_read(to),
            Verdict::Status {
                range,
                one,
                contexts,
            } => self.status(to, range, one, &contexts).await,
            Verdict::Write { range, .. }
            | Verdict::Zero { range, .. }
            | Verdict::Trim { range, .. }
                if range.is_empty() =>
            {
                Reply::success(to)
            }
            Verdict::Write { range, durable } => {
                let written = self.source.write(range.start(), data, durable).await;
                done(to, written.map(|buffer| self.pool.give(buffer)))
            }
            Verdict::Zero { range, how } => done(to, self.source.zero(range, how).await),
            Verdict::Trim { range, durable } => done(to, self.source.trim(range, durable).await),
            Verdict::Flush => done(to, self.source.flush().await),
            Verdict::Nothing | Verdict::Disconnect => Reply::success(to),
            // The connection has judged the filter before.
            Verdict::StatusOf { .. } => Reply::error(to, ErrorCode::EINVAL, "no filter"),
            Verdict::Refuse(code, text) => Reply::error(to, code, text),
        };
        self.send(to, reply.map(|reply| reply.holding(permits)))
            .await;
    }

    /// Reads a range; a long one is sent in pieces, so that no more than a piece is held.
    async fn read(
        &self,
        to: Answered,
        range: ByteRange,
        in_one: bool,
        mut brought: Vec<OwnedSemaphorePermit>,
    ) {
        let step = match (to.dialect, in_one) {
            (Dialect::Simple, _) | (_, true) => u64::MAX,
            (Dialect::Structured | Dialect::Extended, false) => PIECE,
        };
        for piece in range.split(step) {
            let done = piece.end() == range.end();
            let wanted =
                u32::try_from(piece.len()).map_or(self.most_bytes, |b| b.min(self.most_bytes));
            let held = Arc::clone(&self.bytes).acquire_many_owned(wanted).await;
            let mut permits: Vec<_> = held.into_iter().collect();
            if done {
                permits.append(&mut brought);
            }
            let reply = match self.read_piece(piece).await {
                Ok(found) => Reply::read(to, piece, found, in_one, done),
                Err(fault) => {
                    let reply = Reply::error(to, fault.code, &fault.text);
                    return self.send(to, reply).await;
                }
            };
            self.send(to, reply.map(|reply| reply.holding(permits)))
                .await;
        }
    }

    async fn read_piece(&self, piece: ByteRange) -> Result<SourceRead, NbdError> {
        let found = self.source.read(piece, self.pool.take()).await?;
        if found.len() != piece.len() || !found.is_sound() {
            return Err(NbdError::io("the disk gave another number of bytes"));
        }
        Ok(found)
    }

    async fn status(
        &self,
        to: Answered,
        range: ByteRange,
        one: bool,
        contexts: &[usize],
    ) -> Result<Reply, EncodeError> {
        let most = if one { 1 } else { limits::MAX_EXTENTS_SENT };
        let mut lists = Vec::new();
        for &context in contexts {
            let extents = match self.source.extents(context, range, most).await {
                Ok(extents) => checked(extents, range, most),
                Err(fault) => Err(fault),
            };
            match extents {
                Ok(extents) => lists.push((u32::try_from(context).unwrap_or(u32::MAX), extents)),
                Err(fault) => return Reply::error(to, fault.code, &fault.text),
            }
        }
        Reply::status(to, lists)
    }

    async fn send(&self, to: Answered, reply: Result<Reply, EncodeError>) {
        let reply = match reply {
            Ok(reply) => reply,
            Err(fault) => {
                match Reply::error(to, ErrorCode::EOVERFLOW, &fault.to_string()) {
                    Ok(reply) => reply,
                    // An error's text is cut to fit, so it always does.
                    Err(_) => return,
                }
            }
        };
        // A writer that has ended has told why.
        let _ = self.replies.send(reply).await;
    }
}

/// Reports how a change went.
fn done(to: Answered, result: Result<(), NbdError>) -> Result<Reply, EncodeError> {
    match result {
        Ok(()) => Reply::success(to),
        Err(fault) => Reply::error(to, fault.code, &fault.text),
    }
}

/// Buffers that replies have been sent from, for the next ones.
#[derive(Clone, Default)]
pub(super) struct Pool {
    buffers: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Pool {
    fn take(&self) -> Vec<u8> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.pop().unwrap_or_default()
    }

    pub(super) fn give(&self, mut buffer: Vec<u8>) {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if (1..=LARGEST_KEPT).contains(&buffer.capacity()) && buffers.len() < MOST_KEPT {
            buffer.clear();
            buffers.push(buffer);
        }
    }
}

/// Holds a source's extents to what was asked of it: nothing else may reach a client.
fn checked(
    mut extents: Vec<Extent>,
    range: ByteRange,
    most: usize,
) -> Result<Vec<Extent>, NbdError> {
    let mut at = range.start();
    let mut kept = 0;
    for extent in extents.iter_mut().take(most) {
        if extent.range.start() != at || extent.range.is_empty() {
            break;
        }
        let Some(within) = extent.range.intersect(range) else {
            break;
        };
        extent.range = within;
        at = within.end();
        kept += 1;
    }
    extents.truncate(kept);
    match kept {
        0 => Err(NbdError::io("the disk told no extent")),
        _ => Ok(extents),
    }
}

/// A longer read is sent in chunks of this size.
const PIECE: u64 = 1 << 20;
const LARGEST_KEPT: usize = 4 << 20;
const MOST_KEPT: usize = 16;
