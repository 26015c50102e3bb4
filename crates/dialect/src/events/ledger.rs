//! Which tokens a block hash stands for. The engine announces hashes; vLLM's events carry the tokens too.
//!
//! In: the tokens of every leg, prompt and output, as they come. Out: the block behind a hash. The engine hashes with the
//! same hasher, so its hashes are found here. Pure.
//!
//! Invariants: a block that the engine caches is known, for it comes from a leg that was recorded before; blocks are kept
//! for running legs, for what is cached, and for `fading_max` more, whose announcement may still be on its way.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, TokenId};

/// One full block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) tokens: Box<[TokenId]>,
    /// `None` for the first of a prompt.
    pub(crate) parent: Option<BlockHash>,
    /// Of the prompt, on its first block alone, as vLLM has it.
    pub(crate) salt: Option<Arc<str>>,
}

#[derive(Debug)]
struct Entry {
    block: Block,
    /// Running legs that have this block.
    legs: u32,
    cached: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ledger {
    hasher: BlockHasher,
    blocks: HashMap<BlockHash, Entry>,
    /// Blocks that were given up, oldest first; some are in use again.
    fading: VecDeque<BlockHash>,
    fading_max: usize,
}

/// One sequence of tokens while it grows.
#[derive(Debug, Clone)]
pub(crate) struct Chain {
    /// Hash of the last full block, or the root.
    last: BlockHash,
    /// Whether `last` is the root.
    at_root: bool,
    salt: Arc<str>,
    /// Tokens behind the last full block.
    tail: Vec<TokenId>,
    /// Blocks to give up at the end.
    recorded: Vec<BlockHash>,
}

impl Ledger {
    pub(crate) fn new(hasher: BlockHasher, fading_max: usize) -> Self {
        Self { hasher, blocks: HashMap::new(), fading: VecDeque::new(), fading_max }
    }

    /// Records a prompt whose full blocks have these hashes.
    pub(crate) fn begin(
        &mut self,
        root: BlockHash,
        salt: &Arc<str>,
        tokens: &[TokenId],
        hashes: &[BlockHash],
    ) -> Chain {
        let size = self.hasher.block_size_tokens() as usize;
        let mut chain =
            Chain { last: root, at_root: true, salt: salt.clone(), tail: Vec::new(), recorded: Vec::new() };
        for (tokens, &hash) in tokens.chunks_exact(size).zip(hashes) {
            self.record(&mut chain, hash, tokens.into());
        }
        chain.tail.extend_from_slice(&tokens[hashes.len() * size..]);
        chain
    }

    /// One answer that goes on behind a prompt's chain, which records what they share.
    pub(crate) fn fork(prompt: &Chain) -> Chain {
        Chain { recorded: Vec::new(), ..prompt.clone() }
    }

    /// The next token of an answer.
    pub(crate) fn push(&mut self, chain: &mut Chain, token: TokenId) {
        chain.tail.push(token);
        if chain.tail.len() == self.hasher.block_size_tokens() as usize {
            let hash = self.hasher.next(chain.last, &chain.tail);
            let tokens = std::mem::take(&mut chain.tail).into_boxed_slice();
            self.record(chain, hash, tokens);
        }
    }

    fn record(&mut self, chain: &mut Chain, hash: BlockHash, tokens: Box<[TokenId]>) {
        let parent = (!chain.at_root).then_some(chain.last);
        let salt = (chain.at_root && !chain.salt.is_empty()).then(|| chain.salt.clone());
        let block = Block { tokens, parent, salt };
        self.blocks.entry(hash).or_insert(Entry { block, legs: 0, cached: false }).legs += 1;
        chain.recorded.push(hash);
        (chain.last, chain.at_root) = (hash, false);
    }

    /// A leg has ended.
    pub(crate) fn end(&mut self, chain: Chain) {
        for hash in chain.recorded {
            if let Some(entry) = self.blocks.get_mut(&hash) {
                entry.legs -= 1;
                self.fade(hash);
            }
        }
    }

    /// The engine caches it now. `None` if its tokens are not known.
    pub(crate) fn stored(&mut self, hash: BlockHash) -> Option<&Block> {
        let entry = self.blocks.get_mut(&hash)?;
        entry.cached = true;
        Some(&entry.block)
    }

    /// The engine has thrown it away. Whether it was known to be cached.
    pub(crate) fn removed(&mut self, hash: BlockHash) -> bool {
        let Some(entry) = self.blocks.get_mut(&hash) else { return false };
        let was = std::mem::replace(&mut entry.cached, false);
        self.fade(hash);
        was
    }

    /// The engine has thrown everything away.
    pub(crate) fn cleared(&mut self) {
        let cached: Vec<BlockHash> =
            self.blocks.iter().filter(|(_, entry)| entry.cached).map(|(hash, _)| *hash).collect();
        cached.into_iter().for_each(|hash| {
            self.removed(hash);
        });
    }

