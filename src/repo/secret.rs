//! What opens an encrypted repository: a password or the bytes of a key file, wiped from memory when dropped.

use std::fmt;

use argon2::{Algorithm, Argon2, Params, Version};
use zeroize::Zeroizing;

use super::error::RepoError;

/// A password, or the bytes of a key file.
pub struct Secret {
    kind: SecretKind,
    bytes: Zeroizing<Vec<u8>>,
}

/// What a secret is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecretKind {
    /// What a person remembers: it is made costly to guess.
    Password,
    /// A file of at least 32 random bytes.
    KeyFile,
}

impl SecretKind {
    /// The word for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Password => "password",
            Self::KeyFile => "key-file",
        }
    }
}

impl Secret {
    /// Takes a password as its bytes are; an empty one is refused.
    pub fn password(bytes: Vec<u8>) -> Result<Self, RepoError> {
        let bytes = Zeroizing::new(bytes);
        match bytes.is_empty() {
            true => Err(RepoError::misuse("the password is empty")),
            false => Ok(Self {
                kind: SecretKind::Password,
                bytes,
            }),
        }
    }

    /// Takes the whole content of a key file, which should be random.
    pub fn key_file(bytes: Vec<u8>) -> Result<Self, RepoError> {
        let bytes = Zeroizing::new(bytes);
        match bytes.len() < LEAST_KEY_FILE {
            true => Err(RepoError::misuse(format!(
                "the key file holds {} bytes, fewer than {LEAST_KEY_FILE}",
                bytes.len()
            ))),
            false => Ok(Self {
                kind: SecretKind::KeyFile,
                bytes,
            }),
        }
    }

    /// What this is.
    pub fn kind(&self) -> SecretKind {
        self.kind
    }

    /// Makes the key that a slot's master key is wrapped with.
    pub(crate) fn wrapping_key(
        &self,
        lock: &SlotLock,
        salt: &[u8; 16],
    ) -> Result<Zeroizing<[u8; 32]>, RepoError> {
        let mut key = Zeroizing::new([0; 32]);
        match lock {
            SlotLock::Password(cost) => {
                let failed = |e: argon2::Error| {
                    RepoError::misuse(format!("the password's key cannot be made: {e}"))
                };
                let (memory, passes, lanes) = (cost.memory_kib, cost.passes, cost.lanes);
                let params = Params::new(memory, passes, lanes, Some(32)).map_err(failed)?;
                Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                    .hash_password_into(&self.bytes, salt, &mut *key)
                    .map_err(failed)?;
            }
            SlotLock::KeyFile => {
                let mut hasher =
                    blake3::Hasher::new_derive_key("nbdbackup 2026-11 key file of a slot");
                hasher.update(salt);
                hasher.update(&self.bytes);
                *key = *hasher.finalize().as_bytes();
            }
        }
        Ok(key)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({:?})", self.kind)
    }
}

/// How a slot's key is made of its secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotLock {
    /// By argon2id, at a cost.
    Password(PasswordCost),
    /// By one hash.
    KeyFile,
}

impl SlotLock {
    pub(crate) const fn kind(&self) -> SecretKind {
        match self {
            Self::Password(_) => SecretKind::Password,
            Self::KeyFile => SecretKind::KeyFile,
        }
    }
}

/// What one guess of a password costs: argon2id's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PasswordCost {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

impl PasswordCost {
    /// Takes the memory in KiB and the number of passes over it; `None` when a limit is broken.
    ///
    /// The limits, 1 MiB to 1 GiB and 16 passes, keep a hostile slot from taking all memory, or for ever.
    pub fn new(memory_kib: u32, passes: u32) -> Option<Self> {
        Self::with_lanes(memory_kib, passes, LANES)
    }

    pub(crate) fn with_lanes(memory_kib: u32, passes: u32, lanes: u32) -> Option<Self> {
        let fits = (1 << 10..=1 << 20).contains(&memory_kib)
            && (1..=16).contains(&passes)
            && (1..=16).contains(&lanes);
        fits.then_some(Self {
            memory_kib,
            passes,
            lanes,
        })
    }

    /// The memory in KiB.
    pub const fn memory_kib(&self) -> u32 {
        self.memory_kib
    }

    /// The number of passes.
    pub const fn passes(&self) -> u32 {
        self.passes
    }

    /// The number of lanes.
    pub(crate) const fn lanes(&self) -> u32 {
        self.lanes
    }
}

impl Default for PasswordCost {
    /// 256 MiB and three passes: most of a processor's second.
    fn default() -> Self {
        Self {
            memory_kib: 256 << 10,
            passes: 3,
            lanes: LANES,
        }
    }
}

/// What several processors can work on at once, as RFC 9106 recommends.
const LANES: u32 = 4;

const LEAST_KEY_FILE: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_show_and_weak_ones_are_refused() {
        let secret = Secret::password(b"hunter2".to_vec()).unwrap();
        assert!(!format!("{secret:?}").contains("hunter"));
        assert!(Secret::password(Vec::new()).is_err());
        assert!(Secret::key_file(vec![1; 31]).is_err());
        assert!(Secret::key_file(vec![1; 32]).is_ok());
    }

    #[test]
    fn cost_beyond_the_limits_is_refused() {
        assert!(PasswordCost::new(1 << 10, 1).is_some());
        assert_eq!(PasswordCost::new((1 << 10) - 1, 1), None);
        assert_eq!(PasswordCost::new((1 << 20) + 1, 1), None);
        assert_eq!(PasswordCost::new(1 << 10, 0), None);
        assert_eq!(PasswordCost::new(1 << 10, 17), None);
        assert_eq!(PasswordCost::with_lanes(1 << 10, 1, 0), None);
    }

    #[test]
    fn password_key_depends_on_each_input() {
        let cost = PasswordCost::new(1 << 10, 2).unwrap();
        let key = |password: &str, cost, salt| {
            Secret::password(password.as_bytes().to_vec())
                .unwrap()
                .wrapping_key(&SlotLock::Password(cost), &[salt; 16])
                .unwrap()
        };
        let one = key("password", cost, 1);
        assert_eq!(one, key("password", cost, 1));
        assert_ne!(one, key("passwore", cost, 1));
        assert_ne!(one, key("password", cost, 2));
        assert_ne!(
            one,
            key("password", PasswordCost::new(1 << 10, 3).unwrap(), 1)
        );
        assert_ne!(
            one,
            key("password", PasswordCost::new(1 << 11, 2).unwrap(), 1)
        );
    }
}
