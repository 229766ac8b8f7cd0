//! When an incremental is not possible: read in full with a reason, or refused.

use serde_json::Value;

use crate::support::MIB;
use crate::support::disk::{add_bitmap, assert_same, reference, remove_bitmap, scatter};
use crate::support::lab::Lab;
use crate::support::process::try_tool;
use crate::support::program::text;
use crate::support::server::uri;

const SIZE: u64 = 16 * MIB;

/// A disk with a full that started `bm0`, and writes since.
fn after_a_full(lab: &Lab, seed: u64) -> String {
    let image = lab.qcow2("vda.qcow2", SIZE, seed);
    add_bitmap(&image, "bm0");
    lab.backup(
        "full",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    scatter(&image, "qcow2", SIZE, 10, seed + 1);
    image
}

/// Runs an incremental that has to fall back for `reason`, and one that may not.
#[track_caller]
fn falls_back(lab: &Lab, image: &str, bitmaps: &[&str], reason: &str) -> Value {
    let server = lab.serve_qcow2(image, bitmaps);
    let before = lab.snapshots();
    let refused = lab
        .try_backup(
            "incremental",
            server.uri(),
            &["--bitmap", "bm0", "--no-fallback"],
        )
        .error(21);
    let message = text(&refused, "message");
    assert!(
        message.contains("vda") && message.contains(reason),
        "{message}"
    );
    assert_eq!(
        lab.snapshots(),
        before,
        "a refused incremental left a snapshot"
    );

    let result = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    let disk = &result["disks"][0];
    assert_eq!(disk["kind"], "full", "{disk}");
    assert_eq!(disk["reason"], reason, "{disk}");
    let raw = lab.file("reference.raw");
    reference(image, "qcow2", &raw);
    lab.assert_restores(&text(&result, "snapshot"), &raw);
    result
}

#[test]
fn first_incremental_is_a_full_for_want_of_a_parent() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", SIZE, 1);
    add_bitmap(&image, "bm0");
    falls_back(&lab, &image, &["bm0"], "no-parent");
}

#[test]
fn fallback_starts_the_chain_anew() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", SIZE, 2);
    add_bitmap(&image, "bm0");
    let first = falls_back(&lab, &image, &["bm0"], "no-parent");
    scatter(&image, "qcow2", SIZE, 10, 3);
    let second = lab.backup(
        "incremental",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    assert_eq!(second["disks"][0]["kind"], "incremental", "{second}");
    assert_eq!(second["disks"][0]["parent"], first["snapshot"]);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&second, "snapshot"), &raw);
}

#[test]
fn bitmap_that_no_snapshot_started_is_not_followed() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", SIZE, 4);
    // A full that knows nothing of the bitmap, and writes before the bitmap began.
    lab.backup("full", lab.serve_qcow2(&image, &[]).uri(), &[]);
    scatter(&image, "qcow2", SIZE, 10, 5);
    add_bitmap(&image, "bm0");
    falls_back(&lab, &image, &["bm0"], "no-parent");
}

#[test]
fn bitmap_of_another_disk_is_not_followed() {
    let lab = Lab::new();
    let image = after_a_full(&lab, 6);
    let other = lab.qcow2("vdb.qcow2", SIZE, 7);
    add_bitmap(&other, "bm0");
    let server = lab.serve_qcow2(&other, &["bm0"]);
    for (name, disk) in [("web1", "vdb"), ("web2", "vda")] {
        let args = [
            "incremental",
            server.uri(),
            "--name",
            name,
            "--disk",
            disk,
            "--bitmap",
            "bm0",
        ];
        let result = lab.run(&args).result();
        assert_eq!(result["disks"][0]["kind"], "full", "{result}");
        let raw = lab.file("reference.raw");
        reference(&other, "qcow2", &raw);
        assert_same(&lab.restore_disk(&text(&result, "snapshot"), disk), &raw);
    }
    drop(server);
    let result = lab.backup(
        "incremental",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    assert_eq!(result["disks"][0]["kind"], "incremental", "{result}");
}

#[test]
fn bitmap_that_the_server_does_not_offer_is_missing() {
    let lab = Lab::new();
    let image = after_a_full(&lab, 8);
    remove_bitmap(&image, "bm0");
    falls_back(&lab, &image, &[], "bitmap-missing");
}

#[test]
fn server_without_structured_replies_has_no_bitmap() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 9);
    let server = lab.nbdkit(&["-r", "file", &image]);
    lab.backup("full", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    scatter(&image, "raw", SIZE, 10, 10);
    let server = lab.nbdkit(&["-r", "--no-sr", "file", &image]);
    let result = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    assert_eq!(result["disks"][0]["kind"], "full", "{result}");
    assert_eq!(result["disks"][0]["reason"], "bitmap-missing", "{result}");
    lab.assert_restores(&text(&result, "snapshot"), &image);
}

#[test]
fn bitmap_that_a_crash_left_inconsistent_is_not_followed() {
    let lab = Lab::new();
    let image = after_a_full(&lab, 11);
    // A writer killed with the image open leaves the bitmap marked in use; QEMU then refuses to export it.
    let crashed = try_tool(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 3 1M 1M",
            "-c",
            "sigraise 9",
            &image,
        ],
    );
    assert!(!crashed.status.success());
    let refused = try_tool(
        "qemu-nbd",
        &[
            "--read-only",
            "-f",
            "qcow2",
            "-B",
            "bm0",
            "-k",
            &lab.socket(),
            &image,
        ],
    );
    assert!(
        refused.stderr.contains("inconsistent"),
        "{}",
        refused.stderr
    );
    falls_back(&lab, &image, &[], "bitmap-missing");
}

#[test]
fn failed_incremental_leaves_the_chain_as_it_was() {
    let lab = Lab::new();
    let image = after_a_full(&lab, 12);
    let parent = lab.snapshots();
    let gone = uri(&lab.socket(), "vda");
    lab.try_backup("incremental", &gone, &["--bitmap", "bm0"])
        .error(20);
    assert_eq!(lab.snapshots(), parent);
    let result = lab.backup(
        "incremental",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    assert_eq!(text(&result["disks"][0], "parent"), parent[0]);
}
