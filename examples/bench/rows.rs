//! The rows of the table: what is run, and beside what.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Fault;
use super::disks::Disks;
use super::fio::{Load, Rate, random_reads};
use super::growth::growth;
use super::push::push;
use super::report::Report;
use super::run::{Cost, MIB, forget_cached, last_json, run, stored_mib};
use super::serving::Serving;

/// The rows, in the order in which they are run.
pub(crate) const ROWS: &[&str] = &[
    "full",
    "again",
    "incremental",
    "huge",
    "restore",
    "serve",
    "random",
    "encrypted",
    "tls",
    "growth",
    "qemu-img",
    "restic",
    "rustic",
    "borg",
];

/// The program under measurement, the disks, and a folder that is removed in the end.
pub(crate) struct Bench {
    program: PathBuf,
    pub(crate) disks: Disks,
    pub(crate) scratch: PathBuf,
}

impl Bench {
    pub(crate) fn new(program: PathBuf, disks: Disks, scratch: PathBuf) -> Self {
        Self {
            program,
            disks,
            scratch,
        }
    }

    /// Runs each of the rows once.
    pub(crate) fn round(
        &self,
        round: usize,
        rows: &[String],
        report: &mut Report,
    ) -> Result<(), Fault> {
        let wants = |names: &[&str]| rows.iter().any(|row| names.contains(&row.as_str()));
        // In turns, so that neither always finds what the other left in the caches.
        let floor_first = round.is_multiple_of(2);
        let repository = self.scratch.join("repository");
        if wants(&["full", "again", "incremental", "restore", "serve", "random"]) {
            self.init(&repository)?;
            let full = self.full(&repository, floor_first, wants(&["full"]), report)?;
            if wants(&["again"]) {
                self.again(&repository, full, report)?;
            }
            self.incremental(&repository, floor_first, wants(&["incremental"]), report)?;
        }
        if wants(&["huge"]) {
            self.huge(report)?;
        }
        if wants(&["restore"]) {
            self.restore(&repository, floor_first, report)?;
        }
        if wants(&["serve"]) {
            self.serve(&repository, floor_first, report)?;
        }
        if wants(&["random"]) {
            self.random(&repository, report)?;
        }
        if wants(&["encrypted"]) {
            self.encrypted(floor_first, report)?;
        }
        if wants(&["tls"]) {
            self.tls(floor_first, report)?;
        }
        // Once: it is long, and its figures are compared with each other.
        if wants(&["growth"]) && !report.has("growth") {
            let disk = self.disks.image("gen1.qcow2");
            growth(&self.program, &self.scratch, &disk, report)?;
        }
        if wants(&["qemu-img"]) {
            self.qemu_img(report)?;
        }
        if wants(&["restic"]) {
            self.restic(report)?;
        }
        if wants(&["rustic"]) {
            self.rustic(report)?;
        }
        if wants(&["borg"]) {
            self.borg(report)?;
        }
        Ok(())
    }

    fn full(
        &self,
        repository: &Path,
        floor_first: bool,
        measured: bool,
        report: &mut Report,
    ) -> Result<Cost, Fault> {
        let server = self.serve_image("gen1.qcow2", Some("bm0"))?;
        let ours = || self.backup(repository, "full", &server);
        if !measured {
            return Ok(ours()?.0);
        }
        let ((cost, result), floor) = in_turns(floor_first, ours, || self.floor(&server))?;
        report.add("full", "wall / floor", cost.seconds / floor.seconds);
        report.add("full", "wall s", cost.seconds);
        report.add("full", "floor s", floor.seconds);
        report.add("full", "CPU / floor", cost.cpu_seconds / floor.cpu_seconds);
        report.add("full", "CPU s", cost.cpu_seconds);
        report.add("full", "peak MiB", cost.peak_mib);
        let used = number(&result, "read_bytes")? / MIB;
        let stored = stored_mib(repository)?;
        report.add("full", "used MiB", used);
        report.add("full", "stored MiB", stored);
        report.add("full", "stored MiB / used MiB", stored / used);
        Ok(cost)
    }

