//! Where a restored disk can go, and what must not be overwritten.

use crate::support::MIB;
use crate::support::disk::{allocated, assert_same, file_len, reference};
use crate::support::lab::{Lab, SIZE};
use crate::support::process::{tool, try_tool};
use crate::support::program::text;

#[test]
fn disk_goes_to_stdout_byte_for_byte() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(1);
    let run = lab.run_text(&["restore", &snapshot, "--to", "-"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_eq!(run.stdout.len() as u64, SIZE);
    assert!(
        run.stdout == std::fs::read(&image).unwrap(),
        "stdout differs from the disk"
    );
}

#[test]
fn reader_that_goes_away_ends_a_restore_to_stdout_with_an_error() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(2);
    let script = "\"$@\" | head -c 100000 >/dev/null; exit ${PIPESTATUS[0]}";
    let program = env!("CARGO_BIN_EXE_nbdbackup");
    let repository = lab.repository();
    let args = [
        "-c",
        script,
        "bash",
        program,
        "--repo",
        &repository,
        "restore",
        &snapshot,
        "--to",
        "-",
    ];
    let run = try_tool("bash", &args);
    assert!(!run.status.success(), "a cut restore reported success");
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
}

#[test]
fn existing_target_is_kept_without_force_and_replaced_with_it() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(3);
    let target = lab.file("target.raw");
    let old = vec![0xff; SIZE as usize + 1000];
    std::fs::write(&target, &old).unwrap();
    let error = lab.run(&["restore", &snapshot, "--to", &target]).error(1);
    let message = text(&error, "message");
    assert!(
        message.contains(&target) && message.contains("--force"),
        "{message}"
    );
    assert!(
        std::fs::read(&target).unwrap() == old,
        "the target was touched"
    );

    lab.run(&["restore", &snapshot, "--to", &target, "--force"])
        .result();
    assert_same(&target, &image);
    assert!(
        allocated(&target) <= allocated(&image) + MIB,
        "holes of the disk were left allocated in the target"
    );
}

#[test]
fn target_in_a_folder_that_does_not_exist_is_an_error_with_its_path() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(4);
    let target = lab.file("missing/target.raw");
    let error = lab.run(&["restore", &snapshot, "--to", &target]).error(1);
    assert!(text(&error, "message").contains(&target), "{error}");
}

#[test]
fn target_without_room_is_an_error_of_its_own() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(5);
    let script = "ulimit -f 1024; trap '' XFSZ; exec \"$@\"";
    let (program, repository, target) = (
        env!("CARGO_BIN_EXE_nbdbackup"),
        lab.repository(),
        lab.file("target.raw"),
    );
    let args = [
        "-c",
        script,
        "bash",
        program,
        "--repo",
        &repository,
        "restore",
        &snapshot,
        "--to",
        &target,
    ];
    let run = try_tool("bash", &args);
    assert!(
        !run.status.success() && run.stderr.contains(&target),
        "{}",
        run.stderr
    );
}

#[test]
fn disk_goes_to_a_qcow2_file() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(6);
    let target = lab.file("target.qcow2");
    lab.run(&["restore", &snapshot, "--to", &target, "--format", "qcow2"])
        .result();
    tool("qemu-img", &["check", "-f", "qcow2", &target]);
    let raw = lab.file("target.raw");
    reference(&target, "qcow2", &raw);
    // A qcow2 image's size is a multiple of 512 bytes; so is this disk's.
    assert_eq!(file_len(&raw), SIZE);
    assert_same(&raw, &image);
    lab.run(&["restore", &snapshot, "--to", &target, "--format", "qcow2"])
        .error(1);
}

#[test]
fn snapshot_is_found_by_every_form_of_its_name() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(7);
    for form in [&snapshot, &snapshot[..4], "latest", "web1", "web1@latest"] {
        lab.assert_restores(form, &image);
    }
    for form in ["latest@web1", "web2", "zzzz", "web2@latest", ""] {
        lab.run(&["restore", form, "--to", &lab.file("out")])
            .error(1);
    }
    lab.run(&[
        "restore",
        &snapshot,
        "--disk",
        "vdb",
        "--to",
        &lab.file("out"),
    ])
    .error(1);
    assert!(!std::fs::exists(lab.file("out")).unwrap());
}
