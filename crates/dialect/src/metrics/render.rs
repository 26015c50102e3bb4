//! Prometheus' text format, name for name as vLLM 0.32 writes it. (`*_created` series are left out: nobody reads them.)

use std::fmt::Write as _;

use super::{Counters, Histogram};
use crate::hand_over::Transfers;

/// What does not change, or is not counted here.
pub(crate) struct Facts<'a> {
    pub(crate) model: &'a str,
    pub(crate) block_size_tokens: u32,
    pub(crate) blocks_total: u32,
    /// Unix time.
    pub(crate) started_seconds: f64,
    /// With a connector: its counters, and leases that ended unused.
    pub(crate) transfers: Option<(Transfers, u64)>,
    /// The connector takes KV from others.
    pub(crate) consumes: bool,
    /// Legs that have not ended, those without a client included.
    pub(crate) legs: usize,
}

/// Reasons of `vllm:request_success_total`.
const ABORT: &str = "abort";

/// The whole page.
pub(crate) fn render(facts: &Facts<'_>, counters: &Counters) -> String {
    let labels = format!("engine=\"0\",model_name=\"{}\"", escaped(facts.model));
    let mut page = Page { out: String::with_capacity(16 * 1024), labels };
    page.family(
        "process_start_time_seconds",
        "gauge",
        "Start time of the process since unix epoch in seconds.",
    );
    let _infallible = writeln!(page.out, "process_start_time_seconds {}", number(facts.started_seconds));
    gauges(&mut page, facts, counters);
    tokens(&mut page, counters);
    requests(&mut page, counters);
    if let Some((transfers, expired)) = &facts.transfers {
        hand_overs(&mut page, transfers, *expired);
    }
    let help = "Blocks whose KV events were left out, since their tokens were not known.";
    page.one("forebay:kv_blocks_unpublished_total", "counter", help, counters.blocks_unpublished as f64);
    let help = "Requests to the engine that have not ended, those whose client has gone included.";
    page.one("forebay:legs", "gauge", help, facts.legs as f64);
    cache_config(&mut page, facts);
    page.out
}

fn gauges(page: &mut Page, facts: &Facts<'_>, counters: &Counters) {
    let load = &counters.load;
    let help = "Number of requests in model execution batches.";
    page.one("vllm:num_requests_running", "gauge", help, f64::from(load.running));
    let help = "Number of requests waiting to be processed.";
    page.one("vllm:num_requests_waiting", "gauge", help, f64::from(load.waiting));
    let deferred = counters.fetching.min(u64::from(load.waiting));
    let reasons = [("capacity", u64::from(load.waiting) - deferred), ("deferred", deferred)];
    let help = "Number of waiting requests by reason.";
    page.many("vllm:num_requests_waiting_by_reason", "gauge", help, "reason", &reasons);
    if facts.consumes {
        let stages = [("waiting_to_start", 0), ("in_progress", deferred), ("completed_waiting", 0)];
        let help = "Number of waiting requests by async KV load stage.";
        page.many("vllm:num_requests_kv_fetch_by_stage", "gauge", help, "stage", &stages);
    }
    let states = [("awake", 1), ("weights_offloaded", 0), ("discard_all", 0)];
    page.many("vllm:engine_sleep_state", "gauge", "Engine sleep state.", "sleep_state", &states);
    let used = load.blocks_total.saturating_sub(load.blocks_free);
    let usage = f64::from(used) / f64::from(load.blocks_total.max(1));
    page.one("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", usage);
}

fn tokens(page: &mut Page, counters: &Counters) {
    let Counters { prompt, from_cache, from_transfer, from_compute, .. } = *counters;
    let counts = [
        ("vllm:prefix_cache_queries_total", "Prefix cache queries, in tokens.", counters.cache_queries),
        ("vllm:prefix_cache_hits_total", "Prefix cache hits, in tokens.", from_cache),
        (
            "vllm:external_prefix_cache_queries_total",
            "Prefix cache queries to other engines, in tokens.",
            counters.transfer_queries,
        ),
        (
            "vllm:external_prefix_cache_hits_total",
            "Prefix cache hits of other engines, in tokens.",
            from_transfer,
        ),
        ("vllm:num_preemptions_total", "Cumulative number of preemptions.", counters.load.preemptions),
        ("vllm:prompt_tokens_total", "Number of prefill tokens processed.", prompt),
        ("vllm:prompt_tokens_cached_total", "Number of cached prompt tokens.", from_cache + from_transfer),
        ("vllm:generation_tokens_total", "Number of generation tokens processed.", counters.generated),
    ];
    for (name, help, value) in counts {
        page.one(name, "counter", help, value as f64);
    }
    let sources = [
        ("local_compute", from_compute),
        ("local_cache_hit", from_cache),
        ("external_kv_transfer", from_transfer),
    ];
    let help = "Number of prompt tokens by source.";
    page.many("vllm:prompt_tokens_by_source_total", "counter", help, "source", &sources);
}

