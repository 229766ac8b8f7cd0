//! Sources that go away in the middle of a backup, and come back or do not.

use crate::support::MIB;
use crate::support::lab::Lab;
use crate::support::process::Process;
use crate::support::program::{finish, json_line, number, text};
use crate::support::server::Server;

/// Starts a full backup of a slow server and waits until it has read something.
fn started(lab: &Lab, server: &Server, more: &[&str]) -> Process {
    let uri = server.uri().to_owned();
    let args = ["full", &uri, "--name", "web1", "--disk", "vda"];
    let args = [&args, &["--progress-interval", "0"][..], more].concat();
    let mut run = lab.start(&args);
    loop {
        let line = run.next_line().expect("the run ended before it had read");
        let line = json_line(std::str::from_utf8(&line).unwrap());
        assert_eq!(line["type"], "progress");
        if number(&line, "moved_bytes") > 0 {
            return run;
        }
    }
}

fn slow<'a>(image: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [
        &["-r", "--filter=delay"],
        more,
        &["file", image, "rdelay=100ms"],
    ]
    .concat()
}

#[test]
fn server_that_is_killed_and_comes_back_is_read_on() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 96 * MIB, 41);
    let socket = lab.socket();
    let mut server = Server::nbdkit(&socket, &slow(&image, &[]));
    let run = started(&lab, &server, &[]);
    server.kill();
    std::fs::remove_file(&socket).unwrap();
    let _again = Server::nbdkit(&socket, &["-r", "file", &image]);
    let result = finish(run).result();
    let warnings = result["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{result}");
    assert_eq!(warnings[0]["code"], "source-reconnected");
    assert_eq!(warnings[0]["disk"], "vda");
    lab.assert_restores(&text(&result, "snapshot"), &image);
}

#[test]
fn server_that_comes_back_with_another_disk_is_not_believed() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 96 * MIB, 42);
    let other = lab.raw("other.raw", 97 * MIB, 42);
    let socket = lab.socket();
    let mut server = Server::nbdkit(&socket, &slow(&image, &[]));
    let run = started(&lab, &server, &[]);
    server.kill();
    std::fs::remove_file(&socket).unwrap();
    let _again = Server::nbdkit(&socket, &["-r", "file", &other]);
    let error = finish(run).error(22);
    assert!(text(&error, "message").contains("changed"), "{error}");
    assert!(lab.snapshots().is_empty());
}

#[test]
fn server_that_stays_away_is_given_up_in_time() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 96 * MIB, 43);
    for retry_time in ["0", "1"] {
        let mut server = lab.nbdkit(&slow(&image, &[]));
        let run = started(&lab, &server, &["--retry-time", retry_time]);
        server.kill();
        let error = finish(run).error(22);
        assert_eq!(error["retryable"], true);
    }
    assert!(lab.snapshots().is_empty());
}
