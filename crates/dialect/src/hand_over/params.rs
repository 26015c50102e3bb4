//! `kv_transfer_params`: what an orchestrator sends and what a prefill leg answers.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::errors::ApiError;

/// Longest host name.
const HOST_BYTES_MAX: usize = 255;
/// Longest engine or request id.
const ID_BYTES_MAX: usize = 512;

/// What a request's `kv_transfer_params` ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// Nothing: both phases here.
    None,
    /// `do_remote_decode`: compute the prompt and hold its KV for another engine.
    Hold,
    /// `do_remote_prefill`: fetch the prompt's KV from there.
    Pull(Box<PullFrom>),
}

/// Where a decode leg finds its KV.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PullFrom {
    pub(crate) engine_id: String,
    pub(crate) request_id: String,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// What the prefill leg found in its own cache: the answer's `cached_tokens`, as vLLM reports it.
    pub(crate) cached_tokens: u32,
}

/// As it arrives.
#[derive(Debug, Default, Deserialize)]
struct Arrived {
    do_remote_decode: Option<bool>,
    do_remote_prefill: Option<bool>,
    remote_block_ids: Option<Vec<Vec<u32>>>,
    remote_engine_id: Option<String>,
    remote_request_id: Option<String>,
    remote_host: Option<String>,
    remote_port: Option<u16>,
    tp_size: Option<u32>,
    transfer_mode: Option<String>,
    remote_prefill_cached_tokens: Option<u32>,
}

impl Transfer {
    /// Reads and checks the field.
    ///
    /// # Errors
    /// 400 for anything incomplete. (A real vLLM 0.32 *dies* of `do_remote_prefill` without `remote_block_ids`, and
    /// computes the prompt itself where another key is missing.)
    pub(crate) fn parse(given: Option<&RawValue>) -> Result<Self, ApiError> {
        let bad = |message: String| ApiError::field("kv_transfer_params", message);
        let Some(given) = given else { return Ok(Self::None) };
        let arrived: Arrived = serde_json::from_str(given.get())
            .map_err(|error| bad(format!("kv_transfer_params cannot be read: {error}")))?;
        match (arrived.do_remote_decode.unwrap_or(false), arrived.do_remote_prefill.unwrap_or(false)) {
            (false, false) => Ok(Self::None),
            (true, false) => Ok(Self::Hold),
            (true, true) => Err(bad("do_remote_decode and do_remote_prefill exclude each other".to_owned())),
            (false, true) => Ok(Self::Pull(Box::new(arrived.complete().map_err(bad)?))),
        }
    }
}

impl Arrived {
    fn complete(self) -> Result<PullFrom, String> {
        let missing = |key: &str| format!("do_remote_prefill needs {key}");
        if self.remote_block_ids.is_none_or(|groups| groups.iter().all(Vec::is_empty)) {
            return Err(missing("remote_block_ids"));
        }
        if self.tp_size.is_some_and(|size| size != 1) {
            return Err("tp_size is not 1: this engine has one rank".to_owned());
        }
        if let Some(mode) = self.transfer_mode.filter(|mode| mode != "pull") {
            let mode: String = mode.chars().take(ID_BYTES_MAX).collect();
            return Err(format!("transfer_mode is {mode:?}; only pull is known here"));
        }
        let text = |key: &str, value: Option<String>, bytes_max: usize| {
            value.filter(|text| (1..=bytes_max).contains(&text.len())).ok_or_else(|| missing(key))
        };
        Ok(PullFrom {
            engine_id: text("remote_engine_id", self.remote_engine_id, ID_BYTES_MAX)?,
            request_id: text("remote_request_id", self.remote_request_id, ID_BYTES_MAX)?,
            host: text("remote_host", self.remote_host, HOST_BYTES_MAX)?,
            port: self.remote_port.filter(|port| *port != 0).ok_or_else(|| missing("remote_port"))?,
            cached_tokens: self.remote_prefill_cached_tokens.unwrap_or(0),
        })
    }
}

