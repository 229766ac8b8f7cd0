//! Opens the repository that the samples of `docs/format.md` make up, and looks at fields where the page says they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use nbdbackup::repo::{CheckOptions, MemoryStorage, PackKind, RecordFlags, Repository, Storage};

use crate::support::*;

const PAGE: &str = include_str!("../../docs/format.md");

/// Reads the blocks that start with three backquotes and `hex NAME`.
fn samples() -> BTreeMap<String, Vec<u8>> {
    let mut samples = BTreeMap::new();
    for block in PAGE.split("```hex ").skip(1) {
        let (name, rest) = block.split_once('\n').unwrap();
        let (body, _) = rest.split_once("```").unwrap();
        let mut bytes = Vec::new();
        for word in body.split_whitespace() {
            let (byte, times) = word.split_once('*').unwrap_or((word, "1"));
            let byte = u8::from_str_radix(byte, 16).unwrap();
            bytes.extend(std::iter::repeat_n(byte, times.parse().unwrap()));
        }
        samples.insert(name.to_owned(), bytes);
    }
    samples
}

fn sample(folder: &str) -> (String, Vec<u8>) {
    let mut found = samples().into_iter().filter(|(n, _)| n.starts_with(folder));
    let one = found.next().unwrap();
    assert_eq!(found.next(), None);
    one
}

fn repo_of_the_page() -> Arc<Repository> {
    Repository::open(Arc::new(files_of_the_page())).unwrap()
}

fn files_of_the_page() -> MemoryStorage {
    let storage = MemoryStorage::new();
    for (name, bytes) in samples() {
        storage.damage(&name, bytes.clone());
        if name == "config" || name == "keys/0" {
            storage.damage(&format!("{name}.bak"), bytes);
        }
    }
    assert_eq!(storage.list("").unwrap().len(), 10);
    storage
}

#[test]
fn samples_of_the_page_are_a_whole_repository() {
    let repo = repo_of_the_page();
    assert!(repo.damaged().is_empty());
    let list = repo.snapshots().unwrap();
    assert!(list.unreadable.is_empty(), "{:?}", list.unreadable);
    let snapshot = &list.snapshots[0];
    let mut disk = vec![0; CHUNK];
    disk.extend(vec![b'a'; CHUNK]);
    disk.extend(b"hello");
    assert!(restore(&repo, &snapshot.id).unwrap() == disk);
    assert_eq!(snapshot.draft.name, "web");
    assert_eq!(snapshot.draft.tags, ["daily"]);
    assert_eq!(snapshot.draft.disks[0].disk, "vda");
    // The index of the page is whole too: nothing of this disk is new.
    let session = repo.begin(&small_session()).unwrap();
    let (root, new) = store_disk(&session, &disk).unwrap();
    assert_eq!((root.id(), new), (snapshot.draft.disks[0].root.id(), 0));
    assert_eq!(
        session.commit(draft("vda", 131_077, root)).unwrap().packs,
        []
    );
}

