//! The model `random-tiny`: drawn from a seed, for tests and demonstrations that want no download.
//!
//! A random transformer is by nature a poor witness: attention over hundreds of positions averages to nothing, and one
//! block more or less leaves its output as it was. The scales below make every block count; `tests/sensitivity.rs`
//! measures it.

use crate::{
    GgufTokenizer,
    hash::{Fingerprint, SplitMix},
    model::{KeySigns, Layer, ModelConfig, Rope, Weights},
    quant::Matrix,
};

const LAYERS: usize = 4;
const HIDDEN: usize = 128;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const FFN: usize = 256;
const VOCAB: usize = 264;
const CONTEXT: u32 = 4_096;
const BOS: u32 = 256;
const EOS: u32 = 258;

/// The bytes that the model may say: printable ASCII, so that what it says survives being text, and back.
const SAID: std::ops::RangeInclusive<usize> = 0x20..=0x7e;
const SPECIAL: [&str; 8] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
    "<|reserved_2|>",
    "<|reserved_3|>",
];
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

/// Standard deviations of what each kind of matrix makes of a normalised row. Sharp attention is what makes blocks
/// count: with queries and keys at 1 the greedy output of a 700-token prompt notices the loss of a block in one case of
/// ten and repeats one token; from 2 on it notices in more than nine of ten, and four of five tokens are new.
const QUERY_KEY: f32 = 2.5;
const VALUE: f32 = 1.0;
/// So large that what attention found outweighs the token's own embedding, even averaged over many positions.
const ATTENTION_OUTPUT: f32 = 8.0;
const GATE_UP: f32 = 2.0;
const DOWN: f32 = 2.0;
/// The spread of logits: at temperature 1 a token's choice is open, but not even.
const OUTPUT: f32 = 3.0;
/// Small, so that all dimensions turn within a block or two, and a misplaced block is noticed.
const ROPE_BASE: f32 = 100.0;

/// Final normalisation's weight of dimension 0, the constant: brings it up to where rounding to eight bits keeps it.
const CONSTANT_WEIGHT: f32 = 16.0;
/// What tokens never said weigh it with: logits of about -100.
const SILENCE: f32 = -250.0;

pub(crate) fn tiny(seed: u64) -> Weights {
    let config = ModelConfig {
        name: "random-tiny".into(),
        layers: LAYERS as u32,
        hidden: HIDDEN as u32,
        heads: HEADS as u32,
        kv_heads: KV_HEADS as u32,
        head_dim: HEAD_DIM as u32,
        ffn: FFN as u32,
        rope_base: ROPE_BASE,
        rope_dims: HEAD_DIM as u32,
        norm_eps: 1e-5,
        vocab: VOCAB as u32,
        context_tokens_max: CONTEXT,
        bos: Some(BOS),
        eos: Some(EOS),
    };
    let rope = Rope::new(config.rope_base, config.rope_dims, config.context_tokens_max);
    let mut draw = Draw { random: SplitMix::new(seed), fingerprint: config.fingerprint(&rope) };
    let embedding = draw.embedding();
    let layers = (0..LAYERS).map(|_| draw.layer()).collect();
    let output = draw.output();
    let mut output_norm = vec![1.0; HIDDEN];
    output_norm[0] = CONSTANT_WEIGHT;
    Weights {
        key_signs: KeySigns::new(config.kv_heads * config.head_dim, config.context_tokens_max),
        config,
        tokenizer: tokenizer(),
        embedding,
        output: Some(output),
        output_norm,
        layers,
        rope,
        fingerprint: draw.fingerprint.finish(),
    }
}

/// Draws matrices one after another, and hashes what it draws.
///
/// Dimension 0 of every embedding is 1 and no layer writes to it, so that in the end it is a positive constant (over the
/// row's norm), with which the output matrix holds down the tokens that are never said.
struct Draw {
    random: SplitMix,
    fingerprint: Fingerprint,
}

