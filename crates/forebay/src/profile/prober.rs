//! Measures one point: sends what it takes, and reads the times.
//!
//! In: a [`Point`]. Out: an [`Outcome`], or an error if the engine is gone. Start at [`Prober::measure`]. Before each
//! measurement the engine must be idle, and after it the engine must have counted no more prompt tokens than were sent: else
//! others use it, and the measurement counts for nothing.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_engines::{Driver as _, FirstToken, KvHandle, Leg, Prompt, StartError, Work};
use forebay_profiler::{Outcome, Pace, Point, Sample, probe_tokens, step_tokens, trace};
use forebay_types::{BlockHash, LegId, Sampling, TokenId};
use tokio::time::{sleep_until, timeout};

use super::{
    prompts::{Prompts, VOCABULARIES},
    streams::{End, Heard, Streams, TRAIL, ended, enough},
    target::{Look, Target},
};
use crate::exit::{Exit, Failed};

/// Tokens that each sequence of a batch has got before its steps count: the first ones come while others are prefilled.
const SETTLE: usize = 3;
/// Tokens of each sequence that then count, at least.
const WINDOW: usize = 33;
/// Tokens that each sequence of a batch may generate besides those that come while others are prefilled.
const OUTPUT_TOKENS: u64 = 2_048;
/// Tokens after which a prompt is sent beside a batch.
const LEAD: usize = 17;
/// Sequences that decode while the cost of starting a hand-over is measured.
const BESIDE_HANDOVER: u32 = 2;
/// Prompts that show how many tokens the engine puts into a step.
const PROBES: u32 = 3;
/// Looks at an engine that should be idle and is not yet, and how far apart.
const LOOKS: u32 = 6;
const LOOK_PAUSE: Duration = Duration::from_millis(150);
/// Longest that any one request may run.
const REQUEST_MAX: Duration = Duration::from_secs(600);
/// Longest that the first requests may take: engines compile while they run.
const FIRST_MAX: Duration = Duration::from_secs(120);

/// Which engine a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Engine,
    Pair,
}

/// Measures one engine, or a pair.
pub(super) struct Prober<'a> {
    engine: &'a Target,
    pair: Option<&'a Target>,
    prompts: Prompts,
    step_tokens: u32,
    /// What others do there does not matter.
    pub(super) ignores_others: bool,
    legs: u64,
    /// Prompt tokens sent to the engine since its metrics were looked at.
    sent_tokens: u64,
    /// How much of the repeated prompt should be cached.
    repeated: u32,
}

/// Either what was waited for, or what the whole attempt comes to instead.
type Awaited<T> = Result<T, Outcome>;

impl<'a> Prober<'a> {
    pub(super) fn new(engine: &'a Target, pair: Option<&'a Target>, seed: u64) -> Self {
        let prompts = Prompts::new(seed, VOCABULARIES[0]);
        let step_tokens = engine.facts.step_tokens_max;
        Self {
            engine,
            pair,
            prompts,
            step_tokens,
            ignores_others: false,
            legs: 0,
            sent_tokens: 0,
            repeated: 0,
        }
    }

    /// The first requests: which tokens the engine takes, and how fast it seems to be.
    ///
    /// # Errors
    /// If it does not answer a short prompt.
    pub(super) async fn warm_up(&mut self, seed: u64, longest: u32) -> anyhow::Result<Pace> {
        for (turn, vocabulary) in VOCABULARIES.into_iter().enumerate() {
            self.prompts = Prompts::new(seed, vocabulary);
            let prompt = self.prompts.fresh(16);
            let tried = timeout(FIRST_MAX, self.alone(Side::Engine, prompt, 2));
            let heard = tried
                .await
                .map_err(|_| failed("it did not answer a short prompt within two minutes".to_owned()))?;
            match heard.end {
                Some(End::Finished) => break,
                Some(End::Refused(StartError::Rejected { .. })) if turn + 1 < VOCABULARIES.len() => {}
                end => return Err(self.no_answer(end)),
            }
        }
        let length = longest.clamp(17, 512);
        let (mut short, mut long) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..3 {
            short = short.min(self.prompt_seconds(16).await?);
            long = long.min(self.prompt_seconds(length).await?);
        }
        let step_seconds = match Box::pin(self.decode(1, 16)).await? {
            Outcome::Measured(sample) => sample.seconds,
            _ => short,
        };
        Ok(Pace {
            request_seconds: (short - step_seconds).max(1e-4),
            prefill_token_seconds: ((long - short) / f64::from(length - 16)).max(1e-8),
            step_seconds,
            step_tokens: self.step_tokens,
        })
    }

