use forebay_types::StepObservation;
use proptest::prelude::*;

use super::*;

/// A splitmix64: the tests' own source of repeatable noise.
struct Noise(u64);

impl Noise {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % bound
    }
    /// Uniform in 0..1.
    fn share(&mut self) -> f64 {
        self.below(1 << 40) as f64 / (1u64 << 40) as f64
    }
}

/// A load like a server's: mostly decode steps, one in ten with a chunk of a prompt, `noise` of relative scatter.
fn step(truth: &StepCoefficients, random: &mut Noise, noise: f64) -> StepObservation {
    let decodes = random.below(32) as u32 + 1;
    let context_tokens = u64::from(decodes) * (100 + random.below(4000));
    let (prefill_tokens, prefill_attention) = if random.below(10) == 0 {
        let tokens = 16 + random.below(2000) as u32;
        let before = random.below(8000) as f64;
        (tokens, f64::from(tokens) * (before + f64::from(tokens) / 2.0))
    } else {
        (0, 0.0)
    };
    let exact = truth.step_seconds(prefill_tokens, prefill_attention, decodes, context_tokens);
    let seconds = exact * (1.0 + noise * (2.0 * random.share() - 1.0));
    StepObservation { prefill_tokens, prefill_attention, decodes, context_tokens, seconds }
}

/// The largest relative difference of two sets of coefficients in what they predict for work of many shapes.
fn worst_difference(a: &StepCoefficients, b: &StepCoefficients) -> f64 {
    let mut worst: f64 = 0.0;
    for decodes in [1, 8, 32] {
        for context in [200, 2000] {
            let context = u64::from(decodes) * context;
            worst = worst.max(
                (a.step_seconds(0, 0.0, decodes, context) / b.step_seconds(0, 0.0, decodes, context))
                    .ln()
                    .abs(),
            );
        }
    }
    for (new, cached) in [(64, 0), (512, 0), (2000, 4000), (8000, 0)] {
        worst = worst
            .max((a.prefill_seconds(new, cached, 2048) / b.prefill_seconds(new, cached, 2048)).ln().abs());
    }
    worst
}

const H100: StepCoefficients = StepCoefficients::H100_8B;

fn trained(truth: &StepCoefficients, steps: u32, noise: f64, outlier: impl Fn(u32) -> f64) -> StepModel {
    let mut model = StepModel::new(StepCoefficients::CPU_TINY);
    let mut random = Noise(1);
    for i in 0..steps {
        let mut observed = step(truth, &mut random, noise);
        observed.seconds *= outlier(i);
        model.observe(&observed);
    }
    model
}

#[test]
fn exact_steps_teach_exact_coefficients() {
    let model = trained(&H100, 3000, 0.0, |_| 1.0);
    assert!(worst_difference(&model.coefficients(), &H100) < 1e-3, "{:?}", model.coefficients());
    assert!(model.error().p90 < 1e-3, "{:?}", model.error());
}

#[test]
fn noise_averages_out_from_a_prior_400_times_too_slow() {
    let model = trained(&H100, 3000, 0.1, |_| 1.0);
    assert!(worst_difference(&model.coefficients(), &H100) < 0.05, "{:?}", model.coefficients());
    let error = model.error();
    assert!(error.p50 < 0.07 && error.bias.abs() < 0.03, "{error:?}: the noise is uniform in ±0.1");
}

#[test]
fn a_hundred_steps_are_enough_to_place_by() {
    let model = trained(&H100, 100, 0.05, |_| 1.0);
    assert!(worst_difference(&model.coefficients(), &H100) < 0.3, "{:?}", model.coefficients());
}

#[test]
fn one_step_in_a_hundred_50_times_too_long_changes_little() {
    let model = trained(&H100, 5000, 0.1, |i| if i % 100 == 37 { 50.0 } else { 1.0 });
    assert!(worst_difference(&model.coefficients(), &H100) < 0.08, "{:?}", model.coefficients());
}

#[test]
fn an_outlier_as_the_first_step_is_outvoted() {
    let model = trained(&H100, 500, 0.05, |i| if i < 2 { 50.0 } else { 1.0 });
    assert!(worst_difference(&model.coefficients(), &H100) < 0.15, "{:?}", model.coefficients());
}

#[test]
fn a_rank_that_becomes_twice_as_slow_is_followed() {
    let mut model = trained(&H100, 3000, 0.05, |_| 1.0);
    let slow = StepCoefficients::from_array(H100.to_array().map(|value| value * 2.0));
    let mut random = Noise(2);
    for _ in 0..1000 {
        model.observe(&step(&slow, &mut random, 0.05));
    }
    assert!(worst_difference(&model.coefficients(), &slow) < 0.15, "{:?}", model.coefficients());
}

#[test]
fn hours_of_decoding_do_not_erase_what_is_known_of_prefills() {
    let mut model = trained(&H100, 3000, 0.05, |_| 1.0);
    let before = model.prefill_seconds(4000, 0, 2048);
    for i in 0..1_000_000u64 {
        let context_tokens = 20_000 + i % 1000;
        let seconds = H100.step_seconds(0, 0.0, 8, context_tokens);
        model.observe(&StepObservation { decodes: 8, context_tokens, seconds, ..StepObservation::default() });
    }
    let after = model.prefill_seconds(4000, 0, 2048);
    assert!((after / before - 1.0).abs() < 0.1, "{before} {after}");
    // And the next prefill, which happens to be an outlier, is still judged by it.
    model.observe(&StepObservation {
        prefill_tokens: 2048,
        prefill_attention: 2e6,
        decodes: 8,
        context_tokens: 20_000,
        seconds: 5.0,
    });
    assert!((model.prefill_seconds(4000, 0, 2048) / before - 1.0).abs() < 0.3);
}

