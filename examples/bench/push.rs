//! QEMU's own incremental: `blockdev-backup` of a bitmap, pushed to a qcow2 file by `qemu-storage-daemon`.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use super::Fault;
use super::run::Cost;

/// Pushes what `bm0` of an image calls dirty to a new file; the time is the job's and the target's flush, without the
/// daemon's start.
pub(crate) fn push(image: &Path, target: &Path) -> Result<Cost, Fault> {
    let _ = std::fs::remove_file(target);
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(target)
        .arg("4G")
        .status()?;
    if !made.success() {
        return Err("qemu-img cannot create the target".into());
    }
    rustix::fs::sync();
    let mut daemon = Daemon::start(image, target)?;
    daemon.execute(json!({ "execute": "qmp_capabilities" }))?;
    let clock = Instant::now();
    daemon.execute(json!({
        "execute": "blockdev-backup",
        "arguments": {
            "job-id": "push", "device": "disk", "target": "target",
            "sync": "bitmap", "bitmap": "bm0", "bitmap-mode": "never",
            "auto-dismiss": false,
        },
    }))?;
    daemon.wait_for_job()?;
    daemon.execute(json!({ "execute": "job-dismiss", "arguments": { "id": "push" } }))?;
    // Writes the target's tables and makes it durable, as a backup that says "ok" is.
    daemon.execute(json!({ "execute": "blockdev-del", "arguments": { "node-name": "target" } }))?;
    std::fs::File::open(target)?.sync_all()?;
    Ok(Cost {
        seconds: clock.elapsed().as_secs_f64(),
        ..Cost::default()
    })
}

struct Daemon {
    child: Child,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
}

impl Daemon {
    fn start(image: &Path, target: &Path) -> Result<Self, Fault> {
        let node = |name: &str, path: &Path, read_only: bool| {
            json!({
                "driver": "qcow2", "node-name": name, "read-only": read_only,
                "file": { "driver": "file", "filename": path, "read-only": read_only },
            })
            .to_string()
        };
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node("disk", image, true)])
            .args(["--blockdev", &node("target", target, false)])
            .args(["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let to = child.stdin.take().ok_or("the daemon has no stdin")?;
        let from = child.stdout.take().ok_or("the daemon has no stdout")?;
        Ok(Self {
            child,
            to,
            from: BufReader::new(from).lines(),
        })
    }

    fn next(&mut self) -> Result<Value, Fault> {
        let line = self.from.next().ok_or("the storage daemon ended")??;
        Ok(serde_json::from_str(&line)?)
    }

    /// Sends a command and waits for its answer; events that come meanwhile say nothing that is waited for.
    fn execute(&mut self, command: Value) -> Result<(), Fault> {
        writeln!(self.to, "{command}")?;
        loop {
            let answer = self.next()?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = answer.get("error") {
                return Err(format!("{command}: {error}").into());
            }
        }
    }

    /// Waits until the job has ended, and asks how.
    fn wait_for_job(&mut self) -> Result<(), Fault> {
        loop {
            writeln!(self.to, "{}", json!({ "execute": "query-jobs" }))?;
            let jobs = loop {
                let answer = self.next()?;
                if let Some(jobs) = answer.get("return") {
                    break jobs.clone();
                }
            };
            let job = &jobs[0];
            if job["status"] == "concluded" {
                return match job.get("error") {
                    Some(error) => Err(format!("the push failed: {error}").into()),
                    None => Ok(()),
                };
            }
            // Each change comes behind the answer that did not know it yet.
            while self.next()?["event"] != "JOB_STATUS_CHANGE" {}
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
