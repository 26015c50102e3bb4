//! Lines of a trace, one by one. Start at [`Reader::line`].

use std::collections::HashMap;

use serde::Deserialize;

use super::{MOONCAKE_BLOCK_TOKENS, Observed, Trace, TraceForm, TraceRequest};
use crate::draw::mix;

/// Tokens of the longest prompt or answer that a trace may have: far beyond any model's, and far below what overflows.
pub(crate) const TOKENS_MAX: u32 = 100_000_000;

/// A column, and what is wrong there.
type Problem = (usize, String);

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ForebayLine {
    at: f64,
    prompt_tokens: u32,
    output_tokens: u32,
    #[serde(default)]
    block_tokens: Option<u32>,
    #[serde(default)]
    blocks: Vec<u64>,
    #[serde(default)]
    tenant: String,
    #[serde(default)]
    session: Option<String>,
    #[serde(default)]
    ttft: Option<f64>,
    #[serde(default)]
    e2e: Option<f64>,
    #[serde(default)]
    cached_tokens: u32,
}

impl ForebayLine {
    fn observed(&self) -> Result<Option<Observed>, Problem> {
        let mut times = [self.ttft, self.e2e].into_iter().flatten();
        if !times.all(|seconds| seconds.is_finite() && seconds >= 0.0) {
            return Err((1, "`ttft` and `e2e` must be seconds, 0 or more".to_owned()));
        }
        let both = self.ttft.zip(self.e2e);
        Ok(both.map(|(ttft_seconds, e2e_seconds)| Observed {
            ttft_seconds,
            e2e_seconds,
            cached_tokens: self.cached_tokens,
        }))
    }
}

/// What was read so far.
pub(super) struct Reader {
    form: TraceForm,
    pub(super) trace: Trace,
    tenants: HashMap<String, u32>,
    /// Whether the header was read.
    header: bool,
}

impl Reader {
    pub(super) fn new(form: TraceForm) -> Self {
        Self { form, trace: Trace::default(), tenants: HashMap::new(), header: false }
    }

    pub(super) fn line(&mut self, line: &str) -> Result<(), Problem> {
        let request = match self.form {
            TraceForm::Mooncake => {
                let line: MooncakeLine = json(line)?;
                TraceRequest {
                    at_seconds: line.timestamp / 1e3,
                    prompt_tokens: line.input_length,
                    output_tokens: line.output_length.max(1),
                    blocks: line.hash_ids,
                    block_tokens: MOONCAKE_BLOCK_TOKENS,
                    tenant: 0,
                    session: None,
                    observed: None,
                }
            }
            TraceForm::Forebay => {
                let line: ForebayLine = json(line)?;
                if !line.blocks.is_empty() && line.block_tokens.is_none_or(|tokens| tokens == 0) {
                    return Err((
                        1,
                        "`blocks` needs `block_tokens`, the tokens of each, at least 1".to_owned(),
                    ));
                }
                let observed = line.observed()?;
                TraceRequest {
                    observed,
                    at_seconds: line.at,
                    prompt_tokens: line.prompt_tokens,
                    output_tokens: line.output_tokens.max(1),
                    blocks: line.blocks,
                    block_tokens: line.block_tokens.unwrap_or(1),
                    tenant: self.tenant(line.tenant),
                    session: line.session.map(|session| number_of(&session)),
                }
            }
            TraceForm::Azure => match self.azure(line)? {
                Some(request) => request,
                None => return Ok(()),
            },
        };
        check(&request, self.trace.requests.last())?;
        self.trace.requests.push(request);
        Ok(())
    }

    fn tenant(&mut self, tenant: String) -> u32 {
        let tenants = &mut self.trace.tenants;
        *self.tenants.entry(tenant).or_insert_with_key(|tenant| {
            tenants.push(tenant.clone());
            tenants.len() as u32 - 1
        })
    }

