//! Texts that were encoded lately, so that a conversation's earlier turns are not encoded again.
//!
//! In: a tokenizer, a tenant and a text. Out: the text's tokens. Start at [`PrefixCache::encode`].
//!
//! A text is cut into pieces behind special tokens, and within a long turn between words, where `forebay-bpe` proves that
//! each part is encoded for itself (`Encoder::cuts`). So a piece's tokens depend on the piece alone, and it is found by its
//! content, wherever it stands: a conversation's turns, a system prompt that all share, the document before a question.
//! What lies behind the last cut is encoded.
//!
//! Invariants: the tokens are those that the tokenizer gives; a piece is compared byte for byte, so a hash decides only
//! where to look; nothing is found for another tenant or another vocabulary; memory stays within the limit; no lock is
//! held while text is encoded or compared.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, Hash, Hasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use forebay_bpe::Distance;
use forebay_types::TokenId;

use super::{EncodeError, Encoder, Fingerprint, Mode, Tokenizer, fast::Fast};

/// Below, finding a piece costs as much as encoding it. A long turn is cut rarely: each piece that is found in no other
/// text is a copy made for nothing.
const PIECES: Distance = Distance { token_bytes_min: 256, word_bytes_min: 4_096 };

/// A piece may take this part of the memory at most, so that one text does not drive out all others.
const PIECES_MIN: usize = 8;

/// What a piece takes beside its text and its tokens: its place in the table and the queue, names, counts.
const PIECE_OVERHEAD_BYTES: usize = 160;

/// How much may be remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixCacheLimits {
    /// Bytes that texts and their tokens may take; 0 remembers nothing.
    pub bytes_max: usize,
}

impl Default for PrefixCacheLimits {
    /// 64 MiB: some 32 MB of text, 8 million tokens, 250 conversations of 32,000.
    fn default() -> Self {
        Self { bytes_max: 64 << 20 }
    }
}

/// What is remembered, and what that was good for since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefixCacheStats {
    /// Pieces of text remembered now.
    pub pieces: usize,
    /// Bytes that they take; never more than [`PrefixCacheLimits::bytes_max`].
    pub bytes: usize,
    /// Pieces that were found.
    pub hits: u64,
    /// Pieces that were not.
    pub misses: u64,
    /// Bytes of text whose tokens were remembered.
    pub bytes_reused: u64,
    /// Bytes of text that were encoded.
    pub bytes_encoded: u64,
    /// Pieces forgotten to make room.
    pub evictions: u64,
}

/// The tokens of recent texts, for many threads and any number of tokenizers.
#[derive(Debug)]
pub struct PrefixCache {
    bytes_max: usize,
    pieces: Distance,
    /// Makes hashes that no client can foresee.
    keys: RandomState,
    known: Mutex<Known>,
    // Counts for people to read. Nothing is ordered by them, so relaxed is enough.
    hits: AtomicU64,
    misses: AtomicU64,
    bytes_reused: AtomicU64,
    bytes_encoded: AtomicU64,
}

#[derive(Debug, Default)]
struct Known {
    pieces: HashMap<u64, Remembered>,
    /// Names in the order in which they will be thought of as the oldest: one that was used since goes to the end once
    /// more. So eviction is nearly by last use, and a hit writes one flag.
    queue: VecDeque<u64>,
    bytes: usize,
    evictions: u64,
}

#[derive(Debug)]
struct Remembered {
    piece: Arc<Piece>,
    used: bool,
}

/// A text with its tokens, and whose they are.
#[derive(Debug)]
struct Piece {
    fingerprint: Fingerprint,
    tenant: Box<str>,
    text: Box<str>,
    tokens: Box<[TokenId]>,
}

impl Piece {
    fn bytes(&self) -> usize {
        self.text.len() + self.tenant.len() + size_of_val(&*self.tokens) + PIECE_OVERHEAD_BYTES
    }

