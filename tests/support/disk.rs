//! Disk images with seeded contents, the changes made to them, and their comparison.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};

use super::process::tool;
use super::{KIB, MIB};

/// A small seeded generator (splitmix64), so that each run of a test sees the same disk.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8))
            .flat_map(|_| self.next().to_le_bytes())
            .collect();
        bytes.truncate(len);
        bytes
    }
}

/// Writes a raw image as real disks are: runs of text, of noise, of written zeros, and holes between them.
pub(crate) fn mixed_raw(path: &str, size: u64, seed: u64) {
    let mut random = Random::new(seed);
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut at = 0;
    while at < size {
        let len = (4 * KIB * (1 + random.below(160))).min(size - at);
        let bytes = match random.below(10) {
            0..=3 => text(&mut random, len as usize),
            4..=5 => random.bytes(len as usize),
            6 => vec![0; len as usize],
            _ => Vec::new(),
        };
        file.write_all_at(&bytes, at).unwrap();
        at += len;
    }
}

/// Makes a qcow2 image of the same contents.
pub(crate) fn mixed_qcow2(path: &str, size: u64, seed: u64) {
    let raw = format!("{path}.raw");
    mixed_raw(&raw, size, seed);
    tool(
        "qemu-img",
        &["convert", "-q", "-f", "raw", "-O", "qcow2", &raw, path],
    );
    std::fs::remove_file(raw).unwrap();
}

/// Starts a persistent dirty bitmap in a qcow2 image.
pub(crate) fn add_bitmap(image: &str, bitmap: &str) {
    tool(
        "qemu-img",
        &["bitmap", "--add", "-f", "qcow2", image, bitmap],
    );
}

/// Empties a bitmap, as a caller does after a run that succeeded.
pub(crate) fn clear_bitmap(image: &str, bitmap: &str) {
    tool(
        "qemu-img",
        &["bitmap", "--clear", "-f", "qcow2", image, bitmap],
    );
}

/// Removes a bitmap.
pub(crate) fn remove_bitmap(image: &str, bitmap: &str) {
    tool(
        "qemu-img",
        &["bitmap", "--remove", "-f", "qcow2", image, bitmap],
    );
}

/// Copies an image's contents to a raw file with QEMU: the reference that restores are compared with.
pub(crate) fn reference(image: &str, format: &str, raw: &str) {
    tool(
        "qemu-img",
        &["convert", "-q", "-f", format, "-O", "raw", image, raw],
    );
}

/// Runs `qemu-io` commands on an image, each of which must succeed.
pub(crate) fn qemu_io(image: &str, format: &str, commands: &[String]) {
    let mut child = Command::new("qemu-io")
        .args(["-f", format, "-d", "unmap", image])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let script = commands.join("\n") + "\n";
    let writer = std::thread::spawn(move || stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Makes `count` scattered writes of 4 to 64 KiB, some of one repeated byte and some of noise.
pub(crate) fn scatter(image: &str, format: &str, size: u64, count: u64, seed: u64) {
    let mut random = Random::new(seed);
    let noise = format!("{image}.noise{seed}");
    std::fs::write(&noise, random.bytes((64 * KIB) as usize)).unwrap();
    let commands: Vec<String> = (0..count)
        .map(|_| {
            let len = 4 * KIB * (1 + random.below(16));
            let offset = random.below((size - len) / 512) * 512;
            match random.below(2) {
                0 => format!("write -q -P {} {offset} {len}", 1 + random.below(255)),
                _ => format!("write -q -s {noise} {offset} {len}"),
            }
        })
        .collect();
    qemu_io(image, format, &commands);
    std::fs::remove_file(noise).unwrap();
}

/// Fails with the first place where two files differ.
#[track_caller]
pub(crate) fn assert_same(a: &str, b: &str) {
    let (len_a, len_b) = (file_len(a), file_len(b));
    assert_eq!(len_a, len_b, "{a} and {b} differ in length");
    if let Some(at) = first_difference(a, b) {
        panic!("{a} and {b} differ first at byte {at} of {len_a}");
    }
}

/// The first byte in which two files differ.
pub(crate) fn first_difference(a: &str, b: &str) -> Option<u64> {
    let mut a = BufReader::new(File::open(a).unwrap());
    let mut b = BufReader::new(File::open(b).unwrap());
    let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut at = 0;
    loop {
        let got = read_up_to(&mut a, &mut left);
        let other = read_up_to(&mut b, &mut right);
        if left[..got] != right[..other] {
            let same = left[..got]
                .iter()
                .zip(&right[..other])
                .take_while(|(x, y)| x == y)
                .count();
            return Some(at + same as u64);
        }
        if got == 0 {
            return None;
        }
        at += got as u64;
    }
}

/// The bytes that a file takes on its file system.
pub(crate) fn allocated(path: &str) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// A file's length.
pub(crate) fn file_len(path: &str) -> u64 {
    std::fs::metadata(path)
        .unwrap_or_else(|e| panic!("{path}: {e}"))
        .len()
}

fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> usize {
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..]).unwrap() {
            0 => break,
            n => got += n,
        }
    }
    got
}

fn text(random: &mut Random, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        let _ = writeln!(
            bytes,
            "{:016x} a line of a busy service, state=ok",
            random.next()
        );
    }
    bytes.truncate(len);
    bytes
}
