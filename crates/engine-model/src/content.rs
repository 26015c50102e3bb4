//! What a simulated KV block holds and which token follows from it.
//!
//! Each token slot of a block holds a digest of the whole prefix up to it, made from the slot before, which may lie in
//! another block. The next token is drawn from the digests that the sequence's blocks hold at that moment, so KV that is
//! missing, stale, foreign or out of order gives other tokens, as it would in a real engine.

use forebay_types::{Sampling, TokenId};

/// The digest of a token slot, given that of the slot before (0 at position 0).
pub fn digest_next(previous: u64, token: TokenId, position: u32) -> u64 {
    mix(previous ^ mix(u64::from(token) << 32 | (u64::from(position) + 1)).rotate_left(17))
}

/// The token that follows a sequence whose blocks hold `digests`: that of the last filled slot of each block, in order.
///
/// At temperature 0 a function of the digests alone; else of the seed, the choice and the digests.
///
/// # Panics
/// If `candidates` is empty.
pub fn sampled_token(
    digests: impl Iterator<Item = u64>,
    choice: u32,
    sampling: &Sampling,
    candidates: &[TokenId],
) -> TokenId {
    let mut state = 0x666f_7265_6261_7921;
    for digest in digests {
        state = mix(state ^ digest).rotate_left(23);
    }
    if sampling.temperature > 0.0 {
        state = mix(state ^ mix(sampling.seed) ^ u64::from(choice).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    candidates[(mix(state) % candidates.len() as u64) as usize]
}

/// The finaliser of SplitMix64: a bijection in which every bit of the input moves every bit of the output.
fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 4;

    fn sampling(temperature: f32, seed: u64) -> Sampling {
        Sampling {
            temperature,
            top_p: 1.0,
            top_k: 0,
            seed,
            output_tokens_max: 16,
            stop_tokens: [].into(),
            logprobs: None,
        }
    }

    fn blocks(tokens: &[TokenId]) -> Vec<u64> {
        let mut digest = 0;
        let slots: Vec<u64> = (0_u32..)
            .zip(tokens)
            .map(|(position, token)| {
                digest = digest_next(digest, *token, position);
                digest
            })
            .collect();
        slots.chunks(SIZE).map(|block| *block.last().expect("chunks are not empty")).collect()
    }

    fn next(blocks: &[u64], choice: u32, sampling: &Sampling) -> TokenId {
        let candidates: Vec<TokenId> = (0..50_000).collect();
        sampled_token(blocks.iter().copied(), choice, sampling, &candidates)
    }

    #[test]
    fn damaged_kv_gives_other_tokens() {
        let greedy = sampling(0.0, 1);
        let mut unchanged = 0;
        for prompt in 0..500_u32 {
            let tokens: Vec<TokenId> = (0..40).map(|i| i * 7 + prompt).collect();
            let sound = blocks(&tokens);
            let (mut zeroed, mut swapped) = (sound.clone(), sound.clone());
            zeroed[(prompt % 10) as usize] = 0;
            swapped.swap((prompt % 9) as usize, 9);
            let expected = next(&sound, 0, &greedy);
            unchanged += usize::from(next(&zeroed, 0, &greedy) == expected);
            unchanged += usize::from(next(&swapped, 0, &greedy) == expected);
        }
        assert!(unchanged <= 1, "{unchanged} of 1000 damaged prompts went unnoticed");
    }

    #[test]
    fn seed_and_choice_matter_only_above_temperature_zero() {
        let kv = blocks(&[1, 2, 3, 4, 5, 6]);
        assert_eq!(next(&kv, 0, &sampling(0.0, 1)), next(&kv, 3, &sampling(0.0, 2)));
        assert_ne!(next(&kv, 0, &sampling(1.0, 1)), next(&kv, 0, &sampling(1.0, 2)));
        assert_ne!(next(&kv, 0, &sampling(1.0, 1)), next(&kv, 1, &sampling(1.0, 1)));
    }

    #[test]
    fn a_slot_is_never_what_an_unwritten_one_holds() {
        assert_ne!(digest_next(0, 0, 0), 0);
        assert_ne!(digest_next(1, 2, 3), digest_next(1, 2, 4));
    }
}
