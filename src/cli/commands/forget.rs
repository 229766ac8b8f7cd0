//! `nbdbackup forget`

use crate::cli::args::{Forget, Global, PruneArgs};
use crate::cli::config;
use crate::engine::{EngineError, ForgetRequest, PruneRequest, Rules, SnapshotFilter};
use crate::report::Outcome;

pub(super) async fn run(global: &Global, args: Forget) -> Result<Outcome, EngineError> {
    let catalog = config::open(global).await?;
    if args.undelete {
        return catalog.unforget(&args.snapshots).await.map(Outcome::Forget);
    }
    let request = ForgetRequest {
        rules: Rules {
            last: args.keep_last,
            hourly: args.keep_hourly,
            daily: args.keep_daily,
            weekly: args.keep_weekly,
            monthly: args.keep_monthly,
            yearly: args.keep_yearly,
            within: args.keep_within,
            tags: args.keep_tag,
        },
        filter: SnapshotFilter {
            name: args.name,
            disk: args.disk,
            tag: args.tag,
            latest: None,
        },
        snapshots: args.snapshots,
        force: args.force,
        dry_run: args.dry_run,
        prune: args
            .prune
            .then(|| prune_request(&args.how, args.dry_run, args.force)),
    };
    catalog.forget(request).await.map(Outcome::Forget)
}

/// Reads how to prune; `force` lets the brake go.
pub(super) fn prune_request(args: &PruneArgs, dry_run: bool, force: bool) -> PruneRequest {
    PruneRequest {
        max_unused_percent: args.max_unused,
        max_freed_percent: if force { 100 } else { args.max_freed },
        undelete_window: args.undelete_window,
        dry_run,
    }
}
