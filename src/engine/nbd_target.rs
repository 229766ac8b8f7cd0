//! An NBD export as the target of a restore: writes go out side by side, and count only once they are flushed.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::walk::ZERO;
use super::{Cause, EngineError};
use crate::nbd::client::{Client, ClientError, ClientOptions};
use crate::nbd::session::Zeroing;
use crate::nbd::uri::NbdUri;
use crate::nbd::wire::TransmissionFlags;
use crate::range::ByteRange;

/// An export that takes a disk's ranges in any order; its calls block, and must not be made by the runtime's threads.
pub(super) struct NbdSink {
    shared: Arc<Shared>,
    runtime: Handle,
    room: Arc<Semaphore>,
    /// Whether the export reads as zeros wherever nothing was written.
    blank: bool,
}

struct Shared {
    client: Client,
    /// The first write that failed.
    fault: Mutex<Option<ClientError>>,
}

impl NbdSink {
    /// Connects to an export and makes it ready for a disk of `size_bytes`.
    ///
    /// # Errors
    /// When the export cannot be reached, is too small or read-only, or holds data that may not be overwritten.
    pub(super) async fn open(
        uri: &NbdUri,
        size_bytes: u64,
        overwrite: bool,
    ) -> Result<Self, EngineError> {
        let target = uri.to_string();
        let failed = |doing: &str, cause: Cause| EngineError::Target {
            path: target.clone(),
            doing: doing.to_owned(),
            cause,
        };
        let options = ClientOptions {
            contexts: vec!["base:allocation".to_owned()],
            ..ClientOptions::default()
        };
        let client = Client::connect(uri, &options)
            .await
            .map_err(|e| failed("connecting", e.into()))?;
        let export = client.export();
        if export.flags.has(TransmissionFlags::READ_ONLY) {
            return Err(failed("writing the disk", "the export is read-only".into()));
        }
        if export.size_bytes < size_bytes {
            let why = format!(
                "the export has {} bytes, the disk {size_bytes}",
                export.size_bytes
            );
            return Err(failed("fitting the disk", why.into()));
        }
        let min = u64::from(export.block_size.min());
        let place = ByteRange::first(size_bytes).round_out(min, export.size_bytes);
        let mut blank = reads_as_zeros(&client, place)
            .await
            .map_err(|e| failed("asking what it holds", e.into()))?;
        if !blank {
            if !overwrite {
                return Err(EngineError::TargetExists(target));
            }
            let fast = Zeroing {
                fast: true,
                ..Zeroing::default()
            };
            blank = match client.write_zeroes(place, fast).await {
                Ok(()) => true,
                Err(fault) if fault.is_unsupported() => false,
                Err(fault) => return Err(failed("zeroing", fault.into())),
            };
        }
        Ok(Self {
            shared: Arc::new(Shared {
                client,
                fault: Mutex::new(None),
            }),
            runtime: Handle::current(),
            room: Arc::new(Semaphore::new(ROOM as usize)),
            blank,
        })
    }

    /// Takes bytes to be written; a failure is told by a later call.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), ClientError> {
        let export = self.shared.client.export();
        let min = export.block_size.min() as usize;
        let most = (export.size_bytes.saturating_sub(offset)) as usize;
        // Only the disk's end may lie within a block; the export has the rest of it.
        let length = bytes.len().next_multiple_of(min).min(most.max(bytes.len()));
        let mut data = Vec::with_capacity(length);
        data.extend_from_slice(bytes);
        data.resize(length, 0);
        let data = Bytes::from(data);
        self.start(data.len() as u64, move |shared| async move {
            shared.client.write(offset, data, false).await
        })
    }

    /// Takes a range to be made zero; a failure is told by a later call.
    pub(super) fn zero(&self, range: ByteRange) -> Result<(), ClientError> {
        if self.blank {
            return Ok(());
        }
        let export = self.shared.client.export();
        let range = range.round_out(u64::from(export.block_size.min()), export.size_bytes);
        self.start(1, move |shared| async move { shared.zero(range).await })
    }

    /// Waits for all that was taken, makes it durable and leaves.
    pub(super) fn finish(&self) -> Result<(), ClientError> {
        self.runtime.block_on(async {
            // All room is free once nothing is under way; the semaphore is never closed.
            drop(self.room.acquire_many(ROOM).await);
            self.shared.check()?;
            self.shared.client.flush().await
        })
    }

    /// Starts work for which there is room for `bytes` more.
    fn start<F>(&self, bytes: u64, work: impl FnOnce(Arc<Shared>) -> F) -> Result<(), ClientError>
    where
        F: Future<Output = Result<(), ClientError>> + Send + 'static,
    {
        let wanted = u32::try_from(bytes).map_or(ROOM, |bytes| bytes.clamp(LEAST, ROOM));
        let room: Option<OwnedSemaphorePermit> = self
            .runtime
            .block_on(Arc::clone(&self.room).acquire_many_owned(wanted))
            .ok();
        self.shared.check()?;
        let shared = Arc::clone(&self.shared);
        let work = work(Arc::clone(&self.shared));
        self.runtime.spawn(async move {
            if let Err(fault) = work.await {
                shared.fault().get_or_insert(fault);
            }
            drop(room);
        });
        Ok(())
    }
}

impl Shared {
    async fn zero(&self, range: ByteRange) -> Result<(), ClientError> {
        match self.client.write_zeroes(range, Zeroing::default()).await {
            Err(fault) if fault.is_unsupported() => {}
            done => return done,
        }
        // Zeros as bytes always work.
        static ZEROS: [u8; 1 << 18] = [0; 1 << 18];
        for piece in range.split(ZEROS.len() as u64) {
            let bytes = Bytes::from_static(&ZEROS).slice(..piece.len() as usize);
            self.client.write(piece.start(), bytes, false).await?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ClientError> {
        match &*self.fault() {
            None => Ok(()),
            Some(fault) => Err(fault.clone()),
        }
    }

    fn fault(&self) -> std::sync::MutexGuard<'_, Option<ClientError>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for NbdSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdSink")
            .field("export", self.shared.client.export())
            .field("blank", &self.blank)
            .finish_non_exhaustive()
    }
}

/// Whether all of a range reads as zeros, as far as the server says so and a short look at the rest shows.
async fn reads_as_zeros(client: &Client, range: ByteRange) -> Result<bool, ClientError> {
    let Some(allocation) = client.export().context("base:allocation") else {
        return Ok(range.is_empty());
    };
    let mut look = MOST_LOOKED_AT;
    let mut at = range.start();
    while at < range.end() {
        let rest = ByteRange::new(at, range.end()).unwrap_or(range);
        let lists = client.first_block_status(rest).await?;
        let Some(list) = lists.iter().find(|list| list.context == allocation) else {
            return Ok(false);
        };
        for extent in list.extents.iter().filter(|e| e.flags & ZERO == 0) {
            // A new raw file, for one, has its first block allocated.
            look = match look.checked_sub(extent.range.len()) {
                Some(left) => left,
                None => return Ok(false),
            };
            let reply = client.read(extent.range, Vec::new()).await?;
            if reply.data.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
        }
        match list.end() {
            Some(end) if end > at => at = end,
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// The most bytes under way.
const ROOM: u32 = 32 << 20;
/// What the smallest request takes of them, so that there is a bound on requests, too.
const LEAST: u32 = 64 << 10;
/// The most bytes that are read to see whether they are zeros.
const MOST_LOOKED_AT: u64 = 1 << 20;
