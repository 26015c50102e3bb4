use std::error::Error as _;

use proptest::prelude::*;

use super::cost::{Factors, StepCost};
use super::curve::Curve;
use super::file::{ProfileFile, StepsFile, checked};
use super::*;

const LLAMA: &str = include_str!("../../profiles/h100-llama8b.json");
const QWEN: &str = include_str!("../../profiles/h100x2-qwen3-30b-a3b.json");

fn llama() -> Profile {
    Profile::parse(LLAMA).unwrap()
}

fn qwen() -> Profile {
    Profile::parse(QWEN).unwrap()
}

/// Round numbers: L is 10 ms for a token and 1 ms for each further one up to 11, then 2 ms; the least under a budget
/// of 8 is 5 ms a token.
fn round() -> Profile {
    let text = r#"{"version": 1, "name": "round", "measured": "nothing", "request": {"fixed_ms": 7, "token_ms": 0.5},
        "steps": {"rank": {"launch_ms": [[1, 10], [11, 20], [16, 30]], "attention_ms": 0.01, "context_token_ms": 0.001,
        "mixed_context_token_ms": 0.0005, "budgets": [{"tokens": 8, "token_min_ms": 5}]}},
        "handover": [{"layout": "cross_layer_blocks", "fixed_ms": 4, "token_ms": 0.25, "start_fixed_ms": 1, "start_token_ms": 0.5}]}"#;
    Profile::parse(text).unwrap()
}

fn close(ms: f64, seconds: f64) -> bool {
    (1e3 * seconds - ms).abs() < 1e-9 * ms.max(1.0)
}

#[test]
fn built_in_profiles_are_valid_and_named_after_themselves() {
    for name in Profile::BUILT_IN {
        assert_eq!(Profile::built_in(name).expect(name).name(), name);
    }
    assert_eq!(Profile::built_in("h200"), None);
}

#[test]
fn a_curve_is_straight_between_points_and_beyond() {
    let curve = Curve::new(&[(2, 1.0), (4, 2.0), (8, 10.0)]);
    //                  below  first  between  knot   between  last    beyond
    for (count, expected) in
        [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0), (6, 6.0), (8, 10.0), (10, 14.0)]
    {
        assert_eq!(curve.at(count), expected, "at {count}");
    }
    let flat = Curve::new(&[(5, 3.0)]);
    assert_eq!((flat.at(0), flat.at(5), flat.at(u32::MAX)), (3.0, 3.0, 3.0), "one point is a constant");
}

#[test]
fn a_step_costs_what_one_computes_by_hand() {
    let shape = |prefill_tokens, prefill_attention, decodes, context_tokens, budget_tokens| StepShape {
        prefill_tokens,
        prefill_attention,
        decodes,
        context_tokens,
        group_decodes: 0,
        budget_tokens,
    };
    //     what                                       P   A      n  C     budget   ms
    for (what, shape, ms) in [
        ("nothing", shape(0, 0.0, 0, 0, 0), 0.0),
        ("one decode: L(1)", shape(0, 0.0, 1, 0, 0), 10.0),
        ("four decodes of 500: 13 + 2", shape(0, 0.0, 4, 2000, 8), 15.0),
        ("ten prompt tokens: 19 + 0.5", shape(10, 50.0, 0, 0, 0), 19.5),
        ("mixed: L(14) = 26, 0.5, 2 + 1", shape(10, 50.0, 4, 2000, 16), 29.5),
        ("beyond the last point: 30 + 2 x 4", shape(20, 0.0, 0, 0, 0), 38.0),
        ("a narrow budget: 8 x 5, not 17 + 3", shape(4, 0.0, 4, 2000, 8), 40.0),
        ("narrower still, as the narrowest", shape(4, 0.0, 4, 2000, 3), 40.0),
        ("but no less than its sum: 17 + 90", shape(4, 0.0, 4, 60000, 8), 107.0),
        ("attention that is no number is none", shape(10, f64::NAN, 0, 0, 0), 19.0),
        ("nor is negative attention", shape(10, -1e9, 0, 0, 0), 19.0),
    ] {
        let seconds = round().step_seconds(&shape);
        assert!(close(ms, seconds), "{what}: {seconds}");
    }
    let most = shape(u32::MAX, 0.0, 0, 0, 0);
    let more = StepShape { decodes: 5, ..most };
    assert_eq!(
        round().step_seconds(&more),
        round().step_seconds(&most),
        "counts end, they do not start over"
    );
    assert!(close(7.0 + 50.0, round().request_seconds(100)));
}

