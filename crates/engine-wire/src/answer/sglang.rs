//! SGLang's `/generate`, as the source of 0.5.23 streams it; never run against a real one.
//!
//! `output_ids` and the log probabilities are all of them in every event, or with `--incremental-streaming-output` the new
//! ones alone. Which of the two shows in the counts: `meta_info.completion_tokens` is always the whole.

use forebay_types::{TokenId, TokenLogprobs};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::{AnswerError, Chunk, Delta, Fault, Finish, LOGPROB_MIN, Usage, ids, top};

/// Tokens of each choice that came so far.
#[derive(Debug, Default)]
pub(super) struct SglangReader {
    known: SmallVec<[u32; 1]>,
}

/// Choices of one request that are told apart; more are an error.
const CHOICES_MAX: u32 = 4096;

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(default)]
    index: u32,
    #[serde(borrow)]
    output_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    meta_info: Option<Meta<'a>>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Meta<'a> {
    #[serde(borrow)]
    finish_reason: Option<&'a RawValue>,
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    cached_tokens: Option<u32>,
    #[serde(borrow)]
    output_token_logprobs: Option<&'a RawValue>,
    #[serde(borrow)]
    output_top_logprobs: Option<&'a RawValue>,
}

/// `{"type": "stop", ..}`, `{"type": "abort", "message": .., "status_code": ..}`; older ones a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum RawFinish {
    Map {
        #[serde(rename = "type")]
        kind: String,
        message: Option<String>,
        status_code: Option<u16>,
    },
    Text(String),
}

/// Log probability, token, text.
type Entry = (Option<f32>, TokenId, IgnoredAny);

impl SglangReader {
    pub(super) fn read<'a>(&mut self, data: &'a str, logprobs: Option<u8>) -> Result<Chunk<'a>, AnswerError> {
        let event: Event<'_> = serde_json::from_str(data).map_err(|error| AnswerError::json(&error))?;
        if let Some(fault) = Fault::in_event(event.error, data, event.meta_info.is_some())? {
            return Ok(Chunk { fault: Some(fault), ..Chunk::default() });
        }
        let meta = event.meta_info.ok_or(AnswerError::Unexpected)?;
        let mut chunk = Chunk::default();
        let finish = match meta.finish_reason.map(finish).transpose()? {
            Some(Ok(finish)) => Finish::reason(Some(finish), &mut chunk.fault)?,
            Some(Err(fault)) => {
                chunk.fault = Some(fault);
                return Ok(chunk);
            }
            None => None,
        };
        let list = event.output_ids.ok_or(AnswerError::NoTokenIds)?;
        let tokens = self.new_tokens(event.index, list, meta.completion_tokens)?;
        let logprobs = match logprobs {
            Some(k) if !tokens.is_empty() => read_logprobs(&meta, tokens.len(), k)?,
            _ => Vec::new(),
        };
        chunk.usage = Some(Usage {
            prompt_tokens: meta.prompt_tokens,
            cached_tokens: meta.cached_tokens,
            output_tokens: None, // of one choice alone
        });
        chunk.deltas.push(Delta { index: event.index, tokens, logprobs, finish });
        Ok(chunk)
    }

    fn new_tokens(
        &mut self,
        index: u32,
        list: &RawValue,
        total: Option<u32>,
    ) -> Result<SmallVec<[TokenId; 8]>, AnswerError> {
        if index >= CHOICES_MAX {
            return Err(AnswerError::Unexpected);
        }
        let at = index as usize;
        if self.known.len() <= at {
            self.known.resize(at + 1, 0);
        }
        let known = self.known[at];
        let count = ids::ids(list).count();
        let total = total.unwrap_or(known.saturating_add(count as u32));
        let bad = AnswerError::Count { ids: count, known, total };
        let skip = if known as usize + count == total as usize {
            0
        } else if count >= known as usize && count >= total as usize {
            known as usize
        } else {
            return Err(bad);
        };
        let tokens: Option<SmallVec<[TokenId; 8]>> = ids::ids(list).skip(skip).collect();
        let tokens = tokens.ok_or(AnswerError::NoTokenIds)?;
        self.known[at] = known + tokens.len() as u32;
        Ok(tokens)
    }
}

/// How a choice ended, or why it gave up.
fn finish(raw: &RawValue) -> Result<Result<Finish, Fault>, AnswerError> {
    let raw: RawFinish = serde_json::from_str(raw.get()).map_err(|error| AnswerError::json(&error))?;
    Ok(match raw {
        RawFinish::Text(kind) => Ok(Finish::named(&kind)),
        RawFinish::Map { kind, message, status_code } => match Finish::named(&kind) {
            Finish::Failed => {
                let message = message.as_deref().unwrap_or("the engine gave the request up");
                Err(Fault::new(status_code, message))
            }
            finish => Ok(finish),
        },
    })
}

fn read_logprobs(meta: &Meta<'_>, new: usize, k: u8) -> Result<Vec<TokenLogprobs>, AnswerError> {
    let read_error = |error| AnswerError::json(&error);
    let chosen = meta.output_token_logprobs.ok_or(AnswerError::NoLogprobs)?;
    let chosen: Vec<Entry> = serde_json::from_str(chosen.get()).map_err(read_error)?;
    let tops: Vec<Option<Vec<Entry>>> = match meta.output_top_logprobs {
        Some(raw) if k > 0 => serde_json::from_str(raw.get()).map_err(read_error)?,
        _ => Vec::new(),
    };
    if chosen.len() < new || (k > 0 && tops.len() < new) {
        return Err(AnswerError::NoLogprobs);
    }
    // The new ones are the last in either way of streaming.
    let mut tops = tops.into_iter().rev().take(new).rev();
    let first = chosen.len() - new;
    let each = |(chosen, _, _): Entry| {
        let entries = tops.next().flatten().unwrap_or_default();
        let likely = entries.into_iter().map(|(p, token, _)| (token, p.unwrap_or(LOGPROB_MIN))).collect();
        TokenLogprobs { chosen: chosen.unwrap_or(LOGPROB_MIN), top: top(likely, k) }
    };
    Ok(chosen.into_iter().skip(first).map(each).collect())
}
