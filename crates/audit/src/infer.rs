//! Joins what events and counters say: how many requests there were, how long, what they share.
//!
//! Events show single requests in full blocks, counters show sums in tokens. So what events leave open (the end of a prompt
//! behind its last full block, the length of what was cached before the recording, requests that stored nothing) is set,
//! in the mean of each rank, to what the counters need to come out right. Start at [`Inferred::of`].

use forebay_twin::Time;
use serde::Serialize;

use crate::{
    chains::Seen,
    meter::{Interval, Measured},
    recorder::Recorder,
};

/// Share of the recording at its beginning whose requests do not count: the twin's caches are empty there, the fleet's were
/// not.
const WARM_UP_SHARE: f64 = 0.2;
/// Requests that must count, for percentiles to mean anything.
const REQUESTS_MIN: f64 = 20.0;
/// Tokens of the twin's blocks where no event said them, or said smaller ones.
const BLOCK_TOKENS_MIN: u32 = 16;

/// What is certain of a recording, and what was made up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Sight {
    /// Requests that had their first token, by the engines' counters.
    pub requests: f64,
    /// Requests that KV events show.
    pub by_events: usize,
    /// Requests that only counters show: when they came and what they share is made up.
    pub made_up: usize,
    /// Requests whose prompts go on from what was cached before the recording.
    pub rooted: usize,
    /// The mean length of that, tokens; from the hit counters.
    pub root_tokens: u32,
    /// Ranks.
    pub ranks: usize,
    /// Ranks of which no KV events are heard: what their prompts share is the measured share, wherever they run.
    pub blind_ranks: usize,
}

/// Why nothing can be said.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum TooLittle {
    /// Too few requests in the time that counts.
    #[error("{found:.0} requests had their first token in the time that counts, and {needed:.0} are needed")]
    Requests {
        /// In the time that counts.
        found: f64,
        /// At least.
        needed: f64,
    },
    /// The engines' counters of tokens did not move.
    #[error("the engines counted no tokens of prompts or none of answers")]
    Tokens,
}

/// A rank's means that make its sums come out right.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Solved {
    /// Tokens behind a prompt's last full block.
    pub(crate) tail_tokens: f64,
    /// Tokens of an answer beyond those of the blocks that it filled.
    pub(crate) output_tokens: f64,
    /// Requests that only counters show.
    pub(crate) unseen: usize,
    /// Their prompts and answers.
    pub(crate) unseen_prompt_tokens: f64,
    pub(crate) unseen_output_tokens: f64,
    /// Seconds from arrival to the first token.
    pub(crate) ttft_seconds: f64,
    /// All is from counters.
    pub(crate) is_blind: bool,
    /// Of its prompt tokens, found cached.
    pub(crate) cached_share: f64,
}

/// What arrived, as far as it can be told.
#[derive(Debug)]
pub struct Inferred {
    pub(crate) seen: Vec<Seen>,
    pub(crate) roots: Vec<u64>,
    pub(crate) seats: Vec<Solved>,
    pub(crate) sums: Vec<Interval>,
    pub(crate) intervals: Vec<Vec<Interval>>,
    /// Tokens of the twin's blocks.
    pub block_tokens: u32,
    /// What was measured in the time that counts.
    pub measured: Measured,
    /// What is certain, and what is not.
    pub sight: Sight,
}

impl Inferred {
    pub(crate) fn of(recorder: &Recorder) -> Result<Self, TooLittle> {
        let Recorder { chains, meters, heard, .. } = recorder;
        let whole = Measured::of(meters, f64::NEG_INFINITY);
        let from = whole.from_seconds + WARM_UP_SHARE * (whole.to_seconds - whole.from_seconds);
        let measured = Measured::of(meters, from);
        if measured.requests < REQUESTS_MIN {
            return Err(TooLittle::Requests { found: measured.requests, needed: REQUESTS_MIN });
        }
        if measured.prompt_tokens <= 0.0 || measured.output_tokens <= 0.0 {
            return Err(TooLittle::Tokens);
        }
        let sums: Vec<Interval> = meters.iter().map(|meter| meter.sum(f64::NEG_INFINITY)).collect();
        let block_tokens = chains.block_tokens.max(BLOCK_TOKENS_MIN);
        let tallies: Vec<Tally> = (0..sums.len())
            .map(|seat| Tally::of(&chains.requests, seat, &sums[seat], !heard[seat]))
            .collect();
        let root_tokens = root_tokens(&tallies, &sums, block_tokens);
        let seats: Vec<Solved> = tallies
            .iter()
            .zip(&sums)
            .map(|(tally, sum)| tally.solve(sum, f64::from(root_tokens), f64::from(block_tokens)))
            .collect();
        let sight = Sight {
            requests: whole.requests,
            by_events: tallies.iter().map(|tally| tally.seen).sum(),
            made_up: seats.iter().map(|seat| seat.unseen).sum(),
            rooted: tallies.iter().map(|tally| tally.rooted).sum(),
            root_tokens,
            ranks: seats.len(),
            blind_ranks: seats.iter().filter(|seat| seat.is_blind).count(),
        };
        Ok(Self {
            seen: chains.requests.clone(),
            roots: chains.roots.clone(),
            seats,
            sums,
            intervals: meters.iter().map(|meter| meter.intervals.clone()).collect(),
            block_tokens,
            measured,
            sight,
        })
    }