    fn again(&self, repository: &Path, full: Cost, report: &mut Report) -> Result<(), Fault> {
        let before = stored_mib(repository)?;
        let server = self.serve_image("gen1.qcow2", Some("bm0"))?;
        let (cost, _) = self.backup(repository, "full", &server)?;
        report.add("again", "speed / full", full.seconds / cost.seconds);
        report.add("again", "wall s", cost.seconds);
        report.add("again", "CPU s", cost.cpu_seconds);
        report.add("again", "stored MiB", stored_mib(repository)? - before);
        Ok(())
    }

    fn incremental(
        &self,
        repository: &Path,
        push_first: bool,
        measured: bool,
        report: &mut Report,
    ) -> Result<(), Fault> {
        let before = stored_mib(repository)?;
        let ours = || {
            let server = self.serve_image("gen2.qcow2", Some("bm0"))?;
            self.backup(repository, "incremental", &server)
        };
        if !measured {
            return ours().map(drop);
        }
        let target = self.scratch.join("pushed.qcow2");
        let theirs = || push(&self.disks.image("gen2.qcow2"), &target);
        let ((cost, result), pushed) = in_turns(push_first, ours, theirs)?;
        report.add("incremental", "wall / push", cost.seconds / pushed.seconds);
        report.add("incremental", "wall s", cost.seconds);
        report.add("incremental", "push s", pushed.seconds);
        report.add("incremental", "CPU s", cost.cpu_seconds);
        report.add("incremental", "peak MiB", cost.peak_mib);
        let read = number(&result, "read_bytes")?;
        let [dirty, rounded] = self.dirty(repository)?;
        report.add("incremental", "dirty MiB", dirty / MIB);
        report.add("incremental", "read MiB", read / MIB);
        report.add("incremental", "read / dirty chunks", read / rounded);
        let stored = stored_mib(repository)? - before;
        report.add("incremental", "stored MiB", stored);
        std::fs::remove_file(target)?;
        Ok(())
    }

    fn huge(&self, report: &mut Report) -> Result<(), Fault> {
        let repository = self.scratch.join("huge");
        self.init(&repository)?;
        let server = self.serve_image("huge.qcow2", Some("bm0"))?;
        let (full, _) = self.backup(&repository, "full", &server)?;
        let (cost, _) = self.backup(&repository, "incremental", &server)?;
        report.add("huge", "wall s", cost.seconds);
        report.add("huge", "peak MiB", cost.peak_mib);
        report.add("huge", "full's wall s", full.seconds);
        report.add("huge", "full's peak MiB", full.peak_mib);
        Ok(())
    }

    fn restore(
        &self,
        repository: &Path,
        floor_first: bool,
        report: &mut Report,
    ) -> Result<(), Fault> {
        let server = self.serve_image("gen2.qcow2", None)?;
        let target = self.scratch.join("restored.raw");
        let _ = std::fs::remove_file(&target);
        let ours = || {
            let to = target.as_os_str();
            self.ours(
                repository,
                ["restore".as_ref(), "latest".as_ref(), "--to".as_ref(), to],
            )
        };
        let ((cost, _), floor) = in_turns(floor_first, ours, || self.floor(&server))?;
        report.add("restore", "wall / floor", cost.seconds / floor.seconds);
        report.add("restore", "wall s", cost.seconds);
        report.add("restore", "floor s", floor.seconds);
        report.add("restore", "CPU s", cost.cpu_seconds);
        report.add("restore", "peak MiB", cost.peak_mib);
        // A fast restore of other bytes would be no restore.
        let original = self.disks.image("gen2.raw");
        run(&self.scratch, "cmp", [original, target.clone()])?;
        std::fs::remove_file(target)?;
        Ok(())
    }

    fn serve(
        &self,
        repository: &Path,
        theirs_first: bool,
        report: &mut Report,
    ) -> Result<(), Fault> {
        let qemu = self.serve_image("gen2.raw", None)?;
        let snapshot = Serving::snapshot(&self.scratch, &self.program, repository)?;
        let copy = |server: &Serving| {
            let args = [server.uri(), "null:".to_owned()];
            run(&self.scratch, "nbdcopy", args).map(|(cost, _)| cost)
        };
        let (ours, theirs) = in_turns(theirs_first, || copy(&snapshot), || copy(&qemu))?;
        let ratio = theirs.seconds / ours.seconds;
        report.add("serve", "speed / qemu-nbd", ratio);
        report.add("serve", "wall s", ours.seconds);
        report.add("serve", "qemu-nbd's wall s", theirs.seconds);
        Ok(())
    }

