//! Copying snapshots to another repository.

use std::time::Duration;

use serde_json::Value;

use crate::support::MIB;
use crate::support::lab::Lab;
use crate::support::program::{number, run, text};

/// Makes an encrypted repository beside the lab's own; returns its path and its key file's.
fn target(lab: &Lab, more: &[&str]) -> (String, String) {
    let (path, key) = (lab.file("other"), lab.file("other-key"));
    std::fs::write(&key, [3; 64]).unwrap();
    let init = ["--json", "--repo", &path, "init", "--key-file", &key];
    run(&[&init[..], more].concat()).result();
    (path, key)
}

fn count(value: &Value) -> usize {
    value.as_array().map_or(0, Vec::len)
}

#[test]
fn snapshots_are_copied_once_and_incrementally_to_an_encrypted_repository() {
    let lab = Lab::new();
    let (other, key) = target(&lab, &[]);
    let image = lab.raw("vda.raw", 8 * MIB, 1);
    let first = text(&lab.backup("full", &image, &["--tag", "gold"]), "snapshot");
    let reference = lab.file("first.raw");
    std::fs::copy(&image, &reference).unwrap();
    let copy = ["copy", "--to", &other, "--to-key-file", &key];
    let done = lab.run(&copy).result();
    assert_eq!((count(&done["copied"]), count(&done["skipped"])), (1, 0));
    assert_eq!(text(&done["copied"][0], "from"), first);
    let there = text(&done["copied"][0], "to");
    // A little changes.
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap();
    file.write_all_at(b"changed", 3 * MIB).unwrap();
    lab.backup("full", &image, &[]);
    let done = lab.run(&copy).result();
    assert_eq!((count(&done["copied"]), count(&done["skipped"])), (1, 1));
    let second = &done["copied"][0];
    assert_eq!(number(second, "chunks_new"), 1, "{second}");
    assert!(number(second, "read_bytes") <= 256 << 10, "{second}");
    let done = lab.run(&copy).result();
    assert_eq!((count(&done["copied"]), count(&done["skipped"])), (0, 2));

    let there_with = |args: &[&str]| {
        let base = ["--json", "--repo", &other, "--key-file", &key];
        run(&[&base[..], args].concat())
    };
    let shown = there_with(&["show", &there]).result();
    assert_eq!(shown["snapshot"]["origin"]["snapshot"], first);
    assert_eq!(shown["snapshot"]["tags"][0], "gold");
    let ours = lab.run(&["show", &first]).result();
    for field in ["name", "started", "finished"] {
        assert_eq!(shown["snapshot"][field], ours["snapshot"][field], "{field}");
    }
    for (words, want) in [(there.as_str(), &reference), ("latest", &image)] {
        let to = lab.file(&format!("restored-{words}"));
        there_with(&["restore", words, "--to", &to]).result();
        crate::support::disk::assert_same(&to, want);
    }
    assert_eq!(there_with(&["check", "--read-data"]).code, Some(0));
    // Copying back knows the snapshots for what they are.
    let back = ["copy", "--to", &lab.repository()];
    let done = there_with(&back).result();
    assert_eq!((count(&done["copied"]), count(&done["skipped"])), (0, 2));
}

#[test]
fn copy_is_refused_between_chunk_sizes_and_without_the_other_password() {
    let lab = Lab::new();
    let (other, key) = target(&lab, &["--chunk-size", "64KiB"]);
    let image = lab.raw("vda.raw", MIB, 1);
    lab.backup("full", &image, &[]);
    let error = lab.run(&["copy", "--to", &other]).error(12);
    assert_eq!(error["code"], "password-needed");
    let copy = ["copy", "--to", &other, "--to-key-file", &key];
    let error = lab.run(&copy).error(2);
    assert!(text(&error, "message").contains("64 KiB"), "{error}");
    lab.run(&["copy", "--to", &lab.repository()]).error(2);
}

#[test]
fn damaged_snapshot_is_named_and_the_others_are_copied() {
    let lab = Lab::new();
    let (other, key) = target(&lab, &[]);
    let images = [lab.raw("a.raw", MIB, 1), lab.raw("b.raw", MIB, 2)];
    let first = text(&lab.backup("full", &images[0], &[]), "snapshot");
    let packs = lab.repository_files();
    let pack = packs
        .iter()
        .find(|f| f.to_str().unwrap().contains("/packs/"));
    lab.backup("full", &images[1], &[]);
    std::fs::write(pack.unwrap(), b"gone").unwrap();
    let run = lab.run(&["copy", "--to", &other, "--to-key-file", &key]);
    assert_eq!(run.code, Some(13));
    let result = run.lines().pop().unwrap();
    assert_eq!(result["status"], "damaged");
    assert_eq!(count(&result["copied"]), 1, "{result}");
    assert_eq!(text(&result["failed"][0], "what"), first);
}

#[test]
fn copy_killed_anywhere_is_gone_on_with_and_what_it_committed_is_whole() {
    let lab = Lab::new();
    let images: Vec<String> = (0..3)
        .map(|n| lab.raw(&format!("{n}.raw"), 16 * MIB, n))
        .collect();
    for (n, image) in images.iter().enumerate() {
        lab.run(&["full", image, "--name", &format!("web{n}")])
            .result();
    }
    let (other, key) = target(&lab, &[]);
    let copy = ["copy", "--to", &other, "--to-key-file", &key];
    let there = |args: &[&str]| {
        let base = ["--json", "--repo", &other, "--key-file", &key];
        run(&[&base[..], args].concat())
    };
    let copied = || count(&there(&["snapshots"]).result()["snapshots"]);
    // Later and later, until one comes to its end.
    let mut after = Duration::from_millis(1);
    let (mut killed, mut before) = (0, 0);
    while lab.start(&copy).kill_after(after) {
        killed += 1;
        after = after * 3 / 2;
        let now = copied();
        assert!(now >= before, "a copied snapshot is gone");
        before = now;
        there(&["check", "--read-data"]).result();
    }
    assert!(killed > 1, "no copy was killed before its end");
    let done = lab.run(&copy).result();
    assert_eq!((count(&done["copied"]), count(&done["skipped"])), (0, 3));
    assert_eq!(copied(), 3);
    for (n, image) in images.iter().enumerate() {
        let to = lab.file(&format!("restored-{n}"));
        there(&["restore", &format!("web{n}@latest"), "--to", &to]).result();
        crate::support::disk::assert_same(&to, image);
    }
}
