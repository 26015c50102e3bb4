//! How `/v1/completions`, `/v1/chat/completions` and `/inference/v1/generate` word an answer.
//!
//! Evidence: `fixtures/vllm/nixl_pd/2_prefill_response.json`, `4_decode_response.json` (chat),
//! `tito_2_prefill_response.json`, `tito_4_decode_stream.txt` (generate), `fixtures/vllm/http/openapi.json`; chunks of
//! completions and chat from vLLM 0.32's `completion/serving.py` and `chat_completion/serving.py`: a chunk has the
//! fields that the server set, null or not, and streams never carry `kv_transfer_params`.

use serde_json::{Map, Value, json};

use crate::api::generation::{Delta, Finish, Generation};
use crate::api::stream::{Shape, Usage, Whole, stream_usage, usage_object};
use crate::engine::request::Sampled;
use crate::kv::mix;
use crate::tokenizer;

/// What all answers of a request have in common.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    /// Unix time, seconds.
    pub(crate) created: u64,
    pub(crate) fingerprint: String,
    /// `--enable-prompt-tokens-details`.
    pub(crate) details: bool,
}

fn ids(tokens: &[Sampled]) -> Vec<u32> {
    tokens.iter().map(|sampled| sampled.token).collect()
}

fn reason(delta: &Delta) -> Value {
    delta.finish.as_ref().map_or(Value::Null, |finish| json!(finish.reason()))
}

fn stop_reason(delta: &Delta) -> Value {
    delta.finish.as_ref().map_or(Value::Null, Finish::matched)
}

/// `/v1/completions`.
#[derive(Debug)]
pub(crate) struct Completion {
    pub(crate) common: Common,
    /// Text offset of the next token of each choice, for logprobs; the prompt's ids were sent.
    pub(crate) begun: Vec<bool>,
}

impl Completion {
    fn logprobs(generation: &Generation, tokens: &[Sampled]) -> Value {
        let Some(top) = generation.ask.logprobs else { return Value::Null };
        let mut offset = 0;
        let mut offsets = Vec::new();
        for sampled in tokens {
            offsets.push(offset);
            offset += tokenizer::decode(&[sampled.token], false).chars().count();
        }
        let names = |sampled: &Sampled| tokenizer::decode(&[sampled.token], false);
        json!({
            "text_offset": offsets,
            "token_logprobs": tokens.iter().map(|sampled| sampled.logprob).collect::<Vec<_>>(),
            "tokens": tokens.iter().map(names).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(|sampled| top_map(sampled, top)).collect::<Vec<_>>(),
        })
    }
}

/// The token's own and `top` other tokens with their log probabilities.
fn alternatives(sampled: &Sampled, top: usize) -> Vec<(u32, f64)> {
    let mut entries = vec![(sampled.token, sampled.logprob)];
    let mut state = sampled.state;
    while entries.len() <= top && entries.len() < 26 {
        state = mix(state, 11);
        let token = u32::from(b'a') + (state % 26) as u32;
        if entries.iter().all(|(other, _)| *other != token) {
            entries.push((token, sampled.logprob - 0.5 - entries.len() as f64));
        }
    }
    entries
}

fn top_map(sampled: &Sampled, top: usize) -> Map<String, Value> {
    let name = |token: u32| tokenizer::decode(&[token], false);
    alternatives(sampled, top).into_iter().map(|(token, logprob)| (name(token), json!(logprob))).collect()
}

fn prompt_of(generation: &Generation, choice: usize) -> &[u32] {
    &generation.ask.prompts[choice / generation.ask.choices]
}

impl Shape for Completion {
    fn head(&mut self, generation: &Generation) -> Vec<Value> {
        self.begun = vec![false; generation.ask.choices * generation.ask.prompts.len()];
        Vec::new()
    }

