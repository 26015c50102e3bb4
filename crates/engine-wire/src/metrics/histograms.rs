//! Distributions: what requests took and how long they were, as engines tell Prometheus in buckets.
//!
//! A gateway needs sums alone ([`Figures`](super::Figures)); whoever compares distributions reads the same text once more,
//! with [`read_histograms`].

use std::collections::BTreeMap;

use super::{RANKS_MAX, text::Sample};

/// Buckets of one histogram; further ones are passed over.
pub const BOUNDS_MAX: usize = 128;

/// A histogram: observations by upper bound, each also counted at every bound above.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Histogram {
    /// Upper bounds in rising order, each with how many observations were at most that. The last is infinite.
    buckets: Vec<(f64, f64)>,
    /// Of all observations.
    pub sum: f64,
    /// How many there were.
    pub count: f64,
}

/// What one rank says of its requests since it began.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Histograms {
    /// Seconds from a request's arrival at the engine to its first token.
    pub ttft: Histogram,
    /// Seconds between two tokens of one sequence.
    pub itl: Histogram,
    /// Tokens of prompts.
    pub prompts: Histogram,
    /// Tokens of answers.
    pub answers: Histogram,
}

/// Reads the distributions in Prometheus' text format, by DP rank.
pub fn read_histograms(text: &[u8]) -> BTreeMap<u16, Histograms> {
    let mut ranks = BTreeMap::new();
    for line in text.split(|byte| *byte == b'\n') {
        let Some(sample) = std::str::from_utf8(line).ok().and_then(Sample::read) else { continue };
        if sample.value.is_finite() {
            take(&mut ranks, &sample);
        }
    }
    ranks
}

fn take(ranks: &mut BTreeMap<u16, Histograms>, sample: &Sample<'_>) {
    let (family, rank_label) = if let Some(family) = sample.name.strip_prefix("vllm:") {
        (family, "engine")
    } else if let Some(family) = sample.name.strip_prefix("sglang:") {
        (family, "dp_rank")
    } else {
        return;
    };
    let (family, part) = ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|part| Some((family.strip_suffix(part)?, *part)))
        .unwrap_or((family, ""));
    let place: fn(&mut Histograms) -> &mut Histogram = match family {
        "time_to_first_token_seconds" => |all| &mut all.ttft,
        "inter_token_latency_seconds" => |all| &mut all.itl,
        "request_prompt_tokens" | "prompt_tokens_histogram" => |all| &mut all.prompts,
        "request_generation_tokens" | "generation_tokens_histogram" => |all| &mut all.answers,
        _ => return,
    };
    let Some(rank) = rank(ranks, sample, rank_label) else { return };
    let histogram = place(rank);
    // Where a rank tells several models or adapters apart, it is their sum that counts.
    match part {
        "_sum" => histogram.sum += sample.value,
        "_count" => histogram.count += sample.value,
        "_bucket" => {
            if let Some(bound) = sample.label("le").and_then(|bound| bound.parse().ok()) {
                histogram.add(bound, sample.value);
            }
        }
        _ => {}
    }
}

fn rank<'a>(
    ranks: &'a mut BTreeMap<u16, Histograms>,
    sample: &Sample<'_>,
    label: &str,
) -> Option<&'a mut Histograms> {
    let rank = sample.label(label).map_or(Some(0), |rank| rank.parse().ok())?;
    let has_room = ranks.len() < RANKS_MAX || ranks.contains_key(&rank);
    has_room.then(|| ranks.entry(rank).or_default())
}

impl Histogram {
    /// An empty one with these upper bounds, which rise.
    pub fn with_bounds(bounds: &[f64]) -> Self {
        let buckets = bounds.iter().copied().filter(|bound| bound.is_finite()).chain([f64::INFINITY]);
        Self { buckets: buckets.map(|bound| (bound, 0.0)).collect(), ..Self::default() }
    }

    /// Its upper bounds.
    pub fn bounds(&self) -> Vec<f64> {
        self.buckets.iter().map(|(bound, _)| *bound).collect()
    }

    fn place(&self, bound: f64) -> Result<usize, usize> {
        self.buckets.binary_search_by(|(known, _)| known.total_cmp(&bound))
    }

    fn add(&mut self, bound: f64, count: f64) {
        if bound.is_nan() {
            return;
        }
        match self.place(bound) {
            Ok(place) => self.buckets[place].1 += count,
            Err(place) if self.buckets.len() < BOUNDS_MAX => self.buckets.insert(place, (bound, count)),
            Err(_) => {}
        }
    }

