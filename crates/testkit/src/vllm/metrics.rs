//! `/metrics` of a vLLM double.
//!
//! In: the ranks' counts and gauges. Out: the Prometheus text. The captured text of a real server is the template:
//! names, help, labels and their order are taken from it, and values are put in; what the double does not measure is 0.
//!
//! Evidence: `fixtures/vllm/http/metrics.txt`, and `fixtures/vllm/nixl_pd/metrics_decode.txt` for what a server with a
//! NIXL connector has in addition.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::Vllm;
use crate::double::Life;
use crate::engine::{Counts, Gauges};

const PLAIN: &str = include_str!("../../fixtures/vllm/http/metrics.txt");
const WITH_NIXL: &str = include_str!("../../fixtures/vllm/nixl_pd/metrics_decode.txt");
/// Families that only a server with a connector has.
const NIXL_FAMILIES: [&str; 2] = ["vllm:nixl_", "vllm:num_requests_kv_fetch_by_stage"];

/// One rank's numbers.
struct Numbers {
    counts: Counts,
    gauges: Gauges,
}

/// The text of `/metrics`.
pub(super) fn render(vllm: &Vllm, life: &Life) -> String {
    let ranks: Vec<Numbers> = life
        .ranks
        .iter()
        .map(|rank| {
            let core = rank.core.lock();
            Numbers { counts: core.counts(), gauges: core.gauges() }
        })
        .collect();
    let born = life.born.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let nixl = |line: &&str| {
        let name = line.trim_start_matches("# HELP ").trim_start_matches("# TYPE ");
        NIXL_FAMILIES.iter().any(|family| name.starts_with(family))
    };
    let extra = WITH_NIXL.lines().filter(|_| vllm.options.connector.is_some()).filter(nixl);
    let lines = PLAIN.lines().filter(|line| !line.contains("http_re")).chain(extra);
    let mut out = String::with_capacity(PLAIN.len() * ranks.len());
    for line in lines {
        if line.starts_with("process_start_time_seconds") {
            let _memory_takes_all = writeln!(out, "process_start_time_seconds {born:?}");
            continue;
        }
        if line.starts_with('#') || !line.starts_with("vllm:") {
            let _memory_takes_all = writeln!(out, "{line}");
            continue;
        }
        if line.contains("engine=\"") {
            for (rank, numbers) in ranks.iter().enumerate() {
                sample(&mut out, vllm, line, rank, numbers, born);
            }
        } else {
            sample(&mut out, vllm, line, 0, &ranks[0], born);
        }
    }
    out
}

/// A line of the template with our labels and value.
fn sample(out: &mut String, vllm: &Vllm, line: &str, rank: usize, numbers: &Numbers, born: f64) {
    let (series, _) = line.rsplit_once(' ').unwrap_or((line, "0"));
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let mut labels = labels.trim_end_matches('}').to_owned();
    set_label(&mut labels, "engine", &rank.to_string());
    set_label(&mut labels, "model_name", &vllm.options.model);
    if name == "vllm:cache_config_info" {
        let options = &vllm.options;
        set_label(&mut labels, "block_size", &options.block_size.to_string());
        set_label(&mut labels, "effective_attention_block_size", &options.block_size.to_string());
        set_label(&mut labels, "num_gpu_blocks", &options.blocks.to_string());
        set_label(&mut labels, "num_gpu_blocks_override", "None");
        set_label(&mut labels, "kv_cache_size_tokens", &(options.blocks * options.block_size).to_string());
        let caching = if options.prefix_caching { "True" } else { "False" };
        set_label(&mut labels, "enable_prefix_caching", caching);
        if let Some(connector) = &options.connector {
            set_label(&mut labels, "cache_dtype", &connector.cache_dtype);
        }
    }
    let value = value(vllm, name, &labels, numbers, born);
    let _memory_takes_all = writeln!(out, "{name}{{{labels}}} {value:?}");
}

/// Replaces a label's value, if there is such a label.
fn set_label(labels: &mut String, name: &str, value: &str) {
    let start = if labels.starts_with(&format!("{name}=\"")) {
        Some(0)
    } else {
        labels.find(&format!(",{name}=\"")).map(|comma| comma + 1)
    };
    let Some(start) = start else { return };
    let value_start = start + name.len() + 2;
    let Some(len) = labels[value_start..].find('"') else { return };
    labels.replace_range(value_start..value_start + len, value);
}

