//! `/v1/completions` with `return_token_ids`, as vLLM 0.32 streams it: one choice an event, its new tokens in `token_ids`,
//! the prompt's ids in the first event, the count in the last.

use std::fmt;

use forebay_types::{TokenId, TokenLogprobs};
use serde::{Deserialize, Deserializer, de};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::{AnswerError, Chunk, Delta, Fault, Finish, LOGPROB_MIN, PromptEcho, Usage, top};

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow)]
    choices: Option<SmallVec<[Choice<'a>; 1]>>,
    usage: Option<Usage>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: u32,
    token_ids: Option<SmallVec<[TokenId; 8]>>,
    finish_reason: Option<Finish>,
    #[serde(borrow)]
    logprobs: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt_token_ids: Option<&'a RawValue>,
}

pub(super) fn read(data: &str, logprobs: Option<u8>) -> Result<Chunk<'_>, AnswerError> {
    let event: Event<'_> = serde_json::from_str(data).map_err(|error| AnswerError::json(&error))?;
    if let Some(fault) = Fault::in_event(event.error, data, event.choices.is_some() || event.usage.is_some())?
    {
        return Ok(Chunk { fault: Some(fault), ..Chunk::default() });
    }
    let mut chunk = Chunk { usage: event.usage, ..Chunk::default() };
    for choice in event.choices.unwrap_or_default() {
        let tokens = choice.token_ids.ok_or(AnswerError::NoTokenIds)?;
        let logprobs = match logprobs {
            Some(k) if !tokens.is_empty() => read_logprobs(choice.logprobs, tokens.len(), k)?,
            _ => Vec::new(),
        };
        let finish = Finish::reason(choice.finish_reason, &mut chunk.fault)?;
        chunk.prompt = chunk.prompt.or(choice.prompt_token_ids.map(PromptEcho));
        chunk.deltas.push(Delta { index: choice.index, tokens, logprobs, finish });
    }
    Ok(chunk)
}

#[derive(Deserialize)]
struct Logprobs {
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Option<Vec<Option<Named>>>,
}

/// `{"token_id:5": -0.1}`, as `return_tokens_as_token_ids` has it.
struct Named(Vec<(TokenId, f32)>);

fn read_logprobs(raw: Option<&RawValue>, tokens: usize, k: u8) -> Result<Vec<TokenLogprobs>, AnswerError> {
    let raw = raw.ok_or(AnswerError::NoLogprobs)?;
    let Logprobs { token_logprobs, top_logprobs } =
        serde_json::from_str(raw.get()).map_err(|error| AnswerError::json(&error))?;
    let mut tops = top_logprobs.unwrap_or_default().into_iter();
    if token_logprobs.len() != tokens || (k > 0 && tops.len() != tokens) {
        return Err(AnswerError::NoLogprobs);
    }
    let each = |chosen: Option<f32>| {
        let most_likely = tops.next().flatten().map_or_else(Vec::new, |Named(tokens)| tokens);
        TokenLogprobs { chosen: chosen.unwrap_or(LOGPROB_MIN), top: top(most_likely, k) }
    };
    Ok(token_logprobs.into_iter().map(each).collect())
}

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Named;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("log probabilities by token id")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Named, A::Error> {
                let mut tokens = Vec::new();
                while let Some((TokenName(token), logprob)) = map.next_entry::<TokenName, f32>()? {
                    tokens.push((token, logprob));
                }
                Ok(Named(tokens))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// `token_id:5`
struct TokenName(TokenId);

impl<'de> Deserialize<'de> for TokenName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = TokenName;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("token_id:N")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<TokenName, E> {
                let id = text.strip_prefix("token_id:").and_then(|id| id.parse().ok());
                id.map(TokenName).ok_or_else(|| E::custom("no token id"))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}