    /// Takes one observation in.
    pub fn observe(&mut self, value: f64) {
        self.sum += value;
        self.count += 1.0;
        self.buckets.iter_mut().filter(|(bound, _)| value <= *bound).for_each(|(_, count)| *count += 1.0);
    }

    /// What was observed since `before`; all of it if that counted more, and is of another process therefore.
    pub fn since(&self, before: &Self) -> Self {
        if self.count < before.count {
            return self.clone();
        }
        let earlier = |bound| before.place(bound).map_or(0.0, |place| before.buckets[place].1);
        let buckets = self.buckets.iter().map(|&(bound, count)| (bound, (count - earlier(bound)).max(0.0)));
        Self {
            buckets: buckets.collect(),
            sum: (self.sum - before.sum).max(0.0),
            count: self.count - before.count,
        }
    }

    /// Adds the observations of another.
    pub fn merge(&mut self, other: &Self) {
        other.buckets.iter().for_each(|&(bound, count)| self.add(bound, count));
        self.sum += other.sum;
        self.count += other.count;
    }

    /// `None` of nothing.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }

    /// The value below which `share` of the observations are, as if those of a bucket were spread evenly over it; what is
    /// above the last finite bound counts as that. `None` of nothing.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let all = self.buckets.last().map(|(_, count)| *count).filter(|count| *count > 0.0)?;
        let wanted = share.clamp(0.0, 1.0) * all;
        let (mut low, mut below) = (0.0, 0.0);
        for &(bound, count) in self.buckets.iter().filter(|(bound, _)| bound.is_finite()) {
            if count >= wanted && count > below {
                return Some(low + (bound - low) * ((wanted - below) / (count - below)).clamp(0.0, 1.0));
            }
            (low, below) = (bound, count.max(below));
        }
        Some(low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_are_read_by_rank_and_summed_over_models() {
        let text = br#"# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="1",model_name="a",le="0.1"} 3.0
vllm:time_to_first_token_seconds_bucket{engine="1",model_name="a",le="+Inf"} 4.0
vllm:time_to_first_token_seconds_bucket{engine="1",model_name="b",le="0.1"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="1",model_name="b",le="+Inf"} 1.0
vllm:time_to_first_token_seconds_sum{engine="1",model_name="a"} 0.5
vllm:time_to_first_token_seconds_count{engine="1",model_name="a"} 4.0
vllm:time_to_first_token_seconds_count{engine="1",model_name="b"} 1.0
vllm:request_prompt_tokens_sum{engine="1"} 700
sglang:generation_tokens_histogram_count 9
vllm:inter_token_latency_seconds_bucket{engine="1",le="x"} 9
vllm:inter_token_latency_seconds_bucket{engine="1"} 9
"#;
        let ranks = read_histograms(text);
        let one = &ranks[&1];
        assert_eq!((one.ttft.count, one.ttft.sum, one.prompts.sum), (5.0, 0.5, 700.0));
        assert_eq!(one.ttft.buckets, [(0.1, 4.0), (f64::INFINITY, 5.0)]);
        assert_eq!((ranks[&0].answers.count, one.itl.bounds().len()), (9.0, 0));
    }

    #[test]
    fn quantiles_lie_within_their_buckets() {
        let mut histogram = Histogram::with_bounds(&[1.0, 2.0, 4.0]);
        assert_eq!((histogram.quantile(0.5), histogram.mean()), (None, None));
        [0.5, 1.5, 1.5, 3.0].into_iter().for_each(|value| histogram.observe(value));
        assert_eq!(histogram.quantile(0.25), Some(1.0));
        assert_eq!(histogram.quantile(0.5), Some(1.5));
        assert_eq!(histogram.quantile(1.0), Some(4.0));
        histogram.observe(100.0);
        assert_eq!(histogram.quantile(1.0), Some(4.0), "beyond the last bound nobody knows how far");
    }

    #[test]
    fn a_difference_is_what_came_between() {
        let mut before = Histogram::with_bounds(&[1.0, 2.0]);
        before.observe(0.5);
        let mut after = before.clone();
        after.observe(1.5);
        let between = after.since(&before);
        assert_eq!((between.count, between.sum, between.quantile(0.5)), (1.0, 1.5, Some(1.5)));
        assert_eq!(before.since(&after), before, "another process began from nothing");
        let mut both = before.clone();
        both.merge(&between);
        assert_eq!(both, after);
    }
}
