//! `nbdbackup show`

use crate::cli::args::{Global, Show};
use crate::cli::config;
use crate::engine::EngineError;
use crate::report::Outcome;

pub(super) async fn run(global: &Global, args: &Show) -> Result<Outcome, EngineError> {
    let snapshot = config::open(global).await?.find(&args.snapshot).await?;
    Ok(Outcome::Show(Box::new(snapshot)))
}
