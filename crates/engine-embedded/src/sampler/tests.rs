use proptest::prelude::*;

use super::*;

const PLAIN: SampleParams =
    SampleParams { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 1, choice: 0, position: 0, logprobs: None };

fn token(logits: &[f32], params: &SampleParams) -> TokenId {
    sample(logits, params).0
}

#[test]
fn temperature_zero_takes_the_most_likely_and_of_equals_the_lowest_id() {
    let greedy = SampleParams { temperature: 0.0, ..PLAIN };
    let check = |logits: &[f32], expected| assert_eq!(token(logits, &greedy), expected, "{logits:?}");
    check(&[1.0, 3.0, 2.0], 1);
    check(&[2.0, 3.0, 3.0], 1);
    check(&[f32::NAN, 1.0, 2.0], 2);
    check(&[f32::NAN, f32::NEG_INFINITY], 1);
    check(&[f32::NAN], 0);
    check(&[-5.0], 0);
    assert_eq!(token(&[1.0, 3.0], &SampleParams { temperature: f32::NAN, ..PLAIN }), 1);
    assert_eq!(token(&[1.0, 3.0], &SampleParams { temperature: -1.0, ..PLAIN }), 1);
}

/// How often each token is drawn over 20,000 positions.
fn frequencies(logits: &[f32], params: &SampleParams) -> Vec<f64> {
    let mut counts = vec![0.0; logits.len()];
    for position in 0..20_000 {
        counts[token(logits, &SampleParams { position, ..*params }) as usize] += 1.0 / 20_000.0;
    }
    counts
}

#[test]
fn draws_follow_the_distribution() {
    // Probabilities 0.5, 0.3, 0.15, 0.05; a deviation is at most 0.0036, so 0.015 is four of them.
    let logits = [0.05_f32, 0.5, 0.15, 0.3].map(f32::ln);
    let check = |what: &str, params: SampleParams, expected: [f64; 4]| {
        let found = frequencies(&logits, &params);
        let close = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 0.015);
        assert!(close, "{what}: {found:?}, not {expected:?}");
    };
    check("plain", PLAIN, [0.05, 0.5, 0.15, 0.3]);
    check("another choice", SampleParams { choice: 3, ..PLAIN }, [0.05, 0.5, 0.15, 0.3]);
    check("top-k", SampleParams { top_k: 2, ..PLAIN }, [0.0, 0.625, 0.0, 0.375]);
    check("top-p", SampleParams { top_p: 0.6, ..PLAIN }, [0.0, 0.625, 0.0, 0.375]);
    check("top-p of nothing keeps one", SampleParams { top_p: 0.0, ..PLAIN }, [0.0, 1.0, 0.0, 0.0]);
    check("top-p after top-k", SampleParams { top_k: 2, top_p: 0.6, ..PLAIN }, [0.0, 1.0, 0.0, 0.0]);
    check("cold", SampleParams { temperature: 0.01, ..PLAIN }, [0.0, 1.0, 0.0, 0.0]);
    check("hot", SampleParams { temperature: f32::INFINITY, ..PLAIN }, [0.25; 4]);
    check("square", SampleParams { temperature: 0.5, ..PLAIN }, [0.0068, 0.6849, 0.0616, 0.2466]);
}

#[test]
fn seed_choice_and_position_each_matter() {
    let logits = vec![0.0; 1000];
    let series = |params: SampleParams| -> Vec<TokenId> {
        (0..8).map(|position| token(&logits, &SampleParams { position, ..params })).collect()
    };
    let first = series(PLAIN);
    assert_eq!(first, series(PLAIN));
    assert_ne!(first, series(SampleParams { seed: 2, ..PLAIN }));
    assert_ne!(first, series(SampleParams { choice: 1, ..PLAIN }));
    assert!(first.iter().any(|token| *token != first[0]));
}

#[test]
fn what_cannot_be_is_never_drawn() {
    let logits = [f32::NEG_INFINITY, 0.0, f32::NAN, 0.0];
    let found = frequencies(&logits, &SampleParams { temperature: 1e30, ..PLAIN });
    assert_eq!((found[0], found[2]), (0.0, 0.0));
    assert!(found[1] > 0.4 && found[3] > 0.4);
}

#[test]
fn log_probabilities_are_of_the_whole_vocabulary_at_temperature_one() {
    let logits = [0.05_f32, 0.5, 0.15, 0.3].map(|p| p.ln() + 7.0);
    let params = SampleParams { temperature: 0.0, top_k: 1, logprobs: Some(3), ..PLAIN };
    let found = sample(&logits, &params).1.expect("asked for");
    assert!((found.chosen - 0.5_f32.ln()).abs() < 1e-5);
    assert_eq!(found.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3, 2]);
    assert!((found.top[2].1 - 0.15_f32.ln()).abs() < 1e-5);
    let all = sample(&logits, &SampleParams { logprobs: Some(20), ..params }).1.expect("asked for");
    assert_eq!(all.top.len(), 4);
    assert_eq!(sample(&logits, &SampleParams { logprobs: Some(0), ..params }).1.expect("asked for").top, []);
}

proptest! {
    #[test]
    fn a_drawn_token_is_among_those_kept(
        logits in prop::collection::vec(-8.0_f32..8.0, 1..600),
        top_k in 0_u32..80,
        top_p in 0.0_f32..1.2,
        temperature in 0.05_f32..3.0,
        seed: u64,
    ) {
        let params = SampleParams { temperature, top_p, top_k, seed, ..PLAIN };
        let drawn = token(&logits, &params);
        prop_assert_eq!(drawn, token(&logits, &params));
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        let rank = order.iter().position(|token| *token == drawn as usize).expect("in the vocabulary");
        let kept = if top_k == 0 { order.len() } else { order.len().min(top_k as usize) };
        prop_assert!(rank < kept);
        // All that are more likely together lack something of `top_p`, in exact arithmetic up to rounding.
        let weight = |token: &usize| ((f64::from(logits[*token]) - f64::from(logits[order[0]])) / f64::from(temperature)).exp();
        let before: f64 = order[..rank].iter().map(weight).sum();
        let total: f64 = order[..kept].iter().map(weight).sum();
        prop_assert!(before < f64::from(top_p) * total * 1.001 || rank == 0);
    }
}
