//! Checking and mending: every damage is reported, what can be mended is, and the next backup heals the rest.

use std::sync::Arc;

use nbdbackup::repo::{
    CheckOptions, Checked, DamagedFile, MemoryStorage, PruneOptions, Repository, SnapshotId,
    Storage, scrub,
};

use crate::support::*;

/// The usual sample, with some of every kind of file.
fn sample_in(new: (MemoryStorage, Arc<Repository>)) -> Sample {
    let repo = Arc::clone(&new.1);
    let sample = Sample::two_backups(new);
    check(&repo, Some(100.0), false);
    let victim = backup(&repo, &sample.next).unwrap().id;
    repo.forget(&[victim], 0).unwrap();
    sample
}

fn sample() -> Sample {
    sample_in(new_repo())
}

fn check(repo: &Repository, read_data_percent: Option<f64>, repair: bool) -> Checked {
    let options = CheckOptions {
        read_data_percent,
        repair,
        now_unix_nanos: 5,
    };
    repo.check(&options, &|_, _| {}).unwrap()
}

fn flip(storage: &MemoryStorage, file: &str, at: usize) {
    let mut bytes = storage.read(file, u64::MAX).unwrap();
    bytes[at] ^= 1 << (at % 8);
    storage.damage(file, bytes);
}

fn files(storage: &MemoryStorage, folder: &str) -> Vec<String> {
    let files = storage.list(folder).unwrap();
    files.into_iter().map(|f| f.name).collect()
}

