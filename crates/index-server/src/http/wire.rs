//! Bodies as they travel. Hashes are decimal strings, `0x` with hexadecimal digits, or plain numbers; answers have `0x`.

use std::fmt;

use axum::body::Bytes;
use forebay_kv_index::IndexStats;
use forebay_types::{BlockHash, Tier, TokenId};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeOwned, Error as _, Visitor},
};

use crate::{
    server::DumpItem,
    service::{
        Answer, EngineSpec, EngineStatus, FedBatch, FedEvent, FedLayers, FedStored, Kind, Overlap, Prefix,
        Published, RankStatus, Refused, State, Stats,
    },
};

/// Batches of one body.
pub(super) const BATCHES_MAX: usize = 1024;
/// Sentences of one answer.
pub(super) const NOTES_MAX: usize = 16;

/// Reads a body of JSON.
pub(super) fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Refused> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        match inner.classify() {
            serde_json::error::Category::Data => {
                let refused = Refused::new(Kind::Invalid, "invalid_value", inner.to_string());
                if path == "." { refused } else { refused.at(path) }
            }
            _ => Refused::new(Kind::Invalid, "invalid_json", format!("the body is not JSON: {inner}")),
        }
    })?;
    reader.end().map_err(|_| {
        Refused::new(Kind::Invalid, "invalid_json", "the body goes on after its JSON value; send one value")
    })?;
    Ok(parsed)
}

/// A block's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hash(pub(super) u64);

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(HashVisitor)
    }
}

struct HashVisitor;

impl Visitor<'_> for HashVisitor {
    type Value = Hash;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a hash of 64 bits: a decimal string, `0x` with hexadecimal digits, or a whole number")
    }

    fn visit_u64<E>(self, number: u64) -> Result<Hash, E> {
        Ok(Hash(number))
    }

    /// SGLang's hashes have a sign.
    fn visit_i64<E>(self, number: i64) -> Result<Hash, E> {
        Ok(Hash(number.cast_unsigned()))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Hash, E> {
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = match text.strip_prefix("0x") {
            Some(hex) if digits(hex) => u64::from_str_radix(hex, 16).ok(),
            Some(_) => None,
            None if text.starts_with('-') => text.parse().ok().map(i64::cast_unsigned),
            None if digits(text) => text.parse().ok(),
            None => None,
        };
        number.map(Hash).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#018x}", self.0))
    }
}

fn own(hashes: Vec<Hash>) -> Vec<BlockHash> {
    hashes.into_iter().map(|Hash(hash)| BlockHash(hash)).collect()
}

fn numbers(hashes: Vec<Hash>) -> Vec<u64> {
    hashes.into_iter().map(|Hash(hash)| hash).collect()
}

/// One, or several.
#[derive(Debug, Default)]
pub(super) struct OneOrMore(Vec<String>);

