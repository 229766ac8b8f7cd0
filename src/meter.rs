//! Meters: how long pieces of work were in a stage, summed over all that were in it at the same time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The time that pieces of work spent in one stage.
///
/// Divided by a run's duration it is the mean number of pieces in the stage at a time (Little's law).
#[derive(Debug, Default)]
pub struct Meter(AtomicU64);

impl Meter {
    /// Does a piece of work and counts its time.
    pub fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = work();
        self.since(start);
        done
    }

    /// Counts the time since a piece of work came into the stage.
    pub fn since(&self, start: Instant) {
        // 64 bits of nanoseconds last for 584 years.
        let nanos = start.elapsed().as_nanos() as u64;
        self.0.fetch_add(nanos, Relaxed);
    }

    /// Returns the time that was counted.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.0.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_at_the_same_time_all_count() {
        let meter = Meter::default();
        assert_eq!(meter.total(), Duration::ZERO);
        let long_ago = Instant::now().checked_sub(Duration::from_secs(3)).unwrap();
        meter.since(long_ago);
        meter.since(long_ago);
        assert!(meter.total() >= Duration::from_secs(6));
        assert_eq!(meter.time(|| 7), 7);
    }
}
