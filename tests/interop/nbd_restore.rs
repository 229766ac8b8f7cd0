//! Restores into NBD exports of qemu-nbd and nbdkit.

use crate::support::MIB;
use crate::support::disk::assert_same;
use crate::support::lab::{Lab, SIZE};
use crate::support::process::tool;
use crate::support::program::{number, text};
use crate::support::server::Server;

/// Serves an image for writing with qemu-nbd.
fn writable(lab: &Lab, format: &str, image: &str) -> Server {
    Server::qemu_nbd_writable(&lab.socket(), "vda", &["-f", format, image])
}

#[test]
fn blank_image_of_any_format_takes_a_disk_and_stays_sparse() {
    for format in ["qcow2", "raw"] {
        let (lab, snapshot, image) = Lab::with_a_snapshot(61);
        let target = lab.file("target");
        let size = SIZE.to_string();
        tool("qemu-img", &["create", "-q", "-f", format, &target, &size]);
        let server = writable(&lab, format, &target);
        let result = lab
            .run(&["restore", &snapshot, "--to", server.uri()])
            .result();
        assert_eq!(
            number(&result, "written_bytes") + number(&result, "zero_bytes"),
            SIZE
        );
        assert!(number(&result, "zero_bytes") > MIB);
        drop(server);
        let raw = lab.file("target.raw");
        tool(
            "qemu-img",
            &["convert", "-f", format, "-O", "raw", &target, &raw],
        );
        assert_same(&raw, &image);
    }
}

#[test]
fn old_data_is_overwritten_only_by_force_and_then_nothing_of_it_is_left() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(62);
    // nbdkit's memory zeroes fast; its nozero filter makes it refuse, or know no zeros at all.
    let size = format!("{SIZE}");
    for more in [
        &["memory", &size][..],
        &["--filter=nozero", "memory", &size, "fastzeromode=none"],
        &["--filter=nozero", "memory", &size, "zeromode=none"],
    ] {
        let server = lab.nbdkit(more);
        let old = lab.file("old.raw");
        std::fs::write(&old, vec![0xaa; SIZE as usize]).unwrap();
        tool("nbdcopy", &[&old, server.uri()]);
        let error = lab
            .run(&["restore", &snapshot, "--to", server.uri()])
            .error(1);
        assert_eq!(error["code"], "target-exists", "{error}");
        assert!(text(&error, "message").contains("--force"), "{error}");
        lab.run(&["restore", &snapshot, "--to", server.uri(), "--force"])
            .result();
        let out = lab.file("out.raw");
        tool("nbdcopy", &[server.uri(), &out]);
        assert_same(&out, &image);
    }
}

#[test]
fn export_that_cannot_take_the_disk_is_refused_before_anything_is_written() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(63);
    let small = (SIZE - 512).to_string();
    let size = SIZE.to_string();
    let exact = lab.nbdkit(&["-r", "memory", &size]);
    let error = lab
        .run(&["restore", &snapshot, "--to", exact.uri(), "--force"])
        .error(1);
    assert!(text(&error, "message").contains("read-only"), "{error}");
    let server = lab.nbdkit(&["memory", &small]);
    let error = lab
        .run(&["restore", &snapshot, "--to", server.uri(), "--force"])
        .error(1);
    assert!(text(&error, "message").contains(&small), "{error}");
    let nobody = format!("nbd+unix:///?socket={}", lab.socket());
    lab.run(&["restore", &snapshot, "--to", &nobody]).error(1);
    lab.run(&[
        "restore",
        &snapshot,
        "--to",
        server.uri(),
        "--format",
        "qcow2",
    ])
    .error(2);
}

#[test]
fn larger_export_with_large_blocks_keeps_what_lies_behind_the_disk() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(64);
    let size = (16 * MIB).to_string();
    let policy = [
        "--filter=blocksize-policy",
        "memory",
        &size,
        "blocksize-minimum=64k",
        "blocksize-preferred=64k",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ];
    let server = lab.nbdkit(&policy);
    let old = lab.file("old.raw");
    std::fs::write(&old, vec![0xaa; 16 * MIB as usize]).unwrap();
    tool("nbdcopy", &[&old, server.uri()]);
    lab.run(&["restore", &snapshot, "--to", server.uri(), "--force"])
        .result();
    let out = lab.file("out.raw");
    tool("nbdcopy", &[server.uri(), &out]);
    let out = std::fs::read(out).unwrap();
    let disk = std::fs::read(image).unwrap();
    assert!(out[..disk.len()] == disk);
    let block = disk.len().next_multiple_of(64 << 10);
    assert!(out[block..].iter().all(|byte| *byte == 0xaa));
}

#[test]
fn write_that_fails_fails_the_restore() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(65);
    let size = SIZE.to_string();
    let server = lab.nbdkit(&[
        "--filter=error",
        "memory",
        &size,
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=50%",
    ]);
    let error = lab
        .run(&["restore", &snapshot, "--to", server.uri()])
        .error(1);
    assert_eq!(error["code"], "target-failed", "{error}");
    assert!(text(&error, "message").contains("ENOSPC"), "{error}");
}
