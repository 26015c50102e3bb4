//! Seeking places, and starting legs there.

use std::time::Duration;

use forebay_placement::Plan;
use forebay_types::{FinishReason, LegId};

use super::Lifecycle;
use crate::{
    run::{LegAt, Run, State},
    words::{Action, LegOrder, PlacementId, Purpose, Terms, Unplaced, Work},
};

impl Lifecycle {
    pub(super) fn place_prompt(&mut self, actions: &mut Vec<Action>) {
        let state = self.ask(Purpose::Prompt, actions);
        let choices = (0..self.choices.len() as u32).collect();
        self.runs.push(Run::new(choices, Purpose::Prompt, state));
    }

    pub(super) fn place_due(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for index in 0..self.runs.len() {
            if let State::Waiting { until } = self.runs[index].state
                && until <= now
            {
                self.runs[index].state = self.ask(self.runs[index].prompt, actions);
            }
        }
    }

    /// Asks for a place, and counts that.
    pub(super) fn ask(&mut self, purpose: Purpose, actions: &mut Vec<Action>) -> State {
        match purpose {
            Purpose::Prompt => self.placements += 1,
            Purpose::Continue { choice, .. } => self.choices[choice as usize].migrations += 1,
        }
        let placement = PlacementId(self.placement_next);
        self.placement_next += 1;
        actions.push(Action::Place { placement, purpose, exclude: self.excluded.clone() });
        State::Placing(placement)
    }

    pub(super) fn placed(
        &mut self,
        placement: PlacementId,
        plan: Plan,
        legs: [LegId; 2],
        terms: Terms,
        actions: &mut Vec<Action>,
    ) {
        let Some(index) = self.placing(placement) else {
            return;
        };
        let (state, rank, work) = match plan {
            Plan::Aggregated { rank } => {
                (State::Aggregated(LegAt { leg: legs[0], rank }), rank, Work::Aggregated)
            }
            Plan::Split { prefill, decode } => {
                let leg = LegAt { leg: legs[0], rank: prefill };
                let then = LegAt { leg: legs[1], rank: decode };
                (State::Prefilling { leg, then }, prefill, Work::Prefill)
            }
        };
        self.runs[index].state = state;
        self.runs[index].terms = terms;
        self.runs[index].heard = None;
        self.start_leg(index, LegAt { leg: legs[0], rank }, work, actions);
    }

    pub(super) fn start_leg(
        &mut self,
        index: usize,
        LegAt { leg, rank }: LegAt,
        work: Work,
        actions: &mut Vec<Action>,
    ) {
        let run = &self.runs[index];
        let choices: Vec<u32> =
            run.choices.iter().copied().filter(|&choice| !self.choices[choice as usize].finished).collect();
        for &choice in &choices {
            self.choices[choice as usize].owner = Some(leg);
        }
        let in_prompt = match run.prompt {
            Purpose::Prompt => 0,
            Purpose::Continue { generated_tokens, .. } => generated_tokens,
        };
        let output_tokens_max = self.request.output_tokens_max - in_prompt;
        actions.push(Action::Start(LegOrder {
            leg,
            rank,
            prompt: run.prompt,
            choices,
            output_tokens_max,
            work,
        }));
    }

    pub(super) fn not_placed(
        &mut self,
        now: Duration,
        placement: PlacementId,
        why: Unplaced,
        actions: &mut Vec<Action>,
    ) {
        let Some(index) = self.placing(placement) else {
            return;
        };
        let (attempts, attempts_max) = match self.runs[index].prompt {
            Purpose::Prompt => (self.placements, self.limits.placements_max),
            Purpose::Continue { choice, .. } => {
                (self.choices[choice as usize].migrations, self.limits.migrations_max)
            }
        };
        match (self.runs[index].prompt, why) {
            (_, Unplaced::Retry) if attempts < attempts_max => {
                let until = now.saturating_add(self.limits.placement_retry);
                self.runs[index].state = State::Waiting { until };
            }
            (Purpose::Continue { choice, .. }, Unplaced::TooLong) => {
                self.runs.swap_remove(index);
                self.finish_choice(choice, FinishReason::Length, actions);
            }
            _ => self.give_up(actions),
        }
    }

    fn placing(&self, placement: PlacementId) -> Option<usize> {
        self.runs.iter().position(|run| matches!(run.state, State::Placing(asked) if asked == placement))
    }
}
