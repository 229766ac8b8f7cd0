//! A hostile writer who has the files but no key: forged footers that fit their checksums, and other bytes under a true id.

use nbdbackup::repo::{CheckOptions, Checked, MemoryStorage, Repository, Storage};

use crate::prune::{at_once, noise};
use crate::support::*;

const ENTRY: usize = 49;

fn check(repo: &Repository, repair: bool) -> Checked {
    let options = CheckOptions {
        read_data_percent: Some(100.0),
        repair,
        now_unix_nanos: 5,
    };
    repo.check(&options, &|_, _| {}).unwrap()
}

/// A pack cut into its start, its records and its footer's entries.
fn parts(pack: &[u8]) -> (Vec<u8>, Vec<u8>, Vec<Vec<u8>>) {
    let trailer = pack.len() - 44;
    let len = u32::from_le_bytes(pack[trailer..trailer + 4].try_into().unwrap()) as usize;
    let footer = trailer - len;
    let entries = pack[footer..trailer].chunks(ENTRY).map(<[u8]>::to_vec);
    (
        pack[..72].to_vec(),
        pack[72..footer].to_vec(),
        entries.collect(),
    )
}

/// A pack whose checksums all fit.
fn joined(start: &[u8], records: &[u8], entries: &[Vec<u8>]) -> Vec<u8> {
    let footer = entries.concat();
    let mut hasher = blake3::Hasher::new();
    hasher.update(start).update(&footer);
    let end = [0x89, 0x6b, 0x62, 0x64, 0x62, 0x6e, 0x0d, 0x0a];
    let len = (footer.len() as u32).to_le_bytes();
    let sum = hasher.finalize();
    [start, records, &footer, &len, sum.as_bytes(), &end].concat()
}

