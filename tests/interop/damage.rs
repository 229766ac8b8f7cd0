//! Bits flipped in the repository: an error that names what is hurt, never other bytes than were stored.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::support::MIB;
use crate::support::disk::{Random, assert_same};
use crate::support::lab::Lab;
use crate::support::process::try_tool;
use crate::support::program::text;

const SIZE: u64 = 12 * MIB;

/// A laboratory with one snapshot of noise, which no compression shortens, and the packs of its repository.
fn with_a_snapshot() -> (Lab, String, String, Vec<PathBuf>) {
    let lab = Lab::new();
    let image = lab.file("vda.raw");
    std::fs::write(&image, Random::new(1).bytes(SIZE as usize)).unwrap();
    let full = lab.backup("full", lab.nbdkit(&["-r", "file", &image]).uri(), &[]);
    let mut packs = lab.repository_files();
    packs.retain(|p| p.components().any(|c| c.as_os_str() == "packs"));
    assert!(!packs.is_empty());
    (lab, text(&full, "snapshot"), image, packs)
}

/// Flips one bit of a file; flipping it again mends the file.
fn flip(file: &Path, at: u64) {
    let mut byte = [0];
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    open.read_exact_at(&mut byte, at).unwrap();
    open.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn len(file: &Path) -> u64 {
    std::fs::metadata(file).unwrap().len()
}

#[test]
fn damaged_chunk_fails_the_restore_and_is_named() {
    let (lab, snapshot, _, packs) = with_a_snapshot();
    let largest = packs.iter().max_by_key(|p| len(p)).unwrap();
    flip(largest, len(largest) / 2);
    let error = lab
        .run(&["restore", &snapshot, "--to", &lab.file("out.raw")])
        .error(13);
    let message = text(&error, "message");
    assert!(
        message.contains(&snapshot) && message.contains("vda") && message.contains("0x"),
        "{message}"
    );

    let run = lab.run_text(&["restore", &snapshot, "--to", "-"]);
    assert_eq!(run.code, Some(13));
    assert!(run.stderr.contains("vda"), "{}", run.stderr);
    assert!((run.stdout.len() as u64) < SIZE, "all bytes were written");
}

#[test]
fn damaged_chunk_is_an_error_for_those_who_read_it_and_for_no_one_else() {
    let (lab, snapshot, image, packs) = with_a_snapshot();
    let largest = packs.iter().max_by_key(|p| len(p)).unwrap();
    flip(largest, len(largest) / 2);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let script = format!(
        "import nbd, errno\n\
         h = nbd.NBD(); h.connect_uri('{uri}'); d = open('{image}', 'rb').read(); bad = 0\n\
         for o in range(0, {SIZE}, 131072):\n\
         \x20 try: b = bytes(h.pread(131072, o))\n\
         \x20 except nbd.Error as e: assert e.errnum == errno.EIO, e; bad += 1\n\
         \x20 else: assert b == d[o:o + 131072], o\n\
         assert bad == 1, bad\n"
    );
    let run = try_tool("/usr/bin/python3", &["-c", &script]);
    assert!(run.status.success(), "{}", run.stderr);
    assert!(
        !try_tool("nbdcopy", &[&uri, &lab.file("out.raw")])
            .status
            .success()
    );
}

#[test]
fn bit_flipped_anywhere_in_the_repository_never_gives_wrong_bytes() {
    let (lab, snapshot, image, _) = with_a_snapshot();
    let mut random = Random::new(2);
    let mut refused = 0;
    for file in lab.repository_files() {
        for _ in 0..6 {
            let at = random.below(len(&file).max(1));
            if len(&file) == 0 {
                continue;
            }
            flip(&file, at);
            let out = lab.file("out.raw");
            let run = lab.run(&["restore", &snapshot, "--to", &out, "--force"]);
            match run.code {
                Some(0) => assert_same(&out, &image),
                Some(1 | 10 | 13) => {
                    refused += 1;
                    run.error(run.code.unwrap());
                }
                code => panic!(
                    "{code:?} after a flip at {at} of {}: {}",
                    file.display(),
                    run.stderr
                ),
            }
            flip(&file, at);
        }
    }
    assert!(refused > 0, "no flip was noticed");
    lab.assert_restores(&snapshot, &image);
}

#[test]
fn file_that_is_cut_or_gone_never_gives_wrong_bytes() {
    let (lab, snapshot, image, _) = with_a_snapshot();
    for file in lab.repository_files() {
        let whole = std::fs::read(&file).unwrap();
        for kept in [
            None,
            Some(0),
            Some(whole.len() / 2),
            Some(whole.len().saturating_sub(1)),
        ] {
            match kept {
                None => std::fs::remove_file(&file).unwrap(),
                Some(kept) => std::fs::write(&file, &whole[..kept]).unwrap(),
            }
            let out = lab.file("out.raw");
            let run = lab.run(&["restore", &snapshot, "--to", &out, "--force"]);
            match run.code {
                Some(0) => assert_same(&out, &image),
                Some(1 | 10 | 13) => {
                    run.error(run.code.unwrap());
                }
                code => panic!(
                    "{code:?} with {kept:?} bytes of {}: {}",
                    file.display(),
                    run.stderr
                ),
            }
            std::fs::write(&file, &whole).unwrap();
        }
    }
    lab.assert_restores(&snapshot, &image);
}

#[test]
fn damaged_snapshot_does_not_hide_the_others() {
    let (lab, first, image, _) = with_a_snapshot();
    let before = lab.repository_files();
    let second = text(
        &lab.backup("full", lab.nbdkit(&["-r", "file", &image]).uri(), &[]),
        "snapshot",
    );
    let new: Vec<PathBuf> = lab
        .repository_files()
        .into_iter()
        .filter(|f| !before.contains(f))
        .collect();
    for file in new {
        std::fs::write(&file, b"no longer what it was").unwrap();
    }
    let list = lab.run(&["snapshots"]);
    assert!(matches!(list.code, Some(0 | 3 | 13)), "{:?}", list.code);
    let last = list.lines().pop().unwrap();
    assert!(last.to_string().contains(&first), "{last}");
    lab.assert_restores(&first, &image);
    lab.run(&["restore", &second, "--to", &lab.file("out.raw")])
        .error(13);
}
