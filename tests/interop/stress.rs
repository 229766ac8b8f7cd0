//! Writers, readers, forgets, prunes and checks at once, many of them killed: what was stored and not forgotten stays whole.
//!
//! `NBDBACKUP_STRESS_SECONDS` says for how long, `NBDBACKUP_STRESS_SEED` repeats the choices of a run, though not its
//! timing.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::support::disk::{Random, add_bitmap, clear_bitmap, qemu_io};
use crate::support::lab::Lab;
use crate::support::process::{tool, try_tool};
use crate::support::program::{Run, number, text};
use crate::support::server::Server;

/// The disks' size: 48 chunks.
const SIZE: usize = 48 * CHUNK;
const CHUNK: usize = 128 << 10;

/// What is known of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Known {
    sum: blake3::Hash,
    /// Somebody began to forget it, so that it may be gone.
    doomed: bool,
}

struct Stress {
    lab: Lab,
    until: Instant,
    seed: u64,
    known: Mutex<HashMap<String, Known>>,
    /// What was done, by name.
    done: Mutex<HashMap<&'static str, u64>>,
}

impl Stress {
    fn count(&self, what: &'static str) {
        *self.done.lock().unwrap().entry(what).or_default() += 1;
    }

    fn random(&self, who: u64) -> Random {
        Random::new(self.seed ^ (who << 40))
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Runs the program, or kills it on the way and returns nothing.
    fn run(&self, random: &mut Random, args: &[&str]) -> Option<Run> {
        if random.below(3) > 0 {
            return Some(self.lab.run(args));
        }
        let after = Duration::from_micros(random.below(250_000));
        if self.lab.start(args).kill_after(after) {
            self.count("killed");
        }
        None
    }

    /// Some snapshot that nobody began to forget.
    fn some(&self, random: &mut Random) -> Option<(String, Known)> {
        let known = self.known.lock().unwrap();
        let mut whole: Vec<_> = known.iter().filter(|(_, k)| !k.doomed).collect();
        whole.sort_by_key(|(id, _)| *id);
        let (id, known) = *whole.get(random.below(whole.len().max(1) as u64) as usize)?;
        Some((id.clone(), *known))
    }

    fn doom(&self, id: &str, doomed: bool) {
        self.known.lock().unwrap().get_mut(id).unwrap().doomed = doomed;
    }

    fn is_doomed(&self, id: &str) -> bool {
        self.known.lock().unwrap()[id].doomed
    }

    /// Backs a disk up again and again, changed each time; every second writer has a dirty bitmap.
    fn write(&self, who: u64) {
        let mut random = self.random(who);
        let mut writer = Writer::new(self, who);
        while !self.is_over() {
            writer.turn(&mut random);
        }
    }

    /// Forgets snapshots, and has some of them back.
    fn forget(&self, who: u64) {
        let mut random = self.random(who);
        while !self.is_over() {
            // So many are left that each can be restored now and then.
            if self.left() < 6 {
                std::thread::yield_now();
                continue;
            }
            let Some((id, _)) = self.some(&mut random) else {
                continue;
            };
            self.doom(&id, true);
            let Some(run) = self.run(&mut random, &["forget", "--force", &id]) else {
                continue;
            };
            run.result();
            self.count("forgotten");
            if random.below(4) == 0 {
                let undeleted = self.lab.run(&["forget", "--undelete", &id]);
                match undeleted.code {
                    Some(0) => {
                        self.doom(&id, false);
                        self.count("had back");
                    }
                    // A prune was there before.
                    Some(1 | 11) => self.count("not had back"),
                    code => panic!("undelete ended with {code:?}: {}", undeleted.stderr),
                }
            }
        }
    }

    fn prune(&self, who: u64) {
        let mut random = self.random(who);
        while !self.is_over() {
            let most = ["0", "30"][random.below(2) as usize];
            let args = [
                "prune",
                "--force",
                "--undelete-window",
                "0s",
                "--max-unused",
                most,
            ];
            let Some(run) = self.run(&mut random, &args) else {
                continue;
            };
            match run.code {
                Some(0) => {
                    let result = run.result();
                    assert!(result["damaged"].as_array().unwrap().is_empty(), "{result}");
                    self.count("pruned");
                    if number(&result, "removed_bytes") > 0 {
                        self.count("pruned with something to remove");
                    }
                }
                // Other prunes were always faster.
                _ => drop((run.error(11), self.count("refused"))),
            }
        }
    }

    /// Checks the repository, which is whole whatever the others are doing to it.
    fn check(&self, who: u64) {
        let mut random = self.random(who);
        while !self.is_over() {
            let args = match random.below(2) {
                0 => &["check"][..],
                _ => &["check", "--read-data"],
            };
            let Some(run) = self.run(&mut random, args) else {
                continue;
            };
            run.result();
            self.count("checked");
        }
    }

    /// Restores to files, and over NBD.
    fn read(&self, who: u64) {
        let mut random = self.random(who);
        for turn in 0.. {
            if self.is_over() {
                return;
            }
            let Some((id, known)) = self.some(&mut random) else {
                std::thread::yield_now();
                continue;
            };
            let to = self.lab.file(&format!("read{who}"));
            if random.below(2) == 0 {
                let args = ["restore", &id, "--to", &to, "--force"];
                match self.run(&mut random, &args) {
                    Some(run) if run.code == Some(0) => self.compare(&id, &known, &to),
                    Some(run) => assert!(self.is_doomed(&id), "{id}: {}", run.stderr),
                    None => {}
                }
                continue;
            }
            let address = format!("unix:{}", self.lab.file(&format!("serve{who}.{turn}")));
            let repository = self.lab.repository();
            let mut serving = self.lab.start(&["restore", &id, "--serve", &address]);
            let told = serving.next_line().unwrap_or_default();
            if !String::from_utf8_lossy(&told).contains("serving") {
                assert!(self.is_doomed(&id), "{id} in {repository} is not served");
                continue;
            }
            let uri = format!("nbd+unix:///vda?socket={}", &address[5..]);
            let _ = std::fs::remove_file(&to);
            let kill = random.below(4) == 0;
            if kill {
                drop(serving);
                self.count("killed");
                continue;
            }
            // It was announced before it said that it serves: nobody takes the snapshot away.
            let copied = try_tool("nbdcopy", &[&uri, &to]);
            assert!(copied.status.success(), "{id}: {}", copied.stderr);
            self.compare(&id, &known, &to);
            self.count("read over NBD");
        }
    }

    fn compare(&self, id: &str, known: &Known, file: &str) {
        let read = blake3::hash(&std::fs::read(file).unwrap());
        assert_eq!(read, known.sum, "snapshot {id} has other bytes");
        self.count("compared");
    }

    fn left(&self) -> usize {
        let known = self.known.lock().unwrap();
        known.values().filter(|k| !k.doomed).count()
    }

    /// Restores all that nobody began to forget.
    fn compare_all(&self) {
        let listed = ids(&self.lab.run(&["snapshots"]).result());
        let known = self.known.lock().unwrap().clone();
        for (id, known) in known.iter().filter(|(_, k)| !k.doomed) {
            assert!(listed.contains(id), "snapshot {id} is gone");
            let to = self.lab.file("all");
            let args = ["restore", id, "--to", &to, "--force"];
            self.lab.run(&args).result();
            self.compare(id, known, &to);
        }
        // What is listed and was not forgotten for certain restores to what it was, too.
        for id in listed {
            assert!(known.contains_key(&id), "nobody made snapshot {id}");
        }
    }
}

/// A disk and its backups.
struct Writer<'a> {
    stress: &'a Stress,
    name: String,
    disk: Vec<u8>,
    image: String,
    with_bitmap: bool,
    seen: HashSet<String>,
    turns: u64,
}

