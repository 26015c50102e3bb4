//! A leg of tokens: read, counted, and passed on.

use forebay_engine_wire::{
    answer::{Chunk, Delta, TokenReader, Usage, is_done},
    body::{self, Kv, TokenRequest},
    sse::{SseDecoder, SseLimits},
};
use forebay_types::{SampledToken, TokenId};
use smallvec::SmallVec;

use super::{Done, LegTask, PIECES_MAX, Setback, piece_at_once};
use crate::{
    driver::{KvHandle, LegEvent, LegUsage},
    remote::{
        TokenRoute,
        client::{EXCERPT_BYTES_MAX, HttpError},
    },
};

/// Bytes of a line that holds no list of tokens.
const LINE_BYTES: usize = 1 << 20;
/// Bytes that a token may take in a line: its id, its text (SGLang repeats the whole answer in each event).
const TOKEN_BYTES: usize = 64;
/// Bytes that the log probability of one token may take.
const LOGPROB_BYTES: usize = 96;
/// Below it vLLM takes the most likely token, and refuses to draw several answers: they would be the same.
const GREEDY_BELOW: f32 = 1e-5;

impl LegTask {
    /// Path and body of a request for tokens.
    pub(super) fn token_request(&self, kv: Kv<'_>) -> (&'static str, Vec<u8>) {
        let speech = &self.engine.speech;
        let request = TokenRequest {
            id: &self.id,
            model: &speech.model,
            prompt: &self.leg.prompt.tokens,
            choices: if self.is_greedy() { 1 } else { self.leg.choices.len() as u32 },
            sampling: &self.leg.sampling,
            salt: self.salt(),
            dp_rank: self.rank_field(),
            kv,
        };
        match self.route() {
            TokenRoute::Completions => ("/v1/completions", body::completions(&request)),
            TokenRoute::VllmGenerate => ("/inference/v1/generate", body::vllm_generate(&request)),
            TokenRoute::SglangGenerate => ("/generate", body::sglang_generate(&request)),
        }
    }

    /// Whether one answer is the answer to every choice.
    fn is_greedy(&self) -> bool {
        self.leg.sampling.temperature < GREEDY_BELOW
    }

    fn route(&self) -> TokenRoute {
        self.engine.speech.tokens.expect("a leg of tokens was checked to have a route")
    }
}

pub(super) async fn run(task: &LegTask, kv: Kv<'_>, source: Option<&KvHandle>) -> Result<Done, Setback> {
    let (path, body) = task.token_request(kv);
    let mut answer = task.open(path, body).await?;
    if answer.status != 200 {
        return Err(task.refused(answer).await);
    }
    if !answer.is_events() {
        let kind = answer.content_type.clone();
        let body = answer.excerpt(EXCERPT_BYTES_MAX).await;
        return Err(match Chunk::fault_of(&body) {
            Some(fault) => task.complaint(&fault),
            None => Setback::lie(task.engine_name(), format_args!("answers a stream with {kind:?}")),
        });
    }
    let mut reading = Reading::new(task, source);
    let mut decoder = SseDecoder::new(reading.line_limits());
    loop {
        let mut piece = tokio::select! {
            biased;
            piece = answer.piece() => piece,
            () = task.stops.news.notified() => {
                if reading.is_over() {
                    return Ok(Done::Short);
                }
                continue; // the other choices go on
            }
        };
        let mut end = None;
        for left in (0..PIECES_MAX).rev() {
            end = reading.take_piece(&mut decoder, piece);
            if end.is_some() {
                break;
            }
            if left == 0 {
                break; // a piece that was asked for must be taken
            }
            match piece_at_once(&mut answer).await {
                Some(next) => piece = next,
                None => break,
            }
        }
        task.outbox.put_all(&mut reading.events);
        match end {
            None if reading.was_stopped() => return Ok(Done::Short),
            None => {}
            Some(Ok(End::Done)) => return Ok(Done::Rest(answer)),
            Some(Ok(End::Closed)) => return Ok(Done::Whole),
            Some(Err(setback)) => return Err(setback),
        }
    }
}

/// How an answer came to its end.
enum End {
    /// It said so.
    Done,
    /// The connection ended after all choices had.
    Closed,
}

