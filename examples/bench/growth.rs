//! What grows with the disk, the data and the snapshots, and what must not.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use super::Fault;
use super::report::Report;
use super::run::{Cost, run};
use super::serving::Serving;

/// Doubles one thing at a time.
pub(crate) fn growth(program: &Path, scratch: &Path, report: &mut Report) -> Result<(), Fault> {
    let folder = scratch.join("growth");
    let ours = |words: &[&OsStr]| -> Result<Cost, Fault> {
        let common = [
            OsStr::new("--json"),
            OsStr::new("--repo"),
            folder.as_os_str(),
        ];
        run(scratch, program, common.iter().chain(words)).map(|(cost, _)| cost)
    };
    let init = || -> Result<(), Fault> {
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        ours(&words(&["init", "--encryption", "none"])).map(drop)
    };
    let mut add = |name: String, value: f64| report.add("growth", &name, value);

    let image = scratch.join("growth.raw");
    for mib in [256, 512, 1024] {
        noise(&image, mib)?;
        init()?;
        let cost = ours(&[OsStr::new("full"), image.as_os_str()])?;
        add(format!("{mib} MiB of noise, full s"), cost.seconds);
        add(format!("{mib} MiB of noise, full peak MiB"), cost.peak_mib);
    }
    std::fs::remove_file(&image)?;

    let image = scratch.join("growth.qcow2");
    for tib in ["5T", "10T", "20T"] {
        let path = image.display().to_string();
        run(
            scratch,
            "qemu-img",
            ["create", "-q", "-f", "qcow2", &path, tib],
        )?;
        run(scratch, "qemu-img", ["bitmap", "--add", &path, "bm0"])?;
        init()?;
        let server = Serving::qemu_nbd(scratch, &image, Some("bm0"))?;
        let uri = server.uri();
        ours(&words(&["full", &uri, "--bitmap", "bm0"]))?;
        let cost = ours(&words(&["incremental", &uri, "--bitmap", "bm0"]))?;
        add(format!("{tib} and nothing dirty, s"), cost.seconds);
        add(format!("{tib} and nothing dirty, peak MiB"), cost.peak_mib);
    }

    let server = Serving::qemu_nbd(scratch, &image, Some("bm0"))?;
    let uri = server.uri();
    let mut snapshots = 2;
    for many in [25, 50, 100] {
        while snapshots < many {
            ours(&words(&["incremental", &uri, "--bitmap", "bm0"]))?;
            snapshots += 1;
        }
        let cost = ours(&words(&["incremental", &uri, "--bitmap", "bm0"]))?;
        snapshots += 1;
        add(format!("{many} snapshots, incremental s"), cost.seconds);
        let cost = ours(&words(&["snapshots"]))?;
        add(format!("{many} snapshots, list s"), cost.seconds);
    }
    std::fs::remove_file(&image)?;
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

fn words<'a>(words: &[&'a str]) -> Vec<&'a OsStr> {
    words.iter().map(|&word| OsStr::new(word)).collect()
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
