//! nbd-client of the NBD project against the embedded server, as far as it goes where the kernel has no NBD device.
//!
//! It negotiates before it hands the socket to the kernel: what it says of the size it has from our answer to `GO`.

use super::{SIZE, with_a_snapshot};
use crate::support::MIB;
use crate::support::certificates::Authority;
use crate::support::lab::Lab;
use crate::support::process::{Finished, try_tool};
use crate::support::program::text;
use crate::support::server::Serving;

/// What it calls the size of a disk that it has negotiated.
fn size_line() -> String {
    format!("size = {}MB", SIZE / MIB)
}

/// Has nbd-client negotiate for a device that is none, where it has to give up.
fn negotiate(export: &str, socket: &str, more: &[&str]) -> Finished {
    let args = ["-N", export, "-u", socket, "/dev/null", "-nonetlink"];
    let run = try_tool("/usr/sbin/nbd-client", &[&args, more].concat());
    assert!(!run.status.success());
    run
}

fn said(run: &Finished) -> String {
    String::from_utf8_lossy(&run.stdout).into_owned() + &run.stderr
}

#[test]
fn it_lists_the_exports() {
    let (lab, snapshot, _) = with_a_snapshot(1);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let (_, socket) = uri.split_once("socket=").unwrap();
    let run = try_tool("/usr/sbin/nbd-client", &["-l", "-u", socket]);
    assert!(run.status.success(), "{}", run.stderr);
    let said = said(&run);
    assert!(said.lines().any(|l| l.starts_with("vda: ")), "{said}");
}

#[test]
fn it_negotiates_an_export_up_to_the_kernel_s_part() {
    let (lab, snapshot, _) = with_a_snapshot(2);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let (_, socket) = uri.split_once("socket=").unwrap();
    let said = said(&negotiate("vda", socket, &[]));
    assert!(said.contains(&size_line()), "{said}");
    // What fails is the device, which is none.
    assert!(
        said.contains("Inappropriate ioctl for device") || said.contains("Ioctl"),
        "{said}"
    );
}

#[test]
fn it_is_told_why_another_name_is_refused() {
    let (lab, snapshot, _) = with_a_snapshot(3);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let (_, socket) = uri.split_once("socket=").unwrap();
    let said = said(&negotiate("vdb", socket, &[]));
    assert!(said.contains("no export named"), "{said}");
    assert!(!said.contains("size ="), "{said}");
}

#[test]
fn it_negotiates_over_tls_and_gets_nothing_without() {
    let lab = Lab::new();
    let pki = Authority::with_both(lab.file("pki"));
    let image = lab.raw("vda.raw", SIZE, 4);
    let snapshot = text(&lab.backup("full", &image, &[]), "snapshot");
    let socket = lab.socket();
    let (repository, address) = (lab.repository(), format!("unix:{socket}"));
    let _serving = Serving::start(&[
        "-r",
        &repository,
        "--json",
        "restore",
        &snapshot,
        "--serve",
        &address,
        "--tls-certificates",
        pki.path(),
        "--tls-verify-peer",
    ]);
    let plain = said(&negotiate("vda", &socket, &[]));
    assert!(!plain.contains("size ="), "{plain}");
    let (authority, certificate, key) = (
        pki.file("ca-cert.pem"),
        pki.file("client-cert.pem"),
        pki.file("client-key.pem"),
    );
    let more = [
        "-enable-tls",
        "-cacertfile",
        &authority,
        "-certfile",
        &certificate,
        "-keyfile",
        &key,
        "-tlshostname",
        "localhost",
    ];
    let secure = said(&negotiate("vda", &socket, &more));
    assert!(secure.contains(&size_line()), "{secure}");
}
