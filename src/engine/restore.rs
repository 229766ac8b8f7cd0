//! A restore: a snapshot's disk written to a target, zeros left as holes.

use std::io;
use std::path::Path;
use std::sync::Arc;
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
    let (written_bytes, zero_bytes) = match request.target.clone() {
        Target::Image(path, format) => to_image(disk, &path, &format, request.overwrite).await?,
        Target::Raw(path) => {
            let overwrite = request.overwrite;
            blocking(move || {
                to_sink(
                    &disk,
                    Sink::open(&path, size_bytes, overwrite)?,
                    &path.display().to_string(),
                    &*observer,
                )
            })
            .await??
        }
        Target::Stdout => blocking(move || to_sink(&disk, Sink::Stdout, "-", &*observer)).await??,
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
) -> Result<(u64, u64), EngineError> {
    let written = write_pieces(disk, &sink, target, observer);
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
) -> Result<(u64, u64), EngineError> {
    let failed = |range: ByteRange| {
        move |cause: io::Error| EngineError::Target {
            path: target.to_owned(),
            doing: format!("writing {range}"),
            cause: cause.into(),
        }
    };
    let workers = Workers::start();
    let (mut data, mut zeros) = (0, 0);
    let mut progress = Progress {
        disk: disk.name().to_owned(),
        total_bytes: disk.geometry().size_bytes,
        ..Progress::default()
    };
    let mut pieces = disk.pieces();
    let at_once = if sink.in_order() { IN_ORDER } else { ANY_ORDER };
    loop {
        let group: Vec<Piece> = pieces.by_ref().take(at_once).collect::<Result<_, _>>()?;
        if group.is_empty() {
            break;
        }
        let ready = workers.install(|| {
            group
                .par_iter()
                .map_init(ReadBuffers::default, |buffers, piece| {
                    read_piece(disk, sink, piece, buffers, &failed)
                })
                .collect::<Result<Vec<Ready>, EngineError>>()
        })?;
        for piece in ready {
            match piece {
                Ready::Zeros(range) => {
                    sink.zero(range).map_err(failed(range))?;
                    zeros += range.len();
                    progress.done_bytes += range.len();
                }
                Ready::Written(bytes) => {
                    data += bytes;
                    progress.done_bytes += bytes;
                }
                Ready::Waits(range, bytes) => {
                    sink.write(&bytes, range.start()).map_err(failed(range))?;
                    data += range.len();
                    progress.done_bytes += range.len();
                }
            }
            progress.moved_bytes = data;
            observer.observe(Event::Progress(progress.clone()));
        }
    }
    sink.finish().map_err(|cause| EngineError::Target {
        path: target.to_owned(),
        doing: "making it durable".to_owned(),
        cause: cause.into(),
    })?;
    Ok((data, zeros))
}

/// A piece that was read.
enum Ready {
    Zeros(ByteRange),
    /// So many bytes are at their place.
    Written(u64),
    /// Bytes that wait for their turn.
    Waits(ByteRange, Vec<u8>),
}

/// Reads a piece, and writes it where the sink takes pieces in any order.
fn read_piece<F: FnOnce(io::Error) -> EngineError>(
    disk: &Disk,
    sink: &Sink,
    piece: &Piece,
    buffers: &mut ReadBuffers,
    failed: &impl Fn(ByteRange) -> F,
) -> Result<Ready, EngineError> {
    let batch = match piece {
        Piece::Zeros(range) => return Ok(Ready::Zeros(*range)),
        Piece::Data(batch) => batch,
    };
    if !sink.in_order() {
        let mut written = 0;
        disk.read(batch, buffers, |range, bytes| {
            written += range.len();
            sink.write(bytes, range.start()).map_err(failed(range))
        })?;
        return Ok(Ready::Written(written));
    }
    let mut all: Option<ByteRange> = None;
    let mut waits = Vec::new();
    disk.read(batch, buffers, |range, bytes| {
        all = ByteRange::new(all.map_or(range.start(), ByteRange::start), range.end());
        waits.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(Ready::Waits(all.unwrap_or(ByteRange::first(0)), waits))
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
            disk.pieces().try_fold(0, |sum, piece| match piece? {
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
    let server = private(disk).map_err(|e| failed(e.into()))?;
    let converted = convert_from_nbd(server.uri(), format, path).await;
    // What the export could not read says more than qemu-img's words about it.
    match (server.close().await, converted) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(failed(error.into())),
        (None, Ok(())) => Ok((data, zeros)),
    }
}

/// Pieces under way at once where each is written as soon as it is read.
const ANY_ORDER: usize = 64;
/// The same where they wait for each other in memory, each of 16 MiB at most.
const IN_ORDER: usize = 4;
