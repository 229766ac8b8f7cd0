//! Encrypted repositories: what can be read without a key, what opens them, and key slots under crashes and races.

use std::sync::Arc;

use nbdbackup::repo::{
    Encryption, MemoryStorage, PasswordCost, RepoError, Repository, Secret, SecretKind,
    SnapshotDraft, Storage,
};

use crate::support::*;

pub(crate) fn password(text: &str) -> Secret {
    Secret::password(text.as_bytes().to_vec()).unwrap()
}

fn open(storage: &MemoryStorage, secret: &Secret) -> Result<Arc<Repository>, RepoError> {
    Repository::open_with(Arc::new(storage.clone()), Some(secret))
}

fn numbers(repo: &Repository) -> Vec<u32> {
    repo.key_slots().unwrap().iter().map(|s| s.number).collect()
}

#[test]
fn disks_survive_encryption_in_every_way_of_reading() {
    let (storage, repo) = new_encrypted_repo();
    assert_eq!(repo.encryption(), Encryption::Aes256Gcm);
    let mut rng = Rng(31);
    let disk = some_disk(&mut rng, 300 * CHUNK + 77);
    let id = backup(&repo, &disk).unwrap().id;
    let repo = open(&storage, &key_file()).unwrap();
    assert!(restore(&repo, &id).unwrap() == disk);
    assert_eq!(backup(&repo, &disk).unwrap().packs, []);
    let snapshot = repo.snapshot(&id).unwrap();
    let map = repo
        .map(&snapshot.draft.disks[0].root, disk.len() as u64)
        .unwrap();
    let mut out = Vec::new();
    for (number, want) in disk.chunks(CHUNK).enumerate() {
        if let Some(entry) = map.chunk(number as u64).unwrap() {
            repo.read_chunk(&entry, want.len() as u32, &mut out)
                .unwrap();
            assert!(out == want, "{number}");
        }
    }
}

#[test]
fn nothing_of_the_user_stands_in_any_file() {
    let (storage, repo) = new_encrypted_repo();
    repo.add_key(&password("second"), cheap(), Some("the-label"))
        .unwrap();
    let session = repo.begin(&small_session()).unwrap();
    let mut disk = vec![0; 3 * CHUNK];
    Rng(7).fill(&mut disk[..CHUNK]);
    disk[CHUNK..CHUNK + 14].copy_from_slice(b"plain-contents");
    let (root, _) = store_disk(&session, &disk).unwrap();
    let mut words = draft("the-disk", disk.len() as u64, root);
    words.name = "the-machine".to_owned();
    words.tags = vec!["the-tag".to_owned()];
    words.disks[0].source = "nbd://the-source".to_owned();
    words.disks[0].bitmap_used = Some("the-bitmap".to_owned());
    let id = session.commit(words.clone()).unwrap().id;
    let secrets = [
        &b"the-"[..],
        b"plain-contents",
        b"second",
        &disk[..16],
        &[9; 32],
    ];
    for file in storage.list("").unwrap() {
        let bytes = storage.read(&file.name, u64::MAX).unwrap();
        for secret in secrets {
            let found = bytes.windows(secret.len()).any(|w| w == secret);
            assert!(!found, "{} holds {secret:?}", file.name);
        }
    }
    let repo = open(&storage, &password("second")).unwrap();
    let read = repo.snapshot(&id).unwrap();
    assert_eq!(read.draft, words);
    let slots = repo.key_slots().unwrap();
    assert_eq!(slots[1].label.as_deref(), Some("the-label"));
    assert_eq!(slots[1].kind, SecretKind::Password);
    assert_eq!(slots[1].cost, Some(cheap()));
    assert!(slots[1].current && !slots[0].current);
    assert!(restore(&repo, &id).unwrap() == disk);
}

