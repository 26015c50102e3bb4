//! Places where a text may be cut: its tokens are those of the parts, one after the other.
//!
//! In: a text. Out: places, in order. Start at [`Cuts::next`]. There are two kinds:
//!
//! - The end of an added token that stands there whatever follows: no other token's text holds its text, so none that
//!   begins at it or before it can be longer. Behind a token the search begins anew, and what lies between tokens is
//!   normalised, split and merged for itself.
//! - Between a letter and a space, a line's end or a full stop, as listed in [`is_between_words`]. No pattern of [`crate::split`]
//!   has a letter followed by one of these, and none looks back, so a word ends there and the next begins; no composition
//!   joins the two characters; and where text is not split, the model says whether a token holds both. No added token may
//!   touch the place; of those that are looked for in normalised text none may hold such a place ([`holds_a_place`]).

use std::fmt;

use crate::{
    added::{AddedToken, Found},
    definition::Definition,
    split::Splitter,
};

/// How far apart the places are that [`Cuts::next`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Distance {
    /// Behind an added token: as many bytes or more from the place before.
    pub token_bytes_min: usize,
    /// Between words, where there was no such token before: as many or more.
    pub word_bytes_min: usize,
}

/// The places where one text may be cut.
pub struct Cuts<'a> {
    definition: &'a Definition,
    text: &'a str,
    /// The last place, or the beginning.
    last: usize,
    /// Where the added token before ends.
    free: usize,
    /// The added token behind `free`, once it was looked for.
    ahead: Option<Option<Found>>,
}

impl fmt::Debug for Cuts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuts").field("last", &self.last).finish_non_exhaustive()
    }
}

impl<'a> Cuts<'a> {
    pub(crate) fn new(definition: &'a Definition, text: &'a str) -> Self {
        Self { definition, text, last: 0, free: 0, ahead: None }
    }

    /// The first place behind the last one that is far enough from it; `None` if there is none.
    ///
    /// Texts that begin alike have the same places up to where they part, but for an added token that begins before.
    pub fn next(&mut self, distance: Distance) -> Option<usize> {
        loop {
            let ahead = self.ahead();
            let before = ahead.map_or(self.text.len(), |token| token.start);
            let from = (self.last + distance.word_bytes_min.max(1)).max(self.free + 1);
            if let Some(place) = self.between_words(from, before) {
                self.last = place;
                return Some(place);
            }
            let token = ahead?;
            (self.free, self.ahead) = (token.end, None);
            if token.cuts && token.end - self.last >= distance.token_bytes_min {
                self.last = token.end;
                return Some(token.end);
            }
        }
    }

    fn ahead(&mut self) -> Option<Found> {
        let Self { definition, text, free, .. } = *self;
        *self.ahead.get_or_insert_with(|| definition.added.as_ref()?.next(text, free))
    }

    /// The first place between words that is not before `from` and lies before `end`.
    fn between_words(&self, from: usize, end: usize) -> Option<usize> {
        if !self.definition.cuts_between_words {
            return None;
        }
        let is_split = !matches!(self.definition.splitter, Splitter::Whole);
        let (text, model) = (self.text.as_bytes(), &self.definition.model);
        (from..end).find(|&at| is_between_words(text, at) && (is_split || model.parts_at(text, at)))
    }
}

/// Whether an added token's text may lie across a place between words, or looks at its surroundings.
pub(crate) fn holds_a_place(token: &AddedToken) -> bool {
    let text = token.text.as_bytes();
    let reaches_out = token.single_word || token.strips_left || token.strips_right;
    reaches_out || (1..text.len()).any(|at| is_between_words(text, at))
}

