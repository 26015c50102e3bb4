//! Traces: requests as they arrived somewhere, read from text.
//!
//! In: the text of a file. Out: [`Trace`], or the line and column of what is not as it should be. Three forms are read:
//!
//! - `mooncake`: JSON lines with `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one for each 512
//!   tokens of the prompt. Equal ids stand for equal blocks after equal prefixes.
//! - `azure`: CSV with the header `TIMESTAMP,ContextTokens,GeneratedTokens`. Prompts share nothing.
//! - `forebay`: JSON lines with `at` (s), `prompt_tokens`, `output_tokens` and, if known, `block_tokens` with `blocks` (ids like
//!   Mooncake's, of blocks of that size), `tenant` and `session` (strings);
//!   of a recording also `ttft` and `e2e` (s) and `cached_tokens`.

mod read;

use std::{fmt, str::FromStr};

use super::{Session, Turn};
use crate::{
    clock::Time,
    content::{Kind, Piece, name},
    draw::mix,
};
use read::Reader;
pub(super) use read::{TOKENS_MAX, column_of, said};

/// Tokens that one of Mooncake's `hash_ids` stands for.
pub(super) const MOONCAKE_BLOCK_TOKENS: u32 = 512;

/// Tokens behind the beginning that a sticky router hashes where the trace names no sessions: the first ones are a system
/// prompt that many share.
const KEY_TOKENS: u32 = 1024;

/// One request of a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceRequest {
    /// Seconds; where 0 is does not matter.
    pub at_seconds: f64,
    /// Tokens of the prompt, at least 1.
    pub prompt_tokens: u32,
    /// Tokens of the answer, at least 1.
    pub output_tokens: u32,
    /// One id for each `block_tokens` of the prompt; none: nothing is shared. Equal ids stand for equal blocks.
    pub blocks: Vec<u64>,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Whose it is: an index of [`Trace::tenants`].
    pub tenant: u32,
    /// Equal for requests of one conversation, where that is known.
    pub session: Option<u64>,
    /// What it was really like, where that is known.
    pub observed: Option<Observed>,
}

/// What a request of a recording was really like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observed {
    /// Seconds to its first token.
    pub ttft_seconds: f64,
    /// Seconds to its end.
    pub e2e_seconds: f64,
    /// Prompt tokens that an engine had cached.
    pub cached_tokens: u32,
}

/// Requests in order of time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trace {
    /// In order of time.
    pub requests: Vec<TraceRequest>,
    /// Names of tenants. At least one: requests that name none are the first one's.
    pub tenants: Vec<String>,
    /// Lines that were left out because they were wrong.
    pub skipped: usize,
}

/// Which form a trace has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceForm {
    /// Mooncake's JSON lines.
    Mooncake,
    /// Azure's CSV.
    Azure,
    /// Forebay's own JSON lines.
    Forebay,
}

impl TraceForm {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Mooncake, Self::Azure, Self::Forebay];

    /// What the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mooncake => "mooncake",
            Self::Azure => "azure",
            Self::Forebay => "forebay",
        }
    }

    /// The form that the first line of `text` seems to have.
    pub fn guess(text: &str) -> Option<Self> {
        let line = text.lines().find(|line| !line.trim().is_empty())?;
        let has = |key: &str| line.contains(key);
        if !line.trim_start().starts_with('{') {
            return has("ContextTokens").then_some(Self::Azure);
        }
        match (has("\"timestamp\""), has("\"at\"")) {
            (true, _) => Some(Self::Mooncake),
            (false, true) => Some(Self::Forebay),
            (false, false) => None,
        }
    }
}

impl fmt::Display for TraceForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TraceForm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|form| form.name() == text);
        found.ok_or_else(|| format!("unknown form `{text}`; there are {}", names()))
    }
}

/// What is wrong with a trace, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// A line is not a request.
    #[error("line {line}, column {column}: {problem}")]
    Line {
        /// From 1.
        line: usize,
        /// From 1, in bytes.
        column: usize,
        /// What was found, and what was expected.
        problem: String,
    },
    /// Nothing to replay.
    #[error("it has no requests")]
    Empty,
}

impl TraceRequest {
    /// Its line in form `forebay`, without tenant and session.
    pub fn line(&self) -> String {
        let Self {
            at_seconds,
            prompt_tokens,
            output_tokens,
            blocks,
            block_tokens,
            tenant: _,
            session: _,
            observed: _,
        } = self;
        let mut line = serde_json::json!({ "at": at_seconds, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens });
        if !blocks.is_empty() {
            line["block_tokens"] = (*block_tokens).into();
            line["blocks"] = blocks.as_slice().into();
        }
        line.to_string()
    }
}

