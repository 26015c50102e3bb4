//! Placement: which rank, or which pair of ranks, should run a request.
//!
//! In: a snapshot of the fleet and what is known of the request. Out: a decision with its explanation, or the reason
//! there is none. Start at [`place`].
//!
//! Invariants: the answer depends on the arguments alone; a rank that starts, drains or is lost is never chosen.

use forebay_types::{BlockHash, RankId};
use serde::{Deserialize, Serialize};

use crate::{
    choose::{Chooser, Pair},
    cost::{self, Priced},
    error::{self, PlaceError},
    explain::{self, Explanation},
    filter::{self, Relaxed},
    policy::Policy,
    snapshot::{Reserved, Snapshot},
    weights::Weights,
};

/// What placement knows of a request. Never its text.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The model it asks for.
    pub model: &'a str,
    /// Length of the prompt; after a migration, with the tokens generated so far.
    pub prompt_tokens: u32,
    /// Leading blocks of the prompt that each rank holds, in any order; ranks with none may be left out.
    pub overlaps: &'a [(RankId, u32)],
    /// Tokens in each of those blocks: the index's block size, which need not be that of a rank.
    pub overlap_block_tokens: u32,
    /// In which form its engine must take it.
    pub form: Form,
    /// Output that is expected of each choice.
    pub output_tokens_expected: u32,
    /// Output that each choice may have at most.
    pub output_tokens_max: u32,
    /// Answers asked for; they share one prefill.
    pub choices: u32,
    /// Ranks that failed this request already.
    pub excluded: &'a [RankId],
    /// What prompts that begin alike have in common; see [`beginning`].
    pub beginning: Option<BlockHash>,
}

/// Tokens by which [`Policy::PrefixAffinity`] tells prompts apart: a short system prompt. Shorter, and prompts that only
/// greet alike would go to one rank; longer, and the first turns of a conversation would part from the later ones.
const BEGINNING_TOKENS: u32 = 256;

/// The block that ends the first 256 tokens of a prompt, or all of a shorter one: equal for prompts that begin alike.
/// `None` if it has no whole block.
pub fn beginning(chain: &[BlockHash], block_size_tokens: u32) -> Option<BlockHash> {
    let blocks = (BEGINNING_TOKENS / block_size_tokens.max(1)).max(1) as usize;
    chain.get(..blocks).unwrap_or(chain).last().copied()
}

/// In which form a request can be handed to an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// As tokens.
    Tokens,
    /// In the client's own words.
    Body,
}

impl Request<'_> {
    /// Expected output of one choice: at least the token that the prefill itself gives.
    pub(crate) fn output_tokens(&self) -> u32 {
        self.output_tokens_expected.min(self.output_tokens_max).max(1)
    }

    pub(crate) fn choices(&self) -> u32 {
        self.choices.max(1)
    }
}

/// Where a request runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Plan {
    /// Both phases on one rank.
    Aggregated {
        /// That rank.
        rank: RankId,
    },
    /// A prefill leg, a KV transfer and a decode leg.
    Split {
        /// Computes the prompt.
        prefill: RankId,
        /// Continues from its KV.
        decode: RankId,
    },
}

impl Plan {
    /// The rank that computes the prompt.
    pub fn prefill_rank(&self) -> RankId {
        match *self {
            Plan::Aggregated { rank } => rank,
            Plan::Split { prefill, .. } => prefill,
        }
    }

    /// The rank that decodes.
    pub fn decode_rank(&self) -> RankId {
        match *self {
            Plan::Aggregated { rank } => rank,
            Plan::Split { decode, .. } => decode,
        }
    }
}

/// The answer for one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// Where it runs.
    pub plan: Plan,
    /// Wait and prefill. A split adds nothing: its first token is streamed from the prefill leg.
    pub predicted_ttft_seconds: f64,
    /// Prompt tokens that the prefilling rank is expected to serve from cache.
    pub cached_tokens: u32,
    /// What to reserve until the legs end.
    pub reservations: Reservations,
    /// Why.
    pub explanation: Explanation,
}

/// The load that a plan promises to each of its ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reservations {
    /// Of the leg that computes the prompt: aggregated or prefill.
    pub prefill: (RankId, Reserved),
    /// Of the decode leg of a split.
    pub decode: Option<(RankId, Reserved)>,
}

/// Chooses where `request` runs.
///
/// `seed` decides between equals; round robin takes it as the request's turn. A counter that rises by one with each
/// request serves every policy. O(ranks), plus at most 64 pairs (per KV layout). The terms of the cost are in `cost`,
/// their weights and sources in [`Weights`].
///
/// Ranks that failed this request, and then ranks whose breaker is open, are used only when no other rank could run it
/// even after waiting; [`Explanation::relaxed`] says so.
///
/// # Errors
/// [`PlaceError::NoModel`] if no rank serves the model; [`PlaceError::Saturated`] if waiting helps;
/// [`PlaceError::TooLong`] if only a shorter prompt helps; [`PlaceError::NoRank`] otherwise, with what is missing.
pub fn place(
    snapshot: &Snapshot,
    request: &Request<'_>,
    policy: Policy,
    weights: &Weights,
    seed: u64,
) -> Result<Decision, PlaceError> {
    let verdicts = filter::judge(snapshot, request);
    for relaxed in Relaxed::ALL {
        let eligible = verdicts.iter().filter(|verdict| verdict.eligible(relaxed));
        let mut priced: Vec<Priced> = Vec::with_capacity(verdicts.len());
        priced.extend(eligible.map(|verdict| {
            let (rank, standing) = (&snapshot.ranks()[verdict.index], snapshot.standing(verdict.index));
            cost::price(rank, standing, verdict, request, weights)
        }));
        let chooser = Chooser { snapshot, weights, priced: &priced, beginning: request.beginning };
        if let Some(choice) = chooser.choose(policy, seed) {
            let chosen = choice.pairs[choice.chosen];
            let reservations = reservations(request, &priced, chosen);
            let record = explain::Record { chooser: &chooser, request, policy, relaxed, verdicts: &verdicts };
            return Ok(Decision {
                plan: chosen.plan(&priced),
                predicted_ttft_seconds: chooser.ttft(chosen.prefill, chosen.decode),
                cached_tokens: priced[chosen.prefill].cached_tokens,
                reservations,
                explanation: record.write(choice),
            });
        }
        if error::waiting_helps(snapshot, &verdicts, relaxed) {
            break;
        }
    }
    Err(error::refuse(snapshot, request, &verdicts))
}

fn reservations(request: &Request<'_>, priced: &[Priced], chosen: Pair) -> Reservations {
    let (prefill, decode) = (&priced[chosen.prefill], &priced[chosen.decode]);
    let choices = request.choices();
    let computing = Reserved {
        prefill_tokens: u64::from(prefill.new_tokens),
        sequences: 1,
        blocks: prefill.missing_blocks,
        ..Reserved::default()
    };
    let decoding = Reserved {
        context_tokens: u64::from(choices) * u64::from(request.prompt_tokens),
        output_tokens: u64::from(choices) * u64::from(request.output_tokens()),
        decodes: choices,
        ..Reserved::default()
    };
    if chosen.prefill == chosen.decode {
        let both = Reserved {
            prefill_tokens: computing.prefill_tokens,
            sequences: 1,
            blocks: computing.blocks,
            ..decoding
        };
        return Reservations { prefill: (prefill.id, both), decode: None };
    }
    let decoding = Reserved { sequences: 1, blocks: decode.missing_blocks, ..decoding };
    Reservations { prefill: (prefill.id, computing), decode: Some((decode.id, decoding)) }
}
