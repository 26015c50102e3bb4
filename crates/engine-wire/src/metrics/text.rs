//! Prometheus' text format, as far as engines use it.

use std::borrow::Cow;

use super::{CacheConfig, Figures, MODELS_MAX, RANKS_MAX, Scrape, Sum};
use crate::discovery::{NAME_BYTES_MAX, Server};

/// Labels that are looked at on one line; `vllm:cache_config_info` has some forty.
const LABELS_MAX: usize = 256;

pub(super) fn read(text: &[u8]) -> Scrape {
    let mut scrape = Scrape::default();
    for line in text.split(|byte| *byte == b'\n') {
        if let Some(sample) = std::str::from_utf8(line).ok().and_then(Sample::read) {
            scrape.take(&sample);
        }
    }
    scrape
}

/// One line.
pub(super) struct Sample<'a> {
    pub(super) name: &'a str,
    /// Between the braces, not yet taken apart: most families are not wanted.
    labels: &'a str,
    pub(super) value: f64,
}

impl<'a> Sample<'a> {
    pub(super) fn read(line: &'a str) -> Option<Self> {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return None;
        }
        let name_end = line.find(['{', ' ', '\t'])?;
        let (name, rest) = line.split_at(name_end);
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(rest) => {
                let end = labels_end(rest)?;
                (&rest[..end], &rest[end + 1..])
            }
            None => ("", rest),
        };
        // A time may follow the value.
        let value: f64 = rest.split_whitespace().next()?.parse().ok()?;
        Some(Self { name, labels, value })
    }

    fn labels(&self) -> impl Iterator<Item = (&'a str, Cow<'a, str>)> {
        Labels { rest: self.labels }.take(LABELS_MAX)
    }

    pub(super) fn label(&self, name: &str) -> Option<Cow<'a, str>> {
        self.labels().find(|(label, _)| *label == name).map(|(_, value)| value)
    }
}

/// Where the closing brace is: not inside a quoted value.
fn labels_end(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(index),
            _ => {}
        }
    }
    None
}

struct Labels<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Labels<'a> {
    type Item = (&'a str, Cow<'a, str>);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, rest) = self.rest.trim_start_matches([',', ' ']).split_once("=\"")?;
        let mut escaped = false;
        let end = rest.bytes().position(|byte| match byte {
            _ if escaped => {
                escaped = false;
                false
            }
            b'\\' => {
                escaped = true;
                false
            }
            byte => byte == b'"',
        })?;
        self.rest = &rest[end + 1..];
        Some((name.trim(), unescaped(&rest[..end])))
    }
}

fn unescaped(value: &str) -> Cow<'_, str> {
    if !value.contains('\\') {
        return Cow::Borrowed(value);
    }
    let mut text = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some('n') => text.push('\n'),
                Some(other) => text.push(other),
                None => {}
            },
            other => text.push(other),
        }
    }
    Cow::Owned(text)
}

impl Scrape {
    fn take(&mut self, sample: &Sample<'_>) {
        if !sample.value.is_finite() {
            return;
        }
        if sample.name == "process_start_time_seconds" {
            self.started_seconds = Some(sample.value);
        } else if let Some(family) = sample.name.strip_prefix("vllm:") {
            self.server = Some(Server::Vllm);
            self.vllm(family, sample);
        } else if let Some(family) = sample.name.strip_prefix("sglang:") {
            self.server = Some(Server::Sglang);
            self.sglang(family, sample);
        }
    }

    /// The figures of the rank that a line names in its label `label`; without that label they are of rank 0.
    fn rank(&mut self, sample: &Sample<'_>, label: &str) -> Option<&mut Figures> {
        let rank = match sample.label(label) {
            Some(rank) => rank.parse().ok()?,
            None => 0,
        };
        if self.ranks.len() >= RANKS_MAX && !self.ranks.contains_key(&rank) {
            return None;
        }
        Some(self.ranks.entry(rank).or_default())
    }

    fn model(&mut self, sample: &Sample<'_>) {
        let Some(model) = sample.label("model_name") else {
            return;
        };
        if self.models.len() < MODELS_MAX && model.len() <= NAME_BYTES_MAX && !self.models.contains(&*model) {
            self.models.insert(model.into_owned());
        }
    }

