//! Wrong usage, and what it must not do.

use crate::support::lab::Lab;
use crate::support::process::Process;
use crate::support::program::{nbdbackup, run, text};

/// Command lines that no version of the program could mean anything by.
const WRONG: &[&[&str]] = &[
    &[],
    &["frobnicate"],
    &["full"],
    &["incremental"],
    &["restore"],
    &["restore", "latest"],
    &["restore", "latest", "--to", "a", "--serve", "unix:b"],
    &["show"],
    &["diff", "latest"],
    &["info"],
    &["full", "disk.raw", "--no-such-flag"],
    &["full", "disk.raw", "--connections", "0"],
    &["full", "disk.raw", "--connections", "many"],
    &["full", "disk.raw", "--compression", "lzma"],
    &["full", "disk.raw", "--disk", "vda", "--disk", "vdb"],
    &["full", "a.raw", "b.raw", "--disk", "vda", "--disk", "vda"],
    &["full", "http://localhost/disk"],
    &["full", "nbd+unix:///disk"],
    &["full", "nbd://:99999999/disk"],
    &["incremental", "nbd://localhost/disk", "--name", ""],
    &["init"],
    &["init", "--encryption", "rot13"],
    &["init", "--encryption", "none", "--chunk-size", "100000"],
    &["init", "--encryption", "none", "--chunk-size", "32KiB"],
    &["init", "--encryption", "none", "--chunk-size", "8MiB"],
    &["snapshots", "--latest", "-1"],
    &["--progress-interval", "-1", "snapshots"],
];

#[test]
fn wrong_usage_ends_with_2_and_a_json_error_when_json_is_asked_for() {
    for args in WRONG {
        let lab = Lab::new();
        let error = lab.run(args).error(2);
        assert_eq!(error["retryable"], false, "{args:?}");
        assert!(lab.snapshots().is_empty(), "{args:?}");
    }
}

#[test]
fn wrong_usage_ends_with_2_and_says_why_on_stderr() {
    for args in WRONG {
        let lab = Lab::new();
        let run = lab.run_text(args);
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{args:?} wrote to stdout");
        assert!(!run.stderr.trim().is_empty(), "{args:?} says nothing");
    }
}

#[test]
fn repository_must_be_named() {
    for command in [
        &["snapshots"][..],
        &["full", "disk.raw"],
        &["init", "--encryption", "none"],
    ] {
        let error = run(&[&["--json"], command].concat()).error(2);
        assert!(text(&error, "message").contains("--repo"), "{error}");
    }
}

#[test]
fn repository_may_come_from_the_environment() {
    let lab = Lab::new();
    let mut command = nbdbackup(&["--json", "snapshots"]);
    command.env("NBDBACKUP_REPOSITORY", lab.repository());
    let result = crate::support::program::finish(Process::start(command)).result();
    assert_eq!(result["command"], "snapshots");
    let mut command = nbdbackup(&["--json", "snapshots", "--repo", &lab.repository()]);
    command.env("NBDBACKUP_REPOSITORY", "/nonexistent");
    crate::support::program::finish(Process::start(command)).result();
}

#[test]
fn help_and_version_go_to_stdout_and_end_with_0() {
    for args in [
        &["--help"][..],
        &["--version"],
        &["full", "--help"],
        &["restore", "--help"],
        &["help", "diff"],
    ] {
        let run = run(args);
        assert_eq!(run.code, Some(0), "{args:?}");
        assert!(
            !run.stdout.is_empty() && run.stderr.is_empty(),
            "{args:?}: {}",
            run.stderr
        );
    }
    let version = run(&["--version"]);
    let expected = format!("nbdbackup {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8_lossy(&version.stdout), expected);
    let help = run(&["--help"]);
    for command in [
        "init",
        "full",
        "incremental",
        "restore",
        "snapshots",
        "show",
        "diff",
        "info",
    ] {
        assert!(
            String::from_utf8_lossy(&help.stdout).contains(&format!("  {command} ")),
            "{command} is not in the help"
        );
    }
}
