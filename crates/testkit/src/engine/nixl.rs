//! What vLLM 0.32's NIXL connector does with `kv_transfer_params`, as a table of cases.
//!
//! In: the parameters of a request. Out: [`Demand`], what the scheduler does with it, and [`handed_over`], what a
//! prefill leg answers. Nothing here talks to anybody.
//!
//! Evidence: `fixtures/vllm/nixl_pd` (the happy path; a request without `remote_block_ids` that killed the engine was
//! seen, not captured), the rest is read in vLLM 0.32's `nixl/pull_scheduler.py`, `push_scheduler.py`, `pull_worker.py`.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::pool::BlockId;
use super::request::{Sequence, Transfer};
use crate::tokenizer::Token;

/// How KV gets from prefill to decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferMode {
    /// The decode engine reads the prefill engine's blocks (`NixlConnector`).
    Pull,
    /// The prefill engine writes into the decode engine's blocks (`NixlPushConnector`).
    Push,
}

impl TransferMode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
        }
    }
}

/// A rank's connector.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    pub(crate) mode: TransferMode,
    pub(crate) engine_id: String,
    pub(crate) host: String,
    /// The rank's own side channel.
    pub(crate) port: u16,
    pub(crate) lease: Duration,
    /// `kv_load_failure_policy`: compute what did not arrive, instead of failing the request.
    pub(crate) recompute: bool,
}

/// Where KV is read.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) engine_id: String,
    /// The prefill engine's id of the request.
    pub(crate) request: String,
    /// All its blocks of the request; the end of the list is read.
    pub(crate) blocks: Vec<BlockId>,
    /// Blocks that are lacking here.
    pub(crate) lacking: usize,
}

/// KV that came.
#[derive(Clone, Debug)]
pub(crate) enum Arrived {
    /// Whole blocks of the source's size.
    Blocks(Vec<Vec<u64>>),
    /// SGLang: an entry for each position of the prompt, and the token that the prefill server drew after it.
    Prompt { entries: Vec<u64>, first: Token },
    /// SGLang, on a prefill server: the partner is there, the prompt can be computed.
    Partner,
}

/// What a request's parameters make the scheduler do.
#[derive(Clone, Debug)]
pub(crate) enum Demand {
    /// Compute here.
    Nothing,
    /// Wait for this.
    Fetch(Source),
    /// Wait for something that never comes: fields are missing, nobody notices.
    Strand,
    /// An assertion fails, or a key is missing where nobody expects it: the engine core dies.
    Die,
}

/// Decides what `params` mean for a request that has `lacking` blocks to fill.
pub(crate) fn demand(
    mode: TransferMode,
    request: &str,
    params: &Map<String, Value>,
    lacking: usize,
) -> Demand {
    if !truthy(params.get("do_remote_prefill")) {
        return Demand::Nothing;
    }
    let text = |name: &str| params.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let source = |blocks: Vec<BlockId>, request: String| Source {
        host: text("remote_host"),
        port: port(params.get("remote_port")),
        engine_id: text("remote_engine_id"),
        request,
        blocks,
        lacking,
    };
    match mode {
        TransferMode::Pull => {
            if !truthy(params.get("remote_block_ids")) {
                return Demand::Die; // assert num_external_tokens == 0
            }
            if !PULL_KEYS.iter().all(|key| params.contains_key(*key)) {
                return Demand::Strand; // "This request will not utilize KVTransfer", yet it waits for it
            }
            match block_groups(params.get("remote_block_ids")) {
                Some(groups) if groups.len() == 1 => {
                    Demand::Fetch(source(groups.into_iter().flatten().collect(), text("remote_request_id")))
                }
                _ => Demand::Die, // assert: as many groups as there are KV cache groups
            }
        }
        TransferMode::Push => {
            if PUSH_KEYS.iter().all(|key| params.contains_key(*key)) {
                Demand::Fetch(source(Vec::new(), external_id(request).to_owned()))
            } else {
                Demand::Die // KeyError in the scheduler
            }
        }
    }
}

const PULL_KEYS: [&str; 4] = ["remote_engine_id", "remote_request_id", "remote_host", "remote_port"];
const PUSH_KEYS: [&str; 4] = ["remote_engine_id", "remote_host", "remote_port", "tp_size"];

/// Whether a prefill leg's blocks are kept and its answer carries parameters.
pub(crate) fn hands_over(transfer: &Transfer) -> bool {
    matches!(transfer, Transfer::Params(params) if truthy(params.get("do_remote_decode")))
}

/// The `kv_transfer_params` of a prefill leg's answer, field by field as captured.
pub(crate) fn handed_over(connector: &Connector, sequence: &Sequence) -> Value {
    let mut params = json!({
        "do_remote_prefill": true,
        "do_remote_decode": false,
        "remote_block_ids": [sequence.table],
        "remote_engine_id": connector.engine_id,
        "remote_request_id": sequence.work.id,
        "remote_host": connector.host,
        "remote_port": connector.port,
        "tp_size": 1,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": sequence.computed,
        "transfer_mode": connector.mode.name(),
        "remote_prefill_cached_tokens": sequence.hit + sequence.external,
    });
    if connector.mode == TransferMode::Pull {
        params["remote_blocks_expiry_time"] = Value::Null;
    }
    params
}

