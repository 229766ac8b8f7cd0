//! `nbdbackup diff`

use crate::cli::args::{Diff, Global};
use crate::cli::config;
use crate::engine::EngineError;
use crate::report::Outcome;

pub(super) async fn run(global: &Global, args: &Diff) -> Result<Outcome, EngineError> {
    config::open(global)
        .await?
        .diff(&args.a, &args.b, args.disk.as_deref())
        .await
        .map(Outcome::Diff)
}