/// What a prefill leg answers, key for key as vLLM 0.32 does.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct HeldParams {
    pub(crate) do_remote_prefill: bool,
    pub(crate) do_remote_decode: bool,
    pub(crate) remote_block_ids: [Vec<u32>; 1],
    pub(crate) remote_engine_id: String,
    pub(crate) remote_request_id: String,
    pub(crate) remote_host: String,
    pub(crate) remote_port: u16,
    pub(crate) tp_size: u32,
    pub(crate) dcp_size: u32,
    pub(crate) pp_size: u32,
    pub(crate) remote_num_tokens: u32,
    pub(crate) remote_blocks_expiry_time: Option<f64>,
    pub(crate) transfer_mode: &'static str,
    pub(crate) remote_prefill_cached_tokens: u32,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(value: &Value) -> Result<Transfer, ApiError> {
        Transfer::parse(Some(&serde_json::value::to_raw_value(value).unwrap()))
    }

    /// The answer that was captured from vLLM 0.32.
    fn captured() -> Value {
        json!({
            "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[1, 2, 3, 4, 5, 6, 7]],
            "remote_engine_id": "1b2d35c8-c225-40d0-be8e-9d997c835e87",
            "remote_request_id": "chatcmpl-pd-1-97bdd49b", "remote_host": "127.0.0.1", "remote_port": 5600,
            "tp_size": 1, "dcp_size": 1, "pp_size": 1, "remote_num_tokens": 194,
            "remote_blocks_expiry_time": null, "transfer_mode": "pull", "remote_prefill_cached_tokens": 192
        })
    }

    #[test]
    fn what_vllm_answers_is_understood() {
        let Ok(Transfer::Pull(from)) = parse(&captured()) else { panic!("complete parameters were refused") };
        assert_eq!((from.host.as_str(), from.port, from.cached_tokens), ("127.0.0.1", 5600, 192));
        assert_eq!(parse(&json!({"do_remote_decode": true, "do_remote_prefill": false})), Ok(Transfer::Hold));
        assert_eq!(parse(&json!({"do_remote_decode": false, "remote_host": null})), Ok(Transfer::None));
    }

    #[test]
    fn a_hand_over_that_lacks_a_key_is_refused_by_its_name() {
        let needed =
            ["remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port"];
        for key in needed {
            for without in [None, Some(Value::Null)] {
                let mut params = captured();
                let object = params.as_object_mut().unwrap();
                object.remove(key);
                object.extend(without.map(|null| (key.to_owned(), null)));
                let refused = parse(&params).unwrap_err();
                assert!(refused.to_json().contains(key), "{key}: {}", refused.to_json());
            }
        }
        for (key, wrong) in [
            ("remote_block_ids", json!([[]])),
            ("remote_block_ids", json!([])),
            ("remote_engine_id", json!("")),
            ("remote_port", json!(0)),
            ("tp_size", json!(2)),
            ("transfer_mode", json!("push")),
            ("do_remote_decode", json!(true)),
        ] {
            let mut params = captured();
            params[key] = wrong;
            assert!(parse(&params).is_err(), "{key}");
        }
    }

    #[test]
    fn the_answer_has_vllms_keys() {
        let answer = HeldParams {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_block_ids: [vec![1, 2, 3, 4, 5, 6, 7]],
            remote_engine_id: "1b2d35c8-c225-40d0-be8e-9d997c835e87".to_owned(),
            remote_request_id: "chatcmpl-pd-1-97bdd49b".to_owned(),
            remote_host: "127.0.0.1".to_owned(),
            remote_port: 5600,
            tp_size: 1,
            dcp_size: 1,
            pp_size: 1,
            remote_num_tokens: 194,
            remote_blocks_expiry_time: None,
            transfer_mode: "pull",
            remote_prefill_cached_tokens: 192,
        };
        assert_eq!(serde_json::to_value(answer).unwrap(), captured());
    }
}