#[test]
fn only_the_right_secret_opens_and_a_plain_repository_takes_none() {
    let (storage, _) = new_encrypted_repo();
    let none = Repository::open(Arc::new(storage.clone()));
    assert!(matches!(none, Err(RepoError::SecretNeeded)), "{none:?}");
    for wrong in [
        password("wrong"),
        Secret::key_file(vec![8; 64]).unwrap(),
        Secret::key_file(vec![9; 63]).unwrap(),
    ] {
        let refused = open(&storage, &wrong);
        assert!(matches!(refused, Err(RepoError::WrongSecret { .. })));
    }
    assert!(open(&storage, &key_file()).is_ok());
    let (plain, _) = new_repo();
    let refused = open(&plain, &key_file());
    assert!(matches!(refused, Err(RepoError::NotEncrypted)));
}

#[test]
fn key_in_the_clear_beside_the_slots_gives_nothing() {
    let (storage, _) = new_encrypted_repo();
    let (plain, _) = new_repo();
    let clear = plain.read("keys/0", 1 << 20).unwrap();
    for name in ["keys/1", "keys/1.bak"] {
        storage.damage(name, clear.clone());
    }
    assert!(Repository::open(Arc::new(storage.clone())).is_err());
    assert!(open(&storage, &key_file()).is_ok());
}

#[test]
fn record_moved_within_or_between_packs_is_refused() {
    let (storage, repo) = new_encrypted_repo();
    // Chunks that do not shrink have records of one length.
    let mut disk = vec![0; 4 * CHUNK];
    getrandom(&mut disk);
    let id = backup(&repo, &disk).unwrap().id;
    let name = storage.list("packs/").unwrap().remove(0).name;
    let mut pack = storage.read(&name, u64::MAX).unwrap();
    let len = CHUNK + 16;
    let (first, second) = pack[72..72 + 2 * len].split_at_mut(len);
    first.swap_with_slice(second);
    storage.damage(&name, pack);
    let repo = open(&storage, &key_file()).unwrap();
    assert!(matches!(
        restore(&repo, &id),
        Err(RepoError::Corrupt { .. })
    ));
}

#[test]
fn keys_are_added_changed_and_removed_and_never_the_last() {
    let (storage, repo) = new_encrypted_repo();
    let id = backup(&repo, &[3; 2 * CHUNK]).unwrap().id;
    assert_eq!(numbers(&repo), [0]);
    let last = repo.remove_key(0);
    assert!(matches!(last, Err(RepoError::LastKey { number: 0 })));
    assert!(
        open(&storage, &key_file()).is_ok(),
        "a refusal changes nothing"
    );
    assert_eq!(storage.list("keys/").unwrap().len(), 2);

    assert_eq!(repo.add_key(&password("a"), cheap(), None).unwrap(), 1);
    let a = open(&storage, &password("a")).unwrap();
    assert_eq!(a.change_key(&password("b"), cheap(), None).unwrap(), (2, 1));
    assert!(open(&storage, &password("a")).is_err());
    let b = open(&storage, &password("b")).unwrap();
    b.remove_key(0).unwrap();
    assert!(open(&storage, &key_file()).is_err());
    assert!(matches!(b.remove_key(0), Err(RepoError::NoSuchKey { .. })));
    assert!(matches!(b.remove_key(2), Err(RepoError::LastKey { .. })));
    assert_eq!(numbers(&b), [2]);
    assert!(restore(&b, &id).unwrap() == [3; 2 * CHUNK]);
    let (_, plain) = new_repo();
    let refused = plain.add_key(&password("a"), cheap(), None);
    assert!(matches!(refused, Err(RepoError::NotEncrypted)));
}

#[test]
fn slots_are_limited() {
    let (_, repo) = new_encrypted_repo();
    let added = (0..40)
        .take_while(|_| repo.add_key(&key_file(), cheap(), None).is_ok())
        .count();
    assert_eq!(added, 31);
}

#[test]
fn either_copy_of_a_slot_is_enough() {
    let (storage, _) = new_encrypted_repo();
    for lost in ["keys/0", "keys/0.bak"] {
        let one = storage.after_power_failure(|_| true);
        one.remove(lost).unwrap();
        assert!(open(&one, &key_file()).is_ok(), "{lost}");
        one.damage(lost, vec![1; 200]);
        let repo = open(&one, &key_file()).unwrap();
        assert_eq!(repo.damaged().len(), usize::from(lost == "keys/0"));
    }
}

