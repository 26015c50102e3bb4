//! The two files of a client.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{LengthTable, LengthsFrom, Renewal, Window};
use crate::workload::{
    TraceError,
    trace::{TOKENS_MAX, column_of, said},
};

/// Least shapes of gaps: of a gamma a coefficient of variation of 100, of a Weibull what has a mean within numbers.
const GAMMA_SHAPE_MIN: f64 = 1e-4;
const WEIBULL_SHAPE_MIN: f64 = 0.02;
/// Gaps that hardly vary.
const SHAPE_MAX: f64 = 1e6;

/// What a client's lengths are from a time on. There are other fields, of images and of thoughts.
#[derive(Deserialize)]
struct Fields {
    input_tokens: String,
    output_tokens: String,
}

pub(super) fn windows(text: &str) -> Result<Vec<Window>, TraceError> {
    let mut windows: Vec<Window> = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let found = window(line).and_then(|window| match windows.last() {
            Some(last) if window.start <= last.start => {
                Err((1, format!("it starts at {} s, no later than the one above", window.start)))
            }
            _ => Ok(window),
        });
        windows.push(found.map_err(|(column, problem)| TraceError::Line {
            line: index + 1,
            column,
            problem,
        })?);
    }
    if windows.is_empty() { Err(TraceError::Empty) } else { Ok(windows) }
}

fn window(line: &str) -> Result<Window, (usize, String)> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let [start, rate, _, pattern, shape, _] = fields[..] else {
        let found = fields.len();
        return Err((1, format!("expected 6 fields, start,rate,cv,pattern,shape,scale; found {found}")));
    };
    let number = |field: &str| {
        let number = field.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
        number
            .ok_or_else(|| (column_of(line, field), format!("expected a number from 0 up, found `{field}`")))
    };
    let start = number(start)?;
    let (renewal, least): (fn(f64) -> Renewal, f64) = match pattern {
        "" => return Ok(Window { start, rate: 0.0, renewal: Renewal::Gamma { shape: 1.0 } }),
        "Gamma" => (|shape| Renewal::Gamma { shape }, GAMMA_SHAPE_MIN),
        "Weibull" => (|shape| Renewal::Weibull { shape }, WEIBULL_SHAPE_MIN),
        other => {
            let problem = format!("expected Gamma, Weibull or nothing, found `{other}`");
            return Err((column_of(line, pattern), problem));
        }
    };
    let found = number(shape)?;
    if !(least..=SHAPE_MAX).contains(&found) {
        let problem = format!("a shape of {found}; expected {least} to {SHAPE_MAX}");
        return Err((column_of(line, shape), problem));
    }
    Ok(Window { start, rate: number(rate)?, renewal: renewal(found) })
}

/// In order of time. Times of which nothing is known are left out, as nobody could draw from them.
pub(super) fn lengths(text: &str) -> Result<Vec<LengthsFrom>, String> {
    let by_start: BTreeMap<String, Fields> = serde_json::from_str(text).map_err(|error| {
        format!("line {}, column {}: {}", error.line(), error.column().max(1), said(&error))
    })?;
    let mut lengths = Vec::new();
    for (key, fields) in by_start {
        let start = key.parse::<f64>().ok().filter(|seconds| seconds.is_finite());
        let start = start.ok_or_else(|| format!("expected seconds as keys, found `{key}`"))?;
        let of = |name: &str, dict: &str| {
            table(dict).map_err(|problem| format!("`{name}` from {key} s on: {problem}"))
        };
        let input = of("input_tokens", &fields.input_tokens)?;
        let output = of("output_tokens", &fields.output_tokens)?;
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
