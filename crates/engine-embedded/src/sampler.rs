//! Drawing tokens. In: one row of logits, the parameters, (seed, choice, position). Out: a token, and log probabilities
//! if asked for. Nothing else: the same arguments give the same token on any engine, in any batch.

use std::cmp::Ordering;

use forebay_types::{TokenId, TokenLogprobs};

use crate::{hash::mix, kernels::exp_each};

/// How one token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleParams {
    /// 0 takes the most likely token, of equal ones that with the lowest id.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens whose probabilities reach this; 1 keeps all. Applies after `top_k`.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// With `choice` and `position`, all the randomness there is.
    pub seed: u64,
    /// Which of a request's answers, from 0.
    pub choice: u32,
    /// Index in the whole sequence of the token to draw, prompt included.
    pub position: u32,
    /// `Some(k)`: report the token's log probability and those of the `k` most likely.
    pub logprobs: Option<u8>,
}

/// Draws one token. Order of filters: temperature, `top_k`, `top_p` over what is left. Log probabilities are those at
/// temperature 1 over the whole vocabulary, whatever the filters. Logits that are no numbers are never drawn.
///
/// # Panics
/// If `logits` is empty.
pub fn sample(logits: &[f32], params: &SampleParams) -> (TokenId, Option<TokenLogprobs>) {
    let best = argmax(logits);
    // `max` also turns a temperature that is no number into 0.
    let temperature = params.temperature.max(0.0);
    let token = if temperature == 0.0 || params.top_k == 1 {
        best
    } else {
        draw(logits, logits[best as usize], temperature, params)
    };
    (token, params.logprobs.map(|top| logprobs(logits, token, top.into())))
}

/// A number in [0, 1) that depends on its arguments alone.
fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15; // splitmix64's increment: keeps small arguments apart
    let place = (u64::from(choice) << 32) | u64::from(position);
    let word = mix(mix(seed.wrapping_add(GOLDEN)).wrapping_add(mix(place.wrapping_add(GOLDEN))));
    (word >> 11) as f64 / (1_u64 << 53) as f64
}

fn argmax(logits: &[f32]) -> TokenId {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] || (logits[best].is_nan() && !logit.is_nan()) {
            best = token;
        }
    }
    best as TokenId
}

#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    token: TokenId,
}

/// Most likely first; the lower id of equals; what is no number last. Total, so the result depends on values alone.
fn by_likelihood(a: &Candidate, b: &Candidate) -> Ordering {
    let key = |c: &Candidate| if c.logit.is_nan() { f32::NEG_INFINITY } else { c.logit };
    key(b).total_cmp(&key(a)).then(a.token.cmp(&b.token))
}

/// Moves the `count` most likely to the front, in order.
fn sort_front(candidates: &mut [Candidate], count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, by_likelihood);
    }
    candidates[..count].sort_unstable_by(by_likelihood);
}

fn draw(logits: &[f32], largest: f32, temperature: f32, params: &SampleParams) -> TokenId {
    let point = uniform(params.seed, params.choice, params.position);
    let keep = if params.top_k == 0 { logits.len() } else { logits.len().min(params.top_k as usize) };
    let cut = params.top_p < 1.0;
    let mut weights: Vec<f32> = logits.iter().map(|logit| (logit - largest) / temperature).collect();
    exp_each(&mut weights);
    for (weight, logit) in weights.iter_mut().zip(logits) {
        // The kernel's exp has a floor above zero, so what can never be drawn is named here.
        if logit.is_nan() || *logit == f32::NEG_INFINITY {
            *weight = 0.0;
        }
    }
    let weight = |candidate: &Candidate| f64::from(weights[candidate.token as usize]);

    let mut candidates: Vec<Candidate> = logits
        .iter()
        .enumerate()
        .map(|(token, &logit)| Candidate { logit, token: token as TokenId })
        .collect();
    if keep < candidates.len() {
        sort_front(&mut candidates, keep);
        candidates.truncate(keep);
    }
    if cut {
        let total: f64 = candidates.iter().map(weight).sum();
        let kept = nucleus(&mut candidates, f64::from(params.top_p) * total, weight);
        candidates.truncate(kept);
    }
    let total: f64 = candidates.iter().map(weight).sum();
    let mut rest = point * total;
    for candidate in &candidates {
        rest -= weight(candidate);
        if rest < 0.0 {
            return candidate.token;
        }
    }
    // Rounding used up the interval: the last token that could have been drawn.
    candidates.iter().rfind(|c| weight(c) > 0.0).map_or_else(|| argmax(logits), |c| c.token)
}

/// How many of the most likely candidates it takes to reach `mass`; sorts that many to the front.
fn nucleus(candidates: &mut [Candidate], mass: f64, weight: impl Fn(&Candidate) -> f64) -> usize {
    // A nucleus is mostly small: sort a little, and more only if that was not enough.
    let mut sorted = candidates.len().min(64);
    loop {
        sort_front(candidates, sorted);
        let mut sum = 0.0;
        for (i, candidate) in candidates[..sorted].iter().enumerate() {
            sum += weight(candidate);
            if sum >= mass {
                return i + 1;
            }
        }
        if sorted == candidates.len() {
            return sorted;
        }
        sorted = candidates.len().min(sorted * 8);
    }
}

fn logprobs(logits: &[f32], token: TokenId, top: usize) -> TokenLogprobs {
    let largest = logits[argmax(logits) as usize];
    let mut weights: Vec<f32> = logits.iter().map(|logit| logit - largest).collect();
    exp_each(&mut weights);
    let sum: f64 = weights.iter().zip(logits).filter(|(_, l)| !l.is_nan()).map(|(&w, _)| f64::from(w)).sum();
    let norm = f64::from(largest) + sum.ln();
    let logprob = |logit: f32| (f64::from(logit) - norm) as f32;
    let mut candidates: Vec<Candidate> = logits
        .iter()
        .enumerate()
        .map(|(token, &logit)| Candidate { logit, token: token as TokenId })
        .collect();
    let top = top.min(candidates.len());
    sort_front(&mut candidates, top);
    TokenLogprobs {
        chosen: logprob(logits[token as usize]),
        top: candidates[..top].iter().map(|c| (c.token, logprob(c.logit))).collect(),
    }
}

#[cfg(test)]
mod tests;
