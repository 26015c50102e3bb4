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

fn profile(name: &str) -> Arc<Profile> {
    Arc::new(Profile::built_in(name).unwrap())
}

fn llama() -> Arc<Profile> {
    profile("h100-llama8b")
}

/// A load like a server's: mostly decode steps, one in ten with a chunk of a prompt.
fn shape(random: &mut Noise) -> StepShape {
    let decodes = random.below(32) as u32 + 1;
    let context_tokens = u64::from(decodes) * (100 + random.below(4000));
    let mut shape = StepShape { decodes, context_tokens, ..StepShape::default() };
    if random.below(10) == 0 {
        shape.prefill_tokens = 16 + random.below(2000) as u32;
        let tokens = f64::from(shape.prefill_tokens);
        shape.prefill_attention = tokens * (random.below(8000) as f64 + tokens / 2.0);
    }
    shape
}

/// Teaches `model` `steps` steps of an engine that is its profile with `truth` on its terms, with `noise` of relative
/// scatter.
fn teach(model: &mut ProfileModel, truth: &Factors, steps: u32, noise: f64, outlier: impl Fn(u32) -> f64) {
    let mut random = Noise(7);
    for i in 0..steps {
        let shape = StepShape { budget_tokens: model.budget_tokens, ..shape(&mut random) };
        let exact = model.profile.steps().step_seconds(truth, &shape);
        let seconds = exact * (1.0 + noise * (2.0 * random.share() - 1.0)) * outlier(i);
        model.observe(&StepObservation {
            prefill_tokens: shape.prefill_tokens,
            prefill_attention: shape.prefill_attention,
            decodes: shape.decodes,
            context_tokens: shape.context_tokens,
            seconds,
        });
    }
}

/// The largest relative difference from the truth in what is asked: decode steps, mixed steps, prefills.
fn worst(model: &ProfileModel, truth: &Factors) -> f64 {
    let steps = model.profile.steps();
    let mut worst: f64 = 0.0;
    let mut compare = |asked: f64, exact: f64| worst = worst.max((asked / exact).ln().abs());
    for decodes in [1, 8, 32] {
        for context in [200, 2000] {
            for prefill_tokens in [0, 512] {
                let shape = StepShape {
                    prefill_tokens,
                    prefill_attention: 1e6 * f64::from(prefill_tokens.min(1)),
                    decodes,
                    context_tokens: u64::from(decodes) * context,
                    group_decodes: 0,
                    budget_tokens: model.budget_tokens,
                };
                compare(model.step_seconds(&shape), steps.step_seconds(truth, &shape));
            }
        }
    }
    for (new_tokens, cached_tokens) in [(64, 0), (512, 0), (2000, 4000), (8000, 0)] {
        let shape =
            PrefillShape { new_tokens, cached_tokens, budget_tokens: 2048, ..PrefillShape::default() };
        compare(model.mixed_prefill_seconds(&shape), steps.prefill_seconds(truth, &shape));
    }
    worst
}

#[test]
fn before_the_first_step_it_is_the_profile() {
    let model = ProfileModel::new(llama(), 2048);
    assert_eq!(worst(&model, &AS_MEASURED), 0.0);
    assert_eq!(
        model.prefill_seconds(8000, 0),
        llama().prefill_seconds(8000, 0, 2048),
        "under its own budget"
    );
    assert_eq!(model.decode_step_seconds(8, 9000), llama().decode_step_seconds(8, 9000));
    assert_eq!(model.error(), ModelError::default());
}

#[test]
fn an_engine_k_times_slower_is_learned_from_eight_steps() {
    for k in [0.1, 0.5, 1.0, 2.0, 3.0, 10.0] {
        let mut model = ProfileModel::new(llama(), 8192);
        teach(&mut model, &[k; TERMS], 8, 0.0, |_| 1.0);
        assert!(worst(&model, &[k; TERMS]) < 1e-6, "{k}: {:?}", model.corrections());
        assert_eq!(model.samples(), 8);
    }
}

/// Decoding twice as slow and prefills three times: no single scale fits.
#[test]
fn an_engine_of_another_shape_is_learned_term_by_term() {
    let truth = [2.0, 3.0, 3.0, 1.0, 0.5];
    let mut model = ProfileModel::new(llama(), 8192);
    teach(&mut model, &truth, 3000, 0.1, |_| 1.0);
    assert!(worst(&model, &truth) < 0.05, "{} {:?}", worst(&model, &truth), model.corrections());
    let error = model.error();
    assert!(error.p50 < 0.07 && error.bias.abs() < 0.03, "{error:?}: the noise is uniform in ±0.1");
}

#[test]
fn one_step_in_a_hundred_50_times_too_long_moves_predictions_by_less_than_5_percent() {
    let truth = [1.2, 1.1, 0.9, 1.3, 1.0];
    let mut model = ProfileModel::new(llama(), 8192);
    teach(&mut model, &truth, 5000, 0.1, |i| if i % 100 == 37 { 50.0 } else { 1.0 });
    assert!(worst(&model, &truth) < 0.05, "{} {:?}", worst(&model, &truth), model.corrections());
}

