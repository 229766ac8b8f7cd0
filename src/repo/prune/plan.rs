//! Deciding which packs nobody needs, and which are written anew for the little that is needed of them.

use std::collections::{HashMap, HashSet};

use super::mark::{Keepers, Kept, join, needed_by};
use super::packs::PackList;
use super::{PruneOptions, Pruned, blockers, repack, sweep};
use crate::repo::checkpoint;
use crate::repo::error::RepoError;
use crate::repo::format::generation::{Condemned, PackName, Sweep};
use crate::repo::format::pack::{FooterEntry, MAX_RECORDS, PackHeader, PackKind, PackTrailer};
use crate::repo::generations::Generations;
use crate::repo::ids::SnapshotId;
use crate::repo::presence::{OpenSession, open_sessions};
use crate::repo::repository::Repository;
use crate::repo::snapshot::Snapshot;

/// What is to be done in one generation.
pub(super) struct Plan {
    packs: PackList,
    /// The packs that nobody needs, by their numbers.
    useless: Vec<u32>,
    /// The packs that are written anew.
    repack: Vec<u32>,
    /// For each pack what is needed of it.
    kept: Vec<Kept>,
    /// The packs that checkpoints name, for runs that were interrupted.
    checkpointed: HashSet<PackName>,
    /// For each pack that is written anew offset and length of the records that are needed of it, in order.
    moving: HashMap<u32, Vec<(u32, u32)>>,
    dropped: Vec<SnapshotId>,
    roots: Vec<SnapshotId>,
}

impl Plan {
    /// Looks at all; `gone` is taken for removed, since a dry run goes on after a generation that it has not ended.
    pub(super) fn make(
        repo: &Repository,
        options: &PruneOptions,
        gone: &Sweep,
        no_room: bool,
    ) -> Result<Self, RepoError> {
        let checkpoints = checkpoint::list(repo)?;
        // Sessions first: what they commit meanwhile is then seen among the snapshots.
        let open = open_sessions(repo, options.dead())?;
        let mut drop = over(repo, options, &open)?;
        drop.extend(&gone.snapshots);
        let mut snapshots = Snapshots::load(repo, &drop)?;
        let gone_snapshots: HashSet<&SnapshotId> = gone.snapshots.iter().collect();
        snapshots.dropped.retain(|id| !gone_snapshots.contains(id));
        let (window, now) = (options.undelete_window, options.now_unix_nanos);
        let roots = &snapshots.roots;
        let checkpointed = checkpoint::sort(repo, &checkpoints, &open, roots, window, now)?.packs;
        let packs = PackList::load(repo, &gone.packs)?;
        repo.index().refresh()?;
        let mut needed = needed_by(repo, &snapshots.roots)?;
        let keepers = Keepers::count(repo, &packs, &mut needed)?;
        let mut kept = vec![Kept::default(); packs.names().len()];
        let may_go = join(repo, &packs, &mut needed, &mut |copies| {
            for copied in keepers.pick(&packs, copies) {
                let kept = &mut kept[copied.pack as usize];
                kept.bytes += u64::from(copied.len);
                kept.records += 1;
            }
        })?
        .check(repo)?;
        let mut useless = useless(repo, &packs, &kept, &checkpointed, &open);
        useless.retain(|pack| may_go.includes(packs.name(*pack)));
        let mut plan = Self {
            useless,
            repack: Vec::new(),
            moving: HashMap::new(),
            kept,
            checkpointed,
            packs,
            dropped: snapshots.dropped,
            roots: snapshots.roots.iter().map(|s| s.id).collect(),
        };
        if !no_room {
            plan.choose_repacks(options.max_unused_percent);
        }
        let (packs, moving) = (&plan.packs, &mut plan.moving);
        moving.extend(plan.repack.iter().map(|pack| (*pack, Vec::new())));
        if !moving.is_empty() {
            join(repo, packs, &mut needed, &mut |copies| {
                for copied in keepers.pick(packs, copies) {
                    if let Some(records) = moving.get_mut(&copied.pack) {
                        records.push((copied.offset, copied.len));
                    }
                }
            })?
            .check(repo)?;
        }
        for records in plan.moving.values_mut() {
            records.sort_unstable();
        }
        Ok(plan)
    }