    fn azure(&mut self, line: &str) -> Result<Option<TraceRequest>, Problem> {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        if !std::mem::replace(&mut self.header, true) {
            return match fields[..] {
                ["TIMESTAMP", "ContextTokens", "GeneratedTokens"] => Ok(None),
                _ => Err((1, "expected the header TIMESTAMP,ContextTokens,GeneratedTokens".to_owned())),
            };
        }
        let [at, prompt, output] = fields[..] else {
            return Err((1, format!("expected 3 fields, found {}", fields.len())));
        };
        let column = |field: &str| column_of(line, field);
        let tokens = |field: &str| {
            let expected = || (column(field), format!("expected a number of tokens, found `{field}`"));
            field.parse::<u32>().map_err(|_| expected())
        };
        let at_seconds = moment(at).ok_or_else(|| {
            (column(at), format!("expected a time such as 2023-11-16 18:17:03.97, found `{at}`"))
        })?;
        Ok(Some(TraceRequest {
            at_seconds,
            prompt_tokens: tokens(prompt)?,
            output_tokens: tokens(output)?.max(1),
            blocks: Vec::new(),
            block_tokens: 1,
            tenant: 0,
            session: None,
            observed: None,
        }))
    }
}

/// Where a part of a line begins, from 1.
pub(crate) fn column_of(line: &str, part: &str) -> usize {
    part.as_ptr() as usize - line.as_ptr() as usize + 1
}

fn json<'a, T: Deserialize<'a>>(line: &'a str) -> Result<T, Problem> {
    serde_json::from_str(line).map_err(|error| (error.column(), said(&error)))
}

/// What an error says, without the position that it ends with.
pub(crate) fn said(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.as_str(), |(said, _)| said).to_owned()
}

fn check(request: &TraceRequest, before: Option<&TraceRequest>) -> Result<(), Problem> {
    let TraceRequest { at_seconds, prompt_tokens, output_tokens, blocks, block_tokens, .. } = request;
    if !at_seconds.is_finite() {
        return Err((1, format!("its time is {at_seconds}; expected a number")));
    }
    if !(1..=TOKENS_MAX).contains(prompt_tokens) || *output_tokens > TOKENS_MAX {
        return Err((
            1,
            format!(
                "{prompt_tokens} tokens of prompt and {output_tokens} of answer; expected 1 to {TOKENS_MAX}"
            ),
        ));
    }
    let ids = prompt_tokens.div_ceil(*block_tokens) as usize;
    if !blocks.is_empty() && blocks.len() != ids {
        let problem = format!(
            "{} ids for a prompt of {prompt_tokens} tokens; expected {ids}, one for each {block_tokens}",
            blocks.len()
        );
        return Err((1, problem));
    }
    match before {
        Some(before) if *at_seconds < before.at_seconds => {
            let back = before.at_seconds - at_seconds;
            Err((1, format!("its time is {back:.3} s before the line above; expected times in order")))
        }
        _ => Ok(()),
    }
}

/// Seconds since the Unix epoch of `2023-11-16 18:17:03.9799600`, in the proleptic Gregorian calendar.
fn moment(text: &str) -> Option<f64> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let numbers = |text: &str, separator: char| -> Option<[i64; 3]> {
        let parts: Vec<i64> =
            text.split(separator).map(|part| part.parse().ok()).collect::<Option<Vec<_>>>()?;
        parts.try_into().ok()
    };
    let time = time.trim_end_matches('Z').split('+').next()?;
    let (whole, fraction) = time.split_once('.').unwrap_or((time, ""));
    let ([year, month, day], [hour, minute, second]) = (numbers(date, '-')?, numbers(whole, ':')?);
    let in_range = (1..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0..=60).contains(&second);
    if !in_range || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // Days from civil: years begin in March, so that the leap day is the last of its year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    let fraction: f64 = if fraction.is_empty() { 0.0 } else { format!("0.{fraction}").parse().ok()? };
    Some((days * 86_400 + hour * 3600 + minute * 60 + second) as f64 + fraction)
}

fn number_of(text: &str) -> u64 {
    text.bytes().fold(text.len() as u64, |state, byte| mix(state ^ u64::from(byte).rotate_left(32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_seconds_of_the_calendar() {
        assert_eq!(moment("1970-01-01 00:00:00"), Some(0.0));
        assert_eq!(moment("2000-02-29T12:00:00.25Z"), Some(951_825_600.25));
        assert_eq!(moment("2023-11-16 18:17:03.9799600"), Some(1_700_158_623.979_96));
        for wrong in
            ["", "2023-11-16", "2023-13-01 00:00:00", "2023-11-16 24:00:00", "2023-11-16 1:2:3.x", "a b"]
        {
            assert_eq!(moment(wrong), None, "{wrong}");
        }
    }
}
