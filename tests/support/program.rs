//! Running `nbdbackup`, and what every run of it promises about exit codes and JSON.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::process::{Finished, Process};

/// The program under test, untouched by the environment and configuration of whoever runs the tests.
pub(crate) fn nbdbackup(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbdbackup"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("NBDBACKUP_") {
            command.env_remove(name);
        }
    }
    command
        .env("HOME", "/nonexistent")
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("CREDENTIALS_DIRECTORY");
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs the program to its end.
pub(crate) fn run(args: &[&str]) -> Run {
    finish(Process::start(nbdbackup(args)))
}

/// Waits for a started run.
pub(crate) fn finish(process: Process) -> Run {
    let Finished {
        status,
        stdout,
        stderr,
    } = process.finish();
    Run {
        code: status.code(),
        stdout,
        stderr,
    }
}

/// A finished run.
pub(crate) struct Run {
    /// The exit code, or none after an unhandled signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Run {
    /// Returns all JSON lines, each held to the contract: common fields in each, one last word, at the end.
    pub(crate) fn lines(&self) -> Vec<Value> {
        let text = std::str::from_utf8(&self.stdout).expect("stdout is UTF-8");
        assert!(
            text.is_empty() || text.ends_with('\n'),
            "stdout ends inside a line: {text:?}"
        );
        let lines: Vec<Value> = text.lines().map(json_line).collect();
        assert!(
            !lines.is_empty(),
            "no JSON on stdout; stderr:\n{}",
            self.stderr
        );
        let (last, before) = lines.split_last().unwrap();
        assert!(
            is_last_word(last),
            "the last line is neither result nor error: {last}"
        );
        assert!(
            !before.iter().any(is_last_word),
            "more than one result or error: {text}"
        );
        assert!(
            lines.iter().all(|l| l["run"] == last["run"]),
            "lines of several runs: {text}"
        );
        lines
    }

    /// Returns the result of a run that succeeded.
    #[track_caller]
    pub(crate) fn result(&self) -> Value {
        assert_eq!(
            self.code,
            Some(0),
            "stdout:\n{}stderr:\n{}",
            String::from_utf8_lossy(&self.stdout),
            self.stderr
        );
        let last = self.lines().pop().unwrap();
        assert_eq!(last["type"], "result", "{last}");
        last
    }

    /// Returns the error of a run that failed with this exit code.
    #[track_caller]
    pub(crate) fn error(&self, exit_code: i32) -> Value {
        assert_eq!(
            self.code,
            Some(exit_code),
            "stdout:\n{}stderr:\n{}",
            String::from_utf8_lossy(&self.stdout),
            self.stderr
        );
        let last = self.lines().pop().unwrap();
        assert_eq!(last["type"], "error", "{last}");
        assert_eq!(last["exit_code"], exit_code, "{last}");
        for field in ["code", "message"] {
            assert!(
                last[field].as_str().is_some_and(|t| !t.is_empty()),
                "no {field}: {last}"
            );
        }
        assert!(last["retryable"].is_boolean(), "{last}");
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        last
    }
}

/// Parses one line and checks the fields that all lines share.
pub(crate) fn json_line(line: &str) -> Value {
    let value: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
    assert_eq!(value["schema"], 1, "{line}");
    let time = value["time"]
        .as_str()
        .unwrap_or_else(|| panic!("no time: {line}"));
    let time = chrono::DateTime::parse_from_rfc3339(time).unwrap_or_else(|e| panic!("{e}: {line}"));
    assert_eq!(
        time.offset().local_minus_utc(),
        0,
        "time is not in UTC: {line}"
    );
    assert!(
        value["run"].as_str().is_some_and(|r| !r.is_empty()),
        "no run: {line}"
    );
    let kinds = ["progress", "warning", "serving", "result", "error"];
    assert!(
        kinds.iter().any(|k| value["type"] == *k),
        "unknown type: {line}"
    );
    value
}

/// The number in a field.
#[track_caller]
pub(crate) fn number(value: &Value, field: &str) -> u64 {
    value[field]
        .as_u64()
        .unwrap_or_else(|| panic!("{field} is no number in {value}"))
}

/// The text in a field.
#[track_caller]
pub(crate) fn text(value: &Value, field: &str) -> String {
    value[field]
        .as_str()
        .unwrap_or_else(|| panic!("{field} is no text in {value}"))
        .to_owned()
}

fn is_last_word(line: &Value) -> bool {
    line["type"] == "result" || line["type"] == "error"
}