/// Steps until every prediction is within 20 % of a rank that from now on takes `factor` times as long.
fn steps_to_follow(truth: &Factors) -> u32 {
    let mut model = ProfileModel::new(llama(), 8192);
    teach(&mut model, &AS_MEASURED, 3000, 0.05, |_| 1.0);
    let mut random = Noise(3);
    let mut since = 1;
    for steps in 1..=2000 {
        let shape = shape(&mut random);
        let noise = 1.0 + 0.05 * (2.0 * random.share() - 1.0);
        model.observe_shape(&shape, noise * model.profile.steps().step_seconds(truth, &shape));
        if worst(&model, truth) > 0.2_f64.ln_1p() {
            since = steps + 1;
        }
    }
    since
}

#[test]
fn a_jump_is_followed_within_the_stated_number_of_steps() {
    // One step in ten has prefill.
    for (what, truth, steps_max) in [
        ("all ten times slower", [10.0; TERMS], 300),
        ("all ten times faster", [0.1; TERMS], 300),
        ("all three times slower", [3.0; TERMS], 300),
        ("prefill alone ten times slower", [1.0, 10.0, 10.0, 1.0, 10.0], 300),
        ("decoding alone ten times slower", [10.0, 1.0, 1.0, 10.0, 1.0], 40),
    ] {
        let steps = steps_to_follow(&truth);
        assert!(steps <= steps_max, "{what}: {steps}");
    }
}

#[test]
fn an_engine_a_thousand_times_slower_stops_at_the_limit_and_its_error_says_so() {
    for (k, limit) in [(1000.0, FACTOR_MAX), (1e-3, FACTOR_MIN)] {
        let mut model = ProfileModel::new(llama(), 8192);
        teach(&mut model, &[k; TERMS], 1000, 0.05, |_| 1.0);
        let times = model.decode_step_seconds(8, 9000) / llama().decode_step_seconds(8, 9000);
        assert!((times / limit).ln().abs() < 0.1, "{times} {:?}", model.corrections());
        let error = model.error();
        assert!(if k > 1.0 { error.bias < -0.9 } else { error.bias > 10.0 }, "{error:?}");
    }
}

/// What a narrow budget hides, attention and mixing, is known less well: it shows only where prompts are long.
#[test]
fn a_narrow_budget_is_corrected_like_the_rest() {
    let truth = [1.0, 2.0, 1.0, 1.0, 1.0];
    let mut model = ProfileModel::new(llama(), 512);
    teach(&mut model, &truth, 3000, 0.05, |_| 1.0);
    assert!(worst(&model, &truth) < 0.1, "{} {:?}", worst(&model, &truth), model.corrections());
}

#[test]
fn a_group_learns_what_its_prefill_steps_take() {
    let truth = [1.5, 1.5, 0.7, 1.0, 1.0];
    let mut model = ProfileModel::new(profile("h100x2-qwen3-30b-a3b"), 8192);
    teach(&mut model, &truth, 3000, 0.05, |_| 1.0);
    assert!(worst(&model, &truth) < 0.05, "{} {:?}", worst(&model, &truth), model.corrections());
    assert_eq!(model.corrections().mixing, model.corrections().mixing.clamp(FACTOR_MIN, FACTOR_MAX));
}

#[test]
fn steps_that_cannot_be_are_ignored() {
    let mut model = ProfileModel::new(llama(), 8192);
    let one = StepObservation { decodes: 1, seconds: 1.0, ..StepObservation::default() };
    for step in [
        StepObservation { decodes: 0, ..one },
        StepObservation { seconds: 0.0, ..one },
        StepObservation { seconds: -1.0, ..one },
        StepObservation { seconds: f64::NAN, ..one },
        StepObservation { seconds: f64::INFINITY, ..one },
        StepObservation { prefill_tokens: 1, prefill_attention: f64::NAN, ..one },
        StepObservation { prefill_tokens: 1, prefill_attention: -1.0, ..one },
        StepObservation { prefill_tokens: 1, prefill_attention: f64::INFINITY, ..one },
    ] {
        model.observe(&step);
        assert_eq!((model.samples(), model.factors()), (0, AS_MEASURED), "{step:?}");
    }
}

#[test]
fn hours_of_decoding_do_not_erase_what_is_known_of_prefills() {
    let mut model = ProfileModel::new(llama(), 8192);
    teach(&mut model, &[2.0; TERMS], 3000, 0.05, |_| 1.0);
    let before = model.prefill_seconds(4000, 0);
    for i in 0..100_000 {
        let shape = StepShape { decodes: 8, context_tokens: 20_000 + i % 1000, ..StepShape::default() };
        model.observe_shape(&shape, 2.0 * model.profile.step_seconds(&shape));
    }
    let after = model.prefill_seconds(4000, 0);
    assert!((after / before - 1.0).abs() < 0.1, "{before} {after}");
}

