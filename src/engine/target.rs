//! Where a restore goes: a raw file, a block device, stdout, an NBD export, or an image that `qemu-img` writes.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};

use super::EngineError;
use super::nbd_target::NbdSink;
use crate::file;
use crate::nbd::uri::NbdUri;
use crate::qemu::ImageFormat;
use crate::range::ByteRange;

/// A restore's target as the user named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `-`: the disk's bytes in order.
    Stdout,
    /// A raw file, which becomes sparse, or a block device.
    Raw(PathBuf),
    /// An image file of another format.
    Image(PathBuf, String),
    /// A writable NBD export.
    Nbd(NbdUri),
}

impl Target {
    /// Takes the words of a command line.
    ///
    /// # Errors
    /// When the words name a kind of target that this version does not know, or contradict each other.
    pub fn parse(text: &str, format: &str) -> Result<Self, EngineError> {
        let format = ImageFormat::named(format);
        match (text, format) {
            ("", _) => Err(EngineError::Usage(
                "--to wants a file, a block device or `-`".to_owned(),
            )),
            ("-", ImageFormat::Raw) => Ok(Self::Stdout),
            ("-", ImageFormat::Qemu(format)) => Err(EngineError::Usage(format!(
                "a {format} image cannot be written to stdout; name a file"
            ))),
            (text, format) if text.contains("://") => {
                let usage = |why: String| EngineError::Usage(format!("--to {text}: {why}"));
                let uri = text.parse().map_err(|e| usage(format!("{e}")))?;
                match format {
                    ImageFormat::Raw => Ok(Self::Nbd(uri)),
                    ImageFormat::Qemu(_) => Err(usage(
                        "an NBD export is always raw; leave --format out".to_owned(),
                    )),
                }
            }
            (text, ImageFormat::Qemu(format)) => Ok(Self::Image(PathBuf::from(text), format)),
            (text, ImageFormat::Raw) if text.to_ascii_lowercase().ends_with(".qcow2") => {
                Err(EngineError::Usage(format!(
                    "{text} would become a raw file: give --format qcow2, or another name"
                )))
            }
            (text, ImageFormat::Raw) => Ok(Self::Raw(PathBuf::from(text))),
        }
    }

    /// The target as the user named it.
    pub fn text(&self) -> String {
        match self {
            Self::Stdout => "-".to_owned(),
            Self::Raw(path) | Self::Image(path, _) => path.display().to_string(),
            Self::Nbd(uri) => uri.to_string(),
        }
    }
}

/// An open target that takes ranges of a disk, in any order and from several threads unless it is stdout.
#[derive(Debug)]
pub(super) enum Sink {
    /// Takes each range in order, zeros included.
    Stdout,
    /// Reads as zeros where nothing was written.
    Sparse {
        file: File,
        path: PathBuf,
        created: bool,
    },
    /// Holds old bytes where nothing was written.
    Device { file: File },
    /// Takes ranges in any order, and tells of a failure at a later one.
    Nbd(NbdSink),
}

impl Sink {
    /// Opens a raw target for a disk of `size_bytes`.
    ///
    /// # Errors
    /// When the target exists and may not be overwritten, is a block device that is too small, or refuses.
    pub(super) fn open(path: &Path, size_bytes: u64, overwrite: bool) -> Result<Self, EngineError> {
        let failed = |doing: &str| {
            let (path, doing) = (path.display().to_string(), doing.to_owned());
            move |cause: io::Error| EngineError::Target {
                path,
                doing,
                cause: cause.into(),
            }
        };
        match OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(file) => {
                let sink = Self::Sparse {
                    file,
                    path: path.to_owned(),
                    created: true,
                };
                sink.set_len(size_bytes)
                    .map_err(failed("setting the size"))?;
                return Ok(sink);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && overwrite => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(EngineError::TargetExists(path.display().to_string()));
            }
            Err(error) => return Err(failed("creating the file")(error)),
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed("opening"))?;
        let kind = file
            .metadata()
            .map_err(failed("looking at it"))?
            .file_type();
        if kind.is_block_device() {
            use std::io::{Seek, SeekFrom};
            let room = (&file)
                .seek(SeekFrom::End(0))
                .map_err(failed("asking its size"))?;
            if room < size_bytes {
                return Err(failed("fitting the disk")(io::Error::other(format!(
                    "the device has {room} bytes, the disk {size_bytes}"
                ))));
            }
            return Ok(Self::Device { file });
        }
        if !kind.is_file() {
            return Err(failed("opening")(file::no_disk()));
        }
        let sink = Self::Sparse {
            file,
            path: path.to_owned(),
            created: false,
        };
        // Cut to nothing first, so that no old byte shows through a hole.
        sink.set_len(0).map_err(failed("emptying the file"))?;
        sink.set_len(size_bytes)
            .map_err(failed("setting the size"))?;
        Ok(sink)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self {
            Self::Sparse { file, .. } => file.set_len(len),
            Self::Stdout | Self::Device { .. } | Self::Nbd(_) => Ok(()),
        }
    }

    /// Whether ranges must come in the disk's order.
    pub(super) fn in_order(&self) -> bool {
        matches!(self, Self::Stdout)
    }

    /// Writes bytes at an offset of the disk.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().lock().write_all(bytes),
            Self::Sparse { file, .. } | Self::Device { file } => file.write_all_at(bytes, offset),
            Self::Nbd(sink) => sink.write(bytes, offset).map_err(io::Error::other),
        }
    }

    /// Makes a range zeros.
    pub(super) fn zero(&self, range: ByteRange) -> io::Result<()> {
        match self {
            Self::Sparse { .. } => Ok(()),
            Self::Device { file } => {
                let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                match fallocate(file, flags, range.start(), range.len()) {
                    Ok(()) => Ok(()),
                    // Not every driver can; zeros as bytes always work.
                    Err(_) => self.write_zeros(range),
                }
            }
            Self::Nbd(sink) => sink.zero(range).map_err(io::Error::other),
            Self::Stdout => self.write_zeros(range),
        }
    }

    fn write_zeros(&self, range: ByteRange) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        range
            .split(ZEROS.len() as u64)
            .try_for_each(|r| self.write(&ZEROS[..r.len() as usize], r.start()))
    }

    /// Makes durable what is written so far, beside threads that write on, and gives up its place in memory.
    ///
    /// A restored disk is larger than what anybody reads of it soon. Pages that are used again at once are also quicker
    /// to fill than ever new ones.
    pub(super) fn settle(&self) -> io::Result<()> {
        match self {
            // A server sees to its own memory, and is flushed at the end.
            Self::Stdout | Self::Nbd(_) => Ok(()),
            Self::Sparse { file, .. } | Self::Device { file } => {
                file.sync_data()?;
                // Advice: where it is not taken, the bytes stay in memory.
                let _ = fadvise(file, 0, None, Advice::DontNeed);
                Ok(())
            }
        }
    }

    /// Makes all that was written durable.
    pub(super) fn finish(&self) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().lock().flush(),
            Self::Sparse { file, .. } | Self::Device { file } => file.sync_all(),
            Self::Nbd(sink) => sink.finish().map_err(io::Error::other),
        }
    }

    /// Removes a file that this restore created and did not complete, so that nobody takes it for a disk.
    pub(super) fn abandon(self) {
        if let Self::Sparse {
            path,
            created: true,
            ..
        } = self
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!(
                "{} is incomplete and cannot be removed: {error}",
                path.display()
            );
        }
    }
}
