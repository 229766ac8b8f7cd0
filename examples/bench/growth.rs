//! What grows with the disk, the data and the snapshots, and what must not.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbdbackup::repo::{LocalStorage, Repository, SessionOptions};

use super::Fault;
use super::report::Report;
use super::run::{Cost, run};
use super::serving::Serving;

/// Makes one thing larger at a time; `disk` is the disk of the other rows.
pub(crate) fn growth(
    program: &Path,
    scratch: &Path,
    disk: &Path,
    report: &mut Report,
) -> Result<(), Fault> {
    let mut growth = Growth {
        program,
        scratch,
        folder: scratch.join("growth"),
        report,
    };
    growth.data()?;
    growth.disk_size()?;
    growth.connections(disk)?;
    growth.latency()?;
    growth.snapshots()?;
    std::fs::remove_dir_all(&growth.folder)?;
    Ok(())
}

struct Growth<'a> {
    program: &'a Path,
    scratch: &'a Path,
    /// The repository, made anew for each case.
    folder: PathBuf,
    report: &'a mut Report,
}

impl Growth<'_> {
    fn add(&mut self, name: String, value: f64) {
        self.report.add("growth", &name, value);
    }

    fn ours(&self, words: &[&str]) -> Result<Cost, Fault> {
        let folder = self.folder.display().to_string();
        let common = ["--json", "--repo", &folder];
        run(self.scratch, self.program, common.iter().chain(words)).map(|(cost, _)| cost)
    }

    fn init(&self) -> Result<(), Fault> {
        if self.folder.exists() {
            std::fs::remove_dir_all(&self.folder)?;
        }
        self.ours(&["init", "--encryption", "none"]).map(drop)
    }

    /// Data that neither shrinks nor repeats: linear time, flat memory.
    fn data(&mut self) -> Result<(), Fault> {
        let image = self.scratch.join("growth.raw");
        for mib in [256, 512, 1024, 2048] {
            noise(&image, mib)?;
            self.init()?;
            let cost = self.ours(&["full", &text(&image)])?;
            self.add(format!("{mib} MiB of noise, full s"), cost.seconds);
            self.add(format!("{mib} MiB of noise, full peak MiB"), cost.peak_mib);
        }
        std::fs::remove_file(&image)?;
        for size in ["4G", "40G"] {
            let server = Serving::quarter_full(self.scratch, size)?;
            self.init()?;
            for what in ["full", "full again"] {
                let cost = self.ours(&["full", &server.uri()])?;
                self.add(
                    format!("{size}, a quarter of it data, {what} s"),
                    cost.seconds,
                );
                let name = format!("{size}, a quarter of it data, {what} peak MiB");
                self.add(name, cost.peak_mib);
            }
            let copy = self.scratch.join("growth.copy");
            let cost = self.ours(&["restore", "latest", "--to", &text(&copy)])?;
            self.add(
                format!("{size}, a quarter of it data, restore peak MiB"),
                cost.peak_mib,
            );
            std::fs::remove_file(&copy)?;
        }
        Ok(())
    }

    /// Sparse disks with 64 MiB of data each: nearly flat.
    fn disk_size(&mut self) -> Result<(), Fault> {
        let image = self.scratch.join("growth.qcow2");
        for size in ["1G", "10G", "100G", "1T", "10T"] {
            self.blank(&image, size)?;
            let mut words = vec!["-f".to_owned(), "qcow2".to_owned()];
            for mib in 0..64 {
                words.extend([
                    "-c".to_owned(),
                    format!("write -P {} {}M 1M", mib + 1, mib * 15),
                ]);
            }
            run(
                self.scratch,
                "qemu-io",
                words.into_iter().chain([text(&image)]),
            )?;
            run(
                self.scratch,
                "qemu-img",
                ["bitmap", "--add", &text(&image), "bm0"],
            )?;
            self.init()?;
            let server = Serving::qemu_nbd(self.scratch, &image, Some("bm0"))?;
            let uri = server.uri();
            for command in ["full", "incremental"] {
                let cost = self.ours(&[command, &uri, "--bitmap", "bm0"])?;
                self.add(format!("disk of {size}, {command} s"), cost.seconds);
                self.add(format!("disk of {size}, {command} peak MiB"), cost.peak_mib);
            }
        }
        std::fs::remove_file(&image)?;
        Ok(())
    }

    /// Connections to one server.
    fn connections(&mut self, disk: &Path) -> Result<(), Fault> {
        let server = Serving::qemu_nbd(self.scratch, disk, None)?;
        for connections in ["1", "2", "4", "8"] {
            self.init()?;
            let cost = self.ours(&["full", &server.uri(), "--connections", connections])?;
            self.add(format!("{connections} connections, full s"), cost.seconds);
            self.add(
                format!("{connections} connections, full peak MiB"),
                cost.peak_mib,
            );
        }
        Ok(())
    }

    /// A source that takes its time for each read.
    fn latency(&mut self) -> Result<(), Fault> {
        let image = self.scratch.join("growth.raw");
        noise(&image, 256)?;
        for millis in [0, 1, 10] {
            let server = Serving::slow(self.scratch, &image, millis)?;
            self.init()?;
            let cost = self.ours(&["full", &server.uri()])?;
            self.add(
                format!("{millis} ms for each read, 256 MiB, full s"),
                cost.seconds,
            );
        }
        std::fs::remove_file(&image)?;
        Ok(())
    }

    /// Snapshots of one disk, of which nothing is dirty.
    fn snapshots(&mut self) -> Result<(), Fault> {
        let image = self.scratch.join("growth.qcow2");
        self.blank(&image, "1G")?;
        run(
            self.scratch,
            "qemu-img",
            ["bitmap", "--add", &text(&image), "bm0"],
        )?;
        self.init()?;
        let server = Serving::qemu_nbd(self.scratch, &image, Some("bm0"))?;
        let uri = server.uri();
        let incremental = ["incremental", &uri, "--bitmap", "bm0"];
        self.ours(&["full", &uri, "--bitmap", "bm0"])?;
        for many in [1, 10, 100, 1000, 10_000] {
            self.fill_up(many)?;
            for (what, words) in [
                ("list", &["snapshots"][..]),
                ("incremental", &incremental),
                ("prune of nothing", &["prune"]),
            ] {
                let cost = self.ours(words)?;
                self.add(format!("{many} snapshots, {what} s"), cost.seconds);
                self.add(format!("{many} snapshots, {what} peak MiB"), cost.peak_mib);
            }
        }
        std::fs::remove_file(&image)?;
        Ok(())
    }

    /// Adds copies of the last snapshot, of other machines, until there are so many.
    fn fill_up(&self, many: usize) -> Result<(), Fault> {
        let repo = Repository::open(Arc::new(LocalStorage::open(&self.folder)?))?;
        let snapshots = repo.snapshots()?.snapshots;
        let last = snapshots.last().ok_or("there is no snapshot to copy")?;
        let options = SessionOptions {
            parents: vec![last.id],
            ..SessionOptions::default()
        };
        for number in snapshots.len()..many {
            let mut draft = last.draft.clone();
            draft.name = format!("machine-{number}");
            repo.begin(&options)?.commit(draft)?;
        }
        Ok(())
    }

    fn blank(&self, image: &Path, size: &str) -> Result<(), Fault> {
        let create = ["create", "-q", "-f", "qcow2", &text(image), size];
        run(self.scratch, "qemu-img", create).map(drop)
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Writes bytes that neither shrink nor repeat.
fn noise(path: &Path, mib: u64) -> Result<(), Fault> {
    let mut file = File::create(path)?;
    let mut bytes = vec![0; 1 << 20];
    let mut from = blake3::Hasher::new().finalize_xof();
    for _ in 0..mib {
        from.fill(&mut bytes);
        file.write_all(&bytes)?;
    }
    Ok(())
}