impl<'de> Deserialize<'de> for OneOrMore {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::Null => Ok(Self::default()),
            serde_json::Value::String(one) => Ok(Self(vec![one])),
            more => serde_json::from_value(more)
                .map(Self)
                .map_err(|_| D::Error::custom("expected an address, or a list with one for each rank")),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Register {
    name: String,
    model: String,
    #[serde(default)]
    events: OneOrMore,
    #[serde(default)]
    replay: OneOrMore,
    #[serde(default)]
    dp_ranks: u32,
    block_size_tokens: Option<u32>,
    #[serde(default)]
    topic: String,
}

impl Register {
    pub(super) fn into_spec(self) -> EngineSpec {
        let Self { name, model, events, replay, dp_ranks, block_size_tokens, topic } = self;
        EngineSpec { name, model, events: events.0, replay: replay.0, dp_ranks, block_size_tokens, topic }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Query {
    model: Option<String>,
    tokens: Option<Vec<TokenId>>,
    hashes: Option<Vec<Hash>>,
    salt: Option<String>,
    lora: Option<String>,
    ranks_max: Option<usize>,
    #[serde(default)]
    with_hashes: bool,
}

impl Query {
    /// What is asked, ranks in the answer at most, whether it has the prompt's hashes.
    pub(super) fn into_prefix(self) -> Result<(Prefix, usize, bool), Refused> {
        let Self { model, tokens, hashes, salt, lora, ranks_max, with_hashes } = self;
        let one = || Refused::value("tokens", "give either `tokens` or `hashes`");
        let prefix = match (tokens, hashes) {
            (Some(tokens), None) => Prefix::Tokens {
                model: model.unwrap_or_default(),
                tokens,
                salt: salt.unwrap_or_default(),
                lora,
            },
            (None, Some(_)) if salt.is_some() || lora.is_some() => {
                let message = "`salt` and `lora` go with `tokens`: hashes have them in them already";
                return Err(Refused::value("hashes", message));
            }
            (None, Some(hashes)) => Prefix::Hashes { model, hashes: own(hashes) },
            _ => return Err(one()),
        };
        Ok((prefix, ranks_max.unwrap_or(usize::MAX), with_hashes))
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Found {
    blocks: usize,
    block_size_tokens: u32,
    ranks: Vec<FoundRank>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hashes: Option<Vec<Hash>>,
}

#[derive(Debug, Serialize)]
struct FoundRank {
    engine: String,
    dp_rank: u16,
    blocks: u32,
    tokens: u64,
    tiers: Tiers,
}

#[derive(Debug, Serialize)]
struct Tiers {
    device: u32,
    host: u32,
    disk: u32,
    remote: u32,
}

impl Found {
    pub(super) fn new(answer: Answer, block_size_tokens: u32, with_hashes: bool) -> Self {
        let Answer { ranks, chain } = answer;
        let rank = |Overlap { engine, dp_rank, tiers }: Overlap| FoundRank {
            engine: engine.as_str().to_owned(),
            dp_rank,
            blocks: tiers.device,
            tokens: u64::from(tiers.device) * u64::from(block_size_tokens),
            tiers: Tiers { device: tiers.device, host: tiers.host, disk: tiers.disk, remote: tiers.remote },
        };
        Self {
            blocks: chain.len(),
            block_size_tokens,
            ranks: ranks.into_iter().map(rank).collect(),
            hashes: with_hashes.then(|| chain.into_iter().map(|BlockHash(hash)| Hash(hash)).collect()),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Publish {
    pub(super) engine: String,
    #[serde(default)]
    pub(super) life: String,
    #[serde(default)]
    pub(super) dp_rank: u32,
    pub(super) batches: Vec<Batch>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Batch {
    sequence: u64,
    #[serde(default)]
    events: Vec<Event>,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Event {
    Stored(Stored),
    Removed { hashes: Vec<Hash>, tier: Option<Tier>, group: Option<u32> },
    Cleared {},
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stored {
    parent: Option<Hash>,
    hashes: Vec<Hash>,
    #[serde(default)]
    tokens: Vec<TokenId>,
    #[serde(default)]
    block_size_tokens: u32,
    salt: Option<String>,
    lora: Option<String>,
    tier: Option<Tier>,
    group: Option<u32>,
    kind: Option<String>,
    window_tokens: Option<u32>,
}

impl From<Stored> for FedStored {
    fn from(stored: Stored) -> Self {
        let Stored {
            parent,
            hashes,
            tokens,
            block_size_tokens,
            salt,
            lora,
            tier,
            group,
            kind,
            window_tokens,
        } = stored;
        Self {
            parent: parent.map(|Hash(hash)| hash),
            hashes: numbers(hashes),
            tokens,
            block_size_tokens,
            salt: salt.filter(|salt| !salt.is_empty()),
            lora: lora.filter(|lora| !lora.is_empty()),
            tier: tier.unwrap_or(Tier::Device),
            layers: FedLayers { group, kind, window_tokens },
        }
    }
}

impl From<Batch> for FedBatch {
    fn from(Batch { sequence, events }: Batch) -> Self {
        Self { sequence, events: events.into_iter().map(Into::into).collect() }
    }
}

impl From<Event> for FedEvent {
    fn from(event: Event) -> Self {
        match event {
            Event::Stored(stored) => Self::Stored(stored.into()),
            Event::Removed { hashes, tier, group } => {
                Self::Removed { hashes: numbers(hashes), tier: tier.unwrap_or(Tier::Device), group }
            }
            Event::Cleared {} => Self::Cleared,
        }
    }
}

pub(super) fn published(published: &Published) -> serde_json::Value {
    let Published { applied, repeated, notes } = published;
    serde_json::json!({ "applied": applied, "repeated": repeated, "notes": notes })
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Snapshot {
    #[serde(default)]
    pub(super) life: String,
    pub(super) sequence_next: u64,
    pub(super) stored: Vec<Stored>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Dump {
    pub(super) engine: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct List<T> {
    pub(super) data: Vec<T>,
}

#[derive(Debug, Serialize)]
pub(super) struct Engine {
    name: String,
    model: String,
    state: State,
    detail: Option<String>,
    incarnation: u64,
    restarts: u64,
    blocks: u64,
    ranks: Vec<Rank>,
}

#[derive(Debug, Serialize)]
struct Rank {
    dp_rank: u16,
    state: State,
    blocks: u64,
    batches: u64,
    batches_lost: u64,
    last_event_seconds: Option<f64>,
    detail: Option<String>,
}

impl From<EngineStatus> for Engine {
    fn from(status: EngineStatus) -> Self {
        let EngineStatus { name, model, state, detail, incarnation, restarts, ranks } = status;
        Self {
            name: name.as_str().to_owned(),
            model,
            state,
            detail,
            incarnation: incarnation.0,
            restarts,
            blocks: ranks.iter().map(|rank| rank.blocks).sum(),
            ranks: ranks.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<RankStatus> for Rank {
    fn from(status: RankStatus) -> Self {
        let RankStatus { dp_rank, state, blocks, batches, batches_lost, last_event, detail } = status;
        // Milliseconds are enough, and read better.
        let seconds = last_event.map(|age| (age.as_secs_f64() * 1e3).round() / 1e3);
        Self { dp_rank, state, blocks, batches, batches_lost, last_event_seconds: seconds, detail }
    }
}

pub(super) fn stats(stats: &Stats) -> serde_json::Value {
    let IndexStats {
        blocks,
        entries,
        segments,
        bytes,
        ranks,
        ranks_stale,
        refused,
        evicted,
        removals_unknown,
        gaps,
        duplicates,
    } = stats.index;
    serde_json::json!({
        "engines": stats.engines,
        "block_size_tokens": stats.block_size_tokens,
        "index": {
            "blocks": blocks,
            "entries": entries,
            "segments": segments,
            "bytes": bytes,
            "bytes_max": stats.bytes_max,
            "ranks": ranks,
            "ranks_stale": ranks_stale,
            "refused": refused,
            "evicted": evicted,
            "removals_unknown": removals_unknown,
            "gaps": gaps,
            "duplicates": duplicates,
        },
        "chains": {
            "bytes": stats.chains.bytes,
            "blocks_reused": stats.chains.blocks_reused,
            "blocks_hashed": stats.chains.blocks_hashed,
            "evictions": stats.chains.evictions,
        },
    })
}

#[derive(Serialize)]
struct DumpPiece<'a> {
    engine: &'a str,
    dp_rank: u16,
    incarnation: u64,
    hashes: Vec<Hash>,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<String>,
}

/// One line of a dump.
pub(super) fn dump_line(item: DumpItem) -> Bytes {
    let mut line = match item {
        DumpItem::Piece { engine, rank, hashes, missing } => {
            let hashes = hashes.into_iter().map(|BlockHash(hash)| Hash(hash)).collect();
            serde_json::to_vec(&DumpPiece {
                engine: engine.as_str(),
                dp_rank: rank.dp_rank,
                incarnation: rank.incarnation.0,
                hashes,
                missing,
            })
        }
        DumpItem::Done { ranks, blocks } => {
            serde_json::to_vec(&serde_json::json!({ "done": true, "ranks": ranks, "blocks": blocks }))
        }
    }
    .expect("answers always serialise");
    line.push(b'\n');
    line.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_read_in_every_form() {
        let check = |json: &str, expected: Option<u64>| {
            let read: Result<Hash, _> = serde_json::from_str(json);
            assert_eq!(read.ok().map(|Hash(hash)| hash), expected, "{json}");
        };
        check("7", Some(7));
        check("\"7\"", Some(7));
        check("\"18446744073709551615\"", Some(u64::MAX));
        check("18446744073709551615", Some(u64::MAX));
        check("\"0xff\"", Some(255));
        check("\"0xFFFFFFFFFFFFFFFF\"", Some(u64::MAX));
        check("-1", Some(u64::MAX));
        check("\"-1\"", Some(u64::MAX));
        check("\"ff\"", None);
        check("\"0x\"", None);
        check("\"0x1ffffffffffffffff\"", None);
        check("\"18446744073709551616\"", None);
        check("\"+7\"", None);
        check("\"0x+7\"", None);
        check("\"\"", None);
        check("1.5", None);
        check("null", None);
        let written = serde_json::to_string(&Hash(255)).unwrap();
        assert_eq!(written, "\"0x00000000000000ff\"");
        check(&written, Some(255));
    }
}