    fn delta(&mut self, generation: &Generation, delta: &Delta, usage: Option<Usage>) -> Vec<Value> {
        let ask = &generation.ask;
        let first = !std::mem::replace(&mut self.begun[delta.choice], true);
        let prompt = prompt_of(generation, delta.choice);
        let echo = if first && ask.echo { tokenizer::decode(prompt, false) } else { String::new() };
        let mut chunk = json!({
            "id": generation.id, "object": "text_completion", "created": self.common.created, "model": ask.model,
            "choices": [{
                "index": delta.choice,
                "text": echo + &delta.text,
                "logprobs": Self::logprobs(generation, &delta.tokens),
                "finish_reason": reason(delta),
                "stop_reason": stop_reason(delta),
                "prompt_token_ids": if first && ask.return_token_ids { json!(prompt) } else { Value::Null },
                "token_ids": if ask.return_token_ids { json!(ids(&delta.tokens)) } else { Value::Null },
            }],
        });
        finish_chunk(&mut chunk, generation, delta, usage, &self.common);
        vec![chunk]
    }

    fn usage(&mut self, generation: &Generation, usage: Usage) -> Value {
        let details = self.common.details.then(|| json!({"cached_tokens": usage.cached}));
        json!({
            "id": generation.id, "object": "text_completion", "created": self.common.created,
            "model": generation.ask.model, "choices": [], "usage": stream_usage(usage, details),
            "system_fingerprint": self.common.fingerprint,
        })
    }

    fn whole(&mut self, generation: &Generation, choices: &[Whole], usage: Usage, transfer: Value) -> Value {
        let ask = &generation.ask;
        let choice = |(index, whole): (usize, &Whole)| {
            let prompt = prompt_of(generation, index);
            let echo = if ask.echo { tokenizer::decode(prompt, false) } else { String::new() };
            json!({
                "index": index,
                "text": echo + &whole.text,
                "logprobs": Self::logprobs(generation, &whole.tokens),
                "finish_reason": whole.finish.as_ref().map(Finish::reason),
                "stop_reason": whole.finish.as_ref().map(Finish::matched),
                "token_ids": ask.return_token_ids.then(|| ids(&whole.tokens)),
                "prompt_logprobs": null,
                "prompt_token_ids": ask.return_token_ids.then_some(prompt),
                "routed_experts": null,
            })
        };
        let details = match self.common.details {
            true => {
                json!({"cached_tokens": usage.cached, "created_cache_tokens": null, "multimodal_tokens": null})
            }
            false => Value::Null,
        };
        json!({
            "id": generation.id, "object": "text_completion", "created": self.common.created, "model": ask.model,
            "choices": choices.iter().enumerate().map(choice).collect::<Vec<_>>(),
            "service_tier": null, "system_fingerprint": self.common.fingerprint,
            "usage": usage_object(usage, details),
            "kv_transfer_params": transfer, "ec_transfer_params": null, "metrics": null,
        })
    }
}

/// The fingerprint stands on a choice's last chunk if no usage chunk follows; usage on each if asked for.
fn finish_chunk(
    chunk: &mut Value,
    generation: &Generation,
    delta: &Delta,
    usage: Option<Usage>,
    common: &Common,
) {
    if delta.finish.is_some() && !generation.ask.include_usage {
        chunk["system_fingerprint"] = json!(common.fingerprint);
    }
    if let Some(usage) = usage {
        chunk["usage"] = stream_usage(usage, None);
    }
}

/// `/v1/chat/completions`.
#[derive(Debug)]
pub(crate) struct Chat {
    pub(crate) common: Common,
}

impl Chat {
    fn chunk(&self, generation: &Generation, choice: Value) -> Value {
        json!({
            "id": generation.id, "object": "chat.completion.chunk", "created": self.common.created,
            "model": generation.ask.model, "choices": [choice],
        })
    }

