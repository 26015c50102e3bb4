//! Checks of generating: tokens in and out, streams, stopping, aborting, continuing.

use std::sync::Arc;

use http::Method;
use serde_json::{Value, json};

use super::{Check, Outcome, Target, ensure, equal, events, skipped, token_ids};

/// Tokens that a continued answer must agree on with the uncontinued one. Real arithmetic differs a little between a
/// prompt computed at once and token by token, so that greedy answers part after a while.
const AGREED: usize = 4;

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check::new("text and its token ids give the same answer", prompts),
        Check::new("a stream's tokens and text are the whole answer's", streams),
        Check::new("a chat's stream begins with the role and adds up", chats),
        Check::new("a stop string ends the answer before it", stops),
        Check::new("prompt and generated ids continue the answer", continues),
        Check::new("a repeated prompt is cached and counted", caches),
        Check::new("another salt shares nothing", salts),
        Check::new("a client that leaves aborts its request", leaves),
        Check::new("tokens in, tokens out gives the same tokens, or is forbidden", tokens_only),
    ]
}

async fn prompts(target: Arc<Target>) -> Result<Outcome, String> {
    let text = target.fresh_text(20);
    let by_text = target.complete(&target.url, json!(text), json!({})).await?;
    let ids = by_text["choices"][0]["prompt_token_ids"].clone();
    let by_ids = target.complete(&target.url, ids.clone(), json!({})).await?;
    equal("the tokens", token_ids(&by_text)?, token_ids(&by_ids)?)?;
    equal("the text", &by_text["choices"][0]["text"], &by_ids["choices"][0]["text"])?;
    equal(
        "prompt_tokens",
        by_text["usage"]["prompt_tokens"].as_u64(),
        ids.as_array().map(|ids| ids.len() as u64),
    )?;
    Ok(Outcome::Passed)
}