    fn is(&self, fingerprint: Fingerprint, tenant: &str, text: &str) -> bool {
        self.fingerprint == fingerprint && *self.tenant == *tenant && *self.text == *text
    }
}

impl PrefixCache {
    /// Remembers nothing yet.
    pub fn new(limits: PrefixCacheLimits) -> Self {
        Self::with_pieces_of(limits, PIECES)
    }

    /// Nor does this one; it cuts texts into pieces of other lengths.
    pub fn with_pieces_of(limits: PrefixCacheLimits, pieces: Distance) -> Self {
        Self {
            bytes_max: limits.bytes_max,
            pieces,
            keys: RandomState::new(),
            known: Mutex::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            bytes_reused: AtomicU64::new(0),
            bytes_encoded: AtomicU64::new(0),
        }
    }

    /// As [`Tokenizer::encode`], with what is remembered of `tenant`'s texts.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        tenant: &str,
        text: &str,
        out: &mut Vec<TokenId>,
    ) -> Result<(), EncodeError> {
        let Encoder::Fast(fast) = &tokenizer.0.encoder else {
            return self.encode_whole(Mode::Chat, tokenizer, text, out);
        };
        self.encode_pieces(fast, tokenizer, tenant, text, out);
        Ok(())
    }

    /// As [`Tokenizer::encode_completion`], with what is remembered of `tenant`'s texts.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_completion(
        &self,
        tokenizer: &Tokenizer,
        tenant: &str,
        text: &str,
        out: &mut Vec<TokenId>,
    ) -> Result<(), EncodeError> {
        let Encoder::Fast(fast) = &tokenizer.0.encoder else {
            return self.encode_whole(Mode::Completion, tokenizer, text, out);
        };
        let (before, after) = fast.surroundings();
        out.extend_from_slice(before);
        self.encode_pieces(fast, tokenizer, tenant, text, out);
        out.extend_from_slice(after);
        Ok(())
    }

    /// For tokenizers whose texts cannot be cut.
    fn encode_whole(
        &self,
        mode: Mode,
        tokenizer: &Tokenizer,
        text: &str,
        out: &mut Vec<TokenId>,
    ) -> Result<(), EncodeError> {
        self.bytes_encoded.fetch_add(text.len() as u64, Relaxed);
        tokenizer.encode_as(mode, text, out)
    }

    fn encode_pieces(
        &self,
        fast: &Fast,
        tokenizer: &Tokenizer,
        tenant: &str,
        text: &str,
        out: &mut Vec<TokenId>,
    ) {
        let (mut from, mut cuts) = (0, fast.cuts(text));
        while self.bytes_max > 0
            && let Some(end) = cuts.next(self.pieces)
        {
            self.piece(tokenizer, tenant, &text[from..end], out, |piece, out| {
                fast.encode(Mode::Chat, piece, out)
            });
            from = end;
        }
        self.bytes_encoded.fetch_add((text.len() - from) as u64, Relaxed);
        fast.encode(Mode::Chat, &text[from..], out);
    }

    /// What is remembered, and what that was good for.
    pub fn stats(&self) -> PrefixCacheStats {
        let known = self.lock();
        PrefixCacheStats {
            pieces: known.pieces.len(),
            bytes: known.bytes,
            evictions: known.evictions,
            hits: self.hits.load(Relaxed),
            misses: self.misses.load(Relaxed),
            bytes_reused: self.bytes_reused.load(Relaxed),
            bytes_encoded: self.bytes_encoded.load(Relaxed),
        }
    }

    /// Appends the tokens of a piece.
    fn piece(
        &self,
        tokenizer: &Tokenizer,
        tenant: &str,
        text: &str,
        out: &mut Vec<TokenId>,
        encode: impl FnOnce(&str, &mut Vec<TokenId>),
    ) {
        let fingerprint = tokenizer.fingerprint();
        let name = self.name(fingerprint, tenant, text);
        let found = self.lock().get(name).filter(|piece| piece.is(fingerprint, tenant, text));
        if let Some(piece) = found {
            self.hits.fetch_add(1, Relaxed);
            self.bytes_reused.fetch_add(text.len() as u64, Relaxed);
            out.extend_from_slice(&piece.tokens);
            return;
        }
        self.misses.fetch_add(1, Relaxed);
        self.bytes_encoded.fetch_add(text.len() as u64, Relaxed);
        let begin = out.len();
        encode(text, out);
        let piece =
            Piece { fingerprint, tenant: tenant.into(), text: text.into(), tokens: out[begin..].into() };
        if piece.bytes() <= self.bytes_max / PIECES_MIN {
            self.lock().insert(name, Arc::new(piece), self.bytes_max);
        }
    }

    /// Where a piece is looked for. A text's content is folded eight bytes at a time with a secret factor, faster than a
    /// hash that resists an adversary: who makes names collide makes own pieces be forgotten, and gets no other's.
    fn name(&self, fingerprint: Fingerprint, tenant: &str, text: &str) -> u64 {
        let mut state = self.keys.build_hasher();
        fingerprint.hash(&mut state);
        state.write(tenant.as_bytes());
        state.write_usize(text.len());
        let secret = state.finish() | 1;
        // Four chains, so that no product waits for the one before.
        let (blocks, rest) = text.as_bytes().as_chunks::<32>();
        let mut folded = [0, 1, 2, 3].map(|lane| secret.rotate_left(lane * 16));
        for block in blocks {
            for (folded, word) in folded.iter_mut().zip(block.as_chunks::<8>().0) {
                let product = u128::from(*folded ^ u64::from_le_bytes(*word)) * u128::from(secret);
                *folded = (product as u64) ^ (product >> 64) as u64;
            }
        }
        folded.hash(&mut state);
        state.write(rest);
        state.finish()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // What is known stays consistent whoever panicked: pieces are whole, and counts are for people.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn get(&mut self, name: u64) -> Option<Arc<Piece>> {
        let remembered = self.pieces.get_mut(&name)?;
        remembered.used = true;
        Some(remembered.piece.clone())
    }

    /// In place of what had that name.
    fn insert(&mut self, name: u64, piece: Arc<Piece>, bytes_max: usize) {
        self.bytes += piece.bytes();
        match self.pieces.insert(name, Remembered { piece, used: false }) {
            Some(other) => self.bytes -= other.piece.bytes(),
            None => self.queue.push_back(name),
        }
        while self.bytes > bytes_max
            && let Some(oldest) = self.queue.pop_front()
        {
            let Some(remembered) = self.pieces.get_mut(&oldest) else { continue };
            if remembered.used && oldest != name {
                remembered.used = false;
                self.queue.push_back(oldest);
            } else if let Some(gone) = self.pieces.remove(&oldest) {
                self.bytes -= gone.piece.bytes();
                self.evictions += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::tiny, *};

    fn encode(cache: &PrefixCache, tokenizer: &Tokenizer, tenant: &str, text: &str) -> Vec<TokenId> {
        let (mut tokens, mut exact) = (vec![7], vec![7]);
        cache.encode(tokenizer, tenant, text, &mut tokens).unwrap();
        tokenizer.encode(text, &mut exact).unwrap();
        assert_eq!(tokens, exact, "{text:?}");
        let (mut completion, mut exact) = (Vec::new(), Vec::new());
        cache.encode_completion(tokenizer, tenant, text, &mut completion).unwrap();
        tokenizer.encode_completion(text, &mut exact).unwrap();
        assert_eq!(completion, exact, "{text:?}");
        tokens
    }

    fn small(bytes_max: usize, token_bytes_min: usize) -> PrefixCache {
        let pieces = Distance { token_bytes_min, word_bytes_min: 1 << 20 };
        PrefixCache::with_pieces_of(PrefixCacheLimits { bytes_max }, pieces)
    }

    #[test]
    fn a_conversation_is_encoded_once() {
        let tokenizer = Tokenizer::from_gguf_parts(tiny()).unwrap();
        let cache = small(1 << 20, 16);
        let turn = |index: usize| format!("<|im_start|>user {index} the weather<|im_end|>\n");
        let mut text = String::new();
        let mut before = cache.stats();
        for index in 0..20 {
            text += &turn(index);
            let mut tokens = Vec::new();
            cache.encode(&tokenizer, "a", &text, &mut tokens).unwrap();
            let now = cache.stats();
            let encoded = now.bytes_encoded - before.bytes_encoded;
            assert!(encoded as usize <= turn(index).len() + 16, "{index}: {encoded}");
            before = now;
        }
        encode(&cache, &tokenizer, "a", &text);
        let stats = cache.stats();
        assert!(stats.hits > 190 && stats.misses <= 20, "{stats:?}");
        assert_eq!(stats.bytes_reused + stats.bytes_encoded, {
            let sent: usize =
                (1..=20).map(|turns| (0..turns).map(|index| turn(index).len()).sum::<usize>()).sum();
            (sent + 2 * text.len()) as u64
        });
    }

    #[test]
    fn a_document_before_other_questions_is_encoded_once() {
        let tokenizer = Tokenizer::from_gguf_parts(tiny()).unwrap();
        let pieces = Distance { token_bytes_min: 16, word_bytes_min: 64 };
        let cache = PrefixCache::with_pieces_of(PrefixCacheLimits { bytes_max: 1 << 20 }, pieces);
        let document = "the weather and the other things here ".repeat(50);
        encode(&cache, &tokenizer, "a", &format!("{document}what is it?<|im_end|>"));
        let before = cache.stats().bytes_encoded;
        encode(&cache, &tokenizer, "a", &format!("{document}where is the weather?<|im_end|>"));
        let encoded = (cache.stats().bytes_encoded - before) as usize;
        assert!(encoded < 4 * 120, "{encoded} of {} bytes, twice", document.len());
    }

    #[test]
    fn tenants_and_vocabularies_are_apart() {
        let cache = small(1 << 20, 4);
        let tokenizer = Tokenizer::from_gguf_parts(tiny()).unwrap();
        let other = super::super::GgufVocabulary { merges: tiny().merges[..40].to_vec(), ..tiny() };
        let other = Tokenizer::from_gguf_parts(other).unwrap();
        let text = "the weather here<|im_end|>";
        for (tenant, tokenizer) in [("a", &tokenizer), ("b", &tokenizer), ("a", &other)] {
            let misses = cache.stats().misses;
            encode(&cache, tokenizer, tenant, text);
            assert_eq!(cache.stats().misses, misses + 1, "{tenant}");
        }
        let bytes = small(1 << 20, 4);
        assert_eq!(encode(&bytes, &Tokenizer::bytes(), "a", text)[1..4], *b"the".map(u32::from).as_slice());
        assert_eq!(bytes.stats().pieces, 0);
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let tokenizer = Tokenizer::from_gguf_parts(tiny()).unwrap();
        let cache = small(20_000, 4);
        let used = format!("{}<|im_end|>", "the other ".repeat(40));
        for index in 0..400 {
            encode(&cache, &tokenizer, "a", &format!("{used}{index} words of a text<|im_end|>"));
            assert!(cache.stats().bytes <= 20_000);
        }
        let stats = cache.stats();
        assert!(stats.evictions > 200 && stats.pieces > 20, "{stats:?}");
        let misses = stats.misses;
        encode(&cache, &tokenizer, "a", &used);
        assert_eq!(cache.stats().misses, misses, "used every time");
        encode(&cache, &tokenizer, "a", &format!("{}<|im_end|>", "x ".repeat(20_000)));
        assert!(cache.stats().pieces > 20, "one that is too long drives out nothing");
        let off = small(0, 4);
        encode(&off, &tokenizer, "a", &used);
        assert_eq!((off.stats().pieces, off.stats().misses), (0, 0));
    }
}
