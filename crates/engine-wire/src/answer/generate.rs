//! vLLM's `/inference/v1/generate`, as 0.32 streams it.

use forebay_types::{TokenId, TokenLogprobs};
use serde::Deserialize;
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
    #[serde(borrow)]
    prompt_token_ids: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    index: u32,
    token_ids: Option<SmallVec<[TokenId; 8]>>,
    finish_reason: Option<Finish>,
    #[serde(borrow)]
    logprobs: Option<&'a RawValue>,
}

pub(super) fn read(data: &str, logprobs: Option<u8>) -> Result<Chunk<'_>, AnswerError> {
    let event: Event<'_> = serde_json::from_str(data).map_err(|error| AnswerError::json(&error))?;
    if let Some(fault) = Fault::in_event(event.error, data, event.choices.is_some() || event.usage.is_some())?
    {
        return Ok(Chunk { fault: Some(fault), ..Chunk::default() });
    }
    let prompt = event.prompt_token_ids.map(PromptEcho);
    let mut chunk = Chunk { usage: event.usage, prompt, ..Chunk::default() };
    for choice in event.choices.unwrap_or_default() {
        let tokens = choice.token_ids.ok_or(AnswerError::NoTokenIds)?;
        let logprobs = match logprobs {
            Some(k) if !tokens.is_empty() => read_logprobs(choice.logprobs, tokens.len(), k)?,
            _ => Vec::new(),
        };
        let finish = Finish::reason(choice.finish_reason, &mut chunk.fault)?;
        chunk.deltas.push(Delta { index: choice.index, tokens, logprobs, finish });
    }
    Ok(chunk)
}

#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<Position>>,
}

#[derive(Deserialize)]
struct Position {
    logprob: Option<f32>,
    #[serde(default)]
    top_logprobs: Vec<Ranked>,
}

#[derive(Deserialize)]
struct Ranked {
    token_id: TokenId,
    logprob: Option<f32>,
    rank: Option<u32>,
}

fn read_logprobs(raw: Option<&RawValue>, tokens: usize, k: u8) -> Result<Vec<TokenLogprobs>, AnswerError> {
    let raw = raw.ok_or(AnswerError::NoLogprobs)?;
    let logprobs: Logprobs = serde_json::from_str(raw.get()).map_err(|error| AnswerError::json(&error))?;
    let positions = logprobs.content.filter(|positions| positions.len() == tokens);
    let each = |position: Position| {
        // The drawn token leads the list, whatever its rank: beyond the `k`th it is not one of the most likely.
        let is_likely = |token: &Ranked| token.rank.is_none_or(|rank| rank <= u32::from(k));
        let likely = position.top_logprobs.into_iter().filter(is_likely);
        let likely = likely.map(|token| (token.token_id, token.logprob.unwrap_or(LOGPROB_MIN))).collect();
        TokenLogprobs { chosen: position.logprob.unwrap_or(LOGPROB_MIN), top: top(likely, k) }
    };
    Ok(positions.ok_or(AnswerError::NoLogprobs)?.into_iter().map(each).collect())
}