    fn random(&self, repository: &Path, report: &mut Report) -> Result<(), Fault> {
        let reads = |server: &Serving, load| random_reads(&self.scratch, &server.uri(), load);
        let mut add = |case: &str, depth: u32, ours: Rate, theirs: Option<Rate>| {
            let name = |what: &str| format!("{case}, depth {depth}, {what}");
            if let Some(theirs) = theirs {
                let ratio = ours.per_second / theirs.per_second;
                report.add("random", &name("rate / qemu-nbd"), ratio);
                report.add("random", &name("qemu-nbd's reads/s"), theirs.per_second);
            }
            report.add("random", &name("reads/s"), ours.per_second);
            report.add("random", &name("median ms"), ours.median_ms);
        };
        let qemu = self.serve_image("gen2.raw", None)?;
        for depth in [1, 32] {
            let whole = Load {
                depth,
                offset_mib: 0,
                size_mib: 4096,
                seconds: 2,
            };
            let part = Load {
                offset_mib: 512,
                size_mib: 32,
                ..whole
            };
            forget_cached(repository)?;
            let snapshot = Serving::snapshot(&self.scratch, &self.program, repository)?;
            add("cold", depth, reads(&snapshot, whole)?, None);
            // The same places once before: then what can be in memory is.
            reads(&snapshot, part)?;
            let (ours, theirs) = (reads(&snapshot, part)?, reads(&qemu, part)?);
            add("warm", depth, ours, Some(theirs));
            reads(&snapshot, whole)?;
            let (ours, theirs) = (reads(&snapshot, whole)?, reads(&qemu, whole)?);
            add("whole disk, page cache warm", depth, ours, Some(theirs));
        }
        Ok(())
    }

    fn encrypted(&self, plain_first: bool, report: &mut Report) -> Result<(), Fault> {
        let [plain, sealed] = ["plain", "sealed"].map(|name| self.scratch.join(name));
        self.init(&plain)?;
        if sealed.exists() {
            std::fs::remove_dir_all(&sealed)?;
        }
        let common = ["--json", "--repo", path(&sealed)?];
        let ours = |words: &[&str]| {
            let program = ["NBDBACKUP_PASSWORD=password", path(&self.program)?];
            let words = program.iter().chain(&common).chain(words);
            run(&self.scratch, "env", words.copied()).map(|(cost, _)| cost)
        };
        ours(&["init"])?;
        let server = self.serve_image("gen1.qcow2", Some("bm0"))?;
        let uri = server.uri();
        let (cost, (plain, _)) = in_turns(
            plain_first,
            || ours(&["full", &uri, "--bitmap", "bm0"]),
            || self.backup(&plain, "full", &server),
        )?;
        let ratio = cost.seconds / plain.seconds;
        report.add("encrypted", "wall / plain", ratio);
        let ratio = cost.cpu_seconds / plain.cpu_seconds;
        report.add("encrypted", "CPU / plain", ratio);
        report.add("encrypted", "peak MiB", cost.peak_mib);
        // A command that does next to nothing shows what the password alone costs.
        report.add("encrypted", "opening s", ours(&["snapshots"])?.seconds);
        Ok(())
    }

    fn tls(&self, floor_first: bool, report: &mut Report) -> Result<(), Fault> {
        let repository = self.scratch.join("over-tls");
        self.init(&repository)?;
        let image = self.disks.image("gen1.qcow2");
        let server = Serving::qemu_nbd_tls(&self.scratch, &image)?;
        let ours = || self.backup(&repository, "full", &server);
        let ((cost, _), floor) = in_turns(floor_first, ours, || self.floor(&server))?;
        report.add("tls", "full, wall / nbdcopy", cost.seconds / floor.seconds);
        report.add("tls", "full, wall s", cost.seconds);
        report.add("tls", "nbdcopy's wall s", floor.seconds);
        report.add("tls", "full, CPU s", cost.cpu_seconds);
        std::fs::remove_dir_all(repository)?;
        Ok(())
    }

