//! `nbdbackup copy`

use std::sync::Arc;

use crate::cli::args::{CopyArgs, Global};
use crate::cli::{config, secret};
use crate::engine::{Catalog, CopyRequest, EngineError, RepoFault};
use crate::report::{Outcome, Reporter};

pub(super) async fn run(
    global: &Global,
    args: CopyArgs,
    reporter: Arc<Reporter>,
) -> Result<Outcome, EngineError> {
    let compression = match &args.compression.compression {
        Some(text) => Some(config::compression(text)?),
        None => None,
    };
    let from = config::open(global).await?;
    let to = open_target(global, &args).await?;
    let request = CopyRequest {
        snapshots: args.snapshots,
        compression,
    };
    from.copy_to(&to, request, reporter)
        .await
        .map(Outcome::Copy)
}

/// Opens the other repository; where it needs a secret and none is given for it, the source's is tried.
async fn open_target(global: &Global, args: &CopyArgs) -> Result<Catalog, EngineError> {
    if let Some(secret) = secret::given_for_target(args)? {
        return Catalog::open(args.to.clone(), Some(secret)).await;
    }
    match Catalog::open(args.to.clone(), None).await {
        Err(error) if error.repo_fault() == Some(RepoFault::SecretNeeded) => {
            match secret::given(global)? {
                Some(secret) => Catalog::open(args.to.clone(), Some(secret)).await,
                None => Err(error),
            }
        }
        other => other,
    }
}
