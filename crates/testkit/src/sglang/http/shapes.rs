//! How `/generate`, `/v1/completions` and `/v1/chat/completions` word an answer in SGLang.
//!
//! Evidence: SGLang 0.5.23's `managers/tokenizer_manager.py` (chunks of `/generate` hold everything so far, unless the
//! server streams increments), `entrypoints/openai/protocol.py`, `serving_chat.py`, `serving_completions.py`. Errors
//! have two shapes: `{"error": {"message"}}` natively for what the client did wrong, else a flat object with
//! `"object": "error"`.

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::api::error::ApiError;
use crate::api::generation::{Delta, Finish, Generation};
use crate::api::stream::{Shape, Usage, Whole};
use crate::engine::request::Sampled;
use crate::sglang::Sglang;
use crate::tokenizer::IM_END;

fn ids(tokens: &[Sampled]) -> Vec<u32> {
    tokens.iter().map(|sampled| sampled.token).collect()
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// What ended the answer: the end token as well, which vLLM does not name.
fn matched(finish: &Finish) -> Value {
    if *finish == Finish::End { json!(IM_END) } else { finish.matched() }
}

/// `/generate`.
#[derive(Debug)]
pub(super) struct Native {
    incremental: bool,
    /// Everything so far, by choice.
    so_far: Vec<(String, Vec<u32>)>,
    id: String,
}

impl Native {
    pub(super) fn new(sglang: &Sglang) -> Self {
        Self { incremental: sglang.options.incremental_streaming, so_far: Vec::new(), id: String::new() }
    }

    fn finish_reason(finish: &Finish, completion: usize) -> Value {
        match finish {
            Finish::Length => json!({"type": "length", "length": completion}),
            Finish::Abort => {
                json!({"type": "abort", "message": "Aborted", "status_code": null, "err_type": null})
            }
            stop => json!({"type": "stop", "matched": matched(stop)}),
        }
    }

    fn meta_info(
        generation: &Generation,
        choice: usize,
        finish: Option<&Finish>,
        completion: usize,
        cached: usize,
    ) -> Value {
        json!({
            "id": generation.id,
            "finish_reason": finish.map(|finish| Self::finish_reason(finish, completion)),
            "prompt_tokens": generation.ask.prompts[0].len(),
            "weight_version": "default",
            "num_retractions": 0,
            "completion_tokens": completion,
            "cached_tokens": cached,
            "dp_rank": generation.rank_of(choice),
        })
    }

    fn logprobs(generation: &Generation, tokens: &[Sampled], meta: &mut Value) {
        if generation.ask.logprobs.is_some() {
            let own = |sampled: &Sampled| json!([sampled.logprob, sampled.token, null]);
            meta["output_token_logprobs"] = tokens.iter().map(own).collect();
        }
    }
}

impl Shape for Native {
    fn head(&mut self, generation: &Generation) -> Vec<Value> {
        self.so_far = vec![Default::default(); generation.ask.choices];
        self.id.clone_from(&generation.id);
        Vec::new()
    }

    fn delta(&mut self, generation: &Generation, delta: &Delta, _usage: Option<Usage>) -> Vec<Value> {
        let (text, tokens) = &mut self.so_far[delta.choice];
        text.push_str(&delta.text);
        tokens.extend(ids(&delta.tokens));
        let (text, tokens, completion) = match self.incremental {
            true => (delta.text.clone(), ids(&delta.tokens), tokens.len()),
            false => (text.clone(), tokens.clone(), tokens.len()),
        };
        let finish = delta.finish.as_ref();
        let mut meta = Self::meta_info(generation, delta.choice, finish, completion, delta.cached_tokens);
        Self::logprobs(generation, &delta.tokens, &mut meta);
        let mut chunk = json!({"text": text, "output_ids": tokens, "meta_info": meta});
        if generation.ask.choices > 1 {
            chunk["index"] = json!(delta.choice);
        }
        vec![chunk]
    }

    fn usage(&mut self, _generation: &Generation, _usage: Usage) -> Value {
        json!({}) // never asked for: `/generate` has no stream options
    }

    fn error(&self, error: &ApiError, streaming: bool) -> Value {
        match (streaming, error.status >= 500) {
            (true, true) => {
                let reason = json!({
                    "type": "abort", "message": error.message, "status_code": error.status, "err_type": error.kind,
                });
                json!({"text": "", "output_ids": [], "meta_info": {"id": self.id, "finish_reason": reason}})
            }
            (true, false) => json!({"error": {
                "message": error.message, "type": "invalid_request_error", "code": error.status, "retryable": false,
            }}),
            (false, true) => openai_error(error, false),
            (false, false) => json!({"error": {"message": error.message}}),
        }
    }

    fn whole(&mut self, generation: &Generation, choices: &[Whole], usage: Usage, _transfer: Value) -> Value {
        let one = |(index, whole): (usize, &Whole)| {
            let completion = whole.tokens.len();
            let mut meta =
                Self::meta_info(generation, index, whole.finish.as_ref(), completion, usage.cached);
            Self::logprobs(generation, &whole.tokens, &mut meta);
            json!({"text": whole.text, "output_ids": ids(&whole.tokens), "meta_info": meta})
        };
        let mut answers: Vec<Value> = choices.iter().enumerate().map(one).collect();
        if answers.len() == 1 { answers.remove(0) } else { json!(answers) }
    }
}

/// The flat error of OpenAI's routes; within a stream it is wrapped.
fn openai_error(error: &ApiError, streaming: bool) -> Value {
    let flat = json!({
        "object": "error", "message": error.message, "type": error.kind, "param": error.param,
        "code": error.status,
    });
    if streaming { json!({"error": flat}) } else { flat }
}

fn usage_object(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt, "total_tokens": usage.prompt + usage.completion,
        "completion_tokens": usage.completion, "prompt_tokens_details": {"cached_tokens": usage.cached},
        "reasoning_tokens": 0,
    })
}

