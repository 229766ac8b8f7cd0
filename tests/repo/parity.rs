//! Parity: what of a pack and of its parity may be lost, and what then is mended, reported, or left as it is.

use std::sync::Arc;

use nbdbackup::repo::{
    CheckOptions, Checked, InitOptions, MemoryStorage, Parity, PruneOptions, Repository,
    SnapshotId, Storage, scrub,
};

use crate::support::*;

/// A repository with one disk, all of whose chunks are in one pack.
struct Scene {
    storage: MemoryStorage,
    id: SnapshotId,
    disk: Vec<u8>,
}

impl Scene {
    fn new((storage, repo): (MemoryStorage, Arc<Repository>), chunks: usize) -> Self {
        let disk = crate::prune::noise(5, chunks);
        let id = backup(&repo, &disk).unwrap().id;
        Self { storage, id, disk }
    }

    fn pack(&self) -> String {
        self.storage.list("packs/").unwrap().remove(0).name
    }
}

/// The parity of a pack.
fn parity_of(pack: &str) -> String {
    format!("parity/{}", pack.split_once('/').unwrap().1)
}

/// The shards of a pack and of its parity: for each its file, where it starts and how many bytes it has.
fn shards(storage: &MemoryStorage, pack: &str) -> Vec<(String, usize, usize)> {
    let parity = parity_of(pack);
    let head = storage.read(&parity, u64::MAX).unwrap();
    let pack_len = storage.len(pack).unwrap() as usize;
    let (n, m) = (usize::from(head[49]), usize::from(head[50]));
    let len = u32::from_le_bytes(head[52..56].try_into().unwrap()) as usize;
    let data = (0..n).map(|i| (pack.to_owned(), i * len, len.min(pack_len - i * len)));
    let at = |i| head.len() - (m - i) * len;
    data.chain((0..m).map(|i| (parity.clone(), at(i), len)))
        .collect()
}

/// Changes a byte in each of these shards.
fn lose(storage: &MemoryStorage, pack: &str, which: &[usize]) {
    let all = shards(storage, pack);
    for shard in which {
        let (file, at, len) = &all[*shard];
        let mut bytes = storage.read(file, u64::MAX).unwrap();
        bytes[at + (shard * 7919) % len] ^= 0x40;
        storage.damage(file, bytes);
    }
}

fn check(repo: &Repository, read_data: bool, repair: bool) -> Checked {
    let options = CheckOptions {
        read_data_percent: read_data.then_some(100.0),
        repair,
        ..CheckOptions::default()
    };
    repo.check(&options, &|_, _| {}).unwrap()
}

/// All files but those that checks write.
fn files(storage: &MemoryStorage) -> Vec<(String, Vec<u8>)> {
    let names = storage.list("").unwrap().into_iter().map(|f| f.name);
    names
        .filter(|name| !name.starts_with("bad/") && !name.starts_with("verify/"))
        .map(|name| {
            let bytes = storage.read(&name, u64::MAX).unwrap();
            (name, bytes)
        })
        .collect()
}

/// Checks that the packs of all parity are there, and that each pack has parity, or has it once it is made.
pub(crate) fn assert_no_orphans(storage: &MemoryStorage, what: &str) {
    for file in storage.list("parity/").unwrap() {
        let name = file.name.strip_prefix("parity/").unwrap();
        let packs = ["packs", "meta"].map(|folder| storage.len(&format!("{folder}/{name}")));
        assert!(packs.iter().any(Result::is_ok), "{what}: {name} is left");
    }
    open(storage).mend_parity(false).unwrap();
    let count = |folder| storage.list(folder).unwrap().len();
    let packs = count("packs/") + count("meta/");
    assert_eq!(count("parity/"), packs, "{what}");
}

