//! Repositories that earlier programs made: each is read, checked and written to, and none is forgotten.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbdbackup::repo::{
    CheckOptions, LocalStorage, MemoryStorage, RepoError, Repository, Secret, Storage,
};

use crate::support::{CHUNK, backup, restore_disk};

/// A repository in `tests/fixtures/repositories`.
struct Golden {
    folder: &'static str,
    secret: Option<Secret>,
}

fn all() -> [Golden; 3] {
    [
        Golden {
            folder: "v1-plain",
            secret: None,
        },
        Golden {
            folder: "v1-encrypted",
            secret: Some(Secret::password(PASSWORD.into()).unwrap()),
        },
        Golden {
            folder: "v1-parity",
            secret: None,
        },
    ]
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/repositories")
}

/// What each of them holds: disk `vda` of 3 * 64 KiB + 7 bytes, in full and after a change.
fn disks() -> [Vec<u8>; 2] {
    let mut disk = vec![0; 3 * CHUNK + 7];
    for (at, byte) in disk.iter_mut().enumerate().take(CHUNK + 9) {
        *byte = (at / 500) as u8;
    }
    disk[3 * CHUNK..].fill(b'z');
    let mut later = disk.clone();
    later[2 * CHUNK..2 * CHUNK + 5].copy_from_slice(b"later");
    [disk, later]
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

#[test]
fn each_golden_repository_is_read_checked_and_written_to() {
    for golden in all() {
        let folder = tempfile::tempdir().unwrap();
        copy(&fixtures().join(golden.folder), folder.path());
        let storage = Arc::new(LocalStorage::open(folder.path()).unwrap());
        let repo = Repository::open_with(storage, golden.secret.as_ref()).unwrap();
        let list = repo.snapshots().unwrap();
        assert!(list.unreadable.is_empty(), "{:?}", list.unreadable);
        let read: Vec<Vec<u8>> = list
            .snapshots
            .iter()
            .map(|s| restore_disk(&repo, &s.draft.disks[0]).unwrap())
            .collect();
        assert!(read == disks(), "{}", golden.folder);
        let options = CheckOptions {
            read_data_percent: Some(100.0),
            ..CheckOptions::default()
        };
        let found = repo.check(&options, &|_, _| {}).unwrap();
        assert!(found.is_whole(), "{}: {found:?}", golden.folder);
        let parity = std::fs::exists(folder.path().join("parity")).unwrap();
        assert_eq!(parity, golden.folder == "v1-parity");
        assert_eq!(found.parity_files, if parity { found.packs } else { 0 });
        assert_eq!(found.parity_total, 0, "{}: {found:?}", golden.folder);
        let again = backup(&repo, &read[1]).unwrap();
        assert_eq!(again.packs, [], "{}", golden.folder);
    }
}

/// A copy in memory of the repository that is not encrypted, whose key anybody can read.
fn plain() -> MemoryStorage {
    let storage = MemoryStorage::new();
    let local = LocalStorage::open(fixtures().join("v1-plain")).unwrap();
    for file in local.list("").unwrap() {
        storage.damage(&file.name, local.read(&file.name, u64::MAX).unwrap());
    }
    storage
}

/// The payload of a small file.
fn payload(file: &[u8]) -> Vec<u8> {
    let len = u32::from_le_bytes(file[16..20].try_into().unwrap()) as usize;
    file[20..20 + len].to_vec()
}

/// A small file of the same kind as another with a payload that a later program may have written.
fn rewritten(storage: &MemoryStorage, name: &str, payload: &[u8]) {
    let slot = storage.read("keys/0", u64::MAX).unwrap();
    let old = storage.read(name, u64::MAX).unwrap();
    let mut file = old[..16].to_vec();
    file.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend_from_slice(payload);
    let sum = blake3::hash(&file);
    let tail = match name.starts_with("keys/") {
        true => Vec::new(),
        false => {
            // The key stands in the slot after the tags of its kind and of itself.
            let master = &slot[33..65];
            let key = blake3::derive_key("nbdbackup 2026-11 k_mac config and snapshots", master);
            blake3::keyed_hash(&key, &file).as_bytes().to_vec()
        }
    };
    file.extend_from_slice(sum.as_bytes());
    file.extend_from_slice(&tail);
    storage.damage(name, file);
}

/// Sets a bit of the features, which are the first tag of the configuration and of snapshots.
fn with_feature(storage: &MemoryStorage, name: &str, set: usize) {
    let mut payload = payload(&storage.read(name, u64::MAX).unwrap());
    assert_eq!(payload[..6], [1, 0, 24, 0, 0, 0]);
    payload[6 + 8 * set + 5] |= 1;
    rewritten(storage, name, &payload);
}

const COMPAT: usize = 0;
const RO_COMPAT: usize = 1;
const INCOMPAT: usize = 2;

fn open(storage: &MemoryStorage) -> Result<Arc<Repository>, RepoError> {
    Repository::open(Arc::new(storage.clone()))
}

fn reads(storage: &MemoryStorage) {
    let repo = open(storage).unwrap();
    let list = repo.snapshots().unwrap();
    assert!(list.unreadable.is_empty(), "{:?}", list.unreadable);
    let read = list.snapshots.iter();
    let read: Vec<_> = read
        .map(|s| restore_disk(&repo, &s.draft.disks[0]).unwrap())
        .collect();
    assert!(read == disks());
}

#[test]
fn unknown_fields_and_features_that_may_be_ignored_are() {
    let storage = plain();
    for file in ["config", "config.bak"] {
        with_feature(&storage, file, COMPAT);
    }
    for file in storage.list("snap/").unwrap() {
        with_feature(&storage, &file.name, COMPAT);
    }
    let small = ["config", "config.bak", "keys/0", "keys/0.bak"].map(str::to_owned);
    let snapshots = storage.list("snap/").unwrap().into_iter().map(|f| f.name);
    for file in snapshots.chain(small) {
        let unknown = [99, 1, 3, 0, 0, 0, b'n', b'e', b'w'];
        let old = payload(&storage.read(&file, u64::MAX).unwrap());
        rewritten(&storage, &file, &[&old[..], &unknown].concat());
    }
    reads(&storage);
    let repo = open(&storage).unwrap();
    backup(&repo, &disks()[1]).unwrap();
    repo.prune(&crate::prune::at_once()).unwrap();
    let found = repo.check(&CheckOptions::default(), &|_, _| {}).unwrap();
    assert!(found.is_whole(), "{found:?}");
}

#[test]
fn repository_with_an_unknown_feature_for_writing_is_read_and_left_as_it_is() {
    let storage = plain();
    for file in ["config", "config.bak"] {
        with_feature(&storage, file, RO_COMPAT);
    }
    let before = storage.list("").unwrap();
    reads(&storage);
    let repo = open(&storage).unwrap();
    let found = repo.check(&CheckOptions::default(), &|_, _| {}).unwrap();
    assert!(found.is_whole(), "{found:?}");
    let id = repo.snapshots().unwrap().snapshots[0].id;
    let repair = CheckOptions {
        repair: true,
        ..CheckOptions::default()
    };
    let copy = plain();
    let refused = [
        ("backup", backup(&repo, &disks()[1]).map(drop)),
        ("forget", repo.forget(&[id], 1)),
        ("undelete", repo.unforget(&id).map(drop)),
        ("prune", repo.prune(&crate::prune::at_once()).map(drop)),
        ("check --repair", repo.check(&repair, &|_, _| {}).map(drop)),
        ("rebuild", repo.rebuild_index().map(drop)),
        ("merge", repo.merge_index(u64::MAX).map(drop)),
        ("repair", repo.repair(Some(&copy)).map(drop)),
        ("parity", repo.mend_parity(true).map(drop)),
        ("reserve", repo.make_reserve()),
        ("key remove", repo.remove_key(0)),
    ];
    for (what, result) in refused {
        let refused = matches!(result, Err(RepoError::Unsupported { .. }));
        assert!(refused, "{what}: {result:?}");
    }
    assert_eq!(storage.list("").unwrap(), before);
}

#[test]
fn repository_or_snapshot_with_an_unknown_feature_for_reading_is_refused() {
    let storage = plain();
    for file in ["config", "config.bak"] {
        with_feature(&storage, file, INCOMPAT);
    }
    let refused = open(&storage);
    assert!(
        matches!(refused, Err(RepoError::Unsupported { .. })),
        "{refused:?}"
    );
    // One snapshot that only a newer program reads hides no other, and no prune goes on without it.
    let storage = plain();
    let newer = storage.list("snap/").unwrap().remove(0).name;
    with_feature(&storage, &newer, INCOMPAT);
    let repo = open(&storage).unwrap();
    let list = repo.snapshots().unwrap();
    assert_eq!(list.snapshots.len(), 1);
    let (file, error) = &list.unreadable[0];
    assert!(
        *file == newer && matches!(error, RepoError::Unsupported { .. }),
        "{error:?}"
    );
    let refused = repo.prune(&crate::prune::at_once());
    assert!(
        matches!(refused, Err(RepoError::SnapshotsUnreadable { .. })),
        "{refused:?}"
    );
}

#[test]
fn file_of_a_later_version_of_the_format_is_refused_and_never_taken_for_damaged() {
    let whole = plain();
    for file in whole.list("").unwrap() {
        let storage = plain();
        let mut bytes = storage.read(&file.name, u64::MAX).unwrap();
        bytes[10] = 2;
        let sum = blake3::hash(&bytes[..12]);
        bytes[12..16].copy_from_slice(&sum.as_bytes()[..4]);
        storage.damage(&file.name, bytes);
        match open(&storage) {
            Err(error) => assert!(matches!(error, RepoError::Unsupported { .. }), "{error:?}"),
            Ok(repo) => {
                for (_, error) in repo.snapshots().unwrap().unreadable {
                    assert!(matches!(error, RepoError::Unsupported { .. }), "{error:?}");
                }
                let kind = file.name.split('/').next().unwrap();
                if !["snap", "packs", "meta"].contains(&kind) {
                    reads(&storage);
                }
            }
        }
    }
}

#[test]
fn packs_of_the_golden_repository_with_parity_are_computed_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let golden = fixtures().join("v1-parity");
    copy(&golden, folder.path());
    let storage = Arc::new(LocalStorage::open(folder.path()).unwrap());
    let mut packs = storage.list("packs/").unwrap();
    packs.extend(storage.list("meta/").unwrap());
    for pack in &packs {
        let file = folder.path().join(&pack.name);
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[80..].fill(b'?');
        std::fs::write(&file, bytes).unwrap();
    }
    let repo = Repository::open(storage).unwrap();
    let options = CheckOptions {
        repair: true,
        ..CheckOptions::default()
    };
    repo.check(&options, &|_, _| {}).unwrap();
    assert_eq!(repo.repair(None).unwrap().mended.len(), packs.len());
    for pack in packs {
        let now = std::fs::read(folder.path().join(&pack.name)).unwrap();
        assert_eq!(now, std::fs::read(golden.join(&pack.name)).unwrap());
    }
}

#[test]
fn no_golden_repository_is_forgotten() {
    let mut found: Vec<String> = std::fs::read_dir(fixtures())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut known = all().map(|golden| golden.folder.to_owned());
    known.sort();
    assert_eq!(found, known);
}

const PASSWORD: &str = "golden";
