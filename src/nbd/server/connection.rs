//! One client: its handshake, then its requests until it leaves.

use std::sync::Arc;
use std::time::Duration;

use bytes::BufMut;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::super::session::limits;
use super::super::session::server::{Agreed, Handshake, Judged, Rules, Step, Tls, Verdict};
use super::super::transport::{ReadHalf, Stream, WriteHalf};
use super::super::wire::ErrorCode;
use super::reply::{self, Answered, Reply};
use super::requests::{Brought, Pool, Requests};
use super::{ServeError, Shared};

/// Serves a client until it leaves or `stopping` becomes true.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    stream: Stream,
    mut stopping: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let wait = shared.options.handshake_timeout;
    let agreed = tokio::select! {
        agreed = timeout(wait, handshake(shared, stream)) => match agreed {
            Ok(agreed) => agreed?,
            Err(_) => return Err(ServeError::HandshakeTimedOut(wait)),
        },
        _ = stopping.wait_for(|stop| *stop) => return Ok(()),
    };
    match agreed {
        Some((agreed, stream)) => {
            let (read, write) = stream.split();
            transmit(shared, &agreed, read, write, stopping).await
        }
        None => Ok(()),
    }
}

/// Answers options; `None` if the client left.
///
/// No more is read than a state wants, so that bytes sent behind `STARTTLS` go into the TLS handshake, which fails.
async fn handshake(
    shared: &Shared,
    mut stream: Stream,
) -> Result<Option<(Agreed, Stream)>, ServeError> {
    let receiving = ServeError::io("receiving in the handshake");
    let sending = ServeError::io("sending in the handshake");
    let mut out = Vec::new();
    let tls = match shared.options.tls {
        Some(_) => Tls::Required,
        None => Tls::Off,
    };
    let mut state = Handshake::start(tls, &mut out);
    let mut bytes = Vec::new();
    loop {
        stream.write_all(&out).await.map_err(&sending)?;
        stream.flush().await.map_err(&sending)?;
        out.clear();
        bytes.resize(state.wanted(), 0);
        stream.read_exact(&mut bytes).await.map_err(&receiving)?;
        let step = state.handle(&bytes, &shared.catalog, &mut out);
        match step? {
            Step::Next(next) => state = next,
            Step::Transmit(agreed) => {
                stream.write_all(&out).await.map_err(&sending)?;
                stream.flush().await.map_err(&sending)?;
                return Ok(Some((agreed, stream)));
            }
            Step::StartTls(next) => {
                stream.write_all(&out).await.map_err(&sending)?;
                stream.flush().await.map_err(&sending)?;
                out.clear();
                let Some(tls) = &shared.options.tls else {
                    return Ok(None);
                };
                stream = tls.accept(stream).await?;
                state = next;
            }
            Step::Close => {
                // The client may be gone before it reads the answer.
                if stream.write_all(&out).await.is_ok() {
                    let _ = stream.shutdown().await;
                }
                return Ok(None);
            }
        }
    }
}

/// Takes requests until the client leaves or the server stops, then finishes what is in flight.
async fn transmit(
    shared: &Arc<Shared>,
    agreed: &Agreed,
    read: ReadHalf,
    write: WriteHalf,
    mut stopping: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let Some((source, offer)) = shared
        .sources
        .get(agreed.export)
        .zip(shared.catalog.offers().get(agreed.export))
    else {
        return Ok(());
    };
    let rules = Rules {
        dialect: agreed.dialect,
        size: offer.size,
        block_size: offer.block_size,
        flags: offer.flags(agreed.dialect),
        contexts: agreed.contexts.clone(),
    };
    let (replies, queue) = mpsc::channel(shared.options.requests_per_connection.max(1));
    let pool = Pool::default();
    let writer = tokio::spawn(write_replies(write, queue, pool.clone()));
    let mut requests = Requests::new(Arc::clone(source), &shared.options, replies, pool);
    let taken = tokio::select! {
        taken = take_requests(read, &rules, &mut requests, stopping.clone()) => taken,
        // A client within a message gets a moment to end it, so that it can be told.
        () = async {
            // The server that is gone does not wait either.
            let _ = stopping.wait_for(|stop| *stop).await;
            sleep(STOP_GRACE).await;
        } => Ok(()),
    };
    if taken.is_ok() {
        requests.finish().await;
    }
    drop(requests);
    let sent = match writer.await {
        Ok(sent) => sent.map_err(ServeError::io("sending replies")),
        // A panic of the writer has been reported where it happened.
        Err(_) => Ok(()),
    };
    taken.and(sent)
}