#[test]
fn up_to_four_lost_shards_are_mended_and_five_are_reported() {
    for repo in [new_repo(), new_encrypted_repo()] {
        let scene = Scene::new(repo, 3);
        let pack = scene.pack();
        let n = shards(&scene.storage, &pack).len() - 4;
        assert!((60..=64).contains(&n), "{n}");
        let whole = files(&scene.storage);
        let lost: [&[usize]; 14] = [
            &[0],
            &[n - 1],
            &[n],
            &[n + 3],
            &[0, 1, 2, 3],
            &[n - 4, n - 3, n - 2, n - 1],
            &[0, 21, 42, 59],
            &[n, n + 1, n + 2, n + 3],
            &[5, n],
            &[5, 6, n, n + 1],
            &[0, n - 2, n - 1, n + 2],
            &[9, n, n + 1, n + 3],
            &[17, 18, n + 1],
            &[n / 2],
        ];
        for lost in lost {
            let storage = copy(&scene.storage);
            lose(&storage, &pack, lost);
            let repo = open(&storage);
            check(&repo, true, true);
            let done = repo.repair(None).unwrap();
            assert!(done.failed.is_empty(), "{lost:?}: {done:?}");
            let of_pack = lost.iter().any(|shard| *shard < n);
            assert_eq!(done.mended.len(), usize::from(of_pack), "{lost:?}");
            let made = repo.mend_parity(false).unwrap();
            let of_parity = lost.iter().any(|shard| *shard >= n);
            assert_eq!(made.len(), usize::from(of_parity), "{lost:?}");
            // All is as it was, to the byte.
            assert!(files(&storage) == whole, "{lost:?}");
            assert!(storage.list("bad/").unwrap().is_empty(), "{lost:?}");
            assert!(check(&open(&storage), true, false).is_whole());
            assert!(restore(&open(&storage), &scene.id).unwrap() == scene.disk);
        }
        let lost: [&[usize]; 5] = [
            &[0, 1, 2, 3, 4],
            &[7, 20, 33, 46, 59],
            &[0, n, n + 1, n + 2, n + 3],
            &[n - 2, n - 1, n, n + 1, n + 2],
            &[1, 2, 3, 4, n],
        ];
        for lost in lost {
            let storage = copy(&scene.storage);
            lose(&storage, &pack, lost);
            let damaged = files(&storage);
            let repo = open(&storage);
            check(&repo, true, true);
            let done = repo.repair(None).unwrap();
            assert!(done.mended.is_empty() && done.whole.is_empty(), "{lost:?}");
            let (file, error) = &done.failed[0];
            assert_eq!(*file, pack);
            let says = format!("5 of {} parts of it and of its parity are damaged", n + 4);
            assert!(error.to_string().contains(&says), "{error}");
            // Of a pack that is not whole no parity is made anew.
            assert!(repo.mend_parity(false).unwrap().is_empty());
            assert!(files(&storage) == damaged, "{lost:?}");
            assert!(!check(&repo, true, false).is_whole());
        }
    }
}

#[test]
fn number_of_parity_shards_is_as_it_was_chosen() {
    for parity in [0, 1, 16] {
        let storage = MemoryStorage::new();
        let options = InitOptions {
            parity: Parity::new(parity).unwrap(),
            ..options()
        };
        let repo = Repository::init(Arc::new(storage.clone()), &options).unwrap();
        let scene = Scene::new((storage, repo), 3);
        assert_eq!(open(&scene.storage).parity().shards(), parity);
        let packs = scene.storage.list("packs/").unwrap().len();
        let packs = packs + scene.storage.list("meta/").unwrap().len();
        let files = scene.storage.list("parity/").unwrap().len();
        assert_eq!(files, if parity == 0 { 0 } else { packs });
        assert!(check(&open(&scene.storage), true, false).is_whole());
        if parity == 0 {
            assert!(open(&scene.storage).mend_parity(false).unwrap().is_empty());
            continue;
        }
        let lost: Vec<usize> = (0..usize::from(parity)).map(|i| i * 4).collect();
        lose(&scene.storage, &scene.pack(), &lost);
        check(&open(&scene.storage), true, true);
        let done = open(&scene.storage).repair(None).unwrap();
        assert_eq!(done.mended, [scene.pack()]);
    }
    assert_eq!(Parity::new(17), None);
}

