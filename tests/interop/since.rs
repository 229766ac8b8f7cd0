//! What changed since an earlier snapshot, as libnbd, QEMU and our own client ask a served snapshot.

use std::fs::OpenOptions;

use serde_json::Value;

use crate::support::disk::{assert_same, scatter};
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::text;
use crate::support::server::{dirty, extents, nbdinfo};
use crate::support::{KIB, MIB};

const CHUNK: usize = 128 << 10;
const SIZE: u64 = 24 * MIB + 20 * KIB;

/// A disk's generations, each stored as a snapshot; the third is larger, the last one smaller than what was before.
struct Generations {
    lab: Lab,
    images: Vec<String>,
    snapshots: Vec<String>,
}

fn generations(seed: u64) -> Generations {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, seed);
    let (mut images, mut snapshots) = (Vec::new(), Vec::new());
    for (at, size) in [SIZE, SIZE, SIZE + 9 * MIB + 512, SIZE - 3 * MIB]
        .into_iter()
        .enumerate()
    {
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        file.set_len(size).unwrap();
        if at > 0 {
            scatter(&image, "raw", size, 12, seed + at as u64);
        }
        let kept = lab.file(&format!("{at}.raw"));
        std::fs::copy(&image, &kept).unwrap();
        let full = lab.backup("full", lab.nbdkit(&["-r", "file", &kept]).uri(), &[]);
        snapshots.push(text(&full, "snapshot"));
        images.push(kept);
    }
    Generations {
        lab,
        images,
        snapshots,
    }
}

/// The dirty bytes of the later image, a flag for each chunk; what it grew by is dirty.
fn differing(before: &str, after: &str) -> Vec<(u64, u64)> {
    let (before, after) = (
        std::fs::read(before).unwrap(),
        std::fs::read(after).unwrap(),
    );
    let common = before.len().min(after.len());
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut push = |start: usize, end: usize| match found.last_mut() {
        Some(last) if last.1 == start as u64 => last.1 = end as u64,
        _ => found.push((start as u64, end as u64)),
    };
    for start in (0..common).step_by(CHUNK) {
        // The last chunk of a disk is another one than a whole one of the same beginning, unless both are zeros.
        let chunk = |bytes: &[u8]| bytes[start..bytes.len().min(start + CHUNK)].to_vec();
        let (a, b) = (chunk(&before), chunk(&after));
        let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        if a != b && !(zeros(&a) && zeros(&b)) {
            push(start, common.min(start + CHUNK));
        }
    }
    if common < after.len() {
        push(common, after.len());
    }
    found
}

#[test]
fn map_of_each_earlier_snapshot_shows_the_chunks_that_differ() {
    let Generations {
        lab,
        images,
        snapshots,
    } = generations(1);
    for (at, later) in snapshots.iter().enumerate() {
        let serving = lab.serve(later);
        let uri = serving.uri("vda");
        let mut contexts = vec!["base:allocation".to_owned()];
        let earlier = snapshots[..at].iter().rev();
        contexts.extend(earlier.map(|id| format!("qemu:dirty-bitmap:since-{id}")));
        assert_eq!(nbdinfo(&uri)["contexts"], Value::from(contexts));
        for (before, id) in snapshots[..at].iter().enumerate() {
            let found = dirty(&uri, &format!("since-{id}"));
            let found: Vec<_> = found
                .iter()
                .map(|e| (e.offset, e.offset + e.length))
                .collect();
            assert_eq!(
                found,
                differing(&images[before], &images[at]),
                "{before} {at}"
            );
            assert!(!found.is_empty());
        }
    }
}

#[test]
fn map_covers_the_disk_and_an_unknown_snapshot_has_none() {
    let Generations { lab, snapshots, .. } = generations(2);
    let serving = lab.serve(&snapshots[2]);
    let uri = serving.uri("vda");
    let context = format!("qemu:dirty-bitmap:since-{}", snapshots[0]);
    let map = extents(&uri, &context);
    let mut at = 0;
    for extent in &map {
        assert_eq!(extent.offset, at, "{map:?}");
        assert!(extent.flags <= 1);
        at += extent.length;
    }
    assert_eq!(at, SIZE + 9 * MIB + 512);
    // A later snapshot, or this one, is none that it could be compared with.
    for id in &snapshots[2..] {
        let none = format!("--map=qemu:dirty-bitmap:since-{id}");
        let run = crate::support::process::try_tool("nbdinfo", &[&none, &uri]);
        assert!(!run.status.success());
    }
}

#[test]
fn qemu_sees_what_changed_as_a_dirty_bitmap() {
    let Generations {
        lab,
        images,
        snapshots,
    } = generations(3);
    let serving = lab.serve(&snapshots[1]);
    let uri = serving.uri("vda");
    let (_, socket) = uri.split_once("socket=").unwrap();
    let node = format!(
        "driver=nbd,export=vda,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:since-{}",
        snapshots[0]
    );
    let map = tool("qemu-img", &["map", "--output=json", "--image-opts", &node]);
    let map: Vec<Value> = serde_json::from_slice(&map).unwrap();
    // QEMU shows a dirty range as one without data.
    let dirty = map.iter().filter(|e| e["data"] == false).map(|e| {
        let start = e["start"].as_u64().unwrap();
        (start, start + e["length"].as_u64().unwrap())
    });
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in dirty {
        match merged.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => merged.push((start, end)),
        }
    }
    assert_eq!(merged, differing(&images[0], &images[1]));
}

#[test]
fn another_repository_takes_an_increment_of_a_served_snapshot() {
    let Generations {
        lab,
        images,
        snapshots,
    } = generations(4);
    let other = Lab::new();
    let first = {
        let serving = lab.serve(&snapshots[0]);
        text(&other.backup("full", &serving.uri("vda"), &[]), "snapshot")
    };
    let serving = lab.serve(&snapshots[2]);
    let since = format!("since-{}", snapshots[0]);
    let result = other.backup(
        "incremental",
        &serving.uri("vda"),
        &["--bitmap", &since, "--parent", &first, "--no-fallback"],
    );
    assert_eq!(result["disks"][0]["kind"], "incremental");
    let want: u64 = differing(&images[0], &images[2])
        .iter()
        .map(|(start, end)| end - start)
        .sum();
    assert_eq!(result["disks"][0]["dirty_bytes"], want);
    let restored = other.restore(&text(&result, "snapshot"));
    assert_same(&restored, &images[2]);
}
