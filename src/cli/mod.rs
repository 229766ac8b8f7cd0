//! The command line: what was typed, what it means, and one file per command.

mod args;
mod commands;
mod config;
mod secret;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind;
use tokio::signal::unix::{SignalKind, signal};

use crate::report::{Failure, Outcome, Reporter, Settings};
use args::{Cli, LogFormat, When};

/// Runs the command line of this process and returns its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_parsed(&error),
    };
    start_log(&cli);
    let reporter = std::sync::Arc::new(Reporter::new(settings(&cli), config::run_id()));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(cli, &reporter)))
        .unwrap_or_else(|_| {
            Err(Failure::internal(
                "the program panicked; its last words are above",
            ))
        });
    match outcome {
        Ok(outcome) => {
            reporter.result(&outcome);
            ExitCode::from(outcome.exit_code())
        }
        Err(failure) => {
            reporter.error(&failure);
            ExitCode::from(failure.exit_code)
        }
    }
}

fn run(cli: Cli, reporter: &std::sync::Arc<Reporter>) -> Result<Outcome, Failure> {
    enough_files()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::internal(format!("cannot start the runtime: {e}")))?;
    let outcome = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
        let ended = async {
            tokio::select! {
                _ = interrupt.recv() => 2,
                _ = terminate.recv() => 15,
            }
        };
        commands::run(cli, reporter.clone(), ended).await
    });
    // What still runs after a signal or an error only has to let go of its files.
    runtime.shutdown_timeout(Duration::from_secs(5));
    outcome
}

/// Opens as many files as the runtime starts with, and lets go of them: without them tokio panics.
fn enough_files() -> Result<(), Failure> {
    const OF_A_START: usize = 8;
    let open = |_| std::fs::File::open("/dev/null");
    let opened: std::io::Result<Vec<_>> = (0..OF_A_START).map(open).collect();
    opened.map(drop).map_err(|error| Failure {
        hint: Some("raise the limit of open files: ulimit -n, or LimitNOFILE= in a unit"),
        ..Failure::internal(format!("cannot open the files that a start needs: {error}"))
    })
}

fn no_signals(error: std::io::Error) -> Failure {
    Failure::internal(format!("cannot watch for signals: {error}"))
}

/// Reports a command line that clap refused; `--json` may stand anywhere in it.
fn not_parsed(error: &clap::Error) -> ExitCode {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let before_rest = |a: &std::ffi::OsString| a != "--";
    if std::env::args_os()
        .skip(1)
        .take_while(before_rest)
        .any(|a| a == "--json")
    {
        let text = error.to_string();
        let settings = Settings {
            json: true,
            quiet: false,
            progress_bar: Some(false),
            progress_lines: false,
            interval: Duration::ZERO,
        };
        let first = text.split("\n\n").next().unwrap_or_default();
        let message = first.strip_prefix("error: ").unwrap_or(first).trim();
        Reporter::new(settings, config::run_id()).error(&Failure::usage(message));
    } else {
        let _ = error.print();
    }
    ExitCode::from(2)
}

fn settings(cli: &Cli) -> Settings {
    Settings {
        json: cli.global.json,
        quiet: cli.global.quiet,
        progress_bar: match cli.global.progress {
            When::Auto => None,
            When::Always => Some(true),
            When::Never => Some(false),
        },
        progress_lines: cli.global.verbose > 0,
        interval: Duration::from_secs_f64(cli.global.progress_interval),
    }
}

fn start_log(cli: &Cli) {
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => tracing::Level::ERROR,
        (false, 0) => tracing::Level::WARN,
        (false, 1) => tracing::Level::INFO,
        (false, _) => tracing::Level::DEBUG,
    };
    let colours = !cli.global.no_color && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(false);
    match cli.global.log_format {
        LogFormat::Text => {
            use std::io::IsTerminal;
            log.with_ansi(colours && std::io::stderr().is_terminal())
                .init();
        }
        LogFormat::Json => log.json().init(),
    }
}
