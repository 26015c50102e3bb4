//! A word to its tokens: by look-up where that is proved to be what merging gives, else by merging.
//!
//! In: a word's bytes. Out: its tokens, appended. Start at [`Model::word`]. Whether a token's bytes merge to that token
//! was tried for every token when the model was loaded; what is joined by no token is encoded apart ([`Boundaries`]).

use std::{collections::HashMap, ops::Range};

use crate::{
    Token,
    boundaries::Boundaries,
    merges::{Merges, NEVER, Work},
    unicode::length,
    words::{CACHED_BYTES_MAX, Cache, Hashed, Hot, KEY_BYTES_MAX, Key, Place, Sink, Vocabulary},
};

/// What merging begins with.
#[derive(Debug)]
pub(crate) enum Alphabet {
    /// A token for each byte. Bytes that have none are left out of a word.
    Bytes(Box<[Option<Token>; 256]>),
    /// A token for each character that has one, and for the bytes of those that have none.
    Characters { characters: HashMap<u32, Token>, bytes: Box<[Token; 256]>, ascii: Box<[Token; 128]> },
}

#[derive(Debug)]
pub(crate) struct Model {
    alphabet: Alphabet,
    merges: Merges,
    vocabulary: Vocabulary,
    boundaries: Boundaries,
    /// Every byte has a token; otherwise what stands around one without becomes neighbours.
    complete: bool,
    /// The ranks of two bytes, or of two ASCII characters: all that a word begins with is looked up in 256 KiB.
    first_ranks: Box<[u32; 256 * 256]>,
}

/// What an encoding needs besides the model, kept from one to the next.
pub(crate) struct Scratch {
    hot: Hot,
    cache: Cache,
    work: Work,
    /// What a word became.
    tokens: Vec<Token>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self { hot: Hot::new(), cache: Cache::new(), work: Work::default(), tokens: Vec::new() }
    }
}

/// Whether a word is cut into parts that no merge joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parts {
    Cut,
    One,
}

impl Model {
    /// Of the tokens that words can become, with their bytes; pairs that merge and what they become; and whether a word
    /// that is a token is that token even if its bytes merge to something else.
    pub(crate) fn new(
        alphabet: Alphabet,
        tokens: &[(Token, Vec<u8>)],
        merges: &[(Token, Token, Token)],
        ignore_merges: bool,
    ) -> Self {
        let table = Merges::new(merges);
        let mut made: Vec<Token> = merges.iter().map(|merge| merge.2).collect();
        made.sort_unstable();
        made.dedup();
        let is_made = |token: Token| made.binary_search(&token).is_ok();
        let boundaries =
            tokens.iter().filter(|(token, _)| is_made(*token)).map(|(_, bytes)| bytes.as_slice());
        let boundaries = Boundaries::new(boundaries);
        let mut first_ranks: Box<[u32; 256 * 256]> =
            vec![NEVER; 256 * 256].try_into().expect("as many as bytes have pairs");
        for (index, rank) in first_ranks.iter_mut().enumerate() {
            if let (Some(left), Some(right)) = (alphabet.byte(index / 256), alphabet.byte(index % 256)) {
                *rank = table.rank(left, right);
            }
        }
        let complete = match &alphabet {
            Alphabet::Bytes(bytes) => bytes.iter().all(Option::is_some),
            Alphabet::Characters { .. } => true,
        };
        let none = Vocabulary::new(&[]);
        let mut model = Self { alphabet, merges: table, vocabulary: none, boundaries, complete, first_ranks };
        let mut work = Work::default();
        let mut merges_to = |token: Token, bytes: &[u8]| {
            model.merges_of(bytes, &mut work);
            work.symbols == [token]
        };
        let words: Vec<(Token, &[u8], bool)> = tokens
            .iter()
            .map(|(token, bytes)| (*token, bytes.as_slice(), merges_to(*token, bytes)))
            .filter(|&(.., merges)| merges || ignore_merges)
            .collect();
        model.vocabulary = Vocabulary::new(&words);
        model
    }

