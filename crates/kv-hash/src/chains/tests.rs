use forebay_types::{BlockHash, TokenId};
use proptest::prelude::*;

use super::{ChainLimits, ChainStats, Reused, SessionChains};
use crate::{BlockHasher, HashKey};

const PLENTY: usize = 16 << 20;

fn chains(block_size_tokens: u32, bytes_max: usize) -> SessionChains {
    SessionChains::new(BlockHasher::new(HashKey::GOLDEN, block_size_tokens), ChainLimits { bytes_max })
}

/// Tokens of a text that `seed` names.
fn text(seed: u64, tokens: usize) -> Vec<TokenId> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed >> 40) as TokenId % 128_000
    };
    (0..tokens).map(|_| next()).collect()
}

/// Chains `tokens`, holds the answer against plain hashing, and gives the blocks reused.
fn reused(chains: &SessionChains, root: BlockHash, tokens: &[TokenId]) -> usize {
    let mut out = vec![BlockHash(9); 3];
    let Reused { blocks } = chains.chain_into(root, tokens, &mut out);
    assert!(out == chains.hasher().chain(root, tokens), "{} tokens under {root}", tokens.len());
    blocks
}

#[test]
fn hashes_are_what_they_always_were() {
    let chains = chains(1, PLENTY);
    let hasher = chains.hasher();
    let root = hasher.root("smollm2-135m-instruct", "");
    let tokens: Vec<TokenId> = (0..1000).collect();
    for _ in 0..2 {
        assert_eq!(chains.chain(root, &tokens), hasher.chain(root, &tokens));
    }
    assert_eq!(chains.stats().blocks_reused, 960);
}

#[test]
fn a_turn_hashes_what_is_new() {
    let chains = chains(16, PLENTY);
    let tokens = text(1, 110_000);
    //                             tokens   blocks reused: those of the whole pieces before
    for (turn, (length, expected)) in
        [(100_000, 0), (100_500, 97 * 64), (100_500, 98 * 64), (110_000, 98 * 64), (64 * 16, 64)]
            .into_iter()
            .enumerate()
    {
        assert_eq!(reused(&chains, BlockHash(5), &tokens[..length]), expected, "turn {turn}");
    }
}

#[test]
fn short_prompts_are_only_hashed() {
    let chains = chains(16, PLENTY);
    let tokens = text(1, 1023);
    for length in [0, 1, 15, 16, 1023, 1023] {
        assert_eq!(reused(&chains, BlockHash(5), &tokens[..length]), 0);
    }
    let expected = ChainStats {
        pieces_max: chains.stats().pieces_max,
        piece_blocks: 64,
        blocks_hashed: 127,
        ..Default::default()
    };
    assert_eq!(chains.stats(), expected);
}

#[test]
fn branches_share_their_beginning() {
    let chains = chains(16, PLENTY);
    let mut tokens = text(1, 10 * 1024);
    assert_eq!(reused(&chains, BlockHash(5), &tokens), 0);
    tokens[4 * 1024 + 1000] ^= 1;
    assert_eq!(reused(&chains, BlockHash(5), &tokens), 4 * 64);
    assert_eq!(reused(&chains, BlockHash(5), &tokens), 10 * 64);
}

#[test]
fn tenants_and_models_share_no_piece() {
    let chains = chains(16, PLENTY);
    let tokens = text(1, 4096);
    let roots = [("m", "a"), ("m", "b"), ("n", "a"), ("ma", "")]
        .map(|(model, salt)| chains.hasher().root(model, salt));
    for (index, root) in roots.into_iter().enumerate() {
        assert_eq!(reused(&chains, root, &tokens), 0);
        assert_eq!(chains.stats().pieces, 4 * (index + 1));
    }
    for root in roots {
        assert_eq!(reused(&chains, root, &tokens), 256);
    }
}

/// The same tokens at another place are another piece, and nothing is found from the middle of a prompt on.
#[test]
fn a_piece_counts_only_where_it_was() {
    let chains = chains(16, PLENTY);
    let twice = text(1, 1024).repeat(2);
    assert_eq!(reused(&chains, BlockHash(5), &twice), 0);
    assert_eq!(chains.stats().pieces, 2);
    let other_head: Vec<_> = [text(2, 1024), twice[1024..].to_vec()].concat();
    assert_eq!(reused(&chains, BlockHash(5), &other_head), 0);
}

#[test]
fn a_forgotten_piece_is_a_hole_not_an_end() {
    let chains = chains(16, 8 * 533 + 24);
    assert_eq!(chains.stats().pieces_max, 8);
    let tokens = text(1, 8 * 1024);
    reused(&chains, BlockHash(5), &tokens);
    // Takes the place of the prompt's tail: that was remembered first.
    reused(&chains, BlockHash(5), &text(2, 1024));
    assert_eq!(reused(&chains, BlockHash(5), &tokens[..7 * 1024]), 7 * 64);
    // All were wanted again but the newcomer; the hand passes seven of them.
    assert_eq!(reused(&chains, BlockHash(5), &tokens), 7 * 64);
    assert_eq!(reused(&chains, BlockHash(5), &tokens), 8 * 64);
}

