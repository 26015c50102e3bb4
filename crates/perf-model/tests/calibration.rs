//! The built-in profiles against every point that was measured.
//!
//! The measured points lie in `profiles/measured/`; the table that comes of them is in `profiles/README.md`, and the test
//! that compares the two says how to write it anew.
#![allow(clippy::unwrap_used, reason = "a measured point that is missing fails the test")]

use std::fmt::Write as _;

use forebay_perf_model::{KvLayout, PrefillShape, Profile, StepShape};
use serde_json::Value;

/// Middle of the contexts at which the decodes of the chunk-budget table were measured.
const CONTEXT: u64 = 4375;

/// One measured point and what the profile says of it, in ms.
struct Point {
    series: &'static str,
    what: String,
    measured: f64,
    predicted: f64,
}

impl Point {
    fn percent(&self) -> f64 {
        100.0 * (self.predicted / self.measured - 1.0)
    }
}

fn load(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn rows<'a>(file: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    file[name].as_array().unwrap().iter()
}

fn count(row: &Value, name: &str) -> u32 {
    u32::try_from(row[name].as_u64().unwrap()).unwrap()
}

fn ms(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap()
}

/// TTFT of a prompt on an idle engine.
fn ttft(profile: &Profile, isl: u32, cached: u32, budget: u32) -> f64 {
    1e3 * (profile.request_seconds(isl) + profile.prefill_seconds(isl - cached, cached, budget))
}

/// The first of a batch is computed alone, the others together in steps of 8,192.
fn batch(profile: &Profile, batch: u32, isl: u32) -> f64 {
    let (others, length) = ((batch - 1) * isl, f64::from(isl));
    let mut seconds = profile.request_seconds(batch * isl) + profile.prefill_seconds(isl, 0, 8192);
    let mut left = others;
    while left > 0 {
        let prefill_tokens = left.min(8192);
        let prefill_attention = f64::from(prefill_tokens) * length / 2.0;
        seconds +=
            profile.step_seconds(&StepShape { prefill_tokens, prefill_attention, ..StepShape::default() });
        left -= prefill_tokens;
    }
    1e3 * seconds
}

/// TTFT of 8,000 tokens beside decodes: the prompt arrives in the middle of a decode step.
fn mixed(profile: &Profile, decodes: u32, budget_tokens: u32) -> f64 {
    let context_tokens = u64::from(decodes) * CONTEXT;
    let prefill = PrefillShape { new_tokens: 8000, cached_tokens: 0, budget_tokens, decodes, context_tokens };
    let wait = profile.decode_step_seconds(decodes, context_tokens) / 2.0;
    1e3 * (profile.request_seconds(8000) + wait + profile.mixed_prefill_seconds(&prefill))
}

/// TTFT of a decode leg: its request, the hand-over, its first step.
fn decode_leg(profile: &Profile, layout: KvLayout, isl: u32) -> f64 {
    let handover = profile.handover_seconds(layout, isl).unwrap();
    // The request's text is read once more, but that time is in the hand-over as it was fitted.
    let request = profile.request_seconds(0);
    1e3 * (request + handover + profile.decode_step_seconds(1, u64::from(isl)))
}

