//! A laboratory: a folder of its own with a repository, images and sockets, gone when dropped.

use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;

use super::disk;
use super::process::Process;
use super::program::{Run, nbdbackup, run, text};
use super::server::{Server, Serving};

/// The size of a usual disk, which ends within a chunk.
pub(crate) const SIZE: u64 = 12 * super::MIB + 20 * super::KIB;

/// A folder with a repository.
pub(crate) struct Lab {
    folder: TempDir,
}

impl Lab {
    /// Makes a laboratory with a new repository.
    pub(crate) fn new() -> Self {
        let lab = Self::empty();
        let init = lab.run(&["init", "--encryption", "none"]).result();
        assert_eq!(init["command"], "init");
        lab
    }

    /// Makes a laboratory with one snapshot of a raw image of [`SIZE`] bytes; returns the snapshot's id and the image.
    pub(crate) fn with_a_snapshot(seed: u64) -> (Self, String, String) {
        let lab = Self::new();
        let image = lab.raw("vda.raw", SIZE, seed);
        let full = lab.backup("full", lab.nbdkit(&["-r", "file", &image]).uri(), &[]);
        (lab, text(&full, "snapshot"), image)
    }

    /// Makes a laboratory whose repository does not exist yet.
    pub(crate) fn empty() -> Self {
        Self {
            folder: TempDir::with_prefix("nbdbackup-test-").unwrap(),
        }
    }

    /// The path of a file in the laboratory.
    pub(crate) fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// The repository's path.
    pub(crate) fn repository(&self) -> String {
        self.file("repository")
    }

    /// Runs `nbdbackup --repo REPOSITORY --json ARGS`.
    pub(crate) fn run(&self, args: &[&str]) -> Run {
        let repository = self.repository();
        run(&with_json(&repository, args))
    }

    /// Runs `nbdbackup --repo REPOSITORY ARGS`, as people do.
    pub(crate) fn run_text(&self, args: &[&str]) -> Run {
        let repository = self.repository();
        run(&[&["--repo", &repository], args].concat())
    }

    /// Starts `nbdbackup --repo REPOSITORY --json ARGS`.
    pub(crate) fn start(&self, args: &[&str]) -> Process {
        let repository = self.repository();
        Process::start(nbdbackup(&with_json(&repository, args)))
    }

    /// Makes a mixed qcow2 image.
    pub(crate) fn qcow2(&self, name: &str, size: u64, seed: u64) -> String {
        let path = self.file(name);
        disk::mixed_qcow2(&path, size, seed);
        path
    }

    /// Makes a mixed raw image.
    pub(crate) fn raw(&self, name: &str, size: u64, seed: u64) -> String {
        let path = self.file(name);
        disk::mixed_raw(&path, size, seed);
        path
    }

    /// Serves a qcow2 image read-only as export `vda`, with bitmaps.
    pub(crate) fn serve_qcow2(&self, image: &str, bitmaps: &[&str]) -> Server {
        let mut args = vec!["-f", "qcow2"];
        for bitmap in bitmaps {
            args.extend(["-B", bitmap]);
        }
        args.push(image);
        Server::qemu_nbd(&self.socket(), "vda", &args)
    }

    /// Serves something with nbdkit.
    pub(crate) fn nbdkit(&self, args: &[&str]) -> Server {
        Server::nbdkit(&self.socket(), args)
    }

    /// Takes a backup of one disk, `vda` of `web1`, which must succeed, and returns its result.
    #[track_caller]
    pub(crate) fn backup(&self, command: &str, source: &str, more: &[&str]) -> Value {
        let result = self.try_backup(command, source, more).result();
        assert_eq!(result["command"], command);
        assert_eq!(result["status"], "ok");
        assert_eq!(result["name"], "web1");
        assert_eq!(
            result["disks"].as_array().map(Vec::len),
            Some(1),
            "{result}"
        );
        assert_eq!(result["disks"][0]["disk"], "vda");
        result
    }

    /// Takes a backup of one disk, `vda` of `web1`.
    pub(crate) fn try_backup(&self, command: &str, source: &str, more: &[&str]) -> Run {
        self.run(&[&[command, source, "--name", "web1", "--disk", "vda"], more].concat())
    }

    /// Restores `vda` of a snapshot to a new file, which must succeed.
    #[track_caller]
    pub(crate) fn restore(&self, snapshot: &str) -> String {
        self.restore_disk(snapshot, "vda")
    }

    /// Restores a disk of a snapshot to a new file, which must succeed.
    #[track_caller]
    pub(crate) fn restore_disk(&self, snapshot: &str, disk: &str) -> String {
        let to = self.unused("restored");
        let result = self
            .run(&["restore", snapshot, "--disk", disk, "--to", &to])
            .result();
        assert_eq!(result["command"], "restore");
        to
    }

    /// Restores `vda` of a snapshot and compares it with a file.
    #[track_caller]
    pub(crate) fn assert_restores(&self, snapshot: &str, reference: &str) {
        let restored = self.restore(snapshot);
        disk::assert_same(&restored, reference);
        std::fs::remove_file(restored).unwrap();
    }

    /// Serves a snapshot at a new Unix socket.
    pub(crate) fn serve(&self, snapshot: &str) -> Serving {
        let address = format!("unix:{}", self.socket());
        let repository = self.repository();
        Serving::start(&with_json(
            &repository,
            &["restore", snapshot, "--serve", &address],
        ))
    }

    /// The ids of all snapshots, as they are listed.
    #[track_caller]
    pub(crate) fn snapshots(&self) -> Vec<String> {
        let result = self.run(&["snapshots"]).result();
        let snapshots = result["snapshots"]
            .as_array()
            .expect("snapshots is an array");
        snapshots.iter().map(|s| text(s, "id")).collect()
    }

    /// A name for a new socket.
    pub(crate) fn socket(&self) -> String {
        self.unused("socket")
    }

    /// All files of the repository, in order.
    pub(crate) fn repository_files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = vec![PathBuf::from(self.repository())];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path)
                } else {
                    files.push(path)
                }
            }
        }
        files.sort();
        files
    }

    fn unused(&self, kind: &str) -> String {
        (0..)
            .map(|n| self.file(&format!("{kind}{n}")))
            .find(|f| !std::fs::exists(f).unwrap())
            .unwrap()
    }
}

fn with_json<'a>(repository: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    [&["--repo", repository, "--json"], args].concat()
}
