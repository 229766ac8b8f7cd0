//! The JSON lines of a run: the only types whose field names are an interface.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

use super::check::{CheckResult, CopyResult, RepairResult};
use super::{Failure, Outcome};
use crate::engine::{
    BackupKind, BackupOutcome, ByteRange, ContextMap, DiffOutcome, DiskBackup, DiskRecord,
    ExportInfo, ForgetOutcome, InfoOutcome, InitOutcome, Kept, KeyOutcome, Progress, PruneOutcome,
    Pruned, RestoreOutcome, ServeOutcome, ServedExport, SlotInfo, Snapshot, SnapshotsOutcome,
    Warning,
};

/// The number of the schema; fields are only ever added within one.
const SCHEMA: u32 = 1;

/// Encodes one line of output.
pub(super) fn line(run: &str, body: &Body) -> String {
    #[derive(Serialize)]
    struct Line<'a> {
        schema: u32,
        #[serde(flatten)]
        body: &'a Body,
        time: String,
        run: &'a str,
    }
    let line = Line {
        schema: SCHEMA,
        body,
        time: time(Utc::now()),
        run,
    };
    let mut text = serde_json::to_string(&line).expect("structs with named fields are JSON");
    text.push('\n');
    text
}

/// What one line says; its `type` is the variant's name.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(super) enum Body {
    Progress(ProgressLine),
    Warning(WarningLine),
    Serving(ServingLine),
    Result(Box<ResultLine>),
    Error(ErrorLine),
}

#[derive(Serialize)]
pub(super) struct ErrorLine {
    code: &'static str,
    exit_code: u8,
    message: String,
    hint: Option<&'static str>,
    retryable: bool,
}

impl From<&Failure> for ErrorLine {
    fn from(f: &Failure) -> Self {
        Self {
            code: f.code,
            exit_code: f.exit_code,
            message: f.message.clone(),
            hint: f.hint,
            retryable: f.retryable,
        }
    }
}

#[derive(Serialize)]
pub(super) struct WarningLine {
    code: &'static str,
    disk: Option<String>,
    message: String,
}