/// Loses shards, and marks what a check finds.
fn damaged(scene: &Scene, lost: &[usize]) -> MemoryStorage {
    let storage = copy(&scene.storage);
    lose(&storage, &scene.pack(), lost);
    assert!(check(&open(&storage), true, true).marked > 0);
    storage
}

/// Repairs, and checks that a pack is whole or left as it was, that only a whole one counts, and nothing is made up.
fn repair_or_leave(scene: &Scene, storage: &MemoryStorage, what: &str) -> bool {
    let pack = scene.pack();
    let before = storage.read(&pack, u64::MAX).ok();
    let repo = open(storage);
    let done = repo.repair(None).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mended = done.mended == [pack.clone()];
    let after = storage.read(&pack, u64::MAX).ok();
    match mended {
        true => {
            let whole = scene.storage.read(&pack, u64::MAX).ok();
            assert!(after == whole, "{what}: mended into something else");
            repo.mend_parity(false).unwrap();
            assert!(files(storage) == files(&scene.storage), "{what}");
        }
        false => {
            assert!(after == before, "{what}: changed and not mended");
            assert_eq!(done.failed.len(), 1, "{what}: {done:?}");
            assert!(!storage.list("bad/").unwrap().is_empty(), "{what}");
        }
    }
    if let Ok(read) = restore(&open(storage), &scene.id) {
        assert!(read == scene.disk, "{what}: wrong data");
        return mended;
    }
    assert!(!mended, "{what}");
    false
}

#[test]
fn flip_of_any_byte_of_a_parity_file_is_an_error_or_made_up_for() {
    for repo in [new_repo(), new_encrypted_repo()] {
        let scene = Scene::new(repo, 1);
        let storage = damaged(&scene, &[1]);
        let parity = parity_of(&scene.pack());
        let good = storage.read(&parity, u64::MAX).unwrap();
        let shards = shards(&storage, &scene.pack());
        let header = shards[shards.len() - 4].1;
        for at in 0..good.len() {
            let storage = copy(&storage);
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            storage.damage(&parity, bytes);
            let mended = repair_or_leave(&scene, &storage, &format!("byte {at}"));
            assert_eq!(mended, at >= header, "byte {at}");
        }
    }
}

#[test]
fn parity_that_is_cut_longer_zeroed_gone_or_another_never_mends_wrongly() {
    // Two packs of the same length.
    let (storage, repo) = new_repo();
    let disks = [5, 6].map(|seed| crate::prune::noise(seed, 3));
    let ids = disks.each_ref().map(|disk| backup(&repo, disk).unwrap().id);
    let packs = storage.list("packs/").unwrap();
    assert_eq!((packs.len(), packs[0].len), (2, packs[1].len));
    let pack = packs[0].name.clone();
    let of_other = &packs[1];
    let written = |id: &SnapshotId| repo.snapshot(id).unwrap().packs[0].id.to_string();
    let which = usize::from(!pack.ends_with(&written(&ids[0])));
    let scene = Scene {
        storage,
        id: ids[which],
        disk: disks[which].clone(),
    };
    let storage = damaged(&scene, &[0, 40]);
    let file = parity_of(&pack);
    let good = storage.read(&file, u64::MAX).unwrap();
    let other = storage.read(&parity_of(&of_other.name), u64::MAX).unwrap();
    let variants = [
        (Some(Vec::new()), false),
        (Some(good[..good.len() / 2].to_vec()), false),
        (Some(good[..good.len() - 1].to_vec()), false),
        (Some([&good[..], &[0]].concat()), false),
        (Some(vec![0; good.len()]), false),
        (Some(other), false),
        (Some(storage.read(&pack, u64::MAX).unwrap()), false),
        (None, false),
        (Some(good.clone()), true),
    ];
    for (number, (bytes, mends)) in variants.into_iter().enumerate() {
        let storage = copy(&storage);
        match bytes {
            Some(bytes) => storage.damage(&file, bytes),
            None => storage.remove(&file).unwrap(),
        }
        let what = format!("variant {number}");
        assert_eq!(repair_or_leave(&scene, &storage, &what), mends, "{what}");
        let told = scrub(&storage, &|_, _| {}).unwrap();
        let named = told.parity.iter().any(|f| f.file == file);
        assert_eq!(named, !mends, "{what}: {told:?}");
    }
}

