//! Backup, restore, verify and diff: the only place that names NBD, the repository and QEMU together.

mod backup;
mod catalog;
mod chain;
mod check;
mod copy;
mod disk;
mod error;
mod event;
mod export;
mod forget;
mod info;
mod keys;
mod nbd_target;
mod outcome;
mod overlay;
mod plan;
mod read_disk;
mod restore;
mod retention;
mod selector;
mod serve;
mod since;
mod source;
mod stages;
mod target;
mod walk;
mod workers;

pub use crate::range::ByteRange;
pub use crate::repo::{
    BackupKind, Checked, DamagedFile, DamagedRange, DiskRecord, PasswordCost, Pruned, SlotInfo,
    Snapshot,
};
pub use backup::{BackupDisk, BackupRequest, Follow, backup};
pub use catalog::{Catalog, InitRequest, SnapshotFilter, SnapshotsOutcome};
pub use chain::Reason;
pub use check::{CheckOutcome, CheckRequest, RepairOutcome, check_keyless};
pub use copy::{CopiedSnapshot, CopyOutcome, CopyRequest};
pub use error::{Cause, EngineError, RepoFault, chain};
pub use event::{Event, Observer, Progress, ServedExport, Warning};
pub use export::SnapshotExport;
pub use forget::{ForgetOutcome, ForgetRequest, PruneOutcome, PruneRequest};
pub use info::{BitmapInfo, BlockSizeInfo, ContextMap, ExportInfo, InfoOutcome, InfoRequest, info};
pub use keys::{KeyAction, KeyOutcome, NewKey};
pub use outcome::{
    BackupOutcome, DiffOutcome, DiskBackup, InitOutcome, RestoreOutcome, ServeOutcome,
};
pub use plan::{Action, Geometry, Step, WindowPlan};
pub use restore::{RestoreRequest, restore};
pub use retention::{Kept, Rules};
pub use serve::{ServeRequest, ServeTls, serve};
pub use source::SourceSpec;
pub use stages::StageTime;
pub use target::Target;
