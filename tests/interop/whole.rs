//! Servers that offer less than QEMU does: their disks are read whole, and right.

use serde_json::Value;

use crate::support::disk::{add_bitmap, assert_same, mixed_raw, qemu_io, reference};
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::{finish, json_line, number, text};
use crate::support::server::{Server, extents, nbdinfo};
use crate::support::{KIB, MIB};

const SIZE: u64 = 12 * MIB;

/// Backs up a mixed disk behind nbdkit with these options, compares its restore, and returns the result.
#[track_caller]
fn backs_up(options: &[&str], parameters: &[&str], more: &[&str]) -> Value {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 1);
    let server = lab.nbdkit(&[&["-r"], options, &["file", &image], parameters].concat());
    let full = lab.backup("full", server.uri(), more);
    lab.assert_restores(&text(&full, "snapshot"), &image);
    assert_eq!(number(&full["disks"][0], "size_bytes"), SIZE);
    full
}

/// Checks that a server without allocation was read whole, and that the result warns of it.
#[track_caller]
fn read_whole_with_a_warning(result: &Value) {
    assert_eq!(number(&result["disks"][0], "read_bytes"), SIZE, "{result}");
    let warnings = result["warnings"].as_array().expect("warnings is an array");
    assert_eq!(warnings.len(), 1, "{result}");
    assert_eq!(warnings[0]["disk"], "vda", "{result}");
}

#[test]
fn server_without_structured_replies_is_read_whole_with_a_warning() {
    read_whole_with_a_warning(&backs_up(&["--no-sr"], &[], &[]));
}

#[test]
fn server_without_fixed_newstyle_is_read_whole_with_a_warning() {
    read_whole_with_a_warning(&backs_up(&["--mask-handshake=0"], &[], &[]));
    read_whole_with_a_warning(&backs_up(
        &["--mask-handshake=0"],
        &[],
        &["--connections", "4"],
    ));
}

#[test]
fn server_that_calls_everything_data_is_read_whole() {
    let result = backs_up(&["--filter=noextents"], &[], &[]);
    assert_eq!(number(&result["disks"][0], "read_bytes"), SIZE, "{result}");
    assert_eq!(result["warnings"], Value::Array(Vec::new()));
}

#[test]
fn server_of_the_old_style_is_refused() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", MIB, 2);
    let server = lab.nbdkit(&["-r", "-o", "file", &image]);
    let error = lab.try_backup("full", server.uri(), &[]).error(20);
    assert_eq!(error["retryable"], true);
    assert!(lab.snapshots().is_empty());
}

#[test]
fn server_with_strict_block_sizes_is_asked_within_them() {
    let policy = [
        "blocksize-minimum=512",
        "blocksize-maximum=64k",
        "blocksize-error-policy=error",
    ];
    backs_up(&["--filter=blocksize-policy"], &policy, &[]);
    let policy = [
        "blocksize-minimum=4096",
        "blocksize-preferred=64k",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ];
    backs_up(&["--filter=blocksize-policy"], &policy, &[]);
}

#[test]
fn slow_server_is_waited_for() {
    backs_up(
        &["--filter=delay"],
        &["rdelay=20ms", "delay-extents=20ms"],
        &[],
    );
}

#[test]
fn server_that_takes_one_request_or_one_connection_at_a_time_is_enough() {
    backs_up(&["--filter=noparallel"], &["serialize=all-requests"], &[]);
    backs_up(&["-t", "1"], &[], &["--connections", "4"]);
    let one = ["--filter=limit", "--filter=multi-conn"];
    backs_up(
        &one,
        &["limit=1", "multi-conn-mode=disable"],
        &["--connections", "4"],
    );
}

#[test]
fn every_number_of_connections_reads_the_same() {
    for connections in ["1", "2", "4", "16"] {
        backs_up(&[], &[], &["--connections", connections]);
    }
}

#[test]
fn extents_of_one_sector_each_are_walked() {
    let lab = Lab::new();
    let image = lab.file("vda.raw");
    mixed_raw(&image, 2 * MIB, 3);
    // Every other sector is promised to be zero, and is.
    let bytes = std::fs::read(&image).unwrap();
    let zeroed: Vec<u8> = bytes
        .iter()
        .enumerate()
        .map(|(n, b)| if n / 512 % 2 == 1 { 0 } else { *b })
        .collect();
    std::fs::write(&image, zeroed).unwrap();
    let list: String = (0..2 * MIB / 1024)
        .map(|n| format!("{} 512\n{} 512 hole,zero\n", n * 1024, n * 1024 + 512))
        .collect();
    std::fs::write(lab.file("extents"), list).unwrap();
    let parameter = format!("extentlist={}", lab.file("extents"));
    let server = lab.nbdkit(&["-r", "--filter=extentlist", "file", &image, &parameter]);
    assert_eq!(
        extents(server.uri(), "base:allocation").len() as u64,
        2 * MIB / 512
    );
    let full = lab.backup("full", server.uri(), &[]);
    lab.assert_restores(&text(&full, "snapshot"), &image);
}

#[test]
fn bitmap_of_many_small_extents_is_walked_past_the_servers_cap_on_one_reply() {
    let lab = Lab::new();
    let image = lab.file("vda.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "160M"]);
    tool(
        "qemu-img",
        &["bitmap", "--add", "-f", "qcow2", "-g", "512", &image, "bm0"],
    );
    let server = lab.serve_qcow2(&image, &["bm0"]);
    lab.backup("full", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    // Every other granule is dirty: 163,840 and as many clean extents; QEMU tells 131,072 in one reply.
    let writes: Vec<String> = (0..160 * MIB / 1024)
        .map(|n| format!("write -q -P 5 {} 512", n * 1024))
        .collect();
    qemu_io(&image, "qcow2", &writes);
    let server = lab.serve_qcow2(&image, &["bm0"]);
    let result = lab.backup("incremental", server.uri(), &["--bitmap", "bm0"]);
    drop(server);
    assert_eq!(number(&result["disks"][0], "dirty_bytes"), 80 * MIB);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&result, "snapshot"), &raw);
}

