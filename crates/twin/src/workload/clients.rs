//! A mix of clients, each with a rate and a burstiness of its own that change with the hour: ServeGen's form of a service's load.
//!
//! In: for each client, the text of `chunk-N-trace.csv` (`start,rate,cv,pattern,shape,scale`; seconds, requests a second; no pattern:
//! nothing comes) and of `chunk-N-dataset.json` (by start, `input_tokens` and `output_tokens`: probabilities by length, written
//! as Python writes a dict). Out: a [`Trace`] whose tenants are the clients; prompts share nothing. Start at [`ClientMix::trace`].
//!
//! A client's requests are a renewal process in operational time, which passes as its rate says: gaps have a mean of 1 and the
//! shape of the window in which they begin, so that windows have their rates whatever the shape (Cox and Lewis, The Statistical
//! Analysis of Series of Events, 1966). The first gap is what is left of one that began long ago: drawn by length, cut evenly.

mod read;

use super::{Trace, TraceError, TraceRequest};
use crate::draw::Draw;

/// Length of a window that has no other one to tell it.
const WINDOW_SECONDS: f64 = 600.0;
/// Requests that are drawn at most.
const REQUESTS_MAX: f64 = 2e7;

/// How gaps between a client's requests are distributed about their mean.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Renewal {
    Gamma { shape: f64 },
    Weibull { shape: f64 },
}

/// A stretch of time in which a client's rate stays.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Window {
    /// Seconds.
    start: f64,
    /// Requests a second; 0 if nothing comes.
    rate: f64,
    renewal: Renewal,
}

/// Lengths and how likely each one or a shorter one is, up to 1.
#[derive(Debug, Clone, PartialEq, Default)]
struct LengthTable(Vec<(u32, f64)>);

/// Lengths from `start` on.
#[derive(Debug, Clone, PartialEq)]
struct LengthsFrom {
    start: f64,
    input: LengthTable,
    output: LengthTable,
}

#[derive(Debug, Clone, PartialEq)]
struct Client {
    name: String,
    /// In order.
    windows: Vec<Window>,
    /// In order, at least one.
    lengths: Vec<LengthsFrom>,
}

/// Clients of a service.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClientMix {
    clients: Vec<Client>,
    /// Those that never sent anything whose length is known.
    pub silent: usize,
}

/// What is drawn of a mix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Excerpt {
    /// Seconds of the mix's time at which it begins.
    pub from_seconds: f64,
    /// Seconds of the mix's time.
    pub seconds: f64,
    /// Requests a second, in the mean, of all clients; `None`: as many as there were.
    pub rate: Option<f64>,
}

impl Renewal {
    /// A gap; 1 in the mean.
    fn gap(self, draw: &mut Draw) -> f64 {
        match self {
            Self::Gamma { shape } => draw.gamma(shape) / shape,
            Self::Weibull { shape } => draw.exponential(1.0).powf(1.0 / shape) / weibull_mean(shape),
        }
    }

    /// What is left of a gap at any moment. A gap is met in proportion to its length, which of a gamma is a gamma of a shape
    /// larger by 1, and of a Weibull's power `shape` one of shape 1 + 1 / `shape`.
    fn rest(self, draw: &mut Draw) -> f64 {
        let whole = match self {
            Self::Gamma { shape } => draw.gamma(shape + 1.0) / shape,
            Self::Weibull { shape } => draw.gamma(1.0 + 1.0 / shape).powf(1.0 / shape) / weibull_mean(shape),
        };
        whole * draw.unit()
    }
}

/// Mean of a Weibull distribution of scale 1: Γ(1 + 1 / `shape`).
fn weibull_mean(shape: f64) -> f64 {
    ln_gamma(1.0 + 1.0 / shape).exp()
}

/// Stirling's series, from 8 up; below by Γ(x + 1) = x Γ(x). To 1e-10.
fn ln_gamma(x: f64) -> f64 {
    let mut below = 0.0;
    let mut x = x;
    while x < 8.0 {
        below += x.ln();
        x += 1.0;
    }
    let inverse = 1.0 / x;
    let square = inverse * inverse;
    let series = inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square * (1.0 / 1260.0 - square / 1680.0)));
    (x - 0.5) * x.ln() - x + 0.5 * std::f64::consts::TAU.ln() + series - below
}

impl LengthTable {
    fn draw(&self, draw: &mut Draw) -> u32 {
        let at = draw.unit();
        let index = self.0.partition_point(|(_, up_to)| *up_to < at);
        self.0.get(index).or(self.0.last()).map_or(1, |(tokens, _)| *tokens).max(1)
    }
}

impl Client {
    /// Its windows within the excerpt: begin, end, requests a second, shape of gaps.
    fn within(&self, excerpt: &Excerpt) -> impl Iterator<Item = (f64, f64, f64, Renewal)> {
        let (from, to) = (excerpt.from_seconds, excerpt.from_seconds + excerpt.seconds);
        let ends = self.windows.iter().skip(1).map(|window| window.start).chain([self.end_seconds()]);
        let cut = self
            .windows
            .iter()
            .zip(ends)
            .map(move |(window, end)| (window.start.max(from), end.min(to), window.rate, window.renewal));
        cut.filter(|(begin, end, ..)| begin < end)
    }

