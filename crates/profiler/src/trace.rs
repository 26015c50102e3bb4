//! Times of steps, out of the times at which tokens came.
//!
//! In: for each sequence the times of its tokens, in seconds since any one moment, not falling. Out: seconds of a step.
//! Engines send tokens asynchronously, so a single gap is not a step; several together are, and a long one among short ones.

/// Tokens of a stretch, at least.
const STRETCH: u32 = 8;
/// Tokens that came closer than this were read at once.
const TOGETHER_SECONDS: f64 = 5e-5;
/// A step with a chunk of a prompt in it takes no less than this share of the usual one of its kind: what is shorter was some
/// delay.
const CHUNK_SHARE: f64 = 0.2;
/// A gap this many times the usual one is a step with more in it.
const LONG: f64 = 1.5;

/// The middle of some numbers, the mean of both where there are two; `None` of none. Numbers that are none are left out.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Seconds of a step while all of `sequences` decoded, from `from` until `to`: the median over stretches of at least eight
/// tokens of every sequence. `None` if none of them has so many, apart from those that came with its first.
pub fn decode_step(sequences: &[Vec<f64>], from: f64, to: f64) -> Option<f64> {
    median(sequences.iter().flat_map(|arrivals| stretches(arrivals, from, to)))
}

/// Seconds of a token in each stretch. Tokens that came together belong to the same one: those of an engine so fast that
/// several are read at once.
fn stretches(arrivals: &[f64], from: f64, to: f64) -> Vec<f64> {
    let mut within = arrivals.iter().copied().filter(|at| (from..=to).contains(at)).peekable();
    let (mut found, mut began, mut tokens) = (Vec::new(), None, 0_u32);
    while let Some(at) = within.next() {
        tokens += u32::from(began.is_some());
        if within.peek().is_some_and(|next| next - at < TOGETHER_SECONDS) {
            continue;
        }
        match began {
            None => began = Some(at),
            Some(start) if tokens >= STRETCH => {
                found.push((at - start) / f64::from(tokens));
                (began, tokens) = (Some(at), 0);
            }
            Some(_) => {}
        }
    }
    found
}

/// Tokens of context that `sequences` read in a step at the middle of that stretch: each its prompt and what it has generated.
pub fn context_tokens(sequences: &[Vec<f64>], prompt_tokens: u32, from: f64, to: f64) -> f64 {
    let middle = f64::midpoint(from, to);
    let generated = |arrivals: &Vec<f64>| arrivals.iter().filter(|at| **at <= middle).count() as f64;
    sequences.iter().map(|arrivals| f64::from(prompt_tokens) + generated(arrivals)).sum()
}

/// Seconds of the longest step that ran at any time from `from` until `to`, as the sequences that decoded saw it.
pub fn longest_gap(sequences: &[Vec<f64>], from: f64, to: f64) -> Option<f64> {
    median(sequences.iter().filter_map(|arrivals| gaps(arrivals, from, to).max_by(f64::total_cmp)))
}

/// Seconds of the step that had more in it, at any time from `from` until `to`, as the sequences that decoded saw it: by how
/// much they were held up, and a usual step. An engine that is busy with a new prompt sends the tokens of the step before
/// late, so no gap alone is as long as the step was.
pub fn step_with_more(sequences: &[Vec<f64>], from: f64, to: f64, usual_seconds: f64) -> Option<f64> {
    median(sequences.iter().filter_map(|arrivals| {
        let (mut steps, mut total, mut longest) = (0_u32, 0.0, f64::NEG_INFINITY);
        for gap in gaps(arrivals, from, to) {
            (steps, total, longest) = (steps + 1, total + gap, gap.max(longest));
        }
        (steps > 0).then(|| longest.max(total - f64::from(steps - 1) * usual_seconds))
    }))
}

/// Steps with more in them than the usual, from `from` until `to`, as one sequence saw it.
pub fn long_steps(arrivals: &[f64], from: f64, to: f64, usual_seconds: f64) -> u32 {
    let long = || gaps(arrivals, from, to).filter(|gap| *gap > LONG * usual_seconds);
    let least = CHUNK_SHARE * median(long()).unwrap_or(0.0);
    long().filter(|gap| *gap >= least).count() as u32
}

/// Gaps that overlap a stretch.
fn gaps(arrivals: &[f64], from: f64, to: f64) -> impl Iterator<Item = f64> {
    arrivals.windows(2).filter(move |pair| pair[1] > from && pair[0] < to).map(|pair| pair[1] - pair[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens each `step` apart, but for one gap.
    fn arrivals(count: usize, step: f64, long_at: usize, long: f64) -> Vec<f64> {
        let at = |index: usize| index as f64 * step + if index > long_at { long - step } else { 0.0 };
        (0..count).map(at).collect()
    }

    #[test]
    fn medians_leave_out_what_is_no_number() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, f64::NAN, 1.0]), Some(2.0));
        assert_eq!(median([3.0, 1.0, 100.0]), Some(3.0));
    }

    #[test]
    fn a_step_is_what_most_stretches_say() {
        let sequences = vec![arrivals(40, 0.01, 20, 0.5), arrivals(40, 0.01, 99, 0.0)];
        let step = decode_step(&sequences, 0.0, 10.0).expect("enough tokens");
        assert!((step - 0.01).abs() < 1e-9, "{step}");
        assert_eq!(decode_step(&sequences, 0.0, 0.05), None);
        assert_eq!(context_tokens(&sequences, 100, 0.0, 0.105), 2.0 * 106.0);
    }

    #[test]
    fn tokens_that_are_read_together_are_counted_all_the_same() {
        // Five tokens every 10 ms, 2 ms each.
        let bursts: Vec<f64> =
            (0..100).map(|index| f64::from(index / 5) * 0.01 + f64::from(index % 5) * 1e-6).collect();
        let step = decode_step(&[bursts], 0.0, 1.0).expect("enough tokens");
        assert!((step - 0.002).abs() < 1e-5, "{step}");
        assert_eq!(decode_step(&[vec![0.0; 100]], 0.0, 1.0), None);
    }

    #[test]
    fn a_long_step_stands_out() {
        let sequences = vec![arrivals(40, 0.01, 20, 0.09); 3];
        let gap = longest_gap(&sequences, 0.19, 0.31).expect("a gap");
        assert!((gap - 0.09).abs() < 1e-9, "{gap}");
        assert!((step_with_more(&sequences, 0.19, 0.31, 0.01).expect("gaps") - 0.09).abs() < 1e-9);
        // The token before it came 30 ms late.
        let mut late = sequences[0].clone();
        late[20] += 0.03;
        assert!((longest_gap(&[late.clone()], 0.15, 0.31).expect("a gap") - 0.06).abs() < 1e-9);
        assert!((step_with_more(&[late], 0.15, 0.31, 0.01).expect("gaps") - 0.09).abs() < 1e-9);
        assert_eq!(step_with_more(&[vec![0.0]], 0.0, 1.0, 0.01), None);
        assert_eq!(long_steps(&sequences[0], 0.0, 10.0, 0.01), 1);
        assert_eq!(long_steps(&sequences[0], 0.0, 0.1, 0.01), 0);
        let delayed: Vec<f64> = [0.0, 0.01, 0.026, 0.126, 0.226, 0.242, 0.342].into();
        assert_eq!(long_steps(&delayed, 0.0, 1.0, 0.01), 3, "two delays are no chunks");
    }
}
