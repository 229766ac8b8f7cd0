//! A backup run: opens the sources, proves the chain, reads the disks, and commits one snapshot at the end.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::catalog::Catalog;
use super::chain::{History, Parent, Reason, next_generation, parent_asserted, parent_by_bitmap};
use super::event::{Event, Observer, Warning};
use super::outcome::{BackupOutcome, DiskBackup};
use super::plan::Geometry;
use super::read_disk::{ReadDisk, Tally, read_disk};
use super::source::{BitmapState, OpenSource, SourceSpec};
use super::stages::SourceMeters;
use super::walk::Contexts;
use super::workers::{Workers, blocking};
use super::{EngineError, selector};
use crate::repo::{
    BackupKind, CheckpointOptions, Compression, DiskRecord, DiskStats, Session, SessionOptions,
    SnapshotDraft, SnapshotId,
};

/// What a backup is asked to do.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// The machine's name.
    pub name: String,
    /// The disks, all stored in one snapshot.
    pub disks: Vec<BackupDisk>,
    /// The snapshot's tags.
    pub tags: Vec<String>,
    /// The bitmap that an incremental follows; `None` reads the disks in full.
    pub follow: Option<Follow>,
    /// Bitmaps that start recording at this point in time.
    pub starts: Vec<String>,
    /// The most connections to one export.
    pub connections: u8,
    /// How long to try to connect anew to an export whose connections were lost; zero takes each failure as final.
    pub retry_time: Duration,
    /// After how many stored bytes to keep them for the next run, should this one not end well; 0 for never.
    pub checkpoint_interval_bytes: u64,
    /// The compression, where it is not the repository's own.
    pub compression: Option<Compression>,
    /// Whether what is stored is decoded again and checked before it is written.
    pub verify_writes: bool,
}

/// One disk of a backup.
#[derive(Clone, Debug)]
pub struct BackupDisk {
    /// The disk's name in the snapshot.
    pub disk: String,
    /// Where it is read from.
    pub source: SourceSpec,
}

/// What an incremental follows.
#[derive(Clone, Debug)]
pub struct Follow {
    /// The bitmap's name.
    pub bitmap: String,
    /// The snapshot that the caller asserts as the parent.
    pub parent: Option<String>,
    /// Whether to fail rather than read a disk in full.
    pub no_fallback: bool,
}

/// Reads the disks and stores them as one snapshot.
///
/// The snapshot is the commit point: until it is durable nothing of the run is visible, and when this returns, it is.
///
/// # Errors
/// When a source cannot be opened or fails, when the repository fails, when an incremental is impossible and the
/// request forbids a full read, or when `stop` is done first; in each case nothing is committed.
pub async fn backup(
    catalog: &Catalog,
    request: BackupRequest,
    observer: Arc<dyn Observer>,
    stop: impl Future<Output = ()> + Send,
) -> Result<BackupOutcome, EngineError> {
    let mut run = Run {
        catalog,
        request: &request,
        observer,
        started: Utc::now(),
        clock: Instant::now(),
        meters: Arc::default(),
        warnings: Vec::new(),
    };
    let mut opened = Vec::new();
    let read = tokio::select! {
        read = run.read(&mut opened) => read,
        () = stop => Err(EngineError::Stopped),
    };
    // Also after a failure: some servers die of a client that leaves with requests in flight.
    let closed = futures::future::join_all(opened.into_iter().map(|disk| disk.source.close()));
    if tokio::time::timeout(GOODBYE, closed).await.is_err() {
        tracing::info!("a source did not answer the goodbye");
    }
    // From here on the run is not stopped any more, so that its last word is true.
    run.commit(read?).await
}

struct Run<'a> {
    catalog: &'a Catalog,
    request: &'a BackupRequest,
    observer: Arc<dyn Observer>,
    started: DateTime<Utc>,
    clock: Instant,
    meters: Arc<SourceMeters>,
    warnings: Vec<Warning>,
}

/// All disks, read and stored, with nothing of them visible yet.
struct ReadDisks {
    session: Arc<Session>,
    records: Vec<DiskRecord>,
    reports: Vec<DiskBackup>,
}

