//! Writes a request's decision record while it runs.

use std::{collections::HashMap, sync::Arc, time::Duration};

use forebay_engines::{TransferOutcome, TransferReport};
use forebay_lifecycle::{LegOrder, Purpose, Work};
use forebay_placement::Explanation;
use forebay_types::{EngineName, LegId, RankId};

use super::api::GenerateRequest;
use crate::decisions::{DecisionRecord, LegRecord, Placement, TransferRecord};

/// The record so far. All times in it count from the request's arrival.
pub(super) struct Trail {
    record: DecisionRecord,
    legs: HashMap<LegId, usize>,
}

impl Trail {
    pub(super) fn new(request: &GenerateRequest, arrived_unix_ms: u64) -> Self {
        let record = DecisionRecord {
            id: request.id.clone(),
            arrived_unix_ms,
            tenant: request.tenant.clone(),
            model: request.model.clone(),
            prompt_tokens: request.prompt.len() as u32,
            choices: request.choices,
            placements: Vec::new(),
            legs: Vec::new(),
            transfers: Vec::new(),
            ttft_seconds: None,
            e2e_seconds: None,
            cached_tokens: 0,
            output_tokens: 0,
            outcome: "running".to_owned(),
        };
        Self { record, legs: HashMap::new() }
    }

    /// A placement; whether it was the request's first.
    pub(super) fn placed(
        &mut self,
        at: Duration,
        took: Duration,
        purpose: Purpose,
        explanation: Explanation,
    ) {
        let purpose = match purpose {
            Purpose::Continue { .. } => "migration",
            Purpose::Prompt if self.record.placements.is_empty() => "first",
            Purpose::Prompt => "retry",
        };
        self.record.placements.push(Placement {
            purpose: purpose.to_owned(),
            at_seconds: at.as_secs_f64(),
            took_microseconds: took.as_secs_f64() * 1e6,
            explanation,
        });
    }

    pub(super) fn leg_ordered(&mut self, at: Duration, order: &LegOrder, engine: EngineName) {
        let work = match order.work {
            Work::Aggregated => "aggregated",
            Work::Prefill => "prefill",
            Work::Decode { .. } => "decode",
        };
        self.legs.insert(order.leg, self.record.legs.len());
        self.record.legs.push(LegRecord {
            leg: order.leg.0,
            work: work.to_owned(),
            engine,
            incarnation: order.rank.incarnation.0,
            at_seconds: at.as_secs_f64(),
            started_seconds: None,
            ended_seconds: None,
            cached_tokens: 0,
            output_tokens: 0,
            outcome: "running".to_owned(),
        });
    }

    fn leg(&mut self, leg: LegId) -> Option<&mut LegRecord> {
        self.legs.get(&leg).map(|index| &mut self.record.legs[*index])
    }

    /// The engine began; how long the leg had waited.
    pub(super) fn leg_started(&mut self, at: Duration, leg: LegId, cached_tokens: u32) -> Option<Duration> {
        let leg = self.leg(leg)?;
        leg.started_seconds = Some(at.as_secs_f64());
        leg.cached_tokens = cached_tokens;
        Some(at.saturating_sub(Duration::from_secs_f64(leg.at_seconds)))
    }

    /// What the engine had cached, where it says so at the leg's end.
    pub(super) fn leg_cached(&mut self, leg: LegId, cached_tokens: u32) {
        if let Some(leg) = self.leg(leg) {
            leg.cached_tokens = leg.cached_tokens.max(cached_tokens);
        }
    }

    pub(super) fn leg_ended(&mut self, at: Duration, leg: LegId, output_tokens: u64, outcome: &str) {
        if let Some(leg) = self.leg(leg)
            && leg.ended_seconds.is_none()
        {
            leg.ended_seconds = Some(at.as_secs_f64());
            leg.output_tokens = output_tokens as u32;
            outcome.clone_into(&mut leg.outcome);
        }
    }

    pub(super) fn transferred(&mut self, from: EngineName, to: EngineName, report: TransferReport) {
        let TransferReport { blocks, bytes, pieces, seconds } = report;
        let outcome = "done".to_owned();
        self.record.transfers.push(TransferRecord { from, to, blocks, bytes, pieces, seconds, outcome });
    }

    pub(super) fn transfer_failed(&mut self, from: EngineName, to: EngineName, outcome: &TransferOutcome) {
        let outcome = outcome.to_string();
        let nothing = (0, 0, 0, 0.0);
        let (blocks, bytes, pieces, seconds) = nothing;
        self.record.transfers.push(TransferRecord { from, to, blocks, bytes, pieces, seconds, outcome });
    }

    /// The first token, or the first piece of an answer that is passed on; whether it was the first.
    pub(super) fn first_token(&mut self, at: Duration) -> bool {
        let is_first = self.record.ttft_seconds.is_none();
        self.record.ttft_seconds.get_or_insert(at.as_secs_f64());
        is_first
    }

    /// The finished record; what still runs ended with the request.
    pub(super) fn finish(
        mut self,
        at: Duration,
        cached_tokens: u32,
        output_tokens: u64,
        outcome: &str,
    ) -> DecisionRecord {
        for leg in &mut self.record.legs {
            if leg.ended_seconds.is_none() {
                leg.ended_seconds = Some(at.as_secs_f64());
                "cancelled".clone_into(&mut leg.outcome);
            }
        }
        self.record.e2e_seconds = Some(at.as_secs_f64());
        self.record.cached_tokens = cached_tokens;
        self.record.output_tokens = output_tokens as u32;
        outcome.clone_into(&mut self.record.outcome);
        self.record
    }

    pub(super) fn engine_of(&self, leg: LegId) -> Option<EngineName> {
        self.legs.get(&leg).map(|index| self.record.legs[*index].engine.clone())
    }
}

/// Engines that the record knows of are named; another is called by its rank.
pub(super) fn engine_name(known: Option<EngineName>, rank: RankId) -> EngineName {
    known.unwrap_or_else(|| EngineName(Arc::from(rank.to_string())))
}
