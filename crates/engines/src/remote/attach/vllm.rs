//! What a vLLM server is asked.

use std::collections::BTreeSet;

use forebay_engine_wire::{
    discovery::{
        KvSource, Server, routes,
        vllm::{self, FoundConnector, FoundVllm},
    },
    metrics::Scrape,
};
use forebay_types::Role;
use serde_json::{Value, json};

use super::{
    AttachError, AttachSpec, First, Found, Severity, choose_model, events,
    probe::{Probe, reason, status},
    tokens::{self, token_ids},
};
use crate::remote::{Abort, HandOver, RankPin, TokenRoute, findings::Findings};

pub(super) async fn find_out(
    probe: &Probe<'_>,
    spec: &AttachSpec,
    first: First,
    findings: &mut Findings,
) -> Result<Found, AttachError> {
    let (mut found, info) = read(probe, spec, &first, findings).await?;
    let routes = probe.document("/openapi.json").await.ok().and_then(|body| routes(&body).ok());
    let completes = speak(&mut found, routes.as_ref(), probe, spec, findings).await?;
    hand_over(&mut found, &info, first.metrics.as_ref(), probe, spec, findings).await;
    if found.can_export && found.tokens == Some(TokenRoute::VllmGenerate) {
        legs_route(&mut found, completes, probe, spec).await;
    }
    Ok(found)
}

/// What its documents say; nothing is computed for it.
pub(super) async fn read(
    probe: &Probe<'_>,
    spec: &AttachSpec,
    first: &First,
    findings: &mut Findings,
) -> Result<(Found, FoundVllm), AttachError> {
    let model = choose_model(first.models.as_ref(), spec, findings)?;
    let mut found = Found::plain(Server::Vllm, model);
    found.version.clone_from(&first.version);
    // Only in development mode.
    let info = probe.slow_document("/server_info?config_format=json").await;
    let info = info.ok().and_then(|body| vllm::server_info(&body).ok()).unwrap_or_default();
    configuration(&mut found, &info, first.metrics.as_ref(), spec, findings);
    sight(&mut found, &info, probe, spec, findings).await;
    Ok((found, info))
}

/// What `/metrics` and, in development mode, `/server_info` say.
fn configuration(
    found: &mut Found,
    info: &FoundVllm,
    metrics: Option<&Scrape>,
    spec: &AttachSpec,
    findings: &mut Findings,
) {
    let nothing = Scrape::default();
    found.metrics = metrics.is_some();
    let metrics = metrics.unwrap_or(&nothing);
    let cache = metrics.cache.clone().unwrap_or_default();
    if !found.metrics {
        findings.warn(
            "it has no /metrics: its load and block size are not known",
            "start it without --disable-log-stats",
        );
    }
    found.started_seconds = metrics.started_seconds;
    found.block_size_tokens = cache.block_size_tokens.or(info.block_size_tokens);
    found.blocks_total = cache.blocks_total;
    found.cache_dtype = cache.cache_dtype.or_else(|| info.cache_dtype.clone());
    found.dtype.clone_from(&info.dtype);
    found.step_tokens_max = info.step_tokens_max;
    if found.block_size_tokens.is_none() && spec.overrides.block_size_tokens.is_none() {
        findings.warn(
            "its block size is not known, so it takes part in no hand-over",
            "let /metrics say it: start it without --disable-log-stats",
        );
    }
    if found.step_tokens_max.is_none() && spec.overrides.step_tokens_max.is_none() {
        let what =
            format!("its step budget is not told; {} tokens are taken for it", super::STEP_TOKENS_DEFAULT);
        findings.info(what);
    }
    if cache.prefix_caching.or(info.prefix_caching) == Some(false) {
        findings.warn("its prefix cache is off", "start it without --no-enable-prefix-caching");
    }
    // Behind a load balancer of ranks each server has one, which goes by its number in the whole.
    let ranks: BTreeSet<u16> = metrics.ranks.keys().copied().collect();
    let first = ranks.first().copied().unwrap_or(0);
    found.first_rank = first;
    found.dp_ranks = info.dp_ranks.filter(|_| ranks.is_empty()).unwrap_or(ranks.len().max(1) as u16);
    found.ranks = if found.dp_ranks > 1 { RankPin::Header } else { RankPin::None };
    if metrics.asleep {
        findings.warn("it sleeps", "wake it (POST /wake_up)");
    }
}

