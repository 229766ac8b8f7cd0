//! A flipped bit at each moment between hashing and writing.

use super::super::cipher::Encryption;
use super::super::flip::{self, Point};
use super::super::repository::InitOptions;
use super::super::secret::{PasswordCost, Secret};
use super::super::snapshot::{BackupKind, DiskRecord, DiskStats};
use super::super::storage::{MemoryStorage, Storage};
use super::*;

fn repos() -> [Arc<Repository>; 2] {
    let storage = || -> Arc<dyn Storage> { Arc::new(MemoryStorage::new()) };
    let options = InitOptions::default();
    let key = Secret::key_file(vec![9; 64]).unwrap();
    let cost = PasswordCost::default();
    [
        Repository::init(storage(), &options).unwrap(),
        Repository::init_encrypted(storage(), &options, &key, cost).unwrap(),
    ]
}

fn chunks() -> [Vec<u8>; 2] {
    let mut noise = vec![0; 128 << 10];
    getrandom::fill(&mut noise).unwrap();
    let text = (0..).flat_map(|i: u32| format!("line {i}\n").into_bytes());
    [noise, text.take(128 << 10).collect()]
}

/// Stores the chunks and their map, reads everything back after the commit.
fn backup(repo: &Arc<Repository>, chunks: &[Vec<u8>]) -> Result<(), RepoError> {
    let session = repo.begin(&SessionOptions::default())?;
    let size_bytes = chunks.iter().map(|c| c.len() as u64).sum();
    let mut map = session.map_writer(None, size_bytes)?;
    let mut entries = Vec::new();
    for (number, chunk) in chunks.iter().enumerate() {
        let entry = session.store_chunk(chunk)?.entry.unwrap();
        map.put(number as u64, entry)?;
        entries.push(entry);
    }
    let disk = DiskRecord {
        disk: "vda".to_owned(),
        size_bytes,
        root: map.finish()?,
        kind: BackupKind::Full,
        reason: None,
        parent: None,
        generation: 1,
        bitmap_used: None,
        bitmaps_started: Vec::new(),
        bitmaps_lost: Vec::new(),
        source: "test".to_owned(),
        stats: DiskStats::default(),
    };
    session.commit(SnapshotDraft {
        name: "machine".to_owned(),
        complete: true,
        disks: vec![disk],
        ..SnapshotDraft::default()
    })?;
    let mut read = Vec::new();
    for (entry, chunk) in entries.iter().zip(chunks) {
        repo.read_chunk(entry, chunk.len() as u32, &mut read)?;
        assert_eq!(&read, chunk);
    }
    Ok(())
}

#[test]
fn bit_that_flips_once_is_made_good_and_one_that_comes_back_ends_the_session() {
    for repo in repos() {
        let encrypted = repo.encryption() != Encryption::None;
        for point in [Point::Compressed, Point::Proved, Point::Sealed] {
            // What is compressed goes through all points also where nothing is encrypted, but for the last.
            let [_, text] = chunks();
            if point == Point::Sealed && !encrypted {
                continue;
            }
            let text = [text, format!("{point:?} {encrypted}").into_bytes()].concat();
            let text = [text[text.len() - (128 << 10)..].to_vec()];
            let committed = || repo.snapshots().unwrap().snapshots.len();
            let before = committed();
            flip::next(point, 2);
            let failed = backup(&repo, &text).unwrap_err();
            assert!(matches!(failed, RepoError::Misread { .. }), "{failed}");
            assert_eq!(flip::left(), 0, "{point:?}");
            assert_eq!(committed(), before);

            flip::next(point, 1);
            backup(&repo, &text).unwrap();
            assert_eq!(flip::left(), 0, "{point:?}");
            assert_eq!(committed(), before + 1);
        }
    }
}

#[test]
fn chunk_that_changes_after_it_was_hashed_ends_the_session() {
    for repo in repos() {
        for mut chunk in chunks() {
            let session = repo.begin(&SessionOptions::default()).unwrap();
            let id = repo.keys().chunk_id(&chunk);
            chunk[77] ^= 1;
            let failed = session.core.store_new(id, &chunk).unwrap_err();
            assert!(matches!(failed, RepoError::Misread { .. }), "{failed}");
            let later = session.store_chunk(&[1; 4096]).unwrap_err();
            assert!(matches!(later, RepoError::Misread { .. }), "{later}");
        }
    }
}

#[test]
fn map_node_that_changes_is_encoded_anew() {
    for repo in repos() {
        let session = repo.begin(&SessionOptions::default()).unwrap();
        let [noise, text] = chunks();
        let mut map = session.map_writer(None, 128 << 10).unwrap();
        map.put(0, session.store_chunk(&noise).unwrap().entry.unwrap())
            .unwrap();
        flip::next(Point::Compressed, 1);
        let root = map.finish().unwrap();
        assert_eq!(flip::left(), 0);
        session.core.packs.finish().unwrap();
        let entry = repo.map(&root, 1).unwrap().chunk(0).unwrap().unwrap();
        assert_eq!(entry.id, repo.keys().chunk_id(&noise));

        let mut map = session.map_writer(None, 128 << 10).unwrap();
        map.put(0, session.store_chunk(&text).unwrap().entry.unwrap())
            .unwrap();
        flip::next(Point::Compressed, 2);
        let failed = map.finish().unwrap_err();
        assert!(matches!(failed, RepoError::Misread { .. }), "{failed}");
    }
}

#[test]
fn what_is_not_verified_is_stored_as_it_became() {
    let [repo, _] = repos();
    let options = SessionOptions {
        verify_writes: false,
        ..SessionOptions::default()
    };
    let session = repo.begin(&options).unwrap();
    let [_, text] = chunks();
    flip::next(Point::Compressed, 1);
    session.store_chunk(&text).unwrap();
    assert_eq!(session.meters().verify.total(), std::time::Duration::ZERO);
}
