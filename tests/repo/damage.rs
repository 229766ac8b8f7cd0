//! Damage to each kind of file: what is returned is right or an error, and what can be healed is.

use std::sync::Arc;

use nbdbackup::repo::{MemoryStorage, PackKind, RepoError, Repository, Storage};

use crate::support::*;

fn sample() -> Sample {
    Sample::two_backups(new_repo())
}

/// Reads all that a damaged repository still gives; panics on wrong data. Returns how many disks were read.
fn read_all(sample: &Sample, storage: &MemoryStorage, what: &str) -> usize {
    let Ok(repo) = open_any(Arc::new(storage.clone())) else {
        return 0;
    };
    let list = repo.snapshots().unwrap();
    assert_eq!(
        list.snapshots.len() + list.unreadable.len(),
        storage.list("snap/").unwrap().len(),
        "{what}: a snapshot is neither listed nor reported"
    );
    let ids: std::collections::HashSet<_> = list.snapshots.iter().map(|s| s.id).collect();
    assert_eq!(
        ids.len(),
        list.snapshots.len(),
        "{what}: one snapshot under two names"
    );
    let mut good = 0;
    for snapshot in &list.snapshots {
        let (_, disk) = sample
            .disks
            .iter()
            .find(|(id, _)| *id == snapshot.id)
            .unwrap();
        if let Ok(read) = restore(&repo, &snapshot.id) {
            assert!(read == *disk, "{what}: wrong data");
            good += 1;
        }
    }
    good
}

/// Whether the repository is still whole without this file.
fn spare(name: &str) -> bool {
    name.starts_with("idx/") || name.starts_with("config") || name.starts_with("keys/")
}

#[test]
fn flipped_bit_in_any_byte_of_any_file_gives_no_wrong_data() {
    flip_each_bit(&sample());
}

#[test]
fn flipped_bit_in_any_byte_of_an_encrypted_file_gives_no_wrong_data() {
    flip_each_bit(&Sample::two_backups(new_encrypted_repo()));
}

fn flip_each_bit(sample: &Sample) {
    let mut harmless = Vec::new();
    for file in sample.storage.list("").unwrap() {
        let good = sample.storage.read(&file.name, u64::MAX).unwrap();
        // Index pages are mostly padding; a byte in sixteen of these will do.
        let step = if file.name.starts_with("idx/") { 16 } else { 1 };
        for at in (0..good.len()).step_by(step) {
            let damaged = copy(&sample.storage);
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            damaged.damage(&file.name, bytes);
            let read = read_all(sample, &damaged, &format!("{} at {at}", file.name));
            if spare(&file.name) {
                assert_eq!(read, 2, "{} at {at}: not made up for", file.name);
            } else if read == 2 {
                harmless.push((file.name.clone(), at));
            }
        }
    }
    // In packs the header, the footer and the trailer are not needed to read; elsewhere every byte is.
    assert!(harmless.iter().all(|(name, _)| !name.starts_with("snap/")));
    assert!(!harmless.is_empty());
}

#[test]
fn truncated_zeroed_missing_and_swapped_files_give_no_wrong_data() {
    let sample = sample();
    let files = sample.storage.list("").unwrap();
    for (number, file) in files.iter().enumerate() {
        let good = sample.storage.read(&file.name, u64::MAX).unwrap();
        let other = &files[(number + 1) % files.len()].name;
        let other_bytes = sample.storage.read(other, u64::MAX).unwrap();
        let mut variants = vec![
            Vec::new(),
            good[..good.len() / 2].to_vec(),
            good[..good.len() - 1].to_vec(),
            [good.clone(), vec![0]].concat(),
            vec![0; good.len()],
            vec![0xff; good.len() * 3],
            other_bytes,
        ];
        for same_kind in files
            .iter()
            .filter(|f| f.name != file.name && f.name[..4] == file.name[..4])
        {
            variants.push(sample.storage.read(&same_kind.name, u64::MAX).unwrap());
        }
        for (variant, bytes) in variants.into_iter().enumerate() {
            let same = bytes == good;
            let damaged = copy(&sample.storage);
            damaged.damage(&file.name, bytes);
            let what = format!("{} variant {variant}", file.name);
            let read = read_all(&sample, &damaged, &what);
            assert!(same || !spare(&file.name) || read == 2, "{what}");
        }
        let damaged = copy(&sample.storage);
        damaged.remove(&file.name).unwrap();
        let read = read_all(&sample, &damaged, &format!("{} removed", file.name));
        assert!(!spare(&file.name) || read == 2, "{} removed", file.name);
    }
}