/// How much of its cache can be seen.
async fn sight(
    found: &mut Found,
    info: &FoundVllm,
    probe: &Probe<'_>,
    spec: &AttachSpec,
    findings: &mut Findings,
) {
    let sources: Option<Vec<KvSource>> = match &spec.overrides.kv_events {
        Some(first) => Some(of_ranks(first, found.dp_ranks)),
        None => match probe.document("/kv_event_sources").await.map(|body| vllm::kv_event_sources(&body)) {
            Ok(Ok(told)) => Some(told.sources.into_values().collect()),
            // Before 0.32 only development mode says it.
            _ => match &info.kv_events {
                Some(first) => {
                    first.as_ref().map(|first| of_ranks(first, found.dp_ranks)).or(Some(Vec::new()))
                }
                None => None,
            },
        },
    };
    (found.sight, found.events) = match sources {
        Some(sources) if sources.len() == usize::from(found.dp_ranks) => {
            events::sight(&sources, Server::Vllm, probe.endpoint.host(), findings).await
        }
        Some(_) => events::off(found.dp_ranks, findings),
        None => {
            findings.warn(
                "it does not say where its KV events are",
                "name the endpoint (`events=tcp://HOST:PORT` with --engine), or use vLLM 0.32 or later",
            );
            let why = "it does not say where its KV events are";
            (crate::CacheSight::Approximate { why: why.into() }, Vec::new())
        }
    };
}

fn of_ranks(first: &KvSource, dp_ranks: u16) -> Vec<KvSource> {
    (0..dp_ranks).map_while(|rank| first.of_rank(rank).ok()).collect()
}

/// In which words it takes a request, and whether `/v1/completions` takes and answers tokens too.
async fn speak(
    found: &mut Found,
    routes: Option<&BTreeSet<String>>,
    probe: &Probe<'_>,
    spec: &AttachSpec,
    findings: &mut Findings,
) -> Result<bool, AttachError> {
    let prompt = tokens::sample(spec.tokenizer.as_deref());
    let has = |route: &str| routes.is_none_or(|routes| routes.contains(route));
    if has("/inference/v1/generate") {
        let question = json!({
            "token_ids": prompt, "model": found.model.id, "cache_salt": tokens::PROBE_SALT,
            "sampling_params": {"max_tokens": 1, "temperature": 0.0},
        });
        match probe.ask("/inference/v1/generate", &question).await {
            Ok(answer) if token_ids(answer.pointer("/choices/0/token_ids")).is_some() => {
                found.tokens = Some(TokenRoute::VllmGenerate);
                // 0.25 has no such route. Of an id that nobody has, the others say nothing.
                let nobody = json!({"request_ids": ["forebay-nobody"]});
                if probe.ask("/inference/v1/abort_requests", &nobody).await.is_ok() {
                    found.abort = Abort::VllmAbortRequests;
                }
            }
            Ok(_) => findings.regret("its /inference/v1/generate answers no token ids"),
            Err(error) if status(&error) == Some(403) => {
                findings.info(
                    "its token routes are closed (--enable-scale-out opens them); /v1/completions is used",
                );
            }
            Err(_) => {}
        }
    }
    let (answer, salted) = match complete(probe, found, &prompt, Some(tokens::PROBE_SALT)).await {
        Err(error) if status(&error) == Some(400) => (complete(probe, found, &prompt, None).await, false),
        answer => (answer, true),
    };
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) if matches!(status(&error), Some(401 | 403)) => return Err(AttachError::Key(error)),
        // Its front outlives its core for a moment.
        Err(error) if matches!(status(&error), Some(500 | 502..=504)) => {
            return Err(AttachError::NotReady(error));
        }
        Err(error) => {
            findings.regret(format!("it did not complete a short prompt: {}", reason(&error)));
            return Ok(false);
        }
    };
    found.salts_cache = salted && knows_salts(found.version.as_deref());
    if !found.salts_cache {
        findings.regret("it does not know cache_salt: tenants share its prefix cache");
    }
    let completes = token_ids(answer.pointer("/choices/0/token_ids")).is_some();
    if !completes {
        findings.regret(
            "it does not answer token ids (return_token_ids, vLLM 0.10.2 or later): it is given text",
        );
    } else if found.tokens.is_none() {
        found.tokens = Some(TokenRoute::Completions);
    }
    if answer.pointer("/usage/prompt_tokens_details").is_none_or(Value::is_null) {
        findings.warn(
            "it does not say how much of a prompt was cached, so predictions cannot be checked",
            "start it with --enable-prompt-tokens-details",
        );
    }
    if found.tokens.is_some() {
        found.tokens_agree = tokens::agree(probe, found, spec, findings).await;
    }
    Ok(completes)
}

