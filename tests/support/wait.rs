//! Waiting for what another process does.

use std::time::{Duration, Instant};

/// Looks until there is what is waited for, and fails when that takes too long.
///
/// The one place where a test pauses: what other processes do wakes nobody here.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(PAUSE);
    }
}

/// A slow machine needs a fraction of it.
const DEADLINE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(5);
