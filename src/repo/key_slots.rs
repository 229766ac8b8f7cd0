//! The key slots of a repository: finding the master key, and adding and removing ways to it.

use std::collections::{BTreeMap, BTreeSet};

use super::cipher::Encryption;
use super::error::RepoError;
use super::format::FileKind;
use super::format::envelope::{self, MAX_SMALL_FILE};
use super::format::key_slot::{ClearKey, KeySlot, Master, WrappedKey};
use super::repository::Repository;
use super::secret::{PasswordCost, Secret, SecretKind, SlotLock};
use super::storage::{Storage, StorageError};

/// A password or key file that opens a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// The slot's number.
    pub number: u32,
    /// What opens it.
    pub kind: SecretKind,
    /// What a guess costs, where it is a password.
    pub cost: Option<PasswordCost>,
    /// What its maker called it.
    pub label: Option<String>,
    /// Whether it is the one that was used now.
    pub current: bool,
}

/// The master key, and where it came from.
#[derive(Clone, Debug)]
pub(crate) struct Unlocked {
    pub(crate) master: ClearKey,
    /// The slot; `None` for a key in the clear.
    pub(crate) slot: Option<u32>,
    /// The damaged copies of slots.
    pub(crate) damaged: Vec<(String, RepoError)>,
}

/// Finds the master key.
pub(crate) fn unlock(
    storage: &dyn Storage,
    secret: Option<&Secret>,
) -> Result<Unlocked, RepoError> {
    let found = load(storage)?;
    let wrapped = || {
        found.slots.iter().filter_map(|(number, slot)| match slot {
            KeySlot::Wrapped(wrapped) => Some((*number, wrapped)),
            KeySlot::Clear(_) => None,
        })
    };
    let clear = found.slots.values().find_map(|slot| match slot {
        KeySlot::Clear(key) => Some(key.clone()),
        KeySlot::Wrapped(_) => None,
    });
    match (clear, secret) {
        (Some(master), None) => Ok(Unlocked {
            master,
            slot: None,
            damaged: found.damaged,
        }),
        // Rather than store in the clear what the caller takes for encrypted.
        (Some(_), Some(_)) if wrapped().next().is_none() => Err(RepoError::NotEncrypted),
        (None, None) if wrapped().next().is_some() => Err(RepoError::SecretNeeded),
        (_, Some(secret)) if wrapped().next().is_some() => {
            for (number, slot) in wrapped() {
                if let Some(master) = slot.unwrap(secret)? {
                    return Ok(Unlocked {
                        master: ClearKey(master),
                        slot: Some(number),
                        damaged: found.damaged,
                    });
                }
            }
            for (file, error) in &found.damaged {
                tracing::error!(%error, file, "a key slot is damaged");
            }
            Err(RepoError::WrongSecret {
                kind: secret.kind().as_str(),
                slots: wrapped().count(),
            })
        }
        _ => Err(match found.damaged.into_iter().next() {
            Some((_, error)) => error,
            None => RepoError::Missing {
                file: slot_file(0, ""),
            },
        }),
    }
}

/// Makes the first slot of a new repository, or takes up the one that an interrupted init left.
///
/// Exactly one of several that run at once gets past this, or all of them with one key.
pub(crate) fn first_slot(
    storage: &dyn Storage,
    secret: Option<(&Secret, PasswordCost)>,
    leftover: bool,
) -> Result<Unlocked, RepoError> {
    let unlocked = if leftover {
        match unlock(storage, secret.map(|(secret, _)| secret)) {
            // It is not what is wanted now.
            Err(
                RepoError::NotEncrypted | RepoError::SecretNeeded | RepoError::WrongSecret { .. },
            ) => return Err(super::repository::not_empty(storage, &slot_file(0, ""))),
            other => other?,
        }
    } else {
        let master = Master::new(super::ids::random_bytes()?);
        let slot = match secret {
            None => KeySlot::Clear(ClearKey(master.clone())),
            Some((secret, cost)) => {
                let lock = lock_for(secret, cost);
                KeySlot::Wrapped(WrappedKey::wrap(&master, secret, lock, None)?)
            }
        };
        super::repository::create(storage, &slot_file(0, ""), &slot.encode()?)?;
        // Who finds an interrupted creation finds this file, whatever else is lost.
        storage.barrier()?;
        Unlocked {
            master: ClearKey(master),
            slot: secret.map(|_| 0),
            damaged: Vec::new(),
        }
    };
    let file = storage.read(&slot_file(0, ""), MAX_SMALL_FILE)?;
    match super::repository::create(storage, &slot_file(0, BAK), &file) {
        Ok(()) | Err(RepoError::NotEmpty { .. }) => Ok(unlocked),
        Err(other) => Err(other),
    }
}

