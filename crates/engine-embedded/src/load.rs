//! From a GGUF file to [`Weights`]: checks the shape, then reads tensor by tensor, so that no more than the largest
//! tensor is held twice.

use std::{
    collections::BTreeSet,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use crate::{
    ModelError,
    gguf::{GgufMetadata, TensorEntry, open},
    hash::Fingerprint,
    model::{HEAD_MULTIPLE, KeySigns, Layer, ModelConfig, Rope, WIDTH_MULTIPLE, Weights},
    quant::{Encoding, Matrix, f16_to_f32},
};

/// Positions beyond it are not offered: the rotary tables of a million-token model would outweigh a small model.
const CONTEXT_TOKENS_MAX: u32 = 65_536;
/// Bounds on a shape, far above any model that one CPU thread could serve.
const LAYERS_MAX: u32 = 1_024;
const WIDTH_MAX: u32 = 1 << 17;

pub(crate) fn load(path: &Path, progress: &mut dyn FnMut(f32)) -> Result<Weights, ModelError> {
    let (mut file, bytes) = open(path)?;
    read(&mut file, bytes, path, progress)
}

/// Reads a model from a file of `bytes` bytes, whose name is `path` in errors.
pub(crate) fn read(
    file: &mut (impl Read + Seek),
    bytes: u64,
    path: &Path,
    progress: &mut dyn FnMut(f32),
) -> Result<Weights, ModelError> {
    progress(0.0);
    let metadata = GgufMetadata::parse(file, bytes, path)?;
    let config = config(&metadata)?;
    let tokenizer = metadata.tokenizer()?;
    if tokenizer.tokens.len() != config.vocab as usize {
        let what = format!("a vocabulary of {} tokens (it has {})", config.vocab, tokenizer.tokens.len());
        return Err(metadata.missing(what));
    }
    let rope = Rope::new(config.rope_base, config.rope_dims, config.context_tokens_max);
    let fingerprint = config.fingerprint(&rope);
    let tensor_bytes = metadata.tensors().values().filter_map(|entry| entry.bytes).sum::<u64>().max(1);
    let mut tensors = Tensors {
        file,
        metadata: &metadata,
        unread: metadata.tensors().keys().map(String::as_str).collect(),
        buffer: Vec::new(),
        fingerprint,
        tensor_bytes,
        done_bytes: 0,
        progress,
    };
    let (hidden, vocab) = (config.hidden, config.vocab);
    let embedding = tensors.matrix("token_embd.weight", hidden, vocab)?;
    let layers = (0..config.layers).map(|i| tensors.layer(i, &config)).collect::<Result<_, _>>()?;
    let output_norm = tensors.vector("output_norm.weight", hidden)?;
    let output = match metadata.tensors().contains_key("output.weight") {
        true => Some(tensors.matrix("output.weight", hidden, vocab)?),
        false => None,
    };
    if let Some(name) = tensors.unread.first() {
        let what = format!("it has a tensor {name}, which a plain llama model has not");
        return Err(metadata.unsupported(what));
    }
    let fingerprint = tensors.fingerprint.finish();
    (tensors.progress)(1.0);
    let key_signs = KeySigns::new(config.kv_heads * config.head_dim, config.context_tokens_max);
    Ok(Weights { config, tokenizer, embedding, output, output_norm, layers, rope, key_signs, fingerprint })
}

/// The shape that the metadata tells, held to what the kernels compute.
fn config(metadata: &GgufMetadata) -> Result<ModelConfig, ModelError> {
    let architecture = metadata.text("general.architecture").unwrap_or("unnamed");
    if architecture != "llama" {
        let what = format!("its architecture is {architecture}, and this engine computes llama");
        return Err(metadata.unsupported(what));
    }
    let optional = |key: &str, most: u32| -> Result<Option<u32>, ModelError> {
        let Some(number) = metadata.unsigned(key) else { return Ok(None) };
        match u32::try_from(number) {
            Ok(number) if (1..=most).contains(&number) => Ok(Some(number)),
            _ => Err(metadata.unsupported(format!("its {key} is {number}, and 1 to {most} are possible"))),
        }
    };
    let required = |key: &str, most: u32| {
        optional(key, most)?.ok_or_else(|| metadata.missing(format!("the number {key}")))
    };
    let layers = required("llama.block_count", LAYERS_MAX)?;
    let hidden = required("llama.embedding_length", WIDTH_MAX)?;
    let ffn = required("llama.feed_forward_length", WIDTH_MAX)?;
    let heads = required("llama.attention.head_count", WIDTH_MAX)?;
    let kv_heads = optional("llama.attention.head_count_kv", heads)?.unwrap_or(heads);
    let head_dim = optional("llama.attention.key_length", WIDTH_MAX)?.unwrap_or((hidden / heads).max(1));
    let value_dim = optional("llama.attention.value_length", WIDTH_MAX)?.unwrap_or(head_dim);
    let rope_dims = optional("llama.rope.dimension_count", head_dim)?.unwrap_or(head_dim);
    let context = required("llama.context_length", u32::MAX)?;
    let scaling = metadata.text("llama.rope.scaling.type").unwrap_or("none");
    let rope_base = metadata.float("llama.rope.freq_base").unwrap_or(10_000.0) as f32;
    let norm_eps = metadata
        .float("llama.attention.layer_norm_rms_epsilon")
        .ok_or_else(|| metadata.missing("the number llama.attention.layer_norm_rms_epsilon"))?
        as f32;
    let attention_width = heads.checked_mul(head_dim).filter(|width| *width <= WIDTH_MAX);

    let rules = [
        (
            hidden.is_multiple_of(WIDTH_MULTIPLE),
            format!("width {hidden} is not a multiple of {WIDTH_MULTIPLE}"),
        ),
        (
            ffn.is_multiple_of(WIDTH_MULTIPLE),
            format!("inner width {ffn} is not a multiple of {WIDTH_MULTIPLE}"),
        ),
        (heads.is_multiple_of(kv_heads), format!("{heads} heads do not divide into {kv_heads} KV heads")),
        (
            head_dim.is_multiple_of(HEAD_MULTIPLE),
            format!("head width {head_dim} is no multiple of {HEAD_MULTIPLE}"),
        ),
        (
            attention_width.is_some_and(|width| width.is_multiple_of(WIDTH_MULTIPLE)),
            format!("{heads} heads of width {head_dim} are not a multiple of {WIDTH_MULTIPLE}, or too many"),
        ),
        (
            value_dim == head_dim,
            format!("keys are {head_dim} wide and values {value_dim}, and must be equal"),
        ),
        (rope_dims.is_multiple_of(2), format!("{rope_dims} rotated dimensions are odd")),
        (scaling == "none", format!("rotary scaling {scaling} is not computed here")),
        (rope_base.is_finite() && rope_base > 0.0, format!("the rotary base is {rope_base}")),
        (norm_eps.is_finite() && norm_eps >= 0.0, format!("the normalisation's epsilon is {norm_eps}")),
    ];
    if let Some((_, what)) = rules.into_iter().find(|(holds, _)| !holds) {
        return Err(metadata.unsupported(what));
    }
    let tokenizer = metadata.tokenizer()?;
    let embedding = metadata.tensors().get("token_embd.weight");
    let vocab = embedding.and_then(|entry| entry.shape.get(1)).copied().unwrap_or(0);
    let vocab = u32::try_from(vocab).ok().filter(|vocab| *vocab > 0);
    let vocab = vocab.ok_or_else(|| metadata.missing("the tensor token_embd.weight, a matrix"))?;
    Ok(ModelConfig {
        name: name_of(metadata.path()),
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
        context_tokens_max: context.min(CONTEXT_TOKENS_MAX),
        bos: tokenizer.bos,
        eos: tokenizer.eos,
    })
}

/// The file's name without its ending and without the encoding's (`.Q4_1`, `.F16`).
fn name_of(path: &Path) -> String {
    let stem = path.file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy());
    let is_encoding = |ending: &str| {
        ending.starts_with(['Q', 'q', 'F', 'f', 'I', 'B']) && ending.contains(|c: char| c.is_ascii_digit())
    };
    match stem.rsplit_once('.') {
        Some((name, ending)) if !name.is_empty() && is_encoding(ending) => name.into(),
        _ => stem.into_owned(),
    }
}