/// Both legs of a hand-over go to one route. 0.25 has `/inference/v1/generate`, which passes transfer parameters over.
async fn legs_route(found: &mut Found, completes: bool, probe: &Probe<'_>, spec: &AttachSpec) {
    let question = json!({
        "token_ids": tokens::sample(spec.tokenizer.as_deref()), "model": found.model.id,
        "sampling_params": {"max_tokens": 1, "temperature": 0.0}, "kv_transfer_params": export(),
    });
    let answer = probe.ask("/inference/v1/generate", &question).await;
    if !answer.is_ok_and(|answer| is_exported(&answer)) {
        found.tokens = completes.then_some(TokenRoute::Completions);
    }
}

async fn complete(
    probe: &Probe<'_>,
    found: &Found,
    prompt: &[u32],
    salt: Option<&str>,
) -> Result<Value, crate::remote::client::HttpError> {
    let mut question = json!({
        "model": found.model.id, "prompt": prompt, "max_tokens": 1, "temperature": 0, "return_token_ids": true,
    });
    if let Some(salt) = salt {
        question["cache_salt"] = json!(salt);
    }
    probe.ask("/v1/completions", &question).await
}

/// From 0.9 on. Before, the field was passed over, which no answer shows; a version that cannot be read is a newer one.
fn knows_salts(version: Option<&str>) -> bool {
    is_since(version, 9)
}

/// Whether it is 0.`minor` or newer. A version that cannot be read is a newer one.
fn is_since(version: Option<&str>, minor: u32) -> bool {
    let Some((major, rest)) = version.and_then(|version| version.split_once('.')) else {
        return true;
    };
    let its: String = rest.chars().take_while(char::is_ascii_digit).collect();
    match (major.parse::<u32>(), its.parse::<u32>()) {
        (Ok(0), Ok(its)) => its >= minor,
        _ => true,
    }
}

/// NIXL reads `enable_cross_layers_blocks` up to 0.28; since 0.29 a variable names the layout instead.
fn layout_is_a_variable(version: Option<&str>) -> bool {
    is_since(version, 29)
}

/// Whether it exchanges KV. NIXL's connector does not act on its `kv_role`: whoever has it gives, takes and serves plain
/// requests. So it is the operator's role that decides.
async fn hand_over(
    found: &mut Found,
    info: &FoundVllm,
    metrics: Option<&Scrape>,
    probe: &Probe<'_>,
    spec: &AttachSpec,
    findings: &mut Findings,
) {
    let told = info.connector.as_ref();
    let has_nixl = match told {
        Some(connector) => connector.as_ref().is_some_and(|connector| connector.is_nixl),
        None => metrics.is_some_and(|metrics| metrics.has_nixl),
    };
    if let Some(Some(connector)) = told
        && !connector.is_nixl
    {
        findings.regret(format!("its connector, {}, is not used by Forebay", connector.class));
    }
    // Other connectors may not bear the question, so it is only put where there is NIXL, or the operator says so.
    let pinned = spec.role.is_some_and(|role| role != Role::Both);
    let may_have = has_nixl || (pinned && told.is_none());
    let exports = match may_have {
        true => exports(probe, found, spec).await.unwrap_or_else(|why| {
            findings
                .regret(format!("whether others can go on from what it computed was not found out: {why}"));
            false
        }),
        false => false,
    };
    if !has_nixl && !exports {
        let severity = if pinned { Severity::Warning } else { Severity::Info };
        let mend = format!("start it with {}", nixl(spec.role, found.version.as_deref()));
        return findings.add(
            severity,
            "it has no NIXL connector, so it takes part in no hand-over",
            Some(&mend),
        );
    }
    check_connector(told.and_then(Option::as_ref), found.version.as_deref(), findings);
    if found.block_size_tokens.is_none() && spec.overrides.block_size_tokens.is_none() {
        return; // said already
    }
    found.can_export = exports;
    // To ask would take another engine's KV. A connector is there, and one that gives takes as well.
    found.can_import = true;
    found.hand_over = HandOver::TransferParams;
    found.connector = Some("nixl".to_owned());
}

