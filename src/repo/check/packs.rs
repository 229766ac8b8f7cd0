//! The packs: their footers, a second index made of these, and the records themselves.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use super::{Check, compare};
use crate::repo::chunk::Place;
use crate::repo::error::{RepoError, unless_refused};
use crate::repo::format::generation::PackName;
use crate::repo::format::pack::{FooterEntry, PackKind};
use crate::repo::format::segment::{SegmentEntry, prefix_of};
use crate::repo::pack::{Footer, list_packs, read_footer};
use crate::repo::rebuild::{Gather, Scratch};
use crate::repo::repository::Repository;
use crate::repo::snapshot::Snapshot;
use crate::repo::verified::Journal;
use crate::repo::verify::{RecordBuffers, read_verified};

/// All packs that are whole as far as their footers tell.
pub(super) struct Packs {
    pub(super) whole: HashMap<PackName, Pack>,
    /// All that are there, with their lengths.
    pub(super) listed: BTreeMap<PackName, u64>,
    /// Slots whose records were read now and are damaged.
    pub(super) damaged: HashSet<(PackKind, crate::repo::ids::PackId, u32)>,
    /// An index of all their records.
    pub(super) scratch: Scratch,
}

/// What is known of a pack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pack {
    pub(super) len: u64,
    pub(super) digest: Digest,
}

impl Pack {
    fn of(footer: &Footer) -> Self {
        let mut digest = Digest::default();
        for entry in &footer.entries {
            digest.add(&SegmentEntry {
                prefix: prefix_of(&entry.id),
                pack: 0,
                offset: entry.offset,
                len: entry.len,
                flags: entry.flags.0,
            });
        }
        Self {
            len: footer.len,
            digest,
        }
    }
}

/// A hash of a set of index entries, whatever their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Digest(u128, u64);

impl Digest {
    pub(super) fn add(&mut self, entry: &SegmentEntry) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&entry.prefix.to_le_bytes());
        hasher.update(&entry.offset.to_le_bytes());
        hasher.update(&entry.len.to_le_bytes());
        hasher.update(&[entry.flags]);
        let mut half = [0; 16];
        half.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        self.0 = self.0.wrapping_add(u128::from_le_bytes(half));
        self.1 += 1;
    }
}

impl Packs {
    /// Reads all footers.
    pub(super) fn read(check: &mut Check<'_>, snapshots: &[Snapshot]) -> Result<Self, RepoError> {
        let mut packs = Self {
            whole: HashMap::new(),
            listed: list_packs(&**check.repo.storage())?,
            damaged: HashSet::new(),
            scratch: Scratch::new()?,
        };
        // What snapshots say of packs stands under their MAC.
        let mut written: HashMap<PackName, [u8; 32]> = HashMap::new();
        for pack in snapshots.iter().flat_map(|s| &s.packs) {
            written.insert((pack.kind, pack.id), pack.footer_hash);
        }
        let mut gather = Gather::into(&packs.scratch.index);
        for name in packs.listed.keys() {
            let file = name.0.file_name(&name.1);
            let footer = read_footer(&**check.repo.storage(), check.repo.uuid(), name.0, name.1);
            let footer = footer.and_then(|f| as_written(f, written.get(name), &file));
            match unless_refused(footer)? {
                Ok(footer) => {
                    gather.add(*name, &footer)?;
                    let pack = Pack::of(&footer);
                    check.found.packs += 1;
                    check.found.pack_bytes += pack.len;
                    packs.whole.insert(*name, pack);
                }
                // Removed since it was listed.
                Err(RepoError::Missing { .. }) => {}
                // Known, and no damage unless a snapshot needs it.
                Err(_) if check.bad.is_whole(name) => {}
                Err(error) => {
                    check.found.fault(&file, &error);
                    check.marks.add_whole(*name);
                    check.marked_packs.insert(*name);
                }
            }
        }
        gather.finish()?;
        Ok(packs)
    }

    /// Whether a record may be counted on.
    pub(super) fn is_usable(&self, check: &Check<'_>, name: &PackName, place: &Place) -> bool {
        self.whole.contains_key(name)
            && !check.bad.holds(name, place.offset)
            && !self.damaged.contains(&(name.0, name.1, place.offset))
    }
}