    /// Fails when this would free more than was allowed.
    ///
    /// What no snapshot ever named may always go.
    pub(super) fn brake(&self, repo: &Repository, options: &PruneOptions) -> Result<(), RepoError> {
        if self.dropped.is_empty() {
            return Ok(());
        }
        let total_bytes = self.packs.total_bytes();
        let most = u128::from(total_bytes) * u128::from(options.max_freed_percent) / 100;
        // The dropped snapshots' maps are gone through only when it matters which packs are theirs.
        if u128::from(self.freed_bytes(|_| true)) <= most {
            return Ok(());
        }
        let freed_bytes = match self.packs_of_dropped(repo) {
            Ok(theirs) => self.freed_bytes(|pack| theirs.contains(&pack)),
            Err(error @ RepoError::Io { .. }) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "all that is freed counts as that of forgotten snapshots");
                self.freed_bytes(|_| true)
            }
        };
        match u128::from(freed_bytes) > most {
            true => Err(RepoError::TooMuch {
                freed_bytes,
                total_bytes,
                most_percent: options.max_freed_percent,
            }),
            false => Ok(()),
        }
    }

    /// The bytes that are freed in those packs that `counts` accepts.
    fn freed_bytes(&self, counts: impl Fn(u32) -> bool) -> u64 {
        let useless = self.useless.iter().filter(|pack| counts(**pack));
        let removed: u64 = useless.map(|pack| self.packs.len(*pack)).sum();
        let repack = self.repack.iter().filter(|pack| counts(**pack));
        removed + repack.map(|pack| self.unused(*pack)).sum::<u64>()
    }

    /// The packs that are written anew, and offset and length of the records that are needed of each, in order.
    pub(super) fn moves(&self) -> impl Iterator<Item = (&PackName, &[(u32, u32)])> {
        let moving = |pack| self.moving.get(pack).map(Vec::as_slice).unwrap_or_default();
        let repack = self.repack.iter();
        repack.map(move |pack| (self.packs.name(*pack), moving(pack)))
    }

    /// The names of the packs that go.
    fn going(&self) -> Vec<PackName> {
        let going = self.useless.iter().chain(&self.repack);
        going.map(|pack| *self.packs.name(*pack)).collect()
    }

    /// Finds the packs that hold something of the snapshots that are dropped.
    fn packs_of_dropped(&self, repo: &Repository) -> Result<HashSet<u32>, RepoError> {
        let dropped = self.dropped.iter().map(|id| repo.snapshot(id));
        let dropped: Vec<Snapshot> = dropped.collect::<Result<_, _>>()?;
        let mut theirs = HashSet::new();
        let mut ids = needed_by(repo, &dropped)?;
        // What is missing cannot be freed.
        join(repo, &self.packs, &mut ids, &mut |copies| {
            theirs.extend(copies.places.iter().map(|copied| copied.pack));
        })?;
        Ok(theirs)
    }

    /// Writes anew what is to be, and says what is condemned then.
    pub(super) fn carry_out(
        &mut self,
        repo: &Repository,
        options: &PruneOptions,
        pruned: &mut Pruned,
    ) -> Result<Condemned, RepoError> {
        let done = repack::repack(repo, self, options.pack_bytes)?;
        let damaged: HashSet<PackName> = done.damaged.iter().map(|(name, _)| *name).collect();
        let packs = &self.packs;
        self.repack
            .retain(|pack| !damaged.contains(packs.name(*pack)));
        let named = |(name, error): (PackName, RepoError)| (name.0.file_name(&name.1), error);
        pruned.damaged = done.damaged.into_iter().map(named).collect();
        pruned.packs_repacked += self.repack.len() as u64;
        pruned.written_bytes += done.written_bytes;
        self.report(pruned);
        Ok(Condemned {
            packs: self.going(),
            dropped: self.dropped.clone(),
            roots: self.roots.clone(),
        })
    }

    fn report(&self, pruned: &mut Pruned) {
        pruned.total_bytes = self.packs.total_bytes();
        let goes: HashSet<u32> = self.useless.iter().chain(&self.repack).copied().collect();
        let numbered = (0..).zip(self.packs.names());
        let stays = numbered
            .filter(|(pack, name)| !goes.contains(pack) && !self.checkpointed.contains(*name));
        pruned.unused_bytes = stays.map(|(pack, _)| self.unused(pack)).sum();
    }

    /// The bytes of a pack's records that nobody needs.
    fn unused(&self, pack: u32) -> u64 {
        let kept = self.kept[pack as usize];
        let overhead = (PackHeader::LEN + PackTrailer::LEN) as u64;
        let footer = kept.records * FooterEntry::LEN as u64;
        let len = self.packs.len(pack);
        len.saturating_sub(overhead + footer + kept.bytes)
    }

    /// Chooses the packs of which least is needed, until what is left unused is little enough.
    fn choose_repacks(&mut self, max_unused_percent: f64) {
        let numbered = (0..).zip(self.packs.names());
        let mut partly: Vec<(u32, u64)> = numbered
            .filter(|(pack, name)| {
                self.kept[*pack as usize].records > 0 && !self.checkpointed.contains(*name)
            })
            .map(|(pack, _)| (pack, self.unused(pack)))
            .filter(|(_, unused)| *unused > 0)
            .collect();
        let useless = self.useless.iter().map(|pack| self.packs.len(*pack));
        let mut total = self.packs.total_bytes() - useless.sum::<u64>();
        let mut unused: u64 = partly.iter().map(|(_, unused)| *unused).sum();
        // The largest part first; by name where that is the same, so that a dry run says what would be done.
        partly.sort_by_key(|(pack, unused)| {
            let len = u128::from(self.packs.len(*pack).max(1));
            let part = u128::from(*unused) * 1_000_000 / len;
            (std::cmp::Reverse(part), *pack)
        });
        for (pack, dead) in partly {
            if unused as f64 <= total as f64 * max_unused_percent / 100.0 {
                break;
            }
            self.repack.push(pack);
            unused -= dead;
            total = total.saturating_sub(dead);
        }
    }

    /// The bytes of the packs that take the place of those written anew, unless something in these is damaged.
    fn written_bytes(&self, pack_bytes: u64) -> u64 {
        let of_kind = |kind| {
            let packs = self.moves().filter(move |(name, _)| name.0 == kind);
            let records = packs.flat_map(|(_, records)| records);
            packed_bytes(records.map(|(_, len)| *len), pack_bytes)
        };
        of_kind(PackKind::Data) + of_kind(PackKind::Meta)
    }
}

