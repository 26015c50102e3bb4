//! Everything that generates no tokens: health, models, server information, loads, metrics, tokenising.
//!
//! Evidence: SGLang 0.5.23's `entrypoints/http_server.py`, `v1_loads.py`, `managers/load_snapshot.py`,
//! `runtime_context.py` (`kv_events` in `/server_info`), `observability/metrics_collector.py`. The health check of a
//! real server generates a token and answers 503 if none comes; here it looks whether the engine steps.

use std::fmt::Write as _;
use std::time::SystemTime;

use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Shared, read};
use crate::api::error::ApiError;
use crate::api::fields::{Fields, chat_messages};
use crate::double::fault::Fault;
use crate::double::net::Port;
use crate::engine::{Counts, Gauges};
use crate::sglang::options::SglangMode;
use crate::sglang::{LOAD_TOPIC, Sglang};
use crate::tokenizer;

pub(super) async fn health(State(sglang): Shared) -> StatusCode {
    let alive = sglang.body.life().is_some_and(|life| !life.dead());
    if alive && !sglang.body.pace.paused() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

pub(super) async fn model_info(State(sglang): Shared) -> Json<Value> {
    Json(json!({
        "model_path": sglang.model_path(), "served_model_name": sglang.options.model,
        "tokenizer_path": sglang.model_path(), "is_generation": true, "preferred_sampling_params": null,
        "weight_version": "default", "load_format": "auto", "reasoning_parser": null, "tool_call_parser": null,
        "disaggregation_mode": sglang.options.mode.name(), "has_image_understanding": false,
        "has_audio_understanding": false, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    }))
}

pub(super) async fn models(State(sglang): Shared) -> Json<Value> {
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let model = match sglang.body.fault() {
        Some(Fault::WrongModel { name }) => name,
        _ => sglang.options.model.clone(),
    };
    let card = |id: &str, root: &str, parent: Option<&str>, length: Option<usize>| {
        json!({"id": id, "object": "model", "created": created, "owned_by": "sglang", "root": root,
               "parent": parent, "max_model_len": length})
    };
    let mut cards = vec![card(&model, &model, None, Some(sglang.options.context_length))];
    let adapters = sglang.options.adapters.iter();
    cards.extend(adapters.map(|name| card(name, &format!("/adapters/{name}"), Some(&model), None)));
    Json(json!({"object": "list", "data": cards}))
}

/// Discovery: arguments of the launch, and where the sockets are.
pub(super) async fn server_info(State(sglang): Shared) -> Json<Value> {
    let options = &sglang.options;
    let loads: Vec<Value> =
        rank_loads(&sglang).iter().map(|(_, gauges, _)| json!({"load": gauges.running})).collect();
    Json(json!({
        "model_path": sglang.model_path(), "tokenizer_path": sglang.model_path(),
        "served_model_name": options.model, "context_length": options.context_length,
        "page_size": options.page_size, "dp_size": options.dp, "tp_size": 1, "pp_size": 1,
        "max_running_requests": options.running_max,
        "max_total_num_tokens": options.pages * options.page_size,
        "disaggregation_mode": options.mode.name(),
        "disaggregation_bootstrap_port": sglang.bootstrap.as_ref().map_or(8998, Port::number),
        "disaggregation_transfer_backend": "nixl", "kv_cache_dtype": "auto",
        "load_balance_method": if options.mode == SglangMode::Prefill { "follow_bootstrap_room" } else { "round_robin" },
        "incremental_streaming_output": options.incremental_streaming,
        "kv_events": kv_events(&sglang), "internal_states": loads, "version": "0.5.23", "frontend": "python",
    }))
}

fn kv_events(sglang: &Sglang) -> Option<Value> {
    let config = sglang.options.kv_events.as_ref()?;
    let first = sglang.body.ports.first()?;
    let mut descriptor = json!({
        "publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": first.events.as_ref().map(Port::number),
        "topic": config.topic, "block_size": sglang.options.page_size, "dp_size": sglang.options.dp,
    });
    if let Some(port) = &first.other {
        descriptor["load_endpoint_port_base"] = json!(port.number());
        descriptor["load_topic"] = json!(LOAD_TOPIC);
    }
    if let Some(port) = &first.replay {
        descriptor["replay_endpoint_port_base"] = json!(port.number());
    }
    Some(descriptor)
}

/// Each rank's numbers.
fn rank_loads(sglang: &Sglang) -> Vec<(u32, Gauges, Counts)> {
    let life = sglang.body.life();
    let ranks = life.iter().flat_map(|life| &life.ranks);
    ranks
        .map(|rank| {
            let core = rank.core.lock();
            (rank.index, core.gauges(), core.counts())
        })
        .collect()
}

#[derive(Deserialize)]
pub(super) struct Loads {
    dp_rank: Option<u32>,
    include: Option<String>,
    format: Option<String>,
}

pub(super) async fn loads(State(sglang): Shared, Query(query): Query<Loads>) -> Response {
    let sections = ["core", "memory", "spec", "lora", "disagg", "queues", "all"];
    let include: Vec<&str> =
        query.include.as_deref().map(|list| list.split(',').map(str::trim).collect()).unwrap_or_default();
    if let Some(unknown) = include.iter().find(|section| !sections.contains(section)) {
        let detail = format!("Invalid include sections: {{'{unknown}'}}.");
        return (
            StatusCode::BAD_REQUEST,
            Json(json!({"object": "error", "message": detail, "type": "400", "param": null, "code": 400})),
        )
            .into_response();
    }
    let capacity = sglang.options.pages * sglang.options.page_size;
    let all = include.is_empty() || include.contains(&"all");
    let load = |(rank, gauges, counts): &(u32, Gauges, Counts)| {
        let total = gauges.tokens + gauges.waiting_tokens;
        let hits = counts.prefix_hits as f64 / (counts.prefix_queries.max(1)) as f64;
        let mut load = json!({
            "timestamp": 0.0, "dp_rank": rank, "num_running_reqs": gauges.running,
            "num_waiting_reqs": gauges.waiting, "num_waiting_uncached_tokens": gauges.waiting_tokens,
            "num_used_tokens": gauges.tokens, "num_total_tokens": total, "num_active_tokens": total,
            "num_prealloc_ready_tokens": 0, "max_total_num_tokens": capacity,
            "max_running_requests": gauges.running_max, "token_usage": gauges.usage, "gen_throughput": 0.0,
            "cache_hit_rate": hits, "utilization": gauges.usage,
            "total_prefill_uncached_tokens": counts.computed, "total_prefill_busy_us": 0,
            "decode_moments": null,
        });
        if all || include.contains(&"disagg") {
            load["disaggregation"] = json!({"mode": sglang.options.mode.name()});
        }
        if all || include.contains(&"queues") {
            load["queues"] = json!({
                "waiting": gauges.waiting, "grammar": 0, "paused": 0, "retracted": counts.preempted,
                "prealloc_ready": 0,
            });
        }
        load
    };
    let ranks = rank_loads(&sglang);
    let ranks = ranks.iter().filter(|(rank, ..)| query.dp_rank.is_none_or(|asked| asked == *rank));
    let loads: Vec<Value> = ranks.map(load).collect();
    if query.format.as_deref() == Some("prometheus") {
        return prometheus(&loads).into_response();
    }
    Json(json!({
        "timestamp": "1970-01-01T00:00:00+00:00", "version": "0.5.23", "accelerator": null,
        "num_accelerators": 1, "loads": loads,
    }))
    .into_response()
}

fn prometheus(loads: &[Value]) -> String {
    let mut out = String::new();
    let names = loads.first().and_then(Value::as_object).into_iter().flat_map(|load| load.keys());
    for name in names.filter(|name| *name != "dp_rank") {
        let samples: Vec<_> = loads.iter().filter(|load| load[name].is_number()).collect();
        if !samples.is_empty() {
            let _memory_takes_all = writeln!(out, "# TYPE sglang_{name} gauge");
        }
        for load in samples {
            let _memory_takes_all =
                writeln!(out, "sglang_{name}{{dp_rank=\"{}\"}} {}", load["dp_rank"], load[name]);
        }
    }
    out
}

pub(super) async fn metrics(State(sglang): Shared) -> Response {
    let mut out = String::new();
    let ranks = rank_loads(&sglang);
    let engine = match sglang.options.mode {
        SglangMode::Null => "unified",
        mode => mode.name(),
    };
    let capacity = (sglang.options.pages * sglang.options.page_size) as f64;
    type Read = fn(&Gauges, &Counts) -> f64;
    let families: [(&str, &str, Read); 9] = [
        ("sglang:num_running_reqs", "gauge", |gauges, _| gauges.running as f64),
        ("sglang:num_queue_reqs", "gauge", |gauges, _| gauges.waiting as f64),
        ("sglang:num_used_tokens", "gauge", |gauges, _| gauges.tokens as f64),
        ("sglang:token_usage", "gauge", |gauges, _| gauges.usage),
        ("sglang:cache_hit_rate", "gauge", |_, counts| {
            counts.prefix_hits as f64 / counts.prefix_queries.max(1) as f64
        }),
        ("sglang:num_retracted_reqs", "gauge", |_, counts| counts.preempted as f64),
        ("sglang:prompt_tokens_total", "counter", |_, counts| {
            (counts.computed + counts.prefix_hits + counts.external_hits) as f64
        }),
        ("sglang:generation_tokens_total", "counter", |_, counts| counts.generated as f64),
        ("sglang:num_transfer_failed_reqs_total", "counter", |_, counts| counts.transfers_failed as f64),
    ];
    let mut family = |name: &str, kind: &str, read: &dyn Fn(&Gauges, &Counts) -> f64| {
        let _memory_takes_all = writeln!(out, "# TYPE {name} {kind}");
        for (rank, gauges, counts) in &ranks {
            let labels = format!(
                "dp_rank=\"{rank}\",engine_type=\"{engine}\",model_name=\"{}\",pp_rank=\"0\",tp_rank=\"0\"",
                sglang.options.model
            );
            let _memory_takes_all = writeln!(out, "{name}{{{labels}}} {:?}", read(gauges, counts));
        }
    };
    for (name, kind, read) in families {
        family(name, kind, &read);
    }
    family("sglang:max_total_num_tokens", "gauge", &|_, _| capacity);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], out).into_response()
}