#[test]
fn a_prefill_in_chunks_costs_what_one_computes_by_hand() {
    let shape = |new_tokens, cached_tokens, budget_tokens, decodes, context_tokens| PrefillShape {
        new_tokens,
        cached_tokens,
        budget_tokens,
        decodes,
        context_tokens,
    };
    //     what                                                        n   c    budget  decodes         ms
    for (what, shape, ms) in [
        ("nothing, beside whatever decodes", shape(0, 9, 9, 9, 9), 0.0),
        ("at once: L(16) + 1.28", shape(16, 0, 0, 0, 0), 31.28),
        ("cached: L(16) + 0.01 x (16 x 100 + 128)", shape(16, 100, 0, 0, 0), 47.28),
        ("two chunks of 11 and 5: 20 + 14 + 1.28", shape(16, 0, 11, 0, 0), 35.28),
        (
            "decodes go first: chunks of 7, 7 and 2",
            shape(16, 0, 11, 4, 2000),
            20.0 + 20.0 + 15.0 + 1.28 + 9.0,
        ),
        ("one token a step is the least", shape(2, 0, 11, 20, 0), 2.0 * 40.0 + 0.02),
        ("a narrow budget: 8, 8 and 3 tokens of 5 ms", shape(19, 0, 8, 0, 0), 40.0 + 40.0 + 15.0),
    ] {
        let seconds = round().mixed_prefill_seconds(&shape);
        assert!(close(ms, seconds), "{what}: {seconds}");
    }
    assert_eq!(
        round().prefill_seconds(16, 100, 11),
        round().mixed_prefill_seconds(&shape(16, 100, 11, 0, 0))
    );
}

#[test]
fn a_hand_over_costs_what_one_computes_by_hand_and_only_in_a_layout_that_was_measured() {
    let seconds =
        |layout| round().handover_seconds(layout, 100).zip(round().handover_start_seconds(layout, 100));
    let (pull, start) = seconds(KvLayout::CrossLayerBlocks).unwrap();
    assert!(close(29.0, pull) && close(51.0, start), "{pull} {start}");
    assert_eq!(seconds(KvLayout::PerLayerBlocks), None);
}

/// Built-in numbers: base(48) = 14.2, base(16) = 11.8; decode 0.0267, context 2.91e-5; prefill 86.6 + 0.00695 x 1,000.
#[test]
fn a_group_pays_for_its_fullest_rank_and_for_a_prefill_anywhere() {
    let rank = |prefill_tokens, decodes, context_tokens| StepShape {
        prefill_tokens,
        decodes,
        context_tokens,
        ..StepShape::default()
    };
    let ms = |ranks: &[StepShape]| 1e3 * qwen().step_seconds(&StepShape::of_group(ranks.iter().copied()));
    let decode = 0.0267 * 32.0 + 2.91e-5 * 64_000.0;
    assert!((ms(&[rank(0, 32, 64_000), rank(0, 16, 8_000)]) - 14.2 - decode).abs() < 1e-9);
    assert!((ms(&[rank(0, 32, 64_000), rank(1000, 0, 0)]) - 86.6 - 6.95 - decode).abs() < 1e-9);
    assert_eq!(ms(&[rank(0, 16, 8_000), rank(0, 0, 0)]), ms(&[rank(0, 16, 8_000)]), "an idle rank is free");
    assert!((1e3 * qwen().decode_step_seconds(16, 0) - 11.8 - 16.0 * 0.0267).abs() < 1e-9);
    assert_eq!(ms(&[]), 0.0);
}