impl Trace {
    /// Reads a trace. With `skip_bad`, lines that are wrong are left out and counted.
    ///
    /// # Errors
    /// The first line that is wrong: not of this form, without tokens, ids that do not cover the prompt, a time before that of
    /// the line before. [`TraceError::Empty`] if nothing is left.
    pub fn parse(text: &str, form: TraceForm, skip_bad: bool) -> Result<Self, TraceError> {
        let mut reader = Reader::new(form);
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            match reader.line(line) {
                Ok(()) => {}
                Err(_) if skip_bad => reader.trace.skipped += 1,
                Err((column, problem)) => {
                    return Err(TraceError::Line { line: index + 1, column: column.max(1), problem });
                }
            }
        }
        if reader.trace.tenants.is_empty() {
            reader.trace.tenants.push(String::new());
        }
        if reader.trace.requests.is_empty() { Err(TraceError::Empty) } else { Ok(reader.trace) }
    }

    /// Seconds from the first request to the last.
    pub fn seconds(&self) -> f64 {
        match (self.requests.first(), self.requests.last()) {
            (Some(first), Some(last)) => last.at_seconds - first.at_seconds,
            _ => 0.0,
        }
    }

    /// Leaves out what came sooner than so many seconds after the first request.
    pub fn begin_at(&mut self, seconds: f64) {
        let Some(first) = self.requests.first().map(|request| request.at_seconds) else { return };
        self.requests.retain(|request| request.at_seconds - first >= seconds);
    }

    /// Its requests as sessions of one turn, `speed` times as fast as they came, up to `end`.
    pub fn sessions(&self, speed: f64, end: Time) -> Vec<Session> {
        let Some(first) = self.requests.first() else { return Vec::new() };
        let numbered = self.requests.iter().zip(0..);
        let sessions = numbered.map(|(request, number)| Session {
            at: Time::from_seconds((request.at_seconds - first.at_seconds) / speed),
            key: key(request, number),
            tenant: request.tenant,
            turns: vec![turn(request, number)],
        });
        sessions.take_while(|session| session.at < end).collect()
    }

    /// The speed at which `rate` requests come a second, in the mean.
    pub fn speed_of(&self, rate: f64) -> f64 {
        rate * self.seconds().max(1e-3) / self.requests.len() as f64
    }
}

fn key(request: &TraceRequest, number: u64) -> u64 {
    let place = (KEY_TOKENS / request.block_tokens) as usize;
    let block = || request.blocks.get(place.min(request.blocks.len().saturating_sub(1))).copied();
    request.session.or_else(block).unwrap_or_else(|| mix(number))
}

