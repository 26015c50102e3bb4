//! The clients of a run: their sessions, and every request that they sent.

use std::sync::Arc;

use forebay_types::{BlockHash, LegId, RankId, TokenId};

use crate::{
    clock::Time,
    content::{self, Piece},
    engine::{EngineKind, Pull},
    gateway::{Ask, Gateway, Placed},
    metrics::{Outcome, Seen},
    workload::Session,
};

/// One request. Its prompt is dropped when it ends.
pub(super) struct Request {
    session: u32,
    turn: u32,
    counts: bool,
    finished: bool,
    /// Nobody took it.
    refused: bool,
    pub(super) prompt: Arc<[TokenId]>,
    pub(super) hashes: Arc<[BlockHash]>,
    pub(super) prompt_tokens: u32,
    pub(super) answer: Piece,
    pub(super) placed: Option<Placed>,
    pub(super) pulled: Option<Pull>,
    pub(super) seen: Seen,
    /// Tokens of the leg that sends now.
    pub(super) of_leg: u32,
    cached_tokens: u32,
}

impl Request {
    /// The ids of a request's legs: the one that computes the prompt, and the decode leg of a split.
    pub(super) fn legs(request: u32) -> [LegId; 2] {
        [LegId(2 * u64::from(request)), LegId(2 * u64::from(request) + 1)]
    }

    /// Whose leg it is.
    pub(super) fn of(leg: LegId) -> u32 {
        (leg.0 / 2) as u32
    }

    /// The token at a position of prompt and answer, behind the prompt.
    pub(super) fn token(&self, position: u32) -> TokenId {
        content::token(self.answer.name, position - self.prompt_tokens)
    }

    pub(super) fn is_split(&self) -> bool {
        self.placed.is_some_and(|placed| placed.is_split())
    }

    /// Whether nobody waits for its first token any more.
    pub(super) fn is_answered(&self) -> bool {
        self.seen.first.is_some() || self.refused
    }
}

pub(super) struct Clients<'a> {
    pub(super) sessions: &'a [Session],
    /// Turns that each session has sent.
    sent: Vec<u32>,
    pub(super) requests: Vec<Request>,
    /// Requests that count and have not ended.
    pub(super) open: usize,
}

impl<'a> Clients<'a> {
    pub(super) fn new(sessions: &'a [Session]) -> Self {
        Self { sessions, sent: vec![0; sessions.len()], requests: Vec::new(), open: 0 }
    }

    /// Sends the next turn of a session: its number.
    pub(super) fn send(&mut self, session: u32, now: Time, counts: bool, gateway: &Gateway) -> u32 {
        let (of, turn) = (&self.sessions[session as usize], self.sent[session as usize]);
        self.sent[session as usize] += 1;
        let prompt = content::write(of.prompt(turn as usize));
        self.requests.push(Request {
            session,
            turn,
            counts,
            finished: false,
            refused: false,
            hashes: gateway.hashes(&prompt),
            prompt_tokens: prompt.len() as u32,
            prompt,
            answer: of.turns[turn as usize].answer,
            placed: None,
            pulled: None,
            seen: Seen { arrived: now, ..Seen::default() },
            of_leg: 0,
            cached_tokens: 0,
        });
        self.open += usize::from(counts);
        (self.requests.len() - 1) as u32
    }

    /// What placement is told of a request.
    pub(super) fn ask(&self, request: u32) -> Ask<'_> {
        let legs = Request::legs(request);
        let request = &self.requests[request as usize];
        let session_key = self.sessions[request.session as usize].key;
        Ask { session_key, prompt_tokens: request.prompt_tokens, hashes: &request.hashes, legs }
    }

    pub(super) fn rank_of(&self, leg: LegId) -> RankId {
        let placed = self.requests[Request::of(leg) as usize].placed.expect("legs are of placed requests");
        if leg.0.is_multiple_of(2) { placed.prefill } else { placed.decode }
    }

    /// A leg began; what it found cached counts if it computes the prompt.
    pub(super) fn started(&mut self, leg: LegId, cached_tokens: u32) {
        if leg.0.is_multiple_of(2) {
            self.requests[Request::of(leg) as usize].cached_tokens = cached_tokens;
        }
    }

    /// Nobody takes a request; its session ends there.
    pub(super) fn refused(&mut self, request: u32) {
        let request = &mut self.requests[request as usize];
        request.refused = true;
        self.open -= usize::from(request.counts);
    }

    /// The last leg of a request ended. The session's next turn and how long until then, if there is one.
    pub(super) fn finished(&mut self, leg: LegId) -> Option<(u32, Time)> {
        let request = &mut self.requests[Request::of(leg) as usize];
        request.finished = true;
        request.prompt = [].into();
        request.hashes = [].into();
        self.open -= usize::from(request.counts);
        let next = self.sessions[request.session as usize].turns.get(request.turn as usize + 1)?;
        Some((request.session, next.think))
    }

    /// What became of the requests that count.
    pub(super) fn outcomes(&self, kind: &EngineKind) -> Vec<Outcome> {
        let profile = &kind.profile;
        let counted = self.requests.iter().filter(|request| request.counts);
        let outcomes = counted.map(|request| Outcome {
            seen: request.seen,
            finished: request.finished,
            prompt_tokens: request.prompt_tokens,
            cached_tokens: request.cached_tokens,
            alone_seconds: profile.prefill_seconds(request.prompt_tokens, 0, kind.scheduler.step_tokens_max)
                + profile.request_seconds(request.prompt_tokens),
            request_seconds: profile.request_seconds(request.prompt_tokens),
            ttft_predicted: request.placed.and_then(|placed| placed.ttft_predicted),
            split: request.is_split(),
            rejected: request.refused,
            tenant: self.sessions[request.session as usize].tenant,
        });
        outcomes.collect()
    }
}
