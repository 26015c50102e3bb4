//! SGLang's `/v1/loads`. Written from its sources; never read from a real server.

use serde_json::Value;

use super::{RANKS_MAX, Scrape};
use crate::discovery::{Server, Unreadable};

/// Reads `/v1/loads`, with or without its optional sections. It has no counters of tokens: of a server that has
/// `/metrics`, read that as well and let [`Scrape::with_loads`] join the two.
///
/// # Errors
/// If it is no JSON object with a list `loads`.
pub fn read_loads(body: &[u8]) -> Result<Scrape, Unreadable> {
    let document: Value = serde_json::from_slice(body)
        .map_err(|error| Unreadable::NotJson { line: error.line(), column: error.column() })?;
    let loads = document.get("loads").and_then(Value::as_array);
    let loads = loads.ok_or(Unreadable::Shape { missing: "list `loads`" })?;
    let mut scrape = Scrape { server: Some(Server::Sglang), ..Scrape::default() };
    for load in loads.iter().take(RANKS_MAX) {
        let number = |key: &str| load.get(key).and_then(Value::as_f64).filter(|value| value.is_finite());
        let Some(rank) =
            load.get("dp_rank").and_then(Value::as_u64).and_then(|rank| u16::try_from(rank).ok())
        else {
            continue;
        };
        let figures = scrape.ranks.entry(rank).or_default();
        figures.running = number("num_running_reqs").unwrap_or_default();
        figures.waiting = number("num_waiting_reqs").unwrap_or_default();
        figures.waiting_tokens = number("num_waiting_uncached_tokens");
        figures.pool_used = number("token_usage").unwrap_or_default();
        figures.pool_tokens = number("max_total_num_tokens");
        figures.computed_tokens = number("total_prefill_uncached_tokens");
        figures.prefill_busy_seconds = number("total_prefill_busy_us").map(|micros| micros / 1e6);
    }
    Ok(scrape)
}

impl Scrape {
    /// Joins what `/metrics` says with what `/v1/loads` said at the same moment, which knows more of the moment.
    #[must_use]
    pub fn with_loads(mut self, loads: &Self) -> Self {
        for (rank, told) in &loads.ranks {
            let figures = self.ranks.entry(*rank).or_default();
            figures.running = told.running;
            figures.waiting = told.waiting;
            figures.waiting_tokens = told.waiting_tokens;
            figures.pool_used = told.pool_used;
            figures.pool_tokens = told.pool_tokens.or(figures.pool_tokens);
            figures.computed_tokens = told.computed_tokens.or(figures.computed_tokens);
            figures.prefill_busy_seconds = told.prefill_busy_seconds;
        }
        self.server = self.server.or(loads.server);
        self
    }
}