    /// Finds out how many tokens the engine puts into a step, with prompts that take `seconds_max` at most; what it was
    /// taken to be where that shows nothing.
    ///
    /// # Errors
    /// If the engine is gone.
    pub(super) async fn find_step_tokens(
        &mut self,
        pace: &Pace,
        longest: u32,
        seconds_max: f64,
    ) -> anyhow::Result<u32> {
        let affordable = (seconds_max / f64::from(PROBES) / pace.prefill_token_seconds) as u32;
        let Some(tokens) = probe_tokens(longest.min(affordable)) else { return Ok(self.step_tokens) };
        let mut counts = Vec::new();
        // What an engine does for the first time, and what delays a token, looks like a chunk more.
        for _ in 0..PROBES {
            let mut streams = Streams::new(Instant::now());
            let seen = Box::pin(self.prompt_beside(&mut streams, 1, 16, tokens)).await?;
            if let Ok(seen) = seen {
                let arrivals = &streams.arrivals(1)[0];
                counts.push(trace::long_steps(arrivals, seen.sent, seen.first, seen.usual_seconds));
            }
        }
        if let Some(steps) = counts.into_iter().filter(|steps| *steps > 0).min() {
            self.step_tokens = step_tokens(tokens, steps, self.engine.facts.step_tokens_max);
        }
        Ok(self.step_tokens)
    }

    /// The operator knows it.
    pub(super) fn set_step_tokens(&mut self, tokens: u32) {
        self.step_tokens = tokens;
    }

    /// One attempt at a point.
    ///
    /// # Errors
    /// If the engine is gone.
    pub(super) async fn measure(&mut self, point: Point) -> anyhow::Result<Outcome> {
        let before = self.idle().await?;
        if !self.ignores_others && before.is_some_and(|look| look.requests > 0.0) {
            return Ok(Outcome::Disturbed);
        }
        self.sent_tokens = 0;
        // Boxed: the futures of batches are large.
        let outcome = match point {
            Point::Prefill { new_tokens, cached_tokens: 0 } => self.prefill(new_tokens).await?,
            Point::Prefill { new_tokens, cached_tokens } => self.cached(new_tokens, cached_tokens).await?,
            Point::Decode { sequences, context_tokens } => {
                Box::pin(self.decode(sequences, context_tokens)).await?
            }
            Point::Mixed { new_tokens, sequences, context_tokens } => {
                Box::pin(self.mixed(new_tokens, sequences, context_tokens)).await?
            }
            Point::Handover { tokens } => Box::pin(self.hand_over(tokens)).await?,
        };
        if !self.ignores_others
            && let (Some(before), Some(after)) = (before, self.engine.look().await)
            && after.prompt_tokens - before.prompt_tokens > self.sent_tokens as f64
        {
            return Ok(Outcome::Disturbed);
        }
        if outcome == Outcome::Missed {
            self.check_alive().await?;
        }
        Ok(outcome)
    }

    /// A request that came to nothing may have met an engine that had just died, or whose connections did: not every such
    /// end tells the two apart.
    async fn check_alive(&self) -> anyhow::Result<()> {
        for target in [Some(self.engine), self.pair].into_iter().flatten() {
            if let Err(reason) = target.answers().await {
                return Err(self.lost(&reason));
            }
        }
        Ok(())
    }

    /// Waits until the engine is idle; the last look at it. vLLM's gauges stand still once it is idle, perhaps at requests
    /// that were cancelled: a short prompt moves them.
    async fn idle(&mut self) -> anyhow::Result<Option<Look>> {
        let mut look = self.engine.look().await;
        for _ in 0..LOOKS {
            if self.ignores_others || look.is_none_or(|look| look.requests == 0.0) {
                break;
            }
            sleep_until(tokio::time::Instant::now() + LOOK_PAUSE).await;
            let prompt = self.prompts.fresh(4);
            self.alone(Side::Engine, prompt, 1).await;
            look = self.engine.look().await;
        }
        Ok(look)
    }

