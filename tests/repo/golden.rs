//! Repositories that earlier programs made: each is read, checked and written to, and none is forgotten.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbdbackup::repo::{CheckOptions, LocalStorage, Repository, Secret, Storage};

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
