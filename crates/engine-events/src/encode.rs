//! [`EventBatch`]es to payload frames, as engines write them: for doubles, and for engines of ours that speak an engine's
//! dialect. Start at [`encode`].
//!
//! The bytes are those that the engine's own encoder would send, down to the width of each integer; for vLLM's maps
//! captured payloads prove it.

use forebay_types::Tier;
use rmp::encode as to;

use crate::event::{EngineEvent, EngineHash, EventBatch, ExtraKey, Removed, Stored};

/// Whose words, of which time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// vLLM from 0.24 at the latest (0.23 was not looked at): events are maps, hashes integers.
    VllmMap,
    /// The same with `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`: hashes are 32 bytes. Only the last 8 are known here; the
    /// others are 0.
    VllmMapBytes,
    /// vLLM 0.17 to 0.22: events are lists. They have no place for a group.
    VllmList,
    /// SGLang 0.5.23: events are maps, hashes signed. They have no place for extra keys or groups.
    Sglang,
}

/// One payload frame. [`EngineEvent::Unknown`] is written as an event with a type and nothing else.
pub fn encode(batch: &EventBatch, dialect: Dialect) -> Vec<u8> {
    let mut out = Writer { bytes: Vec::with_capacity(64 + 256 * batch.events.len()), dialect };
    out.list(2 + usize::from(batch.dp_rank.is_some()));
    infallible(to::write_f64(&mut out.bytes, batch.time_seconds));
    out.list(batch.events.len());
    for event in &batch.events {
        out.event(event);
    }
    if let Some(rank) = batch.dp_rank {
        out.unsigned(rank.into());
    }
    out.bytes
}

/// A media item's extra key: its hash and its place.
pub(crate) fn write_media(bytes: &mut Vec<u8>, hash: &str, offset_tokens: i64) {
    infallible(to::write_array_len(bytes, 2));
    infallible(to::write_str(bytes, hash));
    infallible(to::write_sint(bytes, offset_tokens));
}

fn infallible<T, E: std::fmt::Debug>(result: Result<T, E>) {
    result.expect("a vector takes all that is written to it");
}

fn length(length: usize) -> u32 {
    u32::try_from(length).expect("what is encoded here is far below 4 billion parts")
}

struct Writer {
    bytes: Vec<u8>,
    dialect: Dialect,
}

impl Writer {
    fn list(&mut self, elements: usize) {
        infallible(to::write_array_len(&mut self.bytes, length(elements)));
    }

    fn map(&mut self, pairs: usize) {
        infallible(to::write_map_len(&mut self.bytes, length(pairs)));
    }

    fn text(&mut self, text: &str) {
        infallible(to::write_str(&mut self.bytes, text));
    }

    fn unsigned(&mut self, value: u64) {
        infallible(to::write_uint(&mut self.bytes, value));
    }

    fn nil(&mut self) {
        infallible(to::write_nil(&mut self.bytes));
    }

