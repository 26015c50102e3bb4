//! KV event batches as vLLM 0.24 to 0.32 publish them: msgpack, events as maps, hashes as integers.

use std::sync::Arc;

use forebay_types::{BlockHash, TokenId};
use rmp::encode;

/// `medium` of the engine's own pool.
const MEDIUM: &str = "GPU";
/// All blocks are in the one group.
const GROUP: u64 = 0;

/// One event of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WireEvent {
    /// `BlockStored`: a chain of blocks.
    Stored {
        hashes: Vec<BlockHash>,
        parent: Option<BlockHash>,
        /// Of all blocks, one after another.
        tokens: Vec<TokenId>,
        /// One entry a block.
        salts: Vec<Option<Arc<str>>>,
    },
    /// `BlockRemoved`. vLLM publishes one for each block.
    Removed(BlockHash),
    /// `AllBlocksCleared`.
    Cleared,
}

/// The payload frame of one batch: `[seconds, [event, ...], dp_rank]`.
pub(crate) fn batch(
    unix_seconds: f64,
    events: &[WireEvent],
    block_size_tokens: u32,
    dp_rank: u16,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + events.len() * 96);
    write(&mut out, unix_seconds, events, block_size_tokens, dp_rank)
        .expect("writing to a vector does not fail");
    out
}

type Written = Result<(), encode::ValueWriteError<std::io::Error>>;

fn write(
    out: &mut Vec<u8>,
    unix_seconds: f64,
    events: &[WireEvent],
    block_size: u32,
    dp_rank: u16,
) -> Written {
    encode::write_array_len(out, 3)?;
    encode::write_f64(out, unix_seconds)?;
    encode::write_array_len(out, events.len() as u32)?;
    for event in events {
        match event {
            WireEvent::Stored { hashes, parent, tokens, salts } => {
                stored(out, hashes, *parent, tokens, salts, block_size)?;
            }
            WireEvent::Removed(hash) => {
                kind(out, 4, "BlockRemoved")?;
                key(out, "block_hashes")?;
                integers(out, [hash.0].into_iter())?;
                key(out, "medium")?;
                encode::write_str(out, MEDIUM)?;
                key(out, "group_idx")?;
                encode::write_uint(out, GROUP)?;
            }
            WireEvent::Cleared => kind(out, 1, "AllBlocksCleared")?,
        }
    }
    encode::write_uint(out, u64::from(dp_rank))?;
    Ok(())
}

fn stored(
    out: &mut Vec<u8>,
    hashes: &[BlockHash],
    parent: Option<BlockHash>,
    tokens: &[TokenId],
    salts: &[Option<Arc<str>>],
    block_size: u32,
) -> Written {
    kind(out, 11, "BlockStored")?;
    key(out, "block_hashes")?;
    integers(out, hashes.iter().map(|hash| hash.0))?;
    key(out, "parent_block_hash")?;
    match parent {
        Some(parent) => {
            encode::write_uint(out, parent.0)?;
        }
        None => nil(out)?,
    }
    key(out, "token_ids")?;
    integers(out, tokens.iter().map(|token| u64::from(*token)))?;
    key(out, "block_size")?;
    encode::write_uint(out, u64::from(block_size))?;
    key(out, "lora_id")?;
    nil(out)?;
    key(out, "medium")?;
    encode::write_str(out, MEDIUM)?;
    key(out, "lora_name")?;
    nil(out)?;
    key(out, "extra_keys")?;
    encode::write_array_len(out, salts.len() as u32)?;
    for salt in salts {
        match salt {
            Some(salt) => {
                encode::write_array_len(out, 1)?;
                encode::write_str(out, salt)?;
            }
            None => nil(out)?,
        }
    }
    key(out, "group_idx")?;
    encode::write_uint(out, GROUP)?;
    key(out, "kv_cache_spec_kind")?;
    encode::write_str(out, "full_attention")
}

fn kind(out: &mut Vec<u8>, keys: u32, kind: &str) -> Written {
    encode::write_map_len(out, keys)?;
    key(out, "type")?;
    encode::write_str(out, kind)
}

fn key(out: &mut Vec<u8>, key: &str) -> Written {
    encode::write_str(out, key)
}

fn nil(out: &mut Vec<u8>) -> Written {
    encode::write_nil(out).map_err(encode::ValueWriteError::InvalidMarkerWrite)
}

fn integers(out: &mut Vec<u8>, values: impl ExactSizeIterator<Item = u64>) -> Written {
    encode::write_array_len(out, values.len() as u32)?;
    for value in values {
        encode::write_uint(out, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Captured from vLLM 0.32 (`tests/fixtures`): what is written here must be those bytes.
    fn captured(name: &str) -> (Vec<u8>, serde_json::Value) {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kv_events");
        let bytes = std::fs::read(folder.join(format!("{name}.payload.msgpack"))).unwrap();
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
        (bytes, serde_json::from_str(&text).unwrap())
    }

    fn event(json: &serde_json::Value) -> WireEvent {
        let hash = |value: &serde_json::Value| BlockHash(value.as_u64().unwrap());
        let list = |key: &str| json[key].as_array().unwrap().iter();
        match json["type"].as_str().unwrap() {
            "BlockStored" => WireEvent::Stored {
                hashes: list("block_hashes").map(hash).collect(),
                parent: json["parent_block_hash"].as_u64().map(BlockHash),
                tokens: list("token_ids").map(|token| token.as_u64().unwrap() as TokenId).collect(),
                salts: list("extra_keys").map(|keys| keys[0].as_str().map(Into::into)).collect(),
            },
            "BlockRemoved" => WireEvent::Removed(hash(&json["block_hashes"][0])),
            "AllBlocksCleared" => WireEvent::Cleared,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn batches_are_the_bytes_that_vllm_publishes() {
        for name in ["seq000", "seq002", "seq005", "seq009", "seq012", "seq013_all_blocks_cleared"] {
            let (bytes, payload) = captured(name);
            let events: Vec<WireEvent> = payload[1].as_array().unwrap().iter().map(event).collect();
            // From the bytes: serde_json's numbers are not exact to the last bit.
            let seconds = f64::from_be_bytes(bytes[2..10].try_into().unwrap());
            let ours = batch(seconds, &events, 32, 0);
            assert!(ours == bytes, "{name}: {} bytes differ from {}", ours.len(), bytes.len());
        }
    }
}
