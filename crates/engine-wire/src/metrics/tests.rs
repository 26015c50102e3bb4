use std::time::Duration;

use forebay_types::StepObservation;
use proptest::prelude::*;

use super::*;

const AGGREGATED: &[u8] = include_bytes!("../../fixtures/vllm/metrics_aggregated.txt");
const PREFILL: &[u8] = include_bytes!("../../fixtures/vllm/metrics_prefill.txt");
const DECODE: &[u8] = include_bytes!("../../fixtures/vllm/metrics_decode.txt");
const POOL: Pool = Pool { blocks_total: 24, block_size_tokens: 32 };

#[test]
fn a_capture_of_vllm_reads_as_it_was() {
    let scrape = Scrape::read(AGGREGATED);
    assert_eq!(scrape.server(), Some(Server::Vllm));
    assert_eq!(scrape.models.iter().collect::<Vec<_>>(), ["tiny"]);
    assert_eq!(scrape.started_seconds, Some(1.795_345_216_5e9));
    assert!(!scrape.has_nixl && !scrape.asleep);
    assert_eq!(
        scrape.cache,
        Some(CacheConfig {
            block_size_tokens: Some(32),
            blocks_total: Some(24),
            cache_dtype: Some("auto".into()),
            prefix_caching: Some(true),
            hash_algorithm: Some("sha256".into()),
        })
    );
    assert_eq!(scrape.ranks.len(), 1);
    let figures = scrape.ranks[&0];
    assert_eq!((figures.prompt_tokens, figures.cached_tokens, figures.output_tokens), (1244.0, 64.0, 116.0));
    assert_eq!(figures.computed_tokens, Some(1180.0));
    assert_eq!((figures.prefills.count, figures.prefill_tokens.sum), (10.0, 1180.0));
    assert_eq!(figures.token_gaps.count, 106.0);
}

#[test]
fn a_pair_shows_its_connector_and_what_moved() {
    let (prefill, decode) = (Scrape::read(PREFILL), Scrape::read(DECODE));
    assert!(prefill.has_nixl && decode.has_nixl);
    assert_eq!(decode.ranks[&0].transferred_tokens, 194.0);
    assert_eq!(decode.ranks[&0].computed_tokens, Some(0.0));
    assert_eq!(prefill.ranks[&0].computed_tokens, Some(200.0));
    assert!(prefill.restarted(&decode) && !prefill.restarted(&prefill));
}

#[test]
fn ranks_are_told_apart_by_their_label() {
    let scrape = Scrape::read(
        b"vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3.0\n\
          vllm:num_requests_running{engine=\"1\",model_name=\"m\"} 5.0\n\
          vllm:kv_cache_usage_perc{engine=\"1\",model_name=\"m\"} 0.25\n\
          vllm:num_requests_waiting{engine=\"x\"} 9\n\
          vllm:num_requests_waiting_by_reason{engine=\"1\",reason=\"capacity\"} 7\n",
    );
    assert_eq!(scrape.ranks.len(), 2);
    assert_eq!((scrape.ranks[&0].running, scrape.ranks[&1].running), (3.0, 5.0));
    let load = scrape.ranks[&1].load(POOL, &Pace { prefill_tokens_mean: Some(100.0) });
    assert_eq!((load.running, load.decoding, load.waiting), (5, 5, 0));
    assert_eq!((load.blocks_total, load.blocks_free, load.context_tokens), (24, 18, 192));
}

#[test]
fn waiting_prompts_are_priced_by_those_of_late() {
    let figures = Figures { waiting: 3.0, ..Figures::default() };
    assert_eq!(figures.load(POOL, &Pace::default()).prefill_tokens, 0);
    assert_eq!(figures.load(POOL, &Pace { prefill_tokens_mean: Some(250.5) }).prefill_tokens, 752);
    let told = Figures { waiting_tokens: Some(42.0), ..figures };
    assert_eq!(told.load(POOL, &Pace { prefill_tokens_mean: Some(250.5) }).prefill_tokens, 42);
}

