//! Requests for tokens.
//!
//! An engine shall draw as `Sampling` says and stop at exactly its stop tokens. So every field that a model's
//! `generation_config.json` would fill in is given, and `ignore_eos` is set wherever the engine still honours
//! `stop_token_ids` then.

use forebay_types::{Sampling, TokenId};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::{EXPORT, ExportParams, Kv, Part, Room, TokenRequest};

/// `vLLM` takes seeds of 63 bits, and -1 for none.
const SEED_MASK: u64 = i64::MAX as u64;

/// Most likely tokens that vLLM gives at most, unless `--max-logprobs` says otherwise.
const VLLM_LOGPROBS_MAX: u8 = 20;

/// The body for `/v1/completions` with token ids.
pub fn completions(request: &TokenRequest<'_>) -> Vec<u8> {
    let sampling = request.sampling;
    let streams = request.kv.streams();
    write(
        request,
        &Completions {
            model: request.model,
            prompt: request.prompt,
            add_special_tokens: false,
            n: request.choices,
            max_tokens: output_tokens_max(request),
            draw: Draw::vllm(sampling),
            logprobs: sampling.logprobs,
            return_tokens_as_token_ids: sampling.logprobs.map(|_| true),
            return_token_ids: true,
            stream: streams,
            stream_options: streams.then_some(StreamOptions { include_usage: true }),
            cache_salt: request.salt,
            kv_transfer_params: KvParams::of(request.kv),
        },
    )
}

/// The body for vLLM's `/inference/v1/generate`.
pub fn vllm_generate(request: &TokenRequest<'_>) -> Vec<u8> {
    let sampling = request.sampling;
    let streams = request.kv.streams();
    // The list that this route answers begins with the drawn token, which counts.
    let logprobs = sampling.logprobs.map(|k| k.saturating_add(1).min(VLLM_LOGPROBS_MAX.max(k)));
    write(
        request,
        &Generate {
            request_id: request.id,
            model: request.model,
            token_ids: request.prompt,
            sampling_params: GenerateSampling {
                n: request.choices,
                max_tokens: output_tokens_max(request),
                draw: Draw::vllm(sampling),
                logprobs,
                detokenize: false,
            },
            output_mode: "tokens",
            stream: streams,
            stream_options: streams.then_some(StreamOptions { include_usage: true }),
            cache_salt: request.salt,
            kv_transfer_params: KvParams::of(request.kv),
        },
    )
}

/// The body for SGLang's `/generate`.
///
/// SGLang ignores `stop_token_ids` too where it is told to ignore the model's own end, so an answer that has stop tokens
/// ends at the model's own as well.
pub fn sglang_generate(request: &TokenRequest<'_>) -> Vec<u8> {
    let sampling = request.sampling;
    let (room, part) = match request.kv {
        Kv::Meet { room, part } => (Some(room), Some(part)),
        Kv::Own | Kv::Export | Kv::Import(_) => (None, None),
    };
    write(
        request,
        &Sglang {
            rid: request.id,
            input_ids: request.prompt,
            sampling_params: SglangSampling {
                n: request.choices,
                max_new_tokens: sampling.output_tokens_max,
                temperature: sampling.temperature,
                top_p: sampling.top_p,
                top_k: if sampling.top_k == 0 { -1 } else { i64::from(sampling.top_k) },
                min_p: 0.0,
                repetition_penalty: 1.0,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                sampling_seed: seed(sampling),
                stop_token_ids: &sampling.stop_tokens,
                ignore_eos: sampling.stop_tokens.is_empty(),
                skip_special_tokens: false,
            },
            return_logprob: sampling.logprobs.is_some(),
            top_logprobs_num: sampling.logprobs,
            logprob_start_len: sampling.logprobs.map(|_| -1),
            stream: request.kv.streams(),
            cache_salt: request.salt,
            routed_dp_rank: request.dp_rank,
            bootstrap_host: room.map(|room| room.host),
            bootstrap_port: room.map(|room| room.port),
            bootstrap_room: room.map(|room| room.room),
            disagg_prefill_dp_rank: prefill_rank(room, part),
        },
    )
}

