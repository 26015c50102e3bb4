use proptest::prelude::*;

use super::*;

fn stream(tokens: &[TokenId]) -> (String, Vec<String>) {
    let mut detokenizer = Detokenizer::new(Tokenizer::bytes());
    let mut pieces = Vec::new();
    for &token in tokens {
        let mut piece = String::new();
        detokenizer.push(token, &mut piece);
        pieces.push(piece);
    }
    let mut end = String::new();
    detokenizer.finish(&mut end);
    (pieces.concat() + &end, pieces)
}

fn tokens(bytes: &[u8]) -> Vec<TokenId> {
    bytes.iter().map(|&byte| TokenId::from(byte)).collect()
}

#[test]
fn a_character_comes_whole_with_its_last_byte() {
    let (text, pieces) = stream(&tokens("a€😀".as_bytes()));
    assert_eq!(text, "a€😀");
    assert_eq!(pieces, ["a", "", "", "€", "", "", "", "😀"]);
}

#[test]
fn bytes_that_are_no_text_are_replaced_once_for_each_part() {
    let check = |bytes: &[u8], expected: &str| assert_eq!(stream(&tokens(bytes)).0, expected, "{bytes:02x?}");
    check(b"\xff", "\u{fffd}");
    check(b"\xe2\x82", "\u{fffd}"); // cut off at the end: one mark for the part
    check(b"\xe2\x82A", "\u{fffd}A"); // cut off in the middle
    check(b"\xe2\x82\xe2\x82\xac", "\u{fffd}€"); // what breaks one character begins the next
    check(b"\xed\xa0\x80", "\u{fffd}\u{fffd}\u{fffd}"); // a surrogate is three times nothing
    check(b"\xf0\x9f\x98", "\u{fffd}");
}

#[test]
fn special_tokens_have_no_text_and_do_not_part_characters() {
    let tokenizer = Tokenizer::bytes();
    let end = tokenizer.special_id("<|im_end|>").unwrap();
    assert_eq!(stream(&[0xe2, 0x82, end, 0xac, 9999]).0, "€");
}

#[test]
fn after_finish_it_is_as_new() {
    let mut detokenizer = Detokenizer::new(Tokenizer::bytes());
    let mut out = String::new();
    detokenizer.push(0xe2, &mut out);
    detokenizer.finish(&mut out);
    detokenizer.finish(&mut out);
    detokenizer.push(TokenId::from(b'x'), &mut out);
    assert_eq!(out, "\u{fffd}x");
}

/// Bytes in which broken and cut-off characters are as likely as whole ones.
fn ragged_bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        any::<char>().prop_map(|c| c.to_string().into_bytes()),
        any::<char>().prop_flat_map(|c| {
            let bytes = c.to_string().into_bytes();
            (Just(bytes.clone()), 0..=bytes.len()).prop_map(|(bytes, end)| bytes[..end].to_vec())
        }),
        prop::collection::vec(any::<u8>(), 0..4),
        prop::sample::select(vec![0x80_u8, 0xbf, 0xc0, 0xc2, 0xe0, 0xed, 0xf0, 0xf4, 0xf5, 0xff])
            .prop_map(|byte| vec![byte]),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_split_gives_what_decoding_the_whole_gives(
        bytes in ragged_bytes(), sizes in prop::collection::vec(1_usize..6, 1..100),
    ) {
        let (mut held, mut held_len) = ([0; HELD_BYTES_MAX], 0);
        let mut text = String::new();
        let mut rest = bytes.as_slice();
        for size in sizes.iter().cycle() {
            if rest.is_empty() { break; }
            let (chunk, after) = rest.split_at((*size).min(rest.len()));
            push_bytes(&mut held, &mut held_len, chunk, &mut text);
            rest = after;
        }
        if held_len > 0 { text.push(char::REPLACEMENT_CHARACTER); }
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn what_is_held_back_is_never_a_whole_character(bytes in ragged_bytes()) {
        let mut detokenizer = Detokenizer::new(Tokenizer::bytes());
        let mut text = String::new();
        for (index, &byte) in bytes.iter().enumerate() {
            detokenizer.push(TokenId::from(byte), &mut text);
            let whole = String::from_utf8_lossy(&bytes[..=index]);
            prop_assert!(whole.starts_with(&text));
            prop_assert!(whole.chars().count() - text.chars().count() <= 1);
        }
    }
}