/// The sum that the closed form stands for.
fn steps_of(profile: &Profile, factors: &Factors, shape: &PrefillShape) -> f64 {
    let (mut sum, mut done) = (0.0, 0);
    while done < shape.new_tokens {
        let m = shape.chunk_tokens().min(shape.new_tokens - done);
        let (tokens, before) = (f64::from(m), f64::from(shape.cached_tokens + done));
        sum += profile.steps.step_seconds(
            factors,
            &StepShape {
                prefill_tokens: m,
                prefill_attention: tokens * before + tokens * tokens / 2.0,
                decodes: shape.decodes,
                context_tokens: shape.context_tokens,
                group_decodes: 0,
                budget_tokens: shape.budget_tokens,
            },
        );
        done += m;
    }
    sum
}

proptest! {
    #[test]
    fn a_prefill_is_the_sum_of_its_steps(
        new_tokens in 0u32..20_000, cached_tokens in 0u32..100_000, decodes in 0u32..600, each in 0u64..10_000,
        budget_tokens in prop_oneof![Just(0u32), Just(7), Just(512), Just(1024), Just(8192), 64u32..3000],
        factors in prop::array::uniform5(0.05..20.0f64),
    ) {
        let context_tokens = each * u64::from(decodes);
        let shape = PrefillShape { new_tokens, cached_tokens, budget_tokens, decodes, context_tokens };
        for profile in [llama(), qwen(), round()] {
            let sum = steps_of(&profile, &factors, &shape);
            let closed = profile.steps.prefill_seconds(&factors, &shape);
            prop_assert!((closed - sum).abs() <= 1e-9 * sum, "{}: {closed} against {sum}", profile.name());
        }
    }

    /// Whatever is asked: finite, at least 0, and no less when there is more to do. Counts are drawn from all
    /// magnitudes.
    #[test]
    fn answers_are_possible_and_never_fall_when_work_is_added(
        p in count(), d in count(), c in count(), g in count(), more in 1u32..100_000,
        attention in prop_oneof![Just(0.0), 0.0..1e12, Just(f64::NAN), Just(f64::INFINITY), Just(-1e300), Just(1e300)],
        budget_tokens in prop_oneof![Just(0u32), Just(512), count()],
    ) {
        let step = StepShape {
            prefill_tokens: p,
            prefill_attention: attention,
            decodes: d,
            context_tokens: u64::from(c) * u64::from(c),
            group_decodes: g,
            budget_tokens,
        };
        let larger = |change: fn(&mut StepShape, u32)| { let mut step = step; change(&mut step, more); step };
        let prefill = PrefillShape { new_tokens: p, cached_tokens: c, budget_tokens, decodes: d, context_tokens: u64::from(g) };
        let longer = |change: fn(&mut PrefillShape, u32)| { let mut shape = prefill; change(&mut shape, more); shape };
        for profile in [llama(), qwen(), round()] {
            let seconds = profile.step_seconds(&step);
            prop_assert!(seconds.is_finite() && seconds >= 0.0, "{seconds}");
            for step in [
                larger(|step, more| step.prefill_tokens = step.prefill_tokens.saturating_add(more)),
                larger(|step, more| step.prefill_attention += f64::from(more)),
                larger(|step, more| step.decodes = step.decodes.saturating_add(more)),
                larger(|step, more| step.context_tokens = step.context_tokens.saturating_add(u64::from(more))),
                larger(|step, more| step.group_decodes = step.group_decodes.saturating_add(more)),
            ] {
                prop_assert!(profile.step_seconds(&step) >= seconds, "{}: {step:?}", profile.name());
            }
            let seconds = profile.mixed_prefill_seconds(&prefill);
            prop_assert!(seconds.is_finite() && seconds >= 0.0, "{seconds}");
            for shape in [
                longer(|shape, more| shape.new_tokens = shape.new_tokens.saturating_add(more)),
                longer(|shape, more| shape.cached_tokens = shape.cached_tokens.saturating_add(more)),
                longer(|shape, more| shape.context_tokens += u64::from(more)),
                longer(|shape, more| shape.decodes = shape.decodes.saturating_add(more)),
            ] {
                // Chunks that are summed in closed form differ from their sum by rounding.
                let more = profile.mixed_prefill_seconds(&shape);
                prop_assert!(more >= seconds * (1.0 - 1e-12), "{}: {shape:?} {more} {seconds}", profile.name());
            }
        }
    }

    /// Any text: an error or a profile, never a panic. Cuts and swaps of a valid one reach deepest.
    #[test]
    fn no_text_breaks_the_reader(at in 0usize..900, cut in 0usize..40, with in "[-0-9.eE\\[\\]{}\",:a-z]{0,8}") {
        let at = at.min(LLAMA.len());
        let to = (at + cut).min(LLAMA.len());
        let text = format!("{}{with}{}", &LLAMA[..at], &LLAMA[to..]);
        if let Ok(profile) = Profile::parse(&text) {
            let seconds = profile.step_seconds(&StepShape { prefill_tokens: 100, ..StepShape::default() });
            prop_assert!(seconds.is_finite() && seconds > 0.0);
        }
    }
}