/// What was read of an answer.
struct Reading<'a> {
    task: &'a LegTask,
    source: Option<&'a KvHandle>,
    reader: TokenReader,
    choices: SmallVec<[Progress; 2]>,
    usage: Option<Usage>,
    /// What waits to be passed on together.
    events: Vec<LegEvent>,
    done: bool,
}

struct Progress {
    choice: u32,
    tokens: u32,
    /// Its last token is a stop token.
    at_stop: bool,
    ended: bool,
}

impl<'a> Reading<'a> {
    fn new(task: &'a LegTask, source: Option<&'a KvHandle>) -> Self {
        let logprobs = task.leg.sampling.logprobs;
        let reader = match task.route() {
            TokenRoute::Completions => TokenReader::completions(logprobs),
            TokenRoute::VllmGenerate => TokenReader::vllm_generate(logprobs),
            TokenRoute::SglangGenerate => TokenReader::sglang_generate(logprobs),
        };
        let progress = |&choice| Progress { choice, tokens: 0, at_stop: false, ended: false };
        let choices = task.leg.choices.iter().map(progress).collect();
        Self { task, source, reader, choices, usage: None, events: Vec::new(), done: false }
    }

    /// vLLM repeats the prompt's ids in its first event, SGLang the whole answer in each.
    fn line_limits(&self) -> SseLimits {
        let sampling = &self.task.leg.sampling;
        let tokens = self.task.leg.prompt.tokens.len() + sampling.output_tokens_max as usize;
        let logprobs = sampling.logprobs.map_or(0, |k| (usize::from(k) + 2) * LOGPROB_BYTES);
        let bytes = LINE_BYTES
            .saturating_add(tokens.saturating_mul(TOKEN_BYTES))
            .saturating_add((sampling.output_tokens_max as usize).saturating_mul(logprobs));
        SseLimits { line_bytes_max: bytes, event_bytes_max: bytes }
    }

    /// Whether every choice has ended or was ended.
    fn is_over(&self) -> bool {
        self.choices.iter().all(|choice| choice.ended || self.task.stops.contains(choice.choice))
    }

    /// As [`is_over`](Self::is_over), by the end of the last choice that was not stopped: what was stopped goes on.
    fn was_stopped(&self) -> bool {
        self.choices.len() > 1
            && self.choices.iter().any(|choice| choice.ended)
            && self.is_over()
            && !self.all_ended()
    }

    fn all_ended(&self) -> bool {
        self.choices.iter().all(|choice| choice.ended)
    }

    /// Takes a piece of the body; how the answer ended, if it has.
    fn take_piece(
        &mut self,
        decoder: &mut SseDecoder,
        piece: Option<Result<bytes::Bytes, HttpError>>,
    ) -> Option<Result<End, Setback>> {
        match piece {
            Some(Ok(bytes)) => {
                let mut taken = Ok(());
                let pushed = decoder.push(&bytes, |event| {
                    if taken.is_ok() && !self.done {
                        taken = self.take_event(event.data);
                    }
                });
                if let Err(setback) = taken {
                    return Some(Err(setback));
                }
                if let Err(error) = pushed {
                    return Some(Err(Setback::lie(self.task.engine_name(), error)));
                }
                self.done.then(|| self.conclude().map(|()| End::Done))
            }
            // What an answer lacks after its last choice is of no interest.
            None | Some(Err(_)) if self.all_ended() => Some(self.conclude().map(|()| End::Closed)),
            None => Some(Err(self.cut_off("ended the stream before the answer"))),
            Some(Err(error)) => Some(Err(self.task.broken(&error))),
        }
    }

    fn cut_off(&self, what: &str) -> Setback {
        self.task.engine.trouble();
        Setback::Lost(format!("{} {what}", self.task.engine_name()).into())
    }