/// What makes the connector there, robust and fast.
fn nixl(role: Option<Role>, version: Option<&str>) -> String {
    let role = match role {
        Some(Role::Prefill) => "kv_producer",
        Some(Role::Decode) => "kv_consumer",
        Some(Role::Both) | None => "kv_both",
    };
    let (extra, variable) = match layout_is_a_variable(version) {
        true => ("", " and VLLM_KV_CACHE_LAYOUT=BLHNC (GPUs only)"),
        false => (r#","kv_connector_extra_config":{"enable_cross_layers_blocks":"True"}"#, ""),
    };
    format!(
        r#"--kv-transfer-config '{{"kv_connector":"NixlConnector","kv_role":"{role}","kv_load_failure_policy":"recompute"{extra}}}'{variable}"#
    )
}

/// What its connector's configuration lacks.
fn check_connector(connector: Option<&FoundConnector>, version: Option<&str>, findings: &mut Findings) {
    let variable = layout_is_a_variable(version);
    let Some(connector) = connector else {
        let layout =
            if variable { "VLLM_KV_CACHE_LAYOUT=BLHNC (GPUs only)" } else { "enable_cross_layers_blocks" };
        return findings.info(format!(
            "how its connector is configured is not told (VLLM_SERVER_DEV_MODE=1 would): check that {layout} is set and \
             kv_load_failure_policy is recompute",
        ));
    };
    let slow =
        "its KV moves in small pieces, one for each layer and block: about six times slower than it could";
    if variable {
        findings.info(format!("unless VLLM_KV_CACHE_LAYOUT=BLHNC is set (GPUs only), {slow}"));
    } else if !connector.cross_layers {
        let mend = r#"add "kv_connector_extra_config":{"enable_cross_layers_blocks":"True"} to --kv-transfer-config"#;
        findings.warn(slow, mend);
    }
    if connector.load_failure_policy.as_deref() != Some("recompute") {
        findings.warn(
            "a request fails when its KV does not arrive",
            r#"add "kv_load_failure_policy":"recompute" to --kv-transfer-config"#,
        );
    }
}

/// What a prefill leg asks.
fn export() -> Value {
    json!({"do_remote_decode": true, "do_remote_prefill": false})
}

/// Whether a prefill leg answers how others come by its KV. What it holds for that is given up when its lease ends.
async fn exports(probe: &Probe<'_>, found: &Found, spec: &AttachSpec) -> Result<bool, String> {
    let question = json!({
        "model": found.model.id, "prompt": tokens::sample(spec.tokenizer.as_deref()),
        "max_tokens": 1, "temperature": 0, "kv_transfer_params": export(),
    });
    let answer = probe.ask("/v1/completions", &question).await.map_err(|error| reason(&error))?;
    Ok(is_exported(&answer))
}

fn is_exported(answer: &Value) -> bool {
    let params = answer.get("kv_transfer_params").unwrap_or(&Value::Null);
    params.get("do_remote_prefill").and_then(Value::as_bool) == Some(true)
        && params.get("remote_engine_id").is_some_and(Value::is_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_know_salts() {
        for (version, knows) in [
            (Some("0.8.5"), false),
            (Some("0.9.0.1"), true),
            (Some("0.32.0+cpu"), true),
            (Some("1.0"), true),
            (Some("dev"), true),
            (None, true),
        ] {
            assert_eq!(knows_salts(version), knows, "{version:?}");
        }
    }
}
