//! A restore: a snapshot's disk written to a target, zeros left as holes.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use rayon::prelude::*;

use super::EngineError;
use super::catalog::{Catalog, disk_of};
use super::disk::{Disk, Piece};
use super::event::{Event, Observer, Progress};
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
    let go_on = || {
        if stopped.load(Relaxed) {
            Err(EngineError::Stopped)
        } else {
            Ok(())
        }
    };
    let mut writing = Writing {
        sink,
        target,
        observer,
        workers: Workers::start(),
        progress: Progress {
            disk: disk.name().to_owned(),
            total_bytes: disk.geometry().size_bytes,
            ..Progress::default()
        },
        zeros: 0,
    };
    let chunks = disk.geometry().chunks();
    if sink.in_order() {
        let window = (WINDOW / disk.geometry().chunk_bytes).max(1);
        for first in (0..chunks).step_by(window as usize) {
            let pieces = disk
                .pieces(first..(first + window).min(chunks))
                .collect::<Result<Vec<_>, _>>()?;
            go_on()?;
            writing.in_order(disk, &pieces)?;
        }
    } else {
        let mut pieces = disk.pieces(0..chunks);
        loop {
            let group = pieces.by_ref().take(GROUP).collect::<Result<Vec<_>, _>>()?;
            if group.is_empty() {
                break;
            }
            go_on()?;
            writing.at_once(disk, &group)?;
        }
    }
    sink.finish().map_err(|cause| EngineError::Target {
        path: target.to_owned(),
        doing: "making it durable".to_owned(),
        cause: cause.into(),
    })?;
    Ok((writing.progress.moved_bytes, writing.zeros))
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
    progress: Progress,
    zeros: u64,
}

impl Writing<'_> {
    /// Writes pieces in any order, each by the thread that has read it.
    fn at_once(&mut self, disk: &Disk, pieces: &[Piece]) -> Result<(), EngineError> {
        let write = |buffers: &mut ReadBuffers, piece: &Piece| {
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
            Ok((data, zeros))
        };
        let written: Result<Vec<(u64, u64)>, EngineError> = self.workers.install(|| {
            pieces
                .par_iter()
                .map_init(ReadBuffers::default, write)
                .collect()
        });
        for (data, zeros) in written? {
            self.count(data, zeros);
        }
        Ok(())
    }

    /// Reads the pieces of a window at once, then writes them in the disk's order.
    fn in_order(&mut self, disk: &Disk, pieces: &[Piece]) -> Result<(), EngineError> {
        let read = |buffers: &mut ReadBuffers, piece: &Piece| {
            let mut parts = Vec::new();
            match piece {
                Piece::Zeros(range) => parts.push((*range, None)),
                Piece::Data(batch) => disk.read(batch, buffers, |range, bytes| {
                    parts.push((range, Some(bytes.to_vec())));
                    Ok(())
                })?,
            }
            Ok(parts)
        };
        let parts: Result<Vec<Vec<Part>>, EngineError> = self.workers.install(|| {
            pieces
                .par_iter()
                .map_init(ReadBuffers::default, read)
                .collect()
        });
        let mut parts: Vec<_> = parts?.into_iter().flatten().collect();
        parts.sort_by_key(|(range, _)| range.start());
        for (range, bytes) in parts {
            match bytes {
                None => {
                    self.sink.zero(range).map_err(|e| self.failed(range, e))?;
                    self.count(0, range.len());
                }
                Some(bytes) => {
                    self.sink
                        .write(&bytes, range.start())
                        .map_err(|e| self.failed(range, e))?;
                    self.count(range.len(), 0);
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, data: u64, zeros: u64) {
        self.zeros += zeros;
        self.progress.moved_bytes += data;
        self.progress.done_bytes += data + zeros;
        self.observer
            .observe(Event::Progress(self.progress.clone()));
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

/// Pieces under way at once where each is written as soon as it is read.
const GROUP: usize = 64;
/// The bytes under way at once where they wait for each other in memory.
const WINDOW: u64 = 16 << 20;
