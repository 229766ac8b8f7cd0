//! What the typed words mean: the repository, compression, and the run's id.

use std::path::PathBuf;

use super::args::Global;
use super::secret;
use crate::engine::{Catalog, EngineError, RepoFault};
use crate::repo::Compression;

/// Makes the id of a run: 16 hexadecimal digits, random.
pub(super) fn run_id() -> String {
    let mut bytes = [0; 8];
    // The id only joins the lines of one run; without random bytes, the process and its start must do.
    if getrandom::fill(&mut bytes).is_err() {
        let start = chrono::Utc::now().timestamp_micros() as u64;
        bytes = (start ^ u64::from(std::process::id()).rotate_right(16)).to_be_bytes();
    }
    format!("{:016x}", u64::from_be_bytes(bytes))
}

/// Returns where the repository lies.
pub(super) fn repository_path(global: &Global) -> Result<PathBuf, EngineError> {
    let usage = |text: &str| EngineError::Usage(text.to_owned());
    let path = global
        .repo
        .clone()
        .ok_or_else(|| usage("no repository: give --repo PATH or set NBDBACKUP_REPOSITORY"))?;
    let text = path.to_string_lossy();
    if ["s3://", "gs://", "az://"]
        .iter()
        .any(|scheme| text.starts_with(scheme))
    {
        return Err(usage(
            "this version keeps repositories in local directories only",
        ));
    }
    Ok(path)
}

/// Opens the repository; asks for its password where one is needed, none is given and there is a terminal.
pub(super) async fn open(global: &Global) -> Result<Catalog, EngineError> {
    let path = repository_path(global)?;
    if let Some(secret) = secret::given(global)? {
        return Catalog::open(path, Some(secret)).await;
    }
    match Catalog::open(path.clone(), None).await {
        Err(error) if error.repo_fault() == Some(RepoFault::SecretNeeded) => match secret::ask()? {
            Some(secret) => Catalog::open(path, Some(secret)).await,
            None => Err(error),
        },
        other => other,
    }
}

/// Reads `none`, `zstd` or `zstd:LEVEL`.
pub(super) fn compression(text: &str) -> Result<Compression, EngineError> {
    let usage = || {
        EngineError::Usage(format!(
            "`{text}` is not a compression; use none, zstd or zstd:LEVEL with LEVEL from 1 to 19"
        ))
    };
    match text.split_once(':') {
        None if text == "none" => Ok(Compression::None),
        None if text == "zstd" => Ok(Compression::default()),
        Some(("zstd", level)) => match level.parse() {
            Ok(level @ 1..=19) => Ok(Compression::Zstd { level }),
            _ => Err(usage()),
        },
        _ => Err(usage()),
    }
}
