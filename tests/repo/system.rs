//! The program where the system refuses: too few open files, files that may not grow, folders that may not be written, and
//! what is no file where one should be.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use nbdbackup::repo::{CheckOptions, LocalStorage, Repository, Storage};

use crate::prune::noise;

/// A folder with an image, and a repository that holds it.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        std::fs::write(place.path("disk.raw"), noise(1, 40)).unwrap();
        place.works("init --encryption none");
        place.works("full DISK --name m --disk d");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the program under what a shell sets before.
    fn run(&self, before: &str, args: &str) -> Output {
        let disk = self.path("disk.raw");
        let to = self.path("restored.raw");
        let args = args.replace("DISK", disk.to_str().unwrap());
        let args = args.replace("TO", to.to_str().unwrap());
        let repo = self.path("repo");
        let program = env!("CARGO_BIN_EXE_nbdbackup");
        let line = format!("{before} {program} --json -r {} {args}", repo.display());
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(line).env("HOME", "/nonexistent");
        shell.output().unwrap()
    }

    fn works(&self, args: &str) {
        let output = self.run("exec", args);
        assert!(output.status.success(), "{args}: {output:?}");
    }

    /// What must hold after any refusal: what was stored is whole, and the next backup works.
    fn is_whole(&self, what: &str) {
        let storage = Arc::new(LocalStorage::open(self.path("repo")).unwrap());
        let repo = Repository::open(storage).unwrap();
        let options = CheckOptions {
            read_data_percent: Some(100.0),
            ..CheckOptions::default()
        };
        let found = repo.check(&options, &|_, _| {}).unwrap();
        assert!(found.is_whole() && found.snapshots > 0, "{what}: {found:?}");
        assert!(repo.snapshots().unwrap().unreadable.is_empty(), "{what}");
    }

    /// A refusal is told as one of the storage or of this machine, and never as damage or a repository that is not there.
    fn assert_told(&self, output: &Output, codes: &[i32], what: &str) {
        let code = output.status.code();
        let told = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        let known = code.is_some_and(|code| codes.contains(&code));
        assert!(known, "{what}: {code:?}\n{told}\n{errors}");
        assert!(!errors.contains("panicked"), "{what}: {errors}");
    }
}

const COMMANDS: [&str; 6] = [
    "full DISK --name m --disk d",
    "restore m --disk d --to TO --force",
    "check --read-data",
    "check --read-data --repair",
    "prune",
    "snapshots",
];

#[test]
fn too_few_open_files_are_told_and_nothing_is_lost() {
    let place = Place::new();
    // How many were refused at their start, and later. The limits go up one by one from less than a start needs, so
    // that the files that a test inherits do not matter.
    let (mut at_start, mut later) = (0, 0);
    for command in COMMANDS {
        for files in 4..34 {
            let what = format!("{files} files, {command}");
            let output = place.run(&format!("ulimit -n {files} && exec"), command);
            // 127 where not even the libraries are loaded, 20 and 22 where the image cannot be opened.
            place.assert_told(&output, &[0, 1, 14, 20, 22, 127], &what);
            match output.status.code() {
                Some(0) => {}
                Some(1 | 127) => at_start += 1,
                _ => later += 1,
            }
        }
        place.is_whole(command);
    }
    assert!(at_start >= COMMANDS.len(), "{at_start} {later}");
    assert!(later > COMMANDS.len(), "{at_start} {later}");
    place.works("full DISK --name m --disk d");
}

#[test]
fn files_that_may_not_grow_are_told_and_nothing_is_lost() {
    let place = Place::new();
    let mut refused = 0;
    for (round, blocks) in [0, 1, 8, 64, 1000, 4000].into_iter().enumerate() {
        std::fs::write(place.path("disk.raw"), noise(10 + round as u64, 40)).unwrap();
        for command in [COMMANDS[0], COMMANDS[1], "prune", "check --repair"] {
            let what = format!("{blocks} blocks, {command}");
            // A signal would end the program; ignored, the write fails.
            let before = format!("trap '' XFSZ; ulimit -f {blocks} && exec");
            let output = place.run(&before, command);
            place.assert_told(&output, &[0, 1, 14], &what);
            refused += usize::from(!output.status.success());
        }
        place.is_whole(&format!("{blocks} blocks"));
        place.works(COMMANDS[0]);
    }
    assert!(refused > 6, "{refused}");
}