impl From<&Warning> for WarningLine {
    fn from(w: &Warning) -> Self {
        Self {
            code: w.code,
            disk: w.disk.clone(),
            message: w.message.clone(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct ProgressLine {
    disk: String,
    done_bytes: u64,
    total_bytes: u64,
    moved_bytes: u64,
    new_bytes: u64,
}

impl From<&Progress> for ProgressLine {
    fn from(p: &Progress) -> Self {
        Self {
            disk: p.disk.clone(),
            done_bytes: p.done_bytes,
            total_bytes: p.total_bytes,
            moved_bytes: p.moved_bytes,
            new_bytes: p.new_bytes,
        }
    }
}

#[derive(Serialize)]
pub(super) struct ServingLine {
    exports: Vec<ServedExportLine>,
}

#[derive(Serialize)]
struct ServedExportLine {
    name: String,
    uri: String,
    size_bytes: u64,
    writable: bool,
    overlay: Option<String>,
}

impl From<&[ServedExport]> for ServingLine {
    fn from(exports: &[ServedExport]) -> Self {
        let line = |e: &ServedExport| ServedExportLine {
            name: e.name.clone(),
            uri: e.uri.clone(),
            size_bytes: e.size_bytes,
            writable: e.overlay.is_some(),
            overlay: e.overlay.as_ref().map(|path| path.display().to_string()),
        };
        Self {
            exports: exports.iter().map(line).collect(),
        }
    }
}

/// The result of a command; `command` is the variant's name.
#[derive(Serialize)]
pub(super) struct ResultLine {
    command: &'static str,
    status: &'static str,
    #[serde(flatten)]
    detail: Detail,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Detail {
    Init(InitResult),
    Backup(BackupResult),
    Restore(RestoreResult),
    Serve(ServeResult),
    Snapshots(SnapshotsResult),
    Show { snapshot: SnapshotResult },
    Info(InfoResult),
    Diff(DiffResult),
    Forget(Box<ForgetResult>),
    Prune(Box<PruneResult>),
    Key(KeyResult),
    Check(Box<CheckResult>),
    Repair(Box<RepairResult>),
    Copy(CopyResult),
}

impl From<&Outcome> for ResultLine {
    fn from(outcome: &Outcome) -> Self {
        let (command, detail) = match outcome {
            Outcome::Init(o) => ("init", Detail::Init(o.into())),
            Outcome::Backup(o) => (kind(o.asked), Detail::Backup(o.into())),
            Outcome::Restore(o) => ("restore", Detail::Restore(o.into())),
            Outcome::Serve(o) => ("restore", Detail::Serve(o.into())),
            Outcome::Snapshots(o) => ("snapshots", Detail::Snapshots(o.into())),
            Outcome::Show(s) => (
                "show",
                Detail::Show {
                    snapshot: s.as_ref().into(),
                },
            ),
            Outcome::Info(o) => ("info", Detail::Info(o.into())),
            Outcome::Diff(o) => ("diff", Detail::Diff(o.into())),
            Outcome::Forget(o) => ("forget", Detail::Forget(Box::new(o.into()))),
            Outcome::Prune(o) => ("prune", Detail::Prune(Box::new(o.into()))),
            Outcome::Key(o) => ("key", Detail::Key(o.into())),
            Outcome::Check(o) => ("check", Detail::Check(Box::new(o.into()))),
            Outcome::Repair(o) => ("repair", Detail::Repair(Box::new(o.into()))),
            Outcome::Copy(o) => ("copy", Detail::Copy(o.into())),
        };
        Self {
            command,
            status: if outcome.is_damaged() {
                "damaged"
            } else {
                "ok"
            },
            detail,
        }
    }
}

#[derive(Serialize)]
struct InitResult {
    repository: String,
    uuid: String,
    chunk_bytes: u64,
    compression: String,
    encryption: &'static str,
    parity_shards: u8,
}

impl From<&InitOutcome> for InitResult {
    fn from(o: &InitOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            uuid: o.uuid.clone(),
            chunk_bytes: o.chunk_bytes,
            compression: o.compression.clone(),
            encryption: o.encryption,
            parity_shards: o.parity,
        }
    }
}

#[derive(Serialize)]
struct BackupResult {
    repository: String,
    snapshot: String,
    name: String,
    started: String,
    finished: String,
    duration_seconds: f64,
    disks: Vec<DiskBackupResult>,
    resumed_bytes: u64,
    stages: Vec<StageResult>,
    warnings: Vec<WarningLine>,
}

#[derive(Serialize)]
struct StageResult {
    stage: &'static str,
    busy_seconds: f64,
    depth: f64,
}

impl From<&BackupOutcome> for BackupResult {
    fn from(o: &BackupOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            snapshot: o.snapshot.clone(),
            name: o.name.clone(),
            started: time(o.started),
            finished: time(o.finished),
            duration_seconds: o.duration.as_secs_f64(),
            disks: o.disks.iter().map(Into::into).collect(),
            resumed_bytes: o.resumed_bytes,
            stages: o
                .stages
                .iter()
                .map(|time| StageResult {
                    stage: time.stage,
                    busy_seconds: time.busy.as_secs_f64(),
                    depth: time.depth(o.duration),
                })
                .collect(),
            warnings: o.warnings.iter().map(Into::into).collect(),
        }
    }
}

#[derive(Serialize)]
struct DiskBackupResult {
    disk: String,
    kind: &'static str,
    reason: Option<&'static str>,
    parent: Option<String>,
    bitmap: Option<String>,
    size_bytes: u64,
    dirty_bytes: Option<u64>,
    read_bytes: u64,
    zero_bytes: u64,
    reread_bytes: u64,
    chunks_total: u64,
    chunks_new: u64,
    new_bytes: u64,
    stored_bytes: u64,
}

impl From<&DiskBackup> for DiskBackupResult {
    fn from(d: &DiskBackup) -> Self {
        Self {
            disk: d.disk.clone(),
            kind: kind(d.kind),
            reason: d.reason.map(|r| r.as_str()),
            parent: d.parent.clone(),
            bitmap: d.bitmap.clone(),
            size_bytes: d.size_bytes,
            dirty_bytes: d.dirty_bytes,
            read_bytes: d.read_bytes,
            zero_bytes: d.zero_bytes,
            reread_bytes: d.reread_bytes,
            chunks_total: d.chunks_total,
            chunks_new: d.chunks_new,
            new_bytes: d.new_bytes,
            stored_bytes: d.stored_bytes,
        }
    }
}

#[derive(Serialize)]
struct RestoreResult {
    repository: String,
    snapshot: String,
    disk: String,
    target: String,
    size_bytes: u64,
    written_bytes: u64,
    zero_bytes: u64,
    duration_seconds: f64,
}

impl From<&RestoreOutcome> for RestoreResult {
    fn from(o: &RestoreOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            snapshot: o.snapshot.clone(),
            disk: o.disk.clone(),
            target: o.target.clone(),
            size_bytes: o.size_bytes,
            written_bytes: o.written_bytes,
            zero_bytes: o.zero_bytes,
            duration_seconds: o.duration.as_secs_f64(),
        }
    }
}

#[derive(Serialize)]
struct ServeResult {
    repository: String,
    snapshot: String,
    address: String,
    duration_seconds: f64,
}

impl From<&ServeOutcome> for ServeResult {
    fn from(o: &ServeOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            snapshot: o.snapshot.clone(),
            address: o.address.clone(),
            duration_seconds: o.duration.as_secs_f64(),
        }
    }
}

#[derive(Serialize)]
struct SnapshotsResult {
    repository: String,
    snapshots: Vec<SnapshotResult>,
    unreadable: Vec<String>,
}

impl From<&SnapshotsOutcome> for SnapshotsResult {
    fn from(o: &SnapshotsOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            snapshots: o.snapshots.iter().map(Into::into).collect(),
            unreadable: o.unreadable.clone(),
        }
    }
}

