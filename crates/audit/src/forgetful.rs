//! A map of bounded size that forgets what was not asked for in a long time.

use std::{collections::HashMap, hash::Hash};

/// Keeps the entries of two generations; when the younger one is full the older one goes. What is found in the older one is
/// young again.
#[derive(Debug)]
pub(crate) struct Forgetful<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    young_max: usize,
    /// Entries that went.
    pub(crate) forgotten: u64,
}

impl<K: Eq + Hash + Copy, V: Copy> Forgetful<K, V> {
    pub(crate) fn new(entries_max: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), young_max: (entries_max / 2).max(1), forgotten: 0 }
    }

    pub(crate) fn get(&mut self, key: K) -> Option<V> {
        if let Some(value) = self.young.get(&key) {
            return Some(*value);
        }
        let value = self.old.remove(&key)?;
        self.insert(key, value);
        Some(value)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.young_max && !self.young.contains_key(&key) {
            self.forgotten += self.old.len() as u64;
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    pub(crate) fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_stays_and_the_size_is_bounded() {
        let mut map = Forgetful::new(8);
        map.insert(0, "kept");
        for number in 1..100 {
            map.insert(number, "other");
            assert_eq!(map.get(0), Some("kept"));
            assert!(map.young.len() + map.old.len() <= 8);
        }
        assert_eq!(map.get(50), None);
        assert!(map.forgotten > 80, "{}", map.forgotten);
        map.clear();
        assert_eq!(map.get(0), None);
    }
}