/// Refused while requests are running or waiting.
pub(super) async fn flush_cache(State(sglang): Shared) -> Response {
    if sglang.body.life().is_some_and(|life| life.reset_prefix_cache()) {
        return "Cache flushed.\nPlease check backend logs for more details.\n".into_response();
    }
    (StatusCode::BAD_REQUEST, "Flush cache failed.\n").into_response()
}

/// Aborts the requests whose id begins with `rid`, or all.
pub(super) async fn abort_request(
    State(sglang): Shared,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let body = match read(&sglang, &uri, &headers, body).await {
        Ok(body) => body,
        Err(error) => return native_error(&error),
    };
    let rid = body["rid"].as_str().unwrap_or_default();
    let all = body["abort_all"] == true;
    if let Some(life) = sglang.body.life() {
        life.abort(|id| all || (!rid.is_empty() && id.starts_with(rid)));
    }
    StatusCode::OK.into_response()
}

fn native_error(error: &ApiError) -> Response {
    let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::BAD_REQUEST);
    (status, Json(json!({"object": "error", "message": error.message, "type": error.kind, "param": error.param, "code": error.status})))
        .into_response()
}

pub(super) async fn tokenize(State(sglang): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let answer = async {
        let body = read(&sglang, &uri, &headers, body).await?;
        let fields = Fields::of(&body)?;
        let fault = sglang.body.fault();
        let encode = |text: &str| Fault::shown_tokens(fault.as_ref(), tokenizer::encode(text));
        let (tokens, count) = match fields.get("prompt") {
            _ if fields.get("messages").is_some() => {
                let add = !fields.has("add_generation_prompt") || fields.flag("add_generation_prompt")?;
                let tokens = encode(&tokenizer::render_chat(&chat_messages(&fields)?, add));
                (json!(tokens), json!(tokens.len()))
            }
            Some(Value::String(text)) => {
                let tokens = encode(text);
                (json!(tokens), json!(tokens.len()))
            }
            Some(Value::Array(_)) => {
                let lists: Vec<Vec<u32>> = fields.texts("prompt")?.iter().map(|text| encode(text)).collect();
                let counts: Vec<usize> = lists.iter().map(Vec::len).collect();
                (json!(lists), json!(counts))
            }
            _ => return Err(ApiError::invalid("Invalid prompt type. Expected str or List[str].")),
        };
        Ok(json!({"tokens": tokens, "count": count, "max_model_len": sglang.options.context_length}))
    };
    answer.await.map_or_else(|error| native_error(&error), |value: Value| Json(value).into_response())
}

pub(super) async fn detokenize(State(sglang): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let answer = async {
        let body = read(&sglang, &uri, &headers, body).await?;
        let fields = Fields::of(&body)?;
        let tokens = fields.tokens("tokens")?.ok_or_else(|| fields.missing("tokens"))?;
        let skip = !fields.has("skip_special_tokens") || fields.flag("skip_special_tokens")?;
        Ok(json!({"text": tokenizer::decode(&tokens, skip)}))
    };
    answer
        .await
        .map_or_else(|error: ApiError| native_error(&error), |value: Value| Json(value).into_response())
}
