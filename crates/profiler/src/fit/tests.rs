use forebay_perf_model::PrefillShape;
use proptest::prelude::*;

use super::*;
use crate::{Outcome, Pace, Sample, Scope, Survey, plan};

const STEP_TOKENS: u32 = 8_192;

fn subject() -> Subject {
    Subject {
        name: "made-up".to_owned(),
        measured: "nothing".to_owned(),
        step_tokens: STEP_TOKENS,
        layout: KvLayout::CrossLayerBlocks,
    }
}

fn scope() -> Scope {
    Scope {
        context_tokens_max: 40_000,
        pool_tokens: 450_000,
        block_size_tokens: 16,
        step_tokens: STEP_TOKENS,
        prompt_tokens_max: 32_768,
        sequences_max: 128,
        caches: true,
        hands_over: true,
    }
}

/// Numbers from 0 to 1, the same for one seed.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let number = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (number >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// An engine that takes what a profile says, less or more.
struct MadeUp {
    profile: Profile,
    /// Largest error of a usual measurement, as a share.
    noise: f64,
    /// Share of measurements that take several times as long.
    outliers: f64,
    draw: Draw,
}

impl MadeUp {
    fn measure(&mut self, point: Point) -> Sample {
        let true_sample = exact(&self.profile, point);
        let mut factor = 1.0 + self.noise * (2.0 * self.draw.next() - 1.0);
        if self.draw.next() < self.outliers {
            factor *= 2.0 + 8.0 * self.draw.next();
        }
        Sample { seconds: true_sample.seconds * factor, ..true_sample }
    }

    /// All that a survey asks for, in a time that only the survey counts.
    fn survey(&mut self) -> Survey {
        let pace = Pace {
            request_seconds: self.profile.request_seconds(0),
            prefill_token_seconds: self.profile.prefill_seconds(1_024, 0, STEP_TOKENS) / 1_024.0,
            step_seconds: self.profile.decode_step_seconds(1, 0),
            step_tokens: STEP_TOKENS,
        };
        let mut survey = Survey::new(plan(&scope()), pace, 1e5);
        let mut elapsed = 0.0;
        while let Some(index) = survey.next(elapsed) {
            let sample = self.measure(survey.points()[index].point);
            survey.took(index, Outcome::Measured(sample), 2.0 * sample.seconds);
            elapsed += 2.0 * sample.seconds;
        }
        survey
    }
}

fn exact(profile: &Profile, point: Point) -> Sample {
    let alone = |new, cached| {
        profile.request_seconds(new + cached) + profile.prefill_seconds(new, cached, STEP_TOKENS)
    };
    match point {
        Point::Prefill { new_tokens, cached_tokens } => {
            Sample { seconds: alone(new_tokens, cached_tokens), cached_tokens, ..Sample::default() }
        }
        Point::Decode { sequences, context_tokens } => {
            let context_tokens = f64::from(sequences) * f64::from(context_tokens + 40);
            let seconds = profile.decode_step_seconds(sequences, context_tokens as u64);
            Sample { seconds, context_tokens, ..Sample::default() }
        }
        Point::Mixed { new_tokens, sequences, context_tokens } => {
            let context_tokens = f64::from(sequences) * f64::from(context_tokens + 40);
            let seconds = profile.step_seconds(&StepShape {
                prefill_tokens: new_tokens,
                prefill_attention: f64::from(new_tokens).powi(2) / 2.0,
                decodes: sequences,
                context_tokens: context_tokens as u64,
                ..StepShape::default()
            });
            Sample { seconds, context_tokens, ..Sample::default() }
        }
        Point::Handover { tokens } => {
            let layout = KvLayout::CrossLayerBlocks;
            let moved = profile.handover_seconds(layout, tokens).unwrap_or(0.0);
            let seconds =
                profile.request_seconds(0) + moved + profile.decode_step_seconds(1, u64::from(tokens));
            Sample {
                seconds,
                start_seconds: profile.handover_start_seconds(layout, tokens),
                ..Sample::default()
            }
        }
    }
}

