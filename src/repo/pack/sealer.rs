//! The thread that makes finished packs durable, so that storing goes on into the next pack meanwhile.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::{OpenPack, lock};
use crate::repo::error::RepoError;
use crate::repo::format::pack::PackKind;
use crate::repo::ids::PackId;
use crate::repo::snapshot::WrittenPack;

/// Seals packs one after the other and keeps the session's first failure.
#[derive(Debug)]
pub(super) struct Sealer {
    shared: Arc<Shared>,
    queue: Option<SyncSender<Box<OpenPack>>>,
    thread: Option<JoinHandle<()>>,
}

impl Sealer {
    pub(super) fn start() -> Result<Self, RepoError> {
        let shared = Arc::new(Shared::default());
        let (queue, packs) = sync_channel(QUEUE);
        let thread = thread::Builder::new()
            .name("pack-sealer".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || seal_all(&shared, &packs)
            })
            .map_err(|e| RepoError::io("start a thread", e))?;
        Ok(Self {
            shared,
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Hands a pack over; waits while too many are queued.
    pub(super) fn seal(&self, pack: Box<OpenPack>) -> Result<(), RepoError> {
        self.check()?;
        lock(&self.shared.state).waiting += 1;
        let sent = self.queue.as_ref().map(|queue| queue.send(pack));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => {
                lock(&self.shared.state).waiting -= 1;
                Err(self.fail(RepoError::misuse("the thread that seals packs is gone")))
            }
        }
    }

    /// Waits until nothing is queued and returns all packs that were published.
    pub(super) fn drain(&self) -> Result<Vec<WrittenPack>, RepoError> {
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.waiting == 0 {
                return Ok(state.written.clone());
            }
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns the numbers of the packs that were published.
    pub(super) fn published(&self) -> HashSet<u32> {
        lock(&self.shared.state).published.clone()
    }

    /// The bytes of the packs that were published.
    pub(super) fn written_bytes(&self) -> u64 {
        lock(&self.shared.state).written_bytes
    }

    /// Returns the packs that were published after the first `known`.
    pub(super) fn written_after(&self, known: usize) -> Vec<(PackKind, PackId)> {
        let state = lock(&self.shared.state);
        let later = state.written.iter().skip(known);
        later.map(|pack| (pack.kind, pack.id)).collect()
    }

    pub(super) fn check(&self) -> Result<(), RepoError> {
        match &lock(&self.shared.state).failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(()),
        }
    }

    /// Keeps the first failure and returns it.
    pub(super) fn fail(&self, error: RepoError) -> RepoError {
        self.shared.fail(error)
    }
}

impl Drop for Sealer {
    fn drop(&mut self) {
        // What is still queued is of no use any more: whoever wanted it would have waited for it.
        lock(&self.shared.state).abandoned = true;
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by its own message.
            let _ = thread.join();
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: usize,
    written: Vec<WrittenPack>,
    written_bytes: u64,
    published: HashSet<u32>,
    failure: Option<RepoError>,
    abandoned: bool,
}

impl Shared {
    fn fail(&self, error: RepoError) -> RepoError {
        let first = lock(&self.state).failure.get_or_insert(error).clone();
        self.changed.notify_all();
        first
    }
}

fn seal_all(shared: &Shared, packs: &Receiver<Box<OpenPack>>) {
    // Makes waiters fail rather than wait for ever, should sealing panic.
    let _ended = OnEnd(shared);
    for pack in packs {
        let number = pack.number;
        let skip = {
            let state = lock(&shared.state);
            state.abandoned || state.failure.is_some()
        };
        // Dropping a pack removes its file.
        let result = if skip { None } else { Some(pack.seal()) };
        let mut state = lock(&shared.state);
        state.waiting -= 1;
        match result {
            Some(Ok(written)) => {
                state.written_bytes += written.len;
                state.written.push(written);
                state.published.insert(number);
            }
            Some(Err(error)) => {
                state.failure.get_or_insert(error);
            }
            None => {}
        }
        drop(state);
        shared.changed.notify_all();
    }
}

struct OnEnd<'a>(&'a Shared);

impl Drop for OnEnd<'_> {
    fn drop(&mut self) {
        self.0
            .fail(RepoError::misuse("the thread that seals packs is gone"));
    }
}

/// How many finished packs may wait beside the one that is being sealed.
const QUEUE: usize = 2;