    /// What the engine caches after announcements were lost, parents first, and how many blocks of it are unknown.
    pub(crate) fn resync(&mut self, hashes: &[BlockHash]) -> (Vec<(BlockHash, Block)>, usize) {
        self.cleared();
        let mut unknown = 0;
        for &hash in hashes {
            unknown += usize::from(self.stored(hash).is_none());
        }
        let mut done = HashSet::new();
        let mut ordered = Vec::new();
        for &hash in hashes {
            // Up to the first ancestor that is written already, or not cached; then down again.
            let mut path = Vec::new();
            let mut at = Some(hash);
            while let Some(hash) = at
                && let Some(entry) = self.blocks.get(&hash).filter(|entry| entry.cached)
                && done.insert(hash)
            {
                path.push((hash, entry.block.clone()));
                at = entry.block.parent;
            }
            ordered.extend(path.into_iter().rev());
        }
        (ordered, unknown)
    }

    /// Blocks that nothing needs any more stay for a while: their announcement may still be on its way.
    fn fade(&mut self, hash: BlockHash) {
        if self.blocks.get(&hash).is_none_or(|entry| entry.legs > 0 || entry.cached) {
            return;
        }
        self.fading.push_back(hash);
        while self.fading.len() > self.fading_max {
            let Some(oldest) = self.fading.pop_front() else { break };
            if self.blocks.get(&oldest).is_some_and(|entry| entry.legs == 0 && !entry.cached) {
                self.blocks.remove(&oldest);
            }
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.blocks.len()
    }
}

#[cfg(test)]
mod tests {
    use forebay_kv_hash::HashKey;

    use super::*;

    const SIZE: u32 = 4;

    fn ledger(fading_max: usize) -> (Ledger, BlockHasher, BlockHash) {
        let hasher = BlockHasher::new(HashKey([3; 16]), SIZE);
        (Ledger::new(hasher, fading_max), hasher, hasher.root("m", ""))
    }

    fn tokens(count: u32) -> Vec<TokenId> {
        (100..100 + count).collect()
    }

    #[test]
    fn blocks_of_prompt_and_answer_are_found_under_the_engines_hashes() {
        let (mut ledger, hasher, _) = ledger(8);
        let root = hasher.root("m", "salt");
        let all = tokens(14);
        let hashes = hasher.chain(root, &all);
        let prompt = ledger.begin(root, &"salt".into(), &all[..6], &hashes[..1]);
        let mut answer = Ledger::fork(&prompt);
        all[6..].iter().for_each(|token| ledger.push(&mut answer, *token));
        let first = ledger.stored(hashes[0]).unwrap().clone();
        assert_eq!((&*first.tokens, first.parent, first.salt.as_deref()), (&all[..4], None, Some("salt")));
        let third = ledger.stored(hashes[2]).unwrap().clone();
        assert_eq!((&*third.tokens, third.parent, third.salt), (&all[8..12], Some(hashes[1]), None));
        assert_eq!(hashes.len(), 3, "the rest is no full block");
        assert!(ledger.stored(BlockHash(1)).is_none());
    }

    #[test]
    fn what_nothing_needs_goes_after_a_while() {
        let (mut ledger, hasher, root) = ledger(2);
        for round in 0..50_u32 {
            let all: Vec<TokenId> = (round * 1000..round * 1000 + 12).collect();
            let hashes = hasher.chain(root, &all);
            let chain = ledger.begin(root, &"".into(), &all, &hashes);
            assert!(ledger.stored(hashes[0]).is_some());
            ledger.end(chain);
            assert!(ledger.stored(hashes[2]).is_some(), "its announcement may come late");
            assert!(ledger.removed(hashes[2]) && ledger.removed(hashes[0]));
            assert!(!ledger.removed(hashes[0]));
            assert!(ledger.len() <= 4, "{} blocks are kept", ledger.len());
        }
    }

    #[test]
    fn a_block_lives_as_long_as_one_leg_or_the_cache_has_it() {
        let (mut ledger, hasher, root) = ledger(0);
        let all = tokens(4);
        let hashes = hasher.chain(root, &all);
        let one = ledger.begin(root, &"".into(), &all, &hashes);
        let two = ledger.begin(root, &"".into(), &all, &hashes);
        ledger.end(one);
        assert!(ledger.stored(hashes[0]).is_some());
        ledger.end(two);
        assert!(ledger.removed(hashes[0]), "the cache had it");
        assert_eq!(ledger.len(), 0);
    }

    #[test]
    fn a_snapshot_puts_parents_first() {
        let (mut ledger, hasher, root) = ledger(64);
        let all = tokens(16);
        let hashes = hasher.chain(root, &all);
        let prompt = ledger.begin(root, &"".into(), &all, &hashes);
        let branch: Vec<TokenId> = all[..8].iter().copied().chain(200..208).collect();
        let others = hasher.chain(root, &branch);
        let second = ledger.begin(root, &"".into(), &branch, &others);
        ledger.end(prompt);
        ledger.end(second);
        let mut cached: Vec<BlockHash> = hashes[..3].iter().chain(&others[2..]).copied().collect();
        cached.push(BlockHash(77));
        cached.reverse();
        let (ordered, unknown) = ledger.resync(&cached);
        assert_eq!((ordered.len(), unknown), (5, 1));
        for (nth, (_, block)) in ordered.iter().enumerate() {
            let before = |parent: BlockHash| ordered[..nth].iter().any(|(hash, _)| *hash == parent);
            assert!(block.parent.is_none_or(before), "block {nth} comes before its parent");
        }
        assert!(!ledger.removed(hashes[3]), "it was not in the snapshot");
    }
}
