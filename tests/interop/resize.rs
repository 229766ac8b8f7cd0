//! Disks that grow, shrink, or end inside a chunk or a sector.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::support::disk::{
    Random, add_bitmap, assert_same, file_len, mixed_raw, qemu_io, reference, scatter,
};
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::{number, text};
use crate::support::server::{Server, dirty, nbdinfo};
use crate::support::{CHUNK, KIB, MIB};

/// Resizes an image between a full and an incremental, and returns the incremental's only disk.
fn incremental_after_resize(from: u64, to: u64, seed: u64) -> Value {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", from, seed);
    add_bitmap(&image, "bm0");
    // The last bytes of the old disk hold data, so that a chunk cut short by its end is not just zeros.
    qemu_io(
        &image,
        "qcow2",
        &[format!("write -q -P 0x33 {} 4k", from - 4 * KIB)],
    );
    let full = lab.backup(
        "full",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    let before = lab.file("before.raw");
    reference(&image, "qcow2", &before);

    let shrink: &[&str] = if to < from { &["--shrink"] } else { &[] };
    tool(
        "qemu-img",
        &[
            &["resize", "-q", "-f", "qcow2"],
            shrink,
            &[&image, &to.to_string()],
        ]
        .concat(),
    );
    scatter(&image, "qcow2", to.min(from) - MIB, 5, seed + 1);
    if to > from + 2 * MIB {
        qemu_io(
            &image,
            "qcow2",
            &[format!("write -q -P 0x44 {} 64k", from + MIB)],
        );
    }
    let server = lab.serve_qcow2(&image, &["bm0"]);
    let incremental = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    let after = lab.file("after.raw");
    reference(&image, "qcow2", &after);
    lab.assert_restores(&text(&full, "snapshot"), &before);
    lab.assert_restores(&text(&incremental, "snapshot"), &after);
    let disk = incremental["disks"][0].clone();
    assert_eq!(number(&disk, "size_bytes"), to);
    disk
}

#[test]
fn grown_disk_stays_incremental_and_keeps_what_lies_past_the_old_end() {
    let disk = incremental_after_resize(16 * MIB, 32 * MIB, 1);
    assert_eq!(disk["kind"], "incremental", "{disk}");
    assert!(number(&disk, "read_bytes") < 16 * MIB, "{disk}");
}

#[test]
fn disk_grown_from_inside_a_chunk_reads_that_chunk_again() {
    let disk = incremental_after_resize(16 * MIB + 20 * KIB, 24 * MIB, 2);
    assert_eq!(disk["kind"], "incremental", "{disk}");
}

#[test]
fn disk_grown_within_its_last_chunk_is_right() {
    let disk = incremental_after_resize(16 * MIB + 20 * KIB, 16 * MIB + 80 * KIB, 3);
    assert_eq!(disk["kind"], "incremental", "{disk}");
}

#[test]
fn grown_part_is_read_even_where_the_bitmap_calls_it_clean() {
    // A volume that grows over what an older one left behind: the new part holds data that nobody wrote.
    let lab = Lab::new();
    let (from, to) = (16 * MIB + 20 * KIB, 20 * MIB);
    let (image, data) = (lab.file("vda.qcow2"), lab.file("data.raw"));
    let options = format!("data_file={data},data_file_raw=on");
    let create = ["create", "-q", "-f", "qcow2", "-o", &options, &image];
    tool("qemu-img", &[&create[..], &[&from.to_string()]].concat());
    scatter(&image, "qcow2", from, 20, 7);
    add_bitmap(&image, "bm0");
    let server = lab.serve_qcow2(&image, &["bm0"]);
    lab.backup("full", server.uri(), &["--bitmap", "bm0"]);
    drop(server);

    let old = file_len(&data);
    let file = File::options().write(true).open(&data).unwrap();
    file.write_all_at(&Random::new(8).bytes((to - old) as usize), old)
        .unwrap();
    tool(
        "qemu-img",
        &["resize", "-q", "-f", "qcow2", &image, &to.to_string()],
    );
    let server = lab.serve_qcow2(&image, &["bm0"]);
    assert_eq!(
        dirty(server.uri(), "bm0"),
        [],
        "the grown part is dirty, and shows nothing"
    );
    let incremental = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    assert_eq!(
        incremental["disks"][0]["kind"], "incremental",
        "{incremental}"
    );
    let after = lab.file("after.raw");
    reference(&image, "qcow2", &after);
    lab.assert_restores(&text(&incremental, "snapshot"), &after);
}

#[test]
fn shrunk_disk_is_read_in_full() {
    let disk = incremental_after_resize(32 * MIB, 16 * MIB + 52 * KIB, 4);
    assert_eq!(disk["kind"], "full", "{disk}");
    assert_eq!(disk["reason"], "disk-shrunk", "{disk}");
}

#[test]
fn last_chunk_may_be_short() {
    let lab = Lab::new();
    let size = 8 * MIB + 4 * KIB;
    let image = lab.qcow2("vda.qcow2", size, 5);
    add_bitmap(&image, "bm0");
    qemu_io(
        &image,
        "qcow2",
        &[format!("write -q -P 0x66 {} 4k", 8 * MIB)],
    );
    let full = lab.backup(
        "full",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    let before = lab.file("before.raw");
    reference(&image, "qcow2", &before);
    qemu_io(
        &image,
        "qcow2",
        &[format!("write -q -P 0x67 {} 1k", 8 * MIB + 2 * KIB)],
    );
    let incremental = lab.backup(
        "incremental",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    let disk = &incremental["disks"][0];
    assert_eq!(disk["kind"], "incremental");
    assert_eq!(number(disk, "chunks_total"), size.div_ceil(CHUNK));
    assert!(number(disk, "read_bytes") <= CHUNK, "{disk}");
    let after = lab.file("after.raw");
    reference(&image, "qcow2", &after);
    lab.assert_restores(&text(&full, "snapshot"), &before);
    lab.assert_restores(&text(&incremental, "snapshot"), &after);
}

#[test]
fn sizes_of_odd_bytes_are_kept_to_the_byte() {
    for size in [0, 1, 511, 513, 4097, CHUNK - 1, CHUNK + 1, 3 * MIB + 12_345] {
        let lab = Lab::new();
        let image = lab.file("vda.raw");
        std::fs::write(&image, Random::new(size).bytes(size as usize)).unwrap();
        let server = lab.nbdkit(&["-r", "file", &image]);
        assert_eq!(
            nbdinfo(server.uri())["export-size"],
            size,
            "nbdkit rounds sizes"
        );
        let full = lab.backup("full", server.uri(), &[]);
        assert_eq!(number(&full["disks"][0], "size_bytes"), size);
        let snapshot = text(&full, "snapshot");
        lab.assert_restores(&snapshot, &image);

        let serving = lab.serve(&snapshot);
        assert_eq!(nbdinfo(&serving.uri("vda"))["export-size"], size);
        let out = lab.file("out.raw");
        tool("nbdcopy", &[&serving.uri("vda"), &out]);
        assert_same(&out, &image);
    }
}

#[test]
fn file_whose_size_qemu_nbd_rounds_up_is_backed_up_as_it_is_served() {
    let lab = Lab::new();
    let image = lab.file("vda.raw");
    mixed_raw(&image, 1_048_276, 6);
    let server = Server::qemu_nbd(&lab.socket(), "vda", &["-f", "raw", &image]);
    let full = lab.backup("full", server.uri(), &[]);
    let restored = lab.restore(&text(&full, "snapshot"));
    assert_eq!(file_len(&restored), 1_048_576);
    let served = lab.file("served.raw");
    tool("nbdcopy", &[server.uri(), &served]);
    assert_same(&restored, &served);
}
