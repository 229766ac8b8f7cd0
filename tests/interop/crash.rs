//! SIGKILL at random moments of a backup: what was stored stays, what was not is not seen, and the next run works.

use std::time::{Duration, Instant};

use crate::support::MIB;
use crate::support::disk::{Random, add_bitmap, reference, scatter};
use crate::support::lab::Lab;
use crate::support::program::{number, text};
use crate::support::server::Server;

const SIZE: u64 = 24 * MIB;

/// How many runs each test kills, in four rounds; the environment asks for more, for a long run by hand.
fn kills() -> u64 {
    std::env::var("TEST_KILLS").map_or(20, |n| n.parse().expect("TEST_KILLS is a number"))
}

/// Kills runs of `args` at random moments of their usual duration, and checks the repository after each.
///
/// `known` are the snapshots so far, each with the file that it must restore to; a run killed after its commit adds
/// one that must restore to `now`. Returns how many runs were killed before their end.
fn kill_some(
    lab: &Lab,
    args: &[&str],
    usual: Duration,
    known: &mut Vec<(String, String)>,
    now: &str,
    seed: u64,
) -> u64 {
    let mut random = Random::new(seed);
    let mut killed = 0;
    let mut within = usual;
    for _ in 0..kills().div_ceil(4) {
        let after = Duration::from_micros(random.below(within.as_micros() as u64 + 1));
        if lab.start(args).kill_after(after) {
            killed += 1;
        } else {
            // Runs take less time than the usual one did, such as on a machine that was busy then.
            within = after;
        }
        for id in lab.snapshots() {
            if !known.iter().any(|(k, _)| *k == id) {
                lab.assert_restores(&id, now);
                known.push((id, now.to_owned()));
            }
        }
        assert_eq!(lab.snapshots().len(), known.len(), "a snapshot was lost");
        let (snapshot, raw) = &known[random.below(known.len() as u64) as usize];
        lab.assert_restores(snapshot, raw);
    }
    killed
}

/// Runs a backup to its end and returns its snapshot and how long it took.
fn timed(lab: &Lab, command: &str, server: &Server) -> (String, Duration) {
    let started = Instant::now();
    let result = lab.backup(command, server.uri(), &["--bitmap", "bm0"]);
    (text(&result, "snapshot"), started.elapsed())
}

#[test]
fn full_killed_anywhere_leaves_a_repository_that_works() {
    let lab = Lab::new();
    let first = lab.qcow2("first.qcow2", SIZE, 1);
    add_bitmap(&first, "bm0");
    let first_raw = lab.file("first.raw");
    reference(&first, "qcow2", &first_raw);
    let (snapshot, usual) = timed(&lab, "full", &lab.serve_qcow2(&first, &["bm0"]));
    let mut known = vec![(snapshot, first_raw)];

    // Each round has contents of its own, so that the killed runs have chunks to store.
    let mut killed = 0;
    for round in 0..4 {
        let image = lab.qcow2(&format!("round{round}.qcow2"), SIZE, 10 + round);
        add_bitmap(&image, "bm0");
        let raw = lab.file(&format!("round{round}.raw"));
        reference(&image, "qcow2", &raw);
        let server = lab.serve_qcow2(&image, &["bm0"]);
        let uri = server.uri();
        let args = [
            "full", uri, "--name", "web1", "--disk", "vda", "--bitmap", "bm0",
        ];
        killed += kill_some(&lab, &args, usual, &mut known, &raw, 20 + round);
        let (snapshot, _) = timed(&lab, "full", &server);
        lab.assert_restores(&snapshot, &raw);
        known.push((snapshot, raw));
    }
    assert!(killed > 0, "no run was killed before its end");
    for (snapshot, raw) in &known {
        lab.assert_restores(snapshot, raw);
    }
}

#[test]
fn incremental_killed_anywhere_loses_nothing_that_is_dirty() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", SIZE, 2);
    add_bitmap(&image, "bm0");
    let raw = lab.file("gen0.raw");
    reference(&image, "qcow2", &raw);
    let (snapshot, _) = timed(&lab, "full", &lab.serve_qcow2(&image, &["bm0"]));
    let mut known = vec![(snapshot, raw)];
    scatter(&image, "qcow2", SIZE, 40, 30);
    let raw = lab.file("gen1.raw");
    reference(&image, "qcow2", &raw);
    let (snapshot, usual) = timed(&lab, "incremental", &lab.serve_qcow2(&image, &["bm0"]));
    known.push((snapshot, raw));

    for round in 2..6 {
        scatter(&image, "qcow2", SIZE, 40, 30 + round);
        let raw = lab.file(&format!("gen{round}.raw"));
        reference(&image, "qcow2", &raw);
        let server = lab.serve_qcow2(&image, &["bm0"]);
        let uri = server.uri();
        let args = [
            "incremental",
            uri,
            "--name",
            "web1",
            "--disk",
            "vda",
            "--bitmap",
            "bm0",
            "--no-fallback",
        ];
        kill_some(&lab, &args, usual, &mut known, &raw, 40 + round);
        let (snapshot, _) = timed(&lab, "incremental", &server);
        lab.assert_restores(&snapshot, &raw);
        known.push((snapshot, raw));
    }
    for (snapshot, raw) in &known {
        lab.assert_restores(snapshot, raw);
    }
}

#[test]
fn full_killed_after_a_checkpoint_goes_on_where_that_was() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", 64 * MIB, 3);
    let folder = |name: &str| -> (usize, u64) {
        let files = lab.repository_files();
        let of = format!("/{name}/");
        let files = files.iter().filter(|f| f.to_string_lossy().contains(&of));
        let lens = files.map(|f| std::fs::metadata(f).map_or(0, |m| m.len()));
        lens.fold((0, 0), |(count, bytes), len| (count + 1, bytes + len))
    };
    let interval = ["--checkpoint-interval", "1MiB"];
    {
        let slow = lab.nbdkit(&["-r", "--filter=delay", "file", &image, "rdelay=200ms"]);
        let args = [
            "full",
            slow.uri(),
            "--name",
            "web1",
            "--disk",
            "vda",
            "--progress-interval",
            "0",
        ];
        let mut run = lab.start(&[&args[..], &interval].concat());
        while folder("ckpt").0 < 3 {
            assert!(run.next_line().is_some(), "the run ended too early");
        }
        run.signal("KILL");
        while run.next_line().is_some() {}
    }
    assert!(lab.snapshots().is_empty());
    lab.run(&["prune"]).result();
    let (kept, kept_bytes) = folder("packs");
    assert!(kept >= 3, "{kept} packs");

    let result = lab.backup("full", &image, &interval);
    lab.assert_restores(&text(&result, "snapshot"), &image);
    let resumed = number(&result, "resumed_bytes");
    assert!(resumed >= 3 * MIB, "{result}");
    // Together they stored what one run stores.
    let fresh = Lab::new();
    let whole = fresh.backup("full", &image, &interval);
    assert_eq!(number(&whole, "resumed_bytes"), 0);
    let stored = number(&whole["disks"][0], "stored_bytes");
    let rest = number(&result["disks"][0], "stored_bytes");
    assert!(
        rest < stored - kept_bytes * 9 / 10,
        "{rest} of {stored} again"
    );
    assert!(folder("packs").1 < stored * 101 / 100, "stored twice");
    let pruned = lab.run(&["prune"]).result();
    assert_eq!(number(&pruned, "packs_removed"), 0, "{pruned}");
    assert_eq!(folder("ckpt").0, 0);
    lab.assert_restores(&text(&result, "snapshot"), &image);
}
