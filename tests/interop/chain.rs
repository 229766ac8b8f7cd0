//! Full and incremental backups through `qemu-nbd -B`, against `qemu-img convert` of the same image.

use serde_json::Value;

use crate::support::disk::{
    add_bitmap, assert_same, clear_bitmap, reference, remove_bitmap, scatter,
};
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::{number, text};
use crate::support::server::{Extent, dirty};
use crate::support::{CHUNK, MIB};

const SIZE: u64 = 96 * MIB;

/// A full and an incremental of one image, with what it held at both times.
struct TwoGenerations {
    lab: Lab,
    full: Value,
    incremental: Value,
    gen1: String,
    gen2: String,
    dirty: Vec<Extent>,
}

impl TwoGenerations {
    fn new(seed: u64) -> Self {
        let lab = Lab::new();
        let image = lab.qcow2("vda.qcow2", SIZE, seed);
        add_bitmap(&image, "bm0");
        let server = lab.serve_qcow2(&image, &["bm0"]);
        let full = lab.backup("full", server.uri(), &["--bitmap", "bm0"]);
        drop(server);
        let gen1 = lab.file("gen1.raw");
        reference(&image, "qcow2", &gen1);

        scatter(&image, "qcow2", SIZE, 200, seed + 1);
        let server = lab.serve_qcow2(&image, &["bm0"]);
        let dirty = dirty(server.uri(), "bm0");
        let incremental = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
        drop(server);
        let gen2 = lab.file("gen2.raw");
        reference(&image, "qcow2", &gen2);
        Self {
            lab,
            full,
            incremental,
            gen1,
            gen2,
            dirty,
        }
    }
}

/// The bytes of the chunks that a list of extents touches.
fn rounded_to_chunks(extents: &[Extent], size: u64) -> u64 {
    let mut chunks: Vec<u64> = extents
        .iter()
        .flat_map(|e| e.offset / CHUNK..(e.offset + e.length).div_ceil(CHUNK))
        .collect();
    chunks.sort_unstable();
    chunks.dedup();
    chunks.iter().map(|c| CHUNK.min(size - c * CHUNK)).sum()
}

#[test]
fn full_and_incremental_restore_to_files_as_qemu_img_convert_reads_them() {
    let two = TwoGenerations::new(1);
    two.lab
        .assert_restores(&text(&two.full, "snapshot"), &two.gen1);
    two.lab
        .assert_restores(&text(&two.incremental, "snapshot"), &two.gen2);
}

#[test]
fn incremental_reads_no_more_than_the_dirty_extents_rounded_to_chunks() {
    let two = TwoGenerations::new(2);
    let disk = &two.incremental["disks"][0];
    assert_eq!(disk["kind"], "incremental");
    assert_eq!(disk["reason"], Value::Null);
    assert_eq!(disk["parent"], two.full["snapshot"]);
    assert_eq!(disk["bitmap"], "bm0");
    assert_eq!(number(disk, "size_bytes"), SIZE);
    assert_eq!(number(disk, "chunks_total"), SIZE / CHUNK);
    assert_eq!(
        number(disk, "dirty_bytes"),
        two.dirty.iter().map(|e| e.length).sum::<u64>()
    );
    let may_read = rounded_to_chunks(&two.dirty, SIZE);
    let read = number(disk, "read_bytes");
    assert!(
        read > 0 && read <= may_read,
        "read {read} bytes, the dirty chunks are {may_read}"
    );
    assert!(
        may_read < SIZE / 2,
        "the test dirties too much to show anything"
    );
    assert!(number(disk, "chunks_new") * CHUNK <= may_read, "{disk}");
    let full = &two.full["disks"][0];
    assert_eq!(full["kind"], "full");
    assert_eq!(full["reason"], Value::Null);
    assert_eq!(full["parent"], Value::Null);
    assert!(number(full, "read_bytes") <= SIZE);
}

#[test]
fn incrementals_in_a_row_are_right_whether_the_bitmap_is_cleared_or_grows() {
    for clears in [false, true] {
        let lab = Lab::new();
        let size = 24 * MIB;
        let image = lab.qcow2("vda.qcow2", size, 3);
        add_bitmap(&image, "bm0");
        let mut snapshots = Vec::new();
        for generation in 0..5 {
            let command = if generation == 0 {
                "full"
            } else {
                "incremental"
            };
            let server = lab.serve_qcow2(&image, &["bm0"]);
            let result = lab.backup(command, server.uri(), &["--bitmap", "bm0"]);
            drop(server);
            if generation > 0 {
                assert_eq!(result["disks"][0]["kind"], "incremental", "{result}");
                let (parent, _): &(String, String) = snapshots.last().unwrap();
                assert_eq!(text(&result["disks"][0], "parent"), *parent);
            }
            let raw = lab.file(&format!("gen{generation}.raw"));
            reference(&image, "qcow2", &raw);
            snapshots.push((text(&result, "snapshot"), raw));
            if clears {
                clear_bitmap(&image, "bm0");
            }
            scatter(&image, "qcow2", size, 20, 30 + generation);
        }
        for (snapshot, raw) in &snapshots {
            lab.assert_restores(snapshot, raw);
        }
    }
}