    /// Appends the tokens of the words of `text[start..]`, each of which ends where `next` says.
    #[inline]
    pub(crate) fn words(
        &self,
        next: impl Fn(&[u8], usize) -> usize,
        text: &[u8],
        start: usize,
        scratch: &mut Scratch,
        out: &mut Vec<Token>,
    ) {
        self.each_word(next, Parts::Cut, text, start, scratch, out);
    }

    /// Whether no merge joins what stands before `at`, within a text, with what stands there.
    pub(crate) fn parts_at(&self, text: &[u8], at: usize) -> bool {
        let before = (0..at).rev().find(|&start| text[start] & 0xc0 != 0x80);
        self.complete && before.is_some_and(|start| self.boundaries.next(text, start) == at)
    }

    /// Appends the tokens of `text[start..]` as one word, however long.
    pub(crate) fn text(&self, text: &[u8], start: usize, scratch: &mut Scratch, out: &mut Vec<Token>) {
        let next = |text: &[u8], at| self.boundaries.next(text, at);
        self.each_word(next, Parts::One, text, start, scratch, out);
    }

    #[inline(always)]
    fn each_word(
        &self,
        next: impl Fn(&[u8], usize) -> usize,
        parts: Parts,
        text: &[u8],
        start: usize,
        scratch: &mut Scratch,
        out: &mut Vec<Token>,
    ) {
        let mut sink = Sink::new(out);
        let mut at = start;
        while at < text.len() {
            let end = next(text, at);
            if end - at > KEY_BYTES_MAX {
                self.other_word(text, at..end, parts, scratch);
                sink.extend(&scratch.tokens);
            } else {
                let hashed = Key::of(text, at, end).hashed();
                match scratch.hot.get(hashed) {
                    Some(tokens) => sink.push_counted(tokens),
                    None => self.new_word(text, at..end, hashed, parts, scratch, &mut sink),
                }
            }
            at = end;
        }
    }

    /// A short word that did not come lately.
    #[inline(never)]
    fn new_word(
        &self,
        text: &[u8],
        word: Range<usize>,
        hashed: Hashed,
        parts: Parts,
        scratch: &mut Scratch,
        out: &mut Sink<'_>,
    ) {
        // Where merging decides, no token is one only as a whole.
        if let Some(token) = self.vocabulary.short(hashed).whole() {
            scratch.hot.insert(hashed, &[token]);
            out.push(token);
            return;
        }
        self.other_word(text, word, parts, scratch);
        scratch.hot.insert(hashed, &scratch.tokens);
        out.extend(&scratch.tokens);
    }

    #[inline]
    fn short(&self, text: &[u8], start: usize, end: usize) -> Option<Token> {
        if end - start > KEY_BYTES_MAX {
            return None;
        }
        self.vocabulary.short(Key::of(text, start, end).hashed()).merged()
    }

    /// A word that is no short token; its tokens are left in `scratch`.
    fn other_word(&self, text: &[u8], word: Range<usize>, parts: Parts, scratch: &mut Scratch) {
        let Range { start, end } = word;
        let Scratch { cache, work, tokens, .. } = scratch;
        tokens.clear();
        let length = end - start;
        let place = (length <= CACHED_BYTES_MAX).then(|| Place::of(text, start, end));
        if let Some(known) = place.and_then(|place| cache.get(place)) {
            tokens.extend_from_slice(known);
            return;
        }
        if length > KEY_BYTES_MAX
            && let Some(token) = self.vocabulary.long(&text[start..end]).whole()
        {
            tokens.push(token);
            return;
        }
        if parts == Parts::Cut && self.complete {
            self.cut(&text[..end], start, cache, work, tokens);
        } else {
            self.merge(&text[start..end], work, tokens);
        }
        if let Some(place) = place {
            cache.insert(place, tokens);
        }
    }

    /// Appends the tokens of a word part by part.
    fn cut(&self, text: &[u8], start: usize, cache: &mut Cache, work: &mut Work, out: &mut Vec<Token>) {
        let mut at = start;
        while at < text.len() {
            let end = self.boundaries.next(text, at);
            if (at, end) == (start, text.len()) {
                self.merge(&text[start..], work, out);
            } else if let Some(token) = self.short(text, at, end) {
                out.push(token);
            } else {
                self.part(text, at, end, cache, work, out);
            }
            at = end;
        }
    }