/// `/v1/completions`.
#[derive(Debug, Default)]
pub(super) struct Completion {
    created: u64,
}

impl Shape for Completion {
    fn head(&mut self, _generation: &Generation) -> Vec<Value> {
        self.created = now();
        Vec::new()
    }

    fn delta(&mut self, generation: &Generation, delta: &Delta, _usage: Option<Usage>) -> Vec<Value> {
        let mut choice = json!({
            "index": delta.choice, "text": delta.text, "logprobs": null,
            "finish_reason": delta.finish.as_ref().map(Finish::reason),
            "matched_stop": delta.finish.as_ref().map(matched),
        });
        if generation.ask.return_token_ids {
            choice["token_ids"] = json!(ids(&delta.tokens));
        }
        vec![json!({
            "id": generation.id, "object": "text_completion", "created": self.created,
            "model": generation.ask.model, "choices": [choice], "usage": null,
        })]
    }

    fn usage(&mut self, generation: &Generation, usage: Usage) -> Value {
        json!({
            "id": generation.id, "object": "text_completion", "created": self.created,
            "model": generation.ask.model, "choices": [], "usage": usage_object(usage),
        })
    }

    fn error(&self, error: &ApiError, streaming: bool) -> Value {
        openai_error(error, streaming)
    }

    fn whole(&mut self, generation: &Generation, choices: &[Whole], usage: Usage, _transfer: Value) -> Value {
        let one = |(index, whole): (usize, &Whole)| {
            let mut choice = json!({
                "index": index, "text": whole.text, "logprobs": null,
                "finish_reason": whole.finish.as_ref().map(Finish::reason),
                "matched_stop": whole.finish.as_ref().map(matched),
            });
            if generation.ask.return_token_ids {
                choice["token_ids"] = json!(ids(&whole.tokens));
                choice["prompt_token_ids"] = json!(generation.ask.prompts[0]);
            }
            choice
        };
        json!({
            "id": generation.id, "object": "text_completion", "created": now(), "model": generation.ask.model,
            "choices": choices.iter().enumerate().map(one).collect::<Vec<_>>(),
            "usage": usage_object(usage), "metadata": {"weight_version": "default"},
        })
    }
}

/// `/v1/chat/completions`.
#[derive(Debug, Default)]
pub(super) struct Chat {
    created: u64,
}

impl Chat {
    fn chunk(&self, generation: &Generation, choices: Value, usage: Value) -> Value {
        json!({
            "id": generation.id, "object": "chat.completion.chunk", "created": self.created,
            "model": generation.ask.model, "choices": choices, "usage": usage,
        })
    }
}

impl Shape for Chat {
    fn head(&mut self, generation: &Generation) -> Vec<Value> {
        self.created = now();
        let first = |index: usize| {
            let delta = json!({"role": "assistant", "content": "", "reasoning_content": null});
            let choice = json!([{
                "index": index, "delta": delta, "logprobs": null, "finish_reason": null, "matched_stop": null,
            }]);
            self.chunk(generation, choice, Value::Null)
        };
        (0..generation.ask.choices).map(first).collect()
    }

    fn delta(&mut self, generation: &Generation, delta: &Delta, _usage: Option<Usage>) -> Vec<Value> {
        let choice = |content: Value, finish: Option<&Finish>| {
            json!([{
                "index": delta.choice,
                "delta": {"role": null, "content": content, "reasoning_content": null},
                "logprobs": null, "finish_reason": finish.map(Finish::reason),
                "matched_stop": finish.map(matched),
            }])
        };
        let mut chunks = Vec::new();
        if !delta.text.is_empty() {
            chunks.push(self.chunk(generation, choice(json!(delta.text), None), Value::Null));
        }
        if let Some(finish) = &delta.finish {
            chunks.push(self.chunk(generation, choice(Value::Null, Some(finish)), Value::Null));
        }
        chunks
    }

    fn usage(&mut self, generation: &Generation, usage: Usage) -> Value {
        self.chunk(generation, json!([]), usage_object(usage))
    }

    fn error(&self, error: &ApiError, streaming: bool) -> Value {
        openai_error(error, streaming)
    }

    fn whole(&mut self, generation: &Generation, choices: &[Whole], usage: Usage, _transfer: Value) -> Value {
        let one = |(index, whole): (usize, &Whole)| {
            json!({
                "index": index,
                "message": {"role": "assistant", "content": whole.text, "reasoning_content": null},
                "logprobs": null, "finish_reason": whole.finish.as_ref().map(Finish::reason),
                "matched_stop": whole.finish.as_ref().map(matched),
            })
        };
        json!({
            "id": generation.id, "object": "chat.completion", "created": now(), "model": generation.ask.model,
            "choices": choices.iter().enumerate().map(one).collect::<Vec<_>>(),
            "usage": usage_object(usage), "metadata": {"weight_version": "default"},
        })
    }
}
