//! Encryption of records and small texts: AES-256-GCM under keys that are used for one pack, or one text, only.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::error::RepoError;
use super::format::pack::PackKind;
use super::ids::{PackId, RepoUuid, random_bytes};

/// Whether and how a repository is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encryption {
    /// Chunks, maps and snapshots are stored in the clear.
    #[default]
    None,
    /// Chunks, maps and snapshots are encrypted and authenticated with AES-256-GCM.
    Aes256Gcm,
}

impl Encryption {
    /// The word for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Aes256Gcm => "aes-256-gcm",
        }
    }

    /// The code that `config` and the flags of records hold.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Aes256Gcm => 1,
        }
    }

    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::None),
            1 => Some(Self::Aes256Gcm),
            _ => None,
        }
    }
}

/// What the cipher adds to what it seals.
pub(crate) const TAG_LEN: usize = 16;

/// The cipher of one pack; the offset of a record is its nonce, so that none is used twice.
pub(crate) struct PackCipher {
    key: LessSafeKey,
    repo: RepoUuid,
    kind: PackKind,
}

impl PackCipher {
    /// Takes the key of the packs of one kind.
    pub(super) fn new(kind_key: &[u8; 32], repo: RepoUuid, kind: PackKind, pack: &PackId) -> Self {
        let key = blake3::keyed_hash(kind_key, pack.as_bytes());
        Self {
            key: cipher(key.as_bytes()),
            repo,
            kind,
        }
    }

    /// Encrypts a record that will stand at `offset`, in place, and appends the tag.
    pub(crate) fn seal(
        &self,
        offset: u32,
        id: &[u8; 32],
        record: &mut Vec<u8>,
    ) -> Result<(), RepoError> {
        self.key
            .seal_in_place_append_tag(nonce(offset), Aad::from(self.bound_to(id)), record)
            .map_err(|_| RepoError::misuse("a record is too long to be encrypted"))
    }

    /// Decrypts the record that stands at `offset` into `plain`; false when it is not what was sealed there.
    pub(crate) fn open(
        &self,
        offset: u32,
        id: &[u8; 32],
        sealed: &[u8],
        plain: &mut Vec<u8>,
    ) -> bool {
        let Some((sealed, tag)) = sealed
            .len()
            .checked_sub(TAG_LEN)
            .and_then(|at| sealed.split_at_checked(at))
        else {
            return false;
        };
        plain.resize(sealed.len(), 0);
        let aad = Aad::from(self.bound_to(id));
        self.key
            .open_separate_gather(nonce(offset), aad, sealed, tag, plain)
            .is_ok()
    }

    /// What a record belongs to: it opens nowhere else.
    fn bound_to(&self, id: &[u8; 32]) -> [u8; 49] {
        let mut bytes = [0; 49];
        bytes[..16].copy_from_slice(self.repo.as_bytes());
        bytes[16] = self.kind.code();
        bytes[17..].copy_from_slice(id);
        bytes
    }
}

impl std::fmt::Debug for PackCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackCipher({:?})", self.kind)
    }
}

/// Encrypts a small text under a key of its own: 16 random bytes, which that key is made with, then text and tag.
pub(crate) fn seal_text(
    key: &[u8; 32],
    bound_to: &[u8],
    mut text: Vec<u8>,
) -> Result<Vec<u8>, RepoError> {
    let salt: [u8; SALT_LEN] = random_bytes()?;
    seal_once(
        blake3::keyed_hash(key, &salt).as_bytes(),
        bound_to,
        &mut text,
    )?;
    Ok([&salt[..], &text].concat())
}

/// Decrypts what [`seal_text`] made; `None` when it was not made with this key for this purpose.
pub(crate) fn open_text(key: &[u8; 32], bound_to: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (salt, sealed) = sealed.split_at_checked(SALT_LEN)?;
    open_once(
        blake3::keyed_hash(key, salt).as_bytes(),
        bound_to,
        sealed.to_vec(),
    )
}

/// Encrypts under a key that encrypts nothing else, and appends the tag.
pub(crate) fn seal_once(
    key: &[u8; 32],
    bound_to: &[u8],
    text: &mut Vec<u8>,
) -> Result<(), RepoError> {
    cipher(key)
        .seal_in_place_append_tag(nonce(0), Aad::from(bound_to), text)
        .map_err(|_| RepoError::misuse("a text is too long to be encrypted"))
}

/// Decrypts what [`seal_once`] made.
pub(crate) fn open_once(key: &[u8; 32], bound_to: &[u8], mut sealed: Vec<u8>) -> Option<Vec<u8>> {
    let len = cipher(key)
        .open_in_place(nonce(0), Aad::from(bound_to), &mut sealed)
        .ok()?
        .len();
    sealed.truncate(len);
    Some(sealed)
}

fn cipher(key: &[u8; 32]) -> LessSafeKey {
    let key = UnboundKey::new(&AES_256_GCM, key).expect("the cipher takes keys of 32 bytes");
    LessSafeKey::new(key)
}

fn nonce(number: u32) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

const SALT_LEN: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn pack_cipher(kind: PackKind, repo: u8, pack: u8) -> PackCipher {
        let repo = RepoUuid::from_bytes([repo; 16]);
        PackCipher::new(&[1; 32], repo, kind, &PackId::from_bytes([pack; 16]))
    }

    #[test]
    fn record_opens_where_it_was_sealed_and_nowhere_else() {
        let of = pack_cipher(PackKind::Data, 1, 1);
        let mut record = b"a record".to_vec();
        of.seal(72, &[9; 32], &mut record).unwrap();
        assert_eq!(record.len(), 8 + TAG_LEN);
        let mut plain = vec![7; 100];
        assert!(of.open(72, &[9; 32], &record, &mut plain));
        assert_eq!(plain, b"a record");
        assert!(!of.open(73, &[9; 32], &record, &mut plain), "offset");
        assert!(!of.open(72, &[8; 32], &record, &mut plain), "id");
        for other in [
            pack_cipher(PackKind::Meta, 1, 1),
            pack_cipher(PackKind::Data, 2, 1),
            pack_cipher(PackKind::Data, 1, 2),
        ] {
            assert!(!other.open(72, &[9; 32], &record, &mut plain), "{other:?}");
        }
        for at in 0..record.len() {
            record[at] ^= 4;
            assert!(!of.open(72, &[9; 32], &record, &mut plain), "{at}");
            record[at] ^= 4;
        }
        for len in 0..record.len() {
            assert!(!of.open(72, &[9; 32], &record[..len], &mut plain), "{len}");
        }
    }

    #[test]
    fn text_opens_with_its_key_and_purpose_only() {
        let sealed = seal_text(&[1; 32], b"label", b"text".to_vec()).unwrap();
        let again = seal_text(&[1; 32], b"label", b"text".to_vec()).unwrap();
        assert_ne!(sealed, again);
        assert_eq!(open_text(&[1; 32], b"label", &sealed).unwrap(), b"text");
        assert_eq!(open_text(&[2; 32], b"label", &sealed), None);
        assert_eq!(open_text(&[1; 32], b"title", &sealed), None);
        for len in 0..sealed.len() {
            assert_eq!(open_text(&[1; 32], b"label", &sealed[..len]), None, "{len}");
        }
    }
}