#[test]
fn incremental_with_nothing_dirty_reads_nothing() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", 16 * MIB, 4);
    add_bitmap(&image, "bm0");
    let server = lab.serve_qcow2(&image, &["bm0"]);
    let full = lab.backup("full", server.uri(), &["--bitmap", "bm0"]);
    let again = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    let disk = &again["disks"][0];
    assert_eq!(disk["kind"], "incremental");
    assert_eq!(number(disk, "dirty_bytes"), 0);
    assert_eq!(number(disk, "read_bytes"), 0);
    assert_eq!(number(disk, "chunks_new"), 0);
    assert_ne!(again["snapshot"], full["snapshot"]);
    let reference_raw = lab.file("reference.raw");
    reference(&image, "qcow2", &reference_raw);
    lab.assert_restores(&text(&again, "snapshot"), &reference_raw);
}

#[test]
fn bitmap_started_beside_an_incremental_carries_the_chain_on() {
    let lab = Lab::new();
    let size = 24 * MIB;
    let image = lab.qcow2("vda.qcow2", size, 5);
    add_bitmap(&image, "bm0");
    lab.backup(
        "full",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    scatter(&image, "qcow2", size, 20, 51);

    add_bitmap(&image, "bm1");
    let server = lab.serve_qcow2(&image, &["bm0", "bm1"]);
    let second = lab.backup(
        "incremental",
        server.uri(),
        &["--bitmap", "bm0", "--starts", "bm1"],
    );
    drop(server);
    remove_bitmap(&image, "bm0");
    scatter(&image, "qcow2", size, 20, 52);

    let server = lab.serve_qcow2(&image, &["bm1"]);
    let third = lab.backup("incremental", server.uri(), &["--bitmap", "bm1"]);
    drop(server);
    assert_eq!(third["disks"][0]["kind"], "incremental", "{third}");
    assert_eq!(third["disks"][0]["parent"], second["snapshot"]);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&third, "snapshot"), &raw);
}

#[test]
fn parent_is_the_snapshot_that_the_bitmap_follows_and_not_just_the_latest() {
    let lab = Lab::new();
    let size = 24 * MIB;
    let image = lab.qcow2("vda.qcow2", size, 6);
    add_bitmap(&image, "bm0");
    let first = lab.backup(
        "full",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    clear_bitmap(&image, "bm0");
    scatter(&image, "qcow2", size, 20, 61);
    lab.backup("full", lab.serve_qcow2(&image, &[]).uri(), &[]);
    scatter(&image, "qcow2", size, 20, 62);

    let server = lab.serve_qcow2(&image, &["bm0"]);
    let third = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    assert_eq!(third["disks"][0]["kind"], "incremental", "{third}");
    assert_eq!(third["disks"][0]["parent"], first["snapshot"]);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&third, "snapshot"), &raw);
}

#[test]
fn asserted_parent_is_used() {
    let lab = Lab::new();
    let size = 24 * MIB;
    let image = lab.qcow2("vda.qcow2", size, 7);
    let first = text(
        &lab.backup("full", lab.serve_qcow2(&image, &[]).uri(), &[]),
        "snapshot",
    );
    add_bitmap(&image, "bm0");
    scatter(&image, "qcow2", size, 20, 71);
    let server = lab.serve_qcow2(&image, &["bm0"]);
    let second = lab.backup(
        "incremental",
        server.uri(),
        &["--bitmap", "bm0", "--parent", &first[..8]],
    );
    drop(server);
    assert_eq!(second["disks"][0]["kind"], "incremental", "{second}");
    assert_eq!(text(&second["disks"][0], "parent"), first);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&second, "snapshot"), &raw);
}

#[test]
fn full_again_of_an_unchanged_disk_stores_nothing_new() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", 24 * MIB, 8);
    let server = lab.serve_qcow2(&image, &[]);
    let first = lab.backup("full", server.uri(), &[]);
    let second = lab.backup("full", server.uri(), &[]);
    assert!(number(&first["disks"][0], "stored_bytes") > 0);
    assert_eq!(number(&second["disks"][0], "chunks_new"), 0);
    assert_eq!(number(&second["disks"][0], "stored_bytes"), 0);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&second, "snapshot"), &raw);
}

#[test]
fn served_snapshots_read_the_same_through_nbdcopy_and_qemu_img() {
    let two = TwoGenerations::new(9);
    for (result, reference) in [(&two.full, &two.gen1), (&two.incremental, &two.gen2)] {
        let serving = two.lab.serve(&text(result, "snapshot"));
        let uri = serving.uri("vda");
        let out = two.lab.file("out.raw");
        for connections in ["1", "4"] {
            let option = format!("--connections={connections}");
            let threads = format!("--threads={connections}");
            tool("nbdcopy", &[&option, &threads, &uri, &out]);
            assert_same(&out, reference);
        }
        tool(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", &uri, &out],
        );
        assert_same(&out, reference);
        tool(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "raw", &uri, reference],
        );
    }
}
