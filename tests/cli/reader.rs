//! The independent reader in `examples/reader.py`: what it restores by `docs/format.md` alone is the disk.

use std::path::Path;
use std::process::{Command, Output};

use crate::support::MIB;
use crate::support::disk::assert_same;
use crate::support::lab::Lab;
use crate::support::program::text;

/// Runs the reader with the packages that `tests/setup.sh` installed.
fn reader(env: &[(&str, &str)], args: &[&str]) -> Output {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Command::new(here.join("target/tools/bin/python"))
        .arg(here.join("examples/reader.py"))
        .args(args)
        .env_remove("READER_PASSWORD")
        .env_remove("READER_KEY_FILE")
        .envs(env.iter().copied())
        .output()
        .expect("tests/setup.sh installs python for the reader")
}

#[track_caller]
fn reads(env: &[(&str, &str)], args: &[&str]) -> String {
    let output = reader(env, args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Backs an image up twice, with a change between, and reads both snapshots with the reader.
fn agree(lab: &Lab, options: &[&str], env: &[(&str, &str)]) {
    let repository = lab.repository();
    let image = lab.raw("vda.raw", 20 * MIB + 512, 7);
    let mut snapshots = Vec::new();
    for turn in 0..2 {
        let full = ["full", &image, "--name", "web1", "--disk", "vda"];
        let result = lab.run(&[options, &full].concat()).result();
        let reference = lab.file(&format!("reference{turn}"));
        std::fs::copy(&image, &reference).unwrap();
        snapshots.push((text(&result, "snapshot"), reference));
        let mut bytes = std::fs::read(&image).unwrap();
        bytes[5 * MIB as usize..][..9].copy_from_slice(b"something");
        std::fs::write(&image, bytes).unwrap();
    }
    let listed = reads(env, &[&repository]);
    for (id, reference) in &snapshots {
        assert!(listed.contains(id), "{listed}");
        let target = lab.file("read");
        reads(env, &[&repository, &id[..8], "vda", &target]);
        assert_same(&target, reference);
    }
}

#[test]
fn reader_restores_what_was_backed_up() {
    let lab = Lab::new();
    agree(&lab, &[], &[]);
    // A damaged chunk is an error there too.
    for file in lab.repository_files() {
        if file.to_str().unwrap().contains("/packs/") {
            let mut bytes = std::fs::read(&file).unwrap();
            bytes[100] ^= 1;
            std::fs::remove_file(&file).unwrap();
            std::fs::write(&file, bytes).unwrap();
        }
    }
    let id = lab.snapshots().remove(0);
    let target = lab.file("read");
    let output = reader(&[], &[&lab.repository(), &id, "vda", &target]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("is lost"));
}

#[test]
fn reader_opens_encrypted_repositories_by_password_and_by_key_file() {
    let lab = Lab::empty();
    let (password, key) = (lab.file("password"), lab.file("key"));
    std::fs::write(&password, "correct horse\n").unwrap();
    std::fs::write(&key, [5; 40]).unwrap();
    let cheap = ["--argon2-memory", "1MiB", "--argon2-passes", "1"];
    let init = ["init", "--password-file", &password];
    lab.run(&[&init[..], &cheap].concat()).result();
    let with = ["--password-file", password.as_str()];
    agree(&lab, &with, &[("READER_PASSWORD", "correct horse")]);
    let add = ["key", "add", "--new-key-file", &key];
    lab.run(&[&with[..], &add].concat()).result();
    let listed = reads(&[("READER_KEY_FILE", &key)], &[&lab.repository()]);
    assert_eq!(listed.lines().count(), 2, "{listed}");
    let wrong = [("READER_PASSWORD", "wrong")];
    assert!(!reader(&wrong, &[&lab.repository()]).status.success());
    assert!(!reader(&[], &[&lab.repository()]).status.success());
}
