//! Hash chains of recent prompts, so that a conversation's next turn hashes only what is new in it.
//!
//! In: a root and a prompt's tokens. Out: exactly what [`BlockHasher::chain_into`] gives, sooner if the prompt begins like
//! a recent one. Start at [`SessionChains::chain_into`]; names of pieces are made in [`fingerprint`](crate::fingerprint),
//! kept in [`shard`].
//!
//! A prompt is cut into pieces of a fixed number of blocks. A piece's name stands for its tokens and all before them, so
//! every piece is found by itself: one that was forgotten in the middle of a prompt is a hole that is hashed again, and
//! what follows it is not lost. That is why pieces of one prompt may lie in any shard, and why what is long, or begins
//! like many others (one system prompt for all), does not crowd one shard.
//!
//! Invariants: the output does not depend on what is remembered; nothing is found under another root; memory stays
//! within the limit; a lock is held for probes and copies of one shard's pieces only, never while hashing.

mod shard;

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use forebay_types::{BlockHash, TokenId};

use crate::{BlockHasher, fingerprint::Fingerprints};
use shard::{Shard, pieces_in};

/// Blocks in a piece, unless they are long. More blocks cost more to hash again where a prompt's end cuts a piece (at
/// most 63 blocks, 1.5 µs); fewer cost more probes and more bytes a block.
const PIECE_BLOCKS_MAX: usize = 64;

/// Tokens in a piece at most: fingerprinting needs as many secret words, and 8 KiB leave room in a first-level cache.
/// Blocks longer than this are not remembered; no engine has them.
const PIECE_TOKENS_MAX: usize = 2048;

/// Locks that many threads spread over. More would mean more of them for each prompt.
const SHARDS_MAX: usize = 16;

/// Pieces that make a shard of its own worth having. Below, the shards' shares of the limit get so small that chance
/// decides how much of it is used.
const SHARD_PIECES_MIN: usize = 64;

/// How much may be remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainLimits {
    /// Bytes that remembered pieces may take, tables included; 0 (or less than one piece's) remembers nothing. The key
    /// of the fingerprints, 4 bytes for each token of a piece (4 KiB at 16 tokens a block), comes on top.
    pub bytes_max: usize,
}

impl Default for ChainLimits {
    /// 64 MiB: 8 million blocks, 128 million tokens at 16 a block, 1,280 conversations of 100,000.
    fn default() -> Self {
        Self { bytes_max: 64 << 20 }
    }
}

/// What memory saved one prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reused {
    /// Blocks taken from memory rather than hashed. Not always the first ones: a piece may have been forgotten.
    pub blocks: usize,
}

/// What is remembered, and what that was good for since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChainStats {
    /// Pieces remembered now.
    pub pieces: usize,
    /// Pieces that fit.
    pub pieces_max: usize,
    /// Blocks in a piece; 0 if nothing is remembered.
    pub piece_blocks: usize,
    /// Bytes allocated now; never more than [`ChainLimits::bytes_max`].
    pub bytes: usize,
    /// Blocks taken from memory.
    pub blocks_reused: u64,
    /// Blocks hashed.
    pub blocks_hashed: u64,
    /// Pieces forgotten to make room.
    pub evictions: u64,
}

/// Hash chains of recent prompts by content, for many threads. See the [crate](crate)'s documentation.
pub struct SessionChains {
    hasher: BlockHasher,
    fingerprints: Fingerprints,
    piece_blocks: usize,
    pieces_max: usize,
    /// A power of two of them, or none: then nothing is remembered.
    shards: Box<[Mutex<Shard>]>,
    // Counts for people to read. Nothing is ordered by them, so relaxed is enough.
    blocks_reused: AtomicU64,
    blocks_hashed: AtomicU64,
}

/// One piece of the prompt at hand.
struct Wanted {
    name: u64,
    /// The piece before this one, of those in the same shard.
    before_in_shard: Option<u32>,
    is_known: bool,
}

/// The pieces of a prompt and, for each shard, the last one in it. Followed from there they come tails first, so a
/// prompt's tail is also what is evicted first of it: its head may be the beginning of other prompts.
struct Walk {
    pieces: Vec<Wanted>,
    lasts: [Option<u32>; SHARDS_MAX],
}

impl SessionChains {
    /// Remembers nothing yet, and allocates only what fingerprints need.
    pub fn new(hasher: BlockHasher, limits: ChainLimits) -> Self {
        let block_size_tokens = hasher.block_size_tokens() as usize;
        let piece_blocks = PIECE_BLOCKS_MAX.min(PIECE_TOKENS_MAX / block_size_tokens);
        let fits = pieces_in(limits.bytes_max, piece_blocks);
        let is_off = piece_blocks == 0 || fits == 0;
        // The largest power of two that leaves each shard enough.
        let shard_count =
            if is_off { 0 } else { 1 << (fits / SHARD_PIECES_MIN).clamp(1, SHARDS_MAX).ilog2() };
        let piece_blocks = if is_off { 0 } else { piece_blocks };
        let shard_bytes_max = limits.bytes_max.checked_div(shard_count).unwrap_or(0);
        let shard_pieces_max = pieces_in(shard_bytes_max, piece_blocks);
        Self {
            hasher,
            fingerprints: Fingerprints::new(hasher.blocks, piece_blocks * block_size_tokens),
            piece_blocks,
            pieces_max: shard_count * shard_pieces_max,
            shards: (0..shard_count)
                .map(|_| Mutex::new(Shard::new(piece_blocks, shard_pieces_max)))
                .collect(),
            blocks_reused: AtomicU64::new(0),
            blocks_hashed: AtomicU64::new(0),
        }
    }

    /// The hasher whose chains these are.
    pub fn hasher(&self) -> BlockHasher {
        self.hasher
    }

