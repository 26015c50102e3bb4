//! Traces in the format that Mooncake publishes: one JSON object a line with `timestamp` (ms), `input_length`,
//! `output_length` (tokens) and `hash_ids`, one for each 512 tokens of the prompt. Equal ids stand for equal blocks after
//! equal prefixes.

use serde::Deserialize;

use super::{Session, Turn};
use crate::{
    clock::Time,
    content::{Kind, Piece, name},
};

/// Tokens that one of `hash_ids` stands for.
pub(super) const TRACE_BLOCK_TOKENS: u32 = 512;

/// Block that a sticky router hashes, if there are so many: the first ones are a system prompt that many share. A trace
/// does not say which requests are turns of one conversation.
const KEY_BLOCK: usize = 2;

/// One request of a trace.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct TraceRow {
    /// Milliseconds since the trace began.
    pub timestamp: f64,
    /// Tokens of the prompt.
    pub input_length: u32,
    /// Tokens of the answer.
    pub output_length: u32,
    /// One for each 512 tokens of the prompt.
    pub hash_ids: Vec<u64>,
}

/// Reads a trace.
///
/// # Errors
/// Names the line that is not a request, or whose ids do not cover its prompt.
pub fn read_trace(text: &str) -> Result<Vec<TraceRow>, String> {
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row: TraceRow =
            serde_json::from_str(line).map_err(|error| format!("line {}: {error}", index + 1))?;
        if row.input_length == 0
            || row.hash_ids.len() != row.input_length.div_ceil(TRACE_BLOCK_TOKENS) as usize
        {
            let (tokens, ids) = (row.input_length, row.hash_ids.len());
            return Err(format!("line {}: {ids} ids for {tokens} tokens", index + 1));
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Its requests as sessions of one turn, brought to `rate` requests a second by compressing time, up to `end`.
pub fn trace_sessions(rows: &[TraceRow], rate: f64, end: Time) -> Vec<Session> {
    let mut order: Vec<&TraceRow> = rows.iter().collect();
    order.sort_by(|one, other| one.timestamp.total_cmp(&other.timestamp));
    let (Some(first), Some(last)) = (order.first(), order.last()) else { return Vec::new() };
    let span = ((last.timestamp - first.timestamp) / 1e3).max(1e-3);
    let factor = rate / (order.len() as f64 / span);
    let sessions = order.iter().enumerate().map(|(number, row)| Session {
        at: Time::from_seconds((row.timestamp - first.timestamp) / 1e3 / factor),
        key: row.hash_ids[KEY_BLOCK.min(row.hash_ids.len() - 1)],
        turns: vec![turn(row, number as u64)],
    });
    sessions.take_while(|session| session.at < end).collect()
}

fn turn(row: &TraceRow, number: u64) -> Turn {
    let lengths = (0..row.input_length).step_by(TRACE_BLOCK_TOKENS as usize);
    let blocks = row.hash_ids.iter().zip(lengths).map(|(&id, start)| Piece {
        name: name(Kind::TraceBlock, id, 0),
        tokens: TRACE_BLOCK_TOKENS.min(row.input_length - start),
    });
    let answer = Piece { name: name(Kind::Answer, number, 0), tokens: row.output_length.max(1) };
    Turn { new: blocks.collect(), answer, think: Time::ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = r#"
        {"timestamp": 3000, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 4]}
        {"timestamp": 1000, "input_length": 1024, "output_length": 0, "hash_ids": [1, 2]}
        {"timestamp": 2000, "input_length": 600, "output_length": 5, "hash_ids": [1, 3]}
    "#;

    #[test]
    fn ids_become_pieces_and_time_is_compressed_to_the_rate() {
        let rows = read_trace(TRACE).unwrap();
        // Three requests in two seconds, brought to six a second: four times as fast.
        let sessions = trace_sessions(&rows, 6.0, Time::from_seconds(100.0));
        let at: Vec<f64> = sessions.iter().map(|session| session.at.seconds()).collect();
        assert_eq!(at, [0.0, 0.25, 0.5]);
        let last = &sessions[2];
        let lengths: Vec<u32> = last.prompt(0).map(|piece| piece.tokens).collect();
        assert_eq!(lengths, [512, 512, 76]);
        assert_eq!(last.turns[0].new[..2], sessions[0].turns[0].new);
        assert_ne!(last.turns[0].new[1].name, sessions[1].turns[0].new[1].name);
        assert_eq!(sessions[0].turns[0].answer.tokens, 1, "an answer has at least one token");
        assert_eq!(trace_sessions(&rows, 6.0, Time::from_seconds(0.4)).len(), 2);
    }

    #[test]
    fn a_line_whose_ids_do_not_cover_its_prompt_is_named() {
        let problem =
            read_trace(r#"{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}"#);
        assert_eq!(problem.unwrap_err(), "line 1: 1 ids for 513 tokens");
        assert!(read_trace("{").unwrap_err().starts_with("line 1:"));
    }
}
