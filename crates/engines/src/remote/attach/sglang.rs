//! What an SGLang server is asked. Written from its sources; never run against a real one.

use forebay_engine_wire::discovery::{
    KvSource, Server,
    sglang::{self, Disaggregation, FAKE_BOOTSTRAP_HOST, FoundSglang},
};
use forebay_types::Role;
use serde_json::{Value, json};

use super::{
    AttachError, AttachSpec, First, Found, choose_model, events,
    probe::{Probe, reason, status},
    tokens::{self, token_ids},
};
use crate::remote::{Abort, HandOver, RankPin, TokenRoute, client::HttpError, findings::Findings};

pub(super) async fn find_out(
    probe: &Probe<'_>,
    spec: &AttachSpec,
    first: First,
    findings: &mut Findings,
) -> Result<Found, AttachError> {
    let (mut found, info) = read(probe, spec, &first, findings).await?;
    speak(&mut found, probe, spec, &info, findings).await?;
    Ok(found)
}

/// What its documents say; nothing is computed for it.
pub(super) async fn read(
    probe: &Probe<'_>,
    spec: &AttachSpec,
    first: &First,
    findings: &mut Findings,
) -> Result<(Found, FoundSglang), AttachError> {
    findings.info("support for SGLang is written from its sources and was never run against a real server");
    let info = server_info(probe).await?;
    let model = choose_model(first.models.as_ref(), spec, findings)?;
    let mut found = Found::plain(Server::Sglang, model);
    configuration(&mut found, &info);
    roles(&mut found, &info, spec, probe.endpoint.host(), findings);
    found.loads = probe.document("/v1/loads?include=core").await.is_ok();
    found.metrics = first.metrics.is_some();
    found.started_seconds = first.metrics.as_ref().and_then(|metrics| metrics.started_seconds);
    // `/health` computes a token and takes a second.
    found.health = "/model_info";
    if !found.loads && !found.metrics {
        findings.warn("its load is not known", "start it with --enable-metrics");
    }
    let sources = spec.overrides.kv_events.clone().or_else(|| info.kv_events.clone());
    (found.sight, found.events) = match sources.map(|source| ranks(&source, found.dp_ranks)) {
        Some(sources) => events::sight(&sources, Server::Sglang, probe.endpoint.host(), findings).await,
        None => events::off(found.dp_ranks, findings),
    };
    Ok((found, info))
}

async fn server_info(probe: &Probe<'_>) -> Result<FoundSglang, AttachError> {
    // The older name is gone in newer versions, the newer one missing in older ones.
    let document = match probe.slow_document("/server_info").await {
        Err(HttpError::Status { status: 404, .. }) => probe.slow_document("/get_server_info").await,
        answer => answer,
    };
    match document {
        Ok(document) => sglang::server_info(&document)
            .map_err(|error| AttachError::NoEngine(format!("/server_info answers {error}").into())),
        Err(error @ HttpError::Status { status: 401 | 403, .. }) => Err(AttachError::Key(error)),
        Err(error @ HttpError::Status { status: 503, .. }) => Err(AttachError::NotReady(error)),
        Err(error) => Err(AttachError::NoEngine(reason(&error).into())),
    }
}

/// The sources of all ranks; those whose ports do not exist are left out.
fn ranks(first: &KvSource, dp_ranks: u16) -> Vec<KvSource> {
    (0..dp_ranks).map_while(|rank| first.of_rank(rank).ok()).collect()
}

fn configuration(found: &mut Found, info: &FoundSglang) {
    found.version.clone_from(&info.version);
    found.model.root = found.model.root.take().or_else(|| info.model_path.clone());
    found.dtype.clone_from(&info.dtype);
    found.cache_dtype.clone_from(&info.cache_dtype);
    found.connector.clone_from(&info.transfer_backend);
    found.block_size_tokens = info.page_size_tokens;
    // The pool is told in tokens.
    let page = u64::from(info.page_size_tokens.unwrap_or(1).max(1));
    found.blocks_total = info.pool_tokens.and_then(|tokens| u32::try_from(tokens / page).ok());
    found.step_tokens_max = info.chunk_tokens;
    found.context_tokens_max = info.context_tokens_max.or(found.context_tokens_max);
    found.dp_ranks = info.dp_ranks;
    found.ranks = if info.dp_ranks > 1 { RankPin::Field } else { RankPin::None };
    found.abort = Abort::SglangAbortRequest;
}

fn roles(found: &mut Found, info: &FoundSglang, spec: &AttachSpec, host: &str, findings: &mut Findings) {
    let (role, can_export, can_import) = match info.disaggregation {
        Disaggregation::Off => (Role::Both, false, false),
        Disaggregation::Prefill => (Role::Prefill, true, false),
        Disaggregation::Decode => (Role::Decode, false, true),
    };
    (found.role, found.can_export, found.can_import) = (role, can_export, can_import);
    match info.disaggregation {
        Disaggregation::Off => {
            if spec.role.is_some_and(|role| role != Role::Both) {
                findings.warn(
                    "it exchanges no KV, so its role only keeps requests away from it",
                    "start it with --disaggregation-mode prefill or decode",
                );
            }
        }
        Disaggregation::Prefill | Disaggregation::Decode => {
            // Both refuse what the other does: a role that says otherwise would only make requests fail.
            if spec.role.is_some_and(|wanted| wanted != role) {
                findings.warn(
                    format!("its role is not what it was started for, {role:?}: requests will fail"),
                    "leave the role out, so that it is found out",
                );
            }
        }
    }
    found.hand_over = match info.disaggregation {
        Disaggregation::Off => HandOver::None,
        // A decode server has no bootstrap server of its own; it is told those of its partners.
        Disaggregation::Prefill | Disaggregation::Decode => {
            HandOver::Bootstrap { host: host.into(), port: info.bootstrap_port }
        }
    };
}

async fn speak(
    found: &mut Found,
    probe: &Probe<'_>,
    spec: &AttachSpec,
    info: &FoundSglang,
    findings: &mut Findings,
) -> Result<(), AttachError> {
    if !info.prefix_caching {
        findings.warn("its prefix cache is off", "start it without --disable-radix-cache");
    }
    let mut question = json!({
        "input_ids": tokens::sample(spec.tokenizer.as_deref()),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "cache_salt": tokens::PROBE_SALT,
    });
    with_partner(&mut question, info.disaggregation);
    match probe.ask("/generate", &question).await {
        Ok(answer)
            if token_ids(answer.get("output_ids")).is_some()
                || info.disaggregation == Disaggregation::Prefill =>
        {
            found.tokens = Some(TokenRoute::SglangGenerate);
            found.salts_cache = true;
        }
        Ok(_) => findings.regret("it takes token ids, but answers none: it is given text"),
        Err(error) if matches!(status(&error), Some(401 | 403)) => return Err(AttachError::Key(error)),
        Err(error) => findings.regret(format!("it does not take token ids: {}", reason(&error))),
    }
    if found.tokens.is_some() {
        found.tokens_agree = tokens::agree(probe, found, spec, findings).await;
    }
    if found.tokens_agree && info.disaggregation == Disaggregation::Off {
        found.tokens_agree = tokens::chat_lengths_agree(probe, found, spec, findings).await;
    }
    Ok(())
}

/// A prefill or decode server takes a request only with a partner; this one stands for none.
fn with_partner(question: &mut Value, disaggregation: Disaggregation) {
    if disaggregation != Disaggregation::Off {
        question["bootstrap_host"] = json!(FAKE_BOOTSTRAP_HOST);
        question["bootstrap_room"] = json!(0);
    }
}
