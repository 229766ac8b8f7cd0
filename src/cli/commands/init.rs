//! `nbdbackup init`

use crate::cli::args::{Encryption, Global, Init};
use crate::cli::config;
use crate::engine::{Catalog, EngineError};
use crate::report::Outcome;

pub(super) async fn run(global: &Global, args: &Init) -> Result<Outcome, EngineError> {
    let compression = match &args.compression.compression {
        Some(text) => Some(config::compression(text)?),
        None => None,
    };
    let Encryption::None = args.encryption;
    Catalog::init(
        config::repository_path(global)?,
        args.chunk_size,
        compression,
    )
    .await
    .map(Outcome::Init)
}
