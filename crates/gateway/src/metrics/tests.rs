use crate::{decisions::Pace, orchestrator::api::RankStatus};
use std::time::Duration;

use forebay_types::{Leaning, RankLoad, Role};

use super::*;

fn touched() -> Metrics {
    let metrics = Metrics::new();
    let model: Arc<str> = "m".into();
    let label = ModelLabel { model: model.clone() };
    for outcome in [Outcome::Ok, Outcome::Refused] {
        metrics
            .requests
            .get_or_create(&RequestLabels { model: model.clone(), endpoint: Endpoint::Chat, outcome })
            .inc();
    }
    for seconds in [&metrics.ttft, &metrics.itl, &metrics.e2e, &metrics.queue] {
        seconds.get_or_create(&label).observe(Duration::from_millis(30));
    }
    for tokens in [&metrics.prompt_tokens, &metrics.output_tokens, &metrics.cached_tokens] {
        tokens.get_or_create(&label).inc_by(3);
    }
    metrics.transfers.get_or_create(&TransferLabels { outcome: TransferOutcome::Done }).inc();
    metrics.decisions.get_or_create(&DecisionLabels { policy: "cost", kind: DecisionKind::Split }).inc();
    metrics.note_split(&model, Savings { ttft_seconds: 1.0, decode_seconds: -0.5, transfer_seconds: 0.25 });
    for ttft_seconds in [0.3, 0.1] {
        let prediction = Prediction {
            ttft_seconds,
            ttft_seconds_real: 0.2,
            itl: Some(Pace { seconds: ttft_seconds / 10.0, seconds_real: 0.02 }),
            cached_tokens: 50,
            cached_tokens_real: 30,
        };
        metrics.note_prediction(&model, &prediction);
    }
    metrics.set_index("announced", &IndexStats::default());
    metrics
}

fn engine(name: &str) -> EngineStatus {
    EngineStatus {
        engine: name.into(),
        kind: "sim".into(),
        incarnation: 1,
        state: "ready".into(),
        role: Role::Both,
        model: "m".into(),
        load: RankLoad { running: 2, waiting: 1, blocks_total: 10, blocks_free: 4, ..RankLoad::default() },
        breaker: "closed".into(),
        leaning: Leaning::Prefill,
        prefill_share: 0.0,
        indexed_blocks: 0,
        restarts: 0,
        detail: String::new(),
        ranks: vec![RankStatus {
            dp_rank: 0,
            load: RankLoad { running: 2, blocks_total: 10, blocks_free: 4, ..RankLoad::default() },
            load_age_seconds: 0.25,
            reserved_sequences: 0,
            indexed_blocks: 5,
        }],
        cache_sight: String::new(),
        notes: Vec::new(),
    }
}

#[test]
fn every_metric_has_its_name() {
    let text = touched().render(&[engine("embedded-0")]);
    let names: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
    insta::assert_snapshot!(names.join("\n"));
}

#[test]
fn engines_are_shown_as_they_are_now() {
    let metrics = Metrics::new();
    assert!(metrics.render(&[engine("a")]).contains("forebay_engine_kv_blocks_used{engine=\"a\"} 6\n"));
    let later = metrics.render(&[engine("b")]);
    assert!(later.contains("forebay_engine_running{engine=\"b\"} 2\n"));
    assert!(!later.contains("engine=\"a\""), "an engine that left is gone");
}

#[test]
fn a_merged_histogram_equals_one_observed_directly() {
    let (direct, merged) = (SecondsHistogram::new(TOKEN_SECONDS), SecondsHistogram::new(TOKEN_SECONDS));
    let mut local = merged.local();
    for millis in [0, 1, 2, 7, 40, 999, 2_500, 60_000] {
        direct.observe(Duration::from_millis(millis));
        local.observe(Duration::from_millis(millis));
    }
    merged.merge(&mut local);
    merged.merge(&mut local); // emptied by the first merge
    let render = |histogram: &SecondsHistogram| {
        let mut registry = Registry::default();
        registry.register("x_seconds", "x", histogram.clone());
        let mut text = String::new();
        text::encode(&mut text, &registry).unwrap();
        text
    };
    assert_eq!(render(&direct), render(&merged));
    assert!(
        render(&direct).contains("x_seconds_bucket{le=\"0.001\"} 2\n"),
        "an upper bound belongs to its bucket"
    );
    assert_eq!(merged.count(), 8);
}

#[test]
fn predictions_are_held_against_what_came() {
    let text = touched().render(&[]);
    for line in [
        "forebay_ttft_error_seconds_count{model=\"m\",side=\"late\"} 1\n",
        "forebay_ttft_error_seconds_bucket{le=\"0.05\",model=\"m\",side=\"early\"} 0\n",
        "forebay_ttft_error_seconds_bucket{le=\"0.25\",model=\"m\",side=\"early\"} 1\n",
        "forebay_cached_tokens_predicted_total{model=\"m\"} 100\n",
        "forebay_cached_tokens_missed_total{model=\"m\"} 40\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}
