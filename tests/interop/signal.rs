//! Runs ended by SIGINT and SIGTERM: a last word, the right exit code, and nothing half-visible.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::support::MIB;
use crate::support::lab::Lab;
use crate::support::process::{Process, signal};
use crate::support::program::{finish, json_line, nbdbackup, number, text};
use crate::support::server::{Server, uri};

/// A slow source of 64 MiB.
fn slow(lab: &Lab) -> Server {
    let image = lab.file("slow.raw");
    std::fs::write(&image, vec![7; 64 * MIB as usize]).unwrap();
    lab.nbdkit(&["-r", "--filter=delay", "file", &image, "rdelay=300ms"])
}

/// Reads progress until bytes have come from the source.
fn wait_until_it_reads(run: &mut Process) {
    loop {
        let line = run
            .next_line()
            .expect("the run ended before it had read anything");
        let line = json_line(std::str::from_utf8(&line).unwrap());
        if line["type"] == "warning" {
            continue;
        }
        assert_eq!(line["type"], "progress", "{line}");
        if number(&line, "moved_bytes") > 0 {
            return;
        }
    }
}

#[test]
fn signal_ends_a_backup_with_its_exit_code_and_nothing_visible() {
    for (name, exit_code) in [("INT", 130), ("TERM", 143)] {
        let lab = Lab::new();
        let image = lab.raw("vda.raw", 8 * MIB, 1);
        let before = text(&lab.backup("full", &image, &[]), "snapshot");
        let server = slow(&lab);
        for command in ["full", "incremental"] {
            let args = [
                command,
                server.uri(),
                "--name",
                "web1",
                "--disk",
                "vda",
                "--bitmap",
                "bm0",
                "--progress-interval",
                "0",
            ];
            let mut run = lab.start(&args);
            wait_until_it_reads(&mut run);
            run.signal(name);
            let error = finish(run).error(exit_code);
            assert_eq!(error["retryable"], true, "{error}");
            assert_eq!(lab.snapshots(), [before.as_str()]);
        }
        lab.assert_restores(&before, &image);
        drop(server);
        lab.backup("full", &image, &[]);
    }
}

#[test]
fn signal_ends_a_restore_that_nobody_reads() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 64 * MIB, 2);
    let snapshot = text(&lab.backup("full", &image, &[]), "snapshot");
    let mut command = nbdbackup(&[
        "--repo",
        &lab.repository(),
        "restore",
        &snapshot,
        "--to",
        "-",
    ]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    // A few bytes are read and no more: the pipe is full when the signal comes, and stays full.
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1000]).unwrap();
    signal(child.id(), "TERM");
    let id = child.id();
    let (sender, ended) = channel();
    std::thread::spawn(move || sender.send(child.wait().unwrap()));
    let status = ended
        .recv_timeout(Duration::from_secs(60))
        .unwrap_or_else(|_| {
            signal(id, "KILL");
            panic!("a restore into a full pipe does not end on SIGTERM")
        });
    assert_eq!(status.code(), Some(143));
}

#[test]
fn signal_ends_a_run_whose_source_says_nothing() {
    let lab = Lab::new();
    let socket = lab.socket();
    let silent = UnixListener::bind(&socket).unwrap();
    let run = lab.start(&[
        "full",
        &uri(&socket, "vda"),
        "--name",
        "web1",
        "--disk",
        "vda",
    ]);
    let connection = silent.accept().unwrap();
    run.signal("INT");
    finish(run).error(130);
    drop(connection);
    assert!(lab.snapshots().is_empty());
}