impl<'a> Writer<'a> {
    fn new(stress: &'a Stress, who: u64) -> Self {
        let name = format!("w{who}");
        let image = stress.lab.file(&format!("{name}.img"));
        let with_bitmap = who % 2 == 1;
        if with_bitmap {
            let size = SIZE.to_string();
            tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, &size]);
            add_bitmap(&image, "bm0");
        }
        Self {
            stress,
            name,
            disk: vec![0; SIZE],
            image,
            with_bitmap,
            seen: HashSet::new(),
            turns: 0,
        }
    }

    fn turn(&mut self, random: &mut Random) {
        self.turns += 1;
        let writes: Vec<String> = (0..=random.below(4))
            .map(|_| change(&mut self.disk, random))
            .collect();
        let ran = match self.with_bitmap {
            true => {
                qemu_io(&self.image, "qcow2", &writes);
                let socket = format!("{}.{}", self.name, self.turns);
                let socket = self.stress.lab.file(&socket);
                let args = ["-f", "qcow2", "-B", "bm0", &self.image];
                let server = Server::qemu_nbd(&socket, "vda", &args);
                let command = if self.seen.is_empty() {
                    "full"
                } else {
                    "incremental"
                };
                self.back_up(random, &[command, server.uri(), "--bitmap", "bm0"])
            }
            false => {
                std::fs::write(&self.image, &self.disk).unwrap();
                self.back_up(random, &["full", &self.image, "--format", "raw"])
            }
        };
        let stress = self.stress;
        let new = match ran {
            Some(run) if run.code == Some(0) => {
                let result = run.result();
                let kind = text(&result["disks"][0], "kind");
                stress.count(if kind == "full" {
                    "full"
                } else {
                    "incremental"
                });
                if self.with_bitmap && random.below(2) == 0 {
                    clear_bitmap(&self.image, "bm0");
                }
                vec![text(&result, "snapshot")]
            }
            // Its parent went, or locks were not to be had.
            Some(run) => {
                run.error(11);
                stress.count("refused");
                return;
            }
            None => {
                let listed = stress.lab.run(&["snapshots", "--name", &self.name]);
                let mut listed = ids(&listed.result());
                listed.retain(|id| !self.seen.contains(id));
                listed
            }
        };
        for id in new {
            let known = Known {
                sum: blake3::hash(&self.disk),
                doomed: false,
            };
            self.seen.insert(id.clone());
            stress.known.lock().unwrap().insert(id, known);
        }
    }

    fn back_up(&self, random: &mut Random, args: &[&str]) -> Option<Run> {
        let more = ["--name", &self.name, "--disk", "vda"];
        self.stress.run(random, &[args, &more].concat())
    }
}