/// Reads tensors, ticking them off, hashing them and telling how far it got.
struct Tensors<'a, F> {
    file: &'a mut F,
    metadata: &'a GgufMetadata,
    unread: BTreeSet<&'a str>,
    buffer: Vec<u8>,
    fingerprint: Fingerprint,
    tensor_bytes: u64,
    done_bytes: u64,
    progress: &'a mut dyn FnMut(f32),
}

impl<F: Read + Seek> Tensors<'_, F> {
    fn layer(&mut self, index: u32, config: &ModelConfig) -> Result<Layer, ModelError> {
        let ModelConfig { hidden, ffn, heads, kv_heads, head_dim, .. } = *config;
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        Ok(Layer {
            attention_norm: self.vector(&name("attn_norm"), hidden)?,
            query: self.matrix(&name("attn_q"), hidden, heads * head_dim)?,
            key: self.matrix(&name("attn_k"), hidden, kv_heads * head_dim)?,
            value: self.matrix(&name("attn_v"), hidden, kv_heads * head_dim)?,
            attention_output: self.matrix(&name("attn_output"), heads * head_dim, hidden)?,
            ffn_norm: self.vector(&name("ffn_norm"), hidden)?,
            gate: self.matrix(&name("ffn_gate"), hidden, ffn)?,
            up: self.matrix(&name("ffn_up"), hidden, ffn)?,
            down: self.matrix(&name("ffn_down"), ffn, hidden)?,
        })
    }

    fn matrix(&mut self, name: &str, inputs: u32, outputs: u32) -> Result<Matrix, ModelError> {
        let (encoding, offset) = self.fetch(name, &[inputs.into(), outputs.into()])?;
        Matrix::pack(encoding, &self.buffer, outputs as usize, inputs as usize).map_err(|_| {
            let what = format!("tensor {name} has a scale that is not a number");
            ModelError::Corrupt { path: self.metadata.path().into(), offset, what }
        })
    }

    fn vector(&mut self, name: &str, length: u32) -> Result<Vec<f32>, ModelError> {
        let (encoding, offset) = self.fetch(name, &[length.into()])?;
        let values: Vec<f32> = match encoding {
            Encoding::F32 => self.buffer.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect(),
            Encoding::F16 => {
                let half = |word: &[u8; 2]| f16_to_f32(u16::from_le_bytes(*word));
                self.buffer.as_chunks().0.iter().map(half).collect()
            }
            _ => {
                return Err(self
                    .metadata
                    .unsupported(format!("tensor {name} is a vector, but not F32 or F16")));
            }
        };
        if values.iter().any(|value| !value.is_finite()) {
            let what = format!("tensor {name} has a value that is not a number");
            return Err(ModelError::Corrupt { path: self.metadata.path().into(), offset, what });
        }
        Ok(values)
    }

    /// Brings a tensor's bytes into the buffer; returns how they are written and where they were.
    fn fetch(&mut self, name: &str, shape: &[u64]) -> Result<(Encoding, u64), ModelError> {
        let entry = self.metadata.tensors().get(name);
        let TensorEntry { shape: found, kind, offset, bytes } =
            entry.ok_or_else(|| self.metadata.missing(format!("the tensor {name}")))?;
        if found != shape {
            let what = format!("a tensor {name} of shape {shape:?} (it is {found:?})");
            return Err(self.metadata.missing(what));
        }
        let (Some(encoding), Some(bytes)) = (Encoding::of_gguf(*kind), *bytes) else {
            let what = format!(
                "tensor {name} has encoding number {kind}, and this engine reads F32, F16, Q4_0, Q4_1 and Q8_0"
            );
            return Err(self.metadata.unsupported(what));
        };
        self.buffer.resize(usize::try_from(bytes).expect("no larger than the file"), 0);
        self.file
            .seek(SeekFrom::Start(*offset))
            .and_then(|_| self.file.read_exact(&mut self.buffer))
            .map_err(|source| self.failed(name, *offset, source))?;
        self.fingerprint.bytes(name.as_bytes());
        self.fingerprint.word(u64::from(*kind));
        self.fingerprint.bytes(&self.buffer);
        self.unread.remove(name);
        self.done_bytes += bytes;
        (self.progress)(self.done_bytes as f32 / self.tensor_bytes as f32);
        Ok((encoding, *offset))
    }

    fn failed(&self, name: &str, offset: u64, source: io::Error) -> ModelError {
        let path = self.metadata.path().into();
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return ModelError::Corrupt { path, offset, what: format!("the file ends within tensor {name}") };
        }
        ModelError::Read { path, source }
    }
}

#[cfg(test)]
mod tests;
