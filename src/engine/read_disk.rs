//! The pipeline of one disk: walk, read, hash and compress, and map, each stage bounded and the order kept.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures::{TryStreamExt, stream};
use tokio::sync::mpsc;

use super::EngineError;
use super::catalog::Catalog;
use super::event::{Event, Observer, Progress};
use super::plan::{Action, Geometry};
use super::stages::SourceMeters;
use super::walk::{Contexts, Walk, Walked};
use super::workers::{Workers, blocking};
use crate::nbd::client::Client;
use crate::range::ByteRange;
use crate::repo::{MapRoot, MapWriter, RepoError, Session, StoredChunk};

/// How one disk is read.
pub(super) struct ReadDisk {
    pub(super) disk: String,
    pub(super) geometry: Geometry,
    /// The parent's map and disk size.
    pub(super) parent: Option<(MapRoot, u64)>,
    pub(super) contexts: Contexts,
    /// Runs of chunks that are damaged in the parent, and read whatever the bitmap says.
    pub(super) again: Vec<Range<u64>>,
}

/// What was read and stored, in bytes and chunks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) dirty_bytes: u64,
    pub(super) read_bytes: u64,
    pub(super) zero_bytes: u64,
    pub(super) chunks_new: u64,
    pub(super) new_bytes: u64,
    pub(super) stored_bytes: u64,
}

/// One piece of work for the pipeline, in the disk's order.
enum Job {
    Keep(Range<u64>),
    Zero(Range<u64>),
    Read(Range<u64>),
}

/// A piece of work that is done, for the map.
enum Done {
    Keep(Range<u64>),
    Zero(Range<u64>),
    Stored(Range<u64>, Vec<StoredChunk>),
    /// The disk is complete; a channel that closes without it means that the run was given up.
    End,
}

/// Reads a disk into the session and returns its map.
pub(super) async fn read_disk(
    catalog: &Catalog,
    session: &Arc<Session>,
    client: &Client,
    workers: &Workers,
    meters: &Arc<SourceMeters>,
    observer: &dyn Observer,
    task: ReadDisk,
) -> Result<(MapRoot, Tally), EngineError> {
    let ReadDisk {
        disk,
        geometry,
        parent,
        contexts,
        again,
    } = task;
    let failed = catalog.failed();
    let parent = parent.as_ref().map(|(root, bytes)| (root, *bytes));
    let writer = session
        .map_writer(parent, geometry.size_bytes)
        .map_err(&failed)?;
    let inheritable = writer.keepable();
    let (to_map, from_pipeline) = mpsc::channel(QUEUE);
    let mapper = tokio::spawn(blocking(move || build_map(writer, from_pipeline)));

    let reader = Reader {
        session,
        client,
        workers,
        meters,
        disk: &disk,
        geometry,
        buffers: Buffers::default(),
    };
    let reader = &reader;
    let mut tally = Tally::default();
    let dirty_bytes = AtomicU64::new(0);
    let walk = Walk {
        client,
        disk: &disk,
        contexts,
        geometry,
        inheritable,
        again: &again,
        meter: &meters.walk,
    };
    let jobs = walk
        .windows()
        .map_ok(|walked: Walked| {
            dirty_bytes.fetch_add(walked.dirty_bytes, Relaxed);
            stream::iter(cut(walked.steps, geometry).map(Ok::<Job, EngineError>))
        })
        .try_flatten();
    let failed_store = failed.clone();
    let mut done = std::pin::pin!(
        jobs.map_ok(|job| reader.run(job, &failed_store))
            .try_buffered(DEPTH)
    );
    let mut progress = Progress {
        disk: disk.clone(),
        total_bytes: geometry.size_bytes,
        ..Progress::default()
    };
    while let Some(piece) = done.try_next().await? {
        let bytes = tally.count(&piece, geometry);
        progress.done_bytes = bytes.end();
        progress.moved_bytes = tally.read_bytes;
        progress.new_bytes = tally.new_bytes;
        observer.observe(Event::Progress(progress.clone()));
        if to_map.send(piece).await.is_err() {
            break;
        }
    }
    // When the mapper has ended early, it says why below.
    let _ = to_map.send(Done::End).await;
    let map = mapper
        .await
        .map_err(|_| EngineError::WorkerLost)??
        .map_err(failed)?;
    let map = map.ok_or(EngineError::WorkerLost)?;
    tally.dirty_bytes = dirty_bytes.load(Relaxed);
    Ok((map, tally))
}

