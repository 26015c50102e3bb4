//! Log probabilities in the two shapes that OpenAI gives them.

use bytes::{BufMut, BytesMut};
use forebay_text::Tokenizer;
use forebay_types::{SampledToken, TokenId};

use super::{
    frames::Form,
    json::{push_escaped, push_integer, push_logprob, push_string},
};

/// The log probabilities of one choice that were not yet written.
#[derive(Debug)]
pub(crate) enum Logprobs {
    /// One list of entries.
    Chat { entries: BytesMut },
    /// Four parallel lists.
    Completions { tokens: BytesMut, values: BytesMut, top: BytesMut, offsets: BytesMut, offset_chars: u64 },
}

impl Logprobs {
    /// None yet.
    pub(crate) fn new(form: Form) -> Self {
        let list = BytesMut::new;
        match form {
            Form::ChatDelta | Form::ChatMessage => Self::Chat { entries: list() },
            Form::Text => Self::Completions {
                tokens: list(),
                values: list(),
                top: list(),
                offsets: list(),
                offset_chars: 0,
            },
        }
    }

    /// Adds one token. Without log probabilities from the engine there is nothing to add.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: &SampledToken) {
        let Some(found) = token.logprobs.as_deref() else { return };
        let bytes = tokenizer.token_bytes(token.token);
        let text = String::from_utf8_lossy(bytes);
        match self {
            Self::Chat { entries } => {
                separate(entries);
                push_entry(entries, &text, bytes, found.chosen);
                entries.put_slice(b",\"top_logprobs\":[");
                for (index, (id, logprob)) in found.top.iter().enumerate() {
                    if index > 0 {
                        entries.put_u8(b',');
                    }
                    let bytes = tokenizer.token_bytes(*id);
                    push_entry(entries, &String::from_utf8_lossy(bytes), bytes, *logprob);
                    entries.put_u8(b'}');
                }
                entries.put_slice(b"]}");
            }
            Self::Completions { tokens, values, top, offsets, offset_chars } => {
                for list in [&mut *tokens, values, top, offsets] {
                    separate(list);
                }
                push_string(tokens, &text);
                push_logprob(values, found.chosen);
                push_alternatives(top, tokenizer, &found.top);
                push_integer(offsets, *offset_chars);
                *offset_chars += text.chars().count() as u64;
            }
        }
    }

    /// Whether there is nothing to write.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Chat { entries } => entries.is_empty(),
            Self::Completions { tokens, .. } => tokens.is_empty(),
        }
    }

    /// Appends the value of `logprobs` and forgets what was written.
    pub(crate) fn write(&mut self, out: &mut BytesMut) {
        match self {
            Self::Chat { entries } => {
                out.put_slice(b"{\"content\":[");
                out.put_slice(entries);
                out.put_slice(b"],\"refusal\":null}");
                entries.clear();
            }
            Self::Completions { tokens, values, top, offsets, .. } => {
                let lists: [(&[u8], &mut BytesMut); 4] = [
                    (b"{\"tokens\":[", tokens),
                    (b"],\"token_logprobs\":[", values),
                    (b"],\"top_logprobs\":[", top),
                    (b"],\"text_offset\":[", offsets),
                ];
                for (before, list) in lists {
                    out.put_slice(before);
                    out.put_slice(list);
                    list.clear();
                }
                out.put_slice(b"]}");
            }
        }
    }
}

fn separate(list: &mut BytesMut) {
    if !list.is_empty() {
        list.put_u8(b',');
    }
}

/// An entry without its closing brace.
fn push_entry(out: &mut BytesMut, text: &str, bytes: &[u8], logprob: f32) {
    out.put_slice(b"{\"token\":\"");
    push_escaped(out, text);
    out.put_slice(b"\",\"logprob\":");
    push_logprob(out, logprob);
    out.put_slice(b",\"bytes\":[");
    for (index, byte) in bytes.iter().enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        push_integer(out, u64::from(*byte));
    }
    out.put_u8(b']');
}

/// An object from token text to log probability; of two tokens with the same text the likelier one stays.
fn push_alternatives(out: &mut BytesMut, tokenizer: &Tokenizer, top: &[(TokenId, f32)]) {
    let mut written: Vec<std::borrow::Cow<'_, str>> = Vec::with_capacity(top.len());
    out.put_u8(b'{');
    for (id, logprob) in top {
        let text = String::from_utf8_lossy(tokenizer.token_bytes(*id));
        if written.contains(&text) {
            continue;
        }
        if !written.is_empty() {
            out.put_u8(b',');
        }
        push_string(out, &text);
        out.put_u8(b':');
        push_logprob(out, *logprob);
        written.push(text);
    }
    out.put_u8(b'}');
}
