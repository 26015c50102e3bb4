//! A model in memory: its shape, its weights in panels, its rotary tables. Immutable; engines share it.

use std::{path::Path, sync::Arc};

use forebay_types::TokenId;

use crate::{
    GgufTokenizer, ModelError,
    hash::{Fingerprint, mix},
    kernels::LANES,
    load,
    quant::{BLOCK, Matrix},
    random,
};

/// Rises with every change of the arithmetic that may change a bit of KV or logits.
const ARITHMETIC_VERSION: u64 = 1;

/// A model's shape and names.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// From the file's name without the encoding, or `random-tiny`.
    pub name: String,
    /// Transformer layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Inner width of the feed-forward part.
    pub ffn: u32,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Leading dimensions of a head that are rotated, in neighbouring pairs.
    pub rope_dims: u32,
    /// Added to the mean square before its root.
    pub norm_eps: f32,
    /// Tokens in the vocabulary.
    pub vocab: u32,
    /// Positions that can be computed: the model's own limit, at most 65,536.
    pub context_tokens_max: u32,
    /// Start of a sequence.
    pub bos: Option<TokenId>,
    /// End of a turn: the stop token of a chat.
    pub eos: Option<TokenId>,
}

/// One copy of a model, shared by all engines of a process.
#[derive(Debug)]
pub struct Weights {
    pub(crate) config: ModelConfig,
    pub(crate) tokenizer: GgufTokenizer,
    pub(crate) embedding: Matrix,
    /// `None`: the embedding serves as the output matrix too.
    pub(crate) output: Option<Matrix>,
    pub(crate) output_norm: Vec<f32>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) rope: Rope,
    pub(crate) key_signs: KeySigns,
    pub(crate) fingerprint: u64,
}

/// One transformer layer's weights.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) query: Matrix,
    pub(crate) key: Matrix,
    pub(crate) value: Matrix,
    pub(crate) attention_output: Matrix,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

impl Weights {
    /// Reads a GGUF file of a llama model.
    ///
    /// # Errors
    /// If the file is missing, not GGUF, corrupt, or of a kind that this engine does not compute; the error names it.
    pub fn load(path: &Path) -> Result<Arc<Self>, ModelError> {
        Self::load_with_progress(path, &mut |_| ())
    }

    /// As [`load`](Self::load), telling `progress` the share that is done, from 0 to 1, never falling.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_with_progress(path: &Path, progress: &mut dyn FnMut(f32)) -> Result<Arc<Self>, ModelError> {
        load::load(path, progress).map(Arc::new)
    }

    /// The model `random-tiny`: weights drawn from `seed`, see the crate's top. The same seed gives the same model.
    pub fn random_tiny(seed: u64) -> Arc<Self> {
        Arc::new(random::tiny(seed))
    }

    /// Shape and names.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Vocabulary, special tokens, chat template.
    pub fn tokenizer(&self) -> &GgufTokenizer {
        &self.tokenizer
    }

    /// Bytes of one KV block: K and V of all layers, f32.
    pub fn kv_block_bytes(&self, block_size_tokens: u32) -> u64 {
        let config = &self.config;
        let floats_per_token = 2 * u64::from(config.layers) * u64::from(config.kv_heads * config.head_dim);
        u64::from(block_size_tokens) * floats_per_token * 4
    }

    /// Memory that the weights and tables take.
    pub fn bytes(&self) -> u64 {
        let layer = |layer: &Layer| {
            let Layer { attention_norm, query, key, value, attention_output, ffn_norm, gate, up, down } =
                layer;
            let matrices = [query, key, value, attention_output, gate, up, down];
            matrices.into_iter().map(Matrix::bytes).sum::<u64>()
                + 4 * (attention_norm.len() + ffn_norm.len()) as u64
        };
        self.embedding.bytes()
            + self.output.as_ref().map_or(0, Matrix::bytes)
            + 4 * (self.output_norm.len() + 2 * self.rope.turns.len() + self.key_signs.signs.len()) as u64
            + self.layers.iter().map(layer).sum::<u64>()
    }

    /// Identity of weights and arithmetic. Engines may exchange KV only if theirs are equal; then their results are
    /// equal too, bit by bit, whatever instruction set each uses.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