/// Cuts steps into jobs; reads into pieces of whole chunks that one request carries.
fn cut(steps: Vec<super::plan::Step>, geometry: Geometry) -> impl Iterator<Item = Job> {
    let each = (READ_BYTES / geometry.chunk_bytes).max(1);
    steps.into_iter().flat_map(move |step| {
        let Range { start, end } = step.chunks;
        let piece = if step.action == Action::Read {
            each
        } else {
            end - start
        };
        let pieces = (end - start).div_ceil(piece);
        (0..pieces).map(move |n| {
            let first = start + n * piece;
            let chunks = first..(first + piece).min(end);
            match step.action {
                Action::Keep => Job::Keep(chunks),
                Action::Zero => Job::Zero(chunks),
                Action::Read => Job::Read(chunks),
            }
        })
    })
}

struct Reader<'a> {
    session: &'a Arc<Session>,
    client: &'a Client,
    workers: &'a Workers,
    meters: &'a Arc<SourceMeters>,
    disk: &'a str,
    geometry: Geometry,
    buffers: Buffers,
}

impl Reader<'_> {
    async fn run(
        &self,
        job: Job,
        failed: &(impl Fn(RepoError) -> EngineError + Clone),
    ) -> Result<Done, EngineError> {
        let chunks = match job {
            Job::Keep(chunks) => return Ok(Done::Keep(chunks)),
            Job::Zero(chunks) => return Ok(Done::Zero(chunks)),
            Job::Read(chunks) => chunks,
        };
        let range = self.geometry.bytes(&chunks);
        let start = Instant::now();
        let reply = self.client.read(range, self.buffers.take()).await;
        self.meters.read.since(start);
        let reply = reply.map_err(|cause| EngineError::SourceFailed {
            disk: self.disk.to_owned(),
            doing: "reading",
            range: cause.range().unwrap_or(range),
            cause: Box::new(cause),
        })?;
        if reply.all_hole {
            self.buffers.put(reply.data);
            return Ok(Done::Zero(chunks));
        }
        let session = Arc::clone(self.session);
        let chunk_bytes = self.geometry.chunk_bytes as usize;
        let meters = Arc::clone(self.meters);
        let read = Instant::now();
        let (stored, buffer) = self
            .workers
            .run(move || {
                meters.wait.since(read);
                let data = reply.data;
                let stored: Result<Vec<StoredChunk>, RepoError> = data
                    .chunks(chunk_bytes)
                    .map(|plain| session.store_chunk(plain))
                    .collect();
                (stored, data)
            })
            .await?;
        self.buffers.put(buffer);
        Ok(Done::Stored(chunks, stored.map_err(failed)?))
    }
}

impl Tally {
    /// Adds a piece and returns its bytes on the disk.
    fn count(&mut self, piece: &Done, geometry: Geometry) -> ByteRange {
        match piece {
            Done::End => ByteRange::first(0),
            Done::Keep(chunks) => geometry.bytes(chunks),
            Done::Zero(chunks) => {
                let bytes = geometry.bytes(chunks);
                self.zero_bytes += bytes.len();
                bytes
            }
            Done::Stored(chunks, stored) => {
                let bytes = geometry.bytes(chunks);
                self.read_bytes += bytes.len();
                for (number, chunk) in chunks.clone().zip(stored) {
                    if chunk.is_new {
                        self.chunks_new += 1;
                        self.new_bytes += geometry.bytes(&(number..number + 1)).len();
                        self.stored_bytes += chunk.stored_bytes;
                    }
                }
                bytes
            }
        }
    }
}

/// Writes the map from pieces in the disk's order; `None` when they end too early.
fn build_map(
    mut writer: MapWriter,
    mut pieces: mpsc::Receiver<Done>,
) -> Result<Option<MapRoot>, RepoError> {
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Done::Keep(chunks) => writer.keep(chunks)?,
            Done::Zero(chunks) => writer.zero(chunks)?,
            Done::Stored(chunks, stored) => {
                for (number, chunk) in chunks.zip(stored) {
                    match chunk.entry {
                        Some(entry) => writer.put(number, entry)?,
                        None => writer.zero(number..number + 1)?,
                    }
                }
            }
            Done::End => return writer.finish().map(Some),
        }
    }
    Ok(None)
}

/// Buffers that were used, for use again: as many as reads are under way.
#[derive(Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    fn take(&self) -> Vec<u8> {
        self.0
            .lock()
            .expect("no holder panics")
            .pop()
            .unwrap_or_default()
    }

    fn put(&self, buffer: Vec<u8>) {
        self.0.lock().expect("no holder panics").push(buffer);
    }
}

/// The bytes of one read, unless a single chunk is larger.
const READ_BYTES: u64 = 512 << 10;
/// Jobs under way, from their read until their chunks are stored.
const DEPTH: usize = 32;
/// Pieces that wait for the map.
const QUEUE: usize = 64;
