//! Made-up prompts: numbers that no cache has seen, or the same ones again.

use std::sync::Arc;

use forebay_twin::{Draw, mix};
use forebay_types::TokenId;

/// Lowest token that is used: special tokens stand at the beginning of a vocabulary, as a rule.
const LOWEST: u32 = 10;
/// Tokens to draw from, widest first: as many as most vocabularies have, and as few as every one has.
pub(super) const VOCABULARIES: [u32; 3] = [30_000, 1_000, 200];
/// Prompts of batches have the numbers below it, all others those above.
const FRESH_FIRST: u64 = 1 << 32;
/// The prompt whose beginnings are sent again.
const REPEATED: u64 = u64::MAX;

/// Draws prompts; another seed draws others.
#[derive(Debug, Clone)]
pub(super) struct Prompts {
    seed: u64,
    vocabulary: u32,
    next: u64,
}

impl Prompts {
    pub(super) fn new(seed: u64, vocabulary: u32) -> Self {
        Self { seed, vocabulary, next: FRESH_FIRST }
    }

    /// A prompt that was never sent.
    pub(super) fn fresh(&mut self, length: u32) -> Arc<[TokenId]> {
        self.next += 1;
        self.draw(self.next, length).collect()
    }

    /// That of a sequence in a batch: a longer one begins with the shorter one.
    pub(super) fn of_sequence(&self, sequence: u32, length: u32) -> Arc<[TokenId]> {
        self.draw(u64::from(sequence), length).collect()
    }

    /// The beginning of one and the same prompt.
    pub(super) fn repeated(&self, length: u32) -> Arc<[TokenId]> {
        self.draw(REPEATED, length).collect()
    }

    /// That beginning with something new after it.
    pub(super) fn repeated_then_fresh(&mut self, repeated: u32, length: u32) -> Arc<[TokenId]> {
        self.next += 1;
        self.draw(REPEATED, repeated).chain(self.draw(self.next, length)).collect()
    }

    fn draw(&self, prompt: u64, length: u32) -> impl Iterator<Item = TokenId> + use<> {
        let mut draw = Draw::new(self.seed ^ mix(prompt), "prompts");
        let vocabulary = u64::from(self.vocabulary);
        (0..length).map(move |_| LOWEST + draw.below(vocabulary) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_repeated_is_the_same() {
        let mut prompts = Prompts::new(1, 200);
        assert_ne!(prompts.fresh(16), prompts.fresh(16));
        assert_ne!(prompts.of_sequence(0, 16), prompts.of_sequence(1, 16));
        assert_eq!(prompts.of_sequence(3, 32)[..16], prompts.of_sequence(3, 16)[..]);
        let (first, second) = (prompts.repeated_then_fresh(32, 16), prompts.repeated_then_fresh(32, 16));
        assert_eq!(first[..32], prompts.repeated(32)[..]);
        assert!(first[..32] == second[..32] && first[32..] != second[32..]);
        assert_ne!(Prompts::new(2, 200).repeated(32), prompts.repeated(32));
        assert!(prompts.fresh(10_000).iter().all(|token| (10..210).contains(token)));
    }
}