/// How far two profiles are apart, at the worst: steps, whole prompts, prompts beside decodes.
fn apart(truth: &Profile, found: &Profile) -> (f64, String) {
    let mut worst = (0.0, String::new());
    let mut compare = |what: String, a: f64, b: f64| {
        let off = (b / a - 1.0).abs();
        if off > worst.0 {
            worst = (off, format!("{what}: {:.3} ms, not {:.3}", 1e3 * b, 1e3 * a));
        }
    };
    for decodes in [1, 3, 8, 24, 64, 100, 128] {
        for context in [100_u64, 1_500, 4_000] {
            let all = context * u64::from(decodes);
            if all > 270_000 {
                continue; // beyond what is measured
            }
            let seconds = |profile: &Profile| profile.decode_step_seconds(decodes, all);
            compare(format!("{decodes} of {context}"), seconds(truth), seconds(found));
            for new_tokens in [512, 4_000] {
                let shape = PrefillShape {
                    new_tokens,
                    cached_tokens: 0,
                    budget_tokens: STEP_TOKENS,
                    decodes,
                    context_tokens: all,
                };
                let seconds = |profile: &Profile| profile.mixed_prefill_seconds(&shape);
                compare(
                    format!("{new_tokens} beside {decodes} of {context}"),
                    seconds(truth),
                    seconds(found),
                );
            }
        }
    }
    for (new, cached) in
        [(20, 0), (300, 0), (2_000, 0), (5_000, 0), (20_000, 0), (30_000, 0), (2_000, 6_000), (500, 15_000)]
    {
        let seconds = |profile: &Profile| {
            profile.request_seconds(new + cached) + profile.prefill_seconds(new, cached, STEP_TOKENS)
        };
        compare(format!("{new} after {cached}"), seconds(truth), seconds(found));
    }
    worst
}

fn recovered(truth: Profile, noise: f64, outliers: f64, seed: u64) -> (Fit, f64, String) {
    let mut engine = MadeUp { profile: truth, noise, outliers, draw: Draw(seed) };
    let survey = engine.survey();
    let fit = fit(survey.points(), &subject()).expect("enough was measured");
    let found = Profile::from_file(fit.file.clone()).expect("a profile");
    let (off, what) = apart(&engine.profile, &found);
    (fit, off, what)
}

#[test]
fn the_profile_of_an_h100_is_found_again() {
    let truth = || Profile::built_in("h100-llama8b").expect("it comes with the crate");
    let (fit, off, what) = recovered(truth(), 0.0, 0.0, 1);
    assert!(off < 0.02, "without noise: {what}");
    assert!(fit.notes.is_empty(), "{:?}", fit.notes);
    let (fit, off, what) = recovered(truth(), 0.03, 0.05, 1);
    assert!(off < 0.06, "with noise: {what}");
    for kind in Kind::ALL {
        let errors = fit.errors(kind).expect("each kind was measured");
        assert!(errors.p90 < 0.06 && errors.p90 <= errors.max, "{}: {errors:?}", kind.name());
    }
    let handed = &fit.file.handover[0];
    assert!((handed.token_ms / 0.00193 - 1.0).abs() < 0.2, "{handed:?}");
    assert!((handed.start_token_ms / 0.0009 - 1.0).abs() < 0.05, "{handed:?}");
}

#[test]
fn a_lasting_outlier_moves_little_and_shows() {
    let mut engine = MadeUp {
        profile: Profile::built_in("h100-llama8b").expect("it comes with the crate"),
        noise: 0.01,
        outliers: 0.0,
        draw: Draw(7),
    };
    let mut points = engine.survey().points().to_vec();
    let odd = Point::Prefill { new_tokens: 3_072, cached_tokens: 0 };
    for progress in points.iter_mut().filter(|progress| progress.point == odd) {
        progress.samples.iter_mut().for_each(|sample| sample.seconds *= 3.0);
    }
    let fit = fit(&points, &subject()).expect("enough was measured");
    let found = Profile::from_file(fit.file.clone()).expect("a profile");
    let (off, what) = apart(&engine.profile, &found);
    assert!(off < 0.08, "{what}");
    let shown = fit.points.iter().find(|fitted| fitted.point == odd).expect("it was measured");
    assert!(shown.error() < -0.5, "{shown:?}");
}

#[test]
fn too_little_is_said_and_nothing_is_made_of_it() {
    let decode = Progress::measured(
        Point::Decode { sequences: 1, context_tokens: 10 },
        vec![Sample { seconds: 0.01, context_tokens: 30.0, ..Sample::default() }],
    );
    let error = fit(std::slice::from_ref(&decode), &subject()).expect_err("no prompts").to_string();
    assert_eq!(error, "0 points of kind `prefill` were measured, and 2 are needed");
    let prefill = |new_tokens| {
        Progress::measured(
            Point::Prefill { new_tokens, cached_tokens: 0 },
            vec![Sample { seconds: 0.02, ..Sample::default() }],
        )
    };
    let fit = fit(&[decode, prefill(16), prefill(64)], &subject()).expect("the least there may be");
    assert_eq!(fit.notes.len(), 3, "{:?}", fit.notes);
    assert!(Profile::from_file(fit.file).is_ok());
}