/// Backs all disks up in full and tells whether all snapshots can be read then; what is read is never wrong.
fn heals(sample: &Sample, storage: &MemoryStorage, what: &str) -> bool {
    let repo = open(storage);
    for (_, disk) in &sample.disks {
        backup(&repo, disk).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    let repo = open(storage);
    sample
        .disks
        .iter()
        .all(|(id, disk)| match restore(&repo, id) {
            Ok(read) => {
                assert!(read == *disk, "{what}: wrong data");
                true
            }
            Err(_) => false,
        })
}

#[test]
fn whole_repository_is_whole_at_each_depth() {
    for sample in [sample(), sample_in(new_encrypted_repo())] {
        let repo = open(&sample.storage);
        for percent in [None, Some(30.0), Some(100.0)] {
            let found = check(&repo, percent, true);
            assert!(found.is_whole(), "{found:?}");
            assert_eq!(found.files_total, 0, "{found:?}");
            assert_eq!(found.parity_total, 0, "{found:?}");
            assert_eq!(found.parity_files, found.packs);
            assert_eq!(found.marked, 0);
            assert!(found.strangers.is_empty(), "{found:?}");
            assert_eq!((found.snapshots, found.chunks), (2, 4));
            assert_eq!(found.read_packs == found.packs, percent == Some(100.0));
        }
        assert!(files(&sample.storage, "bad/").is_empty());
        assert_eq!(files(&sample.storage, "verify/").len(), 1);
        let found = scrub(&sample.storage, &|_, _| {}).unwrap();
        assert!(found.is_whole(), "{found:?}");
        assert!(found.read_packs > 0);
        assert_eq!((found.parity_files, found.parity_total), (found.packs, 0));
    }
}

#[test]
fn file_that_a_prune_removes_beside_a_check_without_a_key_is_no_damage() {
    let sample = sample();
    for at in 1.. {
        let storage = copy(&sample.storage);
        let removing = FaultStorage::new(Arc::new(storage), at, Fault::Removed);
        let found = scrub(&removing, &|_, _| {}).unwrap();
        assert!(found.is_whole(), "at call {at}: {found:?}");
        if removing.calls() < at {
            assert!(at > 40, "{at}");
            break;
        }
    }
}

#[test]
fn flipped_bit_in_any_byte_of_any_file_is_reported_and_healed() {
    flip_each(&sample());
}

#[test]
fn flipped_bit_in_any_byte_of_an_encrypted_file_is_reported_and_healed() {
    flip_each(&sample_in(new_encrypted_repo()));
}

fn flip_each(sample: &Sample) {
    for file in sample.storage.list("").unwrap() {
        // What protects no data, and what stands in the file's padding, is looked at more coarsely.
        let step = match file.name.split('/').next() {
            Some("packs" | "meta" | "snap") => 9,
            Some("idx") => 977,
            _ => 17,
        };
        for at in (0..file.len as usize).step_by(step) {
            let what = format!("{} at {at}", file.name);
            let storage = copy(&sample.storage);
            flip(&storage, &file.name, at);
            let Ok(repo) = open_any(Arc::new(storage.clone())) else {
                panic!("{what}: does not open");
            };
            let found = check(&repo, Some(100.0), true);
            let named = found.files.iter().chain(&found.parity).any(|f| {
                f.file == file.name || (f.file == "idx/" && file.name.starts_with("idx/"))
            });
            assert!(named, "{what}: not reported: {found:?}");
            // Snapshots and marks of forgotten ones exist once; what they hold is in no other place.
            if file.name.starts_with("snap/") || file.name.starts_with("forget/") {
                assert!(!found.is_whole(), "{what}");
                continue;
            }
            assert!(heals(sample, &storage, &what), "{what}: not healed");
            let repo = open(&storage);
            let again = check(&repo, Some(100.0), false);
            assert!(again.is_whole(), "{what}: {again:?}");
            let found = scrub(&copy(&storage), &|_, _| {});
            assert!(found.is_ok(), "{what}");
        }
    }
}

#[test]
fn truncated_zeroed_extended_deleted_and_swapped_files_are_reported_and_never_wrong() {
    let sample = sample();
    let all = sample.storage.list("").unwrap();
    for (number, file) in all.iter().enumerate() {
        let good = sample.storage.read(&file.name, u64::MAX).unwrap();
        let other = &all[(number + 1) % all.len()].name;
        let twin = all
            .iter()
            .find(|f| f.name != file.name && f.name[..4] == file.name[..4]);
        let mut variants = vec![
            Some(Vec::new()),
            Some(good[..good.len() / 2].to_vec()),
            Some(good[..good.len() - 1].to_vec()),
            Some([good.clone(), vec![0]].concat()),
            Some(vec![0; good.len()]),
            Some(sample.storage.read(other, u64::MAX).unwrap()),
            None,
        ];
        variants.extend(twin.map(|f| Some(sample.storage.read(&f.name, u64::MAX).unwrap())));
        for (variant, bytes) in variants.into_iter().enumerate() {
            if bytes.as_ref() == Some(&good) {
                continue;
            }
            let what = format!("{} variant {variant}", file.name);
            let storage = copy(&sample.storage);
            let deleted = bytes.is_none();
            match bytes {
                Some(bytes) => storage.damage(&file.name, bytes),
                None => storage.remove(&file.name).unwrap(),
            }
            let repo = open(&storage);
            let found = check(&repo, Some(100.0), true);
            // Of what nothing else names nobody can know that it was there.
            let nameless = ["snap/", "forget/", "verify/"];
            let quiet = deleted && nameless.iter().any(|folder| file.name.starts_with(folder));
            let garbage = deleted && !found.is_whole();
            if file.name.starts_with("parity/") {
                let named = |f: &DamagedFile| f.file == file.name;
                assert!(found.parity.iter().any(named), "{what}: not reported");
                assert!(found.is_whole(), "{what}: {found:?}");
                let keyless = scrub(&storage, &|_, _| {}).unwrap();
                assert!(keyless.parity.iter().any(named), "{what}: {keyless:?}");
                let made = open(&storage).mend_parity(false).unwrap();
                assert_eq!(made, std::slice::from_ref(&file.name), "{what}");
                assert!(
                    storage.read(&file.name, u64::MAX).unwrap() == good,
                    "{what}"
                );
            }
            assert!(
                quiet
                    || garbage
                    || found.files_total + found.parity_total > 0
                    || is_garbage(&sample, &file.name),
                "{what}: not reported: {found:?}"
            );
            if file.name.starts_with("snap/") || file.name.starts_with("forget/") {
                continue;
            }
            assert!(heals(&sample, &storage, &what), "{what}: not healed");
            let again = check(&open(&storage), Some(100.0), false);
            assert!(again.is_whole(), "{what}: {again:?}");
        }
    }
}

/// Whether no snapshot that is listed needs a file: a pack of a forgotten one.
fn is_garbage(sample: &Sample, file: &str) -> bool {
    let storage = copy(&sample.storage);
    storage.remove(file).unwrap();
    let repo = open(&storage);
    sample
        .disks
        .iter()
        .all(|(id, _)| restore(&repo, id).is_ok())
}

/// The data pack that the session of a snapshot wrote.
fn pack_of(repo: &Repository, id: &SnapshotId, storage: &MemoryStorage) -> String {
    let snapshot = repo.snapshot(id).unwrap();
    let packs: Vec<String> = snapshot.packs.iter().map(|p| p.id.to_string()).collect();
    let mut files = files(storage, "packs/").into_iter();
    files
        .find(|f| packs.iter().any(|p| f.ends_with(p)))
        .unwrap()
}

#[test]
fn lost_range_is_named_by_snapshot_disk_and_place() {
    let sample = sample();
    let storage = copy(&sample.storage);
    let repo = open(&storage);
    // The first snapshot's pack holds chunks 0, 1 and 3; its first record is chunk 0, which both snapshots have.
    let file = pack_of(&repo, &sample.disks[0].0, &storage);
    flip(&storage, &file, 80);
    let found = check(&open(&storage), None, false);
    assert!(found.is_whole(), "footers are whole: {found:?}");
    let found = check(&open(&storage), Some(100.0), false);
    assert!(!found.is_whole());
    let ranges: Vec<_> = found
        .ranges
        .iter()
        .map(|r| (r.snapshot, r.disk.as_str(), r.offset, r.len, &r.file, r.at))
        .collect();
    let want = |id| (id, "disk", 0, CHUNK as u64, &file, 72);
    let mut wanted = vec![want(sample.disks[0].0), want(sample.disks[1].0)];
    wanted.sort();
    let mut ranges = ranges;
    ranges.sort();
    assert_eq!(ranges, wanted);
    assert_eq!(found.lost_bytes, 2 * CHUNK as u64);
    assert!(
        files(&storage, "bad/").is_empty(),
        "nothing was asked to be mended"
    );
}

#[test]
fn marked_chunk_is_read_again_by_an_incremental_and_heals_all() {
    for sample in [sample(), sample_in(new_encrypted_repo())] {
        for folder in ["packs/", "meta/"] {
            for file in files(&sample.storage, folder) {
                let storage = copy(&sample.storage);
                flip(&storage, &file, 73);
                let repo = open(&storage);
                let found = check(&repo, Some(100.0), true);
                if found.ranges_total == 0 {
                    continue;
                }
                assert!(found.marked > 0);
                let (id, disk) = sample.disks.last().unwrap();
                let parent = repo.snapshot(id).unwrap();
                let root = parent.draft.disks[0].root;
                let again = repo.damaged_chunks(&root).unwrap();
                let session = repo.begin(&session_after(&[*id])).unwrap();
                let size = disk.len() as u64;
                let mut map = session.map_writer(Some((&root, size)), size).unwrap();
                for (number, chunk) in disk.chunks(CHUNK).enumerate() {
                    let number = number as u64;
                    if !again.iter().any(|run| run.contains(&number)) {
                        map.keep(number..number + 1).unwrap();
                        continue;
                    }
                    match session.store_chunk(chunk).unwrap().entry {
                        Some(entry) => map.put(number, entry).unwrap(),
                        None => map.zero(number..number + 1).unwrap(),
                    }
                }
                let root = map.finish().unwrap();
                let new = session.commit(draft("disk", size, root)).unwrap();
                let repo = open(&storage);
                assert!(restore(&repo, &new.id).unwrap() == *disk, "{file}");
                assert!(restore(&repo, id).unwrap() == *disk, "{file}: not healed");
                assert_eq!(repo.damaged_chunks(&root).unwrap(), []);
            }
        }
    }
}

#[test]
fn prune_frees_healed_packs_and_forgets_their_marks() {
    let sample = sample();
    let storage = copy(&sample.storage);
    for file in files(&storage, "packs/") {
        flip(&storage, &file, 73);
    }
    assert!(check(&open(&storage), Some(100.0), true).marked > 0);
    assert!(heals(&sample, &storage, "healed"));
    let options = PruneOptions {
        max_unused_percent: 0.0,
        undelete_window: std::time::Duration::ZERO,
        now_unix_nanos: 10,
        max_freed_percent: 100,
        ..PruneOptions::default()
    };
    let repo = open(&storage);
    repo.prune(&options).unwrap();
    repo.prune(&options).unwrap();
    let repo = open(&storage);
    let found = check(&repo, Some(100.0), true);
    assert_eq!(files(&storage, "bad/"), Vec::<String>::new());
    assert!(found.is_whole(), "{found:?}");
    for (id, disk) in &sample.disks {
        assert!(restore(&repo, id).unwrap() == *disk);
    }
}

#[test]
fn prune_goes_on_beside_what_is_lost_and_keeps_healing_packs_that_no_index_knows() {
    let sample = sample();
    let storage = copy(&sample.storage);
    let options = PruneOptions {
        undelete_window: std::time::Duration::ZERO,
        now_unix_nanos: 10,
        max_freed_percent: 100,
        ..PruneOptions::default()
    };
    for file in files(&storage, "packs/") {
        storage.remove(&file).unwrap();
    }
    let repo = open(&storage);
    assert!(
        repo.prune(&options).is_err(),
        "nothing says that it is lost"
    );
    assert!(check(&repo, None, true).marked > 0);
    let repo = open(&storage);
    repo.prune(&options).unwrap();
    // Healed, by packs whose index segments are lost again.
    assert!(heals(&sample, &storage, "healed"));
    for file in files(&storage, "idx/") {
        storage.remove(&file).unwrap();
    }
    let _ = open(&storage).prune(&options);
    check(&open(&storage), None, true);
    let repo = open(&storage);
    for (id, disk) in &sample.disks {
        assert!(restore(&repo, id).unwrap() == *disk);
    }
}

#[test]
fn index_is_made_anew_and_equals_what_it_was() {
    let sample = sample();
    for how in 0..3 {
        let storage = copy(&sample.storage);
        for (number, file) in files(&storage, "idx/").into_iter().enumerate() {
            match how {
                0 => storage.remove(&file).unwrap(),
                1 if number == 0 => storage.remove(&file).unwrap(),
                // The first page's first entry, at its offset: the page's own checksum catches that.
                _ => flip(&storage, &file, 4096 + 20),
            }
        }
        let repo = open(&storage);
        let found = check(&repo, None, true);
        assert!(found.index_rebuilt && found.is_whole(), "{how}: {found:?}");
        assert_eq!(repo.index_segments().unwrap(), 1, "{how}");
        assert_eq!(files(&storage, "idx/").len(), 1, "{how}");
        assert_eq!(repo.rebuild_index().unwrap().packs, 0, "{how}");
        let again = check(&open(&storage), Some(100.0), false);
        assert_eq!(again.files_total, 0, "{how}: {again:?}");
        for (_, disk) in &sample.disks {
            assert_eq!(backup(&repo, disk).unwrap().packs, [], "{how}");
        }
    }
}

#[test]
fn index_that_says_otherwise_than_the_footers_is_reported() {
    // A pack of a repository's own, put back as it was under the same name before something else took its place, would
    // need forged checksums: here the pack is rewritten whole, with a footer that fits.
    let sample = sample();
    let storage = copy(&sample.storage);
    let file = pack_of(&open(&storage), &sample.disks[0].0, &storage);
    let bytes = storage.read(&file, u64::MAX).unwrap();
    let trailer = bytes.len() - 44;
    let len = u32::from_le_bytes(bytes[trailer..trailer + 4].try_into().unwrap()) as usize;
    let mut footer = bytes[trailer - len..trailer].to_vec();
    // Another identifier for the first record.
    footer[0] ^= 1;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..72]).update(&footer);
    let mut forged = bytes[..trailer - len].to_vec();
    forged.extend_from_slice(&footer);
    forged.extend_from_slice(&(len as u32).to_le_bytes());
    forged.extend_from_slice(hasher.finalize().as_bytes());
    forged.extend_from_slice(&bytes[trailer + 36..]);
    storage.damage(&file, forged);
    let found = check(&open(&storage), None, true);
    let problem = |f: &str, p: &str| {
        let mut files = found.files.iter();
        files.any(|d| d.file == f && d.problem.contains(p))
    };
    assert!(
        problem(&file, "not the one that its snapshot names"),
        "{found:?}"
    );
    assert!(heals(&sample, &storage, "forged"));
}