/// `cargo test --release -p forebay-perf-model -- --ignored --nocapture`
#[test]
#[ignore = "a timing: release build, quiet machine"]
fn a_corrected_answer_costs_less_than_25_nanoseconds() {
    let mut model = ProfileModel::new(llama(), 8192);
    teach(&mut model, &[2.0; TERMS], 100, 0.05, |_| 1.0);
    let start = std::time::Instant::now();
    let sum: f64 =
        (0..1_000_000u32).map(|i| model.decode_step_seconds(std::hint::black_box(i % 128), 90_000)).sum();
    let decode = start.elapsed() / 1_000_000;
    let start = std::time::Instant::now();
    let more: f64 =
        (0..1_000_000u32).map(|i| model.prefill_seconds(std::hint::black_box(i % 40_000), 512)).sum();
    let prefill = start.elapsed() / 1_000_000;
    let mut random = Noise(3);
    let shapes: Vec<StepShape> = (0..10_000).map(|_| shape(&mut random)).collect();
    let start = std::time::Instant::now();
    for shape in &shapes {
        model.observe_shape(shape, 1e-2);
    }
    let observe = start.elapsed() / 10_000;
    println!("decode step {decode:?}, prefill {prefill:?}, observation {observe:?} ({})", sum + more);
    println!("{} bytes a model", size_of::<ProfileModel>());
    assert!(decode.as_nanos() < 25 && prefill.as_nanos() < 25 && observe.as_nanos() < 1000);
}

prop_compose! {
    fn observations()(
        prefill_tokens in prop_oneof![Just(0u32), 0u32..100_000, any::<u32>()],
        prefill_attention in prop_oneof![Just(0.0), 0.0..1e10, Just(f64::NAN), Just(1e300), Just(-1.0)],
        decodes in prop_oneof![0u32..1000, any::<u32>()],
        context_tokens in prop_oneof![0u64..10_000_000, any::<u64>()],
        seconds in prop_oneof![1e-9..1e4, 1e-3..1e-1, Just(0.0), Just(-1.0), Just(f64::INFINITY), Just(1e300)],
    ) -> StepObservation {
        StepObservation { prefill_tokens, prefill_attention, decodes, context_tokens, seconds }
    }
}

proptest! {
    /// Whatever nonsense was observed: factors within their limits, predictions finite, at least 0, and never falling
    /// when work is added; and the same again from the same steps.
    #[test]
    fn predictions_stay_possible_monotone_and_repeatable(
        steps in prop::collection::vec(observations(), 0..300), group in any::<bool>(),
        budget_tokens in prop_oneof![Just(0u32), Just(512), Just(2048)],
        p in 0u32..10_000, a in 0.0..1e9, d in 0u32..500, c in 0u64..1_000_000, more in 1u32..10_000,
    ) {
        let profile = profile(Profile::BUILT_IN[usize::from(group)]);
        let mut model = ProfileModel::new(profile.clone(), budget_tokens);
        let mut again = ProfileModel::new(profile, budget_tokens);
        for step in &steps {
            model.observe(step);
            again.observe(step);
            for factor in model.factors() {
                prop_assert!((FACTOR_MIN..=FACTOR_MAX).contains(&factor), "{:?}", model.corrections());
            }
        }
        prop_assert_eq!(model.factors().map(f64::to_bits), again.factors().map(f64::to_bits));
        let step = StepShape { prefill_tokens: p, prefill_attention: a, decodes: d, context_tokens: c, ..StepShape::default() };
        let seconds = model.step_seconds(&step);
        prop_assert!(seconds.is_finite() && seconds >= 0.0);
        for larger in [
            StepShape { prefill_tokens: p + more, ..step },
            StepShape { prefill_attention: a + f64::from(more), ..step },
            StepShape { decodes: d + more, ..step },
            StepShape { context_tokens: c + u64::from(more), ..step },
            StepShape { group_decodes: d + more, ..step },
        ] {
            prop_assert!(model.step_seconds(&larger) >= seconds, "{larger:?} {:?}", model.corrections());
        }
        let prefill = PrefillShape { new_tokens: p, cached_tokens: 77, budget_tokens: 0, decodes: d, context_tokens: c };
        let seconds = model.mixed_prefill_seconds(&prefill) * (1.0 - 1e-12);
        for larger in [
            PrefillShape { new_tokens: p + more, ..prefill },
            PrefillShape { cached_tokens: 77 + more, ..prefill },
            PrefillShape { decodes: d + more, ..prefill },
            PrefillShape { context_tokens: c + u64::from(more), ..prefill },
        ] {
            prop_assert!(model.mixed_prefill_seconds(&larger) >= seconds, "{larger:?} {:?}", model.corrections());
        }
    }
}