/// Takes requests until the client says goodbye or hangs up, or until none is on its way while the server stops.
async fn take_requests(
    read: ReadHalf,
    rules: &Rules,
    requests: &mut Requests,
    mut stopping: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let receiving = ServeError::io("receiving requests");
    let mut read = BufReader::with_capacity(REQUEST_BUFFER, read);
    let mut header = vec![0; rules.wanted()];
    let mut waste = Vec::new();
    loop {
        // A client that waits for a free place waits in its socket, and so do its bytes.
        let Some(place) = requests.place().await else {
            return Ok(());
        };
        tokio::select! {
            biased;
            // A bare hang-up between two requests is as good as a goodbye.
            buffered = read.fill_buf() => if buffered.map_err(&receiving)?.is_empty() {
                return Ok(());
            },
            () = requests.closed() => return Ok(()),
            _ = stopping.wait_for(|stop| *stop) => return Ok(()),
        }
        read.read_exact(&mut header).await.map_err(&receiving)?;
        let Judged {
            cookie,
            offset,
            mut payload,
            mut verdict,
        } = rules.judge(&header)?;
        let to = Answered {
            dialect: rules.dialect,
            cookie,
            offset,
        };
        if *stopping.borrow() && verdict != Verdict::Disconnect {
            verdict = Verdict::Refuse(ErrorCode::ESHUTDOWN, "the server is about to end");
        }
        let mut brought = Brought {
            data: Vec::new(),
            permits: vec![place],
        };
        match verdict {
            Verdict::Disconnect => return Ok(()),
            Verdict::Write { .. } => {
                let (mut data, room) = requests.room(payload).await;
                read_payload(&mut read, &mut data, payload)
                    .await
                    .map_err(&receiving)?;
                brought.data = data;
                brought.permits.extend(room);
            }
            Verdict::StatusOf { offset, one } => {
                waste.clear();
                read_payload(&mut read, &mut waste, payload)
                    .await
                    .map_err(&receiving)?;
                verdict = rules.judge_filter(offset, one, &waste);
            }
            _ => {
                while payload > 0 {
                    let step = payload.min(limits::DRAIN_STEP as u64);
                    waste.resize(step as usize, 0);
                    read.read_exact(&mut waste).await.map_err(&receiving)?;
                    payload -= step;
                }
            }
        }
        requests.start(to, verdict, brought);
    }
}

/// Reads a payload, whose length the rules bound, into an empty buffer, which grows as the bytes come.
async fn read_payload(
    read: &mut BufReader<ReadHalf>,
    buf: &mut Vec<u8>,
    length: u64,
) -> std::io::Result<()> {
    let length = length as usize;
    // Room for the whole is made at once only for what a client with honest intentions sends.
    buf.reserve_exact(length.min(PAYLOAD_AT_ONCE));
    while buf.len() < length {
        let left = length - buf.len();
        let mut rest = (&mut *buf).limit(left);
        if read.read_buf(&mut rest).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Sends replies as they are queued, many in one go.
async fn write_replies(
    mut write: WriteHalf,
    mut queue: mpsc::Receiver<Reply>,
    pool: Pool,
) -> std::io::Result<()> {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, REPLIES_AT_ONCE).await > 0 {
        reply::send(&mut write, &batch).await?;
        for sent in batch.drain(..) {
            pool.give(sent.into_buf());
        }
    }
    // A client that has hung up already needs no goodbye.
    let _ = write.shutdown().await;
    Ok(())
}

/// Holds many headers; the payloads of writes go past it.
const REQUEST_BUFFER: usize = 4 << 10;
const REPLIES_AT_ONCE: usize = 16;
const PAYLOAD_AT_ONCE: usize = 1 << 20;
/// How long a client within a message may take to end it once the server stops.
const STOP_GRACE: Duration = Duration::from_millis(500);
