//! The fleet's key.

use std::{fmt, hash::Hasher as _};

use siphasher::sip::SipHasher13;

/// The secret under which a fleet hashes its blocks. Processes that exchange hashes must share it; one that runs alone
/// draws its own. Never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(pub [u8; 16]);

/// Versions the whole function: change it when any value of `tests/golden.json` changes.
const ROOT_KEY_DOMAIN: &[u8] = b"forebay/kv-hash/1 root key";

impl HashKey {
    /// The published key of the golden vectors: bytes 0x00 to 0x0f, as in SipHash's own test vectors. For tests, and
    /// for nothing that faces users.
    pub const GOLDEN: Self = Self([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);

    /// The key of roots, so that a root and a block never share a domain.
    pub(crate) fn for_roots(self) -> Self {
        let half = |index: u8| {
            let mut hasher = SipHasher13::new_with_key(&self.0);
            hasher.write(ROOT_KEY_DOMAIN);
            hasher.write(&[index]);
            hasher.finish().to_le_bytes()
        };
        let mut key = [0; 16];
        key[..8].copy_from_slice(&half(0));
        key[8..].copy_from_slice(&half(1));
        Self(key)
    }
}

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(..)")
    }
}