impl Draw {
    fn rows(&mut self, outputs: usize, inputs: usize, deviation: f32) -> Vec<f32> {
        let rows = gaussians(&mut self.random, outputs * inputs, deviation / (inputs as f32).sqrt());
        rows.iter().for_each(|x| self.fingerprint.word(u64::from(x.to_bits())));
        rows
    }

    fn matrix(&mut self, outputs: usize, inputs: usize, deviation: f32) -> Matrix {
        Matrix::from_f32(&self.rows(outputs, inputs, deviation), outputs, inputs)
    }

    /// A matrix onto the residual stream, whose dimension 0 it leaves alone.
    fn projection(&mut self, inputs: usize, deviation: f32) -> Matrix {
        let mut rows = self.rows(HIDDEN, inputs, deviation);
        rows[..inputs].fill(0.0);
        Matrix::from_f32(&rows, HIDDEN, inputs)
    }

    fn embedding(&mut self) -> Matrix {
        let mut rows = self.rows(VOCAB, HIDDEN, (HIDDEN as f32).sqrt());
        rows.iter_mut().step_by(HIDDEN).for_each(|x| *x = 1.0);
        Matrix::from_f32(&rows, VOCAB, HIDDEN)
    }

    fn layer(&mut self) -> Layer {
        Layer {
            attention_norm: vec![1.0; HIDDEN],
            query: self.matrix(HEADS * HEAD_DIM, HIDDEN, QUERY_KEY),
            key: self.matrix(KV_HEADS * HEAD_DIM, HIDDEN, QUERY_KEY),
            value: self.matrix(KV_HEADS * HEAD_DIM, HIDDEN, VALUE),
            attention_output: self.projection(HEADS * HEAD_DIM, ATTENTION_OUTPUT),
            ffn_norm: vec![1.0; HIDDEN],
            gate: self.matrix(FFN, HIDDEN, GATE_UP),
            up: self.matrix(FFN, HIDDEN, GATE_UP),
            down: self.projection(FFN, DOWN),
        }
    }

    fn output(&mut self) -> Matrix {
        let mut rows = self.rows(VOCAB, HIDDEN, OUTPUT);
        for (token, row) in rows.chunks_exact_mut(HIDDEN).enumerate() {
            if SAID.contains(&token) {
                row[0] = 0.0;
            } else {
                row.fill(0.0);
                row[0] = SILENCE;
            }
        }
        Matrix::from_f32(&rows, VOCAB, HIDDEN)
    }
}

/// Nearly normal numbers: the sum of four uniform ones, which needs no library function.
fn gaussians(random: &mut SplitMix, count: usize, deviation: f32) -> Vec<f32> {
    let mut number = || {
        let word = random.next();
        let sum: u32 = (0..4).map(|i| (word >> (16 * i)) as u32 & 0xffff).sum();
        // Sum of four uniform numbers on 0..65536: mean 131,070, deviation 65,536 / sqrt(3).
        (sum as f32 - 131_070.0) * (3.0_f32.sqrt() / 65_536.0) * deviation
    };
    (0..count).map(|_| number()).collect()
}

/// Byte tokens in the byte-level alphabet, in which unprintable bytes stand for letters from U+0100 on.
fn tokenizer() -> GgufTokenizer {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut letter = |byte: u32| {
        let letter = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(letter).expect("below the surrogates").to_string()
    };
    let bytes: Vec<String> = (0..256).map(&mut letter).collect();
    let tokens: Vec<String> = bytes.into_iter().chain(SPECIAL.map(Into::into)).collect();
    let token_types = (0..VOCAB).map(|token| if token < 256 { 1 } else { 3 }).collect();
    GgufTokenizer {
        tokens,
        merges: Vec::new(),
        token_types,
        bos: Some(BOS),
        eos: Some(EOS),
        chat_template: Some(CHAT_TEMPLATE.into()),
        pre: Some("gpt-2".into()),
        model: Some("gpt2".into()),
        add_bos: false,
    }
}

#[cfg(test)]
mod tests;
