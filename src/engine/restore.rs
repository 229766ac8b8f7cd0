//! A restore: a snapshot's disk written to a target, zeros left as holes.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use rayon::prelude::*;

use super::EngineError;
use super::catalog::{Catalog, disk_of};
use super::disk::{Disk, Piece};
use super::event::{Event, Observer, Progress};
use super::nbd_target::NbdSink;
use super::outcome::RestoreOutcome;
use super::serve::private;
use super::target::{Sink, Target};
use super::workers::{Workers, blocking};
use crate::qemu::convert_from_nbd;
use crate::range::ByteRange;
use crate::repo::ReadBuffers;

/// What a restore is asked to do.
#[derive(Clone, Debug)]
pub struct RestoreRequest {
    /// The words that address the snapshot.
    pub snapshot: String,
    /// The disk; not needed where the snapshot has only one.
    pub disk: Option<String>,
    /// Where it goes.
    pub target: Target,
    /// Whether the target's existing content may be overwritten.
    pub overwrite: bool,
}

/// Writes a disk of a snapshot to a target.
///
/// # Errors
/// When the snapshot, the disk or a chunk cannot be read, or the target refuses. A file that this restore created is
/// then removed; one that it overwrote is left incomplete.
pub async fn restore(
    catalog: &Catalog,
    request: RestoreRequest,
    observer: Arc<dyn Observer>,
) -> Result<RestoreOutcome, EngineError> {
    let clock = Instant::now();
    let snapshot = catalog.find(&request.snapshot).await?;
    let _pin = catalog.pin(&snapshot).await?;
    let record = disk_of(&snapshot, request.disk.as_deref())?;
    let disk = Disk::open(catalog, &snapshot, record)?;
    let size_bytes = record.size_bytes;
    let stop = StopOnDrop::default();
    let stopped = Arc::clone(&stop.0);
    let (written_bytes, zero_bytes) = match request.target.clone() {
        Target::Image(path, format) => to_image(disk, &path, &format, request.overwrite).await?,
        Target::Raw(path) => {
            let overwrite = request.overwrite;
            let work = move || {
                let sink = Sink::open(&path, size_bytes, overwrite)?;
                to_sink(
                    &disk,
                    sink,
                    &path.display().to_string(),
                    &*observer,
                    &stopped,
                )
            };
            blocking(work).await??
        }
        Target::Nbd(uri) => {
            let sink = Sink::Nbd(NbdSink::open(&uri, size_bytes, request.overwrite).await?);
            let work = move || to_sink(&disk, sink, &uri.to_string(), &*observer, &stopped);
            blocking(work).await??
        }
        Target::Stdout => {
            blocking(move || to_sink(&disk, Sink::Stdout, "-", &*observer, &stopped)).await??
        }
    };
    Ok(RestoreOutcome {
        repository: catalog.path().to_owned(),
        snapshot: snapshot.id.to_string(),
        disk: record.disk.clone(),
        target: request.target.text(),
        size_bytes,
        written_bytes,
        zero_bytes,
        duration: clock.elapsed(),
    })
}

/// Writes all pieces to a sink; returns the bytes of data and of zeros.
fn to_sink(
    disk: &Disk,
    sink: Sink,
    target: &str,
    observer: &dyn Observer,
    stopped: &AtomicBool,
) -> Result<(u64, u64), EngineError> {
    let written = write_pieces(disk, &sink, target, observer, stopped);
    if written.is_err() {
        sink.abandon();
    }
    written
}

