//! nbdkit as a source, with the plugins, filters and options that change what a client sees.

use std::fmt::Write;

use super::{SIZE, backs_up_whole, restores_into};
use crate::support::certificates::Authority;
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::{number, text};
use crate::support::server::{Server, nbdinfo};
use crate::support::{CHUNK, MIB};

/// Backs up a mixed disk behind nbdkit with these options and parameters, and compares it.
#[track_caller]
fn backs_up(options: &[&str], parameters: &[&str], more: &[&str]) -> serde_json::Value {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 1);
    let server = lab.nbdkit(&[options, &["file", &image], parameters].concat());
    backs_up_whole(&lab, server.uri(), &image, more)
}

/// A `pread` for the eval plugin that does `first` once, and otherwise reads a file.
fn pread(first: &str, image: &str) -> String {
    format!(
        "pread={first}; dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none"
    )
}

#[test]
fn memory_is_backed_up_with_its_holes() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 2);
    let server = lab.nbdkit(&["memory", &SIZE.to_string()]);
    tool("nbdcopy", &[&image, server.uri()]);
    let full = backs_up_whole(&lab, server.uri(), &image, &["--connections", "4"]);
    assert!(number(&full["disks"][0], "read_bytes") < SIZE - MIB);
}

#[test]
fn data_of_a_formula_is_backed_up() {
    let lab = Lab::new();
    let formula = "@0x100000 (1 2 3 4)*20000 @0x400003 \"end\"";
    let server = lab.nbdkit(&["data", formula, &format!("size={SIZE}")]);
    let mut bytes = vec![0; SIZE as usize];
    for (at, byte) in bytes[MIB as usize..][..80_000].iter_mut().enumerate() {
        *byte = at as u8 % 4 + 1;
    }
    bytes[0x40_0003..][..3].copy_from_slice(b"end");
    let image = lab.file("expected.raw");
    std::fs::write(&image, bytes).unwrap();
    let full = backs_up_whole(&lab, server.uri(), &image, &[]);
    assert!(number(&full["disks"][0], "read_bytes") < MIB, "{full}");
}

#[test]
fn every_mask_of_greeting_flags_is_lived_with() {
    for (mask, fixed) in [("0", false), ("1", true), ("2", false), ("3", true)] {
        let full = backs_up(&["-r", &format!("--mask-handshake={mask}")], &[], &[]);
        // Without the fixed newstyle there is no asking for more than an export by its name.
        let warnings = full["warnings"].as_array().unwrap();
        assert_eq!(warnings.is_empty(), fixed, "{mask}: {full}");
    }
}

#[test]
fn without_structured_replies_all_of_it_is_read_over_several_connections() {
    let full = backs_up(&["-r", "--no-sr"], &[], &["--connections", "4"]);
    assert_eq!(number(&full["disks"][0], "read_bytes"), SIZE);
    assert_eq!(full["warnings"][0]["code"], "no-allocation");
}

#[test]
fn filters_that_change_nothing_to_see_change_nothing_to_read() {
    for options in [
        &["--filter=cow"][..],
        &["--filter=cow", "--filter=cache"],
        &["-r", "--filter=cache"],
        &["-r", "--filter=nocache"],
        &["-r", "--filter=cacheextents"],
        &["-r", "--filter=nozero"],
        &["-r", "--filter=noextents"],
        &["-r", "--filter=noparallel"],
    ] {
        let full = backs_up(options, &[], &["--connections", "4"]);
        assert_eq!(full["warnings"], serde_json::json!([]), "{options:?}");
    }
}

#[test]
fn copy_on_write_layer_is_read_with_what_was_written_to_it() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 3);
    let other = lab.raw("other.raw", SIZE, 4);
    let server = lab.nbdkit(&["--filter=cow", "file", &image]);
    backs_up_whole(&lab, server.uri(), &image, &[]);
    tool("nbdcopy", &["--destination-is-zero", &other, server.uri()]);
    let served = lab.file("served.raw");
    tool("nbdcopy", &[server.uri(), &served]);
    backs_up_whole(&lab, server.uri(), &served, &[]);
}

#[test]
fn disk_grown_or_rounded_by_a_filter_is_backed_up_at_its_new_size() {
    for (parameter, size) in [
        ("truncate=9M", 9 * MIB),
        ("truncate=3M", 3 * MIB),
        ("round-up=64k", SIZE),
    ] {
        let lab = Lab::new();
        let image = lab.raw("vda.raw", SIZE - 1000, 5);
        let expected = lab.raw("expected.raw", SIZE - 1000, 5);
        let file = std::fs::File::options().write(true).open(&expected);
        file.unwrap().set_len(size).unwrap();
        let server = lab.nbdkit(&["-r", "--filter=truncate", "file", &image, parameter]);
        let full = backs_up_whole(&lab, server.uri(), &expected, &[]);
        assert_eq!(full["disks"][0]["size_bytes"], size, "{parameter}");
    }
}

