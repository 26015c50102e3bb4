//! From the end of a step to the client: which tokens are sent, when they are seen, and what the gateway hears of it.
//!
//! Whether a token is sent is decided as it leaves the engine; it is seen, and the leg's turns are heard of, when it
//! arrives.

use forebay_engine_model::Output;
use forebay_fleet::LoadSight;
use forebay_lifecycle::Accepted;
use forebay_types::LegId;

use super::{
    Run, WAY_BACK_SECONDS,
    agenda::{Event, Word},
    client::Request,
    request::LiveLeg,
};
use crate::clock::Time;

/// Tokens of a leg between two reports of its progress, as the gateway counts them.
const PROGRESS_TOKENS: u32 = 32;

impl Run<'_> {
    /// Passes on what a step produced; `delay`: of first tokens and of others.
    pub(super) fn deliver(&mut self, output: &Output, delay: (f64, f64)) {
        let (&Output::Token { leg, .. }
        | &Output::Held { leg, .. }
        | &Output::Finished { leg, .. }
        | &Output::Ended { leg }) = output;
        let request = &mut self.clients.requests[Request::of(leg) as usize];
        let is_first = request.seen.first.is_none();
        let Some(live) = &mut request.live else { return };
        let Some(live_leg) = live.leg(leg) else { return };
        let LiveLeg { is_behind, is_mute, finished, .. } = *live_leg;
        let soon = is_first || matches!(output, Output::Held { .. });
        let at = self.now.after(WAY_BACK_SECONDS + if soon { delay.0 } else { delay.1 });
        match *output {
            Output::Token { .. } if is_mute => {}
            Output::Token { position, .. } => self.send_now(leg, position - u32::from(is_behind), at),
            Output::Held { .. } => {
                live_leg.is_mute = true;
                self.agenda.add(at, Event::Heard(leg, Word::Prefilled));
            }
            // It was held: that was its end.
            Output::Ended { .. } if is_mute => {}
            Output::Ended { .. } => {
                if is_behind {
                    // It drew the first token anew: one more is to come.
                    let later = at.after(request.seen.itl().unwrap_or(0.0));
                    let next = request.prompt_tokens + live.lifecycle.tokens_sent() as u32;
                    self.send_now(leg, next, later);
                }
                let ended = self.clients.requests[Request::of(leg) as usize].seen.last.max(at);
                self.agenda.add(ended, Event::Heard(leg, Word::Ended(finished)));
            }
            Output::Finished { .. } if is_mute => {}
            Output::Finished { reason, .. } => live_leg.finished = Some(reason),
        }
    }

    fn send_now(&mut self, leg: LegId, position: u32, at: Time) {
        if let Some(word) = self.send_token(leg, position, at) {
            self.agenda.add(at, Event::Heard(leg, word));
        }
    }

    /// A leg's token leaves the engine, to be seen at `at` if it is the next one of its answer. What the gateway hears of the leg
    /// then, if anything.
    pub(super) fn send_token(&mut self, leg: LegId, position: u32, at: Time) -> Option<Word> {
        let can_stall = self.settings.gateway.sight == LoadSight::Sampled;
        let request = &mut self.clients.requests[Request::of(leg) as usize];
        let token = request.token(position);
        let live = request.live.as_mut()?;
        if live.lifecycle.token(leg, 0, position, token) == Accepted::No {
            self.arm(Request::of(leg)); // a leg that skipped a token is to be replaced
            return None;
        }
        if can_stall {
            live.lifecycle.heard(at.duration(), leg);
        }
        let live_leg = live.leg(leg)?;
        live_leg.generated += 1;
        let generated = live_leg.generated;
        request.seen.token(at);
        match generated {
            1 => Some(Word::FirstToken),
            tokens if tokens.is_multiple_of(PROGRESS_TOKENS) => Some(Word::Generated(tokens)),
            _ => None,
        }
    }

    /// Forgets requests that wait no more, from the oldest on.
    pub(super) fn answered(&mut self) {
        while let Some(&oldest) = self.unanswered.front()
            && self.clients.requests[oldest as usize].is_answered()
        {
            self.unanswered.pop_front();
        }
    }
}
