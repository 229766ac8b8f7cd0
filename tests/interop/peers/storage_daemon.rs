//! qemu-storage-daemon as a source: read-only and writable exports, with bitmaps, over several connections.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::{SIZE, backs_up_by_bitmap, backs_up_whole, restores_into};
use crate::support::certificates::Authority;
use crate::support::lab::Lab;
use crate::support::process::Process;
use crate::support::server::{nbdinfo, uri};

/// A running daemon, ended in order when dropped: only then are its bitmaps stored.
struct Daemon(Option<Process>);

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.0.take().filter(|_| !std::thread::panicking()) {
            daemon.write("{\"execute\":\"quit\"}\n");
            let run = daemon.finish();
            assert!(run.status.success(), "{}", run.stderr);
        }
    }
}

/// Starts a daemon with these options and waits until it has carried them out; its QMP is its stdin and stdout.
fn start(options: &[&str]) -> Daemon {
    let mut command = Command::new("qemu-storage-daemon");
    command
        .args(options)
        .args(["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"])
        .stdin(Stdio::piped());
    let mut daemon = Process::start(command);
    daemon.write("{\"execute\":\"qmp_capabilities\"}\n");
    loop {
        let line = daemon.next_line().expect("the storage daemon ended");
        let message: Value = serde_json::from_slice(&line).unwrap();
        if !message["return"].is_null() {
            return Daemon(Some(daemon));
        }
    }
}

/// Serves an image as export `vda` of a new socket.
fn serve(lab: &Lab, image: &str, node: &str, export: &str, more: &[&str]) -> (Daemon, String) {
    let socket = lab.socket();
    let file = format!("driver=file,node-name=file0,filename={image},{node}");
    let format = match image.ends_with(".qcow2") {
        true => "qcow2",
        false => "raw",
    };
    let format = format!("driver={format},node-name=disk0,file=file0,{node}");
    let export = format!("type=nbd,id=vda,node-name=disk0,name=vda,{export}");
    let server = format!("addr.type=unix,addr.path={socket}");
    let (secure, server) = match more {
        [] => (&[][..], server),
        secure => (secure, format!("{server},tls-creds=tls0")),
    };
    let options = [
        secure,
        &["--blockdev", &file, "--blockdev", &format],
        &["--nbd-server", &server, "--export", &export],
    ];
    (start(&options.concat()), uri(&socket, "vda"))
}

#[test]
fn read_only_export_with_a_bitmap_is_backed_up_in_full_and_by_increment() {
    let lab = Lab::new();
    backs_up_by_bitmap(&lab, 1, |image| {
        serve(&lab, image, "read-only=on", "bitmaps.0=bm0", &[])
    });
}

#[test]
fn writable_export_with_a_bitmap_that_records_is_backed_up_in_full_and_by_increment() {
    let lab = Lab::new();
    backs_up_by_bitmap(&lab, 2, |image| {
        serve(
            &lab,
            image,
            "read-only=off",
            "writable=on,bitmaps.0=bm0",
            &[],
        )
    });
}

#[test]
fn raw_image_is_backed_up_over_several_connections() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 3);
    for (node, export) in [
        ("read-only=on", "writable=off"),
        ("read-only=off", "writable=on"),
    ] {
        let (_daemon, uri) = serve(&lab, &image, node, export, &[]);
        assert_eq!(nbdinfo(&uri)["can_multi_conn"], true);
        backs_up_whole(&lab, &uri, &image, &["--connections", "4"]);
    }
}

#[test]
fn snapshot_is_restored_into_it() {
    let lab = Lab::new();
    let target = lab.file("target.raw");
    let file = std::fs::File::create(&target).unwrap();
    file.set_len(SIZE).unwrap();
    let (_daemon, uri) = serve(&lab, &target, "read-only=off", "writable=on", &[]);
    restores_into(&lab, &uri, 5, &[]);
}

#[test]
fn export_over_tls_with_certificates_is_backed_up() {
    let lab = Lab::new();
    let pki = Authority::with_both(lab.file("pki"));
    let object = format!(
        "tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={}",
        pki.path()
    );
    backs_up_by_bitmap(&lab, 4, |image| {
        let secure = ["--object", &object];
        let (daemon, uri) = serve(&lab, image, "read-only=on", "bitmaps.0=bm0", &secure);
        let uri = uri.replacen("nbd", "nbds", 1);
        (daemon, format!("{uri}&tls-certificates={}", pki.path()))
    });
}
