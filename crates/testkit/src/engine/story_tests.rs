//! The requests that caused the captured events, run again: the same story must come out.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tokio::time::Instant;

use super::pool::Identity;
use super::request::{Outlet, Sampling, Transfer, Work};
use super::*;
use crate::tokenizer::Token;

/// What can be compared between two engines: hashes by the order in which they first appear.
#[derive(Debug, PartialEq)]
enum Beat {
    Stored { hashes: Vec<usize>, parent: Option<usize>, extra: Vec<bool> },
    Removed(usize),
    Cleared,
}

#[derive(Default)]
struct Names(BTreeMap<u64, usize>);

impl Names {
    fn of(&mut self, hash: u64) -> usize {
        let next = self.0.len();
        *self.0.entry(hash).or_insert(next)
    }
}

fn captured() -> (Vec<Vec<Beat>>, BTreeMap<usize, Vec<Token>>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/vllm/kv_events/stream.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let (mut names, mut tokens) = (Names::default(), BTreeMap::new());
    let mut batches = Vec::new();
    for (seq, line) in text.lines().enumerate() {
        let message: Value = serde_json::from_str(line).unwrap();
        let mut beats = Vec::new();
        for event in message["payload"][1].as_array().unwrap() {
            let hashes: Vec<u64> = serde_json::from_value(event["block_hashes"].clone()).unwrap_or_default();
            beats.push(match event["type"].as_str().unwrap() {
                "BlockStored" => {
                    tokens.insert(seq, serde_json::from_value(event["token_ids"].clone()).unwrap());
                    let keys = event["extra_keys"].as_array().unwrap();
                    Beat::Stored {
                        hashes: hashes.iter().map(|hash| names.of(*hash)).collect(),
                        parent: event["parent_block_hash"].as_u64().map(|hash| names.of(hash)),
                        extra: keys.iter().map(|key| !key.is_null()).collect(),
                    }
                }
                "BlockRemoved" => Beat::Removed(names.of(hashes[0])),
                _ => Beat::Cleared,
            });
        }
        batches.push(beats);
    }
    (batches, tokens)
}

fn beats(names: &mut Names, events: &[KvEvent]) -> Vec<Beat> {
    let beat = |event: &KvEvent| match event {
        KvEvent::Stored(stored) => Beat::Stored {
            hashes: stored.hashes.iter().map(|hash| names.of(*hash)).collect(),
            parent: stored.parent.map(|hash| names.of(hash)),
            extra: stored.extra_keys.iter().map(|keys| !keys.is_empty()).collect(),
        },
        KvEvent::Removed { hash } => Beat::Removed(names.of(*hash)),
        KvEvent::Cleared => Beat::Cleared,
    };
    events.iter().map(beat).collect()
}

#[test]
fn the_captured_requests_cause_the_captured_events() {
    let (expected, tokens) = captured();
    let settings = Settings {
        block_size: 32,
        blocks: 24,
        prefix_caching: true,
        style: pool::Style::Table,
        running_max: 256,
        by_priority: false,
        model: crate::kv::Model::new(3, 0),
        hash_root: 77,
        connector: None,
    };
    let mut core = Core::new(settings);
    let mut names = Names::default();
    let mut story = Vec::new();
    let mut run = |core: &mut Core, prompt: Vec<Token>, max_tokens: usize, salt: Option<&str>| {
        let sampling =
            Sampling { max_tokens, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![], generator: None };
        let identity = Identity { salt: salt.map(str::to_owned), ..Identity::default() };
        let work = Work { id: "r".into(), prompt, identity, sampling, priority: 0, transfer: Transfer::None };
        core.submit(work, Outlet::new(Arc::default()));
        while core.busy() {
            let step = core.step(Instant::now());
            if !step.events.is_empty() {
                story.push(beats(&mut names, &step.events));
            }
        }
    };
    // The script of the capture: 91 tokens of text twice with 40 to generate, once more with a salt, five prompts of 181
    // tokens, a chat of 32 and a few more, a reset, and one short prompt.
    let fox = |tokens: &BTreeMap<usize, Vec<Token>>| {
        let mut prompt = tokens[&0].clone();
        prompt.extend(&tokens[&1][..27]);
        prompt
    };
    run(&mut core, fox(&tokens), 40, None);
    run(&mut core, fox(&tokens), 40, None);
    run(&mut core, fox(&tokens), 2, Some("tenant-7-salt"));
    for seq in 6..11 {
        let mut prompt = tokens[&seq].clone();
        prompt.extend([1230; 21]);
        run(&mut core, prompt, 4, None);
    }
    run(&mut core, tokens[&11].clone(), 12, None);
    assert!(core.reset_prefix_cache());
    run(&mut core, tokens[&13].clone(), 2, None);
    for (seq, (ours, real)) in story.iter().zip(&expected).enumerate() {
        assert_eq!(ours, real, "batch {seq}");
    }
    assert_eq!(story.len(), expected.len());
}
