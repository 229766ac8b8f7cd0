//! Running a program to its end: how long it took, and what it cost.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::fs::{Advice, fadvise};
use serde_json::Value;

use super::Fault;

/// What one run of a program cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) peak_mib: f64,
}

/// Runs a program under `time`; what was written before is on the disk by then, so that nobody pays for another.
pub(crate) fn run<S: Into<OsString>>(
    scratch: &Path,
    program: impl Into<OsString>,
    args: impl IntoIterator<Item = S>,
) -> Result<(Cost, Vec<u8>), Fault> {
    let costs = scratch.join("costs");
    let program = program.into();
    let mut command = Command::new("/usr/bin/time");
    command
        .args(["--format", "%U %S %M", "--output"])
        .arg(&costs)
        .arg(&program)
        .args(args.into_iter().map(Into::into))
        .stdin(Stdio::null())
        .stderr(File::create(scratch.join("stderr"))?);
    rustix::fs::sync();
    let clock = Instant::now();
    let output = command.stdout(Stdio::piped()).spawn()?.wait_with_output()?;
    let seconds = clock.elapsed().as_secs_f64();
    if !output.status.success() {
        let said = std::fs::read_to_string(scratch.join("stderr")).unwrap_or_default();
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        return Err(format!("{} failed: {said}{out}", program.display()).into());
    }
    let text = std::fs::read_to_string(&costs)?;
    let numbers: Vec<f64> = text
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let [user, system, peak_kib] = numbers[..] else {
        return Err(format!("time said {text:?}").into());
    };
    let cost = Cost {
        seconds,
        cpu_seconds: user + system,
        peak_mib: peak_kib / 1024.0,
    };
    Ok((cost, output.stdout))
}

/// The last JSON line of an output.
pub(crate) fn last_json(stdout: &[u8]) -> Result<Value, Fault> {
    let text = std::str::from_utf8(stdout)?;
    let line = text.lines().last().ok_or("no output")?;
    Ok(serde_json::from_str(line)?)
}

/// Whether a program is installed.
pub(crate) fn is_installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|folder| folder.join(program).is_file())
}

/// All files below a folder.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>, Fault> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => folders.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    Ok(found)
}

/// The bytes of all files below a folder, in MiB.
pub(crate) fn stored_mib(folder: &Path) -> Result<f64, Fault> {
    let mut bytes = 0;
    for file in files(folder)? {
        bytes += file.metadata()?.len();
    }
    Ok(bytes as f64 / MIB)
}

/// Gives up what the system keeps in memory of a folder's files, which then come from the disk.
pub(crate) fn forget_cached(folder: &Path) -> Result<(), Fault> {
    rustix::fs::sync();
    for file in files(folder)? {
        fadvise(File::open(file)?, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// Bytes in a MiB.
pub(crate) const MIB: f64 = (1u64 << 20) as f64;
