//! Copying snapshots to another repository, of which it may lack all or a little, under another key or none.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::catalog::Catalog;
use super::error::EngineError;
use super::event::{Event, Observer, Progress};
use super::selector::select;
use super::workers::{Workers, blocking};
use super::{DiskRecord, Snapshot};
use crate::range::ByteRange;
use crate::repo::{
    ChunkEntry, Compression, MapReader, MapRoot, MapWriter, Origin, RepoError, Run, Session,
    SessionOptions, SnapshotDraft, SnapshotId, StoredChunk, changed,
};

/// What to copy.
#[derive(Clone, Debug, Default)]
pub struct CopyRequest {
    /// The words that address the snapshots; none means all.
    pub snapshots: Vec<String>,
    /// The compression, where it is not the target repository's own.
    pub compression: Option<Compression>,
}

/// What was copied.
#[derive(Clone, Debug)]
pub struct CopyOutcome {
    /// Where the snapshots came from.
    pub repository: String,
    /// Where they went.
    pub to: String,
    /// Those that were copied.
    pub copied: Vec<CopiedSnapshot>,
    /// Those that were there already.
    pub skipped: Vec<SnapshotId>,
    /// Those that cannot be copied because they are damaged, with the reasons.
    pub failed: Vec<(String, String)>,
    /// How long it took.
    pub duration: Duration,
}

/// One snapshot that was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopiedSnapshot {
    /// Its id where it came from.
    pub from: String,
    /// Its id where it went.
    pub to: String,
    /// The machine's name.
    pub name: String,
    /// What was read of it: what differs from a snapshot that was copied before.
    pub read_bytes: u64,
    /// The chunks that the target did not have.
    pub chunks_new: u64,
    /// Their bytes before compression.
    pub new_bytes: u64,
    /// Their bytes as they are stored.
    pub stored_bytes: u64,
}

