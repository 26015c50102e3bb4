//! KV that prefill legs hold here for engines elsewhere, by the id that was given out for it.

use std::{collections::HashMap, sync::Arc, time::Instant};

use forebay_kv_move::{BlockRef, Region};
use forebay_types::LegId;
use parking_lot::Mutex;

use super::wire::PromptIdentity;

/// KV of one prompt. The engine frees it at the end of its lease by itself; here it only stops being offered.
pub(super) struct Held {
    pub(super) leg: LegId,
    pub(super) region: Region,
    /// In order, the last one perhaps partial.
    pub(super) blocks: Arc<[BlockRef]>,
    /// Of the prompt.
    pub(super) tokens: u32,
    pub(super) prompt: PromptIdentity,
    /// End of the lease.
    pub(super) until: Instant,
}

/// What is held, and what became of it. As large as the engine's pool at most: each entry has blocks of its own.
#[derive(Default)]
pub(super) struct HeldTable {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<String, Arc<Held>>,
    expired: u64,
}

impl HeldTable {
    pub(super) fn insert(&self, id: String, held: Held, now: Instant) {
        let mut inner = self.inner.lock();
        inner.sweep(now);
        inner.entries.insert(id, Arc::new(held));
    }

    /// What is held under `id`, if its lease is not over.
    pub(super) fn get(&self, id: &str, now: Instant) -> Option<Arc<Held>> {
        let mut inner = self.inner.lock();
        inner.sweep(now);
        inner.entries.get(id).cloned()
    }

    /// Ends the offer. `None` if it has ended before.
    pub(super) fn remove(&self, id: &str) -> Option<Arc<Held>> {
        self.inner.lock().entries.remove(id)
    }

    /// Leases that ended without a hand-over, since the start.
    pub(super) fn expired(&self, now: Instant) -> u64 {
        let mut inner = self.inner.lock();
        inner.sweep(now);
        inner.expired
    }
}

impl Inner {
    fn sweep(&mut self, now: Instant) {
        let before = self.entries.len();
        self.entries.retain(|_, held| held.until > now);
        self.expired += (before - self.entries.len()) as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use forebay_kv_move::Layout;

    use super::*;

    #[test]
    fn a_lease_ends_once_whoever_looks() {
        let table = HeldTable::default();
        let now = Instant::now();
        let region = Region::create("held", Layout { block_bytes: 64, blocks: 1 }).unwrap();
        let held = |leg| Held {
            leg: LegId(leg),
            region: region.clone(),
            blocks: [].into(),
            tokens: 1,
            prompt: PromptIdentity::of("m", "", &[1]),
            until: now + Duration::from_secs(leg),
        };
        table.insert("a".to_owned(), held(1), now);
        table.insert("b".to_owned(), held(9), now);
        assert!(table.get("a", now).is_some());
        let later = now + Duration::from_secs(2);
        assert!(table.get("a", later).is_none() && table.get("b", later).is_some());
        assert_eq!((table.expired(later), table.expired(later)), (1, 1));
        assert!(table.remove("a").is_none() && table.remove("b").is_some());
        assert_eq!(table.expired(now + Duration::from_secs(99)), 1, "what was handed over did not expire");
    }
}
