//! One file for each command; here each is picked, and ended by signals.

mod backup;
mod diff;
mod info;
mod init;
mod restore;
mod show;
mod snapshots;

use std::sync::Arc;

use super::args::{Cli, Command, Global};
use crate::engine::EngineError;
use crate::report::{Failure, Outcome, Reporter};

/// Runs one command until it is done, or until `ended` gives the number of a signal.
pub(super) async fn run(
    cli: Cli,
    reporter: Arc<Reporter>,
    ended: impl Future<Output = u8> + Send,
) -> Result<Outcome, Failure> {
    match cli.command {
        // A signal is how serving ends well.
        Command::Restore(args) if args.serve.is_some() => {
            restore::serve(&cli.global, &args, reporter, ended)
                .await
                .map_err(|e| Failure::from(&e))
        }
        command => tokio::select! {
            outcome = one(&cli.global, command, reporter) => outcome.map_err(|e| Failure::from(&e)),
            signal = ended => Err(Failure::signal(signal)),
        },
    }
}

async fn one(
    global: &Global,
    command: Command,
    reporter: Arc<Reporter>,
) -> Result<Outcome, EngineError> {
    match command {
        Command::Init(args) => init::run(global, &args).await,
        Command::Full(args) => backup::full(global, args, reporter).await,
        Command::Incremental(args) => backup::incremental(global, args, reporter).await,
        Command::Restore(args) => restore::to_target(global, &args, reporter).await,
        Command::Snapshots(args) => snapshots::run(global, &args).await,
        Command::Show(args) => show::run(global, &args).await,
        Command::Info(args) => info::run(&args).await,
        Command::Diff(args) => diff::run(global, &args).await,
    }
}
