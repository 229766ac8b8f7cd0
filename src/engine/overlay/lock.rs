//! Turns at ranges: of changes that overlap, one works at a time, in the order in which they came.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

/// Ranges that are being changed, or wait for it.
#[derive(Clone, Default)]
pub(super) struct Turns {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    left: Notify,
}

#[derive(Default)]
struct Queue {
    next: u64,
    ranges: Vec<(u64, Range<u64>)>,
}

/// A range that nobody else changes until this is dropped.
pub(super) struct Turn {
    shared: Arc<Shared>,
    ticket: u64,
}

impl Turns {
    /// Waits until nobody who came before is at any part of the range.
    pub(super) async fn take(&self, range: Range<u64>) -> Turn {
        let turn = {
            let mut queue = self.shared.queue();
            let ticket = queue.next;
            queue.next += 1;
            queue.ranges.push((ticket, range.clone()));
            Turn {
                shared: Arc::clone(&self.shared),
                ticket,
            }
        };
        loop {
            let left = self.shared.left.notified();
            tokio::pin!(left);
            // Before the look, so that nobody leaves unnoticed after it.
            left.as_mut().enable();
            if self.shared.queue().is_free(turn.ticket, &range) {
                return turn;
            }
            left.await;
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no holder panics")
    }
}

impl Queue {
    fn is_free(&self, ticket: u64, range: &Range<u64>) -> bool {
        !self.ranges.iter().any(|(other, held)| {
            *other < ticket && held.start < range.end && range.start < held.end
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.ranges.retain(|(ticket, _)| *ticket != self.ticket);
        drop(queue);
        self.shared.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn overlapping_ranges_wait_for_their_turn_and_others_do_not() {
        let turns = Turns::default();
        let first = turns.take(0..10).now_or_never().expect("nobody is there");
        let mut second = Box::pin(turns.take(9..12));
        let mut third = Box::pin(turns.take(11..13));
        assert!(second.as_mut().now_or_never().is_none());
        // It overlaps only with one that waits, and does not overtake it.
        assert!(third.as_mut().now_or_never().is_none());
        assert!(turns.take(20..21).now_or_never().is_some());
        drop(first);
        let second = second.now_or_never().expect("the first has left");
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        assert!(third.now_or_never().is_some());
    }

    #[test]
    fn who_gives_up_waiting_is_waited_for_no_longer() {
        let turns = Turns::default();
        let first = turns.take(0..10).now_or_never().unwrap();
        let mut second = Box::pin(turns.take(0..20));
        assert!(second.as_mut().now_or_never().is_none());
        drop(second);
        assert!(turns.take(10..20).now_or_never().is_some());
        drop(first);
    }
}