/// Whether a file may be what an interrupted init left: a key alone, on which no data can hang.
pub(crate) fn is_first_slot(file: &str) -> bool {
    file == slot_file(0, "") || file == slot_file(0, BAK)
}

impl Repository {
    /// Lists the passwords and key files that open the repository.
    pub fn key_slots(&self) -> Result<Vec<SlotInfo>, RepoError> {
        let found = load(&**self.storage())?;
        for (file, error) in &found.damaged {
            tracing::error!(%error, file, "a key slot is damaged");
        }
        let info = |(number, slot): (&u32, &KeySlot)| match slot {
            KeySlot::Clear(_) => None,
            KeySlot::Wrapped(wrapped) => Some(SlotInfo {
                number: *number,
                kind: wrapped.lock.kind(),
                cost: match wrapped.lock {
                    SlotLock::Password(cost) => Some(cost),
                    SlotLock::KeyFile => None,
                },
                label: wrapped.label(self.keys()),
                current: self.slot() == Some(*number),
            }),
        };
        Ok(found.slots.iter().filter_map(info).collect())
    }

    /// Adds a password or key file, and returns its slot's number.
    pub fn add_key(
        &self,
        secret: &Secret,
        cost: PasswordCost,
        label: Option<&str>,
    ) -> Result<u32, RepoError> {
        self.check_writable()?;
        if self.encryption() == Encryption::None {
            return Err(RepoError::NotEncrypted);
        }
        let storage = &**self.storage();
        let slot = WrappedKey::wrap(self.master(), secret, lock_for(secret, cost), label)?;
        let file = KeySlot::Wrapped(slot).encode()?;
        loop {
            let used = load(storage)?.numbers;
            if used.len() >= MAX_SLOTS {
                return Err(RepoError::misuse(format!(
                    "there are {} key slots already; remove one first",
                    used.len()
                )));
            }
            let number = used.last().map_or(0, |last| last.saturating_add(1));
            match super::repository::create(storage, &slot_file(number, ""), &file) {
                Ok(()) => {}
                // Another process took the number.
                Err(RepoError::NotEmpty { .. }) => continue,
                Err(other) => return Err(other),
            }
            super::repository::create(storage, &slot_file(number, BAK), &file)?;
            storage.barrier()?;
            return Ok(number);
        }
    }

    /// Removes a password or key file; never the last one.
    ///
    /// A mark comes first: of several processes that remove each other's slots, one at least sees the other's mark.
    pub fn remove_key(&self, number: u32) -> Result<(), RepoError> {
        self.check_writable()?;
        let storage = &**self.storage();
        if !load(storage)?.numbers.contains(&number) {
            return Err(RepoError::NoSuchKey { number });
        }
        let mark = slot_file(number, GONE);
        let empty = envelope::wrap(FileKind::KeySlot, &[], None).map_err(|e| e.in_file(&mark))?;
        let ours = match super::repository::create(storage, &mark, &empty) {
            Ok(()) => true,
            // Left by a removal that was killed, which this one ends; or another one is under way.
            Err(RepoError::NotEmpty { .. }) => false,
            Err(other) => return Err(other),
        };
        let found = load(storage)?;
        let stays = |slot: &u32| !found.marked.contains(slot);
        if !found.slots.keys().any(stays) {
            if ours {
                removed(storage.remove(&mark))?;
            }
            return Err(RepoError::LastKey { number });
        }
        removed(storage.remove(&slot_file(number, "")))?;
        removed(storage.remove(&slot_file(number, BAK)))?;
        storage.barrier()?;
        removed(storage.remove(&mark))?;
        storage.barrier()?;
        Ok(())
    }

