//! The clients of a run: their sessions, and every request that they sent.

use std::collections::BTreeMap;

use forebay_types::{LegId, TenantId, TokenId};

use super::request::Live;
use crate::{
    clock::Time,
    content::{self, Piece},
    engine::EngineKind,
    metrics::{Ending, Outcome, Seen},
    workload::Session,
};

/// Legs that one request can have; its bounds on placements and migrations allow far fewer.
const LEGS_MAX: u64 = 1 << 8;

/// One request. What it needs while it lives is dropped when it ends.
pub(super) struct Request {
    pub(super) session: u32,
    turn: u32,
    counts: bool,
    pub(super) ending: Ending,
    pub(super) prompt_tokens: u32,
    pub(super) answer: Piece,
    pub(super) seen: Seen,
    pub(super) cached_tokens: u32,
    pub(super) ttft_predicted: Option<f64>,
    pub(super) split: bool,
    /// Placements beyond the first: before its first token, and after.
    pub(super) retries: u32,
    pub(super) migrations: u32,
    pub(super) live: Option<Box<Live>>,
}

impl Request {
    /// The id of a request's leg.
    pub(super) fn leg(request: u32, nth: u32) -> LegId {
        LegId(u64::from(request) * LEGS_MAX + u64::from(nth) % LEGS_MAX)
    }

    /// Whose leg it is.
    pub(super) fn of(leg: LegId) -> u32 {
        (leg.0 / LEGS_MAX) as u32
    }

    /// The token at a position of prompt and answer, behind the prompt.
    pub(super) fn token(&self, position: u32) -> TokenId {
        content::token(self.answer.name, position - self.prompt_tokens)
    }

    /// Whether nobody waits for its first token any more.
    pub(super) fn is_answered(&self) -> bool {
        self.seen.first.is_some() || self.live.is_none()
    }
}

pub(super) struct Clients<'a> {
    pub(super) sessions: &'a [Session],
    /// Turns that each session has sent.
    sent: Vec<u32>,
    pub(super) requests: Vec<Request>,
    /// By what sessions call them.
    tenants: BTreeMap<u32, TenantId>,
    /// Requests that count and have not ended.
    pub(super) open: usize,
    /// Requests that have not ended.
    pub(super) live: usize,
}

impl<'a> Clients<'a> {
    pub(super) fn new(sessions: &'a [Session]) -> Self {
        let named = |session: &Session| (session.tenant, TenantId::from(session.tenant.to_string().as_str()));
        let tenants = sessions.iter().map(named).collect();
        Self { sessions, sent: vec![0; sessions.len()], requests: Vec::new(), tenants, open: 0, live: 0 }
    }

    /// The next turn of a session: its number. Its life is the caller's to begin.
    pub(super) fn send(&mut self, session: u32, now: Time, counts: bool) -> u32 {
        let (of, turn) = (&self.sessions[session as usize], self.sent[session as usize]);
        self.sent[session as usize] += 1;
        self.requests.push(Request {
            session,
            turn,
            counts,
            ending: Ending::Open,
            prompt_tokens: of.prompt(turn as usize).map(|piece| piece.tokens).sum(),
            answer: of.turns[turn as usize].answer,
            seen: Seen { arrived: now, ..Seen::default() },
            cached_tokens: 0,
            ttft_predicted: None,
            split: false,
            retries: 0,
            migrations: 0,
            live: None,
        });
        self.open += usize::from(counts);
        self.live += 1;
        (self.requests.len() - 1) as u32
    }

    /// The tokens of a request's prompt.
    pub(super) fn prompt(&self, request: u32) -> std::sync::Arc<[TokenId]> {
        let request = &self.requests[request as usize];
        content::write(self.sessions[request.session as usize].prompt(request.turn as usize))
    }

    /// What a sticky router would hash of a request.
    pub(super) fn session_key(&self, request: u32) -> u64 {
        self.sessions[self.requests[request as usize].session as usize].key
    }

    /// Whose a request is.
    pub(super) fn tenant(&self, request: u32) -> TenantId {
        let session = &self.sessions[self.requests[request as usize].session as usize];
        self.tenants[&session.tenant].clone()
    }

    /// A request ended. How long until the session's next turn, if there is one: a session ends where a request fails.
    pub(super) fn ended(&mut self, request: u32, ending: Ending) -> Option<Time> {
        let request = &mut self.requests[request as usize];
        assert_eq!(request.ending, Ending::Open, "a request ends once");
        request.ending = ending;
        self.open -= usize::from(request.counts);
        self.live -= 1;
        let next = self.sessions[request.session as usize].turns.get(request.turn as usize + 1)?;
        (ending == Ending::Finished).then_some(next.think)
    }

    /// What became of the requests that count.
    pub(super) fn outcomes(&self, kind: &EngineKind) -> Vec<Outcome> {
        let profile = &kind.profile;
        let counted = self.requests.iter().filter(|request| request.counts);
        let outcomes = counted.map(|request| Outcome {
            seen: request.seen,
            ending: request.ending,
            prompt_tokens: request.prompt_tokens,
            cached_tokens: match &request.live {
                Some(live) => live.lifecycle.cached_tokens(),
                None => request.cached_tokens,
            },
            alone_seconds: profile.prefill_seconds(request.prompt_tokens, 0, kind.scheduler.step_tokens_max)
                + profile.request_seconds(request.prompt_tokens),
            request_seconds: profile.request_seconds(request.prompt_tokens),
            ttft_predicted: request.ttft_predicted,
            split: request.split,
            retries: request.retries,
            migrations: request.migrations,
            tenant: self.sessions[request.session as usize].tenant,
        });
        outcomes.collect()
    }
}
