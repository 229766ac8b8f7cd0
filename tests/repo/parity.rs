//! Parity: what of a pack and of its parity may be lost, and what then is mended, reported, or left as it is.

use std::sync::Arc;

use nbdbackup::repo::{
    CheckOptions, Checked, InitOptions, MemoryStorage, Parity, Repository, SnapshotId, Storage,
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