    fn logprobs(generation: &Generation, tokens: &[Sampled]) -> Value {
        let Some(top) = generation.ask.logprobs else { return Value::Null };
        let entry = |token: u32, logprob: f64| {
            let text = tokenizer::decode(&[token], false);
            json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()})
        };
        let content = tokens.iter().map(|sampled| {
            let mut own = entry(sampled.token, sampled.logprob);
            let others = alternatives(sampled, top).into_iter().take(top);
            own["top_logprobs"] = others.map(|(token, logprob)| entry(token, logprob)).collect();
            own
        });
        json!({"content": content.collect::<Vec<_>>()})
    }
}

impl Shape for Chat {
    fn head(&mut self, generation: &Generation) -> Vec<Value> {
        let ask = &generation.ask;
        let chunk = |index: usize| {
            let choice = json!({
                "index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null,
                "finish_reason": null,
            });
            let mut chunk = self.chunk(generation, choice);
            chunk["prompt_token_ids"] = json!(ask.return_token_ids.then(|| &ask.prompts[0]));
            chunk["prompt_text"] = Value::Null;
            chunk
        };
        (0..ask.choices).map(chunk).collect()
    }

    fn delta(&mut self, generation: &Generation, delta: &Delta, usage: Option<Usage>) -> Vec<Value> {
        let ask = &generation.ask;
        let mut choice = json!({
            "index": delta.choice, "delta": {"content": delta.text},
            "logprobs": Self::logprobs(generation, &delta.tokens), "finish_reason": reason(delta),
            "token_ids": ask.return_token_ids.then(|| ids(&delta.tokens)),
        });
        if delta.finish.is_some() {
            choice["stop_reason"] = stop_reason(delta);
        }
        let mut chunk = self.chunk(generation, choice);
        finish_chunk(&mut chunk, generation, delta, usage, &self.common);
        vec![chunk]
    }

    fn usage(&mut self, generation: &Generation, usage: Usage) -> Value {
        let details = self
            .common
            .details
            .then(|| json!({"cached_tokens": usage.cached, "created_cache_tokens": usage.created}));
        json!({
            "id": generation.id, "object": "chat.completion.chunk", "created": self.common.created,
            "model": generation.ask.model, "choices": [], "usage": stream_usage(usage, details),
            "system_fingerprint": self.common.fingerprint,
        })
    }

    fn whole(&mut self, generation: &Generation, choices: &[Whole], usage: Usage, transfer: Value) -> Value {
        let ask = &generation.ask;
        let choice = |(index, whole): (usize, &Whole)| {
            json!({
                "index": index,
                "message": {
                    "role": "assistant", "content": whole.text, "refusal": null, "annotations": null,
                    "audio": null, "function_call": null, "reasoning": null,
                },
                "logprobs": Self::logprobs(generation, &whole.tokens),
                "finish_reason": whole.finish.as_ref().map(Finish::reason),
                "stop_reason": whole.finish.as_ref().map(Finish::matched),
                "token_ids": ask.return_token_ids.then(|| ids(&whole.tokens)),
                "routed_experts": null,
            })
        };
        let details = match self.common.details {
            true => json!({
                "cached_tokens": usage.cached, "created_cache_tokens": usage.created, "multimodal_tokens": null,
            }),
            false => Value::Null,
        };
        json!({
            "id": generation.id, "object": "chat.completion", "created": self.common.created, "model": ask.model,
            "choices": choices.iter().enumerate().map(choice).collect::<Vec<_>>(),
            "service_tier": null, "system_fingerprint": self.common.fingerprint,
            "usage": usage_object(usage, details),
            "prompt_logprobs": null,
            "prompt_token_ids": ask.return_token_ids.then(|| &ask.prompts[0]),
            "prompt_text": null,
            "kv_transfer_params": transfer, "ec_transfer_params": null, "metrics": null,
        })
    }
}

/// `/inference/v1/generate`.
#[derive(Debug)]
pub(crate) struct Tokens {
    pub(crate) common: Common,
    /// Tokens of each choice so far.
    pub(crate) counts: Vec<usize>,
}

