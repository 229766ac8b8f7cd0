//! What can go wrong with QEMU's tools.

use std::io;
use std::path::PathBuf;

/// A failure of one of QEMU's programs, or in starting it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// The program cannot be started.
    #[error("cannot start {program}; is the package with QEMU's tools (qemu-utils) installed?")]
    Start {
        /// The program's name.
        program: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The program failed.
    #[error("{program} failed: {message}")]
    Failed {
        /// The program's name.
        program: &'static str,
        /// The last of what it said.
        message: String,
    },
    /// The image cannot be read.
    #[error("cannot read image {}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// What the image is cannot be told safely.
    #[error(
        "image {} begins like a {found} image, but its name does not say so; give --format {found} or --format raw",
        path.display()
    )]
    FormatUnclear {
        /// The image.
        path: PathBuf,
        /// The format that its first bytes look like.
        found: &'static str,
    },
    /// A private socket cannot be made.
    #[error("cannot make a private socket for {program}")]
    Socket {
        /// The program's name.
        program: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}