fn llama_points() -> Vec<Point> {
    let profile = Profile::built_in("h100-llama8b").unwrap();
    let base = load(include_str!("../profiles/measured/h100-llama8b.json"));
    let chunks = load(include_str!("../profiles/measured/h100-llama8b-chunk-budget.json"));
    let mut points = Vec::new();
    let mut add = |series, what, measured, predicted| {
        points.push(Point { series, what, measured, predicted });
    };
    for row in rows(&base, "prefill") {
        let isl = count(row, "isl");
        add("prefill", format!("{isl}"), ms(row, "ms"), ttft(&profile, isl, 0, 8192));
    }
    for row in rows(&base, "prefix") {
        let (isl, cached) = (count(row, "isl"), count(row, "cached"));
        let what = format!("{isl}, {cached} cached");
        add("cached prefix", what, ms(row, "ms"), ttft(&profile, isl, cached, 8192));
    }
    for row in rows(&base, "prefill_batch") {
        let (many, isl) = (count(row, "batch"), count(row, "isl"));
        add("prefill batch", format!("{many} x {isl}"), ms(row, "ms"), batch(&profile, many, isl));
    }
    let layouts = [
        ("per_layer_blocks", "decode leg, per layer", KvLayout::PerLayerBlocks),
        ("cross_layer_blocks", "decode leg, cross layer", KvLayout::CrossLayerBlocks),
    ];
    for (name, _, _) in layouts {
        for row in rows(&base, name) {
            let isl = count(row, "isl");
            add("prefill leg", format!("{isl}, {name}"), ms(row, "prefill"), ttft(&profile, isl, 0, 8192));
        }
    }
    for (name, series, layout) in layouts {
        for row in rows(&base, name) {
            let isl = count(row, "isl");
            add(series, format!("{isl}"), ms(row, "decode_ttft"), decode_leg(&profile, layout, isl));
        }
    }
    for row in rows(&chunks, "decode") {
        let (many, budget) = (count(row, "batch"), count(row, "budget"));
        let step = 1e3 * profile.decode_step_seconds(many, u64::from(many) * CONTEXT);
        add("decode, distinct contexts", format!("{many} at budget {budget}"), ms(row, "ms"), step);
    }
    for row in rows(&chunks, "idle") {
        let (isl, budget) = (count(row, "isl"), count(row, "budget"));
        let series = if budget == 512 { "chunks, idle, 512" } else { "chunks, idle" };
        add(series, format!("{isl} at budget {budget}"), ms(row, "ms"), ttft(&profile, isl, 0, budget));
    }
    for row in rows(&chunks, "mixed") {
        let (many, budget) = (count(row, "batch"), count(row, "budget"));
        let series = if budget == 512 { "chunks, mixed, 512" } else { "chunks, mixed" };
        let what = format!("8000 beside {many} at budget {budget}");
        add(series, what, ms(row, "ttft8k"), mixed(&profile, many, budget));
    }
    // KV that all sequences share is read from the L2 cache; the profile is of KV that each has to itself.
    for row in rows(&base, "decode_shared") {
        let (many, context) = (count(row, "batch"), ms(row, "ctx") as u64);
        let step = 1e3 * profile.decode_step_seconds(many, u64::from(many) * context);
        let series = if many == 256 {
            "decode, shared, 256"
        } else if context == 256 {
            "decode, shared, short"
        } else {
            "decode, shared, long"
        };
        add(series, format!("{many} of {context}"), ms(row, "ms"), step);
    }
    points
}

fn qwen_points() -> Vec<Point> {
    let profile = Profile::built_in("h100x2-qwen3-30b-a3b").unwrap();
    let measured = load(include_str!("../profiles/measured/h100x2-qwen3-30b-a3b.json"));
    let rank = |decodes: u32, context: u64, prefill_tokens: u32| StepShape {
        prefill_tokens,
        decodes,
        context_tokens: u64::from(decodes) * context,
        ..StepShape::default()
    };
    let pair = |row: &Value, prefill_tokens| {
        let context = u64::from(count(row, "ctx"));
        let ranks = [rank(count(row, "b0"), context, prefill_tokens), rank(count(row, "b1"), context, 0)];
        let what = format!("{} and {} of {context}", count(row, "b0"), count(row, "b1"));
        (what, 1e3 * profile.step_seconds(&StepShape::of_group(ranks)))
    };
    let mut points = Vec::new();
    for row in rows(&measured, "decode") {
        let (what, predicted) = pair(row, 0);
        let both: Vec<f64> = ["itl0", "itl1"].iter().filter_map(|itl| row[itl].as_f64()).collect();
        let itl = both.iter().sum::<f64>() / both.len() as f64;
        points.push(Point { series: "group, decode", what, measured: itl, predicted });
    }
    for row in rows(&measured, "stopped") {
        let (what, predicted) = pair(row, 8192);
        let what = format!("{what}, 8192 of prefill on the first");
        points.push(Point { series: "group, decodes stopped", what, measured: ms(row, "ms"), predicted });
    }
    for row in rows(&measured, "prefill") {
        let isl = count(row, "prefill");
        let predicted = ttft(&profile, isl, 0, 8192);
        points.push(Point {
            series: "group, prefill",
            what: format!("{isl}"),
            measured: ms(row, "ttft"),
            predicted,
        });
    }
    points
}

