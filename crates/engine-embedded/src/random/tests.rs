use super::*;
use crate::{ChunkInput, Executor, Logits, SampleParams, VecPool, sample};

/// Tokens that the model says after `prompt`.
fn said(weights: &std::sync::Arc<Weights>, prompt: &[u32], count: usize, temperature: f32) -> Vec<u32> {
    let mut executor = Executor::new(weights.clone(), 16);
    let mut pool = VecPool::new(8, weights.kv_block_bytes(16), 16);
    let mut logits = Logits::new();
    let (mut tokens, mut start) = (prompt.to_vec(), 0);
    while tokens.len() < prompt.len() + count {
        let chunk = ChunkInput {
            start: start as u32,
            tokens: &tokens[start..],
            blocks: &[0, 1, 2, 3, 4, 5, 6, 7],
            want_logits: true,
        };
        executor.execute(&mut pool, &[chunk], &mut logits);
        start = tokens.len();
        let position = start as u32;
        let params =
            SampleParams { temperature, top_p: 1.0, top_k: 0, seed: 5, choice: 0, position, logprobs: None };
        tokens.push(sample(logits.row(0), &params).0);
    }
    tokens.split_off(prompt.len())
}

/// Seed 1's greedy words. They change with any change of the arithmetic, which must come with a new
/// `ARITHMETIC_VERSION`: engines of both kinds must not exchange KV.
#[test]
fn the_arithmetic_is_what_it_was() {
    let weights = Weights::random_tiny(1);
    let text: String = said(&weights, b"hello".map(u32::from).as_slice(), 24, 0.0)
        .into_iter()
        .map(|token| char::from(token as u8))
        .collect();
    assert_eq!(text, "IL[@[L!sPxxx [8xD? H Jo[");
}

#[test]
fn it_says_printable_ascii_and_never_ends() {
    for seed in 0..4 {
        let weights = Weights::random_tiny(seed);
        for temperature in [0.0, 1.0, 1.5] {
            let tokens = said(&weights, &[BOS, 104, 0, 255, EOS], 100, temperature);
            assert!(tokens.iter().all(|token| SAID.contains(&(*token as usize))), "{tokens:?}");
        }
    }
}

#[test]
fn the_seed_is_the_model() {
    let [a, b, c] = [1, 1, 2].map(Weights::random_tiny);
    assert_eq!(a.fingerprint(), b.fingerprint());
    assert_ne!(a.fingerprint(), c.fingerprint());
    assert_eq!(said(&a, &[104], 20, 0.0), said(&b, &[104], 20, 0.0));
    assert_ne!(said(&a, &[104], 20, 0.0), said(&c, &[104], 20, 0.0));
}

#[test]
fn its_tokenizer_is_bytes_and_chatml() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.tokens.len(), VOCAB);
    let check = |id: usize, token: &str| assert_eq!(tokenizer.tokens[id], token);
    check(usize::from(b'a'), "a");
    check(usize::from(b' '), "Ġ");
    check(usize::from(b'\n'), "Ċ");
    check(0x7f, "ġ");
    check(0xad, "Ń");
    check(0xff, "ÿ");
    check(256, "<|endoftext|>");
    check(258, "<|im_end|>");
    let mut kinds = tokenizer.tokens.clone();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds.len(), VOCAB);
    assert_eq!(Weights::random_tiny(1).config().eos, Some(258));
}

#[test]
fn a_block_has_the_documented_size() {
    let weights = Weights::random_tiny(1);
    assert_eq!(weights.kv_block_bytes(16), 4 * 2 * 16 * (2 * 32) * 4);
    assert!(weights.bytes() > 600_000);
}