    /// A part of a word. Unlike a word it is a token only if its bytes merge to it; what is not is never looked for in
    /// the cache as a word, except where it is long.
    fn part(
        &self,
        text: &[u8],
        start: usize,
        end: usize,
        cache: &mut Cache,
        work: &mut Work,
        out: &mut Vec<Token>,
    ) {
        let length = end - start;
        let found = if length > KEY_BYTES_MAX { Some(self.vocabulary.long(&text[start..end])) } else { None };
        if let Some(token) = found.and_then(|found| found.merged()) {
            out.push(token);
            return;
        }
        let only_whole = found.is_some_and(|found| found.whole().is_some());
        let place = (length <= CACHED_BYTES_MAX && !only_whole).then(|| Place::of(text, start, end));
        if let Some(known) = place.and_then(|place| cache.get(place)) {
            out.extend_from_slice(known);
            return;
        }
        let begin = out.len();
        self.merge(&text[start..end], work, out);
        if let Some(place) = place {
            cache.insert(place, &out[begin..]);
        }
    }

    fn merge(&self, bytes: &[u8], work: &mut Work, out: &mut Vec<Token>) {
        self.merges_of(bytes, work);
        out.extend_from_slice(&work.symbols);
    }

    /// Leaves the tokens of a word in `work`.
    fn merges_of(&self, word: &[u8], work: &mut Work) {
        let Work { symbols, ranks, .. } = work;
        symbols.clear();
        ranks.clear();
        let first_rank = |left: u8, right: u8| self.first_ranks[usize::from(left) * 256 + usize::from(right)];
        match &self.alphabet {
            Alphabet::Bytes(tokens) if self.complete => {
                symbols.extend(word.iter().filter_map(|&byte| tokens[usize::from(byte)]));
                ranks.extend(word.windows(2).map(|pair| first_rank(pair[0], pair[1])));
            }
            Alphabet::Characters { ascii, .. } if word.is_ascii() => {
                symbols.extend(word.iter().map(|&byte| ascii[usize::from(byte)]));
                ranks.extend(word.windows(2).map(|pair| first_rank(pair[0], pair[1])));
            }
            alphabet => {
                alphabet.symbols(word, symbols);
                ranks.extend(symbols.windows(2).map(|pair| self.merges.rank(pair[0], pair[1])));
            }
        }
        self.merges.apply(work);
    }
}

impl Alphabet {
    /// The token of characters and, where there is none, of bytes.
    pub(crate) fn of_characters(characters: HashMap<u32, Token>, bytes: Box<[Token; 256]>) -> Self {
        let mut ascii = Box::new([0; 128]);
        for (code, token) in (0..).zip(ascii.iter_mut()) {
            *token = characters.get(&code).copied().unwrap_or(bytes[code as usize]);
        }
        Self::Characters { characters, bytes, ascii }
    }

    /// What a byte, or an ASCII character, is before merging.
    fn byte(&self, byte: usize) -> Option<Token> {
        match self {
            Self::Bytes(tokens) => tokens[byte],
            Self::Characters { ascii, .. } => ascii.get(byte).copied(),
        }
    }

    /// What merging begins with.
    fn symbols(&self, word: &[u8], symbols: &mut Vec<Token>) {
        match self {
            Self::Bytes(tokens) => {
                symbols.extend(word.iter().filter_map(|&byte| tokens[usize::from(byte)]));
            }
            Self::Characters { characters, bytes, .. } => {
                let mut at = 0;
                while at < word.len() {
                    let end = at + length(word[at]);
                    let character = &word[at..end];
                    match characters.get(&code(character)) {
                        Some(&token) => symbols.push(token),
                        None => symbols.extend(character.iter().map(|&byte| bytes[usize::from(byte)])),
                    }
                    at = end;
                }
            }
        }
    }
}

/// A character's bytes as a number.
pub(crate) fn code(character: &[u8]) -> u32 {
    character.iter().fold(0, |code, &byte| code << 8 | u32::from(byte))
}
