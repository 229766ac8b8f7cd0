//! `nbdbackup snapshots`

use crate::cli::args::{Global, Snapshots};
use crate::cli::config;
use crate::engine::{EngineError, SnapshotFilter};
use crate::report::Outcome;

pub(super) async fn run(global: &Global, args: &Snapshots) -> Result<Outcome, EngineError> {
    let filter = SnapshotFilter {
        name: args.name.clone(),
        disk: args.disk.clone(),
        tag: args.tag.clone(),
        latest: args.latest,
    };
    config::open(global)
        .await?
        .list(&filter)
        .await
        .map(Outcome::Snapshots)
}
