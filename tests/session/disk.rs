//! A disk in memory with data, holes, faults and contexts, to serve in tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use nbdbackup::nbd::server::{ExportSource, NbdError, SourceRead};
use nbdbackup::nbd::session::{BlockSize, Extent};
use nbdbackup::range::ByteRange;
use tokio::sync::Semaphore;

pub(crate) const BLOCK: u64 = 4096;

/// A disk whose blocks of 4 KiB are data, holes or broken.
pub(crate) struct Disk {
    pub bytes: Bytes,
    pub block_size: BlockSize,
    pub contexts: Vec<String>,
    /// Reads that touch this range fail.
    pub broken: Option<ByteRange>,
    /// Reads that touch this range panic.
    pub panics: Option<ByteRange>,
    /// Each read takes a permit, so a test can hold them up.
    pub gate: Option<Arc<Semaphore>>,
    pub reads: AtomicUsize,
    pub most_at_once: AtomicUsize,
    running: AtomicUsize,
}

impl Disk {
    /// Makes a disk on which each third block is a hole and the others hold bytes that tell their place.
    pub(crate) fn new(size: u64) -> Self {
        let mut bytes = Vec::new();
        for at in 0..size {
            let block = at / BLOCK;
            bytes.push(match block % 3 {
                2 => 0,
                _ => (at % 251) as u8 ^ (block % 255) as u8 | 1,
            });
        }
        Self {
            bytes: bytes.into(),
            block_size: BlockSize::DEFAULT,
            contexts: vec!["base:allocation".into(), "qemu:dirty-bitmap:b".into()],
            broken: None,
            panics: None,
            gate: None,
            reads: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
        }
    }

    pub(crate) fn slice(&self, range: ByteRange) -> &[u8] {
        &self.bytes[range.start() as usize..range.end() as usize]
    }

    fn blocks(range: ByteRange) -> impl Iterator<Item = (ByteRange, bool)> {
        range
            .split(BLOCK)
            .map(|part| (part, part.start() / BLOCK % 3 == 2))
    }
}

impl ExportSource for Disk {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn description(&self) -> Option<String> {
        Some("a disk in memory".into())
    }

    fn block_size(&self) -> BlockSize {
        self.block_size
    }

    fn contexts(&self) -> Vec<String> {
        self.contexts.clone()
    }

    fn read(&self, range: ByteRange, buf: Vec<u8>) -> BoxFuture<'_, Result<SourceRead, NbdError>> {
        Box::pin(async move {
            self.reads.fetch_add(1, Ordering::SeqCst);
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_at_once.fetch_max(running, Ordering::SeqCst);
            if let Some(gate) = &self.gate {
                gate.acquire().await.unwrap().forget();
            }
            self.running.fetch_sub(1, Ordering::SeqCst);
            let touches =
                |fault: Option<ByteRange>| fault.is_some_and(|f| f.intersect(range).is_some());
            assert!(!touches(self.panics), "as the test wants");
            if touches(self.broken) {
                return Err(NbdError::io("sector not found"));
            }
            let mut found = SourceRead::new(buf);
            for (at, (part, hole)) in Self::blocks(range).enumerate() {
                let bytes = part.start() as usize..part.end() as usize;
                match (hole, at % 2) {
                    (true, _) => found.push_hole(part.len()),
                    (false, 0) => found.push_copy(&self.bytes[bytes]),
                    (false, _) => found.push_shared(self.bytes.slice(bytes)),
                }
            }
            Ok(found)
        })
    }

    fn extents(
        &self,
        context: usize,
        range: ByteRange,
        most: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdError>> {
        Box::pin(async move {
            let flags = |hole: bool| match (context, hole) {
                (0, true) => 3,
                (0, false) => 0,
                (_, hole) => u64::from(!hole),
            };
            let extents = Self::blocks(range).map(|(range, hole)| Extent {
                range,
                flags: flags(hole),
            });
            Ok(extents.take(most).collect())
        })
    }
}
