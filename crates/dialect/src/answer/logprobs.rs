//! Log probabilities in the two shapes that OpenAI has for them.

use forebay_text::Tokenizer;
use forebay_types::{SampledToken, TokenId, TokenLogprobs};
use serde::Serialize;

/// What JSON says for minus infinity.
const IMPOSSIBLE: f32 = -9999.0;

/// Of `/v1/completions`.
#[derive(Debug, Default, Serialize)]
pub(super) struct CompletionLogprobs {
    text_offset: Vec<u32>,
    token_logprobs: Vec<f32>,
    tokens: Vec<String>,
    top_logprobs: Vec<serde_json::Map<String, serde_json::Value>>,
}

/// Of `/v1/chat/completions`.
#[derive(Debug, Default, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    own: Weighed,
    top_logprobs: Vec<Weighed>,
}

#[derive(Debug, Serialize)]
struct Weighed {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { IMPOSSIBLE } else { logprob.clamp(IMPOSSIBLE, 0.0) }
}

fn text(tokenizer: &Tokenizer, token: TokenId) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned()
}

fn each(tokens: &[SampledToken]) -> impl Iterator<Item = (TokenId, &TokenLogprobs)> {
    tokens.iter().filter_map(|token| Some((token.token, token.logprobs.as_deref()?)))
}

impl CompletionLogprobs {
    /// `offset`: characters of the answer before these tokens; moved on behind them.
    pub(super) fn of(tokenizer: &Tokenizer, tokens: &[SampledToken], offset: &mut u32) -> Self {
        let mut all = Self::default();
        for (token, TokenLogprobs { chosen, top }) in each(tokens) {
            let own = text(tokenizer, token);
            all.text_offset.push(*offset);
            *offset += own.chars().count() as u32;
            all.token_logprobs.push(finite(*chosen));
            all.tokens.push(own);
            let top = top.iter().map(|(token, logprob)| (text(tokenizer, *token), finite(*logprob).into()));
            all.top_logprobs.push(top.collect());
        }
        all
    }
}

impl ChatLogprobs {
    pub(super) fn of(tokenizer: &Tokenizer, tokens: &[SampledToken]) -> Self {
        let weighed = |token: TokenId, logprob: f32| Weighed {
            token: text(tokenizer, token),
            logprob: finite(logprob),
            bytes: tokenizer.token_bytes(token).to_vec(),
        };
        let content = each(tokens).map(|(token, logprobs)| ChatToken {
            own: weighed(token, logprobs.chosen),
            top_logprobs: logprobs.top.iter().map(|(token, logprob)| weighed(*token, *logprob)).collect(),
        });
        Self { content: content.collect() }
    }
}
