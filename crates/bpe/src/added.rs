//! Added tokens: texts that are a token wherever they stand, before anything else looks at the text.
//!
//! In: a text. Out: where the next one is, leftmost and of those the longest, as `tokenizers` finds them. Start at
//! [`Finder::next`].

use std::{collections::HashMap, sync::Arc};

use aho_corasick::{AhoCorasick, AhoCorasickKind, Anchored, Input, MatchKind, StartKind};

use crate::{
    Token, Unsupported,
    unicode::{Builder, Classes},
};

/// An added token as `tokenizer.json` writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddedToken {
    pub(crate) id: Token,
    pub(crate) text: String,
    /// Not between letters, digits or underscores.
    pub(crate) single_word: bool,
    /// White space before it, or after, is part of it.
    pub(crate) strips_left: bool,
    pub(crate) strips_right: bool,
}

#[derive(Debug)]
pub(crate) struct Finder {
    automaton: AhoCorasick,
    tokens: Vec<AddedToken>,
    /// The bytes that tokens begin with, if they are few.
    few_starts: Option<Vec<u8>>,
    starts: Box<[bool; 256]>,
    /// Whether a token begins with these two bytes: few places that begin like one go on like one.
    pairs: Box<[u128; 512]>,
    /// By token: whether what follows its text is encoded as if nothing stood before.
    cuts: Box<[bool]>,
    /// `\w`, if a token needs it.
    word_characters: Option<Arc<Classes>>,
}

/// A place in a text, with what surrounds it if that is part of the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) token: Token,
    /// It stands there whatever follows; see [`crate::cuts`].
    pub(crate) cuts: bool,
}

/// Which tokens end where they end whatever surrounds them, and do not reach beyond their text. A token that must be a
/// word looks at what stands before it, so beside one no other is sure.
fn cuts(tokens: &[AddedToken]) -> Box<[bool]> {
    if tokens.iter().any(|token| token.single_word) {
        return vec![false; tokens.len()].into();
    }
    let by_text: HashMap<&[u8], usize> =
        (0..).zip(tokens).map(|(index, token)| (token.text.as_bytes(), index)).collect();
    let mut lengths: Vec<usize> = tokens.iter().map(|token| token.text.len()).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let mut cuts: Vec<bool> = tokens.iter().map(|token| !token.strips_left && !token.strips_right).collect();
    for token in tokens {
        let text = token.text.as_bytes();
        for start in 0..text.len() {
            for &length in lengths.iter().take_while(|&&length| start + length <= text.len()) {
                let part = &text[start..start + length];
                if length < text.len()
                    && let Some(&held) = by_text.get(part)
                {
                    cuts[held] = false;
                }
            }
        }
    }
    cuts.into()
}