    /// The hashes of the full blocks of `tokens`, as [`BlockHasher::chain_into`] gives them, into `out`, which is
    /// cleared first. `root` must come from [`BlockHasher::root`] of the same hasher: it is what keeps tenants and models
    /// apart.
    ///
    /// What is known of the prompt costs a pass over its tokens at about 25 GB/s and a copy of 8 bytes a block; what is
    /// not is hashed and remembered in whole pieces.
    pub fn chain_into(&self, root: BlockHash, tokens: &[TokenId], out: &mut Vec<BlockHash>) -> Reused {
        let blocks = tokens.len() / self.hasher.block_size_tokens() as usize;
        if self.shards.is_empty() || blocks < self.piece_blocks {
            self.hasher.chain_into(root, tokens, out);
            return self.count(0, blocks);
        }
        let mut walk = self.walk(root, tokens);
        out.clear();
        out.resize(blocks, BlockHash(0));
        let known = self.copy_known(&mut walk, out);
        self.hash_unknown(root, tokens, &walk, out);
        if known < walk.pieces.len() {
            self.remember_unknown(&walk, out);
        }
        self.count(known * self.piece_blocks, blocks)
    }

    /// As [`chain_into`](Self::chain_into), into a new vector.
    pub fn chain(&self, root: BlockHash, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut hashes = Vec::new();
        self.chain_into(root, tokens, &mut hashes);
        hashes
    }

    /// What is remembered and what it was good for. Takes each lock once, one after the other, so the numbers of a busy
    /// moment need not add up.
    pub fn stats(&self) -> ChainStats {
        let mut stats = ChainStats {
            pieces_max: self.pieces_max,
            piece_blocks: self.piece_blocks,
            blocks_reused: self.blocks_reused.load(Relaxed),
            blocks_hashed: self.blocks_hashed.load(Relaxed),
            ..ChainStats::default()
        };
        for shard in &self.shards {
            let shard = lock(shard);
            stats.pieces += shard.pieces();
            stats.bytes += shard.bytes();
            stats.evictions += shard.evictions();
        }
        stats
    }

    fn piece_tokens(&self) -> usize {
        self.piece_blocks * self.hasher.block_size_tokens() as usize
    }

    fn walk(&self, root: BlockHash, tokens: &[TokenId]) -> Walk {
        let mut lasts = [None; SHARDS_MAX];
        // The first piece follows the root as later ones follow a piece. Both are keyed hashes of 64 bits, under two keys.
        let mut before = root.0;
        let pieces = tokens.chunks_exact(self.piece_tokens()).zip(0..);
        let pieces = pieces.map(|(tokens, index)| {
            let name = self.fingerprints.name(before, tokens);
            before = name;
            let before_in_shard = lasts[self.shard_of(name)].replace(index);
            Wanted { name, before_in_shard, is_known: false }
        });
        Walk { pieces: pieces.collect(), lasts }
    }

    /// By the lower half of the name: the upper chooses the bucket.
    fn shard_of(&self, name: u64) -> usize {
        name as usize & (self.shards.len() - 1)
    }

    /// Copies what is remembered to its place in `out`. Returns the number of pieces.
    fn copy_known(&self, walk: &mut Walk, out: &mut [BlockHash]) -> usize {
        let mut known = 0;
        for (shard, &last) in self.shards.iter().zip(&walk.lasts) {
            let Some(last) = last else { continue };
            let mut shard = lock(shard);
            let mut next = Some(last);
            while let Some(index) = next {
                let piece = &mut walk.pieces[index as usize];
                piece.is_known = shard
                    .copy(piece.name, &mut out[index as usize * self.piece_blocks..][..self.piece_blocks]);
                known += usize::from(piece.is_known);
                next = piece.before_in_shard;
            }
        }
        known
    }

    /// Fills what was not remembered, and the blocks after the last whole piece.
    fn hash_unknown(&self, root: BlockHash, tokens: &[TokenId], walk: &Walk, out: &mut [BlockHash]) {
        let mut parent = root;
        let places = out.chunks_mut(self.piece_blocks).zip(tokens.chunks(self.piece_tokens()));
        for (index, (hashes, tokens)) in places.enumerate() {
            if !walk.pieces.get(index).is_some_and(|piece| piece.is_known) {
                let blocks = tokens.chunks_exact(self.hasher.block_size_tokens() as usize);
                for (hash, block) in hashes.iter_mut().zip(blocks) {
                    parent = self.hasher.next(parent, block);
                    *hash = parent;
                }
            }
            parent = hashes.last().copied().unwrap_or(parent);
        }
    }

    fn remember_unknown(&self, walk: &Walk, out: &[BlockHash]) {
        for (shard, &last) in self.shards.iter().zip(&walk.lasts) {
            let unknown = |from: Option<u32>| {
                let pieces =
                    std::iter::successors(from, |&index| walk.pieces[index as usize].before_in_shard);
                pieces.filter(|&index| !walk.pieces[index as usize].is_known)
            };
            if unknown(last).next().is_none() {
                continue;
            }
            let mut shard = lock(shard);
            for index in unknown(last) {
                let index = index as usize;
                shard.remember(
                    walk.pieces[index].name,
                    &out[index * self.piece_blocks..][..self.piece_blocks],
                );
            }
        }
    }

    fn count(&self, reused: usize, blocks: usize) -> Reused {
        self.blocks_reused.fetch_add(reused as u64, Relaxed);
        self.blocks_hashed.fetch_add((blocks - reused) as u64, Relaxed);
        Reused { blocks: reused }
    }
}

/// A shard whose holder panicked is used on: a wrong hash at worst misroutes, and a gateway that stops does more harm.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for SessionChains {
    /// Leaves keys and prompts out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionChains")
            .field("hasher", &self.hasher)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