#[test]
fn folder_or_pipe_in_the_place_of_any_file_stops_and_hangs_nothing_but_what_needs_that_file() {
    let place = Place::new();
    let disk = noise(1, 40);
    let storage = LocalStorage::open(place.path("repo")).unwrap();
    let files = Storage::list(&storage, "").unwrap();
    std::fs::create_dir(place.path("repo/tmp/folder")).unwrap();
    for (file, kind) in files.iter().flat_map(|f| [(f, "mkdir"), (f, "mkfifo")]) {
        let path = place.path("repo").join(&file.name);
        let aside = place.path("aside");
        std::fs::rename(&path, &aside).unwrap();
        assert!(Command::new(kind).arg(&path).status().unwrap().success());
        for command in ["snapshots", COMMANDS[1], "check --read-data"] {
            let what = format!("{kind} {}, {command}", file.name);
            // What hangs is ended by a signal, and so is not told.
            let output = place.run("exec timeout --signal KILL 60", command);
            place.assert_told(&output, &[0, 1, 13], &what);
            if command == COMMANDS[1] && output.status.success() {
                assert!(
                    std::fs::read(place.path("restored.raw")).unwrap() == disk,
                    "{what}"
                );
            }
            let named = String::from_utf8_lossy(&output.stdout).contains(&file.name);
            let told = named || !output.status.success();
            let checked = command.starts_with("check");
            // The reserve is room and nothing else, and the latest snapshot's file, gone without a trace, is not missed.
            let unseen =
                file.name == "reserve" || kind == "mkdir" && file.name.starts_with("snap/");
            assert!(told || unseen || !checked, "{what}: {output:?}");
        }
        match kind {
            "mkdir" => std::fs::remove_dir(&path).unwrap(),
            _ => std::fs::remove_file(&path).unwrap(),
        }
        std::fs::rename(&aside, &path).unwrap();
    }
    place.is_whole("all is back");
    place.works(COMMANDS[0]);
}

#[test]
fn repository_that_may_only_be_read_is_read_and_everything_else_is_told() {
    let place = Place::new();
    let id = {
        let storage = Arc::new(LocalStorage::open(place.path("repo")).unwrap());
        let repo = Repository::open(storage).unwrap();
        repo.snapshots().unwrap().snapshots[0].id
    };
    let out = place.path("out");
    std::fs::create_dir(&out).unwrap();
    let mode = |path: &Path, mode: &str| {
        let done = Command::new("chmod").args(["-R", mode]).arg(path).status();
        assert!(done.unwrap().success());
    };
    mode(place.folder.path(), "a+rX");
    mode(&out, "a+rwX");
    mode(&place.path("repo"), "a-w");
    // Nothing is forbidden to the superuser.
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| {
        use std::os::unix::fs::MetadataExt;
        m.uid() == 0
    });
    let before = match root {
        true => "exec setpriv --reuid=65534 --regid=65534 --clear-groups",
        false => "exec",
    };
    let files = || {
        let storage = LocalStorage::open(place.path("repo")).unwrap();
        let mut files = Storage::list(&storage, "").unwrap();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files
    };
    let there = files();
    for command in [
        "snapshots",
        "check --read-data",
        "restore m --disk d --to OUT --force",
    ] {
        let command = command.replace("OUT", out.join("d.raw").to_str().unwrap());
        let output = place.run(before, &command);
        place.assert_told(&output, &[0], &command);
    }
    assert!(std::fs::read(out.join("d.raw")).unwrap() == noise(1, 40));
    std::fs::write(place.path("disk.raw"), noise(2, 40)).unwrap();
    let forget = format!("forget {id} --force");
    for command in [COMMANDS[0], &forget] {
        let output = place.run(before, command);
        place.assert_told(&output, &[14], command);
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(told.contains("Permission denied"), "{command}: {told}");
    }
    assert_eq!(files(), there);
    mode(&place.path("repo"), "u+w");
    place.is_whole("written again");
    place.works(COMMANDS[0]);
}