#[test]
fn disk_of_any_number_of_bytes_is_backed_up_to_its_last_one() {
    for size in [SIZE - 1, SIZE - 511, SIZE - 300 * 1024 - 7, 1, 513] {
        let lab = Lab::new();
        let image = lab.raw("vda.raw", size, 6);
        let server = lab.nbdkit(&["-r", "file", &image]);
        let full = backs_up_whole(&lab, server.uri(), &image, &[]);
        assert_eq!(full["disks"][0]["size_bytes"], size);
    }
}

#[test]
fn blocks_of_any_size_are_kept_to() {
    for (minimum, preferred, maximum) in [
        ("1", "512", "64k"),
        ("4096", "4096", "32M"),
        ("64k", "64k", "64k"),
        ("4096", "1M", "4M"),
    ] {
        let policy = [
            format!("blocksize-minimum={minimum}"),
            format!("blocksize-preferred={preferred}"),
            format!("blocksize-maximum={maximum}"),
            "blocksize-error-policy=error".to_owned(),
        ];
        let policy: Vec<&str> = policy.iter().map(String::as_str).collect();
        let more = ["--connections", "4"];
        let full = backs_up(&["-r", "--filter=blocksize-policy"], &policy, &more);
        assert_eq!(full["warnings"], serde_json::json!([]), "{minimum}");
    }
}

#[test]
fn tail_that_blocks_make_unreadable_fails_the_backup() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE + 512, 7);
    let policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"];
    let args = [
        &["-r", "--filter=blocksize-policy", "file", &image],
        &policy[..],
    ];
    let server = lab.nbdkit(&args.concat());
    let error = lab.try_backup("full", server.uri(), &[]).error(22);
    let message = text(&error, "message");
    assert!(
        message.contains("vda") && message.contains("EINVAL"),
        "{message}"
    );
    assert!(lab.snapshots().is_empty());
}

#[test]
fn reads_that_always_fail_fail_the_backup() {
    for error in ["EIO", "ENOSPC", "EPERM"] {
        let lab = Lab::new();
        let image = lab.raw("vda.raw", SIZE, 8);
        let parameter = format!("error-pread={error}");
        let server = lab.nbdkit(&[
            "-r",
            "--filter=error",
            "file",
            &image,
            &parameter,
            "error-pread-rate=100%",
        ]);
        let failed = lab.try_backup("full", server.uri(), &[]).error(22);
        let message = text(&failed, "message");
        assert!(
            message.contains("vda") && message.contains(error),
            "{message}"
        );
        assert!(lab.snapshots().is_empty());
    }
}

#[test]
fn read_that_fails_once_is_made_again() {
    for (error, reconnects) in [("EIO", false), ("ENOMEM", false), ("ESHUTDOWN", true)] {
        let lab = Lab::new();
        let image = lab.raw("vda.raw", SIZE, 9);
        let once = lab.file("once");
        let first = format!("if mkdir {once} 2>/dev/null; then echo {error} once >&2; exit 1; fi");
        let size = format!("get_size=echo {SIZE}");
        let server = lab.nbdkit(&["-r", "eval", &size, &pread(&first, &image)]);
        let full = backs_up_whole(&lab, server.uri(), &image, &[]);
        assert!(std::fs::exists(&once).unwrap(), "nothing failed");
        let warned = full["warnings"].to_string().contains("source-reconnected");
        assert_eq!(warned, reconnects, "{error}: {full}");
    }
}

#[test]
fn server_that_ends_with_its_last_client_is_read_to_the_end() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 10);
    let mut server = lab.nbdkit(&["-r", "--filter=exitlast", "file", &image]);
    backs_up_whole(&lab, server.uri(), &image, &["--connections", "4"]);
    server.wait();
}

#[test]
fn as_many_connections_are_made_as_both_sides_want() {
    for (mode, wanted, made) in [
        ("auto", "1", 1),
        ("auto", "4", 4),
        ("disable", "4", 1),
        ("emulate", "3", 3),
    ] {
        let lab = Lab::new();
        let image = lab.raw("vda.raw", SIZE, 11);
        let log = lab.file("log");
        let server = lab.nbdkit(&[
            "-r",
            "--filter=log",
            "--filter=multi-conn",
            "file",
            &image,
            &format!("multi-conn-mode={mode}"),
            &format!("logfile={log}"),
        ]);
        backs_up_whole(&lab, server.uri(), &image, &["--connections", wanted]);
        let log = std::fs::read_to_string(log).unwrap();
        let connections = log.lines().filter(|l| l.contains(" Connect ")).count();
        assert_eq!(connections, made, "{mode} {wanted}: {log}");
    }
}

