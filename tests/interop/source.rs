//! Image files as sources, and several disks in one snapshot.

use serde_json::Value;

use crate::support::MIB;
use crate::support::disk::{add_bitmap, assert_same, reference, scatter};
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::text;

const SIZE: u64 = 12 * MIB;

#[test]
fn raw_image_is_a_source() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE + 333, 1);
    let full = lab.backup("full", &image, &[]);
    lab.assert_restores(&text(&full, "snapshot"), &image);
}

#[test]
fn qcow2_image_is_a_source() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", SIZE, 2);
    let full = lab.backup("full", &image, &[]);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&full, "snapshot"), &raw);
}

#[test]
fn qcow2_image_with_a_backing_file_is_a_source() {
    let lab = Lab::new();
    let base = lab.qcow2("base.qcow2", SIZE, 3);
    let image = lab.file("vda.qcow2");
    tool(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image,
        ],
    );
    scatter(&image, "qcow2", SIZE, 10, 4);
    let full = lab.backup("full", &image, &[]);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&full, "snapshot"), &raw);
}

#[test]
fn image_of_any_format_that_qemu_reads_is_a_source_when_its_format_is_said() {
    let lab = Lab::new();
    let raw = lab.raw("reference.raw", SIZE, 5);
    let image = lab.file("vda.vmdk");
    tool(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "vmdk", &raw, &image],
    );
    let full = lab.backup("full", &image, &["--format", "vmdk"]);
    lab.assert_restores(&text(&full, "snapshot"), &raw);
}

#[test]
fn raw_image_whose_guest_wrote_a_qcow2_header_is_not_taken_for_one() {
    let lab = Lab::new();
    let secret = lab.raw("secret.raw", MIB, 6);
    let image = lab.file("vda.raw");
    tool(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &secret, "-F", "raw", &image,
        ],
    );
    let refused = lab.try_backup("full", &image, &[]);
    assert_ne!(refused.code, Some(0), "the format was guessed");
    assert!(text(refused.lines().last().unwrap(), "message").contains("--format"));
    assert!(lab.snapshots().is_empty());
    let full = lab.backup("full", &image, &["--format", "raw"]);
    lab.assert_restores(&text(&full, "snapshot"), &image);
}

#[test]
fn image_that_does_not_exist_is_a_source_out_of_reach() {
    let lab = Lab::new();
    for image in ["missing.raw", "missing.qcow2"] {
        let path = lab.file(image);
        let error = lab.try_backup("full", &path, &[]).error(20);
        assert!(text(&error, "message").contains(&path), "{error}");
    }
}

#[test]
fn qcow2_image_that_is_damaged_is_refused_with_what_qemu_says() {
    let lab = Lab::new();
    let image = lab.file("vda.qcow2");
    std::fs::write(&image, b"QFI\xfb and then nothing that makes sense, for more than a header's length.......................................").unwrap();
    let error = lab.try_backup("full", &image, &[]).error(20);
    assert!(text(&error, "message").contains("vda.qcow2"), "{error}");
}

#[test]
fn several_sources_are_disks_of_one_snapshot() {
    let lab = Lab::new();
    let a = lab.qcow2("root.qcow2", SIZE, 7);
    let b = lab.raw("data.raw", SIZE + 4096, 8);
    add_bitmap(&a, "bm0");
    let server = lab.serve_qcow2(&a, &["bm0"]);
    let disks = ["--name", "web1", "--disk", "vda", "--disk", "vdb"];
    let full = lab
        .run(&[&["full", server.uri(), &b, "--bitmap", "bm0"], &disks[..]].concat())
        .result();
    drop(server);
    let raw = lab.file("reference.raw");
    reference(&a, "qcow2", &raw);
    let names: Vec<&Value> = full["disks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| &d["disk"])
        .collect();
    assert_eq!(names, ["vda", "vdb"]);
    let snapshot = text(&full, "snapshot");
    assert_eq!(lab.snapshots(), [snapshot.as_str()]);
    assert_same(&lab.restore_disk(&snapshot, "vda"), &raw);
    assert_same(&lab.restore_disk(&snapshot, "vdb"), &b);

    let ambiguous = lab
        .run(&["restore", &snapshot, "--to", &lab.file("out")])
        .error(1);
    let message = text(&ambiguous, "message");
    assert!(
        message.contains("vda") && message.contains("vdb"),
        "{message}"
    );
    assert!(!std::fs::exists(lab.file("out")).unwrap());

    let serving = lab.serve(&snapshot);
    for (disk, reference) in [("vda", &raw), ("vdb", &b)] {
        let out = lab.file("out.raw");
        tool("nbdcopy", &[&serving.uri(disk), &out]);
        assert_same(&out, reference);
    }
}

#[test]
fn each_disk_of_an_incremental_falls_back_for_itself() {
    let lab = Lab::new();
    let a = lab.qcow2("root.qcow2", SIZE, 9);
    let b = lab.qcow2("data.qcow2", SIZE, 10);
    add_bitmap(&a, "bm0");
    lab.backup(
        "full",
        lab.serve_qcow2(&a, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    scatter(&a, "qcow2", SIZE, 10, 11);
    add_bitmap(&b, "bm0");
    let (first, second) = (lab.serve_qcow2(&a, &["bm0"]), lab.serve_qcow2(&b, &["bm0"]));
    let disks = [
        "--name", "web1", "--disk", "vda", "--disk", "vdb", "--bitmap", "bm0",
    ];
    let args = [&["incremental", first.uri(), second.uri()], &disks[..]].concat();
    let result = lab.run(&args).result();
    drop((first, second));
    assert_eq!(result["disks"][0]["kind"], "incremental", "{result}");
    assert_eq!(result["disks"][1]["kind"], "full", "{result}");
    assert_eq!(result["disks"][1]["reason"], "new-disk", "{result}");
    for (disk, image) in [("vda", &a), ("vdb", &b)] {
        let raw = lab.file("reference.raw");
        reference(image, "qcow2", &raw);
        let restored = lab.restore_disk(&text(&result, "snapshot"), disk);
        assert_same(&restored, &raw);
        std::fs::remove_file(restored).unwrap();
    }
}

#[test]
fn one_source_that_fails_leaves_no_snapshot_of_the_others() {
    let lab = Lab::new();
    let a = lab.raw("root.raw", SIZE, 12);
    let missing = lab.file("missing.raw");
    lab.run(&[
        "full", &a, &missing, "--name", "web1", "--disk", "vda", "--disk", "vdb",
    ])
    .error(20);
    assert!(lab.snapshots().is_empty());
}

#[test]
fn names_default_to_the_export_and_the_file() {
    let lab = Lab::new();
    let image = lab.qcow2("root.qcow2", MIB, 13);
    let server = lab.serve_qcow2(&image, &[]);
    let by_export = lab.run(&["full", server.uri()]).result();
    assert_eq!(by_export["disks"][0]["disk"], "vda");
    assert_eq!(by_export["name"], "vda");
    drop(server);
    let by_file = lab.run(&["full", &image]).result();
    let disk = text(&by_file["disks"][0], "disk");
    assert!(disk == "root.qcow2" || disk == "root", "{disk}");
}