#[test]
fn two_that_remove_each_others_keys_leave_one() {
    for _ in 0..200 {
        let (storage, repo) = new_encrypted_repo();
        repo.add_key(&password("a"), cheap(), None).unwrap();
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = [0, 1]
                .into_iter()
                .map(|slot| {
                    let repo = Arc::clone(&repo);
                    scope.spawn(move || repo.remove_key(slot))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let opens = [key_file(), password("a")]
            .iter()
            .filter(|secret| open(&storage, secret).is_ok())
            .count();
        assert!(opens > 0, "{results:?}");
    }
}

type KeyCommand = fn(&Repository) -> Result<(), RepoError>;

/// The commands on keys, for whoever has opened with the password `old` of slot 1.
pub(crate) const KEY_COMMANDS: [(&str, KeyCommand); 3] = [
    ("add", |r| {
        r.add_key(&password("new"), cheap(), None).map(drop)
    }),
    ("remove", |r| r.remove_key(1)),
    ("change", |r| {
        r.change_key(&password("new"), cheap(), None).map(drop)
    }),
];

/// Checks which of the passwords `old` and `new` open after one of these, which said that it was done or was not.
pub(crate) fn assert_opens(command: &str, done: bool, old: bool, new: bool, what: &str) {
    match (command, done) {
        ("add", true) => assert!(old && new, "{what}"),
        ("remove", true) => assert!(!old, "{what}"),
        ("change", true) => assert!(new && !old, "{what}"),
        ("add", false) => assert!(old, "{what}"),
        ("change", false) => assert!(old || new, "{what}"),
        _ => {}
    }
}

#[test]
fn key_commands_that_die_at_any_call_lock_nobody_out() {
    for (name, command) in KEY_COMMANDS {
        for at in 1.. {
            let (storage, repo) = new_encrypted_repo();
            repo.add_key(&password("old"), cheap(), None).unwrap();
            drop(repo);
            storage.barrier().unwrap();
            let faulty = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Dead);
            let opened = Repository::open_with(Arc::new(faulty.clone()), Some(&password("old")));
            let done = opened.and_then(|repo| command(&repo)).is_ok();
            for (left, after) in power_failures(&storage, at) {
                let what = format!("{name} call {at}, {left} left");
                let other = open(&after, &key_file()).unwrap_or_else(|e| panic!("{what}: {e}"));
                let (old, new) = (
                    open(&after, &password("old")).is_ok(),
                    open(&after, &password("new")).is_ok(),
                );
                assert_opens(name, done, old, new, &what);
                // What was begun can be ended.
                if name == "remove" && !done && numbers(&other).contains(&1) {
                    other.remove_key(1).unwrap();
                    assert!(open(&after, &password("old")).is_err(), "{what}");
                    assert!(
                        after.list("keys/").unwrap().len() == 2,
                        "{what}: a mark is left"
                    );
                }
            }
            if done && faulty.calls() < at {
                println!("key {name}: {} calls", at - 1);
                break;
            }
        }
    }
}

#[test]
fn encrypted_init_that_dies_at_any_call_can_be_done_again() {
    for at in 1.. {
        let storage = MemoryStorage::new();
        let init = |storage: Arc<dyn Storage>| {
            Repository::init_encrypted(storage, &options(), &key_file(), cheap())
        };
        let faulty = FaultStorage::new(Arc::new(storage.clone()), at, Fault::Dead);
        let done = init(Arc::new(faulty.clone())).is_ok();
        for (left, after) in power_failures(&storage, at) {
            let repo = match open(&after, &key_file()) {
                Ok(repo) => repo,
                Err(RepoError::NotARepository { .. }) => {
                    assert!(!done);
                    if !after.list("").unwrap().is_empty() {
                        // What is left is not taken up as something else.
                        let plain = Repository::init(Arc::new(after.clone()), &options());
                        assert!(matches!(plain, Err(RepoError::NotEmpty { .. })));
                    }
                    init(Arc::new(after)).unwrap()
                }
                Err(other) => panic!("call {at}, {left} left: {other:?}"),
            };
            assert_eq!(repo.encryption(), Encryption::Aes256Gcm);
            backup(&repo, &[7; 3 * CHUNK]).unwrap();
        }
        if done && faulty.calls() < at {
            println!("encrypted init: {} calls", at - 1);
            break;
        }
    }
}

#[test]
fn index_of_an_encrypted_repository_is_rebuilt() {
    let (storage, repo) = new_encrypted_repo();
    let disk = some_disk(&mut Rng(8), 50 * CHUNK);
    backup(&repo, &disk).unwrap();
    for file in storage.list("idx/").unwrap() {
        storage.remove(&file.name).unwrap();
    }
    let repo = open(&storage, &key_file()).unwrap();
    repo.rebuild_index().unwrap();
    assert_eq!(backup(&repo, &disk).unwrap().packs, []);
    let draft = SnapshotDraft::default();
    let session = repo.begin(&small_session()).unwrap();
    session.commit(draft).unwrap();
}

#[test]
fn sealed_bytes_are_what_the_page_on_the_format_says() {
    use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let open = |key: &[u8], nonce: [u8; 12], aad: &[u8], sealed: &[u8]| {
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap());
        let mut bytes = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        let plain = key.open_in_place(nonce, Aad::from(aad), &mut bytes);
        plain.unwrap().to_vec()
    };
    let (storage, repo) = new_encrypted_repo();
    let disk = [5; CHUNK];
    let id = backup(&repo, &disk).unwrap().id;
    let slot = storage.read("keys/0", 1 << 20).unwrap();
    let value = |file: &[u8], tag: u16| {
        let mut at = 20;
        loop {
            let len = u32::from_le_bytes(file[at + 2..at + 6].try_into().unwrap()) as usize;
            if file[at..at + 2] == tag.to_le_bytes() {
                return file[at + 6..at + 6 + len].to_vec();
            }
            at += 6 + len;
        }
    };
    let mut hasher = blake3::Hasher::new_derive_key("nbdbackup 2026-11 key file of a slot");
    hasher.update(&value(&slot, 3)).update(&[9; 64]);
    let wrapping = hasher.finalize();
    let wrapped = value(&slot, 5);
    let master = open(
        wrapping.as_bytes(),
        [0; 12],
        b"nbdbackup master key",
        &wrapped,
    );

    let file = storage.read(&format!("snap/{id}"), 1 << 20).unwrap();
    let sealed = value(&file, 12);
    let texts = blake3::derive_key("nbdbackup 2026-11 k_text snapshots and labels", &master);
    let key = blake3::keyed_hash(&texts, &sealed[..16]);
    let aad = [&b"snapshot"[..], id.as_bytes()].concat();
    let fields = open(key.as_bytes(), [0; 12], &aad, &sealed[16..]);
    assert_eq!(fields[..13], *b"\x04\0\x07\0\0\0machine");

    let name = storage.list("packs/").unwrap().remove(0).name;
    let pack = storage.read(&name, u64::MAX).unwrap();
    let entry = &pack[pack.len() - 44 - 49..pack.len() - 44];
    assert_eq!(entry[40], 0x11, "zstd, AES-256-GCM");
    let len = u32::from_le_bytes(entry[36..40].try_into().unwrap()) as usize;
    let data = blake3::derive_key("nbdbackup 2026-11 k_data chunks", &master);
    let key = blake3::keyed_hash(&data, &pack[48..64]);
    let aad = [&pack[16..32], &[0], &entry[..32]].concat();
    let mut nonce = [0; 12];
    nonce[0] = 72;
    let frame = open(key.as_bytes(), nonce, &aad, &pack[72..72 + len]);
    assert_eq!(frame[..4], [0x28, 0xb5, 0x2f, 0xfd], "a zstd frame");
}

pub(crate) fn cheap() -> PasswordCost {
    PasswordCost::new(1 << 10, 1).unwrap()
}

fn getrandom(bytes: &mut [u8]) {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"noise");
    hasher.finalize_xof().fill(bytes);
}
