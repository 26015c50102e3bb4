//! Gives a parsed request to the engine: ids, ranks, seeds.
//!
//! Evidence: ids in `fixtures/vllm/nixl_pd` (`X-Request-Id: pd-1` is `chatcmpl-pd-1` in the answer and
//! `chatcmpl-pd-1-97bdd49b` in the engine); headers from vLLM 0.32's `generate/base/serving.py`.

use std::sync::Arc;

use axum::http::HeaderMap;

use super::ask::Kind;
use crate::api::error::ApiError;
use crate::api::generation::{Generation, Wanted};
use crate::api::{Ask, header};
use crate::engine::pool::Identity;
use crate::engine::request::Work;
use crate::kv::mix;
use crate::tokenizer;
use crate::vllm::Vllm;

/// Checks what only the engine checks and submits all choices.
///
/// # Errors
/// The engine's refusals: they arrive inside of a stream, under status 200, if one was asked for.
pub(super) fn start(
    vllm: &Arc<Vllm>,
    kind: Kind,
    ask: Ask,
    headers: &HeaderMap,
) -> Result<Generation, ApiError> {
    let Some(life) = vllm.body.life().filter(|life| !life.dead()) else {
        return Err(ApiError::engine_dead());
    };
    let rank = header(headers, "x-data-parallel-rank").and_then(|rank| rank.trim().parse::<i64>().ok());
    let ranks = life.ranks.len() as i64;
    if let Some(rank) = rank.filter(|rank| !(0..ranks).contains(rank)) {
        return Err(ApiError::invalid(format!("data_parallel_rank {rank} is out of range [0, {ranks}).")));
    }
    let id = answer_id(vllm, kind, &ask, header(headers, "x-request-id"));
    let session = ask.session.clone().or_else(|| header(headers, "x-session-id").map(str::to_owned));
    let priority =
        header(headers, "x-vllm-priority").and_then(|value| value.parse().ok()).unwrap_or(ask.priority);
    let mut wanted = Vec::new();
    for (number, prompt) in ask.prompts.iter().enumerate() {
        for _ in 0..ask.choices {
            let mut sampling = ask.sampling.clone();
            sampling.generator = sampling.generator.map(|seed| match ask.unseeded {
                true => vllm.body.unique(),
                false => mix(seed, wanted.len() as u64), // vLLM seeds choice i with seed + i
            });
            let end = format!("{:08x}", vllm.body.unique() as u32);
            let id = match kind {
                Kind::Completion => format!("{id}-{number}-{end}"),
                Kind::Chat | Kind::Tokens => format!("{id}-{end}"),
            };
            let identity =
                Identity { salt: ask.salt.clone(), adapter: ask.adapter.clone(), session: session.clone() };
            let transfer = ask.transfer.clone();
            let work = Work { id, prompt: prompt.clone(), identity, sampling, priority, transfer };
            wanted.push(Wanted { work, text: ask.text.clone(), rank: rank.map(|rank| rank as usize) });
        }
    }
    let poisoned = vllm.options.poison.as_ref().is_some_and(|poison| {
        ask.prompts.iter().any(|prompt| tokenizer::decode(prompt, false).contains(poison))
    });
    let generation = Generation::start(&life, ask, id, wanted);
    if poisoned {
        vllm.died();
    }
    Ok(generation)
}

/// `cmpl-`, `chatcmpl-` or `generate-tokens-` before the client's id, or before a random one.
fn answer_id(vllm: &Vllm, kind: Kind, ask: &Ask, header: Option<&str>) -> String {
    let prefix = match kind {
        Kind::Completion => "cmpl",
        Kind::Chat => "chatcmpl",
        Kind::Tokens => "generate-tokens",
    };
    let given = header.map(str::to_owned).or_else(|| ask.request_id.clone());
    format!("{prefix}-{}", given.unwrap_or_else(|| format!("{:016x}", vllm.body.unique())))
}
