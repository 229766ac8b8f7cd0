//! `nbdbackup prune`

use super::forget::prune_request;
use crate::cli::args::{Global, Prune};
use crate::cli::config;
use crate::engine::EngineError;
use crate::report::Outcome;

pub(super) async fn run(global: &Global, args: &Prune) -> Result<Outcome, EngineError> {
    let request = prune_request(&args.how, args.dry_run, args.force);
    config::open(global)
        .await?
        .prune(request)
        .await
        .map(Outcome::Prune)
}
