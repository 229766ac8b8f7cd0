//! `nbdbackup full` and `nbdbackup incremental`

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::args::{Backup, Full, Global, Incremental};
use crate::cli::config;
use crate::engine::{BackupDisk, BackupRequest, EngineError, Follow, SourceSpec, backup};
use crate::report::{Failure, Outcome, Reporter};

pub(super) async fn full(
    global: &Global,
    args: Full,
    reporter: Arc<Reporter>,
    ended: impl Future<Output = u8> + Send,
) -> Result<Outcome, Failure> {
    run(global, args.backup, None, reporter, ended).await
}

pub(super) async fn incremental(
    global: &Global,
    args: Incremental,
    reporter: Arc<Reporter>,
    ended: impl Future<Output = u8> + Send,
) -> Result<Outcome, Failure> {
    let Some(bitmap) = args.backup.bitmap.clone() else {
        return Err(Failure::usage(
            "an incremental follows a dirty bitmap: name it with --bitmap; nbdbackup info lists those that exist",
        ));
    };
    let follow = Follow {
        bitmap,
        parent: args.parent,
        no_fallback: args.no_fallback,
    };
    run(global, args.backup, Some(follow), reporter, ended).await
}

async fn run(
    global: &Global,
    args: Backup,
    follow: Option<Follow>,
    reporter: Arc<Reporter>,
    ended: impl Future<Output = u8> + Send,
) -> Result<Outcome, Failure> {
    let mut signal = 0;
    let stop = async { signal = ended.await };
    match run_until(global, args, follow, reporter, stop).await {
        Ok(outcome) => Ok(outcome),
        Err(EngineError::Stopped) => Err(Failure::signal(signal)),
        Err(error) => Err(Failure::from(&error)),
    }
}

async fn run_until(
    global: &Global,
    args: Backup,
    follow: Option<Follow>,
    reporter: Arc<Reporter>,
    stop: impl Future<Output = ()> + Send,
) -> Result<Outcome, EngineError> {
    let disks = disks(&args)?;
    let compression = match &args.compression.compression {
        Some(text) => Some(config::compression(text)?),
        None => None,
    };
    let mut starts = args.starts;
    if follow.is_none() {
        starts.extend(args.bitmap);
    }
    let request = BackupRequest {
        name: args.name.unwrap_or_else(|| disks[0].disk.clone()),
        disks,
        tags: args.tag,
        follow,
        starts,
        connections: args.connections,
        retry_time: Duration::from_secs_f64(args.retry_time),
        checkpoint_interval_bytes: args.checkpoint_interval,
        compression,
        verify_writes: !args.no_verify_writes,
    };
    let catalog = config::open(global).await?;
    backup(&catalog, request, reporter, stop)
        .await
        .map(Outcome::Backup)
}

/// Names each source's disk: by `--disk` in the order of the sources, else after the export or the file.
fn disks(args: &Backup) -> Result<Vec<BackupDisk>, EngineError> {
    if !args.disk.is_empty() && args.disk.len() != args.sources.len() {
        return Err(EngineError::Usage(format!(
            "{} sources and {} names of disks: give --disk once for each source, or not at all",
            args.sources.len(),
            args.disk.len()
        )));
    }
    let mut seen = HashSet::new();
    let mut disks = Vec::new();
    for (at, text) in args.sources.iter().enumerate() {
        let source = SourceSpec::parse(text, args.format.as_deref())?;
        let disk = args
            .disk
            .get(at)
            .cloned()
            .unwrap_or_else(|| source.disk_name());
        if !seen.insert(disk.clone()) {
            return Err(EngineError::Usage(format!(
                "two sources are named disk {disk}: tell them apart with --disk"
            )));
        }
        disks.push(BackupDisk { disk, source });
    }
    Ok(disks)
}