#[test]
fn pack_that_is_cut_longer_zeroed_gone_or_another_is_mended_or_left() {
    let scene = Scene::new(new_repo(), 3);
    let pack = scene.pack();
    let good = scene.storage.read(&pack, u64::MAX).unwrap();
    let meta = scene.storage.list("meta/").unwrap().remove(0).name;
    let len = shards(&scene.storage, &pack)[1].1;
    let zeroed = |from: usize, to: usize| {
        let mut bytes = good.clone();
        bytes[from..to.min(good.len())].fill(0);
        bytes
    };
    let variants = [
        (good[..good.len() - 1].to_vec(), true),
        (good[..good.len() - 3 * len].to_vec(), true),
        (good[..good.len() - 5 * len].to_vec(), false),
        (Vec::new(), false),
        ([&good[..], &[7; 99]].concat(), true),
        (zeroed(0, 72), true),
        (zeroed(3 * len - 1, 5 * len + 1), true),
        (zeroed(3 * len - 1, 7 * len + 1), false),
        (zeroed(0, good.len()), false),
        (scene.storage.read(&meta, u64::MAX).unwrap(), false),
        ([&good[1..], &[0]].concat(), false),
    ];
    for (number, (bytes, mends)) in variants.into_iter().enumerate() {
        let storage = copy(&scene.storage);
        storage.damage(&pack, bytes);
        let what = format!("variant {number}");
        let told = check(&open(&storage), true, true);
        let file = told.files.iter().find(|f| f.file == pack);
        assert_eq!(file.unwrap().parity, Some(mends), "{what}: {told:?}");
        let told = scrub(&storage, &|_, _| {}).unwrap();
        let file = told.files.iter().find(|f| f.file == pack);
        assert_eq!(file.unwrap().parity, Some(mends), "{what}: {told:?}");
        assert_eq!(repair_or_leave(&scene, &storage, &what), mends, "{what}");
    }
}

#[test]
fn small_pack_that_is_gone_is_computed_from_its_parity_alone() {
    let sample = Sample::two_backups(new_repo());
    let whole = files(&sample.storage);
    let storage = copy(&sample.storage);
    for folder in ["packs/", "meta/"] {
        for file in storage.list(folder).unwrap() {
            storage.remove(&file.name).unwrap();
        }
    }
    let repo = open(&storage);
    for _ in 0..3 {
        // The chunks are known to be missing once the maps are there again.
        check(&open(&storage), true, true);
        // Not even a prune takes parity away that can still be of use.
        let _ = open(&storage).prune(&crate::prune::at_once());
        let done = repo.repair(None).unwrap();
        assert!(done.failed.is_empty(), "{done:?}");
    }
    let back = files(&storage);
    let kept = |name: &str| !name.starts_with("idx/") && !name.starts_with("gc/");
    for (name, bytes) in whole.iter().filter(|(name, _)| kept(name)) {
        assert!(back.iter().any(|f| f.0 == *name && f.1 == *bytes), "{name}");
    }
    for (id, disk) in &sample.disks {
        assert!(restore(&open(&storage), id).unwrap() == *disk);
    }
}

