//! Forgetting snapshots by rules or by name, and freeing what no snapshot needs.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;

use super::catalog::{Catalog, SnapshotFilter};
use super::error::EngineError;
use super::retention::{Kept, Rules, keep};
use super::selector::select;
use super::workers::blocking;
use crate::repo::{PruneOptions, Pruned, RepoError, Snapshot, SnapshotId};

/// Which snapshots to forget.
#[derive(Clone, Debug, Default)]
pub struct ForgetRequest {
    /// These, as they are addressed; then no rules apply.
    pub snapshots: Vec<String>,
    /// The rules that decide which of those that pass the filter stay.
    pub rules: Rules,
    /// Those of other machines, disks and tags are left alone.
    pub filter: SnapshotFilter,
    /// Whether a disk may lose its last snapshot.
    pub force: bool,
    /// Whether to say what would be forgotten and do nothing.
    pub dry_run: bool,
    /// The prune that follows.
    pub prune: Option<PruneRequest>,
}

/// How to free what no snapshot needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PruneRequest {
    /// The part of the stored bytes that may stay unused, in percent.
    pub max_unused_percent: f64,
    /// The part of the stored bytes that may be freed at once for forgotten snapshots, in percent; 100 for all.
    pub max_freed_percent: u8,
    /// How long a forgotten snapshot can be had back.
    pub undelete_window: Duration,
    /// Whether to say what would be freed and do nothing.
    pub dry_run: bool,
}

/// What was forgotten.
#[derive(Clone, Debug)]
pub struct ForgetOutcome {
    /// Where the repository lies.
    pub repository: String,
    /// The snapshots that are forgotten.
    pub forgotten: Vec<Snapshot>,
    /// Those that stay, and why.
    pub kept: Vec<(Snapshot, Vec<Kept>)>,
    /// Those that were had back.
    pub had_back: Vec<Snapshot>,
    /// Whether nothing was done.
    pub dry_run: bool,
    /// What the prune that followed came to.
    pub prune: Option<Pruned>,
}

/// What a prune came to.
#[derive(Clone, Debug)]
pub struct PruneOutcome {
    /// Where the repository lies.
    pub repository: String,
    /// Whether nothing was done.
    pub dry_run: bool,
    /// What was done, or would be.
    pub pruned: Pruned,
}

impl Catalog {
    /// Forgets snapshots, and prunes where that is asked for.
    ///
    /// # Errors
    /// When nothing says what to forget, a disk would lose its last snapshot, or the repository fails.
    pub async fn forget(&self, request: ForgetRequest) -> Result<ForgetOutcome, EngineError> {
        let list = self.snapshots().await?;
        let (forgotten, kept) = match request.snapshots.is_empty() {
            true => by_rules(&self.list(&request.filter).await?.snapshots, &request.rules)?,
            false => (named(&list.snapshots, &request.snapshots)?, Vec::new()),
        };
        if !request.force {
            refuse_last(&list.snapshots, &forgotten)?;
        }
        let ids: Vec<SnapshotId> = forgotten.iter().map(|s| s.id).collect();
        if !request.dry_run && !ids.is_empty() {
            let repository = Arc::clone(self.repository());
            blocking(move || repository.forget(&ids, now()))
                .await?
                .map_err(self.failed())?;
        }
        let prune = match request.prune {
            None => None,
            Some(prune) => Some(self.prune(prune).await?.pruned),
        };
        Ok(ForgetOutcome {
            repository: self.path().to_owned(),
            forgotten,
            kept,
            had_back: Vec::new(),
            dry_run: request.dry_run,
            prune,
        })
    }

