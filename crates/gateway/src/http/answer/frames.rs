//! The bytes of answers: chunks of a stream and whole documents, in OpenAI's shapes.
//!
//! What does not change within one answer (id, creation time, model) is rendered once. Rendering a token's chunk is
//! then two copies, one escape pass and no allocation beyond the buffer's own growth.

use bytes::{BufMut, BytesMut};
use forebay_types::FinishReason;

use super::{
    json::{push_escaped, push_integer, push_string},
    logprobs::Logprobs,
};
use crate::{http::errors::ApiError, http::request::Delivery, metrics::Endpoint, orchestrator::api::Usage};

/// How one choice looks inside `choices`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A part of a streamed chat answer.
    ChatDelta,
    /// A whole chat answer.
    ChatMessage,
    /// A text completion or a part of one.
    Text,
}

/// What identifies an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity<'a> {
    pub(crate) request_id: &'a str,
    /// Seconds since the Unix epoch.
    pub(crate) created: u64,
    pub(crate) model: &'a str,
}

/// What a chunk, or a whole answer, says about one choice.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    pub(crate) index: u32,
    /// The first part of a chat answer names the role.
    pub(crate) names_role: bool,
    pub(crate) text: &'a str,
    pub(crate) logprobs: Option<&'a mut Logprobs>,
    pub(crate) finish: Option<FinishReason>,
}

/// Writes everything that belongs to one answer.
#[derive(Debug)]
pub(crate) struct Frames {
    form: Form,
    /// Up to and including the opening bracket of `choices`.
    head: Box<[u8]>,
    /// From the closing bracket of `choices` to the end of a chunk.
    tail: &'static [u8],
    include_usage: bool,
}

/// The end of every good stream.
const DONE: &[u8] = b"data: [DONE]\n\n";

impl Frames {
    /// Prepares the parts that every chunk shares.
    pub(crate) fn new(endpoint: Endpoint, delivery: Delivery, identity: Identity<'_>) -> Self {
        let (form, prefix, object) = match (endpoint, delivery) {
            (Endpoint::Chat, Delivery::Stream { .. }) => {
                (Form::ChatDelta, "chatcmpl-", "chat.completion.chunk")
            }
            (Endpoint::Chat, Delivery::Whole) => (Form::ChatMessage, "chatcmpl-", "chat.completion"),
            (Endpoint::Completions, _) => (Form::Text, "cmpl-", "text_completion"),
        };
        let (before, include_usage) = match delivery {
            Delivery::Whole => ("", true),
            Delivery::Stream { include_usage } => ("data: ", include_usage),
        };
        let mut head = BytesMut::with_capacity(160);
        head.put_slice(before.as_bytes());
        head.put_slice(b"{\"id\":\"");
        push_escaped(&mut head, prefix);
        push_escaped(&mut head, identity.request_id);
        head.put_slice(b"\",\"object\":");
        push_string(&mut head, object);
        head.put_slice(b",\"created\":");
        push_integer(&mut head, identity.created);
        head.put_slice(b",\"model\":");
        push_string(&mut head, identity.model);
        head.put_slice(b",\"choices\":[");
        let tail: &[u8] = if include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        Self { form, head: head[..].into(), tail, include_usage }
    }

    /// How choices look.
    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// Appends one chunk of a stream.
    pub(crate) fn chunk(&self, out: &mut BytesMut, part: Part<'_>) {
        out.reserve(self.head.len() + part.text.len() + 112);
        out.put_slice(&self.head);
        self.part(out, part);
        out.put_slice(self.tail);
    }

    /// Appends the end of a good stream: the counts, if they were asked for, and `[DONE]`.
    pub(crate) fn end(&self, out: &mut BytesMut, usage: Usage) {
        if self.include_usage {
            out.put_slice(&self.head);
            out.put_slice(b"],\"usage\":");
            push_usage(out, usage);
            out.put_slice(b"}\n\n");
        }
        out.put_slice(DONE);
    }

    /// Appends a whole document.
    pub(crate) fn whole<'a>(&self, out: &mut BytesMut, parts: impl Iterator<Item = Part<'a>>, usage: Usage) {
        out.put_slice(&self.head);
        for (position, part) in parts.enumerate() {
            if position > 0 {
                out.put_u8(b',');
            }
            self.part(out, part);
        }
        out.put_slice(b"],\"usage\":");
        push_usage(out, usage);
        out.put_u8(b'}');
    }

    fn part(&self, out: &mut BytesMut, part: Part<'_>) {
        out.put_slice(b"{\"index\":");
        push_integer(out, u64::from(part.index));
        match self.form {
            Form::ChatDelta => {
                out.put_slice(b",\"delta\":{");
                if part.names_role {
                    out.put_slice(b"\"role\":\"assistant\",");
                }
                if part.names_role || !part.text.is_empty() || part.finish.is_none() {
                    out.put_slice(b"\"content\":\"");
                    push_escaped(out, part.text);
                    out.put_u8(b'"');
                }
                out.put_u8(b'}');
            }
            Form::ChatMessage => {
                out.put_slice(b",\"message\":{\"role\":\"assistant\",\"content\":\"");
                push_escaped(out, part.text);
                out.put_slice(b"\",\"refusal\":null}");
            }
            Form::Text => {
                out.put_slice(b",\"text\":\"");
                push_escaped(out, part.text);
                out.put_u8(b'"');
            }
        }
        out.put_slice(b",\"logprobs\":");
        match part.logprobs {
            Some(logprobs) if !logprobs.is_empty() => logprobs.write(out),
            _ => out.put_slice(b"null"),
        }
        out.put_slice(match part.finish {
            None => b",\"finish_reason\":null}".as_slice(),
            Some(FinishReason::Stop) => b",\"finish_reason\":\"stop\"}",
            Some(FinishReason::Length) => b",\"finish_reason\":\"length\"}",
        });
    }
}

/// Appends the last event of a stream that failed. There is no `[DONE]` after it.
pub(crate) fn push_error(out: &mut BytesMut, error: &ApiError) {
    out.put_slice(b"event: error\ndata: ");
    out.put_slice(error.to_json().as_bytes());
    out.put_slice(b"\n\n");
}

fn push_usage(out: &mut BytesMut, usage: Usage) {
    let Usage { prompt_tokens, cached_tokens, output_tokens } = usage;
    let total = u64::from(prompt_tokens) + u64::from(output_tokens);
    let fields: [(&[u8], u64); 4] = [
        (b"{\"prompt_tokens\":", u64::from(prompt_tokens)),
        (b",\"completion_tokens\":", u64::from(output_tokens)),
        (b",\"total_tokens\":", total),
        (b",\"prompt_tokens_details\":{\"cached_tokens\":", u64::from(cached_tokens)),
    ];
    for (name, value) in fields {
        out.put_slice(name);
        push_integer(out, value);
    }
    out.put_slice(b"}}");
}
