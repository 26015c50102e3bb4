//! The captured payloads are decoded and encoded again: not a byte may differ.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::msgpack;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/vllm/kv_events").join(name)
}

fn event(value: &Value) -> KvEvent {
    let hashes = || -> Vec<u64> {
        value["block_hashes"].as_array().unwrap().iter().map(|hash| hash.as_u64().unwrap()).collect()
    };
    match value["type"].as_str().unwrap() {
        "AllBlocksCleared" => KvEvent::Cleared,
        "BlockRemoved" => {
            assert_eq!(hashes().len(), 1, "a removal names one hash");
            KvEvent::Removed { hash: hashes()[0] }
        }
        _ => KvEvent::Stored(Stored {
            hashes: hashes(),
            parent: value["parent_block_hash"].as_u64(),
            tokens: serde_json::from_value(value["token_ids"].clone()).unwrap(),
            block_size: value["block_size"].as_u64().unwrap() as usize,
            adapter: value["lora_name"].as_str().map(str::to_owned),
            salt: None,
            extra_keys: value["extra_keys"]
                .as_array()
                .unwrap()
                .iter()
                .map(|keys| {
                    serde_json::from_value::<Option<Vec<String>>>(keys.clone()).unwrap().unwrap_or_default()
                })
                .collect(),
            session: None,
        }),
    }
}

fn batch(payload: &Value) -> Batch {
    Batch {
        time: payload[0].as_f64().unwrap(),
        events: payload[1].as_array().unwrap().iter().map(event).collect(),
        rank: payload[2].as_u64().unwrap() as u32,
    }
}

#[test]
fn captured_payloads_are_encoded_again_byte_for_byte() {
    let stream = std::fs::read_to_string(fixture("stream.jsonl")).unwrap();
    let mut seen = 0;
    for line in stream.lines() {
        let message: Value = serde_json::from_str(line).unwrap();
        let seq = message["seq"].as_u64().unwrap();
        let end = if seq == 13 { "_all_blocks_cleared" } else { "" };
        let bytes = std::fs::read(fixture(&format!("seq{seq:03}{end}.payload.msgpack"))).unwrap();
        let mut rest = bytes.as_slice();
        let decoded = msgpack::read(&mut rest).unwrap();
        assert!(rest.is_empty());
        // The JSON form's time is not exact to the last bit; everything else is.
        assert_eq!((&decoded[1], &decoded[2]), (&message["payload"][1], &message["payload"][2]), "seq {seq}");
        assert!((decoded[0].as_f64().unwrap() - message["payload"][0].as_f64().unwrap()).abs() < 1e-6);
        assert_eq!(encode(&batch(&decoded), Shape::Maps, HashFormat::Unsigned), bytes, "seq {seq}");
        seen += 1;
    }
    assert_eq!(seen, 14);
}

#[test]
fn the_second_rank_names_itself() {
    let line = std::fs::read_to_string(fixture("dp2/rank1.jsonl")).unwrap();
    let message: Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
    let ours = encode(&batch(&message["payload"]), Shape::Maps, HashFormat::Unsigned);
    assert_eq!(ours.len() as u64, message["payload_bytes"].as_u64().unwrap());
    assert_eq!(msgpack::read(&mut ours.as_slice()).unwrap(), message["payload"]);
}

fn sample() -> Batch {
    let stored = Stored {
        hashes: vec![u64::MAX, 5],
        parent: Some(9),
        tokens: vec![1, 2, 3, 4],
        block_size: 2,
        adapter: Some("tuned".into()),
        salt: Some("tenant".into()),
        extra_keys: vec![vec!["tuned".into(), "tenant".into()], vec!["tuned".into()]],
        session: None,
    };
    Batch {
        time: 1.5,
        events: vec![KvEvent::Removed { hash: u64::MAX }, KvEvent::Stored(stored), KvEvent::Cleared],
        rank: 3,
    }
}

#[test]
fn older_versions_write_arrays() {
    let bytes = encode(&sample(), Shape::Arrays, HashFormat::Unsigned);
    let stored = json!([
        "BlockStored",
        [u64::MAX, 5],
        9,
        [1, 2, 3, 4],
        2,
        1,
        "GPU",
        "tuned",
        [["tuned", "tenant"], ["tuned"]]
    ]);
    let expected = json!([1.5, [["BlockRemoved", [u64::MAX], "GPU"], stored, ["AllBlocksCleared"]], 3]);
    assert_eq!(msgpack::read(&mut bytes.as_slice()).unwrap(), expected);
}

#[test]
fn sglang_hashes_are_signed_and_vllm_hashes_may_be_bytes() {
    let sglang = encode(&sample(), Shape::Sglang, HashFormat::Signed);
    assert!(sglang.windows(2).any(|pair| pair == [0x91, 0xFF]), "u64::MAX is -1, one byte");
    let bytes = encode(&sample(), Shape::Maps, HashFormat::Bytes);
    assert!(bytes.windows(3).any(|head| head == [0x91, 0xC4, 32]), "bin 8 of 32 bytes");
}
