//! One file for each command; here each is picked, and ended by signals.

mod backup;
mod check;
mod copy;
mod diff;
mod forget;
mod info;
mod init;
mod key;
mod prune;
mod restore;
mod show;
mod snapshots;

use std::sync::Arc;

use super::args::{Cli, Command};
use crate::engine::EngineError;
use crate::report::{Failure, Outcome, Reporter};

/// Runs one command until it is done, or until `ended` gives the number of a signal.
pub(super) async fn run(
    cli: Cli,
    reporter: Arc<Reporter>,
    ended: impl Future<Output = u8> + Send,
) -> Result<Outcome, Failure> {
    let global = &cli.global;
    let failure = |error: EngineError| Failure::from(&error);
    match cli.command {
        // A signal is how serving ends well.
        Command::Restore(args) if args.serve.is_some() => {
            restore::serve(global, &args, reporter, ended)
                .await
                .map_err(failure)
        }
        // A signal lets a backup say goodbye to its sources.
        Command::Full(args) => backup::full(global, args, reporter, ended).await,
        Command::Incremental(args) => backup::incremental(global, args, reporter, ended).await,
        Command::Init(args) => until(ended, init::run(global, &args)).await,
        Command::Restore(args) => until(ended, restore::to_target(global, &args, reporter)).await,
        Command::Snapshots(args) => until(ended, snapshots::run(global, &args)).await,
        Command::Show(args) => until(ended, show::run(global, &args)).await,
        Command::Info(args) => until(ended, info::run(&args)).await,
        Command::Diff(args) => until(ended, diff::run(global, &args)).await,
        Command::Forget(args) => until(ended, forget::run(global, args)).await,
        Command::Prune(args) => until(ended, prune::run(global, &args)).await,
        Command::Check(args) => until(ended, check::run(global, &args, reporter)).await,
        Command::Repair(args) => until(ended, check::repair(global, args, reporter)).await,
        Command::Copy(args) => until(ended, copy::run(global, args, reporter)).await,
        Command::Key(args) => until(ended, key::run(global, args)).await,
    }
}

/// Runs a command that can be dropped at any point.
async fn until(
    ended: impl Future<Output = u8> + Send,
    command: impl Future<Output = Result<Outcome, EngineError>>,
) -> Result<Outcome, Failure> {
    tokio::select! {
        outcome = command => outcome.map_err(|e| Failure::from(&e)),
        signal = ended => Err(Failure::signal(signal)),
    }
}
