//! A raw image file as an export: its bytes as they are, its holes by `SEEK_HOLE`.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::{SeekFrom as Seeking, seek};
use rustix::io::Errno;

use crate::nbd::server::{ExportSource, NbdError, SourceRead};
use crate::nbd::session::Extent;
use crate::qemu::open_image;
use crate::range::ByteRange;

/// A file or block device that is read, and never written.
pub(super) struct RawExport {
    file: Arc<File>,
    size_bytes: u64,
}

impl RawExport {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut file = open_image(path)?;
        // A block device has no length in its metadata, but an end.
        let size_bytes = file.seek(SeekFrom::End(0))?;
        Ok(Self {
            file: Arc::new(file),
            size_bytes,
        })
    }
}

impl ExportSource for RawExport {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn contexts(&self) -> Vec<String> {
        vec!["base:allocation".to_owned()]
    }

    fn read(
        &self,
        range: ByteRange,
        mut buf: Vec<u8>,
    ) -> BoxFuture<'_, Result<SourceRead, NbdError>> {
        let file = Arc::clone(&self.file);
        blocking(move || {
            buf.resize(range.len() as usize, 0);
            file.read_exact_at(&mut buf, range.start())?;
            Ok(SourceRead::data(buf))
        })
    }

    fn extents(
        &self,
        _context: usize,
        range: ByteRange,
        most: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdError>> {
        let file = Arc::clone(&self.file);
        blocking(move || {
            let mut extents = Vec::new();
            let mut at = range.start();
            while at < range.end() && extents.len() < most {
                let data = next(&file, Seeking::Data(at), range.end())?;
                let (end, flags) = if data > at {
                    (data, HOLE_ZERO)
                } else {
                    (next(&file, Seeking::Hole(at), range.end())?, 0)
                };
                // A file that is changed meanwhile must not stop the walk: what is unclear is data.
                let end = if end > at { end } else { range.end() };
                extents.extend(ByteRange::new(at, end).map(|range| Extent { range, flags }));
                at = end;
            }
            Ok(extents)
        })
    }
}

/// Finds the next data or hole, at most `end`.
fn next(file: &File, seeking: Seeking, end: u64) -> io::Result<u64> {
    match seek(file, seeking) {
        Ok(at) => Ok(at.min(end)),
        // No more data, or no more hole.
        Err(Errno::NXIO) => Ok(end),
        // A file system without holes: all is data, which begins here and goes on to the end.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => match seeking {
            Seeking::Data(at) => Ok(at),
            _ => Ok(end),
        },
        Err(error) => Err(error.into()),
    }
}

fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> BoxFuture<'static, Result<T, NbdError>> {
    async move {
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(NbdError::io(error.to_string())),
            Err(_) => Err(NbdError::io("the reader ended without a result")),
        }
    }
    .boxed()
}

/// Both bits of `base:allocation`.
const HOLE_ZERO: u64 = 3;