/// Whether a letter of ASCII or a Chinese character stands before `at`, and a space, a line feed, `，` or `。` there.
fn is_between_words(text: &[u8], at: usize) -> bool {
    let ends = match text[at] {
        b' ' | b'\n' => true,
        0xef => text[at..].starts_with("，".as_bytes()),
        0xe3 => text[at..].starts_with("。".as_bytes()),
        _ => false,
    };
    ends && match text[..at].last() {
        Some(last) if last.is_ascii() => last.is_ascii_alphabetic(),
        Some(_) => matches!(
            text[..at].last_chunk(),
            Some([0xe4, 0xb8..=0xbf, _] | [0xe5..=0xe8, _, _] | [0xe9, 0x80..=0xbd, _])
        ),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{Added, Encoder, Token};

    /// A vocabulary of the bytes alone, split as Llama 3 splits.
    fn encoder(added: &[Value]) -> Encoder {
        let letters: Vec<char> = (0..=255_u8).map(letter).collect();
        let vocabulary: serde_json::Map<String, Value> =
            letters.iter().zip(0..).map(|(letter, id)| (letter.to_string(), Value::from(id))).collect();
        let added: Vec<Value> = (256..)
            .zip(added)
            .map(|(id, token)| {
                let mut token = token.clone();
                token["id"] = json!(id);
                token
            })
            .collect();
        let pattern = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let bytes =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        Encoder::from_json(&json!({
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes]},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }))
        .unwrap()
    }

    /// GPT-2's letter for a byte.
    fn letter(byte: u8) -> char {
        let plain = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        if plain(byte) {
            return byte.into();
        }
        let before = (0..byte).filter(|&other| !plain(other)).count();
        char::from_u32(256 + before as u32).unwrap()
    }

    fn token(text: &str) -> Value {
        json!({"content": text, "normalized": false})
    }

    fn cuts(added: &[Value], text: &str, token_bytes_min: usize, word_bytes_min: usize) -> Vec<usize> {
        let encoder = encoder(added);
        let (mut cuts, mut places) = (encoder.cuts(text), Vec::new());
        while let Some(place) = cuts.next(Distance { token_bytes_min, word_bytes_min }) {
            places.push(place);
        }
        let encode = |text: &str| {
            let mut out: Vec<Token> = Vec::new();
            encoder.encode(Added::Recognised, text, &mut out);
            out
        };
        let mut parts = Vec::new();
        let ends = places.iter().copied().chain([text.len()]);
        ends.fold(0, |from, end| {
            parts.extend(encode(&text[from..end]));
            end
        });
        assert_eq!(parts, encode(text), "{text:?} cut at {places:?}");
        places
    }

    #[test]
    fn a_text_is_cut_behind_tokens_that_no_other_holds() {
        let tokens = |texts: &[&str]| texts.iter().map(|text| token(text)).collect::<Vec<_>>();
        assert_eq!(cuts(&tokens(&["<a>"]), "x<a>y<a>z", 0, 99), [4, 8]);
        assert_eq!(cuts(&tokens(&["<a>"]), "x<a>y<a>z", 5, 99), [8]);
        assert_eq!(cuts(&tokens(&["<a>", "<a>b"]), "<a>c<a>b", 0, 99), [8], "<a> may go on as <a>b");
        assert_eq!(cuts(&tokens(&["<a>", "b<a>c"]), "<a>b<a>c", 0, 99), [8], "<a> may be inside b<a>c");
        let strips = json!({"content": "<a>", "rstrip": true, "normalized": false});
        assert_eq!(cuts(&[strips], "<a> ", 0, 99), [0; 0]);
        let word = json!({"content": "<w>", "single_word": true, "normalized": false});
        assert_eq!(cuts(&[word, token("<a>")], "<a>", 0, 99), [0; 0]);
    }

    #[test]
    fn a_long_text_is_cut_between_words() {
        assert_eq!(cuts(&[], "one two  three\nfour. five", 99, 1), [3, 7, 14]);
        assert_eq!(cuts(&[], "one two three", 99, 4), [7]);
        assert_eq!(cuts(&[], "一二，三。四", 99, 1), [6, 12]);
        assert_eq!(cuts(&[], "don't 4 x.y", 99, 1), [5], "a digit may go on");
        let tokens = [token("<a>"), token("be it"), token(" c")];
        assert_eq!(cuts(&tokens, "a b<a>be it c d", 99, 1), [1], "no token is cut or touched");
        assert_eq!(cuts(&tokens, "aa b<a>b b<a>b", 2, 5), [7, 13]);
        let strips = json!({"content": "<l>", "lstrip": true, "normalized": false});
        assert_eq!(cuts(&[strips], "a  <l> b <l>c d", 99, 1), [13]);
    }

    #[test]
    fn tokens_of_normalised_text_forbid_places_that_they_may_lie_across() {
        let normalized = |text: &str| json!({"content": text, "normalized": true});
        assert_eq!(cuts(&[normalized("<a>")], "x y<a>", 99, 1), [1]);
        assert_eq!(cuts(&[normalized("x y")], "x y", 99, 1), [0; 0]);
        assert_eq!(cuts(&[json!({"content": "<a>", "lstrip": true})], "x y", 99, 1), [0; 0]);
    }
}