/// A disk whose source is open and whose way of reading is decided.
struct OpenDisk {
    name: String,
    source: OpenSource,
    described: String,
    parent: Option<(SnapshotId, DiskRecord)>,
    reason: Option<Reason>,
    generation: u64,
    bitmap_lost: bool,
}

impl Run<'_> {
    /// Opens the sources and reads all disks into a session.
    async fn read(&mut self, opened: &mut Vec<OpenDisk>) -> Result<ReadDisks, EngineError> {
        let list = self.catalog.snapshots().await?;
        for (file, why) in &list.unreadable {
            self.warn(
                "snapshot-unreadable",
                None,
                format!("{file} cannot be read: {why}"),
            );
        }
        let history = History::from(list);
        for disk in &self.request.disks {
            let open = self.open(disk, &history).await?;
            opened.push(open);
        }
        let session = self.begin(opened).await?;
        let workers = Workers::start();
        let (mut records, mut reports) = (Vec::new(), Vec::new());
        for disk in opened.iter() {
            let (record, report) = self.one(disk, &session, &workers).await?;
            let reconnects = disk.source.client.reconnects();
            if reconnects > 0 {
                let message = format!(
                    "the connection was lost and made anew {reconnects} times; what was being read was read again"
                );
                self.warn("source-reconnected", Some(&disk.name), message);
            }
            records.push(record);
            reports.push(report);
        }
        Ok(ReadDisks {
            session,
            records,
            reports,
        })
    }

    /// Opens a disk's source and decides, by the chain rule, what it may inherit.
    async fn open(
        &mut self,
        disk: &BackupDisk,
        history: &History,
    ) -> Result<OpenDisk, EngineError> {
        let mut reason = None;
        let mut bitmap_lost = false;
        let mut contexts = vec![ALLOCATION.to_owned()];
        let mut image_bitmap = None;
        if let Some(follow) = &self.request.follow {
            match disk.source.bitmap_state(&follow.bitmap).await? {
                BitmapState::Usable => {
                    contexts.push(dirty_context(&follow.bitmap));
                    image_bitmap = Some(follow.bitmap.as_str());
                }
                BitmapState::Missing => reason = Some(Reason::BitmapMissing),
                BitmapState::Inconsistent => reason = Some(Reason::BitmapInconsistent),
                BitmapState::NotRecording => reason = Some(Reason::BitmapNotRecording),
            }
            bitmap_lost = reason.is_some();
        }
        let source = disk
            .source
            .open(
                contexts,
                image_bitmap,
                self.request.connections,
                self.request.retry_time,
            )
            .await?;
        let export = source.client.export();
        let granted = |context: &str| export.context(context).is_some();
        let size_bytes = export.size_bytes;
        if !granted(ALLOCATION) {
            let message = "the server offers no base:allocation, so that each byte is read";
            self.warn("no-allocation", Some(&disk.disk), message.to_owned());
        }
        let mut parent = None;
        if let Some(follow) = &self.request.follow {
            if reason.is_none() && !granted(&dirty_context(&follow.bitmap)) {
                reason = Some(Reason::BitmapMissing);
                bitmap_lost = true;
            }
            match self.parent(follow, &disk.disk, history)? {
                Ok(found) if reason.is_none() && size_bytes < found.disk.size_bytes => {
                    reason = Some(Reason::DiskShrunk);
                }
                Ok(found) if reason.is_none() => {
                    parent = Some((found.snapshot, found.disk.clone()))
                }
                Ok(_) => {}
                // Without a parent, the bitmap's state would not have helped.
                Err(why) => reason = Some(why),
            }
        }
        let open = OpenDisk {
            name: disk.disk.clone(),
            source,
            described: disk.source.text().to_owned(),
            parent,
            reason,
            generation: next_generation(history, &self.request.name, &disk.disk),
            bitmap_lost,
        };
        match (&self.request.follow, reason) {
            (
                Some(Follow {
                    no_fallback: true, ..
                }),
                Some(reason),
            ) => {
                open.source.close().await;
                Err(EngineError::IncrementalImpossible {
                    disk: disk.disk.clone(),
                    reason,
                })
            }
            (_, Some(reason)) => {
                let message = format!("reading in full ({reason}): {}", reason.explain());
                self.warn("full-read", Some(&disk.disk), message);
                Ok(open)
            }
            (_, None) => Ok(open),
        }
    }

    fn parent<'s>(
        &self,
        follow: &Follow,
        disk: &str,
        history: &'s History,
    ) -> Result<Result<Parent<'s>, Reason>, EngineError> {
        Ok(match &follow.parent {
            Some(words) => match selector::select(&history.snapshots, words) {
                Ok(found) => parent_asserted(Some(found), disk),
                Err(EngineError::SnapshotNotFound(_)) => parent_asserted(None, disk),
                Err(error) => return Err(error),
            },
            None => parent_by_bitmap(history, &self.request.name, disk, &follow.bitmap),
        })
    }

    async fn begin(&self, disks: &[OpenDisk]) -> Result<Arc<Session>, EngineError> {
        let repository = Arc::clone(self.catalog.repository());
        let interval_bytes = self.request.checkpoint_interval_bytes;
        let usual = SessionOptions::default();
        let options = SessionOptions {
            compression: self.request.compression,
            verify_writes: self.request.verify_writes,
            // Only packs that are closed can be kept.
            pack_bytes: match interval_bytes {
                0 => usual.pack_bytes,
                _ => usual.pack_bytes.min(interval_bytes.max(LEAST_PACK_BYTES)),
            },
            checkpoints: (interval_bytes > 0).then(|| CheckpointOptions {
                name: self.request.name.clone(),
                disks: disks
                    .iter()
                    .map(|d| (d.name.clone(), d.generation))
                    .collect(),
                interval_bytes,
            }),
            parents: disks
                .iter()
                .filter_map(|d| Some(d.parent.as_ref()?.0))
                .collect(),
            ..usual
        };
        let session = blocking(move || repository.begin(&options))
            .await?
            .map_err(self.catalog.failed())?;
        Ok(Arc::new(session))
    }

    /// Reads one disk into the session.
    async fn one(
        &mut self,
        disk: &OpenDisk,
        session: &Arc<Session>,
        workers: &Workers,
    ) -> Result<(DiskRecord, DiskBackup), EngineError> {
        let export = disk.source.client.export();
        let geometry = self.catalog.geometry(export.size_bytes);
        let follow = self.request.follow.as_ref();
        let again = self.damaged(disk, geometry).await?;
        let again_bytes = again.iter().map(|run| geometry.bytes(run).len()).sum();
        let task = ReadDisk {
            again,
            disk: disk.name.clone(),
            geometry,
            parent: disk
                .parent
                .as_ref()
                .map(|(_, record)| (record.root, record.size_bytes)),
            contexts: Contexts {
                // Without a parent all is read, whatever the bitmap says.
                dirty: follow
                    .filter(|_| disk.parent.is_some())
                    .and_then(|f| export.context(&dirty_context(&f.bitmap))),
                allocation: export.context(ALLOCATION),
            },
        };
        let (root, tally) = read_disk(
            self.catalog,
            session,
            &disk.source.client,
            workers,
            &self.meters,
            &*self.observer,
            task,
        )
        .await?;

        let Tally {
            read_bytes,
            zero_bytes,
            chunks_new,
            new_bytes,
            stored_bytes,
            ..
        } = tally;
        let incremental = disk.parent.is_some();
        let dirty_bytes = incremental.then_some(tally.dirty_bytes);
        let parent = disk.parent.as_ref().map(|(id, _)| *id);
        let bitmap = follow.map(|f| f.bitmap.clone());
        let kind = if incremental {
            BackupKind::Incremental
        } else {
            BackupKind::Full
        };
        let report = DiskBackup {
            disk: disk.name.clone(),
            kind,
            reason: disk.reason,
            parent: parent.map(|id| id.to_string()),
            bitmap: bitmap
                .clone()
                .or_else(|| self.request.starts.first().cloned()),
            size_bytes: geometry.size_bytes,
            dirty_bytes,
            read_bytes,
            zero_bytes,
            reread_bytes: again_bytes,
            chunks_total: geometry.chunks(),
            chunks_new,
            new_bytes,
            stored_bytes,
        };
        let (bitmap_used, bitmaps_lost) = if disk.bitmap_lost {
            (None, Vec::from_iter(bitmap))
        } else {
            (bitmap, Vec::new())
        };
        let record = DiskRecord {
            disk: disk.name.clone(),
            size_bytes: geometry.size_bytes,
            root,
            kind,
            reason: disk.reason.map(|r| r.as_str().to_owned()),
            parent,
            generation: disk.generation,
            bitmap_used,
            bitmaps_started: self.request.starts.clone(),
            bitmaps_lost,
            source: disk.described.clone(),
            stats: DiskStats {
                dirty_bytes: tally.dirty_bytes,
                read_bytes,
                zero_bytes,
                chunks_total: geometry.chunks(),
                chunks_new,
                new_bytes,
                stored_bytes,
            },
        };
        Ok((record, report))
    }

    /// Finds what the parent has lost: it is read again, clean or not, and heals all snapshots if it is still the same.
    async fn damaged(
        &mut self,
        disk: &OpenDisk,
        geometry: Geometry,
    ) -> Result<Vec<Range<u64>>, EngineError> {
        let Some((_, parent)) = &disk.parent else {
            return Ok(Vec::new());
        };
        let (repository, root) = (Arc::clone(self.catalog.repository()), parent.root);
        let mut again = blocking(move || repository.damaged_chunks(&root))
            .await?
            .map_err(self.catalog.failed())?;
        for run in &mut again {
            run.end = run.end.min(geometry.chunks());
        }
        again.retain(|run| !run.is_empty());
        if !again.is_empty() {
            let bytes: u64 = again.iter().map(|run| geometry.bytes(run).len()).sum();
            let message = format!(
                "{bytes} bytes are damaged in the parent snapshot; they are read again, in {} ranges",
                again.len()
            );
            self.warn("damaged-parent", Some(&disk.name), message);
        }
        Ok(again)
    }

    /// Publishes the snapshot.
    async fn commit(mut self, read: ReadDisks) -> Result<BackupOutcome, EngineError> {
        let ReadDisks {
            session,
            records,
            reports,
        } = read;
        let finished = Utc::now();
        let draft = SnapshotDraft {
            name: self.request.name.clone(),
            tags: self.request.tags.clone(),
            started_unix_nanos: nanos(self.started),
            finished_unix_nanos: nanos(finished),
            tool: concat!("nbdbackup ", env!("CARGO_PKG_VERSION")).to_owned(),
            complete: true,
            origin: None,
            disks: records,
        };
        let resumed_bytes = session.resumed_bytes();
        let committing = Arc::clone(&session);
        let snapshot = blocking(move || committing.commit(draft))
            .await?
            .map_err(self.catalog.failed())?;
        let duration = self.clock.elapsed();
        let stages = self.meters.with(session.meters());
        for time in &stages {
            let (stage, busy) = (time.stage, time.busy);
            let depth = format_args!("{:.2}", time.depth(duration)).to_string();
            tracing::debug!(stage, ?busy, depth, "time spent, and how much at a time");
        }
        Ok(BackupOutcome {
            asked: if self.request.follow.is_some() {
                BackupKind::Incremental
            } else {
                BackupKind::Full
            },
            repository: self.catalog.path().to_owned(),
            snapshot: snapshot.id.to_string(),
            name: self.request.name.clone(),
            started: self.started,
            finished,
            duration,
            disks: reports,
            resumed_bytes,
            stages,
            warnings: std::mem::take(&mut self.warnings),
        })
    }

    fn warn(&mut self, code: &'static str, disk: Option<&str>, message: String) {
        let warning = Warning {
            code,
            disk: disk.map(str::to_owned),
            message,
        };
        self.observer.observe(Event::Warning(warning.clone()));
        self.warnings.push(warning);
    }
}

/// The nanoseconds since 1970; 64 bits hold them until the year 2262.
fn nanos(time: DateTime<Utc>) -> i64 {
    time.timestamp_nanos_opt().unwrap_or(i64::MAX)
}

fn dirty_context(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}

/// How long the sources may take to end in order.
const GOODBYE: Duration = Duration::from_secs(5);
/// The least length at which a pack is closed for the sake of checkpoints.
const LEAST_PACK_BYTES: u64 = 1 << 20;
const ALLOCATION: &str = "base:allocation";