impl Catalog {
    /// Copies snapshots to another repository with chunks of the same size, oldest first.
    ///
    /// Each becomes visible there when it is complete. What an interrupted run has sent is not sent again.
    ///
    /// # Errors
    /// When the chunk sizes differ, a snapshot is unknown, or one of the repositories fails. A snapshot that is damaged
    /// is named in the outcome, and the others are copied.
    pub async fn copy_to(
        &self,
        target: &Catalog,
        request: CopyRequest,
        observer: Arc<dyn Observer>,
    ) -> Result<CopyOutcome, EngineError> {
        let clock = Instant::now();
        let (ours, theirs) = (self.repository(), target.repository());
        if ours.chunk_size() != theirs.chunk_size() {
            return Err(EngineError::Usage(format!(
                "{} has chunks of {}, {} of {}: snapshots can be copied between chunks of one size only",
                self.path(),
                ours.chunk_size(),
                target.path(),
                theirs.chunk_size()
            )));
        }
        if ours.uuid() == theirs.uuid() {
            return Err(EngineError::Usage(
                "both are the same repository, or one is a copy of the other's files".to_owned(),
            ));
        }
        let list = self.snapshots().await?;
        let mut failed: Vec<(String, String)> = Vec::new();
        let chosen: Vec<Snapshot> = match request.snapshots.is_empty() {
            true => {
                let unreadable = list.unreadable.iter();
                failed.extend(unreadable.map(|(file, why)| (file.clone(), why.to_string())));
                list.snapshots.clone()
            }
            false => named(&list.snapshots, &request.snapshots)?,
        };
        let adopt = Arc::clone(theirs);
        // What an interrupted run has sent is in packs that no index knows.
        blocking(move || adopt.rebuild_index())
            .await?
            .map_err(target.failed())?;
        let there = target.snapshots().await?.snapshots;
        let mut copies: HashMap<Origin, Snapshot> = HashMap::new();
        for snapshot in there {
            copies.insert(origin_of(&snapshot), snapshot);
        }
        let mut run = Copying {
            from: self.clone(),
            to: target.clone(),
            all: list.snapshots,
            copies,
            compression: request.compression,
            observer,
            workers: Workers::start(),
        };
        let (mut copied, mut skipped) = (Vec::new(), Vec::new());
        for snapshot in chosen {
            if run.copies.contains_key(&origin_of(&snapshot)) {
                skipped.push(snapshot.id);
                continue;
            }
            let id = snapshot.id;
            let pin = self.pin(&snapshot).await?;
            let (back, result) = blocking(move || {
                let result = run.one(&snapshot);
                (run, result)
            })
            .await?;
            drop(pin);
            run = back;
            match result {
                Ok(one) => copied.push(one),
                Err(error @ EngineError::Unrestorable { .. }) if damaged(&error) => {
                    failed.push((id.to_string(), super::chain(&error)));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(CopyOutcome {
            repository: self.path().to_owned(),
            to: target.path().to_owned(),
            copied,
            skipped,
            failed,
            duration: clock.elapsed(),
        })
    }
}

/// The snapshot that this one is, or is a copy of.
fn origin_of(snapshot: &Snapshot) -> Origin {
    snapshot.draft.origin.unwrap_or(Origin {
        repo: snapshot.repo,
        snapshot: snapshot.id,
    })
}

fn named(snapshots: &[Snapshot], words: &[String]) -> Result<Vec<Snapshot>, EngineError> {
    let mut found: Vec<Snapshot> = Vec::new();
    for words in words {
        let one = select(snapshots, words)?;
        if !found.iter().any(|s| s.id == one.id) {
            found.push(one.clone());
        }
    }
    found.sort_by_key(|s| (s.draft.started_unix_nanos, s.id));
    Ok(found)
}

fn damaged(error: &EngineError) -> bool {
    error.repo_fault() == Some(super::RepoFault::Damaged)
}

/// A copy under way; its calls block.
struct Copying {
    from: Catalog,
    to: Catalog,
    /// All snapshots of the source, oldest first.
    all: Vec<Snapshot>,
    /// What the target has, by what it is a copy of.
    copies: HashMap<Origin, Snapshot>,
    compression: Option<Compression>,
    observer: Arc<dyn Observer>,
    workers: Workers,
}

/// A disk that the target has, and what it was in the source.
#[derive(Clone)]
struct Base {
    ours: DiskRecord,
    theirs: DiskRecord,
    snapshot: SnapshotId,
}

impl Copying {
    fn one(&mut self, snapshot: &Snapshot) -> Result<CopiedSnapshot, EngineError> {
        let bases: Vec<Option<Base>> = snapshot
            .draft
            .disks
            .iter()
            .map(|disk| self.base(snapshot, disk))
            .collect();
        let options = SessionOptions {
            compression: self.compression,
            parents: bases.iter().flatten().map(|b| b.snapshot).collect(),
            ..SessionOptions::default()
        };
        let failed = self.to.failed();
        let session = self.to.repository().begin(&options).map_err(&failed)?;
        let mut done = CopiedSnapshot {
            from: snapshot.id.to_string(),
            name: snapshot.draft.name.clone(),
            ..CopiedSnapshot::default()
        };
        let mut disks = Vec::new();
        for (disk, base) in snapshot.draft.disks.iter().zip(bases) {
            let root = self.disk(snapshot, disk, base, &session, &mut done)?;
            disks.push(self.record(disk, root));
        }
        let draft = SnapshotDraft {
            origin: Some(origin_of(snapshot)),
            disks,
            ..snapshot.draft.clone()
        };
        let copy = session.commit(draft).map_err(failed)?;
        done.to = copy.id.to_string();
        self.copies.insert(origin_of(snapshot), copy);
        Ok(done)
    }

    /// Finds the nearest snapshot of the disk that the target has: only what differs from it is read.
    fn base(&self, snapshot: &Snapshot, disk: &DiskRecord) -> Option<Base> {
        let of_disk = |s: &Snapshot| {
            let same = s.draft.name == snapshot.draft.name;
            let mut disks = s.draft.disks.iter().filter(|_| same);
            disks.find(|d| d.disk == disk.disk).cloned()
        };
        let place = self.all.iter().position(|s| s.id == snapshot.id)?;
        let (before, after) = self.all.split_at(place);
        let near = before.iter().rev().chain(after);
        near.filter(|s| s.id != snapshot.id).find_map(|candidate| {
            let copy = self.copies.get(&origin_of(candidate))?;
            Some(Base {
                ours: of_disk(candidate)?,
                theirs: of_disk(copy)?,
                snapshot: copy.id,
            })
        })
    }

    /// What the target says of the disk: as the source does, but it is no link in any chain of bitmaps.
    ///
    /// A bitmap may have been cleared after a later backup into the source, of which the target knows nothing.
    fn record(&self, disk: &DiskRecord, root: MapRoot) -> DiskRecord {
        let parent = disk.parent.and_then(|parent| {
            let parent = self.all.iter().find(|s| s.id == parent)?;
            Some(self.copies.get(&origin_of(parent))?.id)
        });
        DiskRecord {
            root,
            parent,
            bitmap_used: None,
            bitmaps_started: Vec::new(),
            bitmaps_lost: Vec::new(),
            ..disk.clone()
        }
    }

    fn disk(
        &self,
        snapshot: &Snapshot,
        disk: &DiskRecord,
        base: Option<Base>,
        session: &Session,
        done: &mut CopiedSnapshot,
    ) -> Result<MapRoot, EngineError> {
        let (ours, failed) = (self.from.failed(), self.to.failed());
        let map = self.map_of(disk).map_err(&ours)?;
        let parent = base.as_ref().map(|b| (&b.theirs.root, b.theirs.size_bytes));
        let mut writer = session
            .map_writer(parent, disk.size_bytes)
            .map_err(&failed)?;
        let to_read = match &base {
            None => Vec::from_iter((map.chunks() > 0).then_some(0..map.chunks())),
            Some(base) => {
                let mut runs = Vec::new();
                let before = self.map_of(&base.ours).map_err(&ours)?;
                let differ = changed(&before, &map, &mut |chunks| {
                    runs.push(chunks);
                    Ok(())
                });
                differ.map_err(&ours)?;
                let lost = self.to.repository().damaged_chunks(&base.theirs.root);
                runs.extend(lost.map_err(&failed)?);
                runs.push(writer.keepable()..map.chunks());
                merged(runs, map.chunks())
            }
        };
        let geometry = self.from.geometry(disk.size_bytes);
        let mut progress = Progress {
            disk: disk.disk.clone(),
            total_bytes: disk.size_bytes,
            ..Progress::default()
        };
        let mut part = Part {
            copying: self,
            snapshot,
            disk,
            session,
            done,
            waiting: Vec::new(),
        };
        for run in to_read {
            writer.keep(writer.position()..run.start).map_err(&failed)?;
            for piece in map.runs(run.clone()) {
                let piece = piece.map_err(|e| part.unreadable(geometry.bytes(&run), e))?;
                match piece {
                    Run::Hole { chunks } => {
                        part.store(&mut writer)?;
                        writer.zero(chunks).map_err(&failed)?;
                    }
                    Run::Chunk { number, entry } => {
                        part.waiting.push((number, entry));
                        if part.waiting.len() >= AT_ONCE {
                            part.store(&mut writer)?;
                        }
                    }
                }
                progress.done_bytes = geometry.bytes(&(0..writer.position())).end();
                progress.moved_bytes = part.done.read_bytes;
                progress.new_bytes = part.done.new_bytes;
                self.observer.observe(Event::Progress(progress.clone()));
            }
            part.store(&mut writer)?;
        }
        writer
            .keep(writer.position()..map.chunks())
            .map_err(&failed)?;
        writer.finish().map_err(failed)
    }

    fn map_of(&self, disk: &DiskRecord) -> Result<MapReader, RepoError> {
        self.from.repository().map(&disk.root, disk.size_bytes)
    }
}

/// Chunks of one disk that wait to be read and stored together.
struct Part<'a> {
    copying: &'a Copying,
    snapshot: &'a Snapshot,
    disk: &'a DiskRecord,
    session: &'a Session,
    done: &'a mut CopiedSnapshot,
    waiting: Vec<(u64, ChunkEntry)>,
}

impl Part<'_> {
    fn store(&mut self, writer: &mut MapWriter) -> Result<(), EngineError> {
        let from = self.copying.from.repository();
        let geometry = self.copying.from.geometry(self.disk.size_bytes);
        let failed = self.copying.to.failed();
        let bytes_of = |number: u64| geometry.bytes(&(number..number + 1));
        let waiting = std::mem::take(&mut self.waiting);
        let one = |plain: &mut Vec<u8>, (number, entry): &(u64, ChunkEntry)| {
            let len = bytes_of(*number).len() as u32;
            from.read_chunk(entry, len, plain)
                .map_err(|e| self.unreadable(bytes_of(*number), e))?;
            self.session.store_chunk(plain).map_err(&failed)
        };
        let stored: Result<Vec<StoredChunk>, EngineError> = self
            .copying
            .workers
            .install(|| waiting.par_iter().map_init(Vec::new, one).collect());
        for ((number, _), chunk) in waiting.iter().zip(stored?) {
            self.done.read_bytes += bytes_of(*number).len();
            if chunk.is_new {
                self.done.chunks_new += 1;
                self.done.new_bytes += bytes_of(*number).len();
                self.done.stored_bytes += chunk.stored_bytes;
            }
            match chunk.entry {
                Some(entry) => writer.put(*number, entry),
                None => writer.zero(*number..*number + 1),
            }
            .map_err(&failed)?;
        }
        Ok(())
    }

    fn unreadable(&self, range: ByteRange, cause: RepoError) -> EngineError {
        EngineError::Unrestorable {
            snapshot: self.snapshot.id.to_string(),
            disk: self.disk.disk.clone(),
            range,
            cause: Box::new(cause),
        }
    }
}

/// Sorts runs, joins those that touch, and cuts them at the end.
fn merged(mut runs: Vec<Range<u64>>, end: u64) -> Vec<Range<u64>> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for run in runs {
        let run = run.start.min(end)..run.end.min(end);
        match out.last_mut() {
            _ if run.is_empty() => {}
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => out.push(run),
        }
    }
    out
}

/// Chunks that are read and stored at once.
const AT_ONCE: usize = 128;