    async fn prefill(&mut self, new_tokens: u32) -> anyhow::Result<Outcome> {
        let prompt = self.prompts.fresh(new_tokens);
        let heard = self.alone(Side::Engine, prompt, 1).await;
        self.first_token(&heard, Sample::default())
    }

    async fn cached(&mut self, new_tokens: u32, cached_tokens: u32) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::Missed;
        // What was sent before may have been evicted meanwhile: then it is sent once more.
        for _ in 0..2 {
            if self.repeated < cached_tokens {
                let prompt = self.prompts.repeated(cached_tokens);
                let heard = self.alone(Side::Engine, prompt, 1).await;
                match self.first_token(&heard, Sample::default())? {
                    Outcome::Measured(_) => self.repeated = cached_tokens,
                    other => return Ok(other),
                }
            }
            let before = self.engine.look().await;
            let prompt = self.prompts.repeated_then_fresh(cached_tokens, new_tokens);
            let heard = self.alone(Side::Engine, prompt, 1).await;
            // Engines that do not tell it of a request count it all the same.
            let counted = before.zip(self.engine.look().await);
            let counted = counted.map_or(0.0, |(before, after)| after.cached_tokens - before.cached_tokens);
            let found = heard.cached_tokens.max(counted.clamp(0.0, f64::from(cached_tokens)) as u32);
            if found > 0 {
                outcome = self.first_token(&heard, Sample { cached_tokens: found, ..Sample::default() })?;
            }
            if found >= cached_tokens {
                break;
            }
            self.repeated = 0;
        }
        Ok(outcome)
    }

    async fn decode(&mut self, sequences: u32, context_tokens: u32) -> anyhow::Result<Outcome> {
        let mut streams = Streams::new(Instant::now());
        let from = match self.batch(&mut streams, Side::Engine, sequences, context_tokens).await? {
            Ok(from) => from,
            Err(outcome) => return Ok(outcome),
        };
        let count = sequences as usize;
        let to = streams.until(|heard| enough(&heard[..count], from, WINDOW)).await;
        let arrivals = streams.arrivals(count);
        let Some(seconds) = trace::decode_step(&arrivals, from, to) else { return Ok(Outcome::Missed) };
        let context_tokens = trace::context_tokens(&arrivals, context_tokens, from, to);
        Ok(Outcome::Measured(Sample { seconds, context_tokens, ..Sample::default() }))
    }

    async fn mixed(
        &mut self,
        new_tokens: u32,
        sequences: u32,
        context_tokens: u32,
    ) -> anyhow::Result<Outcome> {
        let mut streams = Streams::new(Instant::now());
        let seen = match self.prompt_beside(&mut streams, sequences, context_tokens, new_tokens).await? {
            Ok(seen) => seen,
            Err(outcome) => return Ok(outcome),
        };
        let arrivals = streams.arrivals(sequences as usize);
        let seconds = trace::step_with_more(&arrivals, seen.sent, seen.first, seen.usual_seconds);
        let Some(seconds) = seconds else { return Ok(Outcome::Missed) };
        let context_tokens = trace::context_tokens(&arrivals, context_tokens, seen.sent, seen.first);
        Ok(Outcome::Measured(Sample { seconds, context_tokens, ..Sample::default() }))
    }

    /// Sends a new prompt beside a batch that decodes.
    async fn prompt_beside(
        &mut self,
        streams: &mut Streams,
        sequences: u32,
        context_tokens: u32,
        new_tokens: u32,
    ) -> anyhow::Result<Awaited<Beside>> {
        let from = match self.batch(streams, Side::Engine, sequences, context_tokens).await? {
            Ok(from) => from,
            Err(outcome) => return Ok(Err(outcome)),
        };
        let count = sequences as usize;
        let to = streams.until(|heard| enough(&heard[..count], from, LEAD)).await;
        let Some(usual_seconds) = trace::decode_step(&streams.arrivals(count), from, to) else {
            return Ok(Err(Outcome::Missed));
        };
        let prompt = self.prompts.fresh(new_tokens);
        let leg = self.leg(Side::Engine, prompt, 1, Work::Aggregated);
        self.beside(streams, Side::Engine, leg, count, usual_seconds).await
    }

    /// Sends a request beside the first `count` of `streams`, and waits until those have gone on after its first token.
    async fn beside(
        &self,
        streams: &mut Streams,
        side: Side,
        leg: Leg,
        count: usize,
        usual_seconds: f64,
    ) -> anyhow::Result<Awaited<Beside>> {
        let sent = streams.now();
        let number = streams.send(&*self.target(side).driver, leg);
        let heard = streams.ended(number).await;
        let Some(&first) = heard.arrivals.first().filter(|_| !heard.kv_failed) else {
            return self.instead(heard.end).map(Err);
        };
        streams.until(|heard| enough(&heard[..count], first, TRAIL)).await;
        if streams.until(|heard| Some(heard[..count].iter().any(|heard| heard.end.is_some()))).await {
            return Ok(Err(Outcome::Missed)); // what should have decoded beside it was over
        }
        Ok(Ok(Beside { sent, first, usual_seconds }))
    }

    async fn hand_over(&mut self, tokens: u32) -> anyhow::Result<Outcome> {
        let mut streams = Streams::new(Instant::now());
        let seen = match self.handed(&mut streams, tokens, 0, 0.0).await? {
            Ok(seen) => seen,
            Err(outcome) => return Ok(outcome),
        };
        let seconds = seen.first - seen.sent;
        let mut sample = Sample { seconds, ..Sample::default() };
        let mut streams = Streams::new(Instant::now());
        let count = BESIDE_HANDOVER as usize;
        if let Ok(from) = self.batch(&mut streams, Side::Pair, BESIDE_HANDOVER, 16).await? {
            let to = streams.until(|heard| enough(&heard[..count], from, LEAD)).await;
            let usual = trace::decode_step(&streams.arrivals(count), from, to).unwrap_or(0.0);
            if let Ok(seen) = self.handed(&mut streams, tokens, count, usual).await? {
                let longest = trace::longest_gap(&streams.arrivals(count), seen.sent, seen.first);
                sample.start_seconds = longest.map(|longest| (longest - usual).max(0.0));
            }
        }
        Ok(Outcome::Measured(sample))
    }

    /// Computes a prompt on the engine and goes on from its KV on the other.
    async fn handed(
        &mut self,
        streams: &mut Streams,
        tokens: u32,
        count: usize,
        usual_seconds: f64,
    ) -> anyhow::Result<Awaited<Beside>> {
        let prompt = self.prompts.fresh(tokens);
        let leg = self.leg(Side::Engine, prompt.clone(), 1, Work::Prefill);
        let (source, id) = (self.engine, leg.id);
        let number = streams.send(&*source.driver, leg);
        let heard = streams.until(|all| {
            all[number].kv.as_ref().map(|_| all[number].clone()).or_else(|| ended(&all[number]))
        });
        let heard = heard.await;
        let Some(kv) = heard.kv.filter(|kv: &KvHandle| kv.first == FirstToken::OfDecode) else {
            return self.instead(heard.end).map(Err);
        };
        let leg = self.leg(Side::Pair, prompt, 1, Work::Decode { kv, first: Vec::new() });
        let seen = self.beside(streams, Side::Pair, leg, count, usual_seconds).await;
        source.driver.release_kv(id);
        seen
    }

    /// Starts a batch on one side and waits until all of it decodes: since when.
    async fn batch(
        &mut self,
        streams: &mut Streams,
        side: Side,
        sequences: u32,
        context_tokens: u32,
    ) -> anyhow::Result<Awaited<f64>> {
        // The first to decode must still do so when the last one begins, and through all that is measured.
        let prefill_steps =
            u64::from(sequences) * u64::from(context_tokens) / u64::from(self.step_tokens.max(1));
        let output = OUTPUT_TOKENS + 4 * prefill_steps + 4 * u64::from(sequences);
        let room = self.target(side).facts.context_tokens_max.saturating_sub(context_tokens + 1);
        let output = u32::try_from(output).unwrap_or(u32::MAX).min(room);
        for sequence in 0..sequences {
            let prompt = self.prompts.of_sequence(sequence, context_tokens);
            let leg = self.leg(side, prompt, output, Work::Aggregated);
            streams.send(&*self.target(side).driver, leg);
        }
        let begun = |heard: &[Heard]| {
            let all = heard.iter().all(|heard| heard.arrivals.len() >= SETTLE);
            let last = || heard.iter().map(|heard| heard.arrivals[SETTLE - 1]).fold(0.0, f64::max);
            if all { Some(Ok(last())) } else { heard.iter().find_map(ended).map(Err) }
        };
        match streams.until(begun).await {
            Ok(from) => Ok(Ok(from)),
            // Some ended before others began: it does not run so many at once.
            Err(Heard { end: Some(End::Finished), .. }) => Ok(Err(Outcome::TooLarge)),
            Err(heard) => self.instead(heard.end).map(Err),
        }
    }

    /// A request alone; times are counted from when it was sent.
    async fn alone(&mut self, side: Side, prompt: Arc<[TokenId]>, output_tokens: u32) -> Heard {
        let leg = self.leg(side, prompt, output_tokens, Work::Aggregated);
        let mut streams = Streams::new(Instant::now());
        let number = streams.send(&*self.target(side).driver, leg);
        streams.ended(number).await
    }

    async fn prompt_seconds(&mut self, tokens: u32) -> anyhow::Result<f64> {
        let prompt = self.prompts.fresh(tokens);
        let heard = self.alone(Side::Engine, prompt, 1).await;
        heard.arrivals.first().copied().ok_or_else(|| self.no_answer(heard.end))
    }

    fn first_token(&self, heard: &Heard, sample: Sample) -> anyhow::Result<Outcome> {
        match heard.arrivals.first() {
            Some(&seconds) => Ok(Outcome::Measured(Sample { seconds, ..sample })),
            None => self.instead(heard.end.clone()),
        }
    }

    /// What an attempt comes to whose request ended so.
    fn instead(&self, end: Option<End>) -> anyhow::Result<Outcome> {
        match end {
            Some(End::Lost(reason)) => Err(self.lost(&reason)),
            Some(End::Refused(
                StartError::TooLong { .. } | StartError::QueueFull { .. } | StartError::Rejected { .. },
            )) => Ok(Outcome::TooLarge),
            Some(End::Refused(_) | End::Finished) | None => Ok(Outcome::Missed),
        }
    }

    fn target(&self, side: Side) -> &'a Target {
        match side {
            Side::Engine => self.engine,
            Side::Pair => self.pair.unwrap_or(self.engine),
        }
    }

    fn leg(&mut self, side: Side, tokens: Arc<[TokenId]>, output_tokens_max: u32, work: Work) -> Leg {
        self.legs += 1;
        if side == Side::Engine {
            self.sent_tokens += tokens.len() as u64;
        }
        Leg {
            id: LegId(self.legs),
            request: format!("profile-{}", self.legs).into(),
            dp_rank: 0,
            prompt: Prompt { tokens, hashes: [].into(), root: BlockHash(0), salt: "".into() },
            choices: vec![0],
            sampling: Arc::new(Sampling {
                temperature: 0.0,
                top_p: 1.0,
                top_k: 0,
                seed: 0,
                output_tokens_max,
                stop_tokens: [].into(),
                logprobs: None,
            }),
            work,
            body: None,
            deadline: Instant::now() + REQUEST_MAX,
        }
    }

    fn lost(&self, reason: &str) -> anyhow::Error {
        let mut names = self.engine.facts.engine.to_string();
        if let Some(pair) = self.pair {
            names += &format!(" or {}", pair.facts.engine);
        }
        failed(format!("engine {names} was lost: {reason}; look at its log, start it, and measure again"))
    }

    fn no_answer(&self, end: Option<End>) -> anyhow::Error {
        match end {
            Some(End::Lost(reason)) => self.lost(&reason),
            Some(End::Refused(error)) => {
                failed(format!("engine {} refuses a short prompt: {error}", self.engine.facts.engine))
            }
            _ => failed(format!("engine {} answers a short prompt with nothing", self.engine.facts.engine)),
        }
    }
}

/// When a request was sent beside others and when its first token came, and what a step took before it.
#[derive(Debug, Clone, Copy)]
struct Beside {
    sent: f64,
    first: f64,
    usual_seconds: f64,
}

fn failed(sentence: String) -> anyhow::Error {
    Failed { exit: Exit::Failure, sentence }.into()
}
