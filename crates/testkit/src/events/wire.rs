//! The msgpack payloads of KV event batches, byte for byte as the engines' encoder writes them.
//!
//! In: a [`Batch`] and the [`Shape`] of an engine's version. Out: the payload frame ([`encode`]). A test decodes
//! the captured payloads and encodes them again.
//!
//! Evidence: `fixtures/vllm/kv_events/*.msgpack` for [`Shape::Maps`]; the array shapes are those of vLLM 0.22's
//! structures, SGLang's those of SGLang 0.5.23's `kv_events.py`; neither was captured.

use rmp::encode as mp;

use super::{Batch, KvEvent, Stored};
use crate::engine::{Counts, Gauges};

/// What an event looks like on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// vLLM from 0.24 on: a map with `type`.
    Maps,
    /// vLLM up to 0.22: an array that begins with the type.
    Arrays,
    /// SGLang: a map with `type`, signed hashes, and none of vLLM's keys that are never set.
    Sglang,
}

/// How a block's hash is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashFormat {
    /// 64 bits, unsigned.
    Unsigned,
    /// 64 bits, signed (SGLang).
    Signed,
    /// 32 bytes (`VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`).
    Bytes,
}

/// The payload of a batch.
pub(crate) fn encode(batch: &Batch, shape: Shape, hashes: HashFormat) -> Vec<u8> {
    let mut writer = Writer { out: Vec::with_capacity(256), hashes };
    writer.array(3);
    mp::write_f64(&mut writer.out, batch.time).expect("memory takes all bytes");
    writer.array(batch.events.len());
    for event in &batch.events {
        match shape {
            Shape::Maps => writer.map_event(event),
            Shape::Arrays => writer.array_event(event),
            Shape::Sglang => writer.sglang_event(event),
        }
    }
    writer.int(u64::from(batch.rank));
    writer.out
}

/// SGLang's `LoadStat`, an array that begins with its name (SGLang 0.5.23's `load_publisher.py`). `capacity` in tokens.
pub(crate) fn encode_load(rank: u32, gauges: &Gauges, counts: &Counts, capacity: usize) -> Vec<u8> {
    let mut writer = Writer { out: Vec::with_capacity(64), hashes: HashFormat::Signed };
    writer.array(11);
    writer.text("LoadStat");
    let numbers = [
        gauges.running as u64,
        gauges.waiting as u64,
        gauges.tokens as u64,
        capacity as u64,
        u64::from(rank),
        gauges.waiting_tokens as u64,
        (gauges.tokens + gauges.waiting_tokens) as u64,
        gauges.running_max as u64,
        counts.computed,
        0, // microseconds spent in prefill: not measured
    ];
    numbers.iter().for_each(|number| writer.int(*number));
    writer.out
}

const MEDIUM: &str = "GPU";

struct Writer {
    out: Vec<u8>,
    hashes: HashFormat,
}

impl Writer {
    fn array(&mut self, len: usize) {
        mp::write_array_len(&mut self.out, len as u32).expect("memory takes all bytes");
    }

    fn map(&mut self, len: usize) {
        mp::write_map_len(&mut self.out, len as u32).expect("memory takes all bytes");
    }

    fn text(&mut self, text: &str) {
        mp::write_str(&mut self.out, text).expect("memory takes all bytes");
    }

    fn nil(&mut self) {
        mp::write_nil(&mut self.out).expect("memory takes all bytes");
    }

    fn int(&mut self, value: u64) {
        mp::write_uint(&mut self.out, value).expect("memory takes all bytes");
    }

    fn optional_text(&mut self, text: Option<&str>) {
        match text {
            Some(text) => self.text(text),
            None => self.nil(),
        }
    }

    fn hash(&mut self, hash: u64) {
        let written = match self.hashes {
            HashFormat::Unsigned => mp::write_uint(&mut self.out, hash).map(drop),
            HashFormat::Signed => mp::write_sint(&mut self.out, hash.cast_signed()).map(drop),
            HashFormat::Bytes => {
                let mut bytes = [0u8; 32];
                bytes[..8].copy_from_slice(&hash.rotate_left(17).to_be_bytes());
                bytes[24..].copy_from_slice(&hash.to_be_bytes());
                mp::write_bin(&mut self.out, &bytes)
            }
        };
        written.expect("memory takes all bytes");
    }