/// The hint for the decode server; the prefill server is told its rank by `routed_dp_rank`.
pub(super) fn prefill_rank(room: Option<Room<'_>>, part: Option<Part>) -> Option<u16> {
    room.filter(|_| part == Some(Part::Decode)).and_then(|room| room.prefill_dp_rank)
}

fn output_tokens_max(request: &TokenRequest<'_>) -> u32 {
    if matches!(request.kv, Kv::Export) { 1 } else { request.sampling.output_tokens_max }
}

/// A seed costs vLLM a generator for each request, and the most likely token needs none.
fn seed(sampling: &Sampling) -> Option<u64> {
    (sampling.temperature > 0.0).then_some(sampling.seed & SEED_MASK)
}

fn write(request: &TokenRequest<'_>, body: &impl Serialize) -> Vec<u8> {
    /// A token id and its comma.
    const TOKEN_BYTES: usize = 7;
    let mut json = Vec::with_capacity(512 + request.prompt.len() * TOKEN_BYTES);
    serde_json::to_writer(&mut json, body).expect("numbers, texts and lists of them are JSON");
    json
}

#[derive(Serialize)]
struct Completions<'a> {
    model: &'a str,
    prompt: &'a [TokenId],
    add_special_tokens: bool,
    n: u32,
    max_tokens: u32,
    #[serde(flatten)]
    draw: Draw<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    return_tokens_as_token_ids: Option<bool>,
    return_token_ids: bool,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_transfer_params: Option<KvParams<'a>>,
}

#[derive(Serialize)]
struct Generate<'a> {
    request_id: &'a str,
    model: &'a str,
    token_ids: &'a [TokenId],
    sampling_params: GenerateSampling<'a>,
    output_mode: &'static str,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_transfer_params: Option<KvParams<'a>>,
}

#[derive(Serialize)]
struct GenerateSampling<'a> {
    n: u32,
    max_tokens: u32,
    #[serde(flatten)]
    draw: Draw<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<u8>,
    detokenize: bool,
}

/// What vLLM's two routes share.
#[derive(Serialize)]
struct Draw<'a> {
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    stop_token_ids: &'a [TokenId],
    /// The model's own end is among the stop tokens if it shall end the answer.
    ignore_eos: bool,
    skip_special_tokens: bool,
}

impl<'a> Draw<'a> {
    fn vllm(sampling: &'a Sampling) -> Self {
        Self {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: seed(sampling),
            stop_token_ids: &sampling.stop_tokens,
            ignore_eos: true,
            skip_special_tokens: false,
        }
    }
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

enum KvParams<'a> {
    Export(ExportParams),
    Import(&'a RawValue),
}

impl<'a> KvParams<'a> {
    fn of(kv: Kv<'a>) -> Option<Self> {
        match kv {
            Kv::Export => Some(Self::Export(EXPORT)),
            Kv::Import(params) => Some(Self::Import(params)),
            Kv::Own | Kv::Meet { .. } => None,
        }
    }
}

impl Serialize for KvParams<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Export(params) => params.serialize(serializer),
            Self::Import(params) => params.serialize(serializer),
        }
    }
}

#[derive(Serialize)]
struct Sglang<'a> {
    rid: &'a str,
    input_ids: &'a [TokenId],
    sampling_params: SglangSampling<'a>,
    return_logprob: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs_num: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprob_start_len: Option<i32>,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_dp_rank: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bootstrap_host: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bootstrap_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bootstrap_room: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disagg_prefill_dp_rank: Option<u16>,
}

#[derive(Serialize)]
struct SglangSampling<'a> {
    n: u32,
    max_new_tokens: u32,
    temperature: f32,
    top_p: f32,
    top_k: i64,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    sampling_seed: Option<u64>,
    stop_token_ids: &'a [TokenId],
    ignore_eos: bool,
    skip_special_tokens: bool,
}
