//! What people and programs see: text, progress, JSON and exit codes.

mod check;
mod exit;
mod json;
mod progress;
mod text;

pub use exit::Failure;

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::Duration;

use crate::engine::{
    BackupOutcome, CheckOutcome, CopyOutcome, DiffOutcome, Event, ForgetOutcome, InfoOutcome,
    InitOutcome, KeyOutcome, Observer, PruneOutcome, RepairOutcome, RestoreOutcome, ServeOutcome,
    Snapshot, SnapshotsOutcome, Warning,
};
use progress::{Bar, Pace};

/// What a successful run found or did.
#[derive(Debug)]
pub enum Outcome {
    /// A repository was created.
    Init(InitOutcome),
    /// A snapshot was stored.
    Backup(BackupOutcome),
    /// A disk was written to a target.
    Restore(RestoreOutcome),
    /// A snapshot was served.
    Serve(ServeOutcome),
    /// Snapshots were listed.
    Snapshots(SnapshotsOutcome),
    /// A snapshot was shown.
    Show(Box<Snapshot>),
    /// A source was looked at.
    Info(InfoOutcome),
    /// Two snapshots were compared.
    Diff(DiffOutcome),
    /// Snapshots were forgotten.
    Forget(ForgetOutcome),
    /// What no snapshot needs was freed.
    Prune(PruneOutcome),
    /// Keys were listed or changed.
    Key(KeyOutcome),
    /// The repository was checked.
    Check(CheckOutcome),
    /// Files were fetched from a copy of the repository.
    Repair(RepairOutcome),
    /// Snapshots were copied to another repository.
    Copy(CopyOutcome),
}

impl Outcome {
    /// Whether what was done shows that the repository is damaged.
    fn is_damaged(&self) -> bool {
        match self {
            Self::Check(o) => !o.checked.is_whole(),
            Self::Repair(o) => !o.checked.is_whole(),
            Self::Copy(o) => !o.failed.is_empty(),
            Self::Init(_)
            | Self::Backup(_)
            | Self::Restore(_)
            | Self::Serve(_)
            | Self::Snapshots(_)
            | Self::Show(_)
            | Self::Info(_)
            | Self::Diff(_)
            | Self::Forget(_)
            | Self::Prune(_)
            | Self::Key(_) => false,
        }
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        if self.is_damaged() { 13 } else { 0 }
    }
}

/// How a run reports.
#[derive(Clone, Debug)]
pub struct Settings {
    /// JSON lines on stdout instead of text.
    pub json: bool,
    /// Nothing but results, warnings and errors.
    pub quiet: bool,
    /// `None` decides by whether stderr is a terminal.
    pub progress_bar: Option<bool>,
    /// A progress line every half minute where there is no bar.
    pub progress_lines: bool,
    /// The least time between two JSON progress lines.
    pub interval: Duration,
}

/// Writes one run's events, and its result or error, to stdout and stderr.
pub struct Reporter {
    settings: Settings,
    run: String,
    live: Mutex<Live>,
}

struct Live {
    bar: Option<Bar>,
    json_pace: Pace,
    line_pace: Pace,
}

impl Reporter {
    /// Starts the report of one run; `run` is its id.
    pub fn new(settings: Settings, run: String) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = !settings.json && !settings.quiet && settings.progress_bar.unwrap_or(terminal);
        let live = Live {
            bar: bar.then(Bar::new),
            json_pace: Pace::every(settings.interval),
            line_pace: Pace::every(Duration::from_secs(30)),
        };
        Self {
            settings,
            run,
            live: Mutex::new(live),
        }
    }

    /// Writes the run's last words: what it found or did.
    pub fn result(&self, outcome: &Outcome) {
        self.end_bar();
        if self.settings.json {
            self.json_line(&json::Body::Result(Box::new(outcome.into())));
        } else {
            let mut text = String::new();
            text::outcome(&mut text, outcome);
            to_stdout(&text);
        }
    }

    /// Writes the run's last words: why it failed.
    pub fn error(&self, failure: &Failure) {
        self.end_bar();
        if self.settings.json {
            self.json_line(&json::Body::Error(failure.into()));
        }
        let mut text = format!("nbdbackup: {}\n", text::printable(&failure.message));
        if let Some(hint) = failure.hint {
            text.push_str("hint: ");
            text.push_str(hint);
            text.push('\n');
        }
        to_stderr(&text);
    }

    fn warning(&self, warning: &Warning) {
        if self.settings.json {
            self.json_line(&json::Body::Warning(warning.into()));
        }
        let disk = warning
            .disk
            .as_ref()
            .map(|d| format!("disk {d}: "))
            .unwrap_or_default();
        let line = format!("warning: {disk}{}\n", warning.message);
        let live = self.live.lock().expect("no reporter panics");
        match &live.bar {
            Some(bar) => bar.suspend(|| to_stderr(&text::printable(&line))),
            None => to_stderr(&text::printable(&line)),
        }
    }

    fn json_line(&self, body: &json::Body) {
        to_stdout(&json::line(&self.run, body));
    }

    fn end_bar(&self) {
        if let Some(bar) = self.live.lock().expect("no reporter panics").bar.take() {
            bar.finish();
        }
    }
}

impl Observer for Reporter {
    fn observe(&self, event: Event) {
        match event {
            Event::Progress(progress) => {
                let mut live = self.live.lock().expect("no reporter panics");
                if let Some(bar) = &mut live.bar {
                    bar.show(&progress);
                } else if self.settings.json {
                    if live.json_pace.due() {
                        drop(live);
                        self.json_line(&json::Body::Progress((&progress).into()));
                    }
                } else if self.settings.progress_lines && live.line_pace.due() {
                    to_stderr(&text::progress_line(&progress));
                }
            }
            Event::Warning(warning) => self.warning(&warning),
            Event::Serving(exports) => {
                if self.settings.json {
                    self.json_line(&json::Body::Serving(exports.as_slice().into()));
                } else {
                    to_stdout(&text::serving(&exports));
                }
            }
        }
    }
}

/// Writes text and flushes it; a reader that has gone away is no fault of the run.
fn to_stdout(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

fn to_stderr(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}