fn write_pieces(
    disk: &Disk,
    sink: &Sink,
    target: &str,
    observer: &dyn Observer,
    stopped: &AtomicBool,
) -> Result<(u64, u64), EngineError> {
    let writing = Writing {
        sink,
        target,
        observer,
        workers: Workers::start(),
        stopped,
        counted: Mutex::new(Counted {
            progress: Progress {
                disk: disk.name().to_owned(),
                total_bytes: disk.geometry().size_bytes,
                ..Progress::default()
            },
            zeros: 0,
        }),
    };
    match sink.in_order() {
        true => writing.in_order(disk)?,
        false => writing.at_once(disk)?,
    }
    sink.finish().map_err(|cause| writing.not_durable(cause))?;
    let counted = writing.counted.into_inner().expect("no holder panics");
    Ok((counted.progress.moved_bytes, counted.zeros))
}

/// Tells the blocking part of a restore to stop when nobody waits for it any more.
#[derive(Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// A range, and its bytes unless they are zeros.
type Part = (ByteRange, Option<Vec<u8>>);

struct Writing<'a> {
    sink: &'a Sink,
    target: &'a str,
    observer: &'a dyn Observer,
    workers: Workers,
    stopped: &'a AtomicBool,
    counted: Mutex<Counted>,
}

struct Counted {
    progress: Progress,
    zeros: u64,
}

impl Writing<'_> {
    /// Writes all pieces in any order, each by the thread that has read it.
    ///
    /// Another thread makes durable what is written meanwhile, so that little is left to wait for in the end.
    fn at_once(&self, disk: &Disk) -> Result<(), EngineError> {
        let pieces = disk.pieces(0..disk.geometry().chunks());
        thread::scope(|scope| {
            let (settle, asked) = sync_channel(1);
            let settler = scope.spawn(move || asked.iter().try_for_each(|()| self.sink.settle()));
            let unsettled = AtomicU64::new(0);
            let write = |buffers: &mut ReadBuffers, piece: Result<Piece, EngineError>| {
                self.go_on()?;
                let data = self.write_piece(disk, buffers, &piece?)?;
                if unsettled.fetch_add(data, Relaxed) + data >= SETTLE_BYTES {
                    unsettled.store(0, Relaxed);
                    // When one is asked for already, it has this to do too. When the settler has ended, it says why.
                    if let Err(TrySendError::Disconnected(())) = settle.try_send(()) {
                        return Err(EngineError::WorkerLost);
                    }
                }
                Ok(())
            };
            let written = self.workers.install(|| {
                pieces
                    .par_bridge()
                    .try_for_each_init(ReadBuffers::default, write)
            });
            drop(settle);
            // The system reports that bytes were lost on their way only once: to the settler, if it came first.
            let settled = settler.join().map_err(|_| EngineError::WorkerLost)?;
            settled.map_err(|cause| self.not_durable(cause))?;
            written
        })
    }

    /// Writes a piece and returns its bytes of data.
    fn write_piece(
        &self,
        disk: &Disk,
        buffers: &mut ReadBuffers,
        piece: &Piece,
    ) -> Result<u64, EngineError> {
        let (mut data, mut zeros) = (0, 0);
        match piece {
            Piece::Zeros(range) => {
                zeros = range.len();
                self.sink.zero(*range).map_err(|e| self.failed(*range, e))?;
            }
            Piece::Data(batch) => disk.read(batch, buffers, |range, bytes| {
                data += range.len();
                self.sink
                    .write(bytes, range.start())
                    .map_err(|e| self.failed(range, e))
            })?,
        }
        self.count(data, zeros);
        Ok(data)
    }

    /// Reads the pieces of a window at once, then writes them in the disk's order.
    fn in_order(&self, disk: &Disk) -> Result<(), EngineError> {
        let chunks = disk.geometry().chunks();
        let window = (WINDOW / disk.geometry().chunk_bytes).max(1);
        let read = |buffers: &mut ReadBuffers, piece: Result<Piece, EngineError>| {
            let mut parts: Vec<Part> = Vec::new();
            match piece? {
                Piece::Zeros(range) => parts.push((range, None)),
                Piece::Data(batch) => disk.read(&batch, buffers, |range, bytes| {
                    parts.push((range, Some(bytes.to_vec())));
                    Ok(())
                })?,
            }
            Ok(parts)
        };
        for first in (0..chunks).step_by(window as usize) {
            self.go_on()?;
            let pieces = disk.pieces(first..(first + window).min(chunks));
            let parts: Result<Vec<Vec<Part>>, EngineError> = self.workers.install(|| {
                pieces
                    .par_bridge()
                    .map_init(ReadBuffers::default, read)
                    .collect()
            });
            let mut parts: Vec<Part> = parts?.into_iter().flatten().collect();
            parts.sort_by_key(|(range, _)| range.start());
            for (range, bytes) in parts {
                let (data, zeros, written) = match bytes {
                    None => (0, range.len(), self.sink.zero(range)),
                    Some(bytes) => (range.len(), 0, self.sink.write(&bytes, range.start())),
                };
                written.map_err(|e| self.failed(range, e))?;
                self.count(data, zeros);
            }
        }
        Ok(())
    }

    fn go_on(&self) -> Result<(), EngineError> {
        match self.stopped.load(Relaxed) {
            true => Err(EngineError::Stopped),
            false => Ok(()),
        }
    }

    fn count(&self, data: u64, zeros: u64) {
        let mut counted = self.counted.lock().expect("no holder panics");
        counted.zeros += zeros;
        counted.progress.moved_bytes += data;
        counted.progress.done_bytes += data + zeros;
        // Told under the lock, so that progress is never told backwards.
        self.observer
            .observe(Event::Progress(counted.progress.clone()));
    }

    fn not_durable(&self, cause: io::Error) -> EngineError {
        EngineError::Target {
            path: self.target.to_owned(),
            doing: "making it durable".to_owned(),
            cause: cause.into(),
        }
    }

    fn failed(&self, range: ByteRange, cause: io::Error) -> EngineError {
        EngineError::Target {
            path: self.target.to_owned(),
            doing: format!("writing {range}"),
            cause: cause.into(),
        }
    }
}