    /// Takes back that snapshots were forgotten, addressed by the first characters of their ids.
    ///
    /// # Errors
    /// When none or several match, or a prune has begun to remove one.
    pub async fn unforget(&self, words: &[String]) -> Result<ForgetOutcome, EngineError> {
        let list = self.snapshots().await?;
        let gone: Vec<Snapshot> = list.forgotten.into_iter().map(|f| f.snapshot).collect();
        let ids: Vec<SnapshotId> = named(&gone, words)?.iter().map(|s| s.id).collect();
        let repository = Arc::clone(self.repository());
        let all = move || -> Result<Vec<Snapshot>, RepoError> {
            ids.iter().map(|id| repository.unforget(id)).collect()
        };
        let had_back = blocking(all).await?.map_err(self.failed())?;
        Ok(ForgetOutcome {
            repository: self.path().to_owned(),
            forgotten: Vec::new(),
            kept: Vec::new(),
            had_back,
            dry_run: false,
            prune: None,
        })
    }

    /// Frees what no snapshot needs.
    ///
    /// # Errors
    /// When more would be freed than is allowed, something that snapshots need is missing, or the repository fails.
    pub async fn prune(&self, request: PruneRequest) -> Result<PruneOutcome, EngineError> {
        let options = PruneOptions {
            max_unused_percent: request.max_unused_percent,
            max_freed_percent: request.max_freed_percent,
            undelete_window: request.undelete_window,
            now_unix_nanos: now(),
            dry_run: request.dry_run,
            ..PruneOptions::default()
        };
        let repository = Arc::clone(self.repository());
        let pruned = blocking(move || repository.prune(&options))
            .await?
            .map_err(self.failed())?;
        Ok(PruneOutcome {
            repository: self.path().to_owned(),
            dry_run: request.dry_run,
            pruned,
        })
    }
}

/// The snapshots that go, and those that stay with the reasons.
type Decided = (Vec<Snapshot>, Vec<(Snapshot, Vec<Kept>)>);

fn by_rules(snapshots: &[Snapshot], rules: &Rules) -> Result<Decided, EngineError> {
    if rules.is_empty() {
        return Err(EngineError::Usage(
            "nothing says what to keep: give a rule such as --keep-daily 7, or name snapshots"
                .to_owned(),
        ));
    }
    let mut why: BTreeMap<SnapshotId, BTreeSet<Kept>> = keep(snapshots, rules, Utc::now());
    let mut decided: Decided = (Vec::new(), Vec::new());
    for snapshot in snapshots {
        match why.remove(&snapshot.id) {
            Some(rules) => decided
                .1
                .push((snapshot.clone(), rules.into_iter().collect())),
            None => decided.0.push(snapshot.clone()),
        }
    }
    Ok(decided)
}

fn named(snapshots: &[Snapshot], words: &[String]) -> Result<Vec<Snapshot>, EngineError> {
    let mut found: Vec<Snapshot> = Vec::new();
    let mut seen: HashSet<SnapshotId> = HashSet::new();
    for words in words {
        let snapshot = select(snapshots, words)?;
        if seen.insert(snapshot.id) {
            found.push(snapshot.clone());
        }
    }
    Ok(found)
}

/// Refuses to take the last snapshot from a disk.
fn refuse_last(all: &[Snapshot], forgotten: &[Snapshot]) -> Result<(), EngineError> {
    let gone: HashSet<SnapshotId> = forgotten.iter().map(|s| s.id).collect();
    let disks = |snapshots: &[&Snapshot]| -> BTreeSet<(String, String)> {
        let of = |s: &&Snapshot| {
            let name = s.draft.name.clone();
            let disks = s.draft.disks.iter().map(|d| d.disk.clone());
            disks.map(|d| (name.clone(), d)).collect::<Vec<_>>()
        };
        snapshots.iter().flat_map(of).collect()
    };
    let stay: Vec<&Snapshot> = all.iter().filter(|s| !gone.contains(&s.id)).collect();
    let go: Vec<&Snapshot> = forgotten.iter().collect();
    let left = disks(&stay);
    match disks(&go).difference(&left).next() {
        None => Ok(()),
        Some((name, disk)) => Err(EngineError::LastSnapshot {
            name: name.clone(),
            disk: disk.clone(),
        }),
    }
}

/// The nanoseconds since 1970.
fn now() -> i64 {
    Utc::now().timestamp_nanos_opt().unwrap_or(i64::MAX)
}
