//! Answers as JSON documents, key for key as vLLM writes them.

use forebay_text::Tokenizer;
use forebay_types::{FinishReason, SampledToken, TokenId};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Finish, News, Stopped,
    logprobs::{ChatLogprobs, CompletionLogprobs},
};
use crate::hand_over::HeldParams;

/// Which route answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Chat,
    Completion,
}

impl Form {
    /// Before the request's id.
    pub(crate) fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completion => "cmpl-",
        }
    }
}

/// What every document of one answer says.
#[derive(Debug, Clone)]
pub(crate) struct Words {
    pub(crate) form: Form,
    pub(crate) id: String,
    /// Unix time.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) logprobs: bool,
    /// `return_token_ids`: the prompts, in order; empty if it was not asked.
    pub(crate) prompts: Vec<Vec<TokenId>>,
    /// How many choices each prompt has.
    pub(crate) choices_each: usize,
}

/// Counts of one answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) output_tokens: u64,
    pub(crate) cached_tokens: u32,
}

/// One choice of a whole answer, collected.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) text: String,
    pub(super) tokens: Vec<SampledToken>,
    pub(super) finish: Option<Finish>,
}

impl Words {
    fn returns_token_ids(&self) -> bool {
        !self.prompts.is_empty()
    }

    fn prompt_of(&self, index: usize) -> Option<&[TokenId]> {
        self.prompts.get(index / self.choices_each.max(1)).map(Vec::as_slice)
    }

    /// A whole answer.
    pub(super) fn whole(
        &self,
        tokenizer: &Tokenizer,
        choices: &[Collected],
        usage: Usage,
        held: Option<&HeldParams>,
    ) -> Value {
        let choices: Vec<Value> =
            choices.iter().enumerate().map(|(index, c)| self.choice(tokenizer, index, c)).collect();
        let Self { form, id, created, model, .. } = self;
        let mut document = json!({
            "id": id, "object": match form { Form::Chat => "chat.completion", Form::Completion => "text_completion" },
            "created": created, "model": model, "choices": choices, "service_tier": null,
            "system_fingerprint": FINGERPRINT, "usage": usage_json(usage), "kv_transfer_params": held,
            "ec_transfer_params": null, "metrics": null,
        });
        if *form == Form::Chat {
            document["prompt_logprobs"] = Value::Null;
            document["prompt_token_ids"] = json!(self.prompt_of(0));
            document["prompt_text"] = Value::Null;
        }
        document
    }

    fn choice(&self, tokenizer: &Tokenizer, index: usize, choice: &Collected) -> Value {
        let Collected { text, tokens, finish } = choice;
        let (finish_reason, stop_reason) = ends(finish.as_ref());
        let token_ids = self.returns_token_ids().then(|| ids(tokens));
        match self.form {
            Form::Chat => json!({
                "index": index,
                "message": {
                    "role": "assistant", "content": text, "refusal": null, "annotations": null, "audio": null,
                    "function_call": null, "reasoning": null,
                },
                "logprobs": self.logprobs.then(|| ChatLogprobs::of(tokenizer, tokens)),
                "finish_reason": finish_reason, "stop_reason": stop_reason, "token_ids": token_ids,
                "routed_experts": null,
            }),
            Form::Completion => json!({
                "index": index, "text": text,
                "logprobs": self.logprobs.then(|| CompletionLogprobs::of(tokenizer, tokens, &mut 0)),
                "finish_reason": finish_reason, "stop_reason": stop_reason, "token_ids": token_ids,
                "prompt_logprobs": null, "prompt_token_ids": self.prompt_of(index), "routed_experts": null,
            }),
        }
    }

    /// A chunk of a stream. `first`: of this choice; chat then opens with [`Words::opening`].
    pub(super) fn chunk(
        &self,
        tokenizer: &Tokenizer,
        index: usize,
        news: &News,
        state: &mut ChunkState,
    ) -> Value {
        let (finish_reason, stop_reason) = ends(news.finish.as_ref());
        let token_ids = self.returns_token_ids().then(|| ids(&news.tokens));
        let choice = match self.form {
            Form::Chat => json!({
                "index": index, "delta": {"content": news.text},
                "logprobs": self.logprobs.then(|| ChatLogprobs::of(tokenizer, &news.tokens)),
                "finish_reason": finish_reason, "stop_reason": stop_reason, "token_ids": token_ids,
            }),
            Form::Completion => {
                let logprobs = self
                    .logprobs
                    .then(|| CompletionLogprobs::of(tokenizer, &news.tokens, &mut state.text_offset));
                let first = !std::mem::replace(&mut state.begun, true);
                json!({
                    "index": index, "text": news.text, "logprobs": logprobs, "finish_reason": finish_reason,
                    "stop_reason": stop_reason, "token_ids": token_ids,
                    "prompt_token_ids": self.prompt_of(index).filter(|_| first),
                })
            }
        };
        self.event(&[choice])
    }

    /// What a chat stream begins with, for each choice.
    pub(super) fn opening(&self, index: usize) -> Value {
        let choice = json!({
            "index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null,
            "stop_reason": null, "token_ids": null,
        });
        let mut event = self.event(&[choice]);
        if index == 0 {
            event["prompt_token_ids"] = json!(self.prompt_of(0));
        }
        event
    }

    /// The last chunk of a stream that was asked for counts.
    pub(super) fn usage(&self, usage: Usage) -> Value {
        let mut event = self.event(&[]);
        event["usage"] = usage_json(usage);
        event
    }

    fn event(&self, choices: &[Value]) -> Value {
        let Self { form, id, created, model, .. } = self;
        let object = match form {
            Form::Chat => "chat.completion.chunk",
            Form::Completion => "text_completion",
        };
        json!({"id": id, "object": object, "created": created, "model": model, "choices": choices, "usage": null})
    }
}

/// What a stream remembers of one choice.
#[derive(Debug, Default, Clone)]
pub(super) struct ChunkState {
    begun: bool,
    text_offset: u32,
}

/// Who answers. Not vLLM, and it says so.
const FINGERPRINT: &str = concat!("forebay-dialect-", env!("CARGO_PKG_VERSION"));

fn ids(tokens: &[SampledToken]) -> Vec<TokenId> {
    tokens.iter().map(|token| token.token).collect()
}

fn ends(finish: Option<&Finish>) -> (Option<&'static str>, Value) {
    let Some(Finish { reason, stop }) = finish else { return (None, Value::Null) };
    let reason = match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    };
    let stop = match stop {
        None => Value::Null,
        Some(Stopped::Text(text)) => json!(text),
        Some(Stopped::Token(token)) => json!(token),
    };
    (Some(reason), stop)
}

fn usage_json(usage: Usage) -> Value {
    #[derive(Serialize)]
    struct Counts {
        prompt_tokens: u64,
        total_tokens: u64,
        completion_tokens: u64,
    }
    let Usage { prompt_tokens, output_tokens, cached_tokens } = usage;
    let total_tokens = prompt_tokens + output_tokens;
    let mut counts = json!(Counts { prompt_tokens, total_tokens, completion_tokens: output_tokens });
    counts["prompt_tokens_details"] =
        json!({"cached_tokens": cached_tokens, "created_cache_tokens": null, "multimodal_tokens": null});
    counts["completion_tokens_details"] = Value::Null;
    counts
}