#[derive(Serialize)]
struct SnapshotResult {
    id: String,
    name: String,
    tags: Vec<String>,
    started: String,
    finished: String,
    tool: String,
    origin: Option<OriginResult>,
    disks: Vec<DiskRecordResult>,
}

impl From<&Snapshot> for SnapshotResult {
    fn from(s: &Snapshot) -> Self {
        Self {
            id: s.id.to_string(),
            name: s.draft.name.clone(),
            tags: s.draft.tags.clone(),
            started: unix_time(s.draft.started_unix_nanos),
            finished: unix_time(s.draft.finished_unix_nanos),
            tool: s.draft.tool.clone(),
            origin: s.draft.origin.map(|o| OriginResult {
                repository: o.repo.to_string(),
                snapshot: o.snapshot.to_string(),
            }),
            disks: s.draft.disks.iter().map(Into::into).collect(),
        }
    }
}

#[derive(Serialize)]
struct OriginResult {
    repository: String,
    snapshot: String,
}

#[derive(Serialize)]
struct DiskRecordResult {
    disk: String,
    kind: &'static str,
    reason: Option<String>,
    parent: Option<String>,
    bitmap: Option<String>,
    bitmaps_started: Vec<String>,
    source: String,
    size_bytes: u64,
    dirty_bytes: u64,
    read_bytes: u64,
    zero_bytes: u64,
    chunks_total: u64,
    chunks_new: u64,
    new_bytes: u64,
    stored_bytes: u64,
}

impl From<&DiskRecord> for DiskRecordResult {
    fn from(d: &DiskRecord) -> Self {
        Self {
            disk: d.disk.clone(),
            kind: kind(d.kind),
            reason: d.reason.clone(),
            parent: d.parent.map(|p| p.to_string()),
            bitmap: d.bitmap_used.clone(),
            bitmaps_started: d.bitmaps_started.clone(),
            source: d.source.clone(),
            size_bytes: d.size_bytes,
            dirty_bytes: d.stats.dirty_bytes,
            read_bytes: d.stats.read_bytes,
            zero_bytes: d.stats.zero_bytes,
            chunks_total: d.stats.chunks_total,
            chunks_new: d.stats.chunks_new,
            new_bytes: d.stats.new_bytes,
            stored_bytes: d.stats.stored_bytes,
        }
    }
}

