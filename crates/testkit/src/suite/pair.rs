//! Checks of a prefill and a decode server: the hand-over, its proof, and what goes wrong harmlessly.
//!
//! What kills a real engine (parameters without block ids) is not tried here.

use std::sync::Arc;

use http::Method;
use serde_json::{Value, json};

use super::{Check, Outcome, Target, ensure, equal, skipped, token_ids};

/// Tokens of an answer.
const COUNT: usize = 12;

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check::new("a prefill leg answers with complete parameters", hands_over),
        Check::new("a pair gives the tokens of one engine, and counters prove it", pairs),
        Check::new("an unreachable side channel fails or is recomputed, and the engine lives", unreachable),
        Check::new("producers and consumers serve plain requests", plain),
    ]
}

fn body(text: &str, max_tokens: usize, params: &Value) -> Value {
    json!({
        "prompt": text, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "return_token_ids": true,
        "kv_transfer_params": params,
    })
}

async fn prefill(target: &Target, text: &str) -> Result<Value, String> {
    let params = json!({"do_remote_decode": true, "do_remote_prefill": false});
    let url = format!("{}/v1/completions", target.url);
    let headers = [("x-request-id", "suite-pair")];
    let answer = target.send(Method::POST, &url, &headers, &body(text, 1, &params)).await?;
    equal("the prefill leg's status", answer.status, 200)?;
    Ok(answer.json())
}

async fn hands_over(target: Arc<Target>) -> Result<Outcome, String> {
    let Some(decode) = target.decode_url.clone() else { return skipped("no decode server") };
    let text = target.fresh_text(60);
    let answer = prefill(&target, &text).await?;
    let params = &answer["kv_transfer_params"];
    let fields = [
        "do_remote_prefill",
        "do_remote_decode",
        "remote_block_ids",
        "remote_engine_id",
        "remote_request_id",
        "remote_host",
        "remote_port",
        "tp_size",
        "remote_num_tokens",
        "transfer_mode",
    ];
    for field in fields {
        ensure(params.get(field).is_some_and(|value| !value.is_null()), || {
            format!("no {field} in {params}")
        })?;
    }
    equal("do_remote_prefill", &params["do_remote_prefill"], &json!(true))?;
    equal("remote_num_tokens", &params["remote_num_tokens"], &answer["usage"]["prompt_tokens"])?;
    let blocks = params["remote_block_ids"][0].as_array().map_or(0, Vec::len);
    ensure(blocks > 0, || format!("no blocks in {params}"))?;
    collect(&target, &decode, &text, params).await?;
    Ok(Outcome::Passed)
}

async fn pairs(target: Arc<Target>) -> Result<Outcome, String> {
    let Some(decode) = target.decode_url.clone() else { return skipped("no decode server") };
    let text = target.fresh_text(60);
    let source = "vllm:prompt_tokens_by_source_total";
    let before = target.metric(&decode, source, "external_kv_transfer").await?;
    let first = prefill(&target, &text).await?;
    let url = format!("{decode}/v1/completions");
    let headers = [("x-request-id", "suite-pair")];
    let body = body(&text, COUNT, &first["kv_transfer_params"]);
    let answer = target.send(Method::POST, &url, &headers, &body).await?;
    equal("the decode leg's status", answer.status, 200)?;
    let tokens = token_ids(&answer.json())?;
    let alone =
        target.complete(&target.url, json!(text), json!({"max_tokens": COUNT, "ignore_eos": true})).await?;
    equal("the tokens", &tokens, &token_ids(&alone)?)?;
    equal("the first token", tokens.first(), token_ids(&first)?.first())?;
    let prompt = first["usage"]["prompt_tokens"].as_f64().unwrap_or(0.0);
    target
        .wait("the hand-over in the decode server's metrics", || {
            let (target, decode) = (target.clone(), decode.clone());
            async move { Ok(target.metric(&decode, source, "external_kv_transfer").await? >= before + prompt) }
        })
        .await?;
    let url = target.url.clone();
    target
        .wait("the prefill server to free its blocks", || {
            let (target, url) = (target.clone(), url.clone());
            async move { Ok(target.metric(&url, "vllm:kv_cache_usage_perc", "engine=").await? < 1e-6) }
        })
        .await?;
    Ok(Outcome::Passed)
}

async fn unreachable(target: Arc<Target>) -> Result<Outcome, String> {
    let Some(decode) = target.decode_url.clone() else { return skipped("no decode server") };
    let text = target.fresh_text(60);
    let first = prefill(&target, &text).await?;
    let mut params = first["kv_transfer_params"].clone();
    params["remote_port"] = json!(1);
    params["remote_engine_id"] = json!("an engine that nobody has met");
    let url = format!("{decode}/v1/completions");
    let answer = target.send(Method::POST, &url, &[], &body(&text, COUNT, &params)).await?;
    match answer.status {
        500 => equal("the error", answer.json()["error"]["message"].as_str(), Some("Internal server error"))?,
        200 => {
            let extra = json!({"max_tokens": COUNT, "ignore_eos": true});
            let alone = target.complete(&target.url, json!(text), extra).await?;
            equal("the tokens", token_ids(&answer.json())?, token_ids(&alone)?)?;
        }
        status => return Err(format!("status {status}: {}", answer.text())),
    }
    let health = target.send(Method::GET, &format!("{decode}/health"), &[], &Value::Null).await?;
    equal("/health", health.status, 200)?;
    collect(&target, &decode, &text, &first["kv_transfer_params"]).await?;
    Ok(Outcome::Passed)
}

/// The prefill server holds a request's blocks until a proper decode leg has fetched them.
async fn collect(target: &Target, decode: &str, text: &str, params: &Value) -> Result<(), String> {
    let url = format!("{decode}/v1/completions");
    let collected = target.send(Method::POST, &url, &[], &body(text, 1, params)).await?;
    equal("the collecting leg's status", collected.status, 200)
}

async fn plain(target: Arc<Target>) -> Result<Outcome, String> {
    let Some(decode) = target.decode_url.clone() else { return skipped("no decode server") };
    let text = target.fresh_text(20);
    let extra = json!({"max_tokens": 4, "ignore_eos": true});
    let one = target.complete(&target.url, json!(text), extra.clone()).await?;
    let other = target.complete(&decode, json!(text), extra).await?;
    equal("the tokens", token_ids(&one)?, token_ids(&other)?)?;
    equal("a plain answer's parameters", &one["kv_transfer_params"], &Value::Null)?;
    Ok(Outcome::Passed)
}