/// The bytes of the packs that these records fill.
fn packed_bytes(records: impl Iterator<Item = u32>, pack_bytes: u64) -> u64 {
    let start = PackHeader::LEN as u64;
    let (mut total, mut open, mut count) = (0, start, 0);
    for len in records {
        open += u64::from(len);
        count += 1;
        total += u64::from(len) + FooterEntry::LEN as u64;
        if open >= pack_bytes || count == MAX_RECORDS {
            total += PACK_OVERHEAD;
            (open, count) = (start, 0);
        }
    }
    match count {
        0 => total,
        _ => total + PACK_OVERHEAD,
    }
}

/// Says what a prune would do now.
pub(super) fn dry_run(
    repo: &Repository,
    options: &PruneOptions,
    state: &Generations,
    pruned: &mut Pruned,
) -> Result<(), RepoError> {
    let gone = sweep::report_finish(repo, state, pruned)?;
    let plan = Plan::make(repo, options, &gone, false)?;
    plan.report(pruned);
    let packs = plan.going();
    let bytes: u64 = plan.packs.lens_of(&packs).sum();
    let next = state.last.map_or(0, |last| last.saturating_add(1));
    let blockers = blockers(repo, next, options)?;
    pruned.packs_repacked = plan.repack.len() as u64;
    pruned.written_bytes = plan.written_bytes(options.pack_bytes);
    let mut removed = gone.packs;
    match blockers.is_empty() || (packs.is_empty() && plan.dropped.is_empty()) {
        true => {
            removed.extend(&packs);
            pruned.snapshots_removed += plan.dropped.len() as u64;
            pruned.packs_removed += packs.len() as u64;
            pruned.removed_bytes += bytes;
        }
        false => {
            pruned.packs_waiting += packs.len() as u64;
            pruned.waiting_bytes += bytes;
            pruned.waiting_for = blockers;
        }
    }
    sweep::report_parity(repo, &removed, pruned)
}