/// Counts of every magnitude.
fn count() -> impl Strategy<Value = u32> {
    (0u32..32, any::<u32>()).prop_map(|(shift, bits)| bits >> shift)
}

/// The text of an error and of its cause.
fn error(text: &str) -> String {
    match Profile::parse(text) {
        Ok(_) => "valid".to_owned(),
        Err(error) => match error.source() {
            Some(cause) => format!("{error} / {cause}"),
            None => error.to_string(),
        },
    }
}

#[test]
fn an_entry_that_cannot_be_is_named_with_what_to_do() {
    //   (replaced in the built-in profile, by, what the error must say)
    for (from, to, says) in [
        ("[64, 7.19]", "[64, -7.19]", "`steps.rank.launch_ms[1]` is -7.19: give a number of ms from 0"),
        ("[64, 7.19]", "[64, 0]", "`steps.rank.launch_ms[1]` is 0 ms: a step takes time"),
        ("[64, 7.19]", "[64, 9e9]", "`steps.rank.launch_ms[1]` is 9000000000: give"),
        ("[64, 7.19]", "[64, 1e999]", "number out of range at line 9"),
        ("[64, 7.19]", "[64, NaN]", "expected value at line 9"),
        ("[64, 7.19]", "[64]", "invalid length 1, expected a tuple of size 2"),
        ("[64, 7.19]", "[-64, 7.19]", "expected u32"),
        ("[64, 7.19]", "[128, 7.19]", "`steps.rank.launch_ms[2]` is for 128 after 128: order the entries"),
        ("[64, 7.19]", "[640, 7.19]", "`steps.rank.launch_ms[2]` is for 128 after 640: order the entries"),
        ("[1, 6.53]", "[0, 6.53]", "`steps.rank.launch_ms[0]` is for 0 after 0: order the entries"),
        (
            "[64, 7.19]",
            "[64, 8.2]",
            "`steps.rank.launch_ms[2]` is 8.19 ms after 8.2 ms: more work never takes less",
        ),
        (r#""attention_ms": 9.31e-7,"#, "", "missing field `attention_ms`"),
        ("9.31e-7", "-9.31e-7", "`steps.rank.attention_ms` is -0.000000931: give"),
        ("3.93e-5", "null", "`steps.rank.context_token_ms` cannot be read"),
        (r#""request""#, r#""reqest""#, "unknown field `reqest`, expected one of"),
        (r#""rank": {"#, r#""rack": {"#, "unknown variant `rack`, expected `rank` or `group`"),
        (r#""version": 1"#, r#""version": 2, "colour": 3"#, "profile version 2: this build reads version 1"),
        (r#""version": 1,"#, "", "missing field `version`"),
        (r#""version": 1,"#, r#""version": 1, "version": 1,"#, "duplicate field `version`"),
        (r#""h100-llama8b""#, r#""""#, "`name` is empty: give at least one"),
        ("cross_layer_blocks", "per_layer_blocks", "`handover[1]` repeats a layout: keep one entry of each"),
        ("cross_layer_blocks", "blocks", "unknown variant `blocks`"),
        ("0.00193", "-1", "`handover[1].token_ms` is -1: give"),
        (r#"[{ "tokens": 512, "#, r#"[{ "tokens": 0, "#, "`steps.rank.budgets[0]` is for 0 after 0: order"),
        (
            "0.0525 }",
            r#"0.0525 }, { "tokens": 1024, "token_min_ms": 0.06 }"#,
            "`steps.rank.budgets[1]` is 0.06 ms after 0.0525 ms",
        ),
        ("6.31", "-6.31", "`request.fixed_ms` is -6.31: give"),
    ] {
        assert!(LLAMA.contains(from), "{from}");
        let message = error(&LLAMA.replacen(from, to, 1));
        assert!(message.contains(says), "{to}\n  says {message}\n  not  {says}");
    }
    for (from, to, says) in [
        ("[2, 6.39]", "[2, 6.0]", "`steps.group.sequences_ms[1]` is 6 ms after 6.28 ms"),
        ("86.6", "-86.6", "`steps.group.prefill_step_ms` is -86.6: give"),
        (r#""fullest_decode_ms""#, r#""fullest_ms""#, "unknown field `fullest_ms`"),
    ] {
        let message = error(&QWEN.replacen(from, to, 1));
        assert!(message.contains(says), "{to}\n  says {message}\n  not  {says}");
    }
}

#[test]
fn what_is_too_large_or_no_json_is_refused() {
    assert!(
        error(&" ".repeat(PROFILE_BYTES_MAX + 1)).starts_with("profile of 65537 bytes: give at most 65536")
    );
    assert!(error("").contains("EOF while parsing"));
    assert!(error("[1, 2]").contains("cannot be read"));
    assert!(error(&format!("{LLAMA} x")).contains("trailing characters"));
    let points = |count| {
        let points: Vec<String> = (1..=count).map(|tokens| format!("[{tokens}, {tokens}]")).collect();
        let from = LLAMA.find("[1, 6.53]").unwrap();
        let to = LLAMA.find("[8192, 178.6]").unwrap() + "[8192, 178.6]".len();
        error(&format!("{}{}{}", &LLAMA[..from], points.join(","), &LLAMA[to..]))
    };
    assert_eq!(points(PROFILE_POINTS_MAX), "valid");
    assert!(points(PROFILE_POINTS_MAX + 1).contains("`steps.rank.launch_ms` has 65: give at most 64"));
    assert!(points(0).contains("`steps.rank.launch_ms` is empty: give at least one"));
    assert!(error(&LLAMA.replace("vLLM", &"v".repeat(300))).contains("`measured` has 3"));
}

/// JSON has no NaN, but whoever fills the form otherwise is refused as well.
#[test]
fn no_number_is_not_a_time() {
    let file: ProfileFile = serde_json::from_str(LLAMA).unwrap();
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut file = file.clone();
        let StepsFile::Rank(rank) = &mut file.steps else { panic!("a rank's profile") };
        rank.launch_ms[3].1 = odd;
        let message = checked(file).unwrap_err().to_string();
        assert!(message.contains("`steps.rank.launch_ms[3]` is "), "{message}");
    }
}

#[test]
fn the_same_text_gives_the_same_profile() {
    assert_eq!(llama(), llama());
    assert!(matches!(llama().steps, StepCost::Rank(_)) && matches!(qwen().steps, StepCost::Group(_)));
}

/// `cargo test --release -p forebay-perf-model -- --ignored --nocapture`
#[test]
#[ignore = "a timing: release build, quiet machine"]
fn an_answer_costs_less_than_25_nanoseconds() {
    let profile = llama();
    let time = |what: &str, ask: &dyn Fn(u32) -> f64| {
        let start = std::time::Instant::now();
        let sum: f64 = (0..1_000_000).map(|i| ask(std::hint::black_box(i))).sum();
        let each = start.elapsed() / 1_000_000;
        println!("{what}: {each:?} ({sum})");
        assert!(each < std::time::Duration::from_nanos(25), "{what}");
    };
    time("step", &|i| {
        profile.step_seconds(&StepShape {
            prefill_tokens: i % 4096,
            prefill_attention: f64::from(i),
            decodes: i % 64,
            context_tokens: u64::from(i),
            ..StepShape::default()
        })
    });
    time("decode step", &|i| profile.decode_step_seconds(i % 128, u64::from(i)));
    time("prefill", &|i| profile.prefill_seconds(i % 40_000, i % 1000, 2048));
    time("mixed prefill, narrow budget", &|i| {
        profile.mixed_prefill_seconds(&PrefillShape {
            new_tokens: i % 40_000,
            cached_tokens: 0,
            budget_tokens: 512,
            decodes: i % 32,
            context_tokens: u64::from(i % 100_000),
        })
    });
}