    /// Puts a password or key file in the place of the one that was used now; returns the new and the old slot.
    pub fn change_key(
        &self,
        secret: &Secret,
        cost: PasswordCost,
        label: Option<&str>,
    ) -> Result<(u32, u32), RepoError> {
        self.check_writable()?;
        let old = self.slot().ok_or(RepoError::NotEncrypted)?;
        let new = self.add_key(secret, cost, label)?;
        self.remove_key(old)?;
        Ok((new, old))
    }
}

/// What the folder of keys holds.
#[derive(Debug, Default)]
struct Found {
    /// The slots that can be read.
    slots: BTreeMap<u32, KeySlot>,
    /// All numbers that are in use.
    numbers: BTreeSet<u32>,
    /// The slots that are being removed.
    marked: BTreeSet<u32>,
    damaged: Vec<(String, RepoError)>,
}

fn load(storage: &dyn Storage) -> Result<Found, RepoError> {
    let mut found = Found::default();
    for file in storage.list("keys/")? {
        let Some((number, rest)) = parse(&file.name) else {
            continue;
        };
        found.numbers.insert(number);
        if rest == GONE {
            found.marked.insert(number);
        }
    }
    // More than this program makes are some other's, or hostile: each costs a try of the password.
    for number in found.numbers.iter().copied().take(MAX_SLOTS) {
        let files = [slot_file(number, ""), slot_file(number, BAK)];
        let mut faults = Vec::new();
        let read = files.iter().find_map(|file| {
            let slot = storage
                .read(file, MAX_SMALL_FILE)
                .map_err(RepoError::from)
                .and_then(|bytes| KeySlot::decode(&bytes).map_err(|e| e.in_file(file)));
            slot.map_err(|e| faults.push((file.clone(), e))).ok()
        });
        // A medium that cannot read one copy any more may read the other one.
        if let Some((_, error)) = faults.iter().find(|(_, e)| e.is_refusal()) {
            return Err(error.clone());
        }
        match read {
            Some(slot) => {
                found.slots.insert(number, slot);
            }
            // Removed since it was listed.
            None if faults
                .iter()
                .all(|(_, e)| matches!(e, RepoError::Missing { .. })) =>
            {
                continue;
            }
            None => {}
        }
        found.damaged.extend(faults);
    }
    Ok(found)
}

/// Returns the copies of slots that are damaged or missing.
pub(crate) fn damaged_slots(storage: &dyn Storage) -> Result<Vec<(String, RepoError)>, RepoError> {
    let found = load(storage)?;
    let mut damaged = Vec::new();
    for number in found.numbers.difference(&found.marked) {
        for file in [slot_file(*number, ""), slot_file(*number, BAK)] {
            let read = storage.read(&file, MAX_SMALL_FILE).map_err(RepoError::from);
            let decoded =
                read.and_then(|bytes| KeySlot::decode(&bytes).map_err(|e| e.in_file(&file)));
            match decoded {
                Ok(_) => {}
                Err(error) if error.is_refusal() => return Err(error),
                Err(error) => damaged.push((file, error)),
            }
        }
    }
    Ok(damaged)
}

fn lock_for(secret: &Secret, cost: PasswordCost) -> SlotLock {
    match secret.kind() {
        SecretKind::Password => SlotLock::Password(cost),
        SecretKind::KeyFile => SlotLock::KeyFile,
    }
}

fn removed(result: Result<(), StorageError>) -> Result<(), RepoError> {
    match result {
        Ok(()) | Err(StorageError::Missing { .. }) => Ok(()),
        Err(other) => Err(other.into()),
    }
}

fn slot_file(number: u32, rest: &str) -> String {
    format!("keys/{number}{rest}")
}

fn parse(name: &str) -> Option<(u32, &'static str)> {
    let text = name.strip_prefix("keys/")?;
    let (digits, rest) = match text.split_once('.') {
        None => (text, ""),
        Some((digits, "bak")) => (digits, BAK),
        Some((digits, "gone")) => (digits, GONE),
        Some(_) => return None,
    };
    let number = digits.parse().ok()?;
    (slot_file(number, rest) == name).then_some((number, rest))
}

const BAK: &str = ".bak";
const GONE: &str = ".gone";

/// The most slots that are made, and that are tried.
const MAX_SLOTS: usize = 32;
