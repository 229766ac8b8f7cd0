//! A repository in memory, with a power failure that forgets what no barrier made durable.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FileInfo, Hold, NewFile, Storage, StorageError};

/// Files in memory; clones share them.
#[derive(Clone, Debug, Default)]
pub struct MemoryStorage {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Arc<Vec<u8>>>,
    not_durable: BTreeSet<String>,
    /// What was removed and would be there again.
    not_gone: BTreeMap<String, Arc<Vec<u8>>>,
    held: BTreeSet<String>,
}

impl MemoryStorage {
    /// Makes an empty place.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a place that holds one file.
    pub(crate) fn holding(name: &str, bytes: Arc<Vec<u8>>) -> Self {
        let new = Self::new();
        new.lock().files.insert(name.to_owned(), bytes);
        new
    }

    /// Returns a copy that shares nothing, as it is after a power failure: of what was published or removed since the
    /// last barrier, only that happened to which name `survives` agrees.
    pub fn after_power_failure(&self, mut survives: impl FnMut(&str) -> bool) -> Self {
        let state = self.lock();
        let mut files = state.files.clone();
        for name in state.not_durable.iter().chain(state.not_gone.keys()) {
            if survives(name) {
                continue;
            }
            match state.not_gone.get(name) {
                Some(old) => files.insert(name.clone(), Arc::clone(old)),
                None => files.remove(name),
            };
        }
        Self {
            state: Arc::new(Mutex::new(State {
                files,
                not_durable: BTreeSet::new(),
                not_gone: BTreeMap::new(),
                // Whoever held a name is dead.
                held: BTreeSet::new(),
            })),
        }
    }

    /// Replaces a file's bytes, as damage would.
    pub fn damage(&self, name: &str, bytes: Vec<u8>) {
        self.lock().files.insert(name.to_owned(), Arc::new(bytes));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, name: &str) -> Result<Arc<Vec<u8>>, StorageError> {
        let found = self.lock().files.get(name).cloned();
        found.ok_or_else(|| StorageError::Missing {
            name: name.to_owned(),
        })
    }
}

impl Storage for MemoryStorage {
    fn create(&self) -> Result<Box<dyn NewFile>, StorageError> {
        Ok(Box::new(MemoryFile {
            bytes: Vec::new(),
            storage: self.clone(),
        }))
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, StorageError> {
        let file = self.file(name)?;
        if file.len() as u64 > limit {
            return Err(StorageError::TooLong {
                name: name.to_owned(),
                limit,
            });
        }
        Ok(file.to_vec())
    }

    fn read_at(&self, name: &str, at: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        let file = self.file(name)?;
        let end = at.saturating_add(buf.len() as u64);
        let found = usize::try_from(at)
            .ok()
            .zip(usize::try_from(end).ok())
            .and_then(|(at, end)| file.get(at..end));
        match found {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(StorageError::Short {
                name: name.to_owned(),
                end,
            }),
        }
    }

    fn len(&self, name: &str) -> Result<u64, StorageError> {
        Ok(self.file(name)?.len() as u64)
    }

    fn list(&self, prefix: &str) -> Result<Vec<FileInfo>, StorageError> {
        let state = self.lock();
        let from = state.files.range(prefix.to_owned()..);
        Ok(from
            .take_while(|(name, _)| name.starts_with(prefix))
            .map(|(name, bytes)| FileInfo {
                name: name.clone(),
                len: bytes.len() as u64,
                modified: None,
            })
            .collect())
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        let mut state = self.lock();
        let was_durable = !state.not_durable.remove(name);
        match state.files.remove(name) {
            Some(bytes) => {
                if was_durable {
                    state.not_gone.entry(name.to_owned()).or_insert(bytes);
                }
                Ok(())
            }
            None => Err(StorageError::Missing {
                name: name.to_owned(),
            }),
        }
    }

    fn barrier(&self) -> Result<(), StorageError> {
        let mut state = self.lock();
        state.not_durable.clear();
        state.not_gone.clear();
        Ok(())
    }

    fn hold(&self, name: &str) -> Result<Box<dyn Hold>, StorageError> {
        match self.lock().held.insert(name.to_owned()) {
            true => Ok(Box::new(MemoryHold {
                name: name.to_owned(),
                storage: self.clone(),
            })),
            false => Err(StorageError::Exists {
                name: name.to_owned(),
            }),
        }
    }

    fn is_held(&self, name: &str) -> Result<Option<bool>, StorageError> {
        Ok(Some(self.lock().held.contains(name)))
    }

    fn sweep(&self) -> Result<u64, StorageError> {
        Ok(0)
    }

    fn place(&self) -> String {
        "memory".to_owned()
    }
}

#[derive(Debug)]
struct MemoryHold {
    name: String,
    storage: MemoryStorage,
}

impl Hold for MemoryHold {}

impl Drop for MemoryHold {
    fn drop(&mut self) {
        self.storage.lock().held.remove(&self.name);
    }
}

struct MemoryFile {
    bytes: Vec<u8>,
    storage: MemoryStorage,
}

impl NewFile for MemoryFile {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn publish(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        let mut state = self.storage.lock();
        if state.files.contains_key(name) {
            return Err(StorageError::Exists {
                name: name.to_owned(),
            });
        }
        state.not_durable.insert(name.to_owned());
        state.files.insert(name.to_owned(), Arc::new(self.bytes));
        Ok(())
    }

    fn replace(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        let mut state = self.storage.lock();
        let was_durable = state.not_durable.insert(name.to_owned());
        let old = state.files.insert(name.to_owned(), Arc::new(self.bytes));
        if let Some(old) = old.filter(|_| was_durable) {
            state.not_gone.entry(name.to_owned()).or_insert(old);
        }
        Ok(())
    }
}
