//! `nbdbackup info`

use crate::cli::args::Info;
use crate::engine::{EngineError, InfoRequest, SourceSpec, info};
use crate::report::Outcome;

pub(super) async fn run(args: &Info) -> Result<Outcome, EngineError> {
    let source = SourceSpec::parse(&args.source, args.format.as_deref())?;
    let request = InfoRequest {
        source,
        map: args.map,
        bitmap: args.bitmap.clone(),
    };
    info(&request).await.map(Outcome::Info)
}