/// Changes a disk, and says how qemu-io does the same; the same few contents come again and again.
fn change(disk: &mut [u8], random: &mut Random) -> String {
    let chunk = random.below((SIZE / CHUNK) as u64) as usize * CHUNK;
    let byte = random.below(40) as u8;
    let (at, len) = match random.below(3) {
        0 => (chunk + 4096, 512),
        1 => (chunk, CHUNK),
        _ => (chunk, (4 * CHUNK).min(SIZE - chunk)),
    };
    disk[at..at + len].fill(byte);
    format!("write -q -P {byte} {at} {len}")
}

fn ids(listed: &Value) -> Vec<String> {
    let all = listed["snapshots"].as_array().unwrap().iter();
    assert_eq!(
        listed["unreadable"].as_array().map(Vec::len),
        Some(0),
        "{listed}"
    );
    all.map(|s| text(s, "id")).collect()
}

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is no number")),
    )
}

#[test]
fn nothing_that_was_stored_and_not_forgotten_is_lost() {
    let usual = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    let seed = from_environment("NBDBACKUP_STRESS_SEED").unwrap_or(usual);
    let seconds = from_environment("NBDBACKUP_STRESS_SECONDS").unwrap_or(8);
    println!("NBDBACKUP_STRESS_SEED={seed} NBDBACKUP_STRESS_SECONDS={seconds}");
    let stress = Stress {
        lab: Lab::new(),
        until: Instant::now() + Duration::from_secs(seconds),
        seed,
        known: Mutex::default(),
        done: Mutex::default(),
    };
    let all = &stress;
    std::thread::scope(|scope| {
        for who in 0..4 {
            scope.spawn(move || all.write(who));
        }
        scope.spawn(move || all.forget(10));
        scope.spawn(move || all.prune(20));
        scope.spawn(move || all.prune(21));
        scope.spawn(move || all.read(30));
        scope.spawn(move || all.read(31));
        scope.spawn(move || all.check(40));
    });
    stress.compare_all();
    let mut last = Value::Null;
    for _ in 0..2 {
        let prune = [
            "prune",
            "--force",
            "--undelete-window",
            "0s",
            "--max-unused",
            "0",
        ];
        last = stress.lab.run(&prune).result();
        assert!(last["waiting_for"].as_array().unwrap().is_empty(), "{last}");
    }
    assert_eq!(number(&last, "unused_bytes"), 0, "{last}");
    stress.compare_all();
    let mut done: Vec<_> = stress.done.lock().unwrap().clone().into_iter().collect();
    done.sort_unstable();
    println!("{done:?}");
}