#[test]
fn damaged_index_is_reported_and_backups_go_on() {
    let sample = sample();
    let storage = copy(&sample.storage);
    for file in storage.list("idx/").unwrap() {
        let mut bytes = storage.read(&file.name, u64::MAX).unwrap();
        let at = bytes.len() - 60;
        bytes[at] ^= 1;
        storage.damage(&file.name, bytes);
    }
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    let (_, disk) = &sample.disks[1];
    let snapshot = backup(&repo, disk).unwrap();
    assert_eq!(repo.damaged().len(), 2, "{:?}", repo.damaged());
    assert!(!snapshot.packs.is_empty(), "nothing was known any more");
    assert!(restore(&repo, &snapshot.id).unwrap() == *disk);
}

#[test]
fn lost_index_is_rebuilt_from_the_packs_alone() {
    let sample = sample();
    let storage = copy(&sample.storage);
    for file in storage.list("idx/").unwrap() {
        storage.remove(&file.name).unwrap();
    }
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    let rebuilt = repo.rebuild_index().unwrap();
    assert!(rebuilt.unreadable.is_empty(), "{:?}", rebuilt.unreadable);
    let packs = storage.list("packs/").unwrap().len() + storage.list("meta/").unwrap().len();
    assert_eq!(rebuilt.packs, packs as u64);
    assert_eq!(repo.rebuild_index().unwrap().packs, 0);
    for (_, disk) in &sample.disks {
        assert_eq!(backup(&repo, disk).unwrap().packs, []);
    }
}

#[test]
fn damaged_footer_is_never_taken_into_the_index() {
    let sample = sample();
    for folder in ["packs/", "meta/"] {
        let file = sample.storage.list(folder).unwrap().remove(0);
        let good = sample.storage.read(&file.name, u64::MAX).unwrap();
        let trailer = good.len() - 44;
        let footer_len: [u8; 4] = good[trailer..trailer + 4].try_into().unwrap();
        let footer = trailer - u32::from_le_bytes(footer_len) as usize;
        for at in (0..72).chain(footer..good.len()) {
            let damaged = copy(&sample.storage);
            for file in damaged.list("idx/").unwrap() {
                damaged.remove(&file.name).unwrap();
            }
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            damaged.damage(&file.name, bytes);
            let repo = Repository::open(Arc::new(damaged)).unwrap();
            let rebuilt = repo.rebuild_index().unwrap();
            assert_eq!(rebuilt.unreadable.len(), 1, "{folder} at {at}");
            assert_eq!(rebuilt.unreadable[0].0, file.name);
        }
    }
}

#[test]
fn children_moved_within_a_map_node_are_seen() {
    let sample = sample();
    let damaged = copy(&sample.storage);
    for file in damaged.list("meta/").unwrap() {
        let mut bytes = damaged.read(&file.name, u64::MAX).unwrap();
        // The first node's presence bits: chunks 0, 1 and 3 become 0, 2 and 3.
        assert_eq!(bytes[72 + 4], 0b1011);
        bytes[72 + 4] = 0b1101;
        damaged.damage(&file.name, bytes);
    }
    assert_eq!(read_all(&sample, &damaged, "moved"), 0);
}

#[test]
fn lost_chunks_are_found_elsewhere_once_they_were_stored_again() {
    let sample = sample();
    let storage = copy(&sample.storage);
    for file in storage.list("packs/").unwrap() {
        storage.remove(&file.name).unwrap();
    }
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    assert!(restore(&repo, &sample.disks[0].0).is_err());
    // The maps are known and stay as they are, with their stale hints.
    for (_, disk) in &sample.disks {
        let again = backup(&repo, disk).unwrap();
        let kinds: Vec<_> = again.packs.iter().map(|p| p.kind).collect();
        assert_eq!(kinds, [PackKind::Data]);
    }
    for (id, disk) in &sample.disks {
        assert!(restore(&repo, id).unwrap() == *disk, "not healed");
    }
}

#[test]
fn stale_hint_falls_back_to_the_index_and_a_later_backup_heals() {
    let sample = sample();
    let storage = copy(&sample.storage);
    for folder in ["packs/", "meta/"] {
        for file in storage.list(folder).unwrap() {
            storage.remove(&file.name).unwrap();
        }
    }
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    for (id, _) in &sample.disks {
        let lost = restore(&repo, id);
        assert!(matches!(lost, Err(RepoError::Lost { .. })), "{lost:?}");
    }
    // The packs that the index still names are not taken for there, so that all is stored again.
    for (_, disk) in &sample.disks {
        assert!(!backup(&repo, disk).unwrap().packs.is_empty());
    }
    for (id, disk) in &sample.disks {
        assert!(restore(&repo, id).unwrap() == *disk, "not healed");
    }
}
