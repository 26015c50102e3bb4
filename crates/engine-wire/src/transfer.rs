//! vLLM's hand-over of KV: what a prefill leg answers.
//!
//! A decode engine that is given incomplete parameters dies (vLLM 0.32 asserts on `do_remote_prefill` without
//! `remote_block_ids`), so an answer is either complete or worth nothing. Start at [`PrefillAnswer::read`].

use std::{fmt, time::Duration};

use forebay_types::TokenId;
use serde::{Deserialize, Deserializer, de};
use serde_json::value::RawValue;

use crate::answer::{Fault, Usage, message_of};

/// Beyond it a number is seconds since 1970; below it, of a clock that only the engine knows.
const UNIX_SECONDS_MIN: f64 = 1e9;

/// What a prefill leg answered, checked to be complete.
#[derive(Debug)]
pub struct PrefillAnswer {
    /// `kv_transfer_params`, word for word.
    pub params: Box<RawValue>,
    /// Who moves the KV.
    pub mode: TransferMode,
    /// `remote_blocks_expiry_time`, on a clock that may be anyone's.
    pub expires: Option<f64>,
    /// Blocks that are held, over all KV groups.
    pub blocks: u32,
    /// The engine's count.
    pub usage: Usage,
}

/// Who moves the KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransferMode {
    /// The decode engine reads it.
    Pull,
    /// The prefill engine writes it, once the decode engine has told it where.
    Push,
}

/// Why nobody can continue from a prefill leg.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Incomplete {
    /// It is no answer.
    #[error("the prefill engine answered no document: {0}")]
    NoDocument(String),
    /// It is an error.
    #[error("the prefill engine answered an error: {}", .0.message)]
    Fault(Fault),
    /// There are no parameters: the engine has no connector, or the request did not end by length or stop.
    #[error("the prefill engine answered no kv_transfer_params; is it started with a KV connector?")]
    NoParams,
    /// A field that a decode engine needs is missing or empty.
    #[error("the prefill engine's kv_transfer_params have no usable {0}")]
    Field(&'static str),
}

#[derive(Deserialize)]
struct Document<'a> {
    #[serde(borrow)]
    kv_transfer_params: Option<&'a RawValue>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Params<'a> {
    do_remote_prefill: Option<bool>,
    #[serde(borrow)]
    remote_engine_id: Option<&'a RawValue>,
    #[serde(borrow)]
    remote_request_id: Option<&'a RawValue>,
    remote_block_ids: Option<Blocks>,
    #[serde(borrow)]
    remote_host: Option<&'a RawValue>,
    remote_port: Option<u16>,
    tp_size: Option<u32>,
    remote_blocks_expiry_time: Option<f64>,
    #[serde(borrow)]
    transfer_mode: Option<&'a RawValue>,
}

impl PrefillAnswer {
    /// Reads the body of an answer with status 200.
    ///
    /// # Errors
    /// If a decode engine could not, or must not, be given what it says.
    pub fn read(body: &[u8]) -> Result<Self, Incomplete> {
        let Ok(text) = std::str::from_utf8(body) else {
            return Err(Incomplete::NoDocument("it is not UTF-8".to_owned()));
        };
        if let Some(fault) = Fault::in_document(text) {
            return Err(Incomplete::Fault(fault));
        }
        let document: Document<'_> =
            serde_json::from_str(text).map_err(|_| Incomplete::NoDocument(message_of(body)))?;
        let raw = document.kv_transfer_params.ok_or(Incomplete::NoParams)?;
        let (mode, expires, blocks) = check(raw)?;
        let usage = document.usage.unwrap_or_default();
        Ok(Self { params: raw.to_owned(), mode, expires, blocks, usage })
    }

    /// How long the blocks are held from now on. `unix` is the time since 1970; `lease` what the engine holds blocks for
    /// that say nothing, or that name a moment of a clock of their own (vLLM 0.32 gives Python's `perf_counter`).
    pub fn held_for(&self, unix: Duration, lease: Duration) -> Duration {
        match self.expires {
            Some(at) if at >= UNIX_SECONDS_MIN => {
                Duration::try_from_secs_f64((at - unix.as_secs_f64()).max(0.0)).unwrap_or(lease)
            }
            _ => lease,
        }
    }
}

fn check(raw: &RawValue) -> Result<(TransferMode, Option<f64>, u32), Incomplete> {
    let params: Params<'_> = serde_json::from_str(raw.get()).map_err(|_| Incomplete::Field("shape"))?;
    let need = |is_there: bool, field: &'static str| {
        if is_there { Ok(()) } else { Err(Incomplete::Field(field)) }
    };
    // An id or a host is a text with something in it; some versions have ids that are numbers.
    let says = |raw: Option<&RawValue>| raw.is_some_and(|raw| !matches!(raw.get(), "\"\"" | "null"));
    need(params.do_remote_prefill == Some(true), "do_remote_prefill")?;
    need(says(params.remote_engine_id), "remote_engine_id")?;
    need(says(params.remote_request_id), "remote_request_id")?;
    let blocks = params.remote_block_ids.map_or(0, |Blocks(count)| count);
    need(blocks > 0, "remote_block_ids")?;
    need(says(params.remote_host), "remote_host")?;
    need(params.remote_port.is_some_and(|port| port > 0), "remote_port")?;
    need(params.tp_size.is_some_and(|size| size > 0), "tp_size")?;
    let mode = match params.transfer_mode.map(RawValue::get) {
        Some("\"push\"") => TransferMode::Push,
        _ => TransferMode::Pull,
    };
    Ok((mode, params.remote_blocks_expiry_time, blocks))
}

/// A count of block ids: a list, or a list for each KV group.
struct Blocks(u32);

impl<'de> Deserialize<'de> for Blocks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Blocks;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("block ids")
            }
            fn visit_u64<E: de::Error>(self, _id: u64) -> Result<Blocks, E> {
                Ok(Blocks(1))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Blocks, A::Error> {
                let mut count = 0_u32;
                while let Some(Blocks(inner)) = seq.next_element()? {
                    count = count.saturating_add(inner);
                }
                Ok(Blocks(count))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A request that vLLM refuses and that makes it free KV which nobody will come for.
///
/// The decode side of vLLM 0.32 wraps its OpenAI routes (`_with_kv_transfer_rejection_cleanup`): a request with
/// `do_remote_prefill` that is refused before it reaches the engine is handed to the connector as one aborted at once
/// (`notify_kv_transfer_request_rejected`), whose `request_finished` tells the prefill engine to free the blocks, without a
/// block being read. Seen: a decode leg refused with 400 freed the blocks within 0.11 s
/// (`tests/vllm/captures/pair/releases.json`). A model that the engine does not have makes sure of the refusal. Engines
/// without that clean-up refuse as well, and the blocks wait for their lease.
pub fn discard_request(model: &str, params: &RawValue) -> Vec<u8> {
    #[derive(serde::Serialize)]
    struct Discard<'a> {
        model: &'a str,
        prompt: [TokenId; 1],
        max_tokens: u32,
        kv_transfer_params: &'a RawValue,
    }
    let request = Discard { model, prompt: [0], max_tokens: 1, kv_transfer_params: params };
    serde_json::to_vec(&request).expect("numbers and texts are JSON")
}

#[cfg(test)]
mod tests;