impl ModelConfig {
    /// A fingerprint of everything but the weights: start of [`Weights::fingerprint`].
    pub(crate) fn fingerprint(&self, rope: &Rope) -> Fingerprint {
        let Self {
            name: _,
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn,
            rope_base,
            rope_dims,
            norm_eps,
            vocab,
            context_tokens_max,
            bos: _,
            eos: _,
        } = self;
        let mut fingerprint = Fingerprint::new(ARITHMETIC_VERSION);
        for number in [layers, hidden, heads, kv_heads, head_dim, ffn, rope_dims, vocab, context_tokens_max] {
            fingerprint.word(u64::from(*number));
        }
        fingerprint.word(u64::from(rope_base.to_bits()));
        fingerprint.word(u64::from(norm_eps.to_bits()));
        // The tables come from the platform's sine, the one function here that may differ between machines.
        for Turn { cosine, sine } in &rope.turns {
            fingerprint.word(u64::from(cosine.to_bits()) << 32 | u64::from(sine.to_bits()));
        }
        fingerprint
    }
}

/// Sines and cosines of rotary position embedding, `[position][pair]`.
#[derive(Debug)]
pub(crate) struct Rope {
    turns: Vec<Turn>,
    pairs: usize,
}

#[derive(Debug, Clone, Copy)]
struct Turn {
    cosine: f32,
    sine: f32,
}

impl Rope {
    pub(crate) fn new(base: f32, dims: u32, positions: u32) -> Self {
        let pairs = dims as usize / 2;
        let frequency = |pair: usize| f64::from(base).powf(-2.0 * pair as f64 / f64::from(dims));
        let frequencies: Vec<f64> = (0..pairs).map(frequency).collect();
        let turn = |position: u32, frequency: f64| {
            let (sine, cosine) = (f64::from(position) * frequency).sin_cos();
            Turn { cosine: cosine as f32, sine: sine as f32 }
        };
        let turns = (0..positions).flat_map(|position| frequencies.iter().map(move |f| turn(position, *f)));
        Self { turns: turns.collect(), pairs }
    }

    /// Rotates the heads of one token at `position`: neighbouring pairs, as GGUF's llama weights are laid out.
    pub(crate) fn rotate(&self, position: usize, heads: &mut [f32], head_dim: usize) {
        let turns = &self.turns[position * self.pairs..(position + 1) * self.pairs];
        for head in heads.chunks_exact_mut(head_dim) {
            for (Turn { cosine, sine }, values) in turns.iter().zip(head.as_chunks_mut::<2>().0) {
                let [a, b] = *values;
                *values = [a * cosine - b * sine, a * sine + b * cosine];
            }
        }
    }
}

/// Signs that a key's numbers are multiplied with when it is stored, and again when it is read: a pattern of the tile
/// of 16 positions that it belongs to, and that it is read from. In its place a key comes back as it was, exactly; in
/// another place it is nonsense.
///
/// Without it, attention would not notice that two blocks changed places (rotation is part of the stored key, and a sum
/// has no order), nor a small language model that one of its sentences came from elsewhere: tests that compare tokens
/// would miss misplaced blocks.
#[derive(Debug)]
pub(crate) struct KeySigns {
    signs: Vec<f32>,
    width: usize,
}

impl KeySigns {
    /// For keys of `width` numbers (all KV heads).
    pub(crate) fn new(width: u32, positions: u32) -> Self {
        let width = width as usize;
        let tiles = (positions as usize).div_ceil(LANES);
        let sign = |i: usize| if mix(i as u64 / 64 + 1) >> (i % 64) & 1 == 0 { 1.0 } else { -1.0 };
        Self { signs: (0..tiles * width).map(sign).collect(), width }
    }

    /// Of the keys of positions `16 * tile..`.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> &[f32] {
        &self.signs[tile * self.width..(tile + 1) * self.width]
    }
}

/// Matrices' inputs are cut into blocks: widths that feed one must be a multiple of this.
pub(crate) const WIDTH_MULTIPLE: u32 = BLOCK as u32;
/// Heads are cut into vectors.
pub(crate) const HEAD_MULTIPLE: u32 = LANES as u32;