#[test]
fn what_parity_cannot_mend_comes_from_the_copy_and_only_that() {
    let (storage, repo) = new_repo();
    let disks = [1, 2, 3].map(|seed| crate::prune::noise(seed, 3));
    let ids = disks.each_ref().map(|disk| backup(&repo, disk).unwrap().id);
    let mirror = copy(&storage);
    let packs = storage.list("packs/").unwrap();
    lose(&storage, &packs[0].name, &[3, 9]);
    lose(&storage, &packs[1].name, &[1, 2, 3, 4, 5]);
    storage.remove(&packs[2].name).unwrap();
    let found = check(&open(&storage), true, true);
    assert!(!found.is_whole());
    let repo = open(&storage);
    let done = repo.repair(Some(&mirror)).unwrap();
    assert_eq!(done.mended, [packs[0].name.clone()]);
    let mut fetched = done.fetched.clone();
    fetched.sort();
    assert_eq!(fetched, [packs[1].name.clone(), packs[2].name.clone()]);
    assert_eq!(done.fetched_bytes, packs[1].len + packs[2].len);
    assert!(repo.mend_parity(true).unwrap().is_empty());
    assert!(files(&storage) == files(&mirror));
    for (id, disk) in ids.iter().zip(&disks) {
        assert!(restore(&open(&storage), id).unwrap() == *disk);
    }
}

#[test]
fn parity_that_fits_itself_but_not_its_pack_is_found_and_made_anew() {
    let scene = Scene::new(new_repo(), 3);
    let storage = copy(&scene.storage);
    let (pack, file) = (scene.pack(), parity_of(&scene.pack()));
    // As if a bit had flipped in memory between writing the pack and computing its parity.
    let mut bytes = storage.read(&file, u64::MAX).unwrap();
    let sums = shards(&storage, &pack).len() * 16;
    bytes[64] ^= 1;
    let hash = *blake3::hash(&bytes[..64 + sums]).as_bytes();
    bytes[64 + sums..][..32].copy_from_slice(&hash);
    storage.damage(&file, bytes);
    // Each of the two is whole by itself: only comparing them tells.
    assert_eq!(check(&open(&storage), true, false).parity_total, 0);
    assert!(open(&storage).mend_parity(false).unwrap().is_empty());
    assert_eq!(open(&storage).mend_parity(true).unwrap(), [file]);
    assert!(files(&storage) == files(&scene.storage));
}

#[test]
fn parity_that_a_session_has_not_written_yet_is_not_missed() {
    let (storage, repo) = new_repo();
    let session = repo.begin(&small_session()).unwrap();
    let disk = crate::prune::noise(1, 9);
    let (root, _) = store_disk(&session, &disk).unwrap();
    // Some pack is full, and its parity is written by another thread.
    let pack = loop {
        match storage.list("parity/").unwrap().pop() {
            Some(file) => break file.name,
            None => std::thread::yield_now(),
        }
    };
    storage.remove(&pack).unwrap();
    let missed = |storage: &MemoryStorage| {
        let found = check(&open(storage), false, false);
        let keyless = scrub(storage, &|_, _| {}).unwrap();
        assert_eq!(found.parity, keyless.parity);
        found.parity.into_iter().map(|f| f.file).collect::<Vec<_>>()
    };
    assert_eq!(missed(&storage), Vec::<String>::new());
    session
        .commit(draft("disk", disk.len() as u64, root))
        .unwrap();
    assert_eq!(missed(&storage), std::slice::from_ref(&pack));
    assert_eq!(repo.mend_parity(false).unwrap(), [pack]);
    assert_eq!(missed(&storage), Vec::<String>::new());
}

