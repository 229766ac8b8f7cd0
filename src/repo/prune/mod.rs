//! Pruning: what no snapshot needs is condemned, and removed once no session can refer to it any more.
//!
//! One generation is under way at a time. It is *pending* from the moment its list of condemned packs is published, and
//! done when what was decided about it is removed. Two names that are created once decide its course, so that any
//! number of prunes may run at once, die and be late. `docs/format.md` gives the argument.

pub(super) mod ids;
mod mark;
mod packs;
mod plan;
mod repack;
mod sweep;

use std::time::Duration;

use super::error::RepoError;
use super::format::generation::Sweep;
use super::generations::{self, Generations};
use super::ids::SnapshotId;
use super::presence::{Dead, open_sessions};
use super::repository::Repository;
use plan::Plan;

/// How to prune.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PruneOptions {
    /// The part of all stored bytes that may stay although nobody needs them, in percent.
    pub max_unused_percent: f64,
    /// The part of all stored bytes that may be freed for forgotten snapshots, in percent, as a brake; 100 for none.
    pub max_freed_percent: u8,
    /// How long a forgotten snapshot can be had back.
    pub undelete_window: Duration,
    /// Now, in nanoseconds since 1970; only the window is measured by it.
    pub now_unix_nanos: i64,
    /// Whether to say what would be done and do nothing.
    pub dry_run: bool,
    /// The length in bytes at which a pack that is written anew is closed.
    pub pack_bytes: u64,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self {
            max_unused_percent: 10.0,
            max_freed_percent: 25,
            undelete_window: Duration::from_secs(7 * 24 * 3600),
            now_unix_nanos: 0,
            dry_run: false,
            pack_bytes: 64 << 20,
        }
    }
}

impl PruneOptions {
    /// What is done about dead sessions.
    fn dead(&self) -> Dead {
        match self.dry_run {
            true => Dead::LeaveOut,
            false => Dead::Fence,
        }
    }
}

/// What a prune did, or would do.
#[derive(Clone, Debug, Default)]
pub struct Pruned {
    /// The forgotten snapshots that were removed.
    pub snapshots_removed: u64,
    /// The packs that were removed.
    pub packs_removed: u64,
    /// Their bytes.
    pub removed_bytes: u64,
    /// The bytes of the parity that went with them, or was left over.
    pub removed_parity_bytes: u64,
    /// The packs that were written anew without what nobody needs.
    pub packs_repacked: u64,
    /// The bytes of the packs that took their place.
    pub written_bytes: u64,
    /// The packs that are condemned and wait for sessions to end.
    pub packs_waiting: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// The sessions that they wait for.
    pub waiting_for: Vec<SnapshotId>,
    /// The bytes of all packs before.
    pub total_bytes: u64,
    /// The bytes that stay in packs although nobody needs them.
    pub unused_bytes: u64,
    /// The packs that hold damaged records and were left alone.
    pub damaged: Vec<(String, RepoError)>,
    /// Whether there was no room to write, so that packs were only removed.
    pub no_room: bool,
}