#[test]
fn lines_that_cannot_be_read_are_passed_over() {
    let scrape = Scrape::read(
        b"vllm:num_requests_running{engine=\"0\" 3\n\
          vllm:num_requests_running{engine=\"0\"} three\n\
          vllm:num_requests_running{engine=\"0\"} NaN\n\
          \xff\xfe{} 1\n\
          vllm:num_requests_waiting{model_name=\"a\\\"}b\",engine=\"0\"} 2 1795345216000\n\
          vllm:num_requests_running{engine=\"0\",model_name=\"a\\\"}b\"} 4",
    );
    assert_eq!((scrape.ranks[&0].running, scrape.ranks[&0].waiting), (4.0, 2.0));
    assert_eq!(scrape.models.iter().collect::<Vec<_>>(), ["a\"}b"]);
    assert_eq!(Scrape::read(b"go_goroutines 7\n"), Scrape::default());
}

#[test]
fn labels_cannot_fill_the_memory() {
    let text: String = (0..3000)
        .map(|rank| format!("vllm:num_requests_running{{engine=\"{rank}\",model_name=\"{rank}\"}} 1\n"))
        .collect();
    let scrape = Scrape::read(text.as_bytes());
    assert_eq!((scrape.ranks.len(), scrape.models.len()), (RANKS_MAX, MODELS_MAX));
}

#[test]
fn sleep_and_restart_show() {
    let sleeping = Scrape::read(b"vllm:engine_sleep_state{engine=\"0\",sleep_state=\"awake\"} 0.0\n");
    assert!(sleeping.asleep);
    let counted =
        |tokens: u32| Scrape::read(format!("vllm:prompt_tokens_total{{engine=\"0\"}} {tokens}\n").as_bytes());
    assert!(counted(500).restarted(&counted(20)));
    assert!(!counted(500).restarted(&counted(520)));
}

#[test]
fn sglang_speaks_of_ranks_and_loads() {
    let scrape = Scrape::read(
        b"sglang:num_running_reqs{dp_rank=\"1\",model_name=\"q\",tp_rank=\"0\"} 6\n\
          sglang:num_running_reqs{dp_rank=\"1\",model_name=\"q\",tp_rank=\"1\"} 0\n\
          sglang:num_queue_reqs{dp_rank=\"1\"} 2\n\
          sglang:token_usage{dp_rank=\"1\"} 0.5\n\
          sglang:prompt_tokens_total{model_name=\"q\"} 900\n",
    );
    assert_eq!(scrape.server(), Some(Server::Sglang));
    assert_eq!((scrape.ranks[&1].running, scrape.ranks[&1].waiting), (6.0, 2.0));
    let loads = read_loads(
        br#"{"version":"0.5.23","loads":[{"dp_rank":1,"num_running_reqs":7,"num_waiting_reqs":1,
             "num_waiting_uncached_tokens":333,"token_usage":0.6,"max_total_num_tokens":4000,
             "total_prefill_uncached_tokens":5000,"total_prefill_busy_us":2500000},{"dp_rank":"x"}]}"#,
    )
    .unwrap();
    let joined = scrape.with_loads(&loads);
    let figures = joined.ranks[&1];
    assert_eq!(
        (figures.running, figures.waiting_tokens, figures.pool_tokens),
        (7.0, Some(333.0), Some(4000.0))
    );
    assert_eq!((figures.computed_tokens, figures.prefill_busy_seconds), (Some(5000.0), Some(2.5)));
    assert_eq!(joined.ranks[&0].prompt_tokens, 900.0);
    assert!(read_loads(b"{}").is_err());
}

fn steps(before: Figures, after: Figures) -> Vec<StepObservation> {
    steps_between(&before, &after, Duration::from_secs(1), POOL, 4096, &mut Pace::default())
}