impl Finder {
    /// `None` if there are no tokens.
    pub(crate) fn new(tokens: Vec<AddedToken>) -> Result<Option<Self>, Unsupported> {
        if tokens.is_empty() {
            return Ok(None);
        }
        let strips = tokens.iter().any(|token| token.strips_left || token.strips_right);
        let spaced = |token: &AddedToken| token.text.trim() != token.text;
        if strips && tokens.iter().any(spaced) {
            return Err(Unsupported::new(
                "added tokens that strip white space beside ones that begin with it",
            ));
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .start_kind(StartKind::Anchored)
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(tokens.iter().map(|token| &token.text))
            .map_err(|error| Unsupported::new(format!("its added tokens: {error}")))?;
        let mut starts = Box::new([false; 256]);
        let mut pairs = Box::new([0; 512]);
        for token in &tokens {
            let bytes = token.text.as_bytes();
            starts[usize::from(bytes[0])] = true;
            let seconds = bytes.get(1).map_or(0..=u8::MAX, |&byte| byte..=byte);
            for second in seconds {
                pairs[usize::from(bytes[0]) * 2 + usize::from(second >> 7)] |= 1 << (second & 0x7f);
            }
        }
        let few: Vec<u8> = (0..=u8::MAX).filter(|&byte| starts[usize::from(byte)]).collect();
        let word_characters =
            tokens.iter().any(|token| token.single_word).then(|| Builder::new().class(r"\w", 1).build());
        let few_starts = (few.len() <= 3).then_some(few);
        let cuts = cuts(&tokens);
        Ok(Some(Self { automaton, tokens, few_starts, starts, pairs, cuts, word_characters }))
    }

    pub(crate) fn tokens(&self) -> &[AddedToken] {
        &self.tokens
    }

    /// The next token in `text`, from `from` on; what lies before is already another's.
    #[inline]
    pub(crate) fn next(&self, text: &str, from: usize) -> Option<Found> {
        let mut after = from;
        loop {
            let (start, end, index) = self.next_match(text.as_bytes(), after)?;
            let token = &self.tokens[index];
            let cuts = self.cuts[index];
            after = end;
            if token.single_word && !self.is_single(text, start, end) {
                continue;
            }
            let before = if token.strips_left { &text[from..start] } else { "" };
            let behind = if token.strips_right { &text[end..] } else { "" };
            return Some(Found {
                start: start - (before.len() - before.trim_end().len()),
                end: end + (behind.len() - behind.trim_start().len()),
                token: token.id,
                cuts,
            });
        }
    }

    #[inline]
    fn next_match(&self, text: &[u8], from: usize) -> Option<(usize, usize, usize)> {
        let mut from = from;
        loop {
            let at = from + self.skip(&text[from..])?;
            let second = text.get(at + 1).copied().unwrap_or(0);
            let begins =
                self.pairs[usize::from(text[at]) * 2 + usize::from(second >> 7)] >> (second & 0x7f) & 1;
            if begins != 0 {
                let input = Input::new(text).range(at..).anchored(Anchored::Yes);
                if let Some(found) = self.automaton.find(input) {
                    return Some((found.start(), found.end(), found.pattern().as_usize()));
                }
            }
            from = at + 1;
        }
    }

    /// The next byte that a token begins with.
    #[inline]
    fn skip(&self, text: &[u8]) -> Option<usize> {
        match self.few_starts.as_deref() {
            Some(&[a]) => memchr::memchr(a, text),
            Some(&[a, b]) => memchr::memchr2(a, b, text),
            Some(&[a, b, c]) => memchr::memchr3(a, b, c, text),
            _ => text.iter().position(|&byte| self.starts[usize::from(byte)]),
        }
    }

    fn is_single(&self, text: &str, start: usize, end: usize) -> bool {
        let is_word = |character: char| {
            self.word_characters.as_ref().is_some_and(|classes| classes.of(character.into()) != 0)
        };
        !text[..start].ends_with(is_word) && !text[end..].starts_with(is_word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: Token, text: &str) -> AddedToken {
        AddedToken { id, text: text.to_owned(), single_word: false, strips_left: false, strips_right: false }
    }

    fn check(tokens: Vec<AddedToken>, text: &str, expected: &[(usize, usize, Token)]) {
        let finder = Finder::new(tokens).unwrap().unwrap();
        let (mut found, mut from) = (Vec::new(), 0);
        while let Some(next) = finder.next(text, from) {
            found.push((next.start, next.end, next.token));
            from = next.end;
        }
        assert_eq!(found, expected, "{text:?}");
    }

    #[test]
    fn the_leftmost_and_longest_is_found() {
        let tokens =
            || vec![token(1, "<a>"), token(2, "<a>b"), token(3, "xx"), token(4, "x"), token(5, "é<")];
        check(tokens(), "", &[]);
        check(tokens(), "<a", &[]);
        check(tokens(), "<<a>b<a>", &[(1, 5, 2), (5, 8, 1)]);
        check(tokens(), "xxx", &[(0, 2, 3), (2, 3, 4)]);
        check(tokens(), "aé<a>", &[(1, 4, 5)]);
        check(vec![token(1, "\n\n"), token(2, "\n\n\n")], "a\n\n\n\n\n\n", &[(1, 4, 2), (4, 7, 2)]);
        let many = ["a", "b", "c", "d1"].iter().zip(1..).map(|(text, id)| token(id, text)).collect();
        check(many, "dd1xc", &[(1, 3, 4), (4, 5, 3)]);
        assert!(Finder::new(Vec::new()).unwrap().is_none());
    }

    #[test]
    fn white_space_and_neighbours_count_where_the_token_says() {
        let left = AddedToken { strips_left: true, ..token(1, "<l>") };
        let right = AddedToken { strips_right: true, ..token(2, "<r>") };
        let word = AddedToken { single_word: true, ..token(3, "<w>") };
        let tokens = vec![left, right, word];
        check(tokens.clone(), "a  <l> <r>\u{a0} <l>", &[(1, 6, 1), (7, 13, 2), (13, 16, 1)]);
        check(tokens.clone(), "<w>a<w> <w>é<w>", &[]);
        check(tokens, "<w>.<w> <w>", &[(0, 3, 3), (4, 7, 3), (8, 11, 3)]);
        let both = vec![AddedToken { strips_left: true, ..token(1, "<l>") }, token(2, " x")];
        assert!(Finder::new(both).is_err());
    }
}