#[test]
fn damaged_packs_and_snapshots_are_fetched_from_a_copy() {
    for sample in [sample(), sample_in(new_encrypted_repo())] {
        let storage = copy(&sample.storage);
        for (number, folder) in ["packs/", "packs/", "meta/", "snap/"].iter().enumerate() {
            for file in files(&storage, folder) {
                match number {
                    0 => flip(&storage, &file, 75),
                    1 | 2 if file.ends_with(|c: char| c < '8') => storage.remove(&file).unwrap(),
                    _ => flip(&storage, &file, 90),
                }
            }
        }
        let repo = open(&storage);
        // A damaged copy gives nothing.
        let bad = copy(&storage);
        check(&repo, Some(100.0), true);
        assert_eq!(
            repo.repair(Some(&bad)).unwrap().fetched,
            Vec::<String>::new()
        );
        // The packs of a snapshot that was lost are known only when it is back, and those of a map with that.
        for _ in 0..4 {
            let done = repo.repair(Some(&sample.storage)).unwrap();
            assert!(done.failed.is_empty(), "{done:?}");
            check(&repo, Some(100.0), true);
        }
        let repo = open(&storage);
        let found = check(&repo, Some(100.0), false);
        assert!(found.is_whole(), "{found:?}");
        for (id, disk) in &sample.disks {
            assert!(restore(&repo, id).unwrap() == *disk);
        }
    }
}

