//! Checking and mending from the command line: exit codes, what is named, and what to do next.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::MIB;
use crate::support::lab::Lab;
use crate::support::program::{Run, number, run, text};

/// The result of a run that found damage.
#[track_caller]
fn damaged(ended: &Run) -> Value {
    assert_eq!(ended.code, Some(13), "{}", ended.stderr);
    let last = ended.lines().pop().unwrap();
    assert_eq!(last["type"], "result", "{last}");
    assert_eq!(last["status"], "damaged", "{last}");
    last
}

/// Flips a bit and makes the change visible to nothing else.
fn flip(file: &Path, at: usize) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[at] ^= 4;
    std::fs::remove_file(file).unwrap();
    std::fs::write(file, bytes).unwrap();
}

fn packs(lab: &Lab) -> Vec<PathBuf> {
    let files = lab.repository_files().into_iter();
    files
        .filter(|f| f.to_str().unwrap().contains("/packs/"))
        .collect()
}

#[test]
fn damage_is_found_named_marked_and_healed() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 4 * MIB, 1);
    let id = text(&lab.backup("full", &image, &[]), "snapshot");
    let whole = lab.run(&["check", "--read-data"]).result();
    assert_eq!(whole["status"], "ok");
    assert_eq!(number(&whole, "read_packs"), number(&whole, "packs"));
    assert_eq!(whole["damaged_files"], Value::Array(Vec::new()));
    flip(&packs(&lab)[0], 100);
    lab.run(&["check"]).result();
    let found = damaged(&lab.run(&["check", "--read-data"]));
    let range = &found["damaged_ranges"][0];
    assert_eq!(text(range, "snapshot"), id);
    assert_eq!(text(range, "disk"), "vda");
    assert_eq!(number(range, "file_offset_bytes"), 72);
    assert!(number(range, "length_bytes") > 0);
    assert!(text(range, "file").starts_with("packs/"));
    assert_eq!(number(&found, "damaged_files_total"), 1);
    let to = lab.file("out");
    let error = lab.run(&["restore", &id, "--to", &to]).error(13);
    assert!(text(&error, "message").contains("vda"), "{error}");
    let shown = lab.run_text(&["check", "--read-data", "--repair"]);
    assert_eq!(shown.code, Some(13), "{}", shown.stderr);
    let shown = String::from_utf8(shown.stdout).unwrap();
    for words in ["lost: snapshot", "disk vda", "marked", "DAMAGED"] {
        assert!(shown.contains(words), "{shown}");
    }
    lab.backup("full", &image, &[]);
    lab.run(&["check", "--read-data=100%", "--repair"]).result();
    lab.assert_restores(&id, &image);
}

#[test]
fn index_and_copies_of_small_files_are_made_again() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", MIB, 1);
    let id = text(&lab.backup("full", &image, &[]), "snapshot");
    let repository = PathBuf::from(lab.repository());
    std::fs::remove_dir_all(repository.join("idx")).unwrap();
    flip(&repository.join("config"), 30);
    std::fs::remove_file(repository.join("keys/0.bak")).unwrap();
    let found = damaged(&lab.run(&["check"]));
    assert_eq!(number(&found, "damaged_files_total"), 3, "{found}");
    let mended = lab.run(&["check", "--repair"]).result();
    assert_eq!(mended["index_rebuilt"], true);
    let files = mended["damaged_files"].as_array().unwrap();
    assert!(files.iter().all(|f| f["repaired"] == true), "{mended}");
    let whole = lab.run(&["check"]).result();
    assert_eq!(number(&whole, "damaged_files_total"), 0, "{whole}");
    lab.assert_restores(&id, &image);
}

#[test]
fn repository_is_scrubbed_without_its_password() {
    let lab = Lab::empty();
    let key = lab.file("key");
    std::fs::write(&key, [7; 64]).unwrap();
    lab.run(&["--key-file", &key, "init"]).result();
    let image = lab.raw("vda.raw", MIB, 1);
    let full = ["--key-file", &key, "full", &image, "--name", "web1"];
    lab.run(&full).result();
    lab.run(&["check"]).error(12);
    let found = lab.run(&["check", "--no-key"]).result();
    assert_eq!(found["keyless"], true);
    flip(&packs(&lab)[0], 100);
    let found = damaged(&lab.run(&["check", "--no-key"]));
    assert_eq!(number(&found, "damaged_files_total"), 1);
    lab.run(&["check", "--no-key", "--repair"]).error(2);
    run(&["--json", "--repo", "/nonexistent", "check", "--no-key"]).error(10);
    lab.run(&["check", "--read-data=101%"]).error(2);
}

#[test]
fn lost_pack_is_fetched_from_a_mirror() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 4 * MIB, 1);
    let id = text(&lab.backup("full", &image, &[]), "snapshot");
    let mirror = lab.file("mirror");
    let copied = std::process::Command::new("cp")
        .args(["-r", &lab.repository(), &mirror])
        .status()
        .unwrap();
    assert!(copied.success());
    for pack in packs(&lab) {
        std::fs::remove_file(pack).unwrap();
    }
    let found = damaged(&lab.run(&["check"]));
    assert!(number(&found, "damaged_bytes") > 0);
    let empty = lab.file("empty");
    std::fs::create_dir(&empty).unwrap();
    let failed = damaged(&lab.run(&["repair", "--from", &empty]));
    assert_eq!(failed["fetched"], Value::Array(Vec::new()));
    assert!(!failed["failed"].as_array().unwrap().is_empty(), "{failed}");
    let done = lab.run(&["repair", "--from", &mirror]).result();
    assert_eq!(done["fetched"].as_array().unwrap().len(), 1, "{done}");
    lab.assert_restores(&id, &image);
    lab.run(&["check", "--read-data"]).result();
}
