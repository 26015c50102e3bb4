//! What a lost or refused leg leads to, and the end of what cannot be helped.

use std::time::Duration;

use forebay_types::{LegId, RankId};

use super::{Lifecycle, Setback, abandon, release};
use crate::{
    failure::Failure,
    run::{LegAt, Run},
    words::{Action, Form, Health, Outcome, Purpose},
};

impl Lifecycle {
    pub(super) fn leg_lost(&mut self, leg: LegId, actions: &mut Vec<Action>) {
        if let Some((index, LegAt { rank, .. })) = self.run_of(leg) {
            actions.push(Action::Report { rank, health: Health::Failed });
            self.replace(index, rank, Setback::Lost, actions);
        } else if let Some(held) = self.runs.iter().filter_map(Run::held).find(|held| held.leg == leg) {
            // The KV may or may not have left; the decode leg will say. Not for this request again.
            actions.push(Action::Report { rank: held.rank, health: Health::Failed });
            self.exclude(held.rank);
        }
    }

    /// Replaces legs that began to send and fell silent.
    pub(super) fn replace_stalled(&mut self, now: Duration, actions: &mut Vec<Action>) {
        while let Some(index) = self.runs.iter().position(|run| run.stalls_at().is_some_and(|at| at <= now)) {
            self.runs[index].heard = None;
            if let Some(LegAt { leg, rank }) = self.runs[index].live() {
                self.disown(leg);
                actions.push(Action::CancelLeg { leg, rank });
                actions.push(Action::Report { rank, health: Health::Failed });
                self.replace(index, rank, Setback::Lost, actions);
            }
        }
    }

    /// Run `index` came to nothing on `rank`, its live leg is gone: seeks another place for what is unfinished.
    pub(super) fn replace(
        &mut self,
        index: usize,
        rank: RankId,
        setback: Setback,
        actions: &mut Vec<Action>,
    ) {
        let unfinished = self.settle(index, actions);
        let mut run = self.runs.swap_remove(index);
        release(run.take_held(), actions);
        self.exclude(rank);
        self.setback = Some(setback);
        for &choice in &unfinished {
            self.choices[choice as usize].owner = None;
        }
        if unfinished.is_empty() {
            return;
        }
        if self.tokens_sent == 0 {
            self.losses += u32::from(matches!(setback, Setback::Lost));
            if self.placements < self.limits.placements_max && self.losses < self.limits.losses_max {
                self.place_prompt(actions);
            } else {
                self.give_up(actions);
            }
            return;
        }
        if self.request.form == Form::Opaque || !run.terms.continues {
            return self.give_up(actions);
        }
        let is_spent = |&choice: &u32| self.choices[choice as usize].migrations >= self.limits.migrations_max;
        if unfinished.iter().any(is_spent) {
            return self.give_up(actions);
        }
        for choice in unfinished {
            let prompt = self.continuation(choice);
            let state = self.ask(prompt, actions);
            self.runs.push(Run::new(vec![choice], prompt, state));
        }
    }

    pub(super) fn give_up(&mut self, actions: &mut Vec<Action>) {
        let attempts = self.placements;
        let failure = match self.setback {
            _ if self.tokens_sent > 0 => Failure::LostMidStream { tokens_sent: self.tokens_sent },
            None => Failure::NotPlaced,
            Some(Setback::Lost) => Failure::LostUnanswered { attempts },
            Some(Setback::Refused) => Failure::Refused { attempts },
        };
        self.end(failure, actions);
    }

    /// Lets go of everything. If only the end of a leg was awaited, the answer is complete all the same.
    pub(super) fn end(&mut self, failure: Failure, actions: &mut Vec<Action>) {
        for run in std::mem::take(&mut self.runs) {
            abandon(run, actions);
        }
        for choice in &mut self.choices {
            choice.owner = None;
        }
        if self.is_answered() {
            self.outcome = Some(Outcome::Finished);
            actions.push(Action::Finish);
        } else {
            self.outcome = Some(Outcome::Failed(failure.clone()));
            actions.push(Action::Fail(failure));
        }
    }

    fn continuation(&self, choice: u32) -> Purpose {
        Purpose::Continue { choice, generated_tokens: self.generated(choice).len() as u32 }
    }

    fn exclude(&mut self, rank: RankId) {
        if !self.excluded.contains(&rank) {
            self.excluded.push(rank);
        }
    }
}