    /// Copies an export to a raw file, which moves all bytes and does nothing else.
    pub(crate) fn floor(&self, server: &Serving) -> Result<Cost, Fault> {
        let target = self.scratch.join("floor.raw");
        let args = [server.uri(), target.display().to_string()];
        let (cost, _) = run(&self.scratch, "nbdcopy", args)?;
        std::fs::remove_file(target)?;
        Ok(cost)
    }

    /// The bytes that the bitmap of the second generation calls dirty, as they are and rounded out to chunks.
    fn dirty(&self, repository: &Path) -> Result<[f64; 2], Fault> {
        const CHUNK: u64 = 128 << 10;
        let server = self.serve_image("gen2.qcow2", Some("bm0"))?;
        let words = ["info", &server.uri(), "--map", "--bitmap", "bm0"];
        let (_, out) = self.ours(repository, words)?;
        let (mut dirty, mut rounded, mut reached) = (0, 0, 0);
        let info = last_json(&out)?;
        let maps = info["maps"].as_array().into_iter().flatten();
        let bitmap = maps.filter(|map| map["context"] == "qemu:dirty-bitmap:bm0");
        for extent in bitmap.flat_map(|map| map["extents"].as_array().into_iter().flatten()) {
            let number = |field: &str| extent[field].as_u64().ok_or("an extent lacks a number");
            if number("flags")? & 1 == 0 {
                continue;
            }
            let (start, length) = (number("offset_bytes")?, number("length_bytes")?);
            dirty += length;
            let first = (start / CHUNK).max(reached);
            reached = (start + length).div_ceil(CHUNK);
            rounded += (reached - first) * CHUNK;
        }
        Ok([dirty as f64, rounded as f64])
    }

    pub(crate) fn serve_image(&self, name: &str, bitmap: Option<&str>) -> Result<Serving, Fault> {
        Serving::qemu_nbd(&self.scratch, &self.disks.image(name), bitmap)
    }

    /// Makes a repository with the default settings, in place of what was there.
    fn init(&self, repository: &Path) -> Result<(), Fault> {
        if repository.exists() {
            std::fs::remove_dir_all(repository)?;
        }
        self.ours(repository, ["init", "--encryption", "none"])
            .map(drop)
    }

    fn backup(
        &self,
        repository: &Path,
        kind: &str,
        server: &Serving,
    ) -> Result<(Cost, Value), Fault> {
        let uri = server.uri();
        let (cost, out) = self.ours(repository, [kind, &uri, "--bitmap", "bm0"])?;
        let disk = last_json(&out)?["disks"][0].take();
        match disk["kind"] == kind {
            true => Ok((cost, disk)),
            false => Err(format!("a backup was to be {kind}: {disk}").into()),
        }
    }

    fn ours<S: AsRef<std::ffi::OsStr>>(
        &self,
        repository: &Path,
        words: impl IntoIterator<Item = S>,
    ) -> Result<(Cost, Vec<u8>), Fault> {
        let common = ["--json".into(), "--repo".into(), repository.into()];
        let words = words.into_iter().map(|word| word.as_ref().to_owned());
        run(
            &self.scratch,
            &self.program,
            common.into_iter().chain(words),
        )
    }
}

/// Runs two things, the second one first if so told.
fn in_turns<A, B>(
    second_first: bool,
    first: impl FnOnce() -> Result<A, Fault>,
    second: impl FnOnce() -> Result<B, Fault>,
) -> Result<(A, B), Fault> {
    if second_first {
        let second = second()?;
        Ok((first()?, second))
    } else {
        Ok((first()?, second()?))
    }
}

fn number(disk: &Value, field: &str) -> Result<f64, Fault> {
    let value = disk[field].as_f64();
    Ok(value.ok_or(format!("no {field} in {disk}"))?)
}

pub(crate) fn path(path: &Path) -> Result<&str, Fault> {
    Ok(path.to_str().ok_or("a path is not UTF-8")?)
}