#[derive(Serialize)]
struct InfoResult {
    source: String,
    exports: Vec<ExportResult>,
    maps: Option<Vec<MapResult>>,
    bitmap: Option<BitmapResult>,
}

impl From<&InfoOutcome> for InfoResult {
    fn from(o: &InfoOutcome) -> Self {
        Self {
            source: o.source.clone(),
            exports: o.exports.iter().map(Into::into).collect(),
            maps: o
                .maps
                .as_ref()
                .map(|maps| maps.iter().map(Into::into).collect()),
            bitmap: o.bitmap.as_ref().map(|b| BitmapResult {
                name: b.name.clone(),
                dirty_bytes: b.dirty_bytes,
            }),
        }
    }
}

#[derive(Serialize)]
struct BitmapResult {
    name: String,
    dirty_bytes: u64,
}

#[derive(Serialize)]
struct ExportResult {
    name: String,
    size_bytes: u64,
    description: Option<String>,
    flags: Vec<&'static str>,
    block_size: BlockSizeResult,
    contexts: Vec<String>,
    structured_replies: Option<bool>,
    tls: bool,
}

#[derive(Serialize)]
struct BlockSizeResult {
    minimum_bytes: u32,
    preferred_bytes: u32,
    maximum_bytes: u32,
}

impl From<&ExportInfo> for ExportResult {
    fn from(e: &ExportInfo) -> Self {
        Self {
            name: e.name.clone(),
            size_bytes: e.size_bytes,
            description: e.description.clone(),
            flags: e.flags.clone(),
            block_size: BlockSizeResult {
                minimum_bytes: e.block_size.minimum,
                preferred_bytes: e.block_size.preferred,
                maximum_bytes: e.block_size.maximum,
            },
            contexts: e.contexts.clone(),
            structured_replies: e.structured_replies,
            tls: e.tls,
        }
    }
}

#[derive(Serialize)]
struct MapResult {
    context: String,
    extents: Vec<ExtentResult>,
}

#[derive(Serialize)]
struct ExtentResult {
    offset_bytes: u64,
    length_bytes: u64,
    flags: u64,
}

impl From<&ContextMap> for MapResult {
    fn from(map: &ContextMap) -> Self {
        let extent = |&(range, flags): &(ByteRange, u64)| ExtentResult {
            offset_bytes: range.start(),
            length_bytes: range.len(),
            flags,
        };
        Self {
            context: map.context.clone(),
            extents: map.extents.iter().map(extent).collect(),
        }
    }
}

#[derive(Serialize)]
struct DiffResult {
    a: String,
    b: String,
    disk: String,
    a_size_bytes: u64,
    b_size_bytes: u64,
    differing_bytes: u64,
    ranges: Vec<RangeResult>,
}

#[derive(Serialize)]
struct RangeResult {
    offset_bytes: u64,
    length_bytes: u64,
}

impl From<&DiffOutcome> for DiffResult {
    fn from(o: &DiffOutcome) -> Self {
        let range = |r: &ByteRange| RangeResult {
            offset_bytes: r.start(),
            length_bytes: r.len(),
        };
        Self {
            a: o.a.clone(),
            b: o.b.clone(),
            disk: o.disk.clone(),
            a_size_bytes: o.sizes_bytes[0],
            b_size_bytes: o.sizes_bytes[1],
            differing_bytes: o.ranges.iter().map(|r| r.len()).sum(),
            ranges: o.ranges.iter().map(range).collect(),
        }
    }
}

#[derive(Serialize)]
struct ForgetResult {
    repository: String,
    dry_run: bool,
    forgotten: Vec<SnapshotResult>,
    kept: Vec<KeptResult>,
    undeleted: Vec<SnapshotResult>,
    prune: Option<PrunedResult>,
}

