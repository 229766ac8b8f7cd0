//! Where a repository's files lie: a small trait, so that doubles that crash, fail or damage are easy to write.

mod local;
mod memory;

pub use local::LocalStorage;
pub use memory::MemoryStorage;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use super::error::RepoError;

/// A place for write-once files with names such as `packs/0a/0a12...`; used from many threads at once.
///
/// A file is written whole, then published under its name, and never changed afterwards; mending puts what it should be
/// in the place of one that is damaged.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Begins a file that nobody sees until it is published; dropping it unpublished removes it.
    fn create(&self) -> Result<Box<dyn NewFile>, StorageError>;

    /// Returns a whole file of at most `limit` bytes.
    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, StorageError>;

    /// Fills `buf` from the offset `at`; a file that ends before is an error.
    fn read_at(&self, name: &str, at: u64, buf: &mut [u8]) -> Result<(), StorageError>;

    /// Returns the length of a file in bytes.
    fn len(&self, name: &str) -> Result<u64, StorageError>;

    /// Lists all files whose names start with the folder `prefix` (empty, or ending in `/`), in no order.
    fn list(&self, prefix: &str) -> Result<Vec<FileInfo>, StorageError>;

    /// Removes a file.
    fn remove(&self, name: &str) -> Result<(), StorageError>;

    /// Returns once each name published before is durable.
    ///
    /// A failure lasts: what the system could not write once is never taken as written later.
    fn barrier(&self) -> Result<(), StorageError>;

    /// Takes a name that shows others that this process lives, until what is returned is dropped or the process dies.
    fn hold(&self, name: &str) -> Result<Box<dyn Hold>, StorageError>;

    /// Whether somebody holds a name; `None` when this storage cannot tell.
    fn is_held(&self, name: &str) -> Result<Option<bool>, StorageError>;

    /// Removes the unpublished files of writers that are gone and returns how many there were.
    fn sweep(&self) -> Result<u64, StorageError>;

    /// Says where this is, for messages.
    fn place(&self) -> String;
}

/// A file that is being written and that nobody sees yet.
pub trait NewFile: Send {
    /// Appends bytes.
    fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError>;

    /// Makes the content durable, then the file visible under `name`; never replaces a file.
    ///
    /// The name itself is durable after the next [`Storage::barrier`].
    fn publish(self: Box<Self>, name: &str) -> Result<(), StorageError>;

    /// Makes the content durable, then puts the file in the place of the one of this name, or where there is none.
    ///
    /// Only for mending: the one that goes is damaged, and what takes its place was proved to be what it should be. At
    /// each moment one of them is there, also after a crash; which one, is certain after the next [`Storage::barrier`].
    fn replace(self: Box<Self>, name: &str) -> Result<(), StorageError>;
}

/// A name that is held; dropping it lets go.
pub trait Hold: Send + Sync + fmt::Debug {}

/// A published file, as [`Storage::list`] sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// The name in the repository.
    pub name: String,
    /// The length in bytes.
    pub len: u64,
    /// When the storage says that it was written; informative only.
    pub modified: Option<SystemTime>,
}

/// A failure of the storage.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StorageError {
    /// There is no such file.
    #[error("{name} is not there")]
    Missing {
        /// The file.
        name: String,
    },
    /// There is a file of this name already.
    #[error("{name} exists already")]
    Exists {
        /// The file.
        name: String,
    },
    /// The file ends before what was to be read.
    #[error("{name} ends before {end:#x}")]
    Short {
        /// The file.
        name: String,
        /// Where the read would have ended.
        end: u64,
    },
    /// The file is longer than the reader takes.
    #[error("{name} is longer than {limit} bytes")]
    TooLong {
        /// The file.
        name: String,
        /// The most that the reader takes.
        limit: u64,
    },
    /// What lies under this name is a folder, a pipe or a device.
    #[error("{name} is no file")]
    NoFile {
        /// The file that should be there.
        name: String,
    },
    /// There is no room left.
    #[error("no room left for {name}")]
    NoRoom {
        /// The file.
        name: String,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The system refused a call.
    #[error("cannot {what}")]
    Io {
        /// What was tried, with the file's name.
        what: String,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
}

impl StorageError {
    /// Sorts what the system said about doing `what` to `name`.
    pub fn from_io(what: &str, name: &str, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { name },
            io::ErrorKind::AlreadyExists => Self::Exists { name },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoRoom {
                name,
                source: Arc::new(source),
            },
            _ => Self::Io {
                what: format!("{what} {name}"),
                source: Arc::new(source),
            },
        }
    }
}

impl From<StorageError> for RepoError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Missing { name } => Self::Missing { file: name },
            StorageError::Exists { name } => Self::AlreadyExists { file: name },
            StorageError::Short { name, end } => {
                Self::corrupt(name, end, "the file ends before this")
            }
            StorageError::TooLong { name, limit } => {
                Self::corrupt(name, limit, "the file is longer than such a file can be")
            }
            StorageError::NoFile { name } => {
                Self::corrupt(name, 0, "something else lies where a file should be")
            }
            StorageError::NoRoom { name, source } => Self::NoRoom { file: name, source },
            StorageError::Io { what, source } => Self::Io { what, source },
        }
    }
}
