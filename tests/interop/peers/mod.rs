//! Each peer in each role, once with each setting that changes what goes over the wire; `docs/testing.md` has the table.

use crate::support::MIB;
use crate::support::disk::{add_bitmap, assert_same, reference, scatter};
use crate::support::lab::Lab;
use crate::support::program::{number, text};

mod guest;
mod libnbd;
mod nbd_client;
mod nbd_server;
mod nbdkit;
mod oldstyle;
mod qemu;
mod qemu_nbd;
mod storage_daemon;
mod table;
mod tls;
mod writable;

const SIZE: u64 = 8 * MIB;

/// A laboratory with one snapshot of a mixed raw image, the snapshot's id, and the image.
fn with_a_snapshot(seed: u64) -> (Lab, String, String) {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, seed);
    let full = lab.backup("full", &image, &[]);
    (lab, text(&full, "snapshot"), image)
}

/// Backs up what a server has at a URI, and compares it with the image behind it.
#[track_caller]
fn backs_up_whole(lab: &Lab, uri: &str, image: &str, more: &[&str]) -> serde_json::Value {
    let full = lab.backup("full", uri, more);
    lab.assert_restores(&text(&full, "snapshot"), image);
    full
}

/// Backs a qcow2 image up in full by its bitmap `bm0`, changes it, and backs up the increment; `serve` starts a server
/// of the image and returns what ends it when dropped, and the URI.
#[track_caller]
fn backs_up_by_bitmap<S>(lab: &Lab, seed: u64, serve: impl Fn(&str) -> (S, String)) {
    let image = lab.qcow2("bitmap.qcow2", SIZE, seed);
    add_bitmap(&image, "bm0");
    let raw = lab.file("reference.raw");
    let (server, uri) = serve(&image);
    let full = lab.backup("full", &uri, &["--bitmap", "bm0"]);
    assert_eq!(full["disks"][0]["kind"], "full");
    assert_eq!(full["warnings"], serde_json::json!([]));
    drop(server);
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&full, "snapshot"), &raw);

    scatter(&image, "qcow2", SIZE, 10, seed);
    let (server, uri) = serve(&image);
    let info = lab
        .run(&["info", &uri, "--map", "--bitmap", "bm0"])
        .result();
    let next = lab.backup("incremental", &uri, &["--bitmap", "bm0"]);
    drop(server);
    let disk = &next["disks"][0];
    assert_eq!(disk["kind"], "incremental", "{next}");
    let dirty = number(disk, "dirty_bytes");
    assert!(0 < dirty && dirty < SIZE / 2, "{next}");
    assert_eq!(number(&info["bitmap"], "dirty_bytes"), dirty, "{info}");
    assert_eq!(info["maps"].as_array().map(Vec::len), Some(2), "{info}");
    assert!(number(disk, "read_bytes") < SIZE / 2, "{next}");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&next, "snapshot"), &raw);
}

/// Restores a mixed disk into a blank export and checks what the server then has.
#[track_caller]
fn restores_into(lab: &Lab, uri: &str, seed: u64, more: &[&str]) {
    let image = lab.raw("restore.raw", SIZE, seed);
    let full = lab.run(&["full", &image]).result();
    let snapshot = text(&full, "snapshot");
    lab.run(&[&["restore", &snapshot, "--to", uri], more].concat())
        .result();
    let again = lab.run(&["full", uri]).result();
    let disk = text(&again["disks"][0], "disk");
    let back = lab.restore_disk(&text(&again, "snapshot"), &disk);
    assert_same(&back, &image);
}
