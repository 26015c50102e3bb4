//! Recorded open-loop runs of a real engine: what was sent, and what was measured.

use serde::Deserialize;

use super::{Session, fresh::single};
use crate::clock::Time;

/// One request of a recorded run. Milliseconds, as an HTTP client on the same host saw them.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct Measured {
    /// Seconds since the start.
    pub at: f64,
    /// Tokens of the prompt.
    pub isl: u32,
    /// Tokens of the answer.
    pub osl: u32,
    /// Time to the first token.
    pub ttft: f64,
    /// From sending to the last token.
    pub e2e: f64,
    /// Mean time between tokens.
    pub itl_mean: f64,
    /// The longest time between two tokens.
    pub itl_max: f64,
}

/// Reads a recording: its requests, in order of arrival, and the sessions that send the same.
///
/// # Errors
/// Names the line that is not one.
pub fn recorded(text: &str) -> Result<(Vec<Measured>, Vec<Session>), String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let mut measured: Vec<Measured> = lines
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|error| format!("line {}: {error}", index + 1))
        })
        .collect::<Result<_, _>>()?;
    measured.sort_by(|one, other| one.at.total_cmp(&other.at));
    let sessions = measured.iter().enumerate().map(|(number, request)| {
        single(Time::from_seconds(request.at), number as u64, request.isl, request.osl)
    });
    let sessions = sessions.collect();
    Ok((measured, sessions))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_is_replayed_in_order_and_a_bad_line_is_named() {
        let line = |at| {
            format!(
                r#"{{"at": {at}, "isl": 100, "osl": 20, "group": 1, "ttft": 9.5, "e2e": 200.0, "n": 20, "itl_mean": 10.0, "itl_max": 30.0}}"#
            )
        };
        let (measured, sessions) = recorded(&format!("{}\n{}\n", line(2.5), line(1.25))).unwrap();
        assert_eq!(measured[0].at, 1.25);
        assert_eq!(sessions[1].at, Time::from_seconds(2.5));
        assert_eq!(sessions[0].prompt_tokens(0), 100);
        assert!(recorded(&format!("{}\n{{}}", line(1.0))).unwrap_err().starts_with("line 2:"));
    }
}
