//! The task that sends a connection's requests, many in one write.

use std::io::{self, IoSlice};
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;

use super::super::transport::{WriteHalf, write_slices};
use super::super::wire::{Command, CommandFlags, Request};
use super::ClientErrorKind;
use super::connection::Shared;

/// Requests that wait to be sent: their headers behind each other, and the payloads that stand between.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) heads: Vec<u8>,
    /// Each payload with the place in `heads` before which it has to be sent.
    payloads: Vec<(usize, Bytes)>,
}

impl Batch {
    /// Adds a payload behind the last header.
    pub(super) fn push_payload(&mut self, bytes: Bytes) {
        self.payloads.push((self.heads.len(), bytes));
    }

    pub(super) fn clear(&mut self) {
        self.heads.clear();
        self.payloads.clear();
    }

    fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    async fn send(&self, write: &mut WriteHalf) -> io::Result<()> {
        if self.payloads.is_empty() {
            write.write_all(&self.heads).await?;
        } else {
            let mut slices = Vec::with_capacity(2 * self.payloads.len() + 1);
            let mut sent = 0;
            for (at, bytes) in &self.payloads {
                slices.push(IoSlice::new(&self.heads[sent..*at]));
                slices.push(IoSlice::new(bytes));
                sent = *at;
            }
            slices.push(IoSlice::new(&self.heads[sent..]));
            write_slices(write, &mut slices).await?;
        }
        write.flush().await
    }
}

/// Sends until the connection fails, or until the goodbye is sent.
pub(super) async fn run(mut write: WriteHalf, shared: Arc<Shared>) {
    let mut batch = Batch::default();
    loop {
        let goodbye = {
            let mut state = shared.lock();
            if state.fault.is_some() {
                return;
            }
            std::mem::swap(&mut batch, &mut state.outgoing);
            batch.is_empty() && state.closing.is_some() && state.in_flight.is_empty()
        };
        let sent = if goodbye {
            send_goodbye(&mut write, &shared).await
        } else if batch.is_empty() {
            shared.wake.notified().await;
            continue;
        } else {
            batch.send(&mut write).await
        };
        match sent {
            Ok(()) if goodbye => return,
            Ok(()) => batch.clear(),
            Err(fault) => return shared.fail(ClientErrorKind::io("sending requests", fault)),
        }
    }
}

async fn send_goodbye(write: &mut WriteHalf, shared: &Shared) -> io::Result<()> {
    let mut batch = Batch::default();
    let request = Request {
        flags: CommandFlags::NONE,
        command: Command::DISC,
        cookie: u64::MAX,
        offset: 0,
        length: 0,
    };
    request
        .encode(shared.dialect, &mut batch.heads)
        .map_err(io::Error::other)?;
    // A server that hung up first has nothing to be told.
    let _ = batch.send(write).await;
    let _ = write.shutdown().await;
    Ok(())
}
