//! Load and counters, from what engines tell Prometheus, and SGLang's `/v1/loads`.
//!
//! In: the text of `/metrics` of vLLM or SGLang, or the JSON of `/v1/loads`. Out: a [`Scrape`]: [`Figures`] by DP rank,
//! the engine's cache configuration, its models. [`Figures::load`] makes the load of a rank of it, [`steps_between`] what
//! two scrapes say about the speed of its steps. Start at [`Scrape::read`].
//!
//! Invariants: nothing panics; a line that cannot be read is passed over; memory is bounded by [`RANKS_MAX`] and
//! [`MODELS_MAX`], whatever the labels say. The bytes of the text are bounded by whoever fetched it.

mod histograms;
mod loads;
mod steps;
mod text;

use std::collections::{BTreeMap, BTreeSet};

use forebay_types::RankLoad;

pub use histograms::{BOUNDS_MAX, Histogram, Histograms, read_histograms};
pub use loads::read_loads;
pub use steps::{Pace, steps_between};

use crate::discovery::Server;

/// DP ranks that are told apart; what further ones say is passed over.
pub const RANKS_MAX: usize = 1024;
/// Model names that are kept.
pub const MODELS_MAX: usize = 64;

/// What one process told at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scrape {
    /// By DP rank.
    pub ranks: BTreeMap<u16, Figures>,
    /// Names of the models that the figures are of.
    pub models: BTreeSet<String>,
    /// When the process began, in seconds since 1970. Another one means another life of the engine.
    pub started_seconds: Option<f64>,
    /// How KV is kept; of the first rank that says it.
    pub cache: Option<CacheConfig>,
    /// A NIXL connector counts its transfers here, so there is one.
    pub has_nixl: bool,
    /// The engine sleeps: it answers, and computes nothing.
    pub asleep: bool,
    /// Whose metrics these are; `None` if of none that is known.
    server: Option<Server>,
}

/// What vLLM tells of its cache configuration (`vllm:cache_config_info`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CacheConfig {
    /// Tokens of a block.
    pub block_size_tokens: Option<u32>,
    /// Blocks of each rank's pool.
    pub blocks_total: Option<u32>,
    /// `auto` is the model's own.
    pub cache_dtype: Option<String>,
    /// Whether equal beginnings are computed once.
    pub prefix_caching: Option<bool>,
    /// How the engine hashes its blocks.
    pub hash_algorithm: Option<String>,
}

/// A sum of observations and how many they were: what is left of a histogram without its buckets.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sum {
    /// Of all observations: seconds or tokens.
    pub sum: f64,
    /// How many.
    pub count: f64,
}

/// What one rank says. Gauges are of the moment; counters of the time since the process began.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Figures {
    /// Sequences in the running batch.
    pub running: f64,
    /// Sequences that wait for their first step.
    pub waiting: f64,
    /// Prompt tokens that waiting sequences still need computed, where the engine says so (SGLang).
    pub waiting_tokens: Option<f64>,
    /// Share of the pool in use by sequences, 0 to 1.
    pub pool_used: f64,
    /// Tokens of the pool, where the engine says so (SGLang).
    pub pool_tokens: Option<f64>,
    /// Sequences that were preempted.
    pub preemptions: f64,
    /// Prompt tokens accepted.
    pub prompt_tokens: f64,
    /// Of those, from the rank's own prefix cache.
    pub cached_tokens: f64,
    /// Of those, computed here; `None`: not told, what is not cached was.
    pub computed_tokens: Option<f64>,
    /// Of those, brought from another engine.
    pub transferred_tokens: f64,
    /// Tokens generated.
    pub output_tokens: f64,
    /// Seconds between two tokens of one sequence.
    pub token_gaps: Sum,
    /// Seconds from a sequence's first step to its first token.
    pub prefills: Sum,
    /// Tokens computed in those, one observation a sequence.
    pub prefill_tokens: Sum,
    /// Seconds spent on prefill steps, where the engine says so (SGLang).
    pub prefill_busy_seconds: Option<f64>,
    /// Transfers of KV that failed.
    pub transfers_failed: f64,
    /// Prefill legs whose KV nobody came for in time.
    pub holds_expired: f64,
}

impl Scrape {
    /// Reads Prometheus' text format. Families that are not known are passed over, so an engine of another kind gives an
    /// empty scrape.
    pub fn read(text: &[u8]) -> Self {
        text::read(text)
    }

    /// Whose metrics these are, by the prefix of their names.
    pub fn server(&self) -> Option<Server> {
        self.server
    }

    /// Whether its process is another one than that which began at `seconds` since 1970.
    pub fn of_another_process(&self, seconds: f64) -> bool {
        // A process works its start out once; Linux tells it with 10 ms.
        self.started_seconds.is_some_and(|started| (started - seconds).abs() > 0.005)
    }

    /// Whether the process of `later` is another one than this one's: it began at another time or, where that is not
    /// told, its counters went back.
    pub fn restarted(&self, later: &Self) -> bool {
        match self.started_seconds {
            Some(before) if later.started_seconds.is_some() => later.of_another_process(before),
            _ => self.ranks.iter().any(|(rank, before)| {
                later.ranks.get(rank).is_some_and(|after| {
                    after.prompt_tokens < before.prompt_tokens || after.output_tokens < before.output_tokens
                })
            }),
        }
    }
}

/// The KV pool of a rank, as found when the engine was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// 0 if nobody knows.
    pub blocks_total: u32,
    /// At least 1.
    pub block_size_tokens: u32,
}

impl Pool {
    fn tokens(self) -> f64 {
        f64::from(self.blocks_total) * f64::from(self.block_size_tokens)
    }
}

impl Figures {
    /// The load that these figures show.
    ///
    /// Engines do not tell apart which running sequences still compute their prompt: all count as decoding. What waiting
    /// ones need computed is told by SGLang; elsewhere it is `waiting` times what a prompt of late took
    /// ([`Pace::prefill_tokens_mean`]). The context that a decode step reads is taken to be all of the pool that
    /// sequences use.
    pub fn load(&self, pool: Pool, pace: &Pace) -> RankLoad {
        let used = self.pool_used.clamp(0.0, 1.0);
        let per_prompt = pace.prefill_tokens_mean.unwrap_or(0.0);
        RankLoad {
            waiting: whole(self.waiting),
            running: whole(self.running),
            decoding: whole(self.running),
            prefill_tokens: whole(self.waiting_tokens.unwrap_or(self.waiting * per_prompt)),
            context_tokens: whole(used * pool.tokens()),
            blocks_total: pool.blocks_total,
            blocks_free: whole((1.0 - used) * f64::from(pool.blocks_total)),
            preemptions: whole(self.preemptions),
            cached_tokens: whole(self.cached_tokens),
            prompt_tokens: whole(self.prompt_tokens),
        }
    }

    /// Prompt tokens that were computed here since the process began.
    fn computed(&self) -> f64 {
        self.computed_tokens
            .unwrap_or((self.prompt_tokens - self.cached_tokens - self.transferred_tokens).max(0.0))
    }
}

/// The nearest whole number that `N` can hold; 0 for what is no number.
fn whole<N: TryFrom<u64> + Bounded>(value: f64) -> N {
    // `as` saturates, and makes 0 of NaN.
    N::try_from(value.round() as u64).unwrap_or(N::MOST)
}

trait Bounded {
    const MOST: Self;
}

impl Bounded for u32 {
    const MOST: Self = u32::MAX;
}

impl Bounded for u64 {
    const MOST: Self = u64::MAX;
}

#[cfg(test)]
mod tests;
