use forebay_types::{BlockHash, TokenId};
use proptest::prelude::*;

use crate::{BlockHasher, HashKey};

fn golden(block_size_tokens: u32) -> BlockHasher {
    BlockHasher::new(HashKey::GOLDEN, block_size_tokens)
}

/// The heart of `tests/golden.json`, as constants: it cannot drift together with a file.
#[test]
fn hashes_are_what_they_always_were() {
    let hasher = golden(16);
    let root = hasher.root("smollm2-135m-instruct", "");
    assert_eq!(root, BlockHash(0xec21_256b_b054_cc1c));
    let tokens: Vec<TokenId> = (0..52).collect();
    assert_eq!(
        hasher.chain(root, &tokens),
        [0x7778_75cf_b4fe_4b73, 0xf6b4_ba3f_799b_9631, 0xc616_a54b_b1cd_5db7].map(BlockHash)
    );
}

#[test]
fn texts_of_a_root_do_not_run_together() {
    let hasher = golden(16);
    assert_ne!(hasher.root("ab", "c"), hasher.root("a", "bc"));
    assert_ne!(hasher.root("a", ""), hasher.root("", "a"));
}

#[test]
fn block_sizes_share_no_root() {
    assert_ne!(golden(16).root("m", "s"), golden(32).root("m", "s"));
}

#[test]
fn keys_do_not_reach_logs() {
    let key = HashKey([0xab; 16]);
    let text = format!("{key:?} {:?}", BlockHasher::new(key, 16));
    assert_eq!(text, "HashKey(..) BlockHasher { block_size_tokens: 16, .. }");
}

#[test]
#[should_panic(expected = "only a full block has a hash")]
fn a_partial_block_has_no_hash() {
    golden(16).next(BlockHash(1), &[1, 2, 3]);
}

#[test]
fn chain_into_clears_what_was_there() {
    let hasher = golden(2);
    let mut out = vec![BlockHash(7); 9];
    hasher.chain_into(BlockHash(1), &[1, 2, 3], &mut out);
    assert_eq!(out, [hasher.next(BlockHash(1), &[1, 2])]);
}

prop_compose! {
    fn hashers()(key in any::<[u8; 16]>(), size in 1u32..40) -> BlockHasher {
        BlockHasher::new(HashKey(key), size)
    }
}

proptest! {
    #[test]
    fn a_chain_is_its_blocks_one_by_one(hasher in hashers(), root: u64, tokens: Vec<TokenId>) {
        let mut parent = BlockHash(root);
        let expected: Vec<_> = tokens.chunks_exact(hasher.block_size_tokens() as usize).map(|block| {
            parent = hasher.next(parent, block);
            parent
        }).collect();
        prop_assert_eq!(hasher.chain(BlockHash(root), &tokens), expected);
    }

    #[test]
    fn a_prefix_of_the_tokens_gives_a_prefix_of_the_chain(
        hasher in hashers(), root: u64, tokens: Vec<TokenId>, cut: prop::sample::Index,
    ) {
        let cut = cut.index(tokens.len() + 1);
        let whole = hasher.chain(BlockHash(root), &tokens);
        let part = hasher.chain(BlockHash(root), &tokens[..cut]);
        prop_assert_eq!(part.len(), cut / hasher.block_size_tokens() as usize);
        prop_assert_eq!(&whole[..part.len()], &part[..]);
    }

    /// From the changed token's block on nothing is equal; before it everything is.
    #[test]
    fn every_bit_of_every_token_counts(
        hasher in hashers(), mut tokens in prop::collection::vec(any::<TokenId>(), 1..200),
        at: prop::sample::Index, bit in 0u32..32,
    ) {
        let before = hasher.chain(BlockHash(0), &tokens);
        let at = at.index(tokens.len());
        tokens[at] ^= 1 << bit;
        let after = hasher.chain(BlockHash(0), &tokens);
        let changed = at / hasher.block_size_tokens() as usize;
        for (index, (old, new)) in before.iter().zip(&after).enumerate() {
            prop_assert_eq!(old == new, index < changed);
        }
    }

    #[test]
    fn every_bit_of_parent_and_key_counts(key: [u8; 16], parent: u64, block: [TokenId; 16], bit in 0usize..64) {
        let hash = |key, parent| BlockHasher::new(HashKey(key), 16).next(BlockHash(parent), &block);
        let other_parent = parent ^ 1 << bit;
        prop_assert_ne!(hash(key, parent), hash(key, other_parent));
        for half in 0..2 {
            let mut other_key = key;
            other_key[half * 8 + bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(hash(key, parent), hash(other_key, parent));
        }
    }

    #[test]
    fn roots_differ_with_model_salt_and_key(
        hasher in hashers(), other in hashers(), model: String, salt: String, more: char,
    ) {
        let root = hasher.root(&model, &salt);
        prop_assert_eq!(root, hasher.root(&model, &salt));
        prop_assert_ne!(root, hasher.root(&format!("{model}{more}"), &salt));
        prop_assert_ne!(root, hasher.root(&model, &format!("{salt}{more}")));
        prop_assert_ne!(root, other.root(&model, &salt));
    }
}
