//! The two files of a client.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{LengthTable, LengthsFrom, Renewal, Window};
use crate::workload::{
    TraceError,
    trace::{TOKENS_MAX, said},
};

/// Least and largest shape of gaps: coefficients of variation of 100 and of next to nothing.
const SHAPES: std::ops::RangeInclusive<f64> = 1e-4..=1e6;
/// Below this a Weibull's mean is beyond numbers.
const WEIBULL_SHAPE_MIN: f64 = 0.02;

/// What a client's lengths are from a time on. There are other fields, of images and of thoughts.
#[derive(Deserialize)]
struct Fields {
    input_tokens: String,
    output_tokens: String,
}

pub(super) fn windows(text: &str) -> Result<Vec<Window>, TraceError> {
    let mut windows: Vec<Window> = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |column: usize, problem: String| TraceError::Line { line: index + 1, column, problem };
        let (column, problem) = match window(line) {
            Ok(window) if windows.last().is_none_or(|last| last.start < window.start) => {
                windows.push(window);
                continue;
            }
            Ok(window) => (1, format!("it starts at {} s, no later than the one above", window.start)),
            Err(problem) => problem,
        };
        return Err(wrong(column, problem));
    }
    if windows.is_empty() { Err(TraceError::Empty) } else { Ok(windows) }
}

fn window(line: &str) -> Result<Window, (usize, String)> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let [start, rate, _, pattern, shape, _] = fields[..] else {
        let found = fields.len();
        return Err((1, format!("expected 6 fields, start,rate,cv,pattern,shape,scale; found {found}")));
    };
    let column = |field: &str| field.as_ptr() as usize - line.as_ptr() as usize + 1;
    let number = |field: &str| {
        let number = field.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
        number.ok_or_else(|| (column(field), format!("expected a number from 0 up, found `{field}`")))
    };
    let start = number(start)?;
    let shaped = |least: f64| {
        let shape_found = number(shape)?;
        if !SHAPES.contains(&shape_found) || shape_found < least {
            let problem = format!("a shape of {shape_found}; expected {least} to {}", SHAPES.end());
            return Err((column(shape), problem));
        }
        Ok(shape_found)
    };
    match pattern {
        "" => Ok(Window { start, rate: 0.0, renewal: Renewal::Gamma { shape: 1.0 } }),
        "Gamma" => Ok(Window {
            start,
            rate: number(rate)?,
            renewal: Renewal::Gamma { shape: shaped(*SHAPES.start())? },
        }),
        "Weibull" => Ok(Window {
            start,
            rate: number(rate)?,
            renewal: Renewal::Weibull { shape: shaped(WEIBULL_SHAPE_MIN)? },
        }),
        other => Err((column(pattern), format!("expected Gamma, Weibull or nothing, found `{other}`"))),
    }
}

/// In order of time. Times of which nothing is known are left out, as nobody could draw from them.
pub(super) fn lengths(text: &str) -> Result<Vec<LengthsFrom>, TraceError> {
    let by_start: BTreeMap<String, Fields> = serde_json::from_str(text).map_err(|error| {
        TraceError::Line { line: error.line(), column: error.column().max(1), problem: said(&error) }
    })?;
    let mut lengths = Vec::new();
    for (start, fields) in by_start {
        let of = |name: &str, dict: &str| {
            table(dict).map_err(|problem| TraceError::Line {
                line: 1,
                column: 1,
                problem: format!("`{name}` from {start} s on: {problem}"),
            })
        };
        let (input, output) =
            (of("input_tokens", &fields.input_tokens)?, of("output_tokens", &fields.output_tokens)?);
        let parsed = start.parse::<f64>().ok().filter(|seconds| seconds.is_finite());
        let start = parsed.ok_or_else(|| TraceError::Line {
            line: 1,
            column: 1,
            problem: format!("expected seconds as keys, found `{start}`"),
        })?;
        if let (Some(input), Some(output)) = (input, output) {
            lengths.push(LengthsFrom { start, input, output });
        }
    }
    lengths.sort_by(|a, b| a.start.total_cmp(&b.start));
    Ok(lengths)
}

/// Of `{12: 0.25, 40: 0.75}`; nothing of `{}`.
fn table(dict: &str) -> Result<Option<LengthTable>, String> {
    let trimmed = dict.trim();
    let inner = trimmed.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    let inner =
        inner.ok_or_else(|| format!("expected {{length: probability, ...}}, found `{}`", begin(trimmed)))?;
    let mut pairs = Vec::new();
    for pair in inner.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let read = || {
            let (tokens, share) = pair.split_once(':')?;
            let tokens = tokens.trim().parse::<u32>().ok().filter(|tokens| *tokens <= TOKENS_MAX)?;
            let share =
                share.trim().parse::<f64>().ok().filter(|share| share.is_finite() && *share >= 0.0)?;
            Some((tokens, share))
        };
        pairs.push(read().ok_or_else(|| format!("expected tokens: probability, found `{}`", begin(pair)))?);
    }
    pairs.retain(|(_, share)| *share > 0.0);
    if pairs.is_empty() {
        return Ok(None);
    }
    pairs.sort_unstable_by_key(|(tokens, _)| *tokens);
    let whole: f64 = pairs.iter().map(|(_, share)| share).sum();
    if (whole - 1.0).abs() > 1e-3 {
        return Err(format!("probabilities of {whole} together; expected 1"));
    }
    let mut up_to = 0.0;
    for (_, share) in &mut pairs {
        up_to += *share / whole;
        *share = up_to;
    }
    Ok(Some(LengthTable(pairs)))
}

fn begin(text: &str) -> String {
    text.chars().take(40).collect()
}
