//! The task that sends a connection's requests, many headers in one write.

use std::sync::Arc;

use tokio::io::AsyncWriteExt;

use super::super::transport::WriteHalf;
use super::super::wire::{Command, CommandFlags, Request};
use super::ClientErrorKind;
use super::connection::Shared;

/// Sends until the connection fails, or until the goodbye is sent.
pub(super) async fn run(mut write: WriteHalf, shared: Arc<Shared>) {
    let mut batch = Vec::new();
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
            send(&mut write, &batch).await
        };
        match sent {
            Ok(()) if goodbye => return,
            Ok(()) => batch.clear(),
            Err(fault) => return shared.fail(ClientErrorKind::io("sending requests", fault)),
        }
    }
}

async fn send(write: &mut WriteHalf, bytes: &[u8]) -> std::io::Result<()> {
    write.write_all(bytes).await?;
    write.flush().await
}

async fn send_goodbye(write: &mut WriteHalf, shared: &Shared) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let request = Request {
        flags: CommandFlags::NONE,
        command: Command::DISC,
        cookie: u64::MAX,
        offset: 0,
        length: 0,
    };
    request
        .encode(shared.dialect, &mut bytes)
        .map_err(std::io::Error::other)?;
    // A server that hung up first has nothing to be told.
    let _ = send(write, &bytes).await;
    let _ = write.shutdown().await;
    Ok(())
}
