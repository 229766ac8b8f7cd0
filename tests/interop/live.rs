//! A disk that is written to while it is backed up, in a running qemu-storage-daemon, by the commands libvirt uses.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::MIB;
use crate::support::disk::{Random, assert_same};
use crate::support::lab::Lab;
use crate::support::process::{Process, tool};
use crate::support::program::{number, text};
use crate::support::server::uri;

const SIZE: u64 = 32 * MIB;

/// The name under which each run's copy of the bitmap is exported, as libvirt does it.
const EXPORTED: &str = "backup-vda";

/// A running storage daemon with one writable disk, as a guest has it, and an NBD server.
struct Daemon {
    process: Process,
    socket: String,
    events: Vec<String>,
}

impl Daemon {
    fn start(lab: &Lab, image: &str) -> Self {
        let socket = lab.socket();
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"])
            .args([
                "--blockdev",
                &format!("driver=file,node-name=file0,filename={image}"),
            ])
            .args([
                "--blockdev",
                "driver=qcow2,node-name=disk0,file=file0,discard=unmap",
            ])
            .args([
                "--nbd-server",
                &format!("addr.type=unix,addr.path={socket},max-connections=0"),
            ])
            .args([
                "--export",
                "type=nbd,id=guest,node-name=disk0,name=guest,writable=on",
            ])
            .stdin(Stdio::piped());
        let mut daemon = Self {
            process: Process::start(command),
            socket,
            events: Vec::new(),
        };
        assert!(daemon.next()["QMP"].is_object());
        daemon.run("qmp_capabilities", json!({}));
        daemon
    }

    /// The next message; an event's name is kept.
    fn next(&mut self) -> Value {
        let line = self.process.next_line().expect("the storage daemon ended");
        let message: Value = serde_json::from_slice(&line).unwrap();
        self.events
            .extend(message["event"].as_str().map(str::to_owned));
        message
    }

    /// Waits for an event, which may have come while a command ran, and forgets those before it.
    fn wait_for(&mut self, event: &str) {
        while !self.events.iter().any(|e| e == event) {
            self.next();
        }
        self.events.clear();
    }

    /// Runs a command to its return.
    fn run(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.process.write(&(line + "\n"));
        loop {
            let answer = self.next();
            assert!(answer["error"].is_null(), "{command}: {answer}");
            if !answer["return"].is_null() {
                return answer["return"].clone();
            }
        }
    }

    /// Freezes the disk's contents in a fleecing node, exports it as `vda`, and starts bitmap `new` at that moment.
    fn begin(&mut self, lab: &Lab, old: Option<&str>, new: &str) {
        let scratch = lab.file("scratch.qcow2");
        tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", &scratch, &SIZE.to_string()],
        );
        self.run(
            "blockdev-add",
            json!({ "driver": "qcow2", "node-name": "scratch", "backing": "disk0",
                    "file": { "driver": "file", "filename": scratch } }),
        );
        let mut actions = vec![
            json!({ "type": "block-dirty-bitmap-add", "data": { "node": "disk0", "name": new, "persistent": true } }),
        ];
        if let Some(old) = old {
            actions.push(json!({ "type": "block-dirty-bitmap-add",
                "data": { "node": "scratch", "name": EXPORTED, "disabled": true } }));
            actions.push(json!({ "type": "block-dirty-bitmap-merge",
                "data": { "node": "scratch", "target": EXPORTED, "bitmaps": [{ "node": "disk0", "name": old }] } }));
        }
        actions.push(json!({ "type": "blockdev-backup",
            "data": { "job-id": "fleece", "device": "disk0", "target": "scratch", "sync": "none" } }));
        self.run("transaction", json!({ "actions": actions }));
        let bitmaps = if old.is_some() {
            json!([EXPORTED])
        } else {
            json!([])
        };
        self.run(
            "block-export-add",
            json!({ "type": "nbd", "id": "vda", "node-name": "scratch", "name": "vda", "bitmaps": bitmaps }),
        );
    }

    /// Takes the fleecing node away; the old bitmap is given up only by a run that succeeded.
    fn end(&mut self, lab: &Lab, given_up: Option<&str>) {
        self.run("block-export-del", json!({ "id": "vda", "mode": "hard" }));
        self.wait_for("BLOCK_EXPORT_DELETED");
        self.run(
            "block-job-cancel",
            json!({ "device": "fleece", "force": true }),
        );
        self.wait_for("BLOCK_JOB_CANCELLED");
        self.run("blockdev-del", json!({ "node-name": "scratch" }));
        std::fs::remove_file(lab.file("scratch.qcow2")).unwrap();
        if let Some(name) = given_up {
            self.run(
                "block-dirty-bitmap-remove",
                json!({ "node": "disk0", "name": name }),
            );
        }
    }

    /// Writes as the guest does, in the background.
    fn guest(&self, count: u64, seed: u64) -> Process {
        let mut random = Random::new(seed);
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-d", "unmap"]);
        for _ in 0..count {
            let len = 4096 * (1 + random.below(16));
            let offset = random.below((SIZE - len) / 4096) * 4096;
            match random.below(8) {
                0 => command.args(["-c", &format!("discard -q {offset} {len}")]),
                1 => command.args(["-c", &format!("write -q -z {offset} {len}")]),
                _ => command.args([
                    "-c",
                    &format!("write -q -P {} {offset} {len}", 1 + random.below(255)),
                ]),
            };
        }
        command.arg(uri(&self.socket, "guest")).stdin(Stdio::null());
        Process::start(command)
    }

    /// The frozen contents, as libnbd reads them before the guest goes on.
    fn frozen(&self, lab: &Lab, name: &str) -> String {
        let raw = lab.file(name);
        tool("nbdcopy", &[&uri(&self.socket, "vda"), &raw]);
        raw
    }
}

