//! The two files of an overlay: the bytes at their places on the disk, and the log of which are there.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{FallocateFlags, fallocate};
use tempfile::NamedTempFile;

use crate::range::ByteRange;

/// What an overlay needs of its files; small, so that a test can lose and tear what was not synced.
pub(super) trait Files: Send + Sync {
    /// Reads bytes of the disk.
    fn read_data(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes bytes of the disk.
    fn write_data(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Gives up the room of bytes that are not needed any more; advice.
    fn discard_data(&self, range: ByteRange);

    /// Takes room for bytes that may be written.
    fn reserve_data(&self, range: ByteRange) -> io::Result<()>;

    /// Makes durable what was written of the disk.
    fn sync_data(&self) -> io::Result<()>;

    /// The log's length.
    fn log_len(&self) -> io::Result<u64>;

    /// Reads a part of the log.
    fn read_log(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes to the log, at its end.
    fn append_log(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Cuts the log to what it was before a write that failed.
    fn truncate_log(&self, len: u64) -> io::Result<()>;

    /// Makes durable what was written to the log.
    fn sync_log(&self) -> io::Result<()>;

    /// Writes another log beside this one, and makes it durable; a failure leaves all as it was.
    fn write_next_log(&self, pieces: &mut dyn Iterator<Item = Vec<u8>>) -> io::Result<()>;

    /// Puts the other log in the place of this one; after a failure it may be either.
    fn use_next_log(&self) -> io::Result<()>;
}

/// The files in a folder, locked against other processes.
pub(super) struct LocalFiles {
    data: File,
    log: Mutex<Option<File>>,
    next: Mutex<Option<NamedTempFile>>,
    folder: PathBuf,
    log_path: PathBuf,
}

impl LocalFiles {
    /// Opens or creates `NAME.overlay` and finds `NAME.overlay-map`, which may not be there yet.
    pub(super) fn open(folder: &Path, name: &str) -> io::Result<(Self, PathBuf)> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("{name}.overlay"));
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)?;
        match data.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "another process serves it",
                ));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let log_path = folder.join(format!("{name}.overlay-map"));
        let log = match OpenOptions::new().read(true).write(true).open(&log_path) {
            Ok(log) => Some(log),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let files = Self {
            data,
            log: Mutex::new(log),
            next: Mutex::default(),
            folder: folder.to_owned(),
            log_path,
        };
        Ok((files, path))
    }

    /// Whether there is a log.
    pub(super) fn has_log(&self) -> bool {
        self.log.lock().expect("no holder panics").is_some()
    }

    /// The length of the file of the disk's bytes.
    pub(super) fn data_len(&self) -> io::Result<u64> {
        Ok(self.data.metadata()?.len())
    }

    /// Gives the file of the disk's bytes its length, and makes it and its place durable.
    pub(super) fn make_data(&self, size_bytes: u64) -> io::Result<()> {
        self.data.set_len(size_bytes)?;
        self.data.sync_all()?;
        self.sync_folder()
    }

    fn sync_folder(&self) -> io::Result<()> {
        File::open(&self.folder)?.sync_all()
    }

    fn with_log<T>(&self, call: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        match &*self.log.lock().expect("no holder panics") {
            Some(log) => call(log),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Files for LocalFiles {
    fn read_data(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.data.read_exact_at(buf, offset)
    }

    fn write_data(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all_at(bytes, offset)
    }

    fn discard_data(&self, range: ByteRange) {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A file system that cannot do it keeps the room.
        let _ = fallocate(&self.data, how, range.start(), range.len());
    }

    fn reserve_data(&self, range: ByteRange) -> io::Result<()> {
        match fallocate(
            &self.data,
            FallocateFlags::KEEP_SIZE,
            range.start(),
            range.len(),
        ) {
            // A file system without it takes room when bytes come.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.data.sync_data()
    }

    fn log_len(&self) -> io::Result<u64> {
        self.with_log(|log| Ok(log.metadata()?.len()))
    }

    fn read_log(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.with_log(|log| log.read_exact_at(buf, offset))
    }

    fn append_log(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.with_log(|log| log.write_all_at(bytes, offset))
    }

    fn truncate_log(&self, len: u64) -> io::Result<()> {
        self.with_log(|log| log.set_len(len))
    }

    fn sync_log(&self) -> io::Result<()> {
        self.with_log(File::sync_data)
    }

    fn write_next_log(&self, pieces: &mut dyn Iterator<Item = Vec<u8>>) -> io::Result<()> {
        let mut next = tempfile::Builder::new()
            .prefix(".overlay-map-")
            .tempfile_in(&self.folder)?;
        for piece in pieces {
            next.write_all(&piece)?;
        }
        next.as_file().sync_all()?;
        *self.next.lock().expect("no holder panics") = Some(next);
        Ok(())
    }

    fn use_next_log(&self) -> io::Result<()> {
        let next = self.next.lock().expect("no holder panics").take();
        let next = next.ok_or(io::ErrorKind::NotFound)?;
        let log = next.persist(&self.log_path).map_err(|e| e.error)?;
        *self.log.lock().expect("no holder panics") = Some(log);
        self.sync_folder()
    }
}