impl Check<'_> {
    /// Reads the records of the packs whose turn it is, and proves each.
    pub(super) fn read_records(
        &mut self,
        packs: &mut Packs,
        percent: f64,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<(), RepoError> {
        let journal = Journal::load(self.repo)?;
        let lens = packs.whole.iter().map(|(name, pack)| (*name, pack.len));
        let chosen = journal.choose(lens, percent);
        let total: u64 = chosen.iter().map(|name| packs.whole[name].len).sum();
        let reading = Reading {
            repo: self.repo,
            chosen: &chosen,
            lens: packs,
            next: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            total,
            progress,
            found: Mutex::default(),
        };
        reading.all()?;
        let Found {
            slots,
            whole,
            unreadable,
            parity,
        } = reading.into_found();
        for (name, problem) in parity {
            self.found.parity(&name.1, problem);
        }
        for (name, error) in unreadable {
            self.found.fault(name.0.file_name(&name.1), &error);
            self.marks.add_whole(name);
            self.marked_packs.insert(name);
            packs.whole.remove(&name);
        }
        self.found.read_packs = chosen.len() as u64;
        self.found.read_bytes = total;
        for (name, entry, error) in slots {
            // What is marked is known, and no damage unless a snapshot misses it.
            if !self.bad.holds(&name, entry.offset) {
                self.found.fault(name.0.file_name(&name.1), &error);
                self.marked_packs.insert(name);
                self.marks.add(name, entry.id, entry.offset);
            }
            packs.damaged.insert((name.0, name.1, entry.offset));
        }
        // Also those in which something was damaged were read: it is known now.
        let is_there = |name: &PackName| packs.whole.contains_key(name);
        match journal.add(self.repo, &whole, self.options.now_unix_nanos, is_there) {
            Ok(()) => Ok(()),
            // A repository that cannot be written to can still be checked.
            Err(error) => {
                tracing::warn!(%error, "what was read is not remembered");
                Ok(())
            }
        }
    }
}

fn as_written(footer: Footer, written: Option<&[u8; 32]>, file: &str) -> Result<Footer, RepoError> {
    match written {
        Some(hash) if *hash != footer.hash => Err(RepoError::corrupt(
            file,
            footer.len,
            "the footer is not the one that its snapshot names",
        )),
        _ => Ok(footer),
    }
}

type BadSlot = (PackName, FooterEntry, RepoError);

/// What was found when packs were read.
#[derive(Default)]
struct Found {
    /// The records that are damaged.
    slots: Vec<BadSlot>,
    /// The packs that were read.
    whole: Vec<PackName>,
    /// Those whose footers went bad meanwhile.
    unreadable: Vec<(PackName, RepoError)>,
    /// Those that are whole, and whose parity is not.
    parity: Vec<(PackName, String)>,
}

/// Packs that are read by several threads.
struct Reading<'a> {
    repo: &'a Repository,
    chosen: &'a [PackName],
    lens: &'a Packs,
    next: AtomicUsize,
    done: AtomicU64,
    total: u64,
    progress: &'a (dyn Fn(u64, u64) + Sync),
    found: Mutex<Found>,
}

impl Reading<'_> {
    fn all(&self) -> Result<(), RepoError> {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(|| self.some())).collect();
            threads.into_iter().try_for_each(|thread| {
                let lost = || RepoError::misuse("a thread that reads packs panicked");
                thread.join().unwrap_or_else(|_| Err(lost()))
            })
        })
    }

    fn some(&self) -> Result<(), RepoError> {
        let mut buffers = RecordBuffers::default();
        while let Some(name) = self.chosen.get(self.next.fetch_add(1, Relaxed)) {
            self.one(name, &mut buffers)?;
            let len = self.lens.whole.get(name).map_or(0, |pack| pack.len);
            let done = self.done.fetch_add(len, Relaxed) + len;
            (self.progress)(done, self.total);
        }
        Ok(())
    }

    fn one(&self, name: &PackName, buffers: &mut RecordBuffers) -> Result<(), RepoError> {
        let storage = &**self.repo.storage();
        let footer = match read_footer(storage, self.repo.uuid(), name.0, name.1) {
            Ok(footer) => footer,
            // A prune removed it meanwhile.
            Err(RepoError::Missing { .. }) => return Ok(()),
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => {
                let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
                found.unreadable.push((*name, error));
                return Ok(());
            }
        };
        let mut damaged = Vec::new();
        for entry in &footer.entries {
            match read_verified(self.repo, name, entry, buffers) {
                Ok(()) => {}
                Err(RepoError::Missing { .. }) => return Ok(()),
                // The disk says that it cannot read this: it is as lost as if it were wrong.
                Err(error) => damaged.push((*name, *entry, error)),
            }
        }
        // What the parity of a damaged pack can do is told with the damage.
        let parity = match damaged.is_empty() {
            true => compare(storage, self.repo.uuid(), name)?,
            false => None,
        };
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.parity.extend(parity.map(|problem| (*name, problem)));
        found.slots.extend(damaged);
        found.whole.push(*name);
        Ok(())
    }

    fn into_found(self) -> Found {
        let mut found = self
            .found
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let by_place = |(name, entry, _): &BadSlot| (*name, entry.offset);
        found.slots.sort_by_key(by_place);
        found.unreadable.sort_by_key(|(name, _)| *name);
        found.parity.sort();
        found
    }
}
