//! The one way in which a fleet names blocks.
//!
//! In: the key that each gateway says. Out: whether it is the fleet's, and the key to watch the engine with. An engine's
//! cache is described under one key at a time; the first gateway decides, and as long as one gateway with that key is
//! connected, another key is refused. When none is, the next gateway decides anew: a fleet's only gateway that was
//! restarted with a new key is no conflict.

use std::sync::Arc;

use forebay_proto::HashKey;
use parking_lot::Mutex;
use tokio::sync::watch;

/// A gateway that names blocks otherwise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "gateway {gateway} names blocks by another key or block size than {holder}, with which this agent is connected: all \
     gateways of a fleet need one hash key"
)]
pub(crate) struct KeyConflict {
    gateway: String,
    holder: String,
}

/// The fleet's key, as far as this agent knows it.
#[derive(Debug)]
pub(crate) struct FleetKey {
    holders: Mutex<Vec<String>>,
    key: watch::Sender<Option<HashKey>>,
}

/// A gateway that counts on the key. Dropped with its stream.
#[derive(Debug)]
pub(crate) struct Holding {
    fleet: Arc<FleetKey>,
    gateway: String,
}

impl FleetKey {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { holders: Mutex::default(), key: watch::Sender::new(None) })
    }

    /// The key as it is now, and its changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<HashKey>> {
        self.key.subscribe()
    }

    /// Whether a stream to this gateway stands already.
    pub(crate) fn is_held_by(&self, gateway: &str) -> bool {
        self.holders.lock().iter().any(|holder| holder == gateway)
    }

    /// A gateway says the key.
    pub(crate) fn hold(self: &Arc<Self>, gateway: &str, key: &HashKey) -> Result<Holding, KeyConflict> {
        let mut holders = self.holders.lock();
        if self.key.borrow().as_ref() != Some(key) {
            if let Some(holder) = holders.first() {
                return Err(KeyConflict { gateway: gateway.to_owned(), holder: holder.clone() });
            }
            self.key.send_replace(Some(key.clone()));
        }
        holders.push(gateway.to_owned());
        Ok(Holding { fleet: self.clone(), gateway: gateway.to_owned() })
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut holders = self.fleet.holders.lock();
        if let Some(at) = holders.iter().position(|holder| *holder == self.gateway) {
            holders.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_with_one_key_agree_and_the_last_one_s_key_goes_with_it() {
        let key = |byte, block_size_tokens| HashKey { key: [byte; 16], block_size_tokens };
        let fleet = FleetKey::new();
        let mut seen = fleet.watch();
        let first = fleet.hold("gw-0", &key(1, 16)).expect("nobody is there");
        assert_eq!(seen.borrow_and_update().as_ref(), Some(&key(1, 16)));
        let second = fleet.hold("gw-1", &key(1, 16)).expect("the same key");
        let error = fleet.hold("gw-2", &key(2, 16)).expect_err("another key").to_string();
        assert_eq!(
            error,
            "gateway gw-2 names blocks by another key or block size than gw-0, with which this agent is connected: all \
             gateways of a fleet need one hash key"
        );
        assert!(fleet.hold("gw-2", &key(1, 32)).is_err(), "another block size");
        drop(first);
        assert!(fleet.hold("gw-2", &key(2, 16)).is_err(), "gw-1 is there");
        assert!(!seen.has_changed().expect("alive"));
        drop(second);
        let third = fleet.hold("gw-0", &key(2, 16)).expect("nobody is there");
        assert_eq!(seen.borrow_and_update().as_ref(), Some(&key(2, 16)));
        drop(third);
        assert!(
            fleet.hold("gw-0", &key(2, 16)).is_ok() && !seen.has_changed().expect("alive"),
            "the same again"
        );
    }
}
