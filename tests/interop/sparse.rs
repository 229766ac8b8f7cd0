//! Ranges without data: discards, written zeros, holes of every kind, and disks that are nearly all hole.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::support::disk::{
    Random, add_bitmap, allocated, assert_same, mixed_raw, qemu_io, reference,
};
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::{number, text};
use crate::support::server::{dirty, extents};
use crate::support::{CHUNK, KIB, MIB};

#[test]
fn ranges_discarded_or_zeroed_after_the_full_read_back_as_zeros() {
    let lab = Lab::new();
    let size = 16 * MIB;
    let image = lab.file("vda.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"]);
    qemu_io(&image, "qcow2", &[format!("write -q -P 0xaa 0 {size}")]);
    add_bitmap(&image, "bm0");
    lab.backup(
        "full",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );

    let changes = [
        // Whole chunks and parts of chunks, as holes, as zeros that stay allocated, and as zeros that were written.
        "discard -q 1M 512k",
        "discard -q 3136k 64k",
        "write -q -z 5M 512k",
        "write -q -z -u 6M 256k",
        "write -q -z 7172k 4k",
        "write -q -P 0 9M 256k",
        "write -q -P 0 10M 4k",
        "write -q -P 0x55 12M 64k",
        "discard -q 14M 2M",
    ];
    qemu_io(&image, "qcow2", &changes.map(str::to_owned));
    let server = lab.serve_qcow2(&image, &["bm0"]);
    let allocation = extents(server.uri(), "base:allocation");
    let zero_and_dirty = dirty(server.uri(), "bm0").iter().any(|d| {
        allocation
            .iter()
            .any(|a| a.offset == d.offset && a.flags & 2 != 0)
    });
    assert!(
        zero_and_dirty,
        "the test has no range that is both dirty and zero"
    );

    let incremental = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    let disk = &incremental["disks"][0];
    assert_eq!(disk["kind"], "incremental", "{disk}");
    assert!(
        number(disk, "zero_bytes") >= 3 * MIB,
        "zeros were read instead of known: {disk}"
    );
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&incremental, "snapshot"), &raw);
}

#[test]
fn disk_of_ten_tebibytes_with_one_dirty_granule_costs_two_chunks_and_a_few_files() {
    let lab = Lab::new();
    let image = lab.file("vda.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "10T"]);
    let scattered: Vec<String> = (0..20)
        .map(|n| format!("write -q -P {} {}G 64k", n + 1, n * 500))
        .collect();
    qemu_io(&image, "qcow2", &scattered);
    add_bitmap(&image, "bm0");
    let full = lab.backup(
        "full",
        lab.serve_qcow2(&image, &["bm0"]).uri(),
        &["--bitmap", "bm0"],
    );
    assert!(
        number(&full["disks"][0], "read_bytes") <= 20 * 2 * CHUNK,
        "{full}"
    );
    let files = lab.repository_files().len();

    // 7 TiB and 64 KiB: the second half of a chunk.
    qemu_io(
        &image,
        "qcow2",
        &["write -q -P 0x77 7516192832k 64k".to_owned()],
    );
    let server = lab.serve_qcow2(&image, &["bm0"]);
    let incremental = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    let disk = &incremental["disks"][0];
    assert_eq!(disk["kind"], "incremental");
    assert_eq!(number(disk, "size_bytes"), 10 << 40);
    assert_eq!(number(disk, "dirty_bytes"), 64 * KIB);
    assert!(
        (1..=2 * CHUNK).contains(&number(disk, "read_bytes")),
        "{disk}"
    );
    assert!((1..=2).contains(&number(disk, "chunks_new")), "{disk}");
    let new_files = lab.repository_files().len() - files;
    assert!(new_files <= 8, "{new_files} new files");

    let serving = lab.serve(&text(&incremental, "snapshot"));
    let allocation = extents(&serving.uri("vda"), "base:allocation");
    assert_eq!(allocation.iter().map(|e| e.length).sum::<u64>(), 10 << 40);
    let data: u64 = allocation
        .iter()
        .filter(|e| e.flags & 2 == 0)
        .map(|e| e.length)
        .sum();
    assert!(
        (21 * 64 * KIB..=21 * CHUNK).contains(&data),
        "{data} bytes of data"
    );
    let compare = tool(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            &serving.uri("vda"),
            &image,
        ],
    );
    assert!(String::from_utf8_lossy(&compare).contains("identical"));
}

#[test]
fn zero_without_hole_is_zero_and_hole_without_zero_is_read() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 8 * MIB, 1);
    // The filter says what nbdkit answers; the bytes beneath are what reads return, and what a hole that does not
    // promise zeros holds. Where zeros are promised, they are there.
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&vec![0; MIB as usize], 2 * MIB).unwrap();
    file.write_all_at(&Random::new(2).bytes(MIB as usize), 5 * MIB)
        .unwrap();
    let list = lab.file("extents");
    std::fs::write(&list, "0 2M\n2M 1M zero\n3M 2M\n5M 1M hole\n6M 2M\n").unwrap();
    let server = lab.nbdkit(&[
        "-r",
        "--filter=extentlist",
        "file",
        &image,
        &format!("extentlist={list}"),
    ]);
    let kinds: Vec<u64> = extents(server.uri(), "base:allocation")
        .iter()
        .map(|e| e.flags)
        .collect();
    assert_eq!(
        kinds,
        [0, 2, 0, 1, 0],
        "nbdkit does not answer as this test wants"
    );

    let full = lab.backup("full", server.uri(), &[]);
    let disk = &full["disks"][0];
    assert!(number(disk, "zero_bytes") >= MIB, "{disk}");
    assert!(
        number(disk, "read_bytes") <= 7 * MIB,
        "zeros were read: {disk}"
    );
    lab.assert_restores(&text(&full, "snapshot"), &image);
}

#[test]
fn zeros_that_the_source_calls_data_are_not_stored() {
    let lab = Lab::new();
    let image = lab.file("vda.raw");
    std::fs::write(&image, vec![0; 8 * MIB as usize]).unwrap();
    let server = lab.nbdkit(&["-r", "--filter=noextents", "file", &image]);
    let full = lab.backup("full", server.uri(), &[]);
    assert_eq!(number(&full["disks"][0], "read_bytes"), 8 * MIB, "{full}");
    assert_eq!(number(&full["disks"][0], "chunks_new"), 0, "{full}");
    let restored = lab.restore(&text(&full, "snapshot"));
    assert!(
        allocated(&restored) < MIB,
        "zeros were written to the target"
    );
}

#[test]
fn restored_file_is_as_sparse_as_its_disk() {
    let lab = Lab::new();
    let image = lab.file("vda.raw");
    mixed_raw(&image, 4 * MIB, 3);
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(1024 * MIB)
        .unwrap();
    let server = lab.nbdkit(&["-r", "file", &image]);
    let full = lab.backup("full", server.uri(), &[]);
    let restored = lab.restore(&text(&full, "snapshot"));
    assert!(
        allocated(&restored) <= 5 * MIB,
        "{} bytes are allocated",
        allocated(&restored)
    );
    assert_same(&restored, &image);
}
