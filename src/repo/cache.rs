//! A bounded cache: what was used since the last turn stays, the rest goes.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// Keeps at most twice `half` values.
#[derive(Debug)]
pub(crate) struct Cache<K, V> {
    half: usize,
    halves: Mutex<Halves<K, V>>,
}

#[derive(Debug)]
struct Halves<K, V> {
    new: HashMap<K, Arc<V>>,
    old: HashMap<K, Arc<V>>,
}

impl<K: Copy + Eq + Hash, V> Cache<K, V> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            half: (capacity / 2).max(1),
            halves: Mutex::new(Halves {
                new: HashMap::new(),
                old: HashMap::new(),
            }),
        }
    }

    pub(crate) fn find(&self, key: &K) -> Option<Arc<V>> {
        let mut halves = self.lock();
        if let Some(value) = halves.new.get(key) {
            return Some(Arc::clone(value));
        }
        let value = halves.old.remove(key)?;
        self.put(&mut halves, *key, Arc::clone(&value));
        Some(value)
    }

    pub(crate) fn add(&self, key: K, value: Arc<V>) {
        self.put(&mut self.lock(), key, value);
    }

    fn put(&self, halves: &mut Halves<K, V>, key: K, value: Arc<V>) {
        if halves.new.len() >= self.half {
            halves.old = std::mem::take(&mut halves.new);
        }
        halves.new.insert(key, value);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Halves<K, V>> {
        self.halves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_stays_bounded_and_keeps_what_is_used() {
        let cache = Cache::new(8);
        for i in 0..100 {
            cache.add(i, Arc::new(i));
            assert_eq!(cache.find(&0).as_deref(), Some(&0), "{i}");
            let halves = cache.lock();
            assert!(halves.new.len() + halves.old.len() <= 8);
        }
        assert_eq!(cache.find(&50), None);
    }
}