    /// From when on requests count.
    pub fn warm_up(&self) -> Time {
        Time::from_seconds(self.measured.from_seconds.max(0.0))
    }

    /// When the recording ended.
    pub fn end(&self) -> Time {
        Time::from_seconds(self.measured.to_seconds.max(0.0))
    }
}

/// What events show of one rank, summed up.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    seen: usize,
    unseen: usize,
    rooted: usize,
    prompt_tokens: f64,
    cached_tokens: f64,
    grown_tokens: f64,
    is_blind: bool,
}

impl Tally {
    fn of(requests: &[Seen], seat: usize, sum: &Interval, is_blind: bool) -> Self {
        let mut tally = Self { is_blind, ..Self::default() };
        let of_seat =
            requests.iter().filter(|request| usize::from(request.seat) == seat && counts(request, sum));
        for request in of_seat {
            tally.seen += 1;
            tally.rooted += usize::from(request.root.is_some());
            tally.prompt_tokens += f64::from(request.prompt_tokens());
            tally.cached_tokens += f64::from(request.cached_tokens);
            tally.grown_tokens += f64::from(request.grown_tokens);
        }
        tally.unseen = (sum.begun.round() as usize).saturating_sub(tally.seen);
        tally
    }

    fn solve(&self, sum: &Interval, root_tokens: f64, block_tokens: f64) -> Solved {
        let (seen, unseen) = (self.seen as f64, self.unseen as f64);
        let half = block_tokens / 2.0;
        let per = |tokens: f64, requests: f64| if requests > 0.0 { tokens / requests } else { 0.0 };
        let prompts_left = sum.prompt_tokens - self.prompt_tokens - self.rooted as f64 * root_tokens;
        // Where all were seen, what is left of the sums is theirs; else they have what is usual, and the others the rest.
        let tail_tokens = if self.unseen == 0 { per(prompts_left, seen).max(0.0) } else { half };
        let unseen_prompt_tokens = per(prompts_left - seen * tail_tokens, unseen).max(half);
        // One that stores no block has an answer that fills none.
        let unseen_output_tokens = if self.seen == 0 {
            per(sum.output_tokens, unseen)
        } else {
            half.min(per(sum.output_tokens, seen + unseen))
        };
        let output_tokens = per(sum.output_tokens - self.grown_tokens - unseen * unseen_output_tokens, seen);
        Solved {
            tail_tokens,
            output_tokens,
            unseen: self.unseen,
            unseen_prompt_tokens,
            unseen_output_tokens,
            ttft_seconds: sum.histograms.ttft.mean().unwrap_or(0.0),
            is_blind: self.is_blind,
            cached_share: per(sum.cached_tokens, sum.prompt_tokens).clamp(0.0, 1.0),
        }
    }
}

/// Whether a request came while metrics were read.
pub(crate) fn counts(request: &Seen, sum: &Interval) -> bool {
    !request.is_history && (sum.from_seconds..=sum.to_seconds).contains(&request.at_seconds)
}

/// What the hit counters say beyond the hits that events show is shared among those whose beginnings nobody knows, and
/// those that nobody saw, for they were cached.
fn root_tokens(tallies: &[Tally], sums: &[Interval], block_tokens: u32) -> u32 {
    let (mut tokens, mut requests) = (0.0, 0.0);
    for (tally, sum) in tallies.iter().zip(sums).filter(|(tally, _)| tally.rooted > 0) {
        tokens += (sum.cached_tokens - tally.cached_tokens).max(0.0);
        requests += (tally.rooted + tally.unseen) as f64;
    }
    let blocks = if requests > 0.0 { tokens / requests / f64::from(block_tokens) } else { 0.0 };
    blocks.round() as u32 * block_tokens
}