fn set(entry: &mut [u8], at: usize, value: u32) {
    entry[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Every way to lie in a footer, and in the records under it.
fn forgeries(pack: &[u8]) -> Vec<(String, Vec<u8>)> {
    let (start, records, entries) = parts(pack);
    let mut forged = Vec::new();
    let mut with = |what: String, records: &[u8], entries: &[Vec<u8>]| {
        forged.push((what, joined(&start, records, entries)));
    };
    with("no entries".into(), &records, &[]);
    with("no records".into(), &[], &entries);
    with(
        "all twice".into(),
        &records,
        &[entries.clone(), entries.clone()].concat(),
    );
    let many: Vec<Vec<u8>> = (0..65_537).map(|_| entries[0].clone()).collect();
    with("too many".into(), &records, &many);
    for place in 0..entries.len() {
        for (field, at) in [("offset", 32), ("length", 36)] {
            for value in [0, 1, 71, 73, 1 << 24, (1 << 24) - 1, u32::MAX] {
                let mut entries = entries.clone();
                set(&mut entries[place], at, value);
                with(format!("{field} {value} in {place}"), &records, &entries);
            }
        }
        for flags in [0x00, 0x01, 0x10, 0x11, 0x02, 0xff] {
            let mut entries = entries.clone();
            entries[place][40] = flags;
            with(format!("flags {flags:#x} in {place}"), &records, &entries);
        }
        // The identifier of another record, or of none.
        for id in [
            entries[(place + 1) % entries.len()][..32].to_vec(),
            vec![7; 32],
        ] {
            let mut entries = entries.clone();
            entries[place][..32].copy_from_slice(&id);
            with(format!("another id in {place}"), &records, &entries);
        }
        // Other bytes under the true identifier, with the checksum that fits them.
        let offset = u32::from_le_bytes(entries[place][32..36].try_into().unwrap()) as usize - 72;
        let len = u32::from_le_bytes(entries[place][36..40].try_into().unwrap()) as usize;
        let mut poisoned = records.clone();
        poisoned[offset + len / 2] ^= 1;
        let mut entries = entries.clone();
        let sum = blake3::hash(&poisoned[offset..offset + len]);
        entries[place][41..].copy_from_slice(&sum.as_bytes()[..8]);
        with(format!("other bytes in {place}"), &poisoned, &entries);
    }
    forged
}

#[test]
fn forged_footers_and_poisoned_records_are_never_believed_and_are_healed() {
    let mut tried = 0;
    for (whole, repo) in [new_repo(), new_encrypted_repo()] {
        let disk = noise(1, 3);
        let id = backup(&repo, &disk).unwrap().id;
        let packs = [whole.list("packs/").unwrap(), whole.list("meta/").unwrap()].concat();
        for pack in packs {
            let bytes = whole.read(&pack.name, u64::MAX).unwrap();
            for (what, forged) in forgeries(&bytes) {
                if forged == bytes {
                    continue;
                }
                tried += 1;
                let what = format!("{}, {what}", pack.name);
                // With the index that was there, and with one that was made of what was forged.
                for made_anew in [false, true] {
                    let storage = copy(&whole);
                    storage.damage(&pack.name, forged.clone());
                    if made_anew {
                        for file in storage.list("idx/").unwrap() {
                            storage.remove(&file.name).unwrap();
                        }
                        open(&storage).rebuild_index().unwrap();
                    }
                    live_on(&storage, (&id, &disk), &what);
                }
            }
        }
    }
    println!("{tried} forgeries");
    assert!(tried > 100, "{tried}");
}

/// Reads, stores, checks and prunes beside what was forged.
fn live_on(storage: &MemoryStorage, (id, disk): (&nbdbackup::repo::SnapshotId, &[u8]), what: &str) {
    let reads = |when: &str| match restore(&open(storage), id) {
        Ok(read) => assert!(read == disk, "{what}, {when}: wrong data"),
        Err(error) => assert!(when != "healed", "{what}, {when}: {error}"),
    };
    reads("at once");
    let other = noise(2, 2);
    let stored = backup(&open(storage), &other).unwrap().id;
    let found = check(&open(storage), true);
    assert!(found.files_total > 0, "{what}: not noticed");
    backup(&open(storage), disk).unwrap();
    reads("healed");
    for _ in 0..2 {
        open(storage)
            .prune(&at_once())
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        reads("healed");
    }
    assert!(restore(&open(storage), &stored).unwrap() == other, "{what}");
}

#[test]
fn pack_that_claims_the_chunks_of_others_is_found_out_and_what_refers_to_it_is_healed() {
    for (storage, repo) in [new_repo(), new_encrypted_repo()] {
        let disk = noise(1, 3);
        let id = backup(&repo, &disk).unwrap().id;
        // A copy of the pack under a new name, with other bytes in each record, put into the index by a rebuild.
        let pack = storage.list("packs/").unwrap().remove(0);
        let bytes = storage.read(&pack.name, u64::MAX).unwrap();
        let (mut start, mut records, mut entries) = parts(&bytes);
        start[48..64].copy_from_slice(&[0xee; 16]);
        let sum = blake3::hash(&start[..64]);
        start[64..72].copy_from_slice(&sum.as_bytes()[..8]);
        for entry in &mut entries {
            let offset = u32::from_le_bytes(entry[32..36].try_into().unwrap()) as usize - 72;
            let len = u32::from_le_bytes(entry[36..40].try_into().unwrap()) as usize;
            records[offset + 5] ^= 1;
            let sum = blake3::hash(&records[offset..offset + len]);
            entry[41..].copy_from_slice(&sum.as_bytes()[..8]);
        }
        let name = format!("packs/ee/{}", "ee".repeat(16));
        storage.damage(&name, joined(&start, &records, &entries));
        assert_eq!(open(&storage).rebuild_index().unwrap().packs, 1);
        // Whoever stores the same now may refer to the forged pack, and still reads the true bytes.
        let next = backup(&open(&storage), &disk).unwrap().id;
        for id in [&id, &next] {
            assert!(restore(&open(&storage), id).unwrap() == disk);
        }
        let found = check(&open(&storage), true);
        assert!(found.files.iter().any(|f| f.file == name), "{found:?}");
        assert!(found.marked > 0 && found.ranges_total == 0, "{found:?}");
        for _ in 0..2 {
            open(&storage).prune(&at_once()).unwrap();
        }
        for id in [&id, &next] {
            assert!(restore(&open(&storage), id).unwrap() == disk);
        }
        assert!(check(&open(&storage), true).is_whole());
    }
}