#[test]
fn slow_server_is_asked_for_much_at_a_time() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 12);
    let log = lab.file("log");
    let server = lab.nbdkit(&[
        "-r",
        "--filter=log",
        "--filter=delay",
        "file",
        &image,
        "rdelay=20ms",
        &format!("logfile={log}"),
    ]);
    backs_up_whole(&lab, server.uri(), &image, &["--connections", "1"]);
    // How many reads had begun and not yet ended, at most.
    let log = std::fs::read_to_string(log).unwrap();
    let (mut now, mut most) = (0, 0);
    for line in log.lines() {
        match (line.contains(" Read "), line.contains("...Read ")) {
            (_, true) => now -= 1,
            (true, false) => now += 1,
            (false, false) => {}
        }
        most = most.max(now);
    }
    assert!(most > 4, "at most {most} reads at a time: {log}");
}

#[test]
fn scattered_data_is_found_by_its_extents() {
    const PIECES: usize = 16;
    const APART: usize = SIZE as usize / PIECES;
    let lab = Lab::new();
    let mut list = String::new();
    for n in 0..PIECES {
        writeln!(list, "{} 4096", n * APART).unwrap();
    }
    let extents = lab.file("extents");
    std::fs::write(&extents, list).unwrap();
    let image = lab.file("vda.raw");
    let mut bytes = vec![0; SIZE as usize];
    for n in 0..PIECES {
        bytes[n * APART..][..4096].fill(n as u8 + 1);
    }
    std::fs::write(&image, bytes).unwrap();
    let server = lab.nbdkit(&[
        "-r",
        "--filter=extentlist",
        "file",
        &image,
        &format!("extentlist={extents}"),
    ]);
    let full = backs_up_whole(&lab, server.uri(), &image, &[]);
    // Chunks are read whole.
    let most = PIECES as u64 * CHUNK;
    assert!(
        number(&full["disks"][0], "read_bytes") <= most && most < SIZE,
        "{full}"
    );
}

#[test]
fn dummy_that_a_plain_client_is_shown_is_refused() {
    let lab = Lab::new();
    let pki = Authority::with_both(lab.file("pki"));
    let image = lab.raw("vda.raw", SIZE, 13);
    let certificates = format!("--tls-certificates={}", pki.path());
    let server = lab.nbdkit(&[
        "--tls=on",
        &certificates,
        "-r",
        "--filter=tls-fallback",
        "file",
        &image,
    ]);
    assert_eq!(nbdinfo(server.uri())["export-size"], 512);
    let error = lab.try_backup("full", server.uri(), &[]).error(20);
    assert!(text(&error, "message").contains("only over TLS"), "{error}");
    assert!(lab.snapshots().is_empty());
    // Any other disk of that size is a disk.
    let small = lab.raw("small.raw", 512, 15);
    let plain = lab.nbdkit(&["-r", "file", &small]);
    backs_up_whole(&lab, plain.uri(), &small, &[]);
    let secure = server.uri().replacen("nbd", "nbds", 1);
    let secure = format!("{secure}&tls-certificates={}", pki.path());
    backs_up_whole(&lab, &secure, &image, &[]);
}

#[test]
fn snapshot_is_restored_into_it() {
    let size = SIZE.to_string();
    for options in [
        &["memory", &size][..],
        &["--no-sr", "memory", &size],
        &["--mask-handshake=0", "memory", &size],
        &["--filter=nozero", "memory", &size],
        &[
            "--filter=multi-conn",
            "memory",
            &size,
            "multi-conn-mode=disable",
        ],
        &["--filter=noparallel", "memory", &size],
    ] {
        let lab = Lab::new();
        let server = lab.nbdkit(options);
        // Not each of them can tell that the disk is blank.
        restores_into(&lab, server.uri(), 16, &["--force"]);
    }
}

#[test]
fn server_at_a_tcp_port_is_backed_up() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 14);
    let server = Server::nbdkit_tcp(&lab.file("log"), &["-r", "file", &image]);
    assert!(server.uri().starts_with("nbd://127.0.0.1:"));
    backs_up_whole(&lab, server.uri(), &image, &["--connections", "4"]);
}
