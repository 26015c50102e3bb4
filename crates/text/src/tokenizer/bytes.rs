//! The built-in byte tokenizer.

use forebay_types::TokenId;

use super::{Mode, vocabulary::Vocabulary};

pub(super) const END_OF_TEXT: TokenId = 256;
pub(super) const IM_END: TokenId = 258;

const SPECIALS: [(&str, TokenId); 4] =
    [("<|endoftext|>", END_OF_TEXT), ("<|im_start|>", 257), ("<|im_end|>", IM_END), ("<|pad|>", 259)];

/// What every special token begins with.
const MARK: &str = "<|";

const VOCAB_SIZE: usize = 264;

pub(super) fn vocabulary() -> Vocabulary {
    let mut vocabulary = Vocabulary::builder(VOCAB_SIZE);
    for byte in 0..=u8::MAX {
        vocabulary.token(TokenId::from(byte), vec![byte]);
    }
    for (text, id) in SPECIALS {
        vocabulary.added(id, text, true);
    }
    for reserved in 260..264 {
        vocabulary.reserved(reserved);
    }
    vocabulary.build()
}

pub(super) fn encode(mode: Mode, text: &str, out: &mut Vec<TokenId>) {
    out.reserve(text.len());
    let mut rest = text;
    if mode != Mode::Plain {
        let mut from = 0;
        while let Some(found) = rest[from..].find(MARK) {
            let start = from + found;
            match SPECIALS.iter().find(|(special, _)| rest[start..].starts_with(special)) {
                Some((special, id)) => {
                    append(&rest[..start], out);
                    out.push(*id);
                    rest = &rest[start + special.len()..];
                    from = 0;
                }
                None => from = start + MARK.len(),
            }
        }
    }
    append(rest, out);
}

fn append(text: &str, out: &mut Vec<TokenId>) {
    out.extend(text.bytes().map(TokenId::from));
}
