//! Changes to a client's body, at its top level alone. What a key holds is never looked into.

use std::{borrow::Cow, collections::BTreeSet, fmt};

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::value::RawValue;

use super::{EXPORT, Kv, Part, tokens::prefill_rank};

/// Keys of a body's top level. OpenAI's chat requests have about 40.
const KEYS_MAX: usize = 512;

/// Why a body cannot be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RewriteError {
    /// It is not one JSON object.
    #[error("the body is no JSON object")]
    NoObject,
    /// A key stands twice: engines and we might each believe another of the two.
    #[error("the body has the key {key:?} twice")]
    Twice {
        /// Which.
        key: String,
    },
    /// It has more keys than any request needs.
    #[error("the body has more than {KEYS_MAX} keys")]
    TooManyKeys,
    /// It asks for several answers, and KV is handed over for one.
    #[error("the body asks for several answers, and KV is handed over for one")]
    SeveralChoices,
}

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

/// Makes these changes: keys that were there keep their places, new ones come last, all else stays as it was.
///
/// # Errors
/// If it is no such body.
pub fn rewrite(body: &[u8], edits: &ClientEdits<'_>) -> Result<Vec<u8>, RewriteError> {
    let Top(entries) = serde_json::from_slice(body).map_err(|_| RewriteError::NoObject)?;
    if entries.len() > KEYS_MAX {
        return Err(RewriteError::TooManyKeys);
    }
    let mut keys = BTreeSet::new();
    if let Some((key, _)) = entries.iter().find(|(key, _)| !keys.insert(key.as_ref())) {
        return Err(RewriteError::Twice { key: key.chars().take(64).collect() });
    }
    let hands_over = !matches!(edits.kv, Kv::Own);
    let is_one = |value: &RawValue| matches!(value.get(), "1" | "null");
    if hands_over && entries.iter().any(|(key, value)| key == "n" && !is_one(value)) {
        return Err(RewriteError::SeveralChoices);
    }
    let mut changes = edits.changes();
    let mut object = Object::with_capacity(body.len() + 256);
    for (key, value) in &entries {
        match changes.iter().position(|(changed, _)| changed == key) {
            None => object.entry(key, value.get()),
            Some(at) => {
                if let Change::Set(json) | Change::Replace(json) = changes.remove(at).1 {
                    object.entry(key, &json);
                }
            }
        }
    }
    for (key, change) in changes {
        if let Change::Set(json) = change {
            object.entry(key, &json);
        }
    }
    Ok(object.finish())
}

enum Change {
    /// The key holds this JSON.
    Set(String),
    /// If the key is there, it holds this JSON.
    Replace(String),
    Remove,
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

/// One JSON object, written entry by entry.
struct Object(Vec<u8>);

impl Object {
    fn with_capacity(bytes: usize) -> Self {
        let mut json = Vec::with_capacity(bytes);
        json.push(b'{');
        Self(json)
    }

    fn entry(&mut self, key: &str, value: &str) {
        if self.0.len() > 1 {
            self.0.push(b',');
        }
        serde_json::to_writer(&mut self.0, key).expect("a text is JSON");
        self.0.push(b':');
        self.0.extend_from_slice(value.as_bytes());
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.push(b'}');
        self.0
    }
}

/// The entries of an object, their values unread.
struct Top<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

/// A key; borrowed unless it is written with escapes.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Top<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Top<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Top<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some((Key(key), value)) = map.next_entry()? {
                    entries.push((key, value));
                    if entries.len() > KEYS_MAX {
                        // The rest is skipped; there is no use for it.
                        while map.next_entry::<de::IgnoredAny, de::IgnoredAny>()?.is_some() {}
                    }
                }
                Ok(Top(entries))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}
