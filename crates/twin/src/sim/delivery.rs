//! From the end of a step to the client: when tokens are seen, and what the gateway hears of it.

use forebay_engine_model::Output;
use forebay_types::FirstToken;

use super::{Event, Request, Run, WAY_BACK_SECONDS, Word};

/// Tokens of a leg between two reports of its progress, as the gateway counts them.
const PROGRESS_TOKENS: u32 = 32;

impl Run<'_> {
    /// Passes on what a step produced; `delay`: of first tokens and of others.
    pub(super) fn deliver(&mut self, output: &Output, delay: (f64, f64)) {
        let &(Output::Token { leg, .. } | Output::Held { leg, .. } | Output::Ended { leg }) = output else {
            return;
        };
        let [first_leg, decode_leg] = Request::legs(Request::of(leg));
        let handed = self.settings.gateway.first_token == FirstToken::Handed;
        let request = &mut self.clients.requests[Request::of(leg) as usize];
        let split = request.is_split();
        let is_first = request.seen.first.is_none();
        let soon = is_first || matches!(output, Output::Held { .. });
        let at = self.now.after(WAY_BACK_SECONDS + if soon { delay.0 } else { delay.1 });
        match output {
            Output::Token { .. } if split && leg == first_leg && !handed && request.answer.tokens > 1 => {}
            Output::Token { .. } => {
                request.seen.token(at);
                request.of_leg += 1;
                match request.of_leg {
                    1 => self.agenda.add(at, Event::Heard(leg, Word::FirstToken)),
                    tokens if tokens.is_multiple_of(PROGRESS_TOKENS) => {
                        self.agenda.add(at, Event::Heard(leg, Word::Generated(tokens)))
                    }
                    _ => {}
                }
                self.answered();
            }
            Output::Held { .. } => {
                request.of_leg = 0;
                self.agenda.add(at, Event::Heard(leg, Word::Prefilled));
            }
            Output::Ended { .. } if split && leg == first_leg => {}
            Output::Ended { .. } => {
                if leg == decode_leg && !handed {
                    // It drew the first token anew: it is one step behind what its scheduler counted.
                    let itl = request.seen.itl().unwrap_or(0.0);
                    request.seen.token(at.after(itl));
                }
                let ended = request.seen.last.max(at);
                self.agenda.add(ended, Event::Heard(leg, Word::Ended));
                if let Some((session, think)) = self.clients.finished(leg) {
                    self.agenda.add(ended + think, Event::Arrive(session));
                }
            }
            Output::Finished { .. } => {}
        }
    }

    /// Forgets requests that wait no more, from the oldest on.
    fn answered(&mut self) {
        while let Some(&oldest) = self.unanswered.front()
            && self.clients.requests[oldest as usize].is_answered()
        {
            self.unanswered.pop_front();
        }
    }
}