    fn hash_list(&mut self, hashes: &[u64]) {
        self.array(hashes.len());
        hashes.iter().for_each(|hash| self.hash(*hash));
    }

    fn parent(&mut self, parent: Option<u64>) {
        match parent {
            Some(hash) => self.hash(hash),
            None => self.nil(),
        }
    }

    fn tokens(&mut self, tokens: &[u32]) {
        self.array(tokens.len());
        tokens.iter().for_each(|token| self.int(u64::from(*token)));
    }

    fn extra_keys(&mut self, keys: &[Vec<String>]) {
        self.array(keys.len());
        for block in keys {
            if block.is_empty() {
                self.nil();
            } else {
                self.array(block.len());
                block.iter().for_each(|key| self.text(key));
            }
        }
    }

    /// vLLM 0.24 and later. Keys that are always there come first; keys at their default are left out.
    fn map_event(&mut self, event: &KvEvent) {
        match event {
            KvEvent::Stored(stored) => {
                self.map(11 + usize::from(stored.session.is_some()));
                self.stored_head(stored);
                self.text("lora_id");
                self.lora_id(stored);
                self.text("medium");
                self.text(MEDIUM);
                self.text("lora_name");
                self.optional_text(stored.adapter.as_deref());
                self.text("extra_keys");
                self.extra_keys(&stored.extra_keys);
                self.text("group_idx");
                self.int(0);
                self.text("kv_cache_spec_kind");
                self.text("full_attention");
                if let Some(session) = &stored.session {
                    self.text("session_id");
                    self.text(session);
                }
            }
            KvEvent::Removed { hash } => {
                self.map(4);
                self.text("type");
                self.text("BlockRemoved");
                self.text("block_hashes");
                self.hash_list(&[*hash]);
                self.text("medium");
                self.text(MEDIUM);
                self.text("group_idx");
                self.int(0);
            }
            KvEvent::Cleared => self.cleared_map(),
        }
    }

    fn stored_head(&mut self, stored: &Stored) {
        self.text("type");
        self.text("BlockStored");
        self.text("block_hashes");
        self.hash_list(&stored.hashes);
        self.text("parent_block_hash");
        self.parent(stored.parent);
        self.text("token_ids");
        self.tokens(&stored.tokens);
        self.text("block_size");
        self.int(stored.block_size as u64);
    }

    fn lora_id(&mut self, stored: &Stored) {
        match stored.adapter {
            Some(_) => self.int(1),
            None => self.nil(),
        }
    }

    fn cleared_map(&mut self) {
        self.map(1);
        self.text("type");
        self.text("AllBlocksCleared");
    }

    /// vLLM 0.17 to 0.22.
    fn array_event(&mut self, event: &KvEvent) {
        match event {
            KvEvent::Stored(stored) => {
                self.array(9);
                self.text("BlockStored");
                self.hash_list(&stored.hashes);
                self.parent(stored.parent);
                self.tokens(&stored.tokens);
                self.int(stored.block_size as u64);
                self.lora_id(stored);
                self.text(MEDIUM);
                self.optional_text(stored.adapter.as_deref());
                self.extra_keys(&stored.extra_keys);
            }
            KvEvent::Removed { hash } => {
                self.array(3);
                self.text("BlockRemoved");
                self.hash_list(&[*hash]);
                self.text(MEDIUM);
            }
            KvEvent::Cleared => {
                self.array(1);
                self.text("AllBlocksCleared");
            }
        }
    }

    fn sglang_event(&mut self, event: &KvEvent) {
        match event {
            KvEvent::Stored(stored) => {
                let optional = [stored.salt.as_ref(), stored.session.as_ref(), stored.adapter.as_ref()];
                self.map(7 + optional.iter().flatten().count());
                self.stored_head(stored);
                self.text("lora_id");
                self.lora_id(stored);
                self.text("medium");
                self.text(MEDIUM);
                for (key, value) in ["cache_salt", "session_id", "lora_name"].iter().zip(optional) {
                    if let Some(value) = value {
                        self.text(key);
                        self.text(value);
                    }
                }
            }
            KvEvent::Removed { hash } => {
                self.map(3);
                self.text("type");
                self.text("BlockRemoved");
                self.text("block_hashes");
                self.hash_list(&[*hash]);
                self.text("medium");
                self.text(MEDIUM);
            }
            KvEvent::Cleared => self.cleared_map(),
        }
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