/// Lets `qemu-img` copy the disk from an embedded server on a private socket.
async fn to_image(
    disk: Disk,
    path: &Path,
    format: &str,
    overwrite: bool,
) -> Result<(u64, u64), EngineError> {
    let target = path.display().to_string();
    if !overwrite && path.symlink_metadata().is_ok() {
        return Err(EngineError::TargetExists(target));
    }
    let zeros: u64 = {
        let disk = disk.clone();
        blocking(move || {
            disk.pieces(0..disk.geometry().chunks())
                .try_fold(0, |sum, piece| match piece? {
                    Piece::Zeros(range) => Ok::<u64, EngineError>(sum + range.len()),
                    Piece::Data(_) => Ok(sum),
                })
        })
        .await??
    };
    let data = disk.geometry().size_bytes - zeros;
    let failed = |cause: super::Cause| EngineError::Target {
        path: target.clone(),
        doing: format!("writing a {format} image"),
        cause,
    };
    let unfinished = Unfinished {
        path,
        created: path.symlink_metadata().is_err(),
        done: false,
    };
    let server = private(disk).map_err(|e| failed(e.into()))?;
    let converted = convert_from_nbd(server.uri(), format, path).await;
    // What the export could not read says more than qemu-img's words about it.
    match (server.close().await, converted) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(failed(error.into())),
        (None, Ok(())) => {
            unfinished.keep();
            Ok((data, zeros))
        }
    }
}

/// An image that a child process writes; removed unless it becomes whole, if it was not there before.
struct Unfinished<'a> {
    path: &'a Path,
    created: bool,
    done: bool,
}

impl Unfinished<'_> {
    fn keep(mut self) {
        self.done = true;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.created && !self.done {
            let _ = std::fs::remove_file(self.path);
        }
    }
}

/// After this many bytes they are made durable, while more are written.
const SETTLE_BYTES: u64 = 64 << 20;
/// The bytes under way at once where they wait for each other in memory.
const WINDOW: u64 = 16 << 20;