async fn streams(target: Arc<Target>) -> Result<Outcome, String> {
    let text = target.fresh_text(10);
    let extra = json!({"max_tokens": 12, "ignore_eos": true});
    let whole = target.complete(&target.url, json!(text), extra.clone()).await?;
    let body = json!({
        "prompt": text, "temperature": 0, "return_token_ids": true, "max_tokens": 12, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let answer = target.post("/v1/completions", &body).await?;
    let list = events(&answer)?;
    let (usage, chunks) = list.split_last().ok_or("no events")?;
    equal("the usage chunk's choices", &usage["choices"], &json!([]))?;
    equal("completion_tokens", usage["usage"]["completion_tokens"].as_u64(), Some(12))?;
    let mut tokens: Vec<u32> = Vec::new();
    let mut streamed = String::new();
    for (index, chunk) in chunks.iter().enumerate() {
        let choice = &chunk["choices"][0];
        for field in
            ["index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"]
        {
            ensure(choice.get(field).is_some(), || format!("no {field} in {chunk}"))?;
        }
        equal("prompt ids come first and once", choice["prompt_token_ids"].is_array(), index == 0)?;
        equal("the last chunk has a reason", choice["finish_reason"].is_string(), index + 1 == chunks.len())?;
        tokens.extend(
            serde_json::from_value::<Vec<u32>>(choice["token_ids"].clone()).map_err(|_| chunk.to_string())?,
        );
        streamed += choice["text"].as_str().unwrap_or_default();
    }
    equal("the tokens", tokens, token_ids(&whole)?)?;
    equal("the text", Some(streamed.as_str()), whole["choices"][0]["text"].as_str())?;
    Ok(Outcome::Passed)
}

async fn chats(target: Arc<Target>) -> Result<Outcome, String> {
    let mut body = json!({
        "messages": [{"role": "user", "content": target.fresh_text(6)}], "temperature": 0, "max_tokens": 8,
        "return_token_ids": true,
    });
    let whole = target.post("/v1/chat/completions", &body).await?.json();
    body["stream"] = json!(true);
    let list = events(&target.post("/v1/chat/completions", &body).await?)?;
    let delta = |chunk: &Value, field: &str| {
        chunk["choices"][0]["delta"][field].as_str().unwrap_or_default().to_owned()
    };
    let first = list.first().ok_or("no events")?;
    equal("the role", delta(first, "role").as_str(), "assistant")?;
    ensure(first["prompt_token_ids"].is_array(), || format!("no prompt ids in {first}"))?;
    let text: String = list.iter().map(|chunk| delta(chunk, "content")).collect();
    equal("the text", Some(text.as_str()), whole["choices"][0]["message"]["content"].as_str())?;
    equal("transfer parameters", &whole["kv_transfer_params"], &Value::Null)?;
    Ok(Outcome::Passed)
}

async fn stops(target: Arc<Target>) -> Result<Outcome, String> {
    let text = target.fresh_text(10);
    let whole =
        target.complete(&target.url, json!(text), json!({"max_tokens": 16, "ignore_eos": true})).await?;
    let full = whole["choices"][0]["text"].as_str().ok_or("no text")?.to_owned();
    let Some(stop) = full.chars().filter(|c| c.is_alphanumeric()).nth(4) else {
        return skipped("the model wrote no letter to stop at");
    };
    let extra = json!({"max_tokens": 16, "ignore_eos": true, "stop": stop.to_string()});
    let stopped = target.complete(&target.url, json!(text), extra).await?;
    let choice = &stopped["choices"][0];
    equal("the reason", choice["finish_reason"].as_str(), Some("stop"))?;
    equal("what stopped it", choice["stop_reason"].as_str(), Some(stop.to_string().as_str()))?;
    equal("the text", choice["text"].as_str(), full.split(stop).next())?;
    Ok(Outcome::Passed)
}

async fn continues(target: Arc<Target>) -> Result<Outcome, String> {
    let text = target.fresh_text(16);
    let extra = json!({"max_tokens": AGREED * 2, "ignore_eos": true});
    let whole = target.complete(&target.url, json!(text), extra).await?;
    let tokens = token_ids(&whole)?;
    let mut prompt: Vec<u32> = serde_json::from_value(whole["choices"][0]["prompt_token_ids"].clone())
        .map_err(|_| format!("no prompt ids in {whole}"))?;
    prompt.extend(&tokens[..AGREED]);
    let rest = json!({"max_tokens": AGREED, "ignore_eos": true});
    let continued = target.complete(&target.url, json!(prompt), rest).await?;
    equal("the rest", token_ids(&continued)?, tokens[AGREED..].to_vec())?;
    Ok(Outcome::Passed)
}

async fn caches(target: Arc<Target>) -> Result<Outcome, String> {
    let text = target.fresh_text(120);
    let hits = |target: Arc<Target>| async move {
        target.metric(&target.url, "vllm:prefix_cache_hits_total", "engine=").await
    };
    target.complete(&target.url, json!(text), json!({"max_tokens": 1})).await?;
    let before = hits(target.clone()).await?;
    let again = target.complete(&target.url, json!(text), json!({"max_tokens": 1})).await?;
    let url = target.url.clone();
    target
        .wait("cache hits in the metrics", || {
            let (target, url) = (target.clone(), url.clone());
            async move { Ok(target.metric(&url, "vllm:prefix_cache_hits_total", "engine=").await? > before) }
        })
        .await?;
    match again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() {
        Some(0) => Err(format!("cached_tokens is 0 in {}", again["usage"])),
        _ => Ok(Outcome::Passed),
    }
}

async fn salts(target: Arc<Target>) -> Result<Outcome, String> {
    let text = target.fresh_text(120);
    let salted = |salt: &str| json!({"max_tokens": 1, "cache_salt": salt});
    target.complete(&target.url, json!(text), salted("one")).await?;
    let other = target.complete(&target.url, json!(text), salted("two")).await?;
    match other["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() {
        None => skipped("no --enable-prompt-tokens-details"),
        Some(cached) => equal("cached_tokens", cached, 0).map(|()| Outcome::Passed),
    }
}

async fn leaves(target: Arc<Target>) -> Result<Outcome, String> {
    let running = |target: Arc<Target>| async move {
        let url = target.url.clone();
        Ok::<_, String>(target.metric(&url, "vllm:num_requests_running", "engine=").await? > 0.0)
    };
    let body = json!({"prompt": "Once upon a time", "max_tokens": 1000, "stream": true, "ignore_eos": true});
    let mut open = target.open("/v1/completions", &body).await?;
    equal("the status", open.status, 200)?;
    open.next().await.map_err(|error| error.to_string())?;
    target.wait("the request to run", || running(target.clone())).await?;
    drop(open);
    target
        .wait("the request to be dropped", || {
            let running = running(target.clone());
            async move { Ok(!running.await?) }
        })
        .await?;
    Ok(Outcome::Passed)
}

async fn tokens_only(target: Arc<Target>) -> Result<Outcome, String> {
    let prompt =
        target.post("/tokenize", &json!({"prompt": target.fresh_text(12)})).await?.json()["tokens"].clone();
    let body = json!({"token_ids": prompt, "sampling_params": {"max_tokens": 6, "temperature": 0.0, "ignore_eos": true}});
    let url = format!("{}/inference/v1/generate", target.url);
    let answer = target.send(Method::POST, &url, &[], &body).await?;
    let error = answer.json()["error"].clone();
    if answer.status == 403 {
        equal("the error", error["type"].as_str(), Some("PermissionDeniedError"))?;
        return skipped("no --enable-scale-out");
    }
    equal("the status", answer.status, 200)?;
    let completed =
        target.complete(&target.url, prompt, json!({"max_tokens": 6, "ignore_eos": true})).await?;
    equal("the tokens", token_ids(&answer.json())?, token_ids(&completed)?)?;
    Ok(Outcome::Passed)
}
