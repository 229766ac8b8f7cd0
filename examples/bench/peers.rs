//! Other tools on the same disks, where they are installed.

use std::path::Path;

use super::Fault;
use super::report::Report;
use super::rows::{Bench, path};
use super::run::{Cost, MIB, is_installed, run, stored_mib};
use super::serving::Serving;

impl Bench {
    pub(crate) fn qemu_img(&self, report: &mut Report) -> Result<(), Fault> {
        let server = self.serve_image("gen1.qcow2", None)?;
        let floor = self.floor(&server)?;
        let target = self.scratch.join("converted.qcow2");
        for (name, options) in [("plain", &[][..]), ("zstd", &["-c", "-o", ZSTD][..])] {
            let args = ["convert", "-f", "raw", "-O", "qcow2"]
                .iter()
                .chain(options)
                .map(|&word| word.to_owned())
                .chain([server.uri(), target.display().to_string()]);
            let (cost, _) = run(&self.scratch, "qemu-img", args)?;
            let stored = target.metadata()?.len() as f64 / MIB;
            add_peer(report, "qemu-img", name, cost, floor, stored);
            std::fs::remove_file(&target)?;
        }
        Ok(())
    }

    pub(crate) fn restic(&self, report: &mut Report) -> Result<(), Fault> {
        if !is_installed("restic") {
            eprintln!("  restic is not installed: skipped");
            return Ok(());
        }
        let repository = self.scratch.join("restic");
        let common = ["-r", path(&repository)?, "-q", "--no-cache"].map(str::to_owned);
        let restic = |words: &[&str]| {
            let words = words.iter().map(|&word| word.to_owned());
            // restic wants a password, whatever it is.
            let env = ["RESTIC_PASSWORD=password", "restic"].map(str::to_owned);
            let args = env.into_iter().chain(common.clone()).chain(words);
            run(&self.scratch, "env", args).map(|(cost, _)| cost)
        };
        restic(&["init"])?;
        let server = self.serve_image("gen1.qcow2", None)?;
        self.against_floor(report, "restic", &repository, &server, |image| {
            restic(&["backup", path(&self.disks.image(image))?])
        })
    }

    pub(crate) fn rustic(&self, report: &mut Report) -> Result<(), Fault> {
        if !is_installed("rustic") {
            eprintln!("  rustic is not installed: skipped");
            return Ok(());
        }
        let repository = self.scratch.join("rustic");
        let place = format!("RUSTIC_REPOSITORY={}", path(&repository)?);
        // rustic wants a password, whatever it is.
        let env = [&place, "RUSTIC_PASSWORD=password", "RUSTIC_NO_CACHE=true"];
        let rustic = |words: &[&str]| {
            let args = env.iter().chain(&["rustic"]).chain(words);
            run(&self.scratch, "env", args.copied()).map(|(cost, _)| cost)
        };
        rustic(&["init"])?;
        let server = self.serve_image("gen1.qcow2", None)?;
        self.against_floor(report, "rustic", &repository, &server, |image| {
            rustic(&["backup", path(&self.disks.image(image))?])
        })
    }

    pub(crate) fn borg(&self, report: &mut Report) -> Result<(), Fault> {
        if !is_installed("borg") {
            eprintln!("  borg is not installed: skipped");
            return Ok(());
        }
        let repository = self.scratch.join("borg");
        let borg = |words: &[&str]| run(&self.scratch, "borg", words).map(|(cost, _)| cost);
        borg(&["init", "-e", "none", path(&repository)?])?;
        let server = self.serve_image("gen1.qcow2", None)?;
        self.against_floor(report, "borg", &repository, &server, |image| {
            let archive = format!("{}::{image}", path(&repository)?);
            let image = self.disks.image(image);
            borg(&["create", "-C", "zstd,1", &archive, path(&image)?])
        })
    }

    /// A peer that reads image files: both generations, the second deduplicated against the first.
    fn against_floor(
        &self,
        report: &mut Report,
        row: &'static str,
        repository: &Path,
        server: &Serving,
        backup: impl Fn(&str) -> Result<Cost, Fault>,
    ) -> Result<(), Fault> {
        let floor = self.floor(server)?;
        let mut before = stored_mib(repository)?;
        for (name, image) in [("full", "gen1.raw"), ("second", "gen2.raw")] {
            let cost = backup(image)?;
            let stored = stored_mib(repository)?;
            add_peer(report, row, name, cost, floor, stored - before);
            before = stored;
        }
        std::fs::remove_dir_all(repository)?;
        Ok(())
    }
}

fn add_peer(
    report: &mut Report,
    row: &'static str,
    name: &str,
    cost: Cost,
    floor: Cost,
    stored_mib: f64,
) {
    let ratio = cost.seconds / floor.seconds;
    report.add(row, &format!("{name}, wall / floor"), ratio);
    report.add(row, &format!("{name}, CPU s"), cost.cpu_seconds);
    report.add(row, &format!("{name}, peak MiB"), cost.peak_mib);
    report.add(row, &format!("{name}, stored MiB"), stored_mib);
}

const ZSTD: &str = "compression_type=zstd";
