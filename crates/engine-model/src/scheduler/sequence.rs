//! One sequence: a prompt that is being computed for all its choices, or one choice that decodes.

use std::sync::Arc;

use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, LegId, TokenId};

use crate::pool::{Before, Pool};

/// Order of service: arrival, then choice. Smaller goes first and is preempted last.
pub(super) type Order = (u64, u32);

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) order: Order,
    pub(super) leg: LegId,
    /// All of a job's choices until they fork, then one.
    pub(super) choices: Vec<u32>,
    /// Prompt and what was generated.
    pub(super) tokens: Vec<TokenId>,
    /// Of those, tokens whose KV is in `blocks`.
    pub(super) computed: u32,
    pub(super) blocks: Vec<u32>,
    /// Hashes of the full blocks of `tokens`, as far as they are known.
    hashes: Vec<BlockHash>,
    root: BlockHash,
    /// Leading blocks that are in the cache (or were, when a hash collision made the rest private).
    cached_blocks: usize,
    private: bool,
    /// Tokens generated so far.
    pub(super) generated: u32,
    /// First tokens that another rank has drawn; then none are drawn at the prompt's end.
    pub(super) first: Option<Vec<(u32, TokenId)>>,
    /// KV comes from elsewhere: indices of blocks that the local cache does not hold.
    pub(super) import_from: Option<usize>,
    /// Its start was reported.
    pub(super) started: bool,
}

/// What a new sequence is made of.
pub(super) struct Origin {
    pub(super) order: Order,
    pub(super) leg: LegId,
    pub(super) choices: Vec<u32>,
    pub(super) prompt: Arc<[TokenId]>,
    pub(super) hashes: Arc<[BlockHash]>,
    pub(super) root: BlockHash,
    pub(super) first: Option<Vec<(u32, TokenId)>>,
    pub(super) import: bool,
}

impl Sequence {
    pub(super) fn new(origin: Origin) -> Self {
        let Origin { order, leg, choices, prompt, hashes, root, first, import } = origin;
        Self {
            order,
            leg,
            choices,
            tokens: prompt.to_vec(),
            computed: 0,
            blocks: Vec::new(),
            hashes: hashes.to_vec(),
            root,
            cached_blocks: 0,
            private: false,
            generated: 0,
            first,
            import_from: import.then_some(0),
            started: false,
        }
    }

    /// The part of a forked sequence that one choice continues. `blocks` are its own or shared; references are the
    /// caller's matter.
    pub(super) fn fork(&self, choice: u32, blocks: Vec<u32>) -> Self {
        Self {
            order: (self.order.0, choice),
            leg: self.leg,
            choices: vec![choice],
            tokens: self.tokens.clone(),
            computed: self.computed,
            blocks,
            hashes: self.hashes.clone(),
            root: self.root,
            cached_blocks: self.cached_blocks,
            private: self.private,
            generated: self.generated,
            first: None,
            import_from: None,
            started: true,
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Whether its next step computes one token that was just drawn.
    pub(super) fn decodes(&self) -> bool {
        self.generated > 0 && self.computed + 1 == self.len()
    }

    /// Tokens of a prompt, or of a preempted sequence, that are still to compute; 0 for one that decodes.
    pub(super) fn prefill_left(&self) -> u32 {
        if self.decodes() { 0 } else { self.len() - self.computed }
    }

    /// Blocks that the cache holds of this sequence. At least its last token is always computed: it is what the next
    /// token is drawn from, and it must not be written into a shared block.
    pub(super) fn match_cache(&self, pool: &Pool, block_size: usize) -> Vec<u32> {
        let reusable = (self.tokens.len() - 1) / block_size;
        let known = reusable.min(self.hashes.len());
        pool.matched(self.root, &self.hashes[..known], &self.tokens, block_size)
    }

    /// Takes over matched blocks, already retained, and own blocks behind them.
    pub(super) fn install(&mut self, matched: Vec<u32>, own: &[u32], block_size: u32) {
        self.computed = matched.len() as u32 * block_size;
        self.cached_blocks = matched.len();
        self.blocks = matched;
        self.blocks.extend_from_slice(own);
    }

    /// Gives everything back; what is cached may be found again.
    pub(super) fn uninstall(&mut self, pool: &mut Pool) {
        pool.release(&self.blocks);
        self.blocks.clear();
        self.computed = 0;
        self.cached_blocks = 0;
        self.private = false;
    }

    /// Puts blocks that were filled by now into the cache; the cache may hand back equal ones instead.
    pub(super) fn cache_full_blocks(&mut self, pool: &mut Pool, hasher: &BlockHasher) {
        let size = hasher.block_size_tokens() as usize;
        let full = self.computed as usize / size;
        while self.cached_blocks < full && !self.private {
            let index = self.cached_blocks;
            let tokens = &self.tokens[index * size..(index + 1) * size];
            if self.hashes.len() == index {
                let parent = self.hashes.last().copied().unwrap_or(self.root);
                self.hashes.push(hasher.next(parent, tokens));
            }
            let before = match index.checked_sub(1) {
                None => Before::Root(self.root),
                Some(parent) => Before::Block(self.blocks[parent], pool.generation(self.blocks[parent])),
            };
            match pool.cache(self.blocks[index], self.hashes[index], before, tokens) {
                Some(block) => {
                    self.blocks[index] = block;
                    self.cached_blocks += 1;
                }
                None => self.private = true,
            }
        }
    }
}
