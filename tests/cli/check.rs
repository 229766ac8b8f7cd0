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

#[test]
fn pack_that_is_damaged_on_disk_is_repaired_from_its_parity() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 4 * MIB, 1);
    let id = text(&lab.backup("full", &image, &[]), "snapshot");
    let pack = packs(&lab).remove(0);
    let good = std::fs::read(&pack).unwrap();
    // Four of 64 parts: as a disk loses sectors.
    let mut bytes = good.clone();
    let part_len = good.len().div_ceil(64).next_multiple_of(64);
    for part in [3, 17, 40, 62] {
        let at = part_len * part + 100;
        bytes[at..at + 600].fill(0);
    }
    std::fs::remove_file(&pack).unwrap();
    std::fs::write(&pack, &bytes).unwrap();
    let found = damaged(&lab.run(&["check", "--read-data"]));
    let file = &found["damaged_files"][0];
    assert_eq!(file["parity_mends"], true, "{found}");
    let shown = lab.run_text(&["check", "--read-data"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("its parity can mend it"), "{shown}");
    assert!(shown.contains("run nbdbackup repair"), "{shown}");
    // Nothing is known of it yet, and nothing is read to find it.
    let done = lab.run(&["repair", "--only-marked"]).result();
    assert_eq!(done["mended"], Value::Array(Vec::new()));
    let done = lab.run(&["repair"]).result();
    assert_eq!(done["status"], "ok");
    assert_eq!(done["from"], Value::Null);
    assert_eq!(done["mended"].as_array().unwrap().len(), 1, "{done}");
    assert!(std::fs::read(&pack).unwrap() == good);
    lab.run(&["check", "--read-data"]).result();
    lab.assert_restores(&id, &image);

    // One more is too much, and is said.
    bytes[100..700].fill(0);
    std::fs::remove_file(&pack).unwrap();
    std::fs::write(&pack, &bytes).unwrap();
    let failed = damaged(&lab.run(&["repair"]));
    let failure = text(&failed["failed"][0], "problem");
    assert!(failure.contains("parity makes up for 4"), "{failed}");
    assert!(std::fs::read(&pack).unwrap() == bytes);
    // What has been marked needs no search.
    std::fs::write(&pack, &good).unwrap();
    let done = lab.run(&["repair", "--only-marked"]).result();
    assert_eq!(done["whole"].as_array().unwrap().len(), 1, "{done}");
}

#[test]
fn damaged_and_missing_parity_is_said_harms_nothing_and_is_made_anew() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", MIB, 1);
    let id = text(&lab.backup("full", &image, &[]), "snapshot");
    let parity = |lab: &Lab| -> Vec<PathBuf> {
        let files = lab.repository_files().into_iter();
        let parity = files.filter(|f| f.to_str().unwrap().contains("/parity/"));
        parity.collect()
    };
    let files = parity(&lab);
    assert_eq!(files.len(), 2);
    let good = std::fs::read(&files[1]).unwrap();
    std::fs::remove_file(&files[0]).unwrap();
    flip(&files[1], good.len() - 1);
    let found = lab.run(&["check", "--read-data"]).result();
    assert_eq!(number(&found, "damaged_parity_total"), 2, "{found}");
    assert_eq!(number(&found, "parity_packs"), 1, "{found}");
    let keyless = lab.run(&["check", "--no-key"]).result();
    assert_eq!(keyless["damaged_parity"], found["damaged_parity"]);
    let shown = lab.run_text(&["check", "--read-data"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    for words in [
        "parity: parity/",
        "it is missing",
        "run nbdbackup repair",
        "is whole",
    ] {
        assert!(shown.contains(words), "{shown}");
    }
    let done = lab.run(&["repair", "--only-marked"]).result();
    assert_eq!(done["parity_made"].as_array().unwrap().len(), 2, "{done}");
    assert!(std::fs::read(&files[1]).unwrap() == good);
    let found = lab.run(&["check", "--read-data"]).result();
    assert_eq!(number(&found, "damaged_parity_total"), 0, "{found}");
    lab.assert_restores(&id, &image);
}

#[test]
fn parity_is_chosen_when_a_repository_is_made() {
    for (parity, shards) in [(None, 4), (Some("0"), 0), (Some("16"), 16)] {
        let lab = Lab::empty();
        let mut args = vec!["init", "--encryption", "none"];
        args.extend(parity.iter().flat_map(|shards| ["--parity", shards]));
        let made = lab.run(&args).result();
        assert_eq!(number(&made, "parity_shards"), shards);
        let image = lab.raw("vda.raw", MIB, 1);
        lab.backup("full", &image, &[]);
        let files = lab.repository_files().into_iter();
        let has = files.filter(|f| f.to_str().unwrap().contains("/parity/"));
        assert_eq!(has.count(), if shards == 0 { 0 } else { 2 });
    }
    Lab::empty().run(&["init", "--parity", "17"]).error(2);
}