/// Four sequences decode a whole second at 20 ms a step: 50 steps, 200 gaps.
#[test]
fn decode_steps_are_the_mean_gap() {
    let before = Figures { running: 4.0, pool_used: 0.5, ..Figures::default() };
    let after = Figures { token_gaps: Sum { sum: 4.0, count: 200.0 }, ..before };
    let expected =
        StepObservation { decodes: 4, context_tokens: 384, seconds: 0.02, ..StepObservation::default() };
    assert_eq!(steps(before, after), [expected]);
    // A prefill in between lengthens gaps; an idle end makes the number of sequences a guess.
    let prefilled = Figures { computed_tokens: Some(100.0), ..after };
    assert_eq!(steps(Figures { computed_tokens: Some(0.0), ..before }, prefilled), []);
    assert_eq!(steps(before, Figures { running: 0.0, ..after }), []);
}

#[test]
fn prefill_steps_are_the_mean_prompt() {
    let before = Figures { computed_tokens: Some(0.0), ..Figures::default() };
    let after = Figures {
        computed_tokens: Some(600.0),
        cached_tokens: 64.0,
        prefills: Sum { sum: 0.3, count: 2.0 },
        prefill_tokens: Sum { sum: 600.0, count: 2.0 },
        ..before
    };
    let mut pace = Pace::default();
    let found = steps_between(&before, &after, Duration::from_secs(1), POOL, 4096, &mut pace);
    let expected = StepObservation {
        prefill_tokens: 300,
        prefill_attention: 300.0 * 32.0 + 300.0 * 300.0 / 2.0,
        seconds: 0.15,
        ..StepObservation::default()
    };
    assert_eq!(found, [expected]);
    assert_eq!(pace.prefill_tokens_mean, Some(300.0));
    // Prompts that shared steps: their times add up to more than the interval.
    let shared = Figures { prefills: Sum { sum: 1.2, count: 2.0 }, ..after };
    assert_eq!(steps(before, shared), []);
    assert_eq!(steps(before, Figures { waiting: 1.0, ..after }), []);
}

#[test]
fn sglang_says_how_long_it_prefilled() {
    let before =
        Figures { computed_tokens: Some(0.0), prefill_busy_seconds: Some(0.0), ..Figures::default() };
    let after = Figures { computed_tokens: Some(8192.0), prefill_busy_seconds: Some(0.4), ..before };
    let found = steps(before, after);
    assert_eq!((found.len(), found[0].prefill_tokens), (1, 4096));
    assert!((found[0].seconds - 0.2).abs() < 1e-12);
}

#[test]
fn captures_in_sequence_say_something_sensible() {
    let scrape = Scrape::read(AGGREGATED).ranks[&0];
    let mut pace = Pace::default();
    let found = steps_between(&Figures::default(), &scrape, Duration::from_secs(60), POOL, 2048, &mut pace);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].prefill_tokens, 118);
    assert!((found[0].seconds - 0.031_905_615).abs() < 1e-8, "{:?}", found[0]);
}

proptest! {
    #[test]
    fn nothing_panics(text: Vec<u8>) {
        let _ = (Scrape::read(&text), read_loads(&text));
    }

    #[test]
    fn no_line_panics(line in "(vllm|sglang):[a-z_]{0,30}\\{[a-z=\",\\\\}]{0,40}\\}? ?[0-9eE+.-]{0,8}") {
        let _ = Scrape::read(line.as_bytes());
    }

    /// Whatever an engine claims, what is learned from it is finite.
    #[test]
    fn steps_are_finite(numbers in prop::array::uniform12(prop_oneof![Just(0.0), -1e300..1e300, 0.0..1e6])) {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = numbers;
        let figures = |running, pool_used, computed, gaps, prefills, busy| Figures {
            running, pool_used, computed_tokens: Some(computed), token_gaps: Sum { sum: gaps, count: 3.0 },
            prefills: Sum { sum: prefills, count: 2.0 }, prefill_busy_seconds: Some(busy), ..Figures::default()
        };
        for step in steps(figures(a, b, c, d, e, f), figures(g, h, i, j, k, l)) {
            prop_assert!(step.seconds.is_finite() && step.seconds >= 0.0, "{step:?}");
            prop_assert!(step.prefill_attention.is_finite(), "{step:?}");
        }
    }
}