    fn vllm(&mut self, family: &str, sample: &Sample<'_>) {
        let value = sample.value;
        let place: fn(&mut Figures) -> &mut f64 = match family {
            "num_requests_running" => {
                self.model(sample);
                |figures| &mut figures.running
            }
            "num_requests_waiting" => |figures| &mut figures.waiting,
            // The second name is that of versions before 0.10.
            "kv_cache_usage_perc" | "gpu_cache_usage_perc" => |figures| &mut figures.pool_used,
            "num_preemptions_total" => |figures| &mut figures.preemptions,
            "prompt_tokens_total" => |figures| &mut figures.prompt_tokens,
            "generation_tokens_total" => |figures| &mut figures.output_tokens,
            "prefix_cache_hits_total" | "gpu_prefix_cache_hits_total" => |figures| &mut figures.cached_tokens,
            "prompt_tokens_by_source_total" => match sample.label("source").as_deref() {
                Some("local_compute") => |figures| figures.computed_tokens.get_or_insert_default(),
                Some("external_kv_transfer") => |figures| &mut figures.transferred_tokens,
                _ => return,
            },
            "inter_token_latency_seconds_sum" => |figures| &mut figures.token_gaps.sum,
            "inter_token_latency_seconds_count" => |figures| &mut figures.token_gaps.count,
            "request_prefill_time_seconds_sum" => |figures| &mut figures.prefills.sum,
            "request_prefill_time_seconds_count" => |figures| &mut figures.prefills.count,
            "request_prefill_kv_computed_tokens_sum" => |figures| &mut figures.prefill_tokens.sum,
            "request_prefill_kv_computed_tokens_count" => |figures| &mut figures.prefill_tokens.count,
            "nixl_num_failed_transfers_total" => {
                self.has_nixl = true;
                |figures| &mut figures.transfers_failed
            }
            "nixl_num_kv_expired_reqs_total" => {
                self.has_nixl = true;
                |figures| &mut figures.holds_expired
            }
            "engine_sleep_state" => {
                if sample.label("sleep_state").as_deref() == Some("awake") {
                    self.asleep |= value == 0.0;
                }
                return;
            }
            "cache_config_info" => return self.vllm_cache(sample),
            family => {
                self.has_nixl |= family.starts_with("nixl_");
                return;
            }
        };
        if let Some(figures) = self.rank(sample, "engine") {
            *place(figures) = value;
        }
    }

    fn vllm_cache(&mut self, sample: &Sample<'_>) {
        if self.cache.is_some() {
            return;
        }
        let mut cache = CacheConfig::default();
        for (name, value) in sample.labels() {
            // Python's own words: `None` is not told.
            if value == "None" || value.len() > NAME_BYTES_MAX {
                continue;
            }
            match name {
                "block_size" => cache.block_size_tokens = value.parse().ok(),
                "num_gpu_blocks" => cache.blocks_total = value.parse().ok(),
                "cache_dtype" => cache.cache_dtype = Some(value.into_owned()),
                "enable_prefix_caching" => cache.prefix_caching = Some(value == "True"),
                "prefix_caching_hash_algo" => cache.hash_algorithm = Some(value.into_owned()),
                _ => {}
            }
        }
        self.cache = Some(cache);
    }

    fn sglang(&mut self, family: &str, sample: &Sample<'_>) {
        let place: fn(&mut Figures) -> &mut f64 = match family {
            "num_running_reqs" => {
                self.model(sample);
                |figures| &mut figures.running
            }
            "num_queue_reqs" => |figures| &mut figures.waiting,
            "token_usage" => |figures| &mut figures.pool_used,
            "max_total_num_tokens" => |figures| figures.pool_tokens.get_or_insert_default(),
            "num_retracted_reqs" | "num_retractions_total" => |figures| &mut figures.preemptions,
            "prompt_tokens_total" => |figures| &mut figures.prompt_tokens,
            "generation_tokens_total" => |figures| &mut figures.output_tokens,
            "cached_tokens_total" => |figures| &mut figures.cached_tokens,
            "inter_token_latency_seconds_sum" => |figures| &mut figures.token_gaps.sum,
            "inter_token_latency_seconds_count" => |figures| &mut figures.token_gaps.count,
            _ => return,
        };
        if let Some(figures) = self.rank(sample, "dp_rank") {
            // With metrics of every scheduler on, each tensor-parallel rank tells the same again.
            let place = place(figures);
            *place = place.max(sample.value);
        }
    }
}

impl Sum {
    /// What was added since `before`; nothing if it went back.
    pub(super) fn since(self, before: Self) -> Self {
        Self { sum: (self.sum - before.sum).max(0.0), count: (self.count - before.count).max(0.0) }
    }

    /// `None` without observations.
    pub(super) fn mean(self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }
}