impl Repository {
    /// Removes what no snapshot needs; safe beside any number of running backups, restores and other prunes.
    ///
    /// What an open session may have referred to waits until that ends, and is removed by a later prune.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned, RepoError> {
        if !options.dry_run {
            self.check_writable()?;
        }
        let first = self.prune_with(options, false);
        if options.dry_run || !matches!(first, Err(RepoError::NoRoom { .. })) {
            return first;
        }
        // Removing needs a little room itself: for the lists of what is removed.
        tracing::warn!("no room left: packs are removed, and none is written");
        self.spend_reserve()?;
        let pruned = self.prune_with(options, true)?;
        Ok(Pruned {
            no_room: true,
            ..pruned
        })
    }

    fn prune_with(&self, options: &PruneOptions, no_room: bool) -> Result<Pruned, RepoError> {
        if !options.dry_run {
            self.storage().sweep()?;
        }
        let mut run = Run {
            repo: self,
            options,
            no_room,
            begun: false,
            pruned: Pruned::default(),
        };
        for _ in 0..TURNS {
            let state = match self.generations() {
                Err(error) if error.is_damage() && !options.dry_run => {
                    if !generations::give_up(&**self.storage(), self.keys().mac())? {
                        return Err(error);
                    }
                    tracing::error!(%error, "a prune is given up and begun anew");
                    continue;
                }
                state => state?,
            };
            match run.turn(&state) {
                Ok(Turn::Again) => {}
                Ok(Turn::Last) if options.dry_run => return Ok(run.pruned),
                Ok(Turn::Last) => {
                    self.end_prune(options, no_room, &mut run.pruned)?;
                    return Ok(run.pruned);
                }
                // A segment that another prune merged and removed.
                Err(RepoError::Missing { file }) if file.starts_with("idx/") => {
                    self.index().refresh()?;
                }
                // What this one was about to look at, another prune removed.
                Err(
                    RepoError::Missing { .. }
                    | RepoError::Lost { .. }
                    | RepoError::RecordsMissing { .. },
                ) if self.generations()? != state => {}
                Err(error) => return Err(error),
            }
        }
        Err(RepoError::PruneBusy)
    }

    fn generations(&self) -> Result<Generations, RepoError> {
        generations::load(&**self.storage(), self.keys().mac())
    }

    fn end_prune(
        &self,
        options: &PruneOptions,
        no_room: bool,
        pruned: &mut Pruned,
    ) -> Result<(), RepoError> {
        generations::tidy(&**self.storage())?;
        sweep::remove_checkpoints(self, options)?;
        sweep::remove_idle_marks(self)?;
        self.tidy_bad()?;
        sweep::remove_idle_parity(self, pruned)?;
        if !no_room {
            sweep::tidy_index(self)?;
        }
        self.index().remove_superseded()?;
        match no_room {
            true => Ok(()),
            false => self.make_reserve(),
        }
    }
}

/// A prune under way.
struct Run<'a> {
    repo: &'a Repository,
    options: &'a PruneOptions,
    no_room: bool,
    /// Whether it has begun a generation of its own.
    begun: bool,
    pruned: Pruned,
}

/// What comes after a turn.
enum Turn {
    Again,
    Last,
}

impl Run<'_> {
    /// Ends the generation that is pending, or begins one.
    fn turn(&mut self, state: &Generations) -> Result<Turn, RepoError> {
        let (repo, options) = (self.repo, self.options);
        if let Some(condemned) = &state.pending {
            let generation = state.last.unwrap_or(0);
            let blockers = match state.decided {
                // Nothing can change any more what is removed.
                Some(_) => Vec::new(),
                None => blockers(repo, generation, options)?,
            };
            if !blockers.is_empty() {
                sweep::report_waiting(repo, condemned, &mut self.pruned)?;
                self.pruned.waiting_for = blockers;
                return Ok(Turn::Last);
            }
            if !options.dry_run {
                sweep::finish(repo, generation, state, &mut self.pruned)?;
                return Ok(Turn::Again);
            }
        } else if self.begun {
            return Ok(Turn::Last);
        }
        if options.dry_run {
            plan::dry_run(repo, options, state, &mut self.pruned)?;
            return Ok(Turn::Last);
        }
        let mut plan = Plan::make(repo, options, &Sweep::default(), self.no_room)?;
        plan.brake(repo, options)?;
        let condemned = plan.carry_out(repo, options, &mut self.pruned)?;
        if condemned.packs.is_empty() && condemned.dropped.is_empty() {
            return Ok(Turn::Last);
        }
        for id in &condemned.dropped {
            // Had back since the plan was made. Later ones are seen before it is decided what is removed.
            if repo.is_had_back(id)? {
                return Ok(Turn::Again);
            }
        }
        let next = state.last.map_or(0, |last| last.saturating_add(1));
        let mac_key = repo.keys().mac();
        self.begun = generations::condemn(&**repo.storage(), mac_key, next, &condemned)?;
        Ok(Turn::Again)
    }
}

/// Returns the sessions that may refer to what a generation condemned.
fn blockers(
    repo: &Repository,
    generation: u64,
    options: &PruneOptions,
) -> Result<Vec<SnapshotId>, RepoError> {
    let open = open_sessions(repo, options.dead())?.into_iter();
    let blocking = open.filter(|s| s.may_refer_to(generation));
    Ok(blocking.map(|s| s.id).collect())
}

/// How often other prunes may be faster before this one gives up.
const TURNS: usize = 16;
