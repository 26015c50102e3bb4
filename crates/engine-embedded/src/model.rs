//! A model in memory: its shape, its weights in panels, its rotary tables. Immutable; engines share it.

use std::{
    path::Path,
    sync::Arc,
};

use forebay_types::TokenId;

use crate::{
    GgufTokenizer, ModelError,
    hash::Fingerprint,
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
            let Layer { attention_norm, query, key, value, attention_output, ffn_norm, gate, up, down } = layer;
            let matrices = [query, key, value, attention_output, gate, up, down];
            matrices.into_iter().map(Matrix::bytes).sum::<u64>()
                + 4 * (attention_norm.len() + ffn_norm.len()) as u64
        };
        self.embedding.bytes()
            + self.output.as_ref().map_or(0, Matrix::bytes)
            + 4 * (self.output_norm.len() + self.rope.cosines.len() + self.rope.sines.len()) as u64
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
        for value in rope.cosines.iter().chain(&rope.sines) {
            fingerprint.word(u64::from(value.to_bits()));
        }
        fingerprint
    }
}

/// Sines and cosines of rotary position embedding, `[tile of 16 positions][pair][position in tile]`: 16 keys at a time
/// read them as vectors.
#[derive(Debug)]
pub(crate) struct Rope {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    pairs: usize,
}

impl Rope {
    pub(crate) fn new(base: f32, dims: u32, positions: u32) -> Self {
        let pairs = dims as usize / 2;
        let tiles = (positions as usize).div_ceil(LANES);
        let frequency = |pair: usize| f64::from(base).powf(-2.0 * pair as f64 / f64::from(dims));
        let frequencies: Vec<f64> = (0..pairs).map(frequency).collect();
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        for tile in 0..tiles {
            for frequency in &frequencies {
                for lane in 0..LANES {
                    let (sine, cosine) = ((tile * LANES + lane) as f64 * frequency).sin_cos();
                    cosines.push(cosine as f32);
                    sines.push(sine as f32);
                }
            }
        }
        Self { cosines, sines, pairs }
    }

    /// Rotated pairs of a head.
    pub(crate) fn pairs(&self) -> usize {
        self.pairs
    }

    /// Cosines and sines of positions `16 tile..`, a vector a pair.
    pub(crate) fn tile(&self, tile: usize) -> (&[f32], &[f32]) {
        let length = self.pairs * LANES;
        let range = tile * length..(tile + 1) * length;
        (&self.cosines[range.clone()], &self.sines[range])
    }

    /// Rotates the heads of one token at `position` and multiplies all by `scale`.
    pub(crate) fn rotate(&self, position: usize, heads: &mut [f32], head_dim: usize, scale: f32) {
        let (cosines, sines) = self.tile(position / LANES);
        let lane = position % LANES;
        for head in heads.chunks_exact_mut(head_dim) {
            for (pair, values) in head.as_chunks_mut::<2>().0.iter_mut().take(self.pairs).enumerate() {
                let (cosine, sine) = (cosines[pair * LANES + lane], sines[pair * LANES + lane]);
                let [a, b] = *values;
                *values = [a * cosine - b * sine, a * sine + b * cosine];
            }
            head.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

/// Matrices' inputs are cut into blocks: widths that feed one must be a multiple of this.
pub(crate) const WIDTH_MULTIPLE: u32 = BLOCK as u32;
/// Heads are cut into vectors.
pub(crate) const HEAD_MULTIPLE: u32 = LANES as u32;