#[test]
fn fields_of_the_samples_are_where_the_page_says() {
    let (name, config) = sample("config");
    assert_eq!(name, "config");
    let master: [u8; 32] = sample("keys/0").1[33..65].try_into().unwrap();
    let k_mac = blake3::derive_key("nbdbackup 2026-11 k_mac config and snapshots", &master);
    for small in [&config, &sample("snap/").1] {
        assert_eq!(small[..8], *b"\x89nbdbk\r\n");
        assert_eq!(small[12..16], blake3::hash(&small[..12]).as_bytes()[..4]);
        let payload = u32::from_le_bytes(small[16..20].try_into().unwrap()) as usize;
        let (signed, ends) = small.split_at(20 + payload);
        assert_eq!(ends[..32], *blake3::hash(signed).as_bytes());
        assert_eq!(ends[32..], *blake3::keyed_hash(&k_mac, signed).as_bytes());
    }

    let (name, pack) = sample("packs/");
    let trailer = pack.len() - 44;
    let footer_len = u32::from_le_bytes(pack[trailer..trailer + 4].try_into().unwrap()) as usize;
    assert_eq!(footer_len, 2 * 49);
    let footer = &pack[trailer - footer_len..trailer];
    let hashed = [&pack[..72], footer].concat();
    assert_eq!(
        pack[trailer + 4..trailer + 36],
        *blake3::hash(&hashed).as_bytes()
    );
    let id: String = pack[48..64].iter().map(|b| format!("{b:02x}")).collect();
    assert!(name.ends_with(&id));
    let entry = &footer[49..];
    let at = u32::from_le_bytes(entry[32..36].try_into().unwrap()) as usize;
    let len = u32::from_le_bytes(entry[36..40].try_into().unwrap()) as usize;
    assert_eq!(pack[at..at + len], *b"hello");
    assert_eq!(entry[40], 0, "raw");
    assert_eq!(entry[41..], blake3::hash(b"hello").as_bytes()[..8]);
    let k_id = blake3::derive_key("nbdbackup 2026-11 k_id chunk identifiers", &master);
    assert_eq!(entry[..32], *blake3::keyed_hash(&k_id, b"hello").as_bytes());

    let (_, meta) = sample("meta/");
    let node = &meta[72..];
    assert_eq!(node[..4], [1, 0, 1, 0]);
    assert_eq!(node[4..20], 0b110_u128.to_le_bytes());
    assert_eq!(node[20..36], pack[48..64]);
    let children = [&node[36..36 + 41], &node[36 + 41..36 + 82]];
    assert_eq!(children[1][..32], entry[..32]);
    assert_eq!(
        children[1][32..],
        [[0, 92, 0, 0, 0].as_slice(), &[5, 0, 0, 0]].concat()
    );
    let k_node = blake3::derive_key("nbdbackup 2026-11 k_node map node identifiers", &master);
    let mut hasher = blake3::Hasher::new_keyed(&k_node);
    hasher.update(&[0]).update(&node[4..20]);
    hasher.update(&children[0][..32]).update(&children[1][..32]);
    let repo = repo_of_the_page();
    let snapshot = repo.snapshots().unwrap().snapshots.remove(0);
    let root = snapshot.draft.disks[0].root;
    assert_eq!(root.id().unwrap().as_bytes(), hasher.finalize().as_bytes());
    let map = repo.map(&root, 131_077).unwrap();
    assert_eq!(
        map.chunk(1).unwrap().unwrap().place.flags,
        RecordFlags::ZSTD
    );
    assert_eq!(snapshot.packs[0].kind, PackKind::Data);

    let (name, segment) = sample("idx/");
    let hash = blake3::hash(&segment).to_hex();
    assert_eq!(name, format!("idx/0/{hash}"));
    let page = &segment[4096..8192];
    assert_eq!(page[4088..4090], [3, 0]);
    assert_eq!(page[4090..], blake3::hash(&page[..4090]).as_bytes()[..6]);
    let directory = u64::from_le_bytes(segment[segment.len() - 48..][..8].try_into().unwrap());
    let directory = &segment[directory as usize..segment.len() - 48];
    assert_eq!(directory[..12], [0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(directory.len(), 28 + 2 * 17 + 8 + 32);
}

#[test]
fn packs_of_the_page_are_computed_from_its_parity() {
    let storage = files_of_the_page();
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    let options = CheckOptions {
        read_data_percent: Some(100.0),
        repair: true,
        ..CheckOptions::default()
    };
    let found = repo.check(&options, &|_, _| {}).unwrap();
    assert!(found.is_whole());
    assert_eq!((found.parity_files, found.parity_total), (2, 0));
    let packs = [sample("packs/"), sample("meta/")];
    for (name, pack) in &packs {
        let (_, bytes) = sample(&format!("parity/{}", name.split_once('/').unwrap().1));
        assert_eq!(bytes[48..52], [u8::from(name.starts_with("meta")), 1, 1, 0]);
        assert_eq!(bytes[52..56], 512_u32.to_le_bytes());
        assert_eq!(bytes[56..64], (pack.len() as u64).to_le_bytes());
        assert!(bytes[128..].starts_with(pack));
        let hash = blake3::hash(&bytes[128..]);
        assert_eq!(bytes[64..80], hash.as_bytes()[..16]);
        assert_eq!(bytes[80..96], hash.as_bytes()[..16]);
        assert_eq!(bytes[96..128], *blake3::hash(&bytes[..96]).as_bytes());
        storage.damage(name, vec![7; 90]);
    }
    let repo = Repository::open(Arc::new(storage.clone())).unwrap();
    repo.check(&options, &|_, _| {}).unwrap();
    assert_eq!(repo.repair(None).unwrap().mended.len(), 2);
    for (name, pack) in packs {
        assert_eq!(storage.read(&name, u64::MAX).unwrap(), pack);
    }
}

#[test]
fn every_filter_probe_of_the_page_agrees() {
    let (_, segment) = sample("idx/");
    let directory = u64::from_le_bytes(segment[segment.len() - 48..][..8].try_into().unwrap());
    let block = &segment[directory as usize + 28 + 2 * 17 + 8..];
    let number = |at: usize, len: usize| {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&block[at..at + len]);
        u64::from_le_bytes(bytes)
    };
    let (seed, length, count) = (number(8, 8), number(16, 4), number(20, 4));
    let filter = &segment[8192..8192 + ((count + 2) * length) as usize];
    assert_eq!(block[24..32], blake3::hash(filter).as_bytes()[..8]);
    for entry in 0..3 {
        let id = &segment[4096 + entry * 28..][..8];
        let key = u64::from_be_bytes(id.try_into().unwrap());
        let mut h = key.wrapping_add(seed);
        h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        h ^= h >> 33;
        let a = ((u128::from(h) * u128::from(count * length)) >> 64) as u64;
        let b = (a + length) ^ ((h >> 18) % length);
        let c = (a + 2 * length) ^ (h % length);
        let xored = [a, b, c].iter().fold(0, |x, at| x ^ filter[*at as usize]);
        assert_eq!(xored, (h ^ (h >> 32)) as u8);
    }
}
