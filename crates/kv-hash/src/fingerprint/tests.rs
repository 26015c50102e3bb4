use std::collections::HashSet;

use forebay_types::TokenId;
use proptest::prelude::*;
use siphasher::sip::SipHasher13;

use super::Fingerprints;

fn fingerprints(piece_tokens: usize) -> Fingerprints {
    Fingerprints::new(SipHasher13::new_with_key(&[7; 16]), piece_tokens)
}

/// The definition, word by word.
fn nh_by_definition(own: &Fingerprints, tokens: &[TokenId]) -> u128 {
    let mut bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    bytes.resize(own.words.len() * 16, 0);
    let word = |index: usize| u64::from_le_bytes(bytes[index * 8..][..8].try_into().unwrap());
    let mut sum = 0u128;
    for (group, words) in own.words.iter().enumerate() {
        let factors = [0, 1].map(|half| u128::from(word(2 * group + half).wrapping_add(words[half])));
        sum = sum.wrapping_add(factors[0] * factors[1]);
    }
    sum
}

#[test]
fn every_bit_of_every_token_is_seen() {
    for piece_tokens in [1, 2, 3, 5, 64, 1024] {
        let own = fingerprints(piece_tokens);
        let mut tokens: Vec<TokenId> = (0..piece_tokens as u32).collect();
        let mut seen = HashSet::from([own.nh(&tokens)]);
        for at in 0..piece_tokens {
            for bit in 0..32 {
                tokens[at] ^= 1 << bit;
                assert!(seen.insert(own.nh(&tokens)), "{piece_tokens} tokens, token {at}, bit {bit}");
                tokens[at] ^= 1 << bit;
            }
        }
    }
}

/// A million pieces that differ in one or two tokens, by little: what a weak sum confuses.
#[test]
fn near_identical_pieces_have_names_of_their_own() {
    let own = fingerprints(256);
    let mut tokens: Vec<TokenId> = (0..256).map(|index| 100 + index % 3).collect();
    let mut names = HashSet::new();
    let mut check = |tokens: &[TokenId]| assert!(names.insert(own.name(1, tokens)), "{tokens:?}");
    check(&tokens);
    for first in 0..256 {
        for more in 1..=100 {
            tokens[first] += more;
            check(&tokens);
            tokens[first] -= more;
        }
        // Among them those whose differences cancel in a sum of tokens.
        for (second, more, less) in
            (0..first).flat_map(|at| (1..=6).flat_map(move |more| (1..=5).map(move |less| (at, more, less))))
        {
            tokens[first] += more;
            tokens[second] -= less;
            check(&tokens);
            tokens[first] -= more;
            tokens[second] += less;
        }
    }
    assert!(names.len() > 1_000_000, "{}", names.len());
}

#[test]
fn a_name_depends_on_what_is_before_and_on_the_key() {
    let tokens: Vec<TokenId> = (0..64).collect();
    let own = fingerprints(64);
    let other = Fingerprints::new(SipHasher13::new_with_key(&[8; 16]), 64);
    assert_ne!(own.name(1, &tokens), own.name(2, &tokens));
    assert_ne!(own.name(1, &tokens), other.name(1, &tokens));
    assert_ne!(own.nh(&tokens), other.nh(&tokens));
}

#[test]
fn secret_words_are_all_different() {
    let own = fingerprints(2048);
    let words: HashSet<u64> = own.words.iter().flatten().copied().collect();
    assert_eq!(words.len(), 1024);
}

proptest! {
    #[test]
    fn it_is_nh(tokens in prop::collection::vec(any::<TokenId>(), 1..100)) {
        let own = fingerprints(tokens.len());
        prop_assert_eq!(own.nh(&tokens), nh_by_definition(&own, &tokens));
    }

    #[test]
    fn swapped_tokens_are_another_piece(
        mut tokens in prop::collection::vec(any::<TokenId>(), 2..100), a: prop::sample::Index, b: prop::sample::Index,
    ) {
        let own = fingerprints(tokens.len());
        let before = own.name(0, &tokens);
        let (a, b) = (a.index(tokens.len()), b.index(tokens.len()));
        let is_same = tokens[a] == tokens[b];
        tokens.swap(a, b);
        prop_assert_eq!(own.name(0, &tokens) == before, is_same);
    }
}
