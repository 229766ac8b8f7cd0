//! What `--json` prints: every line by the contract, numbers as numbers, one last word.

use serde_json::Value;

use crate::support::MIB;
use crate::support::lab::Lab;
use crate::support::program::{number, text};

#[test]
fn result_of_a_backup_has_every_field_of_the_contract() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 4 * MIB, 1);
    let result = lab.backup("full", &image, &["--tag", "nightly"]);
    for field in ["repository", "snapshot", "name", "started", "finished"] {
        assert!(!text(&result, field).is_empty(), "{field}");
    }
    assert!(
        result["duration_seconds"]
            .as_f64()
            .is_some_and(|d| d > 0.0 && d < 100.0),
        "{result}"
    );
    assert_eq!(result["warnings"], Value::Array(Vec::new()));
    let parse = |field| chrono::DateTime::parse_from_rfc3339(&text(&result, field)).unwrap();
    assert!(parse("started") <= parse("finished"));
    assert!(text(&result, "started").ends_with('Z'));
    let disk = &result["disks"][0];
    let numbers = [
        "size_bytes",
        "read_bytes",
        "zero_bytes",
        "chunks_total",
        "chunks_new",
        "new_bytes",
        "stored_bytes",
    ];
    for field in numbers {
        number(disk, field);
    }
    for field in ["reason", "parent", "bitmap", "dirty_bytes"] {
        assert_eq!(disk.get(field), Some(&Value::Null), "{field} of {disk}");
    }
    assert_eq!(disk["kind"], "full");
    assert_eq!(number(disk, "size_bytes"), 4 * MIB);
    assert!(
        number(disk, "read_bytes") + number(disk, "zero_bytes") >= 4 * MIB,
        "{disk}"
    );
    assert!(
        number(disk, "stored_bytes") < number(disk, "new_bytes"),
        "text was not compressed: {disk}"
    );
}

#[test]
fn stages_of_a_backup_tell_where_its_time_went() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 8 * MIB, 7);
    let result = lab.backup("full", &image, &[]);
    let duration = result["duration_seconds"].as_f64().unwrap();
    let stages = result["stages"].as_array().unwrap();
    let names: Vec<String> = stages.iter().map(|s| text(s, "stage")).collect();
    let expected = [
        "walk", "read", "wait", "hash", "lookup", "compress", "verify", "pack", "commit",
    ];
    assert_eq!(names, expected);
    for stage in stages {
        let busy = stage["busy_seconds"].as_f64().unwrap();
        let depth = stage["depth"].as_f64().unwrap();
        assert!(busy > 0.0, "{stage}");
        assert!((depth * duration - busy).abs() < 1e-6, "{stage}");
    }
    let other = lab.raw("other.raw", MIB, 8);
    let result = lab.backup("full", &other, &["--no-verify-writes"]);
    let verify = &result["stages"][6];
    assert_eq!(
        (text(verify, "stage"), verify["busy_seconds"].as_f64()),
        ("verify".to_owned(), Some(0.0))
    );
}

#[test]
fn progress_comes_in_order_and_within_bounds() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 32 * MIB, 2);
    let args = [
        "--progress-interval",
        "0",
        "full",
        &image,
        "--name",
        "web1",
        "--disk",
        "vda",
    ];
    let lines = lab.run(&args).lines();
    let progress: Vec<&Value> = lines.iter().filter(|l| l["type"] == "progress").collect();
    assert!(progress.len() > 2, "{} lines", progress.len());
    let done: Vec<u64> = progress.iter().map(|p| number(p, "done_bytes")).collect();
    assert!(done.is_sorted(), "{done:?}");
    assert_eq!(done.last(), Some(&(32 * MIB)));
    assert!(
        progress
            .iter()
            .all(|p| number(p, "total_bytes") == 32 * MIB && p["disk"] == "vda")
    );
}

#[test]
fn progress_keeps_its_pace() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 32 * MIB, 3);
    let args = [
        "--progress-interval",
        "3600",
        "full",
        &image,
        "--name",
        "web1",
    ];
    let lines = lab.run(&args).lines();
    assert!(
        lines.iter().filter(|l| l["type"] == "progress").count() <= 1,
        "{lines:?}"
    );
}

#[test]
fn each_run_has_an_id_of_its_own() {
    let lab = Lab::new();
    let first = lab.run(&["snapshots"]).result();
    let second = lab.run(&["snapshots"]).result();
    assert_ne!(first["run"], second["run"]);
}

#[test]
fn errors_are_json_on_stdout_and_text_on_stderr() {
    let lab = Lab::new();
    let run = lab.run(&["show", "nothing"]);
    let error = run.error(1);
    assert!(
        run.stderr.contains(&text(&error, "message")),
        "{}",
        run.stderr
    );
    let plain = lab.run_text(&["show", "nothing"]);
    assert_eq!(plain.code, Some(1));
    assert!(plain.stdout.is_empty());
    assert!(
        plain.stderr.contains(&text(&error, "message")),
        "{}",
        plain.stderr
    );
}

#[test]
fn warnings_are_lines_and_part_of_the_result() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", MIB, 4);
    let server = lab.nbdkit(&["-r", "--no-sr", "file", &image]);
    let run = lab.try_backup("full", server.uri(), &[]);
    let lines = run.lines();
    let warnings: Vec<&Value> = lines.iter().filter(|l| l["type"] == "warning").collect();
    assert_eq!(warnings.len(), 1, "{lines:?}");
    let result = run.result();
    assert_eq!(result["warnings"].as_array().map(Vec::len), Some(1));
    for field in ["code", "disk", "message"] {
        assert_eq!(warnings[0][field], result["warnings"][0][field], "{field}");
    }
}

#[test]
fn quiet_terminal_less_runs_say_nothing_but_the_result() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", MIB, 5);
    let run = lab.run_text(&["full", &image, "--name", "web1"]);
    assert_eq!(run.code, Some(0));
    assert_eq!(run.stderr, "", "a cron job would mail this");
    assert!(!run.stdout.is_empty());
    assert!(
        run.stdout.is_ascii() && !run.stdout.contains(&0x1b),
        "colours without a terminal"
    );
}