#[test]
fn repair_that_dies_at_any_call_leaves_the_pack_mendable_or_mended() {
    for from_copy in [false, true] {
        let scene = Scene::new(new_repo(), 3);
        let pack = scene.pack();
        let mirror = copy(&scene.storage);
        let lost: &[usize] = if from_copy {
            &[0, 1, 2, 3, 4]
        } else {
            &[0, 20, 61]
        };
        let start = damaged(&scene, lost);
        start.barrier().unwrap();
        let (old, new) = [&start, &scene.storage]
            .map(|storage| storage.read(&pack, u64::MAX).unwrap())
            .into();
        let op = |storage| {
            let repo = Repository::open(storage)?;
            repo.repair(from_copy.then_some(&mirror as &dyn Storage))?;
            repo.mend_parity(false).map(drop)
        };
        let (calls, states) = crate::sweeps::die_at_each(&start, op, |storage, done, what| {
            let there = storage.read(&pack, u64::MAX);
            let there = there.unwrap_or_else(|e| panic!("{what}: the pack is lost: {e}"));
            assert!(
                there == old || there == new,
                "{what}: neither the old one nor the new"
            );
            assert!(!done || there == new, "{what}: it was acknowledged");
            let repo = open(storage);
            repo.repair(from_copy.then_some(&mirror as &dyn Storage))
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            repo.mend_parity(true).unwrap();
            assert!(storage.read(&pack, u64::MAX).unwrap() == new, "{what}");
            assert!(storage.list("bad/").unwrap().is_empty(), "{what}");
            let found = check(&open(storage), true, false);
            assert!(
                found.is_whole() && found.parity_total == 0,
                "{what}: {found:?}"
            );
            assert!(
                restore(&open(storage), &scene.id).unwrap() == scene.disk,
                "{what}"
            );
        });
        println!("repair: {calls} calls, {states} states");
        assert!(calls > 30, "{calls}");
    }
}

#[test]
fn repair_without_room_or_with_one_failed_call_changes_nothing_for_the_worse() {
    let scene = Scene::new(new_repo(), 3);
    let pack = scene.pack();
    let start = damaged(&scene, &[0, 20, 61]);
    for fault in [Fault::NoRoom, Fault::Once] {
        for at in 1.. {
            let storage = copy(&start);
            let faulty = FaultStorage::new(Arc::new(storage.clone()), at, fault);
            let repaired = Repository::open(Arc::new(faulty.clone())).and_then(|r| r.repair(None));
            let there = storage.read(&pack, u64::MAX).unwrap();
            let is_new = there == scene.storage.read(&pack, u64::MAX).unwrap();
            assert!(is_new || there == start.read(&pack, u64::MAX).unwrap());
            if let Ok(done) = repaired {
                // Read back with an error, it is not called mended.
                let told = done.mended.is_empty() != is_new || !done.failed.is_empty();
                assert!(told, "{fault:?} {at}: {done:?}");
            }
            let repo = open(&storage);
            repo.repair(None).unwrap();
            assert!(restore(&open(&storage), &scene.id).unwrap() == scene.disk);
            assert!(storage.list("bad/").unwrap().is_empty(), "{fault:?} {at}");
            if faulty.calls() < at {
                break;
            }
        }
    }
}

#[test]
fn parity_goes_with_its_pack_and_what_was_left_over_too() {
    let (storage, repo) = new_repo();
    // What stays needs a little of what goes, so that this is written anew.
    let first = crate::prune::noise(1, 6);
    let mut second = crate::prune::noise(2, 6);
    second[..CHUNK].copy_from_slice(&first[CHUNK..2 * CHUNK]);
    let gone = backup(&repo, &first).unwrap().id;
    let kept = backup(&repo, &second).unwrap().id;
    repo.forget(&[gone], 1).unwrap();
    // The parity of a pack that a prune removed before it was stopped.
    let some = storage.list("parity/").unwrap().remove(0);
    let orphan = format!("parity/77/77{}", "0".repeat(30));
    storage.damage(&orphan, storage.read(&some.name, u64::MAX).unwrap());
    let found = check(&repo, false, false);
    assert!(found.is_whole());
    assert_eq!(found.parity.len(), 1, "{found:?}");
    assert_eq!(found.parity[0].file, orphan);
    let mut before: Vec<_> = storage.list("parity/").unwrap();
    let dry = PruneOptions {
        dry_run: true,
        ..crate::prune::at_once()
    };
    let would = repo.prune(&dry).unwrap();
    assert_eq!(storage.list("parity/").unwrap(), before);
    let did = repo.prune(&crate::prune::at_once()).unwrap();
    assert!(did.packs_repacked > 0, "{did:?}");
    let after = storage.list("parity/").unwrap();
    before.retain(|file| !after.contains(file));
    let went: u64 = before.iter().map(|file| file.len).sum();
    assert_eq!(did.removed_parity_bytes, went);
    assert_eq!(would.removed_parity_bytes, did.removed_parity_bytes);
    assert!(did.removed_parity_bytes > some.len);
    // What was written anew has parity of its own.
    assert_eq!(check(&repo, true, false).parity_total, 0);
    assert_no_orphans(&storage, "pruned");
    assert_eq!(
        repo.prune(&crate::prune::at_once())
            .unwrap()
            .removed_parity_bytes,
        0
    );
    assert!(restore(&repo, &kept).is_ok());
    assert_eq!(check(&repo, true, false).parity_total, 0);
}

