//! Checks of the surface: models, metrics, tokenising, errors, ids.

use std::sync::Arc;

use http::Method;
use serde_json::{Value, json};

use super::{Check, Outcome, Target, ensure, equal, skipped};

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check::new("models name themselves, their root and their length", models),
        Check::new("health, ping and version answer", health),
        Check::new("metrics tell the load and the KV layout", metrics),
        Check::new("tokenising and back gives the same text", tokenise),
        Check::new("errors have vLLM's status and shape", errors),
        Check::new("a data-parallel rank out of range is refused", ranks),
        Check::new("the request id comes back in the answer", request_ids),
        Check::new("pausing is dev mode's", pause),
    ]
}

async fn models(target: Arc<Target>) -> Result<Outcome, String> {
    let answer = target.get("/v1/models").await?.json();
    let card = &answer["data"][0];
    ensure(card["id"].is_string() && card["root"].is_string(), || format!("no id and root in {card}"))?;
    ensure(card["max_model_len"].as_u64().is_some_and(|length| length > 0), || {
        format!("no length in {card}")
    })?;
    equal("the base model's parent", &card["parent"], &Value::Null)?;
    Ok(Outcome::Passed)
}

async fn health(target: Arc<Target>) -> Result<Outcome, String> {
    equal("/health", target.get("/health").await?.status, 200)?;
    equal("/ping", target.get("/ping").await?.status, 200)?;
    let version = target.get("/version").await?.json();
    ensure(version["version"].is_string(), || format!("no version in {version}"))?;
    Ok(Outcome::Passed)
}

async fn metrics(target: Arc<Target>) -> Result<Outcome, String> {
    let url = target.url.clone();
    for name in ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"] {
        target.metric(&url, name, "engine=\"0\"").await?;
    }
    for source in ["local_compute", "local_cache_hit", "external_kv_transfer"] {
        target.metric(&url, "vllm:prompt_tokens_by_source_total", source).await?;
    }
    equal(
        "cache_config_info",
        target.metric(&url, "vllm:cache_config_info", "block_size=\"").await? >= 1.0,
        true,
    )?;
    Ok(Outcome::Passed)
}

async fn tokenise(target: Arc<Target>) -> Result<Outcome, String> {
    let text = target.fresh_text(12);
    let tokens =
        target.post("/tokenize", &json!({"prompt": text, "add_special_tokens": false})).await?.json();
    equal("count", tokens["count"].as_u64(), tokens["tokens"].as_array().map(|tokens| tokens.len() as u64))?;
    let back = target.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await?.json();
    equal("the text", back["prompt"].as_str(), Some(text.as_str()))?;
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let chat = target.post("/tokenize", &chat).await?.json();
    ensure(chat["count"].as_u64().is_some_and(|count| count > 1), || format!("no template in {chat}"))?;
    Ok(Outcome::Passed)
}

async fn errors(target: Arc<Target>) -> Result<Outcome, String> {
    let cases = [
        (json!({"prompt": "x", "model": "no such model"}), 404),
        (json!({"prompt": ""}), 400),
        (json!({"prompt": "x", "max_tokens": 0}), 400),
        (json!({"prompt": "x", "max_tokens": "many"}), 400),
        (json!({"prompt": "x", "temperature": -1}), 400),
        (json!({"prompt": "x", "temperature": 0, "n": 2}), 400),
        (json!({"prompt": "x", "stream_options": {"include_usage": true}}), 400),
        (json!({"prompt": [4_000_000_000_u32]}), 400),
    ];
    for (body, status) in cases {
        let answer = target.post("/v1/completions", &body).await?;
        equal(&format!("the status of {body}"), answer.status, status)?;
        let error = answer.json()["error"].clone();
        let shaped =
            error["message"].is_string() && error["type"].is_string() && error.get("param").is_some();
        ensure(shaped && error["code"] == json!(status), || format!("{body} gave {error}"))?;
    }
    Ok(Outcome::Passed)
}

async fn ranks(target: Arc<Target>) -> Result<Outcome, String> {
    let url = format!("{}/v1/completions", target.url);
    let headers = [("x-data-parallel-rank", "9999")];
    let answer = target.send(Method::POST, &url, &headers, &json!({"prompt": "x", "max_tokens": 1})).await?;
    equal("the status", answer.status, 400)?;
    ensure(answer.text().contains("data_parallel_rank 9999 is out of range"), || answer.text())?;
    Ok(Outcome::Passed)
}

async fn request_ids(target: Arc<Target>) -> Result<Outcome, String> {
    for (path, prefix) in [("/v1/completions", "cmpl-"), ("/v1/chat/completions", "chatcmpl-")] {
        let body = json!({"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
        let headers = [("x-request-id", "suite-7")];
        let answer =
            target.send(Method::POST, &format!("{}{path}", target.url), &headers, &body).await?.json();
        equal(path, answer["id"].as_str(), Some(format!("{prefix}suite-7").as_str()))?;
    }
    Ok(Outcome::Passed)
}

async fn pause(target: Arc<Target>) -> Result<Outcome, String> {
    if target.get("/is_paused").await?.status == 404 {
        return skipped("no dev mode");
    }
    equal("pause", target.post("/pause?mode=keep", &json!({})).await?.status, 200)?;
    let paused = target.get("/is_paused").await?.json();
    equal("resume", target.post("/resume", &json!({})).await?.status, 200)?;
    equal("is_paused", paused, json!({"is_paused": true}))?;
    Ok(Outcome::Passed)
}
