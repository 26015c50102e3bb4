//! One request: the times of its events, and what they come to.

/// What a server says that a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Of them, those that were cached; `None` if it does not say.
    pub cached_tokens: Option<u64>,
    /// Tokens of the answer.
    pub output_tokens: u64,
}

/// Latencies that a client is promised. Infinite for none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Promise {
    /// Time to the first token, at most.
    pub ttft_seconds: f64,
    /// Mean time between the tokens of one answer, at most.
    pub itl_seconds: f64,
}

/// Why a request has no answer, or not all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One of few: `status 429`, `refused`, `timeout`.
    pub kind: String,
    /// The first words about it.
    pub message: String,
}

/// Takes the times of one request, in seconds of any clock.
#[derive(Debug, Clone)]
pub struct Recorder {
    due: f64,
    sent: f64,
    first: Option<f64>,
    last: f64,
    /// Between one event with content and the next. No more than an answer has tokens.
    gaps: Vec<f32>,
}

/// One request that ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// When it was sent ...
    pub sent: f64,
    /// ... and over.
    pub ended: f64,
    /// How long after it was due it was sent.
    pub lateness: f64,
    /// From when it was due to its first token; `None` where none was seen.
    pub ttft: Option<f64>,
    /// Mean time between its tokens.
    pub itl_mean: Option<f64>,
    /// Times between its events with content.
    pub gaps: Vec<f32>,
    /// Tokens of its answer: as the server counts them, or else events with content.
    pub output_tokens: u64,
    /// What the server said.
    pub usage: Option<Usage>,
    /// Why it is no answer.
    pub failure: Option<Failure>,
}

impl Recorder {
    /// A request that was due at `due` and is sent at `sent`.
    pub fn new(due: f64, sent: f64) -> Self {
        Self { due, sent, first: None, last: sent, gaps: Vec::new() }
    }

    /// A piece of content came.
    pub fn content(&mut self, at: f64) {
        if self.first.is_none() {
            self.first = Some(at);
        } else {
            self.gaps.push((at - self.last) as f32);
        }
        self.last = at;
    }

    /// It is over.
    pub fn end(self, ended: f64, usage: Option<Usage>, failure: Option<Failure>) -> Outcome {
        let seen = self.gaps.len() as u64 + u64::from(self.first.is_some());
        let output_tokens = usage.map_or(seen, |usage| usage.output_tokens);
        let between = output_tokens.saturating_sub(1);
        let itl_mean = self.first.filter(|_| between > 0).map(|first| (self.last - first) / between as f64);
        Outcome {
            sent: self.sent,
            ended,
            lateness: self.sent - self.due,
            ttft: self.first.map(|first| first - self.due),
            itl_mean,
            gaps: self.gaps,
            output_tokens,
            usage,
            failure,
        }
    }
}

impl Outcome {
    /// From when it was due to its end.
    pub fn e2e(&self) -> f64 {
        self.ended - self.sent + self.lateness
    }

    /// Whether it is an answer in time. One without a token kept nothing; one of a single token has no time between tokens.
    pub fn keeps(&self, promise: &Promise) -> bool {
        self.failure.is_none()
            && self.ttft.is_some_and(|ttft| ttft <= promise.ttft_seconds)
            && self.itl_mean.is_none_or(|itl| itl <= promise.itl_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(contents: &[f64], usage: Option<Usage>) -> Outcome {
        let mut recorder = Recorder::new(1.0, 1.25);
        contents.iter().for_each(|at| recorder.content(*at));
        recorder.end(4.0, usage, None)
    }

    #[test]
    fn times_count_from_when_a_request_was_due() {
        let outcome = recorded(&[1.5, 2.0, 3.5], None);
        assert_eq!((outcome.lateness, outcome.ttft, outcome.e2e()), (0.25, Some(0.5), 3.0));
        assert_eq!((outcome.gaps.as_slice(), outcome.itl_mean), ([0.5, 1.5].as_slice(), Some(1.0)));
        assert_eq!(outcome.output_tokens, 3);
    }

    #[test]
    fn the_servers_count_of_tokens_is_believed() {
        let usage = Usage { output_tokens: 5, ..Usage::default() };
        let outcome = recorded(&[1.5, 3.5], Some(usage));
        assert_eq!((outcome.output_tokens, outcome.itl_mean), (5, Some(0.5)));
    }

    #[test]
    fn promises_are_kept_by_answers_in_time() {
        let promise = Promise { ttft_seconds: 0.5, itl_seconds: 1.0 };
        assert!(recorded(&[1.5, 2.5], None).keeps(&promise));
        assert!(recorded(&[1.5], None).keeps(&promise), "one token has no time between tokens");
        assert!(!recorded(&[1.75, 2.0], None).keeps(&promise));
        assert!(!recorded(&[1.5, 3.0], None).keeps(&promise));
        assert!(!recorded(&[], None).keeps(&promise));
    }
}
