//! What servers with OpenAI's routes and little else are asked: TensorRT-LLM's `trtllm-serve`, llama.cpp's server, any
//! other. They are given text and answer in their own words.

use forebay_engine_wire::discovery::{Server, llama_cpp};
use serde_json::json;

use super::{
    AttachError, AttachSpec, First, Found, choose_model,
    probe::{Probe, reason, status},
};
use crate::{driver::CacheSight, remote::findings::Findings};

pub(super) async fn find_out(
    probe: &Probe<'_>,
    spec: &AttachSpec,
    server: Server,
    first: First,
    findings: &mut Findings,
) -> Result<Found, AttachError> {
    let model = choose_model(first.models.as_ref(), spec, findings)?;
    let mut found = Found::plain(server, model);
    found.version = first.version;
    found.health = match server {
        Server::Trtllm | Server::LlamaCpp => "/health",
        _ => "/v1/models",
    };
    if server == Server::LlamaCpp
        && let Ok(props) = probe.document("/props").await
        && let Ok(props) = llama_cpp::props(&props)
    {
        found.version = props.build;
        found.context_tokens_max = props.context_tokens_max.or(found.context_tokens_max);
    }
    if found.context_tokens_max.is_none() && spec.overrides.context_tokens_max.is_none() {
        findings.info("it does not say how long a sequence may be; it refuses longer ones itself");
    }
    let why = match server {
        Server::Trtllm => "TensorRT-LLM's KV events are not read",
        Server::LlamaCpp => "llama.cpp publishes no KV events",
        _ => "it publishes no KV events",
    };
    found.sight = CacheSight::Approximate { why: why.into() };
    let question = json!({
        "model": found.model.id,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1,
    });
    if let Err(error) = probe.ask("/v1/chat/completions", &question).await {
        match status(&error) {
            Some(401 | 403) => return Err(AttachError::Key(error)),
            _ => findings.regret(format!("it did not answer a short chat: {}", reason(&error))),
        }
    }
    Ok(found)
}
