#![doc = include_str!("../README.md")]

mod chains;
mod fingerprint;
mod join;
mod key;

use std::hash::Hasher as _;

use forebay_types::{BlockHash, TokenId};
use siphasher::sip::SipHasher13;

pub use chains::{ChainLimits, ChainStats, Reused, SessionChains};
pub use join::{Run, join};
pub use key::HashKey;

/// Computes block hashes for one key and block size. Small and `Copy`: pass it by value.
#[derive(Clone, Copy)]
pub struct BlockHasher {
    blocks: SipHasher13,
    roots: SipHasher13,
    block_size_tokens: u32,
}

impl BlockHasher {
    /// A hasher for blocks of `block_size_tokens` tokens.
    ///
    /// # Panics
    /// If `block_size_tokens` is 0: settings are validated before they come here.
    pub fn new(key: HashKey, block_size_tokens: u32) -> Self {
        assert!(block_size_tokens > 0, "a block holds at least one token");
        Self {
            blocks: SipHasher13::new_with_key(&key.0),
            roots: SipHasher13::new_with_key(&key.for_roots().0),
            block_size_tokens,
        }
    }

    /// Tokens in a block.
    pub fn block_size_tokens(&self) -> u32 {
        self.block_size_tokens
    }

    /// What the first block has as its parent. `salt` separates everything that must not share KV though its tokens
    /// are equal: tenants, adapters, media.
    pub fn root(&self, model: &str, salt: &str) -> BlockHash {
        let mut hasher = self.roots;
        hasher.write(&self.block_size_tokens.to_le_bytes());
        for text in [model, salt] {
            // The length first, or ("ab", "c") and ("a", "bc") would share a root.
            hasher.write(&(text.len() as u64).to_le_bytes());
            hasher.write(text.as_bytes());
        }
        BlockHash(hasher.finish())
    }

    /// The hash of the block that follows `parent` and holds `tokens`.
    ///
    /// # Panics
    /// If `tokens` is not exactly one block: a partial block has no identity.
    pub fn next(&self, parent: BlockHash, tokens: &[TokenId]) -> BlockHash {
        assert_eq!(tokens.len(), self.block_size_tokens as usize, "only a full block has a hash");
        let mut hasher = self.blocks;
        // Whole words keep SipHash's byte buffer out of the loop. `to_le` makes them the little-endian bytes on any host:
        // the hasher takes integers in native order.
        hasher.write_u64(parent.0.to_le());
        let (pairs, odd) = tokens.as_chunks::<2>();
        for &[low, high] in pairs {
            hasher.write_u64((u64::from(low) | u64::from(high) << 32).to_le());
        }
        for &token in odd {
            hasher.write_u32(token.to_le());
        }
        BlockHash(hasher.finish())
    }

    /// The hashes of the full blocks of `tokens`, first block first; a last partial block has none.
    pub fn chain(&self, root: BlockHash, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut hashes = Vec::new();
        self.chain_into(root, tokens, &mut hashes);
        hashes
    }

    /// As [`chain`](Self::chain), into a vector of the caller's, which is cleared first.
    pub fn chain_into(&self, root: BlockHash, tokens: &[TokenId], out: &mut Vec<BlockHash>) {
        out.clear();
        let blocks = tokens.chunks_exact(self.block_size_tokens as usize);
        out.reserve(blocks.len());
        let mut parent = root;
        out.extend(blocks.map(|block| {
            parent = self.next(parent, block);
            parent
        }));
    }
}

impl std::fmt::Debug for BlockHasher {
    /// Leaves the key out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockHasher")
            .field("block_size_tokens", &self.block_size_tokens)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
