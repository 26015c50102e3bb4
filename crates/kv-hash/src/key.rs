//! The fleet's key.

use std::{fmt, hash::Hasher as _};

use siphasher::sip::SipHasher13;

/// The secret under which a fleet hashes its blocks. Processes that exchange hashes must share it; one that runs alone
/// draws its own. Never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(pub [u8; 16]);

/// Versions the whole function: change it when any value of `tests/golden.json` changes.
const ROOT_KEY_DOMAIN: &[u8] = b"forebay/kv-hash/1 root key";

/// Never leaves the process, so it needs no version of its own.
const PIECE_KEY_DOMAIN: &[u8] = b"forebay/kv-hash/1 pieces key";

// Blocks are hashed under the fleet's key too. Their messages are 8 + 4n bytes long, these (with a byte of index) are
// not, so no prompt can ask for a derived key.
const _: () = assert!(
    !(ROOT_KEY_DOMAIN.len() + 1).is_multiple_of(4) && !(PIECE_KEY_DOMAIN.len() + 1).is_multiple_of(4)
);

impl HashKey {
    /// The published key of the golden vectors: bytes 0x00 to 0x0f, as in SipHash's own test vectors. For tests, and
    /// for nothing that faces users.
    pub const GOLDEN: Self = Self([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);

    /// The key of roots, so that a root and a block never share a domain.
    pub(crate) fn for_roots(self) -> Self {
        Self::derived(SipHasher13::new_with_key(&self.0), ROOT_KEY_DOMAIN)
    }

    /// The key of remembered pieces, from the hasher of blocks (which holds the fleet's key).
    pub(crate) fn for_pieces(blocks: SipHasher13) -> Self {
        Self::derived(blocks, PIECE_KEY_DOMAIN)
    }

    fn derived(keyed: SipHasher13, domain: &[u8]) -> Self {
        let half = |index: u8| {
            let mut hasher = keyed;
            hasher.write(domain);
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