#[test]
fn prefill_seconds_is_the_sum_of_its_steps() {
    //    (new, cached, chunk)
    for (new, cached, chunk) in
        [(1, 0, 512), (512, 0, 512), (513, 0, 512), (8000, 4000, 512), (300, 7, 1), (5, 5, 0)]
    {
        let (mut sum, mut done) = (0.0, 0);
        while done < new {
            let m = chunk.max(1).min(new - done);
            let (mf, before) = (f64::from(m), f64::from(cached + done));
            sum += H100.step_seconds(m, mf * before + mf * mf / 2.0, 0, 0);
            done += m;
        }
        let closed = H100.prefill_seconds(new, cached, chunk);
        assert!((closed / sum - 1.0).abs() < 1e-9, "{new} {cached} {chunk}: {closed} {sum}");
    }
    assert_eq!(H100.prefill_seconds(0, 4000, 512), 0.0);
}

/// Milliseconds of prefills on one H100 (vLLM 0.25, an 8B model, chunks of 8,192), HTTP included.
#[test]
fn the_h100_preset_agrees_with_what_was_measured() {
    for (tokens, measured_ms) in [
        (512, 20.7),
        (1024, 33.5),
        (2048, 58.5),
        (4096, 113.0),
        (8192, 229.7),
        (16384, 514.6),
        (32768, 1244.4),
    ] {
        let predicted_ms = 1e3 * H100.prefill_seconds(tokens, 0, 8192);
        assert!(
            (predicted_ms / measured_ms - 1.0).abs() < 0.12,
            "{tokens}: {predicted_ms} against {measured_ms}"
        );
    }
}

/// By hand: 6.3 ms + 100 x 0.0235 ms + 5,000 x 8.2e-7 ms + 4 x 0.016 ms + 1,000 x 4.4e-5 ms.
#[test]
fn step_seconds_is_what_one_computes_by_hand() {
    let seconds = StepModel::new(H100).step_seconds(100, 5000.0, 4, 1000);
    assert!((seconds - 8.7621e-3).abs() < 1e-12, "{seconds}");
}

#[test]
fn the_same_steps_give_the_same_bits() {
    let bits = || trained(&H100, 2000, 0.1, |_| 1.0).coefficients().to_array().map(f64::to_bits);
    assert_eq!(bits(), bits());
}

/// `cargo test --release -p forebay-perf-model -- --ignored --nocapture`
#[test]
#[ignore = "a timing: release build, quiet machine"]
fn an_observation_costs_less_than_a_microsecond() {
    let mut random = Noise(3);
    let steps: Vec<_> = (0..10_000).map(|_| step(&H100, &mut random, 0.05)).collect();
    let mut model = StepModel::new(H100);
    let start = std::time::Instant::now();
    for step in &steps {
        model.observe(step);
    }
    let each = start.elapsed() / 10_000;
    println!("{each:?} an observation, {} bytes a model", size_of::<StepModel>());
    assert!(each < std::time::Duration::from_micros(1));
}

prop_compose! {
    fn observations()(
        prefill_tokens in prop_oneof![Just(0u32), 0u32..100_000],
        prefill_attention in prop_oneof![Just(0.0), 0.0..1e10, Just(f64::NAN)],
        decodes in 0u32..1000, context_tokens in 0u64..10_000_000,
        seconds in prop_oneof![1e-9..1e4, 1e-3..1e-1, Just(0.0), Just(-1.0), Just(f64::INFINITY)],
    ) -> StepObservation {
        StepObservation { prefill_tokens, prefill_attention, decodes, context_tokens, seconds }
    }
}

proptest! {
    /// Whatever nonsense was observed: predictions are finite, never negative and never fall when work is added.
    #[test]
    fn predictions_stay_possible_and_monotone(
        steps in prop::collection::vec(observations(), 0..300),
        p in 0u32..10_000, a in 0.0..1e9, d in 0u32..500, c in 0u64..1_000_000, more in 1u32..10_000,
    ) {
        let mut model = StepModel::new(H100);
        for step in &steps {
            model.observe(step);
            for value in model.coefficients().to_array() {
                prop_assert!(value.is_finite() && value >= 0.0, "{:?}", model.coefficients());
            }
        }
        let seconds = model.step_seconds(p, a, d, c);
        prop_assert!(seconds.is_finite() && seconds >= 0.0);
        prop_assert!(model.step_seconds(p + more, a, d, c) >= seconds);
        prop_assert!(model.step_seconds(p, a + f64::from(more), d, c) >= seconds);
        prop_assert!(model.step_seconds(p, a, d + more, c) >= seconds);
        prop_assert!(model.step_seconds(p, a, d, c + u64::from(more)) >= seconds);
        let prefill = model.prefill_seconds(p, d, 512);
        prop_assert!(model.prefill_seconds(p + more, d, 512) >= prefill);
        prop_assert!(model.prefill_seconds(p, d + more, 512) >= prefill);
        prop_assert!(model.prefill_seconds(p, d, 512 + more) <= prefill);
    }
}