    fn take_event(&mut self, data: &str) -> Result<(), Setback> {
        if is_done(data) {
            self.done = true;
            return if self.all_ended() {
                Ok(())
            } else {
                Err(self.cut_off("ended the stream before the answer"))
            };
        }
        let chunk = self.reader.read(data).map_err(|error| self.lie(error))?;
        let Chunk { deltas, usage, fault, prompt } = chunk;
        let asked = &self.task.leg.prompt.tokens;
        if prompt.is_some_and(|prompt| !prompt.is(asked)) {
            return Err(self.lie("computes another prompt than it was given"));
        }
        if let Some(usage) = usage {
            if usage.prompt_tokens.is_some_and(|tokens| tokens as usize != asked.len()) {
                return Err(self.lie("counts another prompt than it was given"));
            }
            self.usage = Some(usage);
        }
        for delta in deltas {
            self.take_delta(delta)?;
        }
        fault.map_or(Ok(()), |fault| Err(self.task.complaint(&fault)))
    }

    fn take_delta(&mut self, delta: Delta) -> Result<(), Setback> {
        let Delta { index, tokens, logprobs, finish } = delta;
        let asked = if self.task.is_greedy() { 1 } else { self.choices.len() };
        let Some(at) = usize::try_from(index).ok().filter(|at| *at < asked) else {
            return Err(self.lie(format_args!("answers for choice {index}, which nobody asked for")));
        };
        if self.choices[at].ended && (!tokens.is_empty() || finish.is_some()) {
            return Err(self.lie("goes on after the end of an answer"));
        }
        let those = if self.task.is_greedy() { 0..self.choices.len() } else { at..at + 1 };
        let mut logprobs = logprobs.into_iter();
        for token in tokens {
            let mut logprobs = logprobs.next().map(Box::new);
            for at in those.clone() {
                let (choice, position) = self.count(at, token)?;
                let logprobs = if at + 1 == those.end { logprobs.take() } else { logprobs.clone() };
                self.speak();
                self.events.push(LegEvent::Token(SampledToken { choice, position, token, logprobs }));
            }
        }
        if let Some(reason) = finish {
            self.speak();
            for choice in &mut self.choices[those] {
                choice.ended = true;
                self.events.push(LegEvent::Finished { choice: choice.choice, reason });
            }
        }
        Ok(())
    }

    fn speak(&mut self) {
        if !self.task.spoke() {
            let cached_tokens = self.usage.and_then(|usage| usage.cached_tokens).unwrap_or(0);
            self.task.speaks(cached_tokens, self.source, &mut self.events);
        }
    }

    /// Counts a token; its choice and position.
    fn count(&mut self, at: usize, token: TokenId) -> Result<(u32, u32), Setback> {
        let sampling = &self.task.leg.sampling;
        if self.task.engine.limits.vocabulary.is_some_and(|vocabulary| token >= vocabulary) {
            return Err(self.lie(format_args!("sends token {token}, which is not in the vocabulary")));
        }
        let choice = &mut self.choices[at];
        if choice.tokens >= sampling.output_tokens_max {
            let what = format_args!("sends more than the {} tokens asked for", sampling.output_tokens_max);
            return Err(Setback::lie(self.task.engine_name(), what));
        }
        if choice.at_stop {
            return Err(Setback::lie(self.task.engine_name(), "goes on after a token that ends the answer"));
        }
        let position = self.task.leg.prompt.tokens.len() as u32 + choice.tokens;
        choice.tokens += 1;
        choice.at_stop = sampling.stop_tokens.contains(&token);
        Ok((choice.choice, position))
    }

    /// The answer has ended: what the engine counted must be what was read.
    fn conclude(&mut self) -> Result<(), Setback> {
        let Some(usage) = self.usage else { return Ok(()) };
        let sent = if self.task.is_greedy() { &self.choices[..1] } else { &self.choices[..] };
        let sent: u32 = sent.iter().map(|choice| choice.tokens).sum();
        if let Some(counted) = usage.output_tokens.filter(|counted| *counted != sent) {
            return Err(self.lie(format_args!("counts {counted} tokens where it sent {sent}")));
        }
        let output_tokens = self.choices.iter().map(|choice| choice.tokens).sum();
        self.events.push(LegEvent::Usage(LegUsage {
            prompt_tokens: self.task.leg.prompt.tokens.len() as u32,
            cached_tokens: usage.cached_tokens.unwrap_or(0),
            output_tokens,
        }));
        Ok(())
    }

    fn lie(&self, what: impl std::fmt::Display) -> Setback {
        Setback::lie(self.task.engine_name(), what)
    }
}