    fn optional<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        match value {
            Some(value) => write(self, value),
            None => self.nil(),
        }
    }

    fn hash(&mut self, hash: EngineHash) {
        match self.dialect {
            Dialect::VllmMap | Dialect::VllmList => self.unsigned(hash.0),
            Dialect::Sglang => infallible(to::write_sint(&mut self.bytes, hash.0.cast_signed())),
            Dialect::VllmMapBytes => {
                let mut bytes = [0; 32];
                bytes[24..].copy_from_slice(&hash.0.to_be_bytes());
                infallible(to::write_bin(&mut self.bytes, &bytes));
            }
        }
    }

    fn hashes(&mut self, hashes: &[EngineHash]) {
        self.list(hashes.len());
        for &hash in hashes {
            self.hash(hash);
        }
    }

    fn medium(&mut self, tier: Tier) {
        let sglang = self.dialect == Dialect::Sglang;
        self.text(match tier {
            Tier::Device => "GPU",
            Tier::Host if sglang => "CPU_PINNED",
            Tier::Host => "CPU",
            Tier::Disk if sglang => "DISK",
            Tier::Disk => "STORAGE",
            Tier::Remote => "EXTERNAL",
        });
    }

    fn event(&mut self, event: &EngineEvent) {
        match (event, self.dialect) {
            (EngineEvent::Stored(stored), Dialect::VllmList) => self.stored_list(stored),
            (EngineEvent::Stored(stored), _) => self.stored_map(stored),
            (EngineEvent::Removed(removed), Dialect::VllmList) => {
                self.list(3);
                self.text("BlockRemoved");
                self.hashes(&removed.hashes);
                self.medium(removed.tier);
            }
            (EngineEvent::Removed(removed), _) => self.removed_map(removed),
            (EngineEvent::Cleared, _) => self.bare("AllBlocksCleared"),
            (EngineEvent::Unknown { tag }, _) => self.bare(tag),
        }
    }

    fn bare(&mut self, tag: &str) {
        if self.dialect == Dialect::VllmList {
            self.list(1);
        } else {
            self.map(1);
            self.text("type");
        }
        self.text(tag);
    }

    fn tokens(&mut self, stored: &Stored) {
        self.list(stored.tokens.len());
        for &token in &stored.tokens {
            self.unsigned(token.into());
        }
    }

    fn stored_list(&mut self, stored: &Stored) {
        self.list(9);
        self.text("BlockStored");
        self.hashes(&stored.hashes);
        self.optional(stored.parent, Self::hash);
        self.tokens(stored);
        self.unsigned(stored.block_size_tokens.into());
        self.optional(stored.lora_id, |out, id| out.unsigned(id.into()));
        self.medium(stored.tier);
        self.optional(stored.lora_name.as_deref(), Self::text);
        self.optional(stored.extra_keys.as_deref(), Self::extra_keys);
    }

    fn stored_map(&mut self, stored: &Stored) {
        let sglang = self.dialect == Dialect::Sglang;
        let pairs = if sglang {
            usize::from(stored.salt.is_some()) + usize::from(stored.lora_name.is_some())
        } else {
            // The adapter's name is always there.
            1 + usize::from(stored.extra_keys.is_some())
                + usize::from(stored.group.is_some())
                + usize::from(stored.kind.is_some())
                + usize::from(stored.window_tokens.is_some())
        };
        self.map(7 + pairs);
        self.text("type");
        self.text("BlockStored");
        self.text("block_hashes");
        self.hashes(&stored.hashes);
        self.text("parent_block_hash");
        self.optional(stored.parent, Self::hash);
        self.text("token_ids");
        self.tokens(stored);
        self.text("block_size");
        self.unsigned(stored.block_size_tokens.into());
        self.text("lora_id");
        self.optional(stored.lora_id, |out, id| out.unsigned(id.into()));
        self.text("medium");
        self.medium(stored.tier);
        if sglang {
            self.pair("cache_salt", stored.salt.as_deref(), Self::text);
            self.pair("lora_name", stored.lora_name.as_deref(), Self::text);
        } else {
            self.text("lora_name");
            self.optional(stored.lora_name.as_deref(), Self::text);
            self.pair("extra_keys", stored.extra_keys.as_deref(), Self::extra_keys);
            self.pair("group_idx", stored.group, |out, group| out.unsigned(group.into()));
            self.pair("kv_cache_spec_kind", stored.kind, |out, kind| out.text(kind.name()));
            self.pair("kv_cache_spec_sliding_window", stored.window_tokens, |out, tokens| {
                out.unsigned(tokens.into());
            });
        }
    }

    fn removed_map(&mut self, removed: &Removed) {
        let group = removed.group.filter(|_| self.dialect != Dialect::Sglang);
        self.map(3 + usize::from(group.is_some()));
        self.text("type");
        self.text("BlockRemoved");
        self.text("block_hashes");
        self.hashes(&removed.hashes);
        self.text("medium");
        self.medium(removed.tier);
        self.pair("group_idx", group, |out, group| out.unsigned(group.into()));
    }

    /// A key that is left out where there is nothing to say.
    fn pair<T>(&mut self, key: &str, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        if let Some(value) = value {
            self.text(key);
            write(self, value);
        }
    }

    fn extra_keys(&mut self, blocks: &[Vec<ExtraKey>]) {
        self.list(blocks.len());
        for keys in blocks {
            if keys.is_empty() {
                self.nil();
                continue;
            }
            self.list(keys.len());
            for key in keys {
                match key {
                    ExtraKey::Text(text) => self.text(text),
                    ExtraKey::Other(raw) => self.bytes.extend_from_slice(raw),
                }
            }
        }
    }
}
