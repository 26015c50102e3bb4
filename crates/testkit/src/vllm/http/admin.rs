//! Everything that generates no tokens: health, models, tokenising, metrics, and the dev-mode routes.
//!
//! Evidence: routes and methods in `fixtures/vllm/http/openapi.json`; bodies of sleep, wake_up, load and
//! reset_prefix_cache were seen on vLLM 0.32; of pause, resume and abort_requests they are read in its
//! `rl/online/api_router.py`.

use std::sync::atomic::Ordering;
use std::time::SystemTime;

use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Shared, read, scale_out_disabled, shown_model};
use crate::api::error::ApiError;
use crate::api::fields::{Fields, chat_messages};
use crate::double::fault::Fault;
use crate::engine::nixl::external_id;
use crate::tokenizer;
use crate::vllm::{Vllm, life, metrics};

/// 200 while the engine lives, 503 when it is dead and the server not yet gone.
pub(super) async fn health(State(vllm): Shared) -> StatusCode {
    match vllm.body.life() {
        Some(life) if !life.dead() => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

pub(super) async fn version(State(vllm): Shared) -> Json<Value> {
    Json(json!({"version": vllm.options.version.name()}))
}

pub(super) async fn metrics(State(vllm): Shared) -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=1.0.0; charset=utf-8")];
    match vllm.body.life() {
        Some(life) => (content_type, metrics::render(&vllm, &life)).into_response(),
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// Always 0 without `--enable-server-load-tracking`.
pub(super) async fn load(State(vllm): Shared) -> Json<Value> {
    let answering = vllm.body.answering.load(Ordering::Relaxed);
    Json(json!({"server_load": if vllm.options.load_tracking { answering } else { 0 }}))
}

pub(super) async fn models(State(vllm): Shared) -> Json<Value> {
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let card = |id: &str, root: &str, parent: Option<&str>, max_model_len: Option<usize>| {
        json!({
            "id": id, "object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": parent,
            "max_model_len": max_model_len,
            "permission": [{
                "id": format!("modelperm-{:016x}", vllm.body.unique()), "object": "model_permission",
                "created": created, "allow_create_engine": false, "allow_sampling": true,
                "allow_logprobs": true, "allow_search_indices": false, "allow_view": true,
                "allow_fine_tuning": false, "organization": "*", "group": null, "is_blocking": false,
            }],
        })
    };
    let model = shown_model(&vllm);
    let mut cards = vec![card(&model, vllm.root(), None, Some(vllm.options.max_model_len))];
    for adapter in &vllm.options.adapters {
        cards.push(card(adapter, &format!("/adapters/{adapter}"), Some(&model), None));
    }
    Json(json!({"object": "list", "data": cards}))
}

pub(super) async fn kv_event_sources(State(vllm): Shared) -> Json<Value> {
    Json(life::event_sources(&vllm))
}

pub(super) async fn tokenize(State(vllm): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let answer = async {
        let body = read(&vllm, &uri, &headers, body).await?;
        let fields = Fields::of(&body)?;
        known_model(&vllm, &fields)?;
        let tokens = match fields.text("prompt")? {
            Some(prompt) => tokenizer::encode(&prompt),
            None => {
                let add = !fields.has("add_generation_prompt") || fields.flag("add_generation_prompt")?;
                tokenizer::encode(&tokenizer::render_chat(&chat_messages(&fields)?, add))
            }
        };
        let tokens = Fault::shown_tokens(vllm.body.fault().as_ref(), tokens);
        let names = fields.flag("return_token_strs")?;
        let names: Option<Vec<String>> =
            names.then(|| tokens.iter().map(|token| tokenizer::name(*token)).collect());
        Ok(Json(json!({
            "count": tokens.len(), "max_model_len": vllm.options.max_model_len, "tokens": tokens,
            "token_strs": names,
        })))
    };
    answer.await.unwrap_or_else(|error: ApiError| Json(error.body())).into_response_with(&vllm)
}

/// Gives a JSON error its status.
trait WithStatus {
    fn into_response_with(self, vllm: &Vllm) -> Response;
}

impl WithStatus for Json<Value> {
    fn into_response_with(self, _vllm: &Vllm) -> Response {
        let code = self.0["error"]["code"].as_u64().and_then(|code| u16::try_from(code).ok());
        let status = code.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::OK);
        (status, self).into_response()
    }
}

pub(super) async fn detokenize(State(vllm): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let answer = async {
        let body = read(&vllm, &uri, &headers, body).await?;
        let fields = Fields::of(&body)?;
        known_model(&vllm, &fields)?;
        let tokens = fields.tokens("tokens")?.ok_or_else(|| fields.missing("tokens"))?;
        if let Some(token) = tokens.iter().find(|token| !tokenizer::known(**token)) {
            return Err(ApiError::invalid(format!("Token id {token} is out of vocabulary")));
        }
        Ok(Json(json!({"prompt": tokenizer::decode(&tokens, false)})))
    };
    answer.await.unwrap_or_else(|error: ApiError| Json(error.body())).into_response_with(&vllm)
}

fn known_model(vllm: &Vllm, fields: &Fields<'_>) -> Result<(), ApiError> {
    let options = &vllm.options;
    match fields.text("model")? {
        Some(name) if !name.is_empty() && name != options.model && !options.adapters.contains(&name) => {
            Err(ApiError::unknown_model(&name, &options.model))
        }
        _ => Ok(()),
    }
}

/// Refused (`success` false) while requests have blocks. The event about it leaves with the next batch.
pub(super) async fn reset_prefix_cache(State(vllm): Shared) -> Json<Value> {
    let success = vllm.body.life().is_some_and(|life| life.reset_prefix_cache());
    Json(json!({"success": success}))
}

#[derive(Deserialize)]
pub(super) struct ServerInfo {
    config_format: Option<String>,
}

pub(super) async fn server_info(State(vllm): Shared, Query(query): Query<ServerInfo>) -> Json<Value> {
    let options = &vllm.options;
    let config = json!({
        "model_config": {"model": vllm.root(), "served_model_name": options.model,
                         "max_model_len": options.max_model_len},
        "cache_config": {"block_size": options.block_size, "num_gpu_blocks": options.blocks,
                         "enable_prefix_caching": options.prefix_caching},
        "parallel_config": {"data_parallel_size": options.dp, "tensor_parallel_size": 1},
        "scheduler_config": {"max_num_seqs": options.running_max},
        "kv_transfer_config": options.connector.as_ref().map(|connector| json!({
            "kv_connector": "NixlConnector", "kv_role": connector.role, "engine_id": vllm.body.life().map(|life| life.engine_ids.clone()),
        })),
    });
    let json_asked = query.config_format.as_deref() == Some("json");
    let config = if json_asked { config } else { Value::from(config.to_string()) };
    Json(json!({"vllm_config": config, "vllm_env": {}, "system_env": {}}))
}

#[derive(Deserialize)]
pub(super) struct Sleep {
    level: Option<u8>,
}

pub(super) async fn sleep(State(vllm): Shared, Query(query): Query<Sleep>) -> Json<Value> {
    vllm.sleeping.store(true, Ordering::Relaxed);
    Json(json!({"status": "sleeping", "level": query.level.unwrap_or(1)}))
}

pub(super) async fn wake_up(State(vllm): Shared) -> Json<Value> {
    vllm.sleeping.store(false, Ordering::Relaxed);
    Json(json!({"status": "awake", "tags": null}))
}

pub(super) async fn is_sleeping(State(vllm): Shared) -> Json<Value> {
    Json(json!({"is_sleeping": vllm.sleeping.load(Ordering::Relaxed)}))
}

#[derive(Deserialize)]
pub(super) struct Pause {
    mode: Option<String>,
}

pub(super) async fn pause(State(vllm): Shared, Query(query): Query<Pause>) -> Response {
    match query.mode.as_deref() {
        None | Some("abort") => abort(&vllm, |_| true),
        Some("wait" | "keep") => 0,
        Some(_) => {
            return ApiError::malformed(
                "query.mode",
                "literal_error",
                "Input should be ''abort'', ''wait'' or ''keep''",
            )
            .into_response();
        }
    };
    vllm.body.set_paused(true);
    Json(json!({"status": "paused"})).into_response()
}

pub(super) async fn resume(State(vllm): Shared) -> Json<Value> {
    vllm.body.set_paused(false);
    Json(json!({"status": "resumed"}))
}

pub(super) async fn is_paused(State(vllm): Shared) -> Json<Value> {
    Json(json!({"is_paused": vllm.body.pace.paused()}))
}

/// Aborts requests by the ids in their answers; needs `--enable-scale-out`. Ids that are unknown are no error.
pub(super) async fn abort_scale_out(
    State(vllm): Shared,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let body = read(&vllm, &uri, &headers, body).await;
    if !vllm.options.scale_out {
        return scale_out_disabled().into_response();
    }
    let ids = match body.map(|body| body.get("request_ids").cloned()) {
        Ok(Some(Value::Array(ids))) => ids,
        Ok(_) => {
            let message = "Missing 'request_ids' in request body".to_owned();
            return ApiError { status: 400, kind: "Bad Request", message, param: None }.into_response();
        }
        Err(error) => return error.into_response(),
    };
    abort(&vllm, |id| ids.iter().any(|asked| asked.as_str().is_some_and(|asked| names(asked, id))));
    StatusCode::OK.into_response()
}

/// Dev mode: aborts these requests, or all.
pub(super) async fn abort_all(State(vllm): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let body = match read(&vllm, &uri, &headers, body).await {
        Ok(body) => body,
        Err(error) => return error.into_response(),
    };
    let ids = body.get("request_ids").and_then(Value::as_array).filter(|ids| !ids.is_empty());
    let asked = |id: &str| {
        ids.is_none_or(|ids| ids.iter().any(|asked| asked.as_str().is_some_and(|asked| names(asked, id))))
    };
    let aborted = abort(&vllm, asked);
    Json(json!({"status": "aborted", "aborted": aborted})).into_response()
}

/// Whether an id that a client knows means the engine's request `id`.
fn names(asked: &str, id: &str) -> bool {
    asked == id || asked == external_id(id) || asked == external_id(external_id(id))
}

fn abort(vllm: &Vllm, asked: impl Fn(&str) -> bool) -> usize {
    vllm.body.life().map_or(0, |life| life.abort(asked))
}
