//! The cores that decide, behind one lock that is held for microseconds: at a placement, at the turns of a leg and once
//! in some tens of tokens, never per token.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use forebay_fleet::{Event, Fleet, FleetSettings};
use forebay_kv_index::{IndexLimits, KvIndex, Overlaps};
use forebay_placement::{Decision, PlaceError, Policy, Request, Weights, place};
use forebay_types::{BlockHash, RankId};

/// Output expected of a choice before any has ended.
const OUTPUT_TOKENS_PRIOR: f64 = 64.0;
/// Weight of the newest ended choice in the running mean of output lengths: a memory of some fifty.
const OUTPUT_NEWEST_WEIGHT: f64 = 0.02;

/// Fleet, index and what is learned of output lengths.
pub(super) struct Core {
    pub(super) fleet: Fleet,
    pub(super) index: KvIndex,
    overlaps: Overlaps,
    /// Running mean of output tokens, by model. Bounded: only served models get here.
    output_tokens: BTreeMap<Arc<str>, f64>,
}

/// What a placement is asked.
pub(super) struct Question<'a> {
    pub(super) model: &'a Arc<str>,
    pub(super) prompt_tokens: u32,
    pub(super) hashes: &'a [BlockHash],
    pub(super) output_tokens_max: u32,
    pub(super) choices: u32,
    pub(super) excluded: &'a [RankId],
}

impl Core {
    pub(super) fn new(fleet: FleetSettings, index: IndexLimits) -> Self {
        Self {
            fleet: Fleet::new(fleet),
            index: KvIndex::new(index),
            overlaps: Overlaps::default(),
            output_tokens: BTreeMap::new(),
        }
    }

    /// Applies an event of which nothing more needs to be done.
    pub(super) fn note(&mut self, now: Duration, event: Event) {
        self.fleet.apply(now, event);
    }

    pub(super) fn place(
        &mut self,
        now: Duration,
        question: &Question<'_>,
        policy: Policy,
        weights: &Weights,
        seed: u64,
    ) -> Result<Decision, PlaceError> {
        self.index.overlaps(question.hashes, &mut self.overlaps);
        let expected = self.output_tokens.get(question.model).copied().unwrap_or(OUTPUT_TOKENS_PRIOR);
        let request = Request {
            model: question.model,
            prompt_tokens: question.prompt_tokens,
            overlaps: &self.overlaps.0,
            output_tokens_expected: expected.ceil() as u32,
            output_tokens_max: question.output_tokens_max,
            choices: question.choices,
            excluded: question.excluded,
        };
        place(&self.fleet.snapshot(now), &request, policy, weights, seed)
    }

    /// Learns how long the answers of a model are. One that its own limit cut off says only that it would have been
    /// longer: it counts where it is longer than expected anyway.
    pub(super) fn learn_output(&mut self, model: &Arc<str>, tokens_per_choice: f64, cut_off: bool) {
        let mean = self.output_tokens.entry(model.clone()).or_insert(OUTPUT_TOKENS_PRIOR);
        if !cut_off || tokens_per_choice > *mean {
            *mean += OUTPUT_NEWEST_WEIGHT * (tokens_per_choice - *mean);
        }
    }
}