/// The profile of an engine with this launch curve, and how long its requests and contexts take.
fn made_up(
    launch_ms: Vec<(u32, f64)>,
    request: (f64, f64),
    attention: f64,
    context: f64,
    mixed: f64,
) -> Profile {
    Profile::from_file(ProfileFile {
        version: ProfileFile::VERSION,
        name: "truth".to_owned(),
        measured: "made up".to_owned(),
        request: RequestFile { fixed_ms: request.0, token_ms: request.1 },
        steps: StepsFile::Rank(RankFile {
            launch_ms,
            attention_ms: attention,
            context_token_ms: context,
            mixed_context_token_ms: mixed,
            budgets: Vec::new(),
        }),
        handover: vec![HandoverFile {
            layout: KvLayout::CrossLayerBlocks,
            fixed_ms: 5.0,
            token_ms: 0.01,
            start_fixed_ms: 1.0,
            start_token_ms: 0.001,
        }],
    })
    .expect("its entries are in bounds")
}

/// A profile whose every term may be large or nearly nothing.
fn profiles() -> impl Strategy<Value = Profile> {
    let rises = proptest::collection::vec(0.2..3.0_f64, 8);
    (
        0.5..20.0_f64,
        0.001..0.2_f64,
        rises,
        1e-8..3e-6_f64,
        0.0..1e-4_f64,
        0.0..1.0_f64,
        0.5..10.0_f64,
        0.0..2e-3_f64,
    )
        .prop_map(|(base, per_token, rises, attention, context, mix, fixed, token)| {
            let knots = [1_u32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192];
            let mut launch_ms = vec![(1, base)];
            for (pair, rise) in knots.windows(2).zip(rises) {
                let last = launch_ms.last().map_or(base, |last| last.1);
                launch_ms.push((pair[1], last + rise * per_token * f64::from(pair[1] - pair[0])));
            }
            made_up(launch_ms, (fixed, token), attention, context, mix * context)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// One that runs short steps from graphs and longer ones without them.
    #[test]
    fn an_engine_whose_steps_jump_is_found(edge in 130_u32..4_000, jump in 0.6..1.5_f64, seed in any::<u64>()) {
        let jump_ms = jump * (15.0 + 0.02 * f64::from(edge));
        // It is found to within a few tokens: what is compared must not lie there.
        let compared = [300, 2_000].into_iter().chain([1, 3, 8, 24, 64, 100, 128].into_iter().flat_map(|it| [512 + it, 4_000 + it]));
        prop_assume!(compared.map(|tokens: u32| tokens.abs_diff(edge)).all(|apart| apart > 1 + edge / 100));
        let ms = |tokens: u32| 7.0 + 0.02 * f64::from(tokens) + if tokens > edge { jump_ms } else { 0.0 };
        let mut tokens = vec![1, 128, edge, edge + 1, 8_192];
        tokens.dedup();
        let curve = tokens.into_iter().map(|tokens| (tokens, ms(tokens))).collect();
        let truth = made_up(curve, (8.0, 0.001), 9e-7, 5e-5, 0.0);
        let (fit, off, what) = recovered(truth, 0.02, 0.0, seed);
        prop_assert!(off < 0.08, "{}: {:#?}", what, fit);
        let StepsFile::Rank(found) = fit.file.steps else { panic!("one rank was measured") };
        let close = |knot: &(u32, f64), at: u32| knot.0.abs_diff(at) <= 1 + edge / 100;
        let knots = found.launch_ms;
        let steep = knots.windows(2).find(|pair| pair[1].1 - pair[0].1 > jump_ms / 2.0 && close(&pair[0], edge));
        prop_assert!(steep.is_some_and(|pair| close(&pair[1], edge)), "{knots:?}");
    }

    #[test]
    fn whatever_the_engine_its_profile_is_found(truth in profiles(), seed in any::<u64>()) {
        let (fit, off, what) = recovered(truth, 0.02, 0.03, seed);
        prop_assert!(off < 0.08, "{}: {:#?}", what, fit);
    }

    #[test]
    fn whatever_is_measured_makes_a_profile_that_never_falls(
        seconds in proptest::collection::vec(1e-4..5.0_f64, 60), cached in any::<bool>(),
    ) {
        let points = plan(&Scope { caches: cached, ..scope() });
        let measured = points.iter().zip(&seconds).map(|(point, seconds)| {
            Progress::measured(*point, vec![Sample { seconds: *seconds, ..exact_shape(*point) }])
        });
        let fit = fit(&measured.collect::<Vec<_>>(), &subject()).expect("enough was measured");
        let profile = Profile::from_file(fit.file).expect("a profile");
        let mut last = 0.0;
        for tokens in [1, 5, 16, 100, 1_000, 5_000, 8_192, 20_000] {
            let step = profile.decode_step_seconds(tokens, 0);
            prop_assert!(step >= last && step.is_finite());
            last = step;
        }
    }
}

/// What a point's sample says besides its seconds.
fn exact_shape(point: Point) -> Sample {
    exact(&Profile::built_in("h100-llama8b").expect("it comes with the crate"), point)
}
