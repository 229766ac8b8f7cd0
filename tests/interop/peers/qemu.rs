//! QEMU's tools as clients of a served snapshot.

use serde_json::Value;

use super::{SIZE, with_a_snapshot};
use crate::support::disk::assert_same;
use crate::support::process::{tool, try_tool};
use crate::support::server::extents;

fn json(bytes: Vec<u8>) -> Value {
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn qemu_img_converts_it_to_any_format() {
    let (lab, snapshot, image) = with_a_snapshot(1);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    for format in ["raw", "qcow2", "vmdk"] {
        let (out, raw) = (lab.file(format), lab.file("back.raw"));
        let convert = ["convert", "-f", "raw", "-O", format, "-m", "16", "-W"];
        tool("qemu-img", &[&convert[..], &[&uri, &out]].concat());
        tool(
            "qemu-img",
            &["convert", "-f", format, "-O", "raw", &out, &raw],
        );
        assert_same(&raw, &image);
    }
}

#[test]
fn qemu_img_compares_it_and_finds_a_difference_of_one_byte() {
    let (lab, snapshot, image) = with_a_snapshot(2);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let compare = ["compare", "-f", "raw", "-F", "raw", &uri];
    tool("qemu-img", &[&compare[..], &[&image]].concat());
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[5_000_000] ^= 1;
    let other = lab.file("other.raw");
    std::fs::write(&other, bytes).unwrap();
    let run = try_tool("qemu-img", &[&compare[..], &[&other]].concat());
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    let said = String::from_utf8_lossy(&run.stdout).into_owned();
    let sector = 5_000_000 / 512 * 512;
    assert!(
        said.contains(&format!("mismatch at offset {sector}")),
        "{said}"
    );
}

#[test]
fn qemu_img_maps_it_as_libnbd_does() {
    let (lab, snapshot, _) = with_a_snapshot(3);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let map = json(tool(
        "qemu-img",
        &["map", "--output=json", "-f", "raw", &uri],
    ));
    // QEMU joins neighbours, libnbd tells what it hears: compared are the zeros.
    let mut zeros: Vec<(u64, u64)> = Vec::new();
    for extent in extents(&uri, "base:allocation") {
        match (extent.flags & 2 != 0, zeros.last_mut()) {
            (true, Some((start, length))) if *start + *length == extent.offset => {
                *length += extent.length;
            }
            (true, _) => zeros.push((extent.offset, extent.length)),
            (false, _) => {}
        }
    }
    let mut by_qemu: Vec<(u64, u64)> = Vec::new();
    let mut end = 0;
    for extent in map.as_array().unwrap() {
        let (start, length) = (
            extent["start"].as_u64().unwrap(),
            extent["length"].as_u64().unwrap(),
        );
        assert_eq!(start, end);
        end += length;
        match (extent["zero"] == true, by_qemu.last_mut()) {
            (true, Some((from, known))) if *from + *known == start => *known += length,
            (true, _) => by_qemu.push((start, length)),
            (false, _) => {}
        }
    }
    assert_eq!(end, SIZE);
    assert!(!zeros.is_empty());
    assert_eq!(by_qemu, zeros);
}

#[test]
fn qemu_img_and_qemu_nbd_tell_what_it_is() {
    let (lab, snapshot, _) = with_a_snapshot(4);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let info = json(tool(
        "qemu-img",
        &["info", "--output=json", "-f", "raw", &uri],
    ));
    assert_eq!(info["virtual-size"], SIZE);
    assert_eq!(info["format"], "raw");
    let (_, socket) = uri.split_once("socket=").unwrap();
    let list = tool("qemu-nbd", &["--list", "-k", socket]);
    let list = String::from_utf8(list).unwrap();
    assert!(list.contains("exports available: 1"), "{list}");
    assert!(list.contains(&format!("size:  {SIZE}")), "{list}");
    assert!(list.contains("base:allocation"), "{list}");
}

#[test]
fn qemu_io_reads_what_was_backed_up() {
    let (lab, snapshot, image) = with_a_snapshot(5);
    let mut bytes = std::fs::read(&image).unwrap();
    drop(snapshot);
    bytes[100_000..200_000].fill(0x5a);
    std::fs::write(&image, &bytes).unwrap();
    let full = lab.backup("full", &image, &[]);
    let serving = lab.serve(full["snapshot"].as_str().unwrap());
    let uri = serving.uri("vda");
    let read = |commands: &[&str]| {
        let commands = commands.iter().flat_map(|c| ["-c", c]);
        let args: Vec<&str> = ["-r", "-f", "raw"].into_iter().chain(commands).collect();
        let run = try_tool("qemu-io", &[&args[..], &[&uri]].concat());
        let said = String::from_utf8_lossy(&run.stdout).into_owned() + &run.stderr;
        (run.status.success(), said)
    };
    let (fine, said) = read(&[
        "read -P 0x5a 100000 100000",
        "read -P 0x5a 100001 1",
        "read 0 8M",
        "aio_read -P 0x5a 100000 50000",
        "aio_read -P 0x5a 150000 50000",
        "aio_flush",
        "length",
        "flush",
    ]);
    assert!(fine && !said.contains("verification failed"), "{said}");
    // It can tell a wrong byte.
    let (fine, said) = read(&["read -P 0x5b 100000 512"]);
    assert!(!fine && said.contains("verification failed"), "{said}");
    let (fine, said) = read(&["write 0 512"]);
    assert!(!fine, "{said}");
}

#[test]
fn qemu_asks_for_extended_headers_and_gets_them() {
    let (lab, snapshot, _) = with_a_snapshot(6);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let (_, socket) = uri.split_once("socket=").unwrap();
    let node = format!("driver=nbd,path={socket},export=vda");
    let trace = ["-r", "-T", "enable=nbd_*", "--image-opts", &node];
    let run = try_tool(
        "qemu-io",
        &[&trace[..], &["-c", "read 0 64k", "-c", "map"]].concat(),
    );
    assert!(run.status.success(), "{}", run.stderr);
    let said = &run.stderr;
    assert!(
        said.contains("option request 11 (extended headers)"),
        "{said}"
    );
    assert!(said.contains("option request 7 (go)"), "{said}");
    // With those it need not ask for structured replies.
    assert!(!said.contains("option request 8"), "{said}");
}