    /// When its last window ends: it is as long as the one before.
    fn end_seconds(&self) -> f64 {
        match self.windows[..] {
            [.., before, last] => last.start + (last.start - before.start),
            [only] => only.start + WINDOW_SECONDS,
            [] => 0.0,
        }
    }

    /// When its requests come, `factor` times as many as there were.
    fn arrivals(&self, excerpt: &Excerpt, factor: f64, draw: &mut Draw) -> Vec<f64> {
        let mut arrivals = Vec::new();
        // Operational time until the next.
        let mut left = None;
        for (begin, end, rate, renewal) in self.within(excerpt) {
            let rate = rate * factor;
            if rate <= 0.0 {
                continue;
            }
            let mut at = begin;
            loop {
                let gap = left.take().unwrap_or_else(|| renewal.rest(draw));
                let next = at + gap / rate;
                if next >= end {
                    left = Some(gap - (end - at) * rate);
                    break;
                }
                arrivals.push(next);
                at = next;
                left = Some(renewal.gap(draw));
            }
        }
        arrivals
    }

    fn lengths_at(&self, at: f64) -> &LengthsFrom {
        let index = self.lengths.partition_point(|lengths| lengths.start <= at);
        &self.lengths[index.saturating_sub(1)]
    }
}

impl ClientMix {
    /// Adds a client, from the text of its two files.
    ///
    /// # Errors
    /// The first line that is wrong, and of which text.
    pub fn add(&mut self, name: &str, windows: &str, lengths: &str) -> Result<(), ClientError> {
        let windows = read::windows(windows).map_err(ClientError::Windows)?;
        let lengths = read::lengths(lengths).map_err(ClientError::Lengths)?;
        if lengths.is_empty() || windows.iter().all(|window| window.rate <= 0.0) {
            self.silent += 1;
        } else {
            self.clients.push(Client { name: name.to_owned(), windows, lengths });
        }
        Ok(())
    }

    /// Clients that send something.
    pub fn sending(&self) -> usize {
        self.clients.len()
    }

    /// When its last window ends, seconds.
    pub fn end_seconds(&self) -> f64 {
        self.clients.iter().map(Client::end_seconds).fold(0.0, f64::max)
    }

    /// Its requests, in order; times count from the beginning of the excerpt.
    ///
    /// # Errors
    /// None come then, or too many.
    pub fn trace(&self, excerpt: &Excerpt, seed: u64) -> Result<Trace, String> {
        let count = |client: &Client| {
            client.within(excerpt).map(|(begin, end, rate, _)| rate * (end - begin)).sum::<f64>()
        };
        let expected: f64 = self.clients.iter().map(count).sum();
        if expected <= 0.0 {
            return Err(format!(
                "no client sends anything from {} s on, for {} s; its windows end at {} s",
                excerpt.from_seconds,
                excerpt.seconds,
                self.end_seconds()
            ));
        }
        let factor = excerpt.rate.map_or(1.0, |rate| rate * excerpt.seconds / expected);
        if expected * factor > REQUESTS_MAX {
            return Err(format!(
                "{:.0} requests in {} s; draw fewer than {REQUESTS_MAX:.0}: give --rate or --seconds",
                expected * factor,
                excerpt.seconds
            ));
        }
        let mut requests = Vec::new();
        for (client, tenant) in self.clients.iter().zip(0..) {
            // By name, so that another client more changes nothing for this one.
            let mut times = Draw::new(seed, &format!("{}: arrivals", client.name));
            let mut sizes = Draw::new(seed, &format!("{}: lengths", client.name));
            for at in client.arrivals(excerpt, factor, &mut times) {
                let lengths = client.lengths_at(at);
                requests.push(TraceRequest {
                    at_seconds: at - excerpt.from_seconds,
                    prompt_tokens: lengths.input.draw(&mut sizes),
                    output_tokens: lengths.output.draw(&mut sizes),
                    blocks: Vec::new(),
                    block_tokens: 1,
                    tenant,
                    session: None,
                    observed: None,
                });
            }
        }
        if requests.is_empty() {
            return Err(format!("nothing was drawn where {:.3} requests are expected", expected * factor));
        }
        requests.sort_by(|a, b| a.at_seconds.total_cmp(&b.at_seconds));
        let tenants = self.clients.iter().map(|client| client.name.clone()).collect();
        Ok(Trace { requests, tenants, skipped: 0 })
    }
}

/// Which file of a client is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The one of its rates.
    #[error(transparent)]
    Windows(TraceError),
    /// The one of its lengths: what is wrong, and where.
    #[error("{0}")]
    Lengths(String),
}

#[cfg(test)]
mod tests;