#[test]
fn repository_without_parity_stays_so() {
    let storage = MemoryStorage::new();
    let options = InitOptions {
        parity: Parity::NONE,
        ..options()
    };
    let repo = Repository::init(Arc::new(storage.clone()), &options).unwrap();
    let scene = Scene::new((storage, repo), 3);
    let repo = open(&scene.storage);
    assert!(repo.mend_parity(true).unwrap().is_empty());
    repo.forget(&[scene.id], 1).unwrap();
    backup(&repo, &crate::prune::noise(4, 3)).unwrap();
    repo.prune(&crate::prune::at_once()).unwrap();
    assert!(scene.storage.list("parity/").unwrap().is_empty());
    let found = check(&repo, true, false);
    assert_eq!((found.parity_files, found.parity_total), (0, 0));
}

#[test]
fn what_does_not_prove_to_be_the_pack_never_takes_its_place() {
    let sample = Sample::two_backups(new_repo());
    let pack = sample.storage.list("packs/").unwrap().remove(0).name;
    let good = sample.storage.read(&pack, u64::MAX).unwrap();
    let start = copy(&sample.storage);
    start.damage(&pack, [&good[..75], &[!good[75]], &good[76..]].concat());
    check(&open(&start), true, true);
    // Another record is damaged in the copy, whose footer is as good as the one here.
    let mut forged = good.clone();
    forged[80] ^= 1;
    let mirror = copy(&sample.storage);
    mirror.damage(&pack, forged.clone());
    // And parity of such a pack, whose sums all fit.
    let file = parity_of(&pack);
    let parity = sample.storage.read(&file, u64::MAX).unwrap();
    assert_eq!(parity[49..51], [1, 1], "a pack of one shard");
    forged.resize(512, 0);
    let sum = *blake3::hash(&forged).as_bytes();
    let sum = &sum[..16];
    let head = [&parity[..64], sum, sum].concat();
    let hash = *blake3::hash(&head).as_bytes();
    let fitting = [&head[..], &hash, &forged].concat();
    assert_eq!(fitting.len(), parity.len());
    for (parity, from) in [
        (None, Some(&mirror)),
        (Some(fitting.clone()), None),
        (Some(fitting), Some(&mirror)),
    ] {
        let storage = copy(&start);
        match parity {
            Some(bytes) => storage.damage(&file, bytes),
            None => storage.remove(&file).unwrap(),
        }
        let before = files(&storage);
        let repo = open(&storage);
        let done = repo
            .repair(from.map(|mirror| mirror as &dyn Storage))
            .unwrap();
        assert_eq!(done.failed.len(), 1, "{done:?}");
        assert!(done.mended.is_empty() && done.fetched.is_empty());
        assert!(files(&storage) == before);
        assert!(!storage.list("bad/").unwrap().is_empty());
    }
}
