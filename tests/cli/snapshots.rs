//! Listing, showing and comparing snapshots.

use serde_json::Value;

use crate::support::disk::{qemu_io, scatter};
use crate::support::lab::Lab;
use crate::support::program::{number, text};
use crate::support::{CHUNK, MIB};

/// Takes a full of an image as a disk of a machine and returns the snapshot's id.
fn full(lab: &Lab, image: &str, name: &str, disk: &str, more: &[&str]) -> String {
    let result = lab
        .run(&[&["full", image, "--name", name, "--disk", disk], more].concat())
        .result();
    text(&result, "snapshot")
}

fn listed(lab: &Lab, filter: &[&str]) -> Vec<String> {
    let result = lab.run(&[&["snapshots"], filter].concat()).result();
    result["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| text(s, "id"))
        .collect()
}

#[test]
fn snapshots_are_listed_oldest_first_and_by_filter() {
    let lab = Lab::new();
    assert_eq!(listed(&lab, &[]), [""; 0]);
    let image = lab.raw("disk.raw", MIB, 1);
    let a = full(&lab, &image, "web1", "vda", &["--tag", "nightly"]);
    let b = full(
        &lab,
        &image,
        "web1",
        "vda",
        &["--tag", "weekly", "--tag", "nightly"],
    );
    let c = full(&lab, &image, "web2", "vda", &[]);
    let d = full(&lab, &image, "web2", "vdb", &[]);
    let all = [a.clone(), b.clone(), c.clone(), d.clone()];
    assert_eq!(listed(&lab, &[]), all);
    assert_eq!(listed(&lab, &["--name", "web1"]), all[..2]);
    assert_eq!(listed(&lab, &["--disk", "vdb"]), all[3..]);
    assert_eq!(listed(&lab, &["--tag", "nightly"]), all[..2]);
    assert_eq!(listed(&lab, &["--tag", "weekly"]), all[1..2]);
    assert_eq!(listed(&lab, &["--latest", "1"]), [b, d]);
    assert_eq!(listed(&lab, &["--name", "web2", "--latest", "2"]), all[2..]);
    assert_eq!(listed(&lab, &["--name", "web3"]), [""; 0]);
    let text = lab.run_text(&["snapshots"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert_eq!(
        text.lines().filter(|l| l.contains("web")).count(),
        4,
        "{text}"
    );
    assert!(text.contains(&a[..8]) && text.contains("nightly"), "{text}");
}

#[test]
fn snapshot_is_shown_with_what_its_backup_reported() {
    let lab = Lab::new();
    let image = lab.raw("disk.raw", 4 * MIB, 2);
    let result = lab.backup("full", &image, &["--tag", "nightly"]);
    let id = text(&result, "snapshot");
    let shown = lab.run(&["show", &id[..6]]).result();
    let snapshot = &shown["snapshot"];
    assert_eq!(text(snapshot, "id"), id);
    assert_eq!(snapshot["name"], "web1");
    assert_eq!(snapshot["tags"], Value::from(vec!["nightly"]));
    for field in ["started", "finished"] {
        assert_eq!(snapshot[field], result[field], "{field}");
    }
    let (disk, reported) = (&snapshot["disks"][0], &result["disks"][0]);
    for field in [
        "disk",
        "kind",
        "parent",
        "size_bytes",
        "read_bytes",
        "zero_bytes",
        "chunks_new",
        "stored_bytes",
    ] {
        assert_eq!(disk[field], reported[field], "{field}");
    }
    assert!(text(disk, "source").contains("disk.raw"));
    let text = String::from_utf8(lab.run_text(&["show", &id]).stdout).unwrap();
    for word in [&id, "web1", "vda", "nightly", "4194304"] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
}

#[test]
fn id_prefix_must_be_of_four_characters_and_of_one_snapshot() {
    let lab = Lab::new();
    let image = lab.raw("disk.raw", MIB, 3);
    let id = full(&lab, &image, "web1", "vda", &[]);
    for length in [4, 5, 12, id.len()] {
        assert_eq!(
            text(
                &lab.run(&["show", &id[..length]]).result()["snapshot"],
                "id"
            ),
            id
        );
    }
    lab.run(&["show", &id[..3]]).error(1);
    lab.run(&["show", &format!("{id}0")]).error(1);
}

#[test]
fn latest_and_names_and_times_address_snapshots() {
    let lab = Lab::new();
    let image = lab.raw("disk.raw", MIB, 4);
    let first = full(&lab, &image, "web1", "vda", &[]);
    let other = full(&lab, &image, "web2", "vda", &[]);
    let second = full(&lab, &image, "web1", "vda", &[]);
    let id = |form: &str| text(&lab.run(&["show", form]).result()["snapshot"], "id");
    assert_eq!(id("latest"), second);
    assert_eq!(id("web1"), second);
    assert_eq!(id("web2"), other);
    assert_eq!(id("web2@latest"), other);
    let finished = text(&lab.run(&["show", &first]).result()["snapshot"], "finished");
    assert_eq!(id(&format!("web1@{finished}")), first);
    lab.run(&["show", "web1@1999-01-01T00:00:00Z"]).error(1);
    lab.run(&["show", "web1@yesterday-ish"]).error(2);
}

#[test]
fn diff_names_the_ranges_that_differ() {
    let lab = Lab::new();
    let size = 8 * MIB;
    let image = lab.file("disk.raw");
    std::fs::write(&image, vec![1; size as usize]).unwrap();
    let a = full(&lab, &image, "web1", "vda", &[]);
    qemu_io(
        &image,
        "raw",
        &[
            "write -q -P 2 1M 4k".to_owned(),
            "write -q -z 3M 256k".to_owned(),
        ],
    );
    let b = full(&lab, &image, "web1", "vda", &[]);
    let diff = lab.run(&["diff", &a, &b]).result();
    let ranges: Vec<(u64, u64)> = diff["ranges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| (number(r, "offset_bytes"), number(r, "length_bytes")))
        .collect();
    assert_eq!(ranges, [(MIB, CHUNK), (3 * MIB, 2 * CHUNK)]);
    assert_eq!(number(&diff, "differing_bytes"), 3 * CHUNK);
    assert_eq!(diff["a"], a.as_str());
    assert_eq!(diff["b"], b.as_str());
    assert_eq!(diff["disk"], "vda");
    let back = lab.run(&["diff", &b, &a]).result();
    assert_eq!(back["ranges"], diff["ranges"]);
    let same = lab.run(&["diff", &a, &a]).result();
    assert_eq!(same["ranges"], Value::Array(Vec::new()));
    assert_eq!(number(&same, "differing_bytes"), 0);
}

#[test]
fn diff_counts_what_only_the_larger_disk_has() {
    let lab = Lab::new();
    let image = lab.file("disk.raw");
    std::fs::write(&image, vec![1; MIB as usize]).unwrap();
    let a = full(&lab, &image, "web1", "vda", &[]);
    std::fs::write(&image, vec![1; 2 * MIB as usize]).unwrap();
    let b = full(&lab, &image, "web1", "vda", &[]);
    let diff = lab.run(&["diff", &a, &b]).result();
    assert_eq!(number(&diff, "differing_bytes"), MIB, "{diff}");
}

#[test]
fn diff_of_many_changes_is_what_a_compare_of_the_files_says() {
    let lab = Lab::new();
    let size = 16 * MIB;
    let image = lab.raw("disk.raw", size, 5);
    let old = std::fs::read(&image).unwrap();
    let a = full(&lab, &image, "web1", "vda", &[]);
    scatter(&image, "raw", size, 30, 6);
    let b = full(&lab, &image, "web1", "vda", &[]);
    let new = std::fs::read(&image).unwrap();
    let changed = old
        .chunks(CHUNK as usize)
        .zip(new.chunks(CHUNK as usize))
        .filter(|(x, y)| x != y)
        .count();
    let diff = lab.run(&["diff", &a, &b]).result();
    assert_eq!(number(&diff, "differing_bytes"), changed as u64 * CHUNK);
}
