//! Where steps suddenly take longer: up to some number of tokens an engine replays a graph that it captured, beyond it starts
//! kernel after kernel. One token more may then double a step.
//!
//! In: times by tokens. Out: the neighbours between which there is more than the curve around them explains. Start at
//! [`of_prompts`].

use crate::point::Point;

/// How much more than the curve around them two neighbours must be apart, as a factor, and beyond it as a share of the first.
const TIMES: f64 = 1.3;
const SHARE: f64 = 0.2;
/// The curve around is read off points that are this far, as a factor: closer ones show their noise.
const AROUND: f64 = 1.4;
/// A jump is known well enough between neighbours this close, as a share of the first.
const CLOSE_SHARE: f64 = 1.0 / 512.0;

/// Lengths of prompts between which steps jump, of those among `points` that were measured alone, whole and in one step.
pub(crate) fn of_prompts(points: impl Iterator<Item = (Point, f64)>, step_tokens: u32) -> Vec<(u32, u32)> {
    let prompt = |(point, time)| match point {
        Point::Prefill { new_tokens, cached_tokens: 0 } if new_tokens <= step_tokens => {
            Some((new_tokens, time))
        }
        _ => None,
    };
    let mut curve: Vec<(u32, f64)> = points.filter_map(prompt).collect();
    curve.sort_by_key(|(tokens, _)| *tokens);
    jumps(&curve)
}

/// Neighbours between which `curve` jumps: tokens and times, by tokens, each once.
fn jumps(curve: &[(u32, f64)]) -> Vec<(u32, u32)> {
    let is_jump = |pair: &&[(u32, f64)]| {
        let (from, to) = (pair[0], pair[1]);
        let before = curve.iter().rfind(|point| AROUND * f64::from(point.0) <= f64::from(from.0));
        let behind = curve.iter().find(|point| f64::from(point.0) >= AROUND * f64::from(to.0));
        let before = before.map(|point| slope(*point, from));
        let behind = behind.map(|point| slope(to, *point));
        // With nothing around them, nothing is sudden.
        let Some(usual) = before.into_iter().chain(behind).reduce(f64::max) else { return false };
        to.1 - from.1 > TIMES * usual.max(0.0) * f64::from(to.0 - from.0) + SHARE * from.1
    };
    curve.windows(2).filter(is_jump).map(|pair| (pair[0].0, pair[1].0)).collect()
}

fn slope(from: (u32, f64), to: (u32, f64)) -> f64 {
    (to.1 - from.1) / f64::from(to.0 - from.0)
}

/// What to measure to know better where between two neighbours it is; `None` if it is known.
pub(crate) fn between((from, to): (u32, u32)) -> Option<u32> {
    let close = (f64::from(from) * CLOSE_SHARE).max(1.0);
    (f64::from(to - from) > close).then(|| u32::midpoint(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seen: vLLM 0.25 with an 8B model on an H100, whose graphs end at 512 tokens. Tokens and ms of whole prompts.
    const H100: [(u32, f64); 14] = [
        (16, 23.4),
        (32, 19.5),
        (64, 17.6),
        (128, 17.9),
        (256, 18.3),
        (512, 22.2),
        (768, 45.1),
        (1_024, 48.7),
        (1_536, 47.7),
        (2_048, 59.9),
        (3_072, 87.1),
        (4_096, 116.9),
        (6_144, 175.9),
        (8_192, 236.9),
    ];

    #[test]
    fn the_end_of_the_graphs_is_seen_and_nothing_else() {
        assert_eq!(jumps(&H100), [(512, 768)]);
        assert_eq!(jumps(&H100[..6]), []);
        assert_eq!((jumps(&[]), jumps(&H100[5..7])), (vec![], vec![]));
    }

    #[test]
    fn it_is_looked_for_by_halves() {
        let mut curve = H100.to_vec();
        let mut asked = Vec::new();
        while let Some(tokens) = jumps(&curve).first().and_then(|jump| between(*jump)) {
            asked.push(tokens);
            let ms = if tokens <= 512 { 22.2 } else { 40.0 + f64::from(tokens) / 200.0 };
            let at = curve.partition_point(|point| point.0 < tokens);
            curve.insert(at, (tokens, ms));
        }
        assert_eq!(asked, [640, 576, 544, 528, 520, 516, 514, 513]);
        assert_eq!(jumps(&curve), [(512, 513)]);
    }
}
