//! A guest of QEMU that boots from a snapshot, reads all of it through its BIOS, and writes to an overlay.

use std::process::{Command, Stdio};

use super::SIZE;
use crate::support::disk::{assert_same, mixed_raw};
use crate::support::lab::Lab;
use crate::support::process::{Process, tool};
use crate::support::program::text;

const GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/peers/guest.s");

/// What the guest writes over the second 64 sectors: the last ones.
const PART: usize = 64 * 512;

/// A snapshot of a disk that boots, and the disk.
fn bootable(lab: &Lab) -> (String, String) {
    let (object, sector) = (lab.file("guest.o"), lab.file("guest.bin"));
    tool("as", &["--32", "-o", &object, GUEST]);
    let flat = ["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"];
    tool("ld", &[&flat[..], &["-o", &sector, &object]].concat());
    let sector = std::fs::read(sector).unwrap();
    assert_eq!(sector.len(), 512);
    let image = lab.file("vda.raw");
    mixed_raw(&image, SIZE, 1);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[..512].copy_from_slice(&sector);
    std::fs::write(&image, bytes).unwrap();
    let full = lab.backup("full", &image, &[]);
    (text(&full, "snapshot"), image)
}

/// The sum that the guest makes of a disk.
fn sum(disk: &[u8]) -> u32 {
    let words = disk
        .chunks_exact(4)
        .map(|w| u32::from_le_bytes(w.try_into().unwrap()));
    words.fold(0, |sum: u32, word| sum.rotate_left(1).wrapping_add(word))
}

/// Boots from a block device and returns what the guest said.
fn boot(block_device: &str, device: &str) -> String {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-nodefaults", "-display", "none"])
        .args(["-m", "64", "-serial", "stdio", "-no-reboot"])
        .args(["-blockdev", block_device, "-device", device])
        .args(["-device", "isa-debug-exit,iobase=0x501"])
        .stdin(Stdio::null());
    let run = Process::start(qemu).finish();
    let said = String::from_utf8(run.stdout).unwrap();
    assert_eq!(run.status.code(), Some(5), "{said}{}", run.stderr);
    said
}

#[test]
fn guest_boots_from_a_snapshot_and_reads_all_of_it_but_cannot_write() {
    let lab = Lab::new();
    let (snapshot, image) = bootable(&lab);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let (_, socket) = uri.split_once("socket=").expect("a Unix socket's URI");
    let nbd = format!(
        "driver=nbd,node-name=disk0,server.type=unix,server.path={socket},export=vda,read-only=on"
    );
    let expected = sum(&std::fs::read(&image).unwrap());
    let said = boot(&nbd, "virtio-blk-pci,drive=disk0,bootindex=0");
    assert_eq!(
        said,
        format!("guest: read, sum {expected:08x}, cannot write\n")
    );
}

#[test]
fn guest_boots_from_an_overlay_and_writes_to_it_while_the_snapshot_stays() {
    let lab = Lab::new();
    let (snapshot, image) = bootable(&lab);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let overlay = lab.file("overlay.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    tool("qemu-img", &[&create[..], &[&uri, &overlay]].concat());
    let node = format!("driver=qcow2,node-name=disk0,file.driver=file,file.filename={overlay}");
    let mut disk = std::fs::read(&image).unwrap();
    let said = boot(&node, "virtio-blk-pci,drive=disk0,bootindex=0");
    assert_eq!(
        said,
        format!("guest: read, sum {:08x}, wrote\n", sum(&disk))
    );
    let last = disk.len() - PART;
    disk.copy_within(last.., PART);
    let expected = lab.file("expected.raw");
    std::fs::write(&expected, disk).unwrap();
    let compare = ["compare", "-f", "qcow2", "-F", "raw"];
    tool("qemu-img", &[&compare[..], &[&overlay, &expected]].concat());
    let served = lab.file("served.raw");
    tool("nbdcopy", &[&uri, &served]);
    assert_same(&served, &image);
}
