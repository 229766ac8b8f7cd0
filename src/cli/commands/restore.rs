//! `nbdbackup restore`

use std::sync::Arc;
use std::time::Duration;

use crate::cli::args::{Global, Restore};
use crate::cli::config;
use crate::engine::{self, EngineError, RestoreRequest, ServeRequest, ServeTls, Target};
use crate::report::{Outcome, Reporter};

pub(super) async fn to_target(
    global: &Global,
    args: &Restore,
    reporter: Arc<Reporter>,
) -> Result<Outcome, EngineError> {
    let to = args.to.as_deref().unwrap_or_default();
    let target = Target::parse(to, &args.format)?;
    if target == Target::Stdout && global.json {
        let problem = "--json would mix its lines with the disk's bytes on stdout; restore to a file, or without --json";
        return Err(EngineError::Usage(problem.to_owned()));
    }
    let request = RestoreRequest {
        snapshot: args.snapshot.clone(),
        disk: args.disk.clone(),
        target,
        overwrite: args.force,
    };
    let catalog = config::open(global).await?;
    engine::restore(&catalog, request, reporter)
        .await
        .map(Outcome::Restore)
}

pub(super) async fn serve(
    global: &Global,
    args: &Restore,
    reporter: Arc<Reporter>,
    ended: impl Future<Output = u8> + Send,
) -> Result<Outcome, EngineError> {
    let request = ServeRequest {
        snapshot: args.snapshot.clone(),
        disk: args.disk.clone(),
        address: args.serve.clone().unwrap_or_default(),
        tls: tls(args),
        insecure: args.insecure,
        writable: args.writable.clone(),
        idle_exit: args.idle_exit.map(Duration::from_secs_f64),
    };
    let catalog = config::open(global).await?;
    let ended = async {
        ended.await;
    };
    engine::serve(&catalog, request, reporter, ended)
        .await
        .map(Outcome::Serve)
}

/// What the flags say of TLS; they exclude each other.
fn tls(args: &Restore) -> Option<ServeTls> {
    let certificates = args.tls_certificates.clone();
    certificates
        .map(|folder| ServeTls::Certificates {
            folder,
            verify_peer: args.tls_verify_peer,
        })
        .or_else(|| args.tls_psk_file.clone().map(ServeTls::PreSharedKeys))
}
