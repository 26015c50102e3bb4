//! Changes to a client's body, at its top level alone. What a key holds is never looked into.

use serde::Serialize;

use super::{EXPORT, Kv, Part, tokens::prefill_rank};
use crate::object::{Change, Object};

/// The body asks for several answers, and KV is handed over for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the body asks for several answers, and KV is handed over for one")]
pub struct SeveralChoices;

/// What only we may say about where KV comes from and goes to. A client's own would reach another request's KV, or kill the
/// engine; the gateway refuses them, and here none gets past.
const OURS: [&str; 9] = [
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "disagg_prefill_dp_rank",
    "routed_dp_rank",
    "data_parallel_rank",
];

/// What to change in a client's body.
#[derive(Debug, Clone, Copy)]
pub struct ClientEdits<'a> {
    /// The model's name as the engine knows it.
    pub model: &'a str,
    /// Unique among all requests of that engine, for engines that take it in a field (`rid`).
    pub id: Option<&'a str>,
    /// Separates tenants in the engine's prefix cache.
    pub salt: Option<&'a str>,
    /// The rank, for engines that take it in a field.
    pub dp_rank: Option<u16>,
    /// What becomes of the KV.
    pub kv: Kv<'a>,
}

/// The body with these changes: fields that were there keep their places, new ones come last, all else stays as it was.
///
/// # Errors
/// If KV cannot be handed over for it.
pub fn rewrite(body: &Object, edits: &ClientEdits<'_>) -> Result<Vec<u8>, SeveralChoices> {
    let hands_over = !matches!(edits.kv, Kv::Own);
    if hands_over && body.get("n").is_some_and(|choices| !matches!(choices, b"1" | b"null")) {
        return Err(SeveralChoices);
    }
    Ok(body.with(edits.changes()))
}

impl ClientEdits<'_> {
    fn changes(&self) -> Vec<(&'static str, Change)> {
        let mut changes = vec![("model", Change::Set(json(self.model)))];
        let mut set = |key, value: Option<String>| {
            if let Some(json) = value {
                changes.push((key, Change::Set(json)));
            }
        };
        set("rid", self.id.map(json));
        set("cache_salt", self.salt.map(json));
        set("routed_dp_rank", self.dp_rank.map(|rank| json(&rank)));
        match self.kv {
            Kv::Own => {}
            Kv::Import(params) => set("kv_transfer_params", Some(params.get().to_owned())),
            Kv::Export => {
                set("kv_transfer_params", Some(json(&EXPORT)));
                set("max_tokens", Some("1".to_owned()));
                set("max_completion_tokens", Some("1".to_owned()));
                set("stream", Some("false".to_owned()));
                // More than one token would be asked for, or usage of a stream that is none.
                changes.extend([("min_tokens", Change::Remove), ("stream_options", Change::Remove)]);
            }
            Kv::Meet { room, part } => {
                set("bootstrap_host", Some(json(room.host)));
                set("bootstrap_port", Some(json(&room.port)));
                set("bootstrap_room", Some(json(&room.room)));
                set("disagg_prefill_dp_rank", prefill_rank(Some(room), Some(part)).map(|rank| json(&rank)));
                if part == Part::Prefill {
                    changes.push(("stream", Change::Replace("false".to_owned())));
                    changes.push(("stream_options", Change::Remove));
                }
            }
        }
        for key in OURS {
            if !changes.iter().any(|(changed, _)| *changed == key) {
                changes.push((key, Change::Remove));
            }
        }
        changes
    }
}

fn json<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("texts and numbers are JSON")
}