fn turn(request: &TraceRequest, number: u64) -> Turn {
    let TraceRequest { prompt_tokens, output_tokens, block_tokens, .. } = *request;
    let new = if request.blocks.is_empty() {
        vec![Piece { name: name(Kind::User, number, 0), tokens: prompt_tokens }]
    } else {
        let starts = (0..prompt_tokens).step_by(block_tokens as usize);
        let blocks = request.blocks.iter().zip(starts).map(|(&id, start)| Piece {
            name: name(Kind::TraceBlock, id, u64::from(request.tenant)),
            tokens: block_tokens.min(prompt_tokens - start),
        });
        blocks.collect()
    };
    Turn {
        new,
        answer: Piece { name: name(Kind::Answer, number, 0), tokens: output_tokens },
        think: Time::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOONCAKE: &str = r#"
        {"timestamp": 1000, "input_length": 1024, "output_length": 0, "hash_ids": [1, 2]}
        {"timestamp": 2000, "input_length": 600, "output_length": 5, "hash_ids": [1, 3]}

        {"timestamp": 3000, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 4]}
    "#;

    #[test]
    fn ids_become_pieces_and_time_is_compressed_to_the_rate() {
        assert_eq!(TraceForm::guess(MOONCAKE), Some(TraceForm::Mooncake));
        let trace = Trace::parse(MOONCAKE, TraceForm::Mooncake, false).unwrap();
        assert_eq!(trace.seconds(), 2.0);
        let sessions = trace.sessions(trace.speed_of(6.0), Time::from_seconds(100.0));
        let at: Vec<f64> = sessions.iter().map(|session| session.at.seconds()).collect();
        assert_eq!(at, [0.0, 0.25, 0.5], "three requests in two seconds, brought to six a second");
        let last = &sessions[2];
        let lengths: Vec<u32> = last.prompt(0).map(|piece| piece.tokens).collect();
        assert_eq!(lengths, [512, 512, 76]);
        assert_eq!(last.turns[0].new[..2], sessions[0].turns[0].new);
        assert_ne!(last.turns[0].new[1].name, sessions[1].turns[0].new[1].name);
        assert_eq!(sessions[0].turns[0].answer.tokens, 1, "an answer has at least one token");
        assert_eq!(trace.sessions(4.0, Time::from_seconds(0.4)).len(), 2);
    }

    #[test]
    fn azure_rows_have_times_and_lengths() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.5,4808,10\r\n2023-11-17 00:00:01,110,0";
        assert_eq!(TraceForm::guess(text), Some(TraceForm::Azure));
        let trace = Trace::parse(text, TraceForm::Azure, false).unwrap();
        assert_eq!(trace.seconds(), 1.5, "over midnight");
        let lengths: Vec<_> = trace.requests.iter().map(|it| (it.prompt_tokens, it.output_tokens)).collect();
        assert_eq!(lengths, [(4808, 10), (110, 1)]);
        let sessions = trace.sessions(1.0, Time::from_seconds(9.0));
        assert_ne!(sessions[0].turns[0].new[0].name, sessions[1].turns[0].new[0].name);
    }

    #[test]
    fn our_own_form_has_tenants_and_sessions() {
        let text = r#"{"at": 0.5, "prompt_tokens": 40, "output_tokens": 3, "block_tokens": 16, "blocks": [7, 8, 9], "tenant": "a", "session": "s"}
            {"at": 0.5, "prompt_tokens": 40, "output_tokens": 3, "block_tokens": 16, "blocks": [7, 8, 9], "tenant": "b"}
            {"at": 0.6, "prompt_tokens": 4, "output_tokens": 3, "tenant": "a", "session": "s"}"#;
        assert_eq!(TraceForm::guess(text), Some(TraceForm::Forebay));
        let trace = Trace::parse(text, TraceForm::Forebay, false).unwrap();
        assert_eq!(trace.tenants, ["a", "b"]);
        let sessions = trace.sessions(1.0, Time::from_seconds(9.0));
        assert_eq!(sessions[0].key, sessions[2].key);
        assert_eq!([sessions[0].tenant, sessions[1].tenant, sessions[2].tenant], [0, 1, 0]);
        assert_ne!(sessions[0].turns[0].new, sessions[1].turns[0].new, "tenants share nothing");
    }

    #[test]
    fn a_request_is_read_as_it_was_written() {
        let request = |at_seconds, blocks: &[u64]| TraceRequest {
            at_seconds,
            prompt_tokens: 40,
            output_tokens: 3,
            blocks: blocks.into(),
            block_tokens: if blocks.is_empty() { 1 } else { 16 },
            tenant: 0,
            session: None,
            observed: None,
        };
        let requests = [request(0.25, &[1 << 51, 2, 3]), request(1.5, &[])];
        let text = requests.each_ref().map(TraceRequest::line).join("\n");
        assert_eq!(Trace::parse(&text, TraceForm::Forebay, false).unwrap().requests, requests);
    }

    #[test]
    fn a_wrong_line_is_named_with_its_column_and_what_was_expected() {
        let check = |form, text: &str, expected: &str| {
            let error = Trace::parse(text, form, false).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        };
        let row = |ids: &str| {
            format!(r#"{{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": {ids}}}"#)
        };
        check(
            TraceForm::Mooncake,
            &row("[1]"),
            "line 1, column 1: 1 ids for a prompt of 513 tokens; expected 2",
        );
        check(TraceForm::Mooncake, "\n{", "line 2, column 1: EOF while parsing an object");
        check(TraceForm::Mooncake, r#"{"timestamp": "x"}"#, "line 1, column 17: invalid type: string");
        check(TraceForm::Mooncake, r#"{"timestamp": 1}"#, "missing field `input_length`");
        check(TraceForm::Azure, "a,b,c", "expected the header TIMESTAMP");
        let azure = |line: &str| format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{line}");
        check(
            TraceForm::Azure,
            &azure("2023-11-16 18:17:03,12,many"),
            "line 2, column 24: expected a number of tokens",
        );
        check(TraceForm::Azure, &azure("yesterday,12,1"), "line 2, column 1: expected a time such as");
        check(TraceForm::Azure, &azure("1,2"), "expected 3 fields, found 2");
        let back = "{\"at\":2,\"prompt_tokens\":1,\"output_tokens\":1}\n{\"at\":1,\"prompt_tokens\":1,\"output_tokens\":1}";
        check(TraceForm::Forebay, back, "line 2, column 1: its time is 1.000 s before the line above");
        check(TraceForm::Forebay, r#"{"at":0,"prompt_tokens":0,"output_tokens":1}"#, "0 tokens of prompt");
        check(
            TraceForm::Forebay,
            r#"{"at":0,"prompt_tokens":9,"output_tokens":1,"blocks":[1]}"#,
            "`blocks` needs",
        );
        check(
            TraceForm::Forebay,
            r#"{"at":0,"prompt_tokens":9,"output_tokens":1,"x":1}"#,
            "unknown field `x`",
        );
        check(TraceForm::Forebay, "  \n", "it has no requests");
    }

    #[test]
    fn wrong_lines_can_be_skipped_and_are_counted() {
        let text = format!("{MOONCAKE}\nnonsense\n{{\"timestamp\": 1}}");
        let trace = Trace::parse(&text, TraceForm::Mooncake, true).unwrap();
        assert_eq!((trace.requests.len(), trace.skipped), (3, 2));
        assert_eq!(Trace::parse("nonsense", TraceForm::Mooncake, true), Err(TraceError::Empty));
        assert_eq!(TraceForm::guess("nonsense"), None);
    }
}
