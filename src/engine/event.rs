//! What the engine tells its observer while it works; it prints nothing itself.

use std::path::PathBuf;

/// How far a disk's work has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The disk's name.
    pub disk: String,
    /// The bytes of the disk that are dealt with, whether read, zero or inherited.
    pub done_bytes: u64,
    /// The disk's size in bytes.
    pub total_bytes: u64,
    /// The bytes that came from, or went to, the disk.
    pub moved_bytes: u64,
    /// The bytes of chunks that the repository did not have.
    pub new_bytes: u64,
}

/// Something that a person should know, though the work went on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// A stable word for programs, such as `no-allocation`.
    pub code: &'static str,
    /// The disk that it concerns, if one.
    pub disk: Option<String>,
    /// A sentence for people.
    pub message: String,
}

/// One export that is being served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedExport {
    /// The export's name.
    pub name: String,
    /// Its NBD URI.
    pub uri: String,
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// The file that keeps what clients write; `None` where they may only read.
    pub overlay: Option<PathBuf>,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Work on a disk went on; the last one of a disk has all bytes done.
    Progress(Progress),
    /// Something that a person should know.
    Warning(Warning),
    /// Exports are ready for clients.
    Serving(Vec<ServedExport>),
}

/// Receives the engine's events, from any thread.
pub trait Observer: Send + Sync {
    /// Takes one event; must be quick, since the engine waits for it.
    fn observe(&self, event: Event);
}
