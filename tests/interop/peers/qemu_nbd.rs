//! Debian 12's own QEMU 7.2, which has no extended headers, beside QEMU 10: qemu-nbd as a source and as a target.

use super::{SIZE, backs_up_by_bitmap, backs_up_whole, restores_into, with_a_snapshot};
use crate::support::disk::{assert_same, reference};
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::server::{OLD_QEMU_NBD, Server, nbdinfo};

/// Starts a server at a socket, of an export, with options.
type Start = fn(&str, &str, &[&str]) -> Server;

/// Each version.
const READ_ONLY: [Start; 2] = [Server::qemu_nbd, Server::old_qemu_nbd];
const WRITABLE: [Start; 2] = [Server::qemu_nbd_writable, Server::old_qemu_nbd_writable];

#[test]
fn the_versions_are_those_that_they_are_here_for() {
    let version = |program: &str| String::from_utf8(tool(program, &["--version"])).unwrap();
    let (old, new) = (version(OLD_QEMU_NBD), version("qemu-nbd"));
    assert!(old.contains("qemu-nbd 7.2."), "{old}");
    assert!(!new.contains("qemu-nbd 7."), "{new}");
}

#[test]
fn qcow2_with_a_bitmap_is_backed_up_in_full_and_by_increment() {
    for start in READ_ONLY {
        let lab = Lab::new();
        backs_up_by_bitmap(&lab, 1, |image| {
            let args = ["-f", "qcow2", "-B", "bm0", image];
            let server = start(&lab.socket(), "vda", &args);
            let uri = server.uri().to_owned();
            (server, uri)
        });
    }
}

#[test]
fn raw_image_is_backed_up() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 2);
    for start in READ_ONLY {
        let server = start(&lab.socket(), "vda", &["-f", "raw", &image]);
        for connections in ["1", "4"] {
            let more = ["--connections", connections];
            let full = backs_up_whole(&lab, server.uri(), &image, &more);
            assert_eq!(full["warnings"], serde_json::json!([]));
        }
    }
}

#[test]
fn raw_image_that_ends_within_a_sector_is_backed_up_to_where_the_server_rounds_it() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE - 300, 3);
    let expected = lab.raw("expected.raw", SIZE - 300, 3);
    let file = std::fs::File::options().write(true).open(&expected);
    file.unwrap().set_len(SIZE).unwrap();
    for start in READ_ONLY {
        let server = start(&lab.socket(), "vda", &["-f", "raw", &image]);
        let full = backs_up_whole(&lab, server.uri(), &expected, &[]);
        assert_eq!(full["disks"][0]["size_bytes"], SIZE);
    }
}

#[test]
fn allocation_depth_is_listed_and_not_in_the_way() {
    let lab = Lab::new();
    let base = lab.qcow2("base.qcow2", SIZE, 4);
    let image = lab.file("top.qcow2");
    tool(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image,
        ],
    );
    let raw = lab.file("reference.raw");
    reference(&base, "qcow2", &raw);
    for start in READ_ONLY {
        let server = start(&lab.socket(), "vda", &["-f", "qcow2", "-A", &image]);
        let info = lab.run(&["info", server.uri(), "--map"]).result();
        for contexts in [
            &nbdinfo(server.uri())["contexts"],
            &info["exports"][0]["contexts"],
        ] {
            let mut contexts = contexts.as_array().unwrap().iter();
            assert!(contexts.any(|c| c == "qemu:allocation-depth"), "{info}");
        }
        backs_up_whole(&lab, server.uri(), &raw, &[]);
    }
}

#[test]
fn snapshot_is_restored_into_it() {
    for start in WRITABLE {
        let lab = Lab::new();
        let target = lab.file("target.qcow2");
        let size = SIZE.to_string();
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &target, &size]);
        let server = start(&lab.socket(), "vda", &["-f", "qcow2", &target]);
        restores_into(&lab, server.uri(), 6, &[]);
    }
}

#[test]
fn qemu_img_of_the_old_version_reads_a_snapshot() {
    let (lab, snapshot, image) = with_a_snapshot(5);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let qemu_img = OLD_QEMU_NBD.replace("qemu-nbd", "qemu-img");
    let out = lab.file("out.qcow2");
    let convert = ["convert", "-f", "raw", "-O", "qcow2", &uri, &out];
    tool(&qemu_img, &convert);
    let raw = lab.file("out.raw");
    reference(&out, "qcow2", &raw);
    assert_same(&raw, &image);
    let compare = ["compare", "-f", "raw", "-F", "raw", &uri, &image];
    tool(&qemu_img, &compare);
}
