//! The requests that wait for their replies.

use super::super::{Extent, PeerMisbehaved, SessionError};
use super::coverage::Coverage;
use crate::nbd::wire::{Command, ErrorCode};
use crate::range::ByteRange;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The bytes of a range.
    Read(ByteRange),
    /// The extents of a range.
    Status {
        /// The range.
        range: ByteRange,
        /// The one context that is asked, by its place among those granted; `None` asks all.
        only: Option<usize>,
    },
    /// Something to be done to a range, whose reply carries nothing but success or an error.
    Effect {
        /// `WRITE`, `WRITE_ZEROES`, `TRIM`, `CACHE` or `FLUSH`.
        command: Command,
        /// The range; empty for `FLUSH`.
        range: ByteRange,
    },
}

impl Asked {
    /// The range.
    pub const fn range(self) -> ByteRange {
        match self {
            Self::Read(range) | Self::Status { range, .. } | Self::Effect { range, .. } => range,
        }
    }

    /// The command.
    pub const fn command(self) -> Command {
        match self {
            Self::Read(_) => Command::READ,
            Self::Status { .. } => Command::BLOCK_STATUS,
            Self::Effect { command, .. } => command,
        }
    }
}

/// The requests that wait for their replies, each with what its owner keeps for it.
#[derive(Debug)]
pub struct InFlight<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    entry: Option<Entry<T>>,
}

/// A request and what has come for it.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) asked: Asked,
    pub(super) coverage: Coverage,
    pub(super) holes: Vec<ByteRange>,
    pub(super) status: Vec<Option<Vec<Extent>>>,
    pub(super) error: Option<RequestFailed>,
    pub(super) errors: u32,
    pub(super) owner: T,
}

/// A request whose reply is complete.
#[derive(Debug)]
pub struct Finished<T> {
    /// What the owner kept.
    pub owner: T,
    /// What came.
    pub outcome: Outcome,
}

/// What a complete reply amounts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All bytes came; these ranges as holes, ascending, with neighbours merged.
    Read(Vec<ByteRange>),
    /// The extents, one list for each context that was asked.
    Status(Vec<Vec<Extent>>),
    /// It is done.
    Done,
    /// The server could not do it; the connection lives on.
    Failed(RequestFailed),
}

/// The server's answer to a request that it could not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("server failed to do {command} of {range} with {code}{}", detail(.offset, .text))]
pub struct RequestFailed {
    /// The command.
    pub command: Command,
    /// The range asked for.
    pub range: ByteRange,
    /// Why.
    pub code: ErrorCode,
    /// The server's own words; may be empty.
    pub text: String,
    /// Where on the disk, if the server said so.
    pub offset: Option<u64>,
}

impl<T> Default for InFlight<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> InFlight<T> {
    /// The number of requests.
    pub fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a request in and returns the cookie for its header.
    pub fn start(&mut self, asked: Asked, owner: T) -> u64 {
        let entry = Entry {
            asked,
            coverage: Coverage::new(asked.range()),
            holes: Vec::new(),
            status: Vec::new(),
            error: None,
            errors: 0,
            owner,
        };
        // A cookie is used again only after 2^32 requests in its slot, so a late reply is not taken for another's.
        while let Some(index) = self.free.pop() {
            if let Some(slot) = usize::try_from(index)
                .ok()
                .and_then(|i| self.slots.get_mut(i))
            {
                slot.generation = slot.generation.wrapping_add(1);
                slot.entry = Some(entry);
                return cookie(slot.generation, index);
            }
        }
        let index = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        self.slots.push(Slot {
            generation: 0,
            entry: Some(entry),
        });
        cookie(0, index)
    }

    /// Returns what a request's owner keeps; `None` if no such request waits.
    pub fn owner(&mut self, cookie: u64) -> Option<&mut T> {
        self.entry(cookie).ok().map(|entry| &mut entry.owner)
    }

    /// Gives one request up, as if it had never been made.
    pub fn forget(&mut self, cookie: u64) -> Option<T> {
        self.take(cookie).ok().map(|entry| entry.owner)
    }

    /// Gives all requests up and returns what was kept for them.
    pub fn abandon(&mut self) -> Vec<T> {
        self.free.clear();
        self.slots
            .drain(..)
            .filter_map(|slot| slot.entry.map(|entry| entry.owner))
            .collect()
    }

    pub(super) fn entry(&mut self, cookie: u64) -> Result<&mut Entry<T>, SessionError> {
        let (generation, index) = split(cookie);
        self.slots
            .get_mut(index)
            .filter(|slot| slot.generation == generation)
            .and_then(|slot| slot.entry.as_mut())
            .ok_or_else(|| PeerMisbehaved::UnknownCookie { cookie }.into())
    }

    pub(super) fn take(&mut self, cookie: u64) -> Result<Entry<T>, SessionError> {
        let (generation, index) = split(cookie);
        let entry = self
            .slots
            .get_mut(index)
            .filter(|slot| slot.generation == generation)
            .and_then(|slot| slot.entry.take())
            .ok_or(PeerMisbehaved::UnknownCookie { cookie })?;
        if let Ok(index) = u32::try_from(index) {
            self.free.push(index);
        }
        Ok(entry)
    }
}

fn cookie(generation: u32, index: u32) -> u64 {
    (u64::from(generation) << 32) | u64::from(index)
}

fn split(cookie: u64) -> (u32, usize) {
    let generation = u32::try_from(cookie >> 32).unwrap_or(u32::MAX);
    let index = usize::try_from(cookie & 0xffff_ffff).unwrap_or(usize::MAX);
    (generation, index)
}

fn detail(offset: &Option<u64>, text: &str) -> String {
    let mut shown = String::new();
    if let Some(offset) = offset {
        shown.push_str(&format!(" at {offset:#x}"));
    }
    if !text.is_empty() {
        shown.push_str(&format!(": {}", text.escape_debug()));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookie_of_a_finished_request_is_unknown_even_if_its_slot_is_used_again() {
        let mut requests = InFlight::default();
        let asked = Asked::Read(ByteRange::first(1));
        let first = requests.start(asked, 'a');
        let other = requests.start(asked, 'b');
        assert_eq!(requests.take(first).unwrap().owner, 'a');
        assert_eq!(requests.len(), 1);
        let again = requests.start(asked, 'c');
        assert_ne!(first, again);
        assert!(requests.owner(first).is_none());
        assert_eq!(requests.owner(again), Some(&mut 'c'));
        assert_eq!(requests.owner(other), Some(&mut 'b'));
        assert!(requests.owner(u64::MAX).is_none());
        assert_eq!(requests.abandon().len(), 2);
        assert!(requests.is_empty());
    }
}