/// What the decode engine reports as cached: the prefill engine's count, if it is there.
pub(crate) fn reported_cached(transfer: &Transfer) -> Option<usize> {
    let Transfer::Params(params) = transfer else { return None };
    if !truthy(params.get("do_remote_prefill")) {
        return None;
    }
    params.get("remote_prefill_cached_tokens").and_then(Value::as_u64).map(|tokens| tokens as usize)
}

/// Whom to tell that a reader lives: needs all of the fields, `tp_size` too.
pub(crate) fn heartbeat_target(transfer: &Transfer) -> Option<(String, u16, String)> {
    let Transfer::Params(params) = transfer else { return None };
    let complete = truthy(params.get("do_remote_prefill"))
        && PULL_KEYS
            .iter()
            .chain(&["tp_size"])
            .all(|key| params.get(*key).is_some_and(|value| !value.is_null()));
    let text = |name: &str| params.get(name).and_then(Value::as_str).map(str::to_owned);
    complete.then_some(())?;
    Some((text("remote_host")?, port(params.get("remote_port")), text("remote_request_id")?))
}

/// The part of an internal request id that the client knows: without the random end.
pub(crate) fn external_id(internal: &str) -> &str {
    internal.rsplit_once('-').map_or(internal, |(external, _)| external)
}

/// What Python calls true.
pub(crate) fn truthy(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Bool(value)) => *value,
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(fields)) => !fields.is_empty(),
    }
}

/// A port, or 0, to which nobody listens.
fn port(value: Option<&Value>) -> u16 {
    match value {
        Some(Value::Number(number)) => number.as_u64().and_then(|port| port.try_into().ok()).unwrap_or(0),
        Some(Value::String(text)) => text.parse().unwrap_or(0),
        _ => 0,
    }
}

fn block_groups(value: Option<&Value>) -> Option<Vec<Vec<BlockId>>> {
    serde_json::from_value(value?.clone()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(value: Value) -> Map<String, Value> {
        value.as_object().expect("an object").clone()
    }

    fn complete() -> Value {
        let answer: Value =
            serde_json::from_str(include_str!("../../fixtures/vllm/nixl_pd/2_prefill_response.json"))
                .unwrap();
        answer["kv_transfer_params"].clone()
    }

    #[test]
    fn parameters_decide_what_the_scheduler_does() {
        let without = |key: &str| {
            let mut fields = params(complete());
            fields.remove(key);
            Value::Object(fields)
        };
        let with = |key: &str, value: Value| {
            let mut fields = params(complete());
            fields.insert(key.into(), value);
            Value::Object(fields)
        };
        let check = |mode, fields: Value, expected: &str| {
            let demand = format!("{:?}", demand(mode, "chatcmpl-1-abc", &params(fields.clone()), 7));
            assert!(demand.starts_with(expected), "{fields} gave {demand}");
        };
        use TransferMode::{Pull, Push};
        check(Pull, complete(), "Fetch");
        check(Pull, json!({"do_remote_decode": true, "do_remote_prefill": false}), "Nothing");
        check(Pull, json!({"do_remote_prefill": true}), "Die");
        check(Pull, with("remote_block_ids", json!([])), "Die");
        check(Pull, with("remote_block_ids", json!([1, 2])), "Die");
        check(Pull, with("remote_block_ids", json!([[1], [2]])), "Die");
        check(Pull, without("remote_port"), "Strand");
        check(Pull, without("remote_engine_id"), "Strand");
        check(Push, without("remote_block_ids"), "Fetch");
        check(Push, without("tp_size"), "Die");
    }

    #[test]
    fn a_prefill_answer_has_the_captured_fields() {
        let connector = Connector {
            mode: TransferMode::Pull,
            engine_id: "1b2d35c8".into(),
            host: "127.0.0.1".into(),
            port: 5600,
            lease: Duration::from_secs(30),
            recompute: false,
        };
        let work = super::super::request::Work {
            id: "chatcmpl-pd-1-97bdd49b".into(),
            prompt: vec![1],
            identity: super::super::pool::Identity::default(),
            sampling: super::super::request::Sampling {
                max_tokens: 1,
                min_tokens: 0,
                ignore_eos: false,
                stop_token_ids: Vec::new(),
                generator: None,
            },
            priority: 0,
            transfer: Transfer::None,
        };
        let outlet = super::super::request::Outlet::new(std::sync::Arc::default());
        let sequence = Sequence::new(work, outlet, crate::kv::Model::new(1, 0), 1);
        let ours = handed_over(&connector, &sequence);
        let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&complete()));
    }
}
