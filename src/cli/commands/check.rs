//! `nbdbackup check` and `nbdbackup repair`

use std::sync::Arc;

use crate::cli::args::{Check, Global, RepairArgs};
use crate::cli::config;
use crate::engine::{CheckRequest, EngineError, check_keyless};
use crate::report::{Outcome, Reporter};

pub(super) async fn run(
    global: &Global,
    args: &Check,
    reporter: Arc<Reporter>,
) -> Result<Outcome, EngineError> {
    if args.no_key {
        let path = config::repository_path(global)?;
        return check_keyless(path, reporter).await.map(Outcome::Check);
    }
    let request = CheckRequest {
        read_data_percent: args.read_data,
        repair: args.repair,
    };
    let catalog = config::open(global).await?;
    catalog.check(request, reporter).await.map(Outcome::Check)
}

pub(super) async fn repair(
    global: &Global,
    args: RepairArgs,
    reporter: Arc<Reporter>,
) -> Result<Outcome, EngineError> {
    let catalog = config::open(global).await?;
    catalog
        .repair(args.from, !args.only_marked, reporter)
        .await
        .map(Outcome::Repair)
}
