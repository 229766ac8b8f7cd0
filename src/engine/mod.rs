//! Backup, restore, verify and diff: the only place that names NBD, the repository and QEMU together.

mod backup;
mod catalog;
mod chain;
mod disk;
mod error;
mod event;
mod export;
mod info;
mod keys;
mod nbd_target;
mod outcome;
mod overlay;
mod plan;
mod read_disk;
mod restore;
mod selector;
mod serve;
mod since;
mod source;
mod target;
mod walk;
mod workers;

pub use crate::range::ByteRange;
pub use crate::repo::{BackupKind, DiskRecord, PasswordCost, SlotInfo, Snapshot};
pub use backup::{BackupDisk, BackupRequest, Follow, backup};
pub use catalog::{Catalog, InitRequest, SnapshotFilter, SnapshotsOutcome};
pub use chain::Reason;
pub use error::{Cause, EngineError, RepoFault, chain};
pub use event::{Event, Observer, Progress, ServedExport, Warning};
pub use export::SnapshotExport;
pub use info::{BitmapInfo, BlockSizeInfo, ContextMap, ExportInfo, InfoOutcome, InfoRequest, info};
pub use keys::{KeyAction, KeyOutcome, NewKey};
pub use outcome::{
    BackupOutcome, DiffOutcome, DiskBackup, InitOutcome, RestoreOutcome, ServeOutcome,
};
pub use plan::{Action, Geometry, Step, WindowPlan};
pub use restore::{RestoreRequest, restore};
pub use serve::{ServeRequest, ServeTls, serve};
pub use source::SourceSpec;
pub use target::Target;