fn points() -> Vec<Point> {
    llama_points().into_iter().chain(qwen_points()).collect()
}

/// By series: the largest error that is allowed, in per cent. What lies behind the large ones: `profiles/README.md`.
const BOUNDS: [(&str, f64); 17] = [
    ("prefill", 4.5),
    ("cached prefix", 16.0),
    ("prefill batch", 8.5),
    ("prefill leg", 9.0),
    ("decode leg, per layer", 8.0),
    ("decode leg, cross layer", 2.0),
    ("decode, distinct contexts", 1.0),
    ("chunks, idle", 5.0),
    ("chunks, idle, 512", 14.0),
    ("chunks, mixed", 8.5),
    ("chunks, mixed, 512", 14.0),
    ("decode, shared, short", 8.0),
    ("decode, shared, long", 50.0),
    ("decode, shared, 256", 40.0),
    ("group, decode", 4.5),
    ("group, decodes stopped", 3.5),
    ("group, prefill", 0.5),
];

#[test]
fn every_measured_point_is_within_the_stated_bound() {
    let points = points();
    for point in &points {
        let bound = BOUNDS.iter().find(|(series, _)| *series == point.series);
        let (_, bound) = bound.unwrap_or_else(|| panic!("{}: no bound", point.series));
        let Point { series, what, measured, predicted } = point;
        assert!(
            point.percent().abs() <= *bound,
            "{series}: {what}: {predicted:.1} ms against {measured}, {:+.1} %",
            point.percent()
        );
    }
    for (series, _) in BOUNDS {
        assert!(points.iter().any(|point| point.series == series), "{series}: no point");
    }
    assert_eq!(points.len(), 130, "every measured point is here");
}

/// The table as the README has it.
fn table() -> String {
    let mut table = String::from("| series | point | measured, ms | profile, ms | error |\n");
    table.push_str("| --- | --- | ---: | ---: | ---: |\n");
    for point in points() {
        let Point { series, what, measured, predicted } = &point;
        writeln!(table, "| {series} | {what} | {measured:.1} | {predicted:.1} | {:+.1} % |", point.percent())
            .unwrap();
    }
    table
}

/// To write it anew: run this test with `-- --nocapture` and paste what it prints.
#[test]
fn the_table_in_the_readme_is_what_the_profiles_say() {
    let table = table();
    if !include_str!("../profiles/README.md").contains(&table) {
        println!("{table}");
        panic!("profiles/README.md has another table than the one above");
    }
}

/// Numbers that decisions rest on, held against the measured facts themselves.
#[test]
fn the_profile_has_the_measured_shape() {
    let profile = Profile::built_in("h100-llama8b").unwrap();
    let chunks = |budget| profile.prefill_seconds(8000, 0, budget);
    // 218 ms at 8192, 235 at 2048, 236 at 1024, 476 at 512.
    assert!(chunks(1024) < 1.15 * chunks(8192) && chunks(512) > 1.7 * chunks(1024), "1024 is the knee");
    let beside = |decodes: u32, budget_tokens| {
        let context_tokens = u64::from(decodes) * CONTEXT;
        let shape =
            PrefillShape { new_tokens: 8000, cached_tokens: 0, budget_tokens, decodes, context_tokens };
        profile.mixed_prefill_seconds(&shape)
    };
    // What 32 decodes cost a prefill of eight steps is more than their context costs eight decode steps.
    let context = 8.0 * (profile.decode_step_seconds(32, 32 * CONTEXT) - profile.decode_step_seconds(32, 0));
    assert!(beside(32, 1024) - chunks(1024) > 1.3 * context, "mixing has a price");
    let group = Profile::built_in("h100x2-qwen3-30b-a3b").unwrap();
    let rank = |decodes: u32| StepShape {
        decodes,
        context_tokens: u64::from(decodes) * 8000,
        ..StepShape::default()
    };
    let step = |ranks: [StepShape; 2]| 1e3 * group.step_seconds(&StepShape::of_group(ranks));
    // 22.2 ms against 17.7.
    assert!(step([rank(32), rank(0)]) - step([rank(16), rank(16)]) > 4.0, "the fullest rank sets the pace");
}