#[test]
fn parts_of_all_packs_take_turns_until_all_were_read() {
    let (storage, repo) = new_repo();
    let mut rng = Rng(3);
    for _ in 0..10 {
        let mut disk = vec![0; 2 * CHUNK];
        rng.fill(&mut disk);
        backup(&repo, &disk).unwrap();
    }
    // The damage is found within five days of 20 % each, whichever pack it is in.
    for file in files(&storage, "packs/") {
        let storage = copy(&storage);
        flip(&storage, &file, 100);
        let repo = open(&storage);
        let mut read = 0;
        let found = (0..6).any(|_| {
            let found = check(&repo, Some(20.0), false);
            read += found.read_packs;
            assert!(found.read_packs < found.packs);
            !found.is_whole()
        });
        assert!(found, "{file}: {read} packs were read");
    }
}

#[test]
fn record_twice_in_a_pack_and_over_packs_does_no_harm() {
    let sample = sample();
    let storage = copy(&sample.storage);
    // Without its index all is stored again: each chunk is there twice then.
    for file in files(&storage, "idx/") {
        storage.remove(&file).unwrap();
    }
    let repo = open(&storage);
    let again = backup(&repo, &sample.disks[0].1).unwrap();
    assert!(!again.packs.is_empty());
    assert!(check(&repo, Some(100.0), true).is_whole());
    // One copy of each is enough.
    let old = files(&sample.storage, "packs/");
    for file in &old {
        flip(&storage, file, 100);
    }
    let repo = open(&storage);
    let found = check(&repo, Some(100.0), true);
    let lost: Vec<_> = found.ranges.iter().map(|r| r.snapshot).collect();
    assert!(!lost.contains(&sample.disks[0].0), "{found:?}");
    assert!(restore(&repo, &sample.disks[0].0).unwrap() == sample.disks[0].1);
}