fn requests(page: &mut Page, counters: &Counters) {
    let ends = [
        ("stop", counters.ended_stop),
        ("length", counters.ended_length),
        (ABORT, counters.ended_abort),
        ("error", counters.ended_error),
    ];
    let help = "Count of successfully processed requests.";
    page.many("vllm:request_success_total", "counter", help, "finished_reason", &ends);
    let rejections = [("max_num_queued_reqs", counters.rejected)];
    let help = "Number of admission attempts rejected by a queue limit, by reason.";
    page.many("vllm:admission_rejections_total", "counter", help, "reason", &rejections);
    let histograms = [
        ("vllm:time_to_first_token_seconds", "time to first token", &counters.first_token_seconds),
        ("vllm:inter_token_latency_seconds", "inter-token latency", &counters.token_seconds),
        ("vllm:e2e_request_latency_seconds", "e2e request latency", &counters.request_seconds),
        (
            "vllm:request_queue_time_seconds",
            "time spent in WAITING phase for request",
            &counters.queue_seconds,
        ),
        (
            "vllm:request_prefill_time_seconds",
            "time spent in PREFILL phase for request",
            &counters.prefill_seconds,
        ),
        (
            "vllm:request_decode_time_seconds",
            "time spent in DECODE phase for request",
            &counters.decode_seconds,
        ),
    ];
    for (name, what, histogram) in histograms {
        page.histogram(name, &format!("Histogram of {what} in seconds."), histogram);
    }
}

fn hand_overs(page: &mut Page, transfers: &Transfers, expired: u64) {
    let Transfers { seconds, bytes, pieces, failed } = transfers;
    page.histogram("vllm:nixl_xfer_time_seconds", "Histogram of transfer duration.", seconds);
    page.histogram("vllm:nixl_bytes_transferred", "Histogram of bytes transferred.", bytes);
    page.histogram("vllm:nixl_num_descriptors", "Histogram of descriptors of a transfer.", pieces);
    let all: u64 = failed.values().sum();
    page.one("vllm:nixl_num_failed_transfers_total", "counter", "Number of failed KV transfers.", all as f64);
    let help = "Number of requests whose KV expired before it was read.";
    page.one("vllm:nixl_num_kv_expired_reqs_total", "counter", help, expired as f64);
    let reasons: Vec<(&str, u64)> = failed.iter().map(|(reason, count)| (*reason, *count)).collect();
    let help = "Failed KV transfers by reason.";
    page.many("forebay:failed_transfers_by_reason_total", "counter", help, "reason", &reasons);
}

fn cache_config(page: &mut Page, facts: &Facts<'_>) {
    let Facts { block_size_tokens, blocks_total, .. } = *facts;
    let tokens = u64::from(block_size_tokens) * u64::from(blocks_total);
    page.family("vllm:cache_config_info", "gauge", "Information of the LLMEngine CacheConfig");
    let _infallible = writeln!(
        page.out,
        "vllm:cache_config_info{{block_size=\"{block_size_tokens}\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",\
         engine=\"0\",kv_cache_size_tokens=\"{tokens}\",num_gpu_blocks=\"{blocks_total}\",\
         prefix_caching_hash_algo=\"siphash13\"}} 1.0"
    );
}

struct Page {
    out: String,
    labels: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _infallible = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        let _infallible = writeln!(self.out, "{name}{{{}}} {}", self.labels, number(value));
    }

    fn many(&mut self, name: &str, kind: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.family(name, kind, help);
        for (key, value) in values {
            let value = number(*value as f64);
            let _infallible = writeln!(self.out, "{name}{{{},{label}=\"{key}\"}} {value}", self.labels);
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(name, "histogram", help);
        let Self { out, labels } = self;
        for (bound, count) in histogram.cumulative() {
            let bound = if bound.is_finite() { number(bound) } else { "+Inf".to_owned() };
            let _infallible =
                writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {}", number(count as f64));
        }
        let (count, sum) = (number(histogram.count() as f64), number(histogram.sum()));
        let _infallible = writeln!(out, "{name}_count{{{labels}}} {count}\n{name}_sum{{{labels}}} {sum}");
    }
}

/// As Python writes a float: never without a point or an exponent.
fn number(value: f64) -> String {
    format!("{value:?}")
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        hand_over::TransferStats,
        metrics::{Metrics, PromptSources},
    };

    fn page() -> String {
        let facts = Facts {
            model: "ti\"ny",
            block_size_tokens: 16,
            blocks_total: 8,
            started_seconds: 1.5e9,
            transfers: Some((TransferStats::default().read(), 3)),
            consumes: true,
            legs: 0,
        };
        let metrics = Metrics::default();
        metrics.update(|counters| {
            counters.load.blocks_total = 8;
            counters.load.blocks_free = 6;
            counters.prompt_ready(PromptSources { prompt: 40, cached: 16, fetched: Some(true) });
            counters.prompt_ready(PromptSources { prompt: 10, cached: 0, fetched: None });
            counters.tokens_came(2, std::time::Duration::from_millis(40));
        });
        render(&facts, &metrics.read())
    }

    #[test]
    fn every_series_reads_as_one() {
        let page = page();
        let labels = "{engine=\"0\",model_name=\"ti\\\"ny\"";
        for line in [
            format!("vllm:kv_cache_usage_perc{labels}}} 0.25"),
            format!("vllm:prompt_tokens_total{labels}}} 50.0"),
            format!("vllm:prompt_tokens_by_source_total{labels},source=\"external_kv_transfer\"}} 24.0"),
            format!("vllm:prompt_tokens_by_source_total{labels},source=\"local_compute\"}} 10.0"),
            format!("vllm:inter_token_latency_seconds_bucket{labels},le=\"0.025\"}} 2.0"),
            format!("vllm:inter_token_latency_seconds_sum{labels}}} 0.04"),
            format!("vllm:nixl_num_kv_expired_reqs_total{labels}}} 3.0"),
            "process_start_time_seconds 1500000000.0".to_owned(),
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
        }
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok() && !series.is_empty(), "{line}");
        }
        let series: Vec<&str> =
            page.lines().filter_map(|line| line.split_once(' ')).map(|pair| pair.0).collect();
        let series: Vec<&&str> = series.iter().filter(|name| **name != "#").collect();
        assert_eq!(series.iter().collect::<BTreeSet<_>>().len(), series.len(), "a series comes twice");
    }
}