impl Tokens {
    fn logprobs(generation: &Generation, tokens: &[Sampled]) -> Value {
        let Some(top) = generation.ask.logprobs else { return Value::Null };
        if generation.ask.text_mode {
            return Chat::logprobs(generation, tokens);
        }
        let entry = |(rank, (token, logprob)): (usize, (u32, f64))| json!({"token_id": token, "logprob": logprob, "rank": rank + 1});
        let content = tokens.iter().map(|sampled| {
            let top: Vec<Value> =
                alternatives(sampled, top).into_iter().enumerate().take(top.max(1)).map(entry).collect();
            json!({"token_id": sampled.token, "logprob": sampled.logprob, "rank": 1, "top_logprobs": top})
        });
        json!({"content": content.collect::<Vec<_>>()})
    }

    fn mode(generation: &Generation) -> &'static str {
        if generation.ask.text_mode { "text" } else { "tokens" }
    }

    fn versions(count: usize) -> Value {
        json!([{"version": "default", "start": 0, "end": count}])
    }
}

impl Shape for Tokens {
    fn head(&mut self, generation: &Generation) -> Vec<Value> {
        self.counts = vec![0; generation.ask.choices];
        Vec::new()
    }

    fn delta(&mut self, generation: &Generation, delta: &Delta, usage: Option<Usage>) -> Vec<Value> {
        let first = self.counts[delta.choice] == 0;
        self.counts[delta.choice] += delta.tokens.len();
        let mut choice = json!({
            "index": delta.choice, "finish_reason": reason(delta), "stop_reason": stop_reason(delta),
            "token_ids": ids(&delta.tokens), "routed_experts": null, "sampling_mask": null,
            "weight_versions": delta.finish.is_some().then(|| Self::versions(self.counts[delta.choice])),
            "logprobs": Self::logprobs(generation, &delta.tokens),
        });
        if generation.ask.text_mode {
            choice["text"] = json!(delta.text);
        }
        let mut chunk = json!({
            "request_id": generation.id, "usage": usage.map(|usage| stream_usage(usage, None)),
            "output_mode": Self::mode(generation), "choices": [choice],
        });
        if first && generation.ask.return_token_ids {
            chunk["prompt_token_ids"] = json!(generation.ask.prompts[0]);
        }
        vec![chunk]
    }

    fn usage(&mut self, generation: &Generation, usage: Usage) -> Value {
        let details = self.common.details.then(|| json!({"cached_tokens": usage.cached}));
        json!({
            "request_id": generation.id, "usage": stream_usage(usage, details),
            "output_mode": Self::mode(generation), "choices": [],
        })
    }

    fn whole(&mut self, generation: &Generation, choices: &[Whole], usage: Usage, transfer: Value) -> Value {
        let choice = |(index, whole): (usize, &Whole)| {
            let mut choice = json!({
                "index": index,
                "finish_reason": whole.finish.as_ref().map(Finish::reason),
                "stop_reason": whole.finish.as_ref().map(Finish::matched),
                "token_ids": ids(&whole.tokens), "routed_experts": null, "sampling_mask": null,
                "weight_versions": Self::versions(whole.tokens.len()),
                "logprobs": Self::logprobs(generation, &whole.tokens),
            });
            if generation.ask.text_mode {
                choice["text"] = json!(whole.text);
            }
            choice
        };
        let details = match self.common.details {
            true => {
                json!({"cached_tokens": usage.cached, "created_cache_tokens": null, "multimodal_tokens": null})
            }
            false => Value::Null,
        };
        json!({
            "request_id": generation.id, "model": generation.ask.model, "created": self.common.created,
            "usage": usage_object(usage, details),
            "prompt_logprobs": null, "prompt_token_id_logprobs": null,
            "prompt_token_ids": generation.ask.return_token_ids.then(|| &generation.ask.prompts[0]),
            "mm_placeholders": null, "metrics": null,
            "kv_transfer_params": transfer, "ec_transfer_params": null,
            "output_mode": Self::mode(generation),
            "choices": choices.iter().enumerate().map(choice).collect::<Vec<_>>(),
        })
    }
}
