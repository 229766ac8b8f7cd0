//! The stages of a backup and the time that was spent in each.

use std::time::Duration;

use crate::meter::Meter;
use crate::repo::StoreMeters;

/// The time that a run spent in one stage, summed over all that was in it at the same time.
#[derive(Clone, Debug, PartialEq)]
pub struct StageTime {
    /// The stage's name, as `docs/json.md` lists them.
    pub stage: &'static str,
    /// The time.
    pub busy: Duration,
}

impl StageTime {
    /// The mean number of pieces of work in the stage during a run that took `duration`.
    pub fn depth(&self, duration: Duration) -> f64 {
        match duration.is_zero() {
            true => 0.0,
            false => self.busy.as_secs_f64() / duration.as_secs_f64(),
        }
    }
}

/// Where the time before storing goes.
#[derive(Debug, Default)]
pub(super) struct SourceMeters {
    /// Requests for extents.
    pub(super) walk: Meter,
    /// Requests for data, with their wait for each other's permits.
    pub(super) read: Meter,
    /// Data that waits for a thread.
    pub(super) wait: Meter,
}

impl SourceMeters {
    /// Lists all stages, in the order in which a chunk goes through them.
    pub(super) fn with(&self, store: &StoreMeters) -> Vec<StageTime> {
        let stages = [
            ("walk", &self.walk),
            ("read", &self.read),
            ("wait", &self.wait),
            ("hash", &store.hash),
            ("lookup", &store.lookup),
            ("compress", &store.compress),
            ("verify", &store.verify),
            ("pack", &store.pack),
            ("commit", &store.commit),
        ];
        let time = |(stage, meter): (_, &Meter)| StageTime {
            stage,
            busy: meter.total(),
        };
        stages.into_iter().map(time).collect()
    }
}
