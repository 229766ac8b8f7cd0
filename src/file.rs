//! Opening what should be a file or a disk, and may be anything.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens to read, and waits for nobody, as whoever opens a pipe else does.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
}

/// What is told of a path where no disk can be.
pub(crate) fn no_disk() -> io::Error {
    io::Error::other("it is neither a file nor a block device")
}