/// The snapshots as a prune sees them.
pub(super) struct Snapshots {
    /// Those whose data must stay.
    pub(super) roots: Vec<Snapshot>,
    /// The forgotten ones whose time is over.
    pub(super) dropped: Vec<SnapshotId>,
}

impl Snapshots {
    /// Reads all but those of `drop`; fails when one cannot be read, since its data must stay.
    pub(super) fn load(repo: &Repository, drop: &HashSet<SnapshotId>) -> Result<Self, RepoError> {
        let mut found = Self {
            roots: Vec::new(),
            dropped: Vec::new(),
        };
        let mut unreadable = Vec::new();
        for file in repo.storage().list("snap/")? {
            let Some(id) = file
                .name
                .strip_prefix("snap/")
                .and_then(|id| id.parse().ok())
            else {
                continue;
            };
            if drop.contains(&id) {
                found.dropped.push(id);
                continue;
            }
            match repo.snapshot(&id) {
                Ok(snapshot) => found.roots.push(snapshot),
                // A fence, or removed since it was listed.
                Err(RepoError::NoSuchSnapshot { .. }) => {}
                Err(error @ RepoError::Io { .. }) => return Err(error),
                Err(error) => unreadable.push(error),
            }
        }
        found.roots.sort_by_key(|s| s.id);
        found.dropped.sort_unstable();
        match unreadable.len() {
            0 => Ok(found),
            count => Err(RepoError::SnapshotsUnreadable {
                count,
                one: Box::new(unreadable.swap_remove(0)),
            }),
        }
    }
}

/// Finds the forgotten snapshots that nobody can have back any more, and that no session inherits from.
fn over(
    repo: &Repository,
    options: &PruneOptions,
    open: &[OpenSession],
) -> Result<HashSet<SnapshotId>, RepoError> {
    let parents: HashSet<SnapshotId> = open
        .iter()
        .flat_map(|s| s.parents.iter().copied())
        .collect();
    let marks = repo.forgotten()?;
    let window = options.undelete_window.as_nanos();
    let over = marks
        .snapshots
        .iter()
        .filter(|mark| marks.age_nanos(mark, options.now_unix_nanos) >= window)
        .map(|mark| mark.snapshot.id);
    Ok(over.filter(|id| !parents.contains(id)).collect())
}

/// Finds the packs of which nothing is kept, but not those of sessions that are still writing, nor those of checkpoints.
fn useless(
    repo: &Repository,
    packs: &PackList,
    kept: &[Kept],
    checkpointed: &HashSet<PackName>,
    open: &[OpenSession],
) -> Vec<u32> {
    let writing: HashSet<SnapshotId> = open.iter().map(|s| s.id).collect();
    let numbered = (0..).zip(packs.names()).zip(kept);
    numbered
        .filter(|((_, name), kept)| kept.records == 0 && !checkpointed.contains(*name))
        .filter(|((_, name), _)| match writer_of(repo, name) {
            // Waiting for its session would be of no use: it will be needed, or is garbage then.
            Some(session) => !writing.contains(&session),
            None => true,
        })
        .map(|((pack, _), _)| pack)
        .collect()
}

/// Reads which session wrote a pack; `None` when that cannot be read.
fn writer_of(repo: &Repository, (kind, pack): &PackName) -> Option<SnapshotId> {
    let mut head = [0; PackHeader::LEN];
    let read = repo.storage().read_at(&kind.file_name(pack), 0, &mut head);
    read.ok()?;
    Some(PackHeader::decode(&head, *kind).ok()?.session)
}

const PACK_OVERHEAD: u64 = (PackHeader::LEN + PackTrailer::LEN) as u64;