/// Prompts that come once go; a conversation that goes on stays.
#[test]
fn passing_prompts_do_not_push_out_a_conversation() {
    let chains = chains(16, 4 << 20);
    let fits = chains.stats().pieces_max;
    let conversation = text(1, 100 * 1024);
    reused(&chains, BlockHash(5), &conversation);
    let mut hashed_again = 0;
    for round in 0..200 {
        let passing = text(1000 + round, fits / 10 * 1024);
        reused(&chains, BlockHash(6), &passing);
        hashed_again += 6400 - reused(&chains, BlockHash(5), &conversation);
    }
    assert!(chains.stats().evictions > 10 * fits as u64);
    assert!(hashed_again < 6400 * 200 / 100, "{hashed_again} blocks hashed again");
}

#[test]
fn it_is_off_where_nothing_can_be_remembered() {
    for chains in [chains(16, 0), chains(16, 500), chains(2049, PLENTY), chains(u32::MAX, PLENTY)] {
        let tokens = text(1, 5000);
        for _ in 0..2 {
            assert_eq!(reused(&chains, BlockHash(5), &tokens), 0);
        }
        let blocks_hashed = 2 * (5000 / u64::from(chains.hasher().block_size_tokens()));
        assert_eq!(chains.stats(), ChainStats { blocks_hashed, ..ChainStats::default() });
    }
}

#[test]
fn every_block_size_works() {
    for size in (1..=1024).step_by(7).chain([16, 32, 33, 64, 128, 1023, 1024, 2047, 2048]) {
        let chains = chains(size, 1 << 20);
        let piece_blocks = chains.stats().piece_blocks;
        assert!(piece_blocks > 0 && piece_blocks * size as usize <= 2048, "{size}");
        let tokens = text(u64::from(size), 3 * piece_blocks * size as usize + size as usize);
        assert_eq!(reused(&chains, BlockHash(5), &tokens), 0);
        let blocks = tokens.len() / size as usize;
        let in_pieces = blocks - blocks % piece_blocks;
        assert_eq!(reused(&chains, BlockHash(5), &tokens), in_pieces, "{size}");
    }
}

#[test]
fn no_prompt_makes_it_grow_past_its_limit() {
    for bytes_max in [600, 1000, 10_000, 100_000, 1 << 20, 3 << 20] {
        let chains = chains(1, bytes_max);
        for seed in 0..40 {
            reused(&chains, BlockHash(seed), &text(seed, 64 * 200));
            let stats = chains.stats();
            assert!(stats.bytes <= bytes_max, "{stats:?}, {bytes_max} bytes");
            assert!(stats.pieces <= stats.pieces_max, "{stats:?}");
        }
        let stats = chains.stats();
        assert_eq!(stats.pieces, stats.pieces_max.min(8000), "{bytes_max} bytes");
        // And what it may use it does use, but for a piece a shard and the rounding of each piece's share.
        let unused_max = 16 * (533 + 24) + stats.pieces;
        assert!(stats.bytes + unused_max > bytes_max || stats.pieces == 8000, "{stats:?}, {bytes_max} bytes");
    }
}

#[test]
fn neither_keys_nor_prompts_reach_logs() {
    let text = format!("{:?}", chains(16, 0));
    let hidden =
        "SessionChains { hasher: BlockHasher { block_size_tokens: 16, .. }, stats: ChainStats { pieces: 0, ";
    assert!(text.starts_with(hidden), "{text}");
}

/// One turn of one of several conversations.
#[derive(Debug, Clone)]
enum Turn {
    Extend {
        tokens: usize,
    },
    /// Goes back to a share of the text and says something else.
    Branch {
        keep: prop::sample::Index,
        tokens: usize,
        seed: u64,
    },
    Repeat,
}

fn turns() -> impl Strategy<Value = Vec<(usize, Turn)>> {
    let turn = prop_oneof![
        3 => (1usize..300).prop_map(|tokens| Turn::Extend { tokens }),
        1 => (any::<prop::sample::Index>(), 0usize..300, any::<u64>())
            .prop_map(|(keep, tokens, seed)| Turn::Branch { keep, tokens, seed }),
        1 => Just(Turn::Repeat),
    ];
    prop::collection::vec((0usize..6, turn), 1..60)
}

proptest! {
    /// Conversations of three tenants that begin alike, extend and branch, from ample room down to a single piece's.
    #[test]
    fn chains_are_those_of_plain_hashing(
        turns in turns(), key: [u8; 16], size in 1u32..6, pieces in prop_oneof![0usize..6, Just(1000)],
    ) {
        let hasher = BlockHasher::new(HashKey(key), size);
        let chains = SessionChains::new(hasher, ChainLimits { bytes_max: pieces * 533 + 24 });
        let start = text(1, 150);
        let mut conversations = vec![start; 6];
        for (who, turn) in turns {
            let tokens = &mut conversations[who];
            match turn {
                Turn::Extend { tokens: more } => tokens.extend(text(tokens.len() as u64, more)),
                Turn::Branch { keep, tokens: more, seed } => {
                    tokens.truncate(keep.index(tokens.len() + 1));
                    tokens.extend(text(seed, more));
                }
                Turn::Repeat => {}
            }
            reused(&chains, hasher.root("m", ["a", "b", "c"][who % 3]), tokens);
            let stats = chains.stats();
            prop_assert!(stats.bytes <= pieces * 533 + 24);
            prop_assert!(stats.pieces <= pieces);
        }
        let stats = chains.stats();
        if pieces == 1000 {
            prop_assert_eq!(stats.evictions, 0);
        }
    }
}