fn value(vllm: &Vllm, name: &str, labels: &str, numbers: &Numbers, born: f64) -> f64 {
    let Numbers { counts, gauges } = numbers;
    let label = |text: &str| labels.contains(text);
    let requests = counts.stopped + counts.length;
    let number = match name {
        _ if name.ends_with("_created") => return born,
        "vllm:kv_cache_usage_perc" => return gauges.usage,
        "vllm:cache_config_info" => 1,
        "vllm:engine_sleep_state" => {
            let sleeping = vllm.sleeping.load(Ordering::Relaxed);
            u64::from(if label("sleep_state=\"awake\"") {
                !sleeping
            } else {
                sleeping && label("weights_off")
            })
        }
        "vllm:num_requests_running" => gauges.running as u64,
        "vllm:num_requests_waiting" => gauges.waiting as u64,
        "vllm:num_requests_waiting_by_reason" if label("deferred") => gauges.waiting_for_kv as u64,
        "vllm:num_requests_waiting_by_reason" => (gauges.waiting - gauges.waiting_for_kv) as u64,
        "vllm:num_requests_kv_fetch_by_stage" if label("in_progress") => gauges.waiting_for_kv as u64,
        "vllm:prefix_cache_queries_total" => counts.prefix_queries,
        "vllm:prefix_cache_hits_total" => counts.prefix_hits,
        "vllm:external_prefix_cache_queries_total" => counts.external_queries,
        "vllm:external_prefix_cache_hits_total" => counts.external_hits,
        "vllm:num_preemptions_total" => counts.preempted,
        "vllm:prompt_tokens_total" | "vllm:request_prompt_tokens_sum" => {
            counts.computed + counts.prefix_hits + counts.external_hits
        }
        "vllm:prompt_tokens_by_source_total" if label("local_compute") => counts.computed,
        "vllm:prompt_tokens_by_source_total" if label("local_cache_hit") => counts.prefix_hits,
        "vllm:prompt_tokens_by_source_total" => counts.external_hits,
        "vllm:prompt_tokens_cached_total" => counts.prefix_hits + counts.external_hits,
        "vllm:prompt_tokens_cached_by_source_total" if label("\"device\"") => counts.prefix_hits,
        "vllm:prompt_tokens_cached_by_source_total" if label("\"p2p\"") => counts.external_hits,
        "vllm:generation_tokens_total" | "vllm:request_generation_tokens_sum" => counts.generated,
        "vllm:inter_token_latency_seconds_count" => counts.gaps,
        // As long as steps are meant to take; slowness is not in it.
        "vllm:inter_token_latency_seconds_sum" => {
            return counts.gaps as f64 * vllm.options.step.as_secs_f64();
        }
        "vllm:iteration_tokens_total_count" => counts.steps,
        "vllm:iteration_tokens_total_sum" => counts.generated + counts.computed,
        "vllm:request_success_total" if label("\"stop\"") => counts.stopped,
        "vllm:request_success_total" if label("\"length\"") => counts.length,
        "vllm:request_success_total" if label("\"error\"") => counts.failed,
        "vllm:nixl_xfer_time_seconds_count"
        | "vllm:nixl_post_time_seconds_count"
        | "vllm:nixl_bytes_transferred_count"
        | "vllm:nixl_num_descriptors_count" => counts.transfers,
        // Descriptors and bytes of the capture's model: 30 layers, one descriptor and 9 KB a token and layer.
        "vllm:nixl_num_descriptors_sum" => counts.transfers * 30,
        "vllm:nixl_bytes_transferred_sum" => counts.external_hits * 53_206,
        "vllm:nixl_xfer_time_seconds_sum" | "vllm:nixl_post_time_seconds_sum" => {
            return counts.transfers as f64 * 0.01;
        }
        "vllm:nixl_num_failed_transfers_total" => counts.transfers_failed,
        "vllm:nixl_num_kv_expired_reqs_total" => counts.leases_expired,
        "vllm:nixl_num_notifications_after_expiry_total" => counts.late_notices,
        _ if histogram_of_requests(name) => requests,
        _ => 0,
    };
    number as f64
}

/// Counts and infinite buckets of the histograms that have one sample a request.
fn histogram_of_requests(name: &str) -> bool {
    const FAMILIES: [&str; 11] = [
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
        "vllm:request_max_num_generation_tokens",
        "vllm:request_params_n",
        "vllm:request_params_max_tokens",
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_inference_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
    ];
    let family = name.strip_suffix("_count").or_else(|| name.strip_suffix("_bucket"));
    family.is_some_and(|family| FAMILIES.contains(&family))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_replaced_whole() {
        let mut labels = "_block_size_resolved=\"True\",block_size=\"32\",engine=\"0\"".to_owned();
        set_label(&mut labels, "block_size", "16");
        set_label(&mut labels, "engine", "1");
        set_label(&mut labels, "absent", "x");
        assert_eq!(labels, "_block_size_resolved=\"True\",block_size=\"16\",engine=\"1\"");
    }
}