#[test]
fn tcp_server_is_read_like_any_other() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", SIZE, 4);
    add_bitmap(&image, "bm0");
    let server = Server::qemu_nbd_tcp(
        &lab.file("log"),
        "vda",
        &["-f", "qcow2", "-B", "bm0", &image],
    );
    assert!(server.uri().starts_with("nbd://127.0.0.1:"));
    let full = lab.backup("full", server.uri(), &["--bitmap", "bm0"]);
    let served = lab.file("served.raw");
    tool("nbdcopy", &[server.uri(), &served]);
    assert_same(&lab.restore(&text(&full, "snapshot")), &served);
}

#[test]
fn read_error_is_named_with_disk_and_range_and_nothing_is_committed() {
    let bad = 5 * MIB;
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 5);
    let plugin = format!(
        "pread=if [ $4 -le {bad} ] && [ $(($4 + $3)) -gt {bad} ]; then echo EIO bad sector >&2; exit 1; fi; \
         dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none"
    );
    let server = lab.nbdkit(&["-r", "eval", &format!("get_size=echo {SIZE}"), &plugin]);
    let error = lab.try_backup("full", server.uri(), &[]).error(22);
    assert_eq!(error["retryable"], true);
    let message = text(&error, "message");
    assert!(message.contains("vda"), "{message}");
    let range = named_range(&message);
    assert!(
        range.contains(&bad) && range.end - range.start <= 512,
        "{message}"
    );
    assert!(lab.snapshots().is_empty());
    lab.backup("full", lab.nbdkit(&["-r", "file", &image]).uri(), &[]);
}

#[test]
fn read_error_on_which_qemu_nbd_hangs_up_is_a_source_failure() {
    let lab = Lab::new();
    let image = lab.file("vda.raw");
    // No holes: with any, QEMU sends structured chunks either way, but the failing read must be a plain one.
    std::fs::write(&image, vec![7; SIZE as usize]).unwrap();
    let bad_sector = 5 * MIB / 512;
    let options = format!(
        "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={image},\
         file.inject-error.0.event=none,file.inject-error.0.iotype=read,file.inject-error.0.sector={bad_sector},\
         file.inject-error.0.errno=5"
    );
    let server = Server::qemu_nbd(&lab.socket(), "vda", &["--image-opts", &options]);
    let error = lab.try_backup("full", server.uri(), &[]).error(22);
    let message = text(&error, "message");
    // The connection went with many reads under way; which one was bad is found out by reading once more.
    assert!(message.contains("vda"), "{message}");
    assert_eq!(
        named_range(&message),
        bad_sector * 512..(bad_sector + 1) * 512,
        "{message}"
    );
    assert!(lab.snapshots().is_empty());
}

#[test]
fn error_on_extents_is_a_source_failure() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 6);
    let filter = [
        "-r",
        "--filter=error",
        "file",
        &image,
        "error-extents=EIO",
        "error-extents-rate=100%",
    ];
    let server = lab.nbdkit(&filter);
    assert_eq!(nbdinfo(server.uri())["contexts"][0], "base:allocation");
    let error = lab.try_backup("full", server.uri(), &[]).error(22);
    assert!(text(&error, "message").contains("vda"), "{error}");
    assert!(lab.snapshots().is_empty());
}

#[test]
fn server_that_dies_in_the_middle_is_a_source_failure() {
    let lab = Lab::new();
    let image = lab.file("vda.raw");
    std::fs::write(&image, vec![7; 64 * MIB as usize]).unwrap();
    let mut server = lab.nbdkit(&["-r", "--filter=delay", "file", &image, "rdelay=300ms"]);
    let mut run = lab.start(&[
        "full",
        server.uri(),
        "--name",
        "web1",
        "--disk",
        "vda",
        "--progress-interval",
        "0",
        "--retry-time",
        "0.5",
    ]);
    loop {
        let line = run
            .next_line()
            .expect("the run ended before it had read anything");
        let line = json_line(std::str::from_utf8(&line).unwrap());
        assert_eq!(line["type"], "progress");
        if number(&line, "moved_bytes") > 0 {
            break;
        }
    }
    server.kill();
    let error = finish(run).error(22);
    assert!(text(&error, "message").contains("vda"), "{error}");
    assert!(lab.snapshots().is_empty());
}

#[test]
fn restored_bytes_are_right_at_every_chunk_size() {
    for chunk_size in ["64KiB", "1MiB", "4MiB"] {
        let lab = Lab::empty();
        lab.run(&["init", "--encryption", "none", "--chunk-size", chunk_size])
            .result();
        let image = lab.raw("vda.raw", SIZE + 36 * KIB, 7);
        let full = lab.backup("full", lab.nbdkit(&["-r", "file", &image]).uri(), &[]);
        lab.assert_restores(&text(&full, "snapshot"), &image);
    }
}

/// The first range in a message, in its form `0x...`..`0x...`.
fn named_range(message: &str) -> std::ops::Range<u64> {
    let (before, after) = message
        .split_once("..")
        .unwrap_or_else(|| panic!("no range in {message}"));
    let start = before.rsplit("0x").next().unwrap();
    let end = after.strip_prefix("0x").unwrap_or(after);
    let end = end.split(|c: char| !c.is_ascii_hexdigit()).next().unwrap();
    let parse = |t| u64::from_str_radix(t, 16).unwrap_or_else(|e| panic!("{e}: {message}"));
    parse(start)..parse(end)
}