#[derive(Serialize)]
struct KeptResult {
    snapshot: SnapshotResult,
    reasons: Vec<KeptReason>,
}

#[derive(Serialize)]
struct KeptReason {
    disk: String,
    rule: &'static str,
}

impl From<&ForgetOutcome> for ForgetResult {
    fn from(o: &ForgetOutcome) -> Self {
        let kept = |(snapshot, reasons): &(Snapshot, Vec<Kept>)| KeptResult {
            snapshot: snapshot.into(),
            reasons: reasons
                .iter()
                .map(|r| KeptReason {
                    disk: r.disk.clone(),
                    rule: r.rule,
                })
                .collect(),
        };
        Self {
            repository: o.repository.clone(),
            dry_run: o.dry_run,
            forgotten: o.forgotten.iter().map(Into::into).collect(),
            kept: o.kept.iter().map(kept).collect(),
            undeleted: o.had_back.iter().map(Into::into).collect(),
            prune: o.prune.as_ref().map(Into::into),
        }
    }
}

#[derive(Serialize)]
struct PruneResult {
    repository: String,
    dry_run: bool,
    #[serde(flatten)]
    pruned: PrunedResult,
}

impl From<&PruneOutcome> for PruneResult {
    fn from(o: &PruneOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            dry_run: o.dry_run,
            pruned: (&o.pruned).into(),
        }
    }
}

#[derive(Serialize)]
struct PrunedResult {
    snapshots_removed: u64,
    packs_removed: u64,
    removed_bytes: u64,
    removed_parity_bytes: u64,
    packs_repacked: u64,
    written_bytes: u64,
    packs_waiting: u64,
    waiting_bytes: u64,
    waiting_for: Vec<String>,
    total_bytes: u64,
    unused_bytes: u64,
    damaged: Vec<String>,
    no_room: bool,
}

impl From<&Pruned> for PrunedResult {
    fn from(p: &Pruned) -> Self {
        Self {
            snapshots_removed: p.snapshots_removed,
            packs_removed: p.packs_removed,
            removed_bytes: p.removed_bytes,
            removed_parity_bytes: p.removed_parity_bytes,
            packs_repacked: p.packs_repacked,
            written_bytes: p.written_bytes,
            packs_waiting: p.packs_waiting,
            waiting_bytes: p.waiting_bytes,
            waiting_for: p.waiting_for.iter().map(ToString::to_string).collect(),
            total_bytes: p.total_bytes,
            unused_bytes: p.unused_bytes,
            damaged: p.damaged.iter().map(|(_, e)| e.to_string()).collect(),
            no_room: p.no_room,
        }
    }
}

#[derive(Serialize)]
struct KeyResult {
    repository: String,
    action: &'static str,
    added: Option<u32>,
    removed: Option<u32>,
    slots: Vec<SlotResult>,
}

impl From<&KeyOutcome> for KeyResult {
    fn from(o: &KeyOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            action: o.action.as_str(),
            added: o.added,
            removed: o.removed,
            slots: o.slots.iter().map(Into::into).collect(),
        }
    }
}

#[derive(Serialize)]
struct SlotResult {
    slot: u32,
    kind: &'static str,
    label: Option<String>,
    current: bool,
    argon2_memory_bytes: Option<u64>,
    argon2_passes: Option<u32>,
}

impl From<&SlotInfo> for SlotResult {
    fn from(s: &SlotInfo) -> Self {
        Self {
            slot: s.number,
            kind: s.kind.as_str(),
            label: s.label.clone(),
            current: s.current,
            argon2_memory_bytes: s.cost.map(|c| u64::from(c.memory_kib()) << 10),
            argon2_passes: s.cost.map(|c| c.passes()),
        }
    }
}

/// The word for how a disk was read.
pub(super) fn kind(kind: BackupKind) -> &'static str {
    match kind {
        BackupKind::Full => "full",
        BackupKind::Incremental => "incremental",
    }
}

fn unix_time(nanos: i64) -> String {
    time(DateTime::from_timestamp_nanos(nanos))
}

fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}