fn wait(guest: Process) {
    let guest = guest.finish();
    assert!(
        guest.status.success(),
        "{}{}",
        String::from_utf8_lossy(&guest.stdout),
        guest.stderr
    );
}

#[test]
fn disk_under_a_writing_guest_is_backed_up_as_of_one_moment_each_time() {
    let lab = Lab::new();
    let image = lab.qcow2("disk.qcow2", SIZE, 1);
    let mut daemon = Daemon::start(&lab, &image);
    let mut snapshots: Vec<(String, String)> = Vec::new();
    for generation in 0..4_u64 {
        let old = generation.checked_sub(1).map(|g| format!("chk{g}"));
        let (command, kind) = if generation == 0 {
            ("full", "full")
        } else {
            ("incremental", "incremental")
        };
        daemon.begin(&lab, old.as_deref(), &format!("chk{generation}"));
        let raw = daemon.frozen(&lab, &format!("gen{generation}.raw"));
        wait(daemon.guest(20, 10 * generation));
        let guest = daemon.guest(100, 10 * generation + 1);
        let result = lab.backup(
            command,
            &uri(&daemon.socket, "vda"),
            &["--bitmap", EXPORTED],
        );
        wait(guest);
        daemon.end(&lab, old.as_deref());
        let disk = &result["disks"][0];
        assert_eq!(disk["kind"], kind, "{disk}");
        if let Some((parent, _)) = snapshots.last() {
            assert_eq!(text(disk, "parent"), *parent);
            assert!((1..SIZE).contains(&number(disk, "read_bytes")), "{disk}");
        }
        snapshots.push((text(&result, "snapshot"), raw));
    }
    for (snapshot, raw) in &snapshots {
        assert_same(&lab.restore(snapshot), raw);
    }
}

#[test]
fn run_that_fails_keeps_the_old_bitmap_and_the_next_one_has_all_writes() {
    let lab = Lab::new();
    let image = lab.qcow2("disk.qcow2", SIZE, 2);
    let mut daemon = Daemon::start(&lab, &image);
    daemon.begin(&lab, None, "chk0");
    let full = lab.backup("full", &uri(&daemon.socket, "vda"), &["--bitmap", EXPORTED]);
    daemon.end(&lab, None);
    wait(daemon.guest(20, 3));

    // A run ends without a result: the new bitmap is dropped, the old one goes on recording.
    daemon.begin(&lab, Some("chk0"), "chk1");
    lab.try_backup(
        "incremental",
        &uri(&daemon.socket, "gone"),
        &["--bitmap", EXPORTED],
    )
    .error(20);
    daemon.end(&lab, Some("chk1"));
    wait(daemon.guest(20, 4));

    daemon.begin(&lab, Some("chk0"), "chk2");
    let raw = daemon.frozen(&lab, "reference.raw");
    let result = lab.backup(
        "incremental",
        &uri(&daemon.socket, "vda"),
        &["--bitmap", EXPORTED],
    );
    daemon.end(&lab, Some("chk0"));
    assert_eq!(result["disks"][0]["kind"], "incremental");
    assert_eq!(result["disks"][0]["parent"], full["snapshot"]);
    assert_same(&lab.restore(&text(&result, "snapshot")), &raw);
}
