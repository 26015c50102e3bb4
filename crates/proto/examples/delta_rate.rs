//! Measures what a gateway does with the cache events of agents: decode the message, convert it, apply it to the index.
//! Prints one JSON object a line.
//!
//! `cargo run --release -p forebay-proto --example delta_rate`
//!
//! An operation is one block stored or removed. Seconds are CPU seconds of the one thread that does it. `decode_convert`
//! is this crate's share; `with_index` adds `KvIndex::apply` and `reset`, the whole way from bytes to an answerable index.
#![allow(clippy::print_stdout, reason = "its output is what an example is for")]

use std::{error::Error, fs, hint::black_box};

use forebay_kv_index::{Applied, IndexLimits, KvIndex};
use forebay_proto::{Life, SnapshotReader, pack_deltas, snapshot_chunks, v1};
use forebay_types::{BlockHash, Incarnation, KvEvent, KvEventBatch, RankId, Tier};
use prost::Message;

const LIFE: Life = Life { incarnation: Incarnation(1), dp_ranks: 1 };
const RANK: RankId = RankId { incarnation: Incarnation(1), dp_rank: 0 };
/// What one rank caches while it is measured: the events store and remove, so that the index keeps its size.
const CACHED_BLOCKS: u64 = 200_000;
const OPERATIONS: u64 = 8_000_000;
const SNAPSHOT_BLOCKS: u64 = 4_000_000;

type Answer<T> = Result<T, Box<dyn Error>>;

fn main() -> Answer<()> {
    // Decoding steps of a busy rank: many sequences, one block each now and then. Prefills: chains.
    for (shape, blocks_per_event, events_per_batch) in
        [("decode steps", 1, 8), ("short prefills", 32, 4), ("long prefills", 512, 2)]
    {
        deltas(shape, blocks_per_event, events_per_batch)?;
    }
    snapshot()
}

/// Spreads numbers as a hash would.
fn hash(n: u64) -> BlockHash {
    let mixed = (n ^ (n >> 31)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    BlockHash((mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9))
}

/// Encoded messages that store blocks from 0 on and remove each `CACHED_BLOCKS` later.
fn encoded(blocks_per_event: u64, events_per_batch: u64) -> Answer<Vec<Vec<u8>>> {
    let mut batches = Vec::new();
    let (mut next, mut operations) = (0, 0);
    while operations < OPERATIONS {
        let mut events = Vec::new();
        for _ in 0..events_per_batch {
            let chain = next..next + blocks_per_event;
            next = chain.end;
            let parent = chain.start.checked_sub(1).map(hash);
            events.push(KvEvent::Stored {
                parent,
                hashes: chain.clone().map(hash).collect(),
                tier: Tier::Device,
                group: 0,
            });
            operations += blocks_per_event;
            if chain.start >= CACHED_BLOCKS {
                let hashes = chain.map(|n| hash(n - CACHED_BLOCKS)).collect();
                events.push(KvEvent::Removed { hashes, tier: Tier::Device, group: 0 });
                operations += blocks_per_event;
            }
        }
        let batch = KvEventBatch { rank: RANK, sequence: batches.len() as u64, events };
        batches.push(v1::KvDelta::try_from(batch)?);
    }
    // Four batches a message: an agent that is a little behind.
    let messages = batches.chunks(4).flat_map(|batches| pack_deltas(batches.to_vec()));
    Ok(messages
        .map(|deltas| v1::FromAgent::from(v1::from_agent::Body::KvDeltas(deltas)).encode_to_vec())
        .collect())
}

fn deltas(shape: &str, blocks_per_event: u64, events_per_batch: u64) -> Answer<()> {
    let messages = encoded(blocks_per_event, events_per_batch)?;
    let bytes: usize = messages.iter().map(Vec::len).sum();
    let run = |index: Option<&KvIndex>| -> Answer<f64> {
        let mut operations = 0_u64;
        let started = cpu_seconds()?;
        for message in &messages {
            let message = v1::FromAgent::decode(message.as_slice())?;
            let Some(v1::from_agent::Body::KvDeltas(deltas)) = message.body else {
                return Err("other body".into());
            };
            for delta in deltas.deltas {
                let batch = black_box(LIFE.kv_batch(delta)?);
                operations += batch.events.iter().map(blocks).sum::<u64>();
                if let Some(index) = index
                    && index.apply(&batch) != Applied::Ok
                {
                    return Err("the index lost its place".into());
                }
            }
        }
        Ok(operations as f64 / (cpu_seconds()? - started))
    };
    let decode_convert = run(None)?;
    let with_index = run(Some(&KvIndex::new(IndexLimits::default())))?;
    println!(
        "{{\"shape\":\"{shape}\",\"blocks_per_event\":{blocks_per_event},\"messages\":{},\"message_bytes\":{},\
         \"decode_convert_per_cpu_second\":{decode_convert:.0},\"with_index_per_cpu_second\":{with_index:.0}}}",
        messages.len(),
        bytes / messages.len(),
    );
    Ok(())
}

fn blocks(event: &KvEvent) -> u64 {
    match event {
        KvEvent::Stored { hashes, .. } | KvEvent::Removed { hashes, .. } => hashes.len() as u64,
        KvEvent::Groups(_) | KvEvent::Cleared => 0,
    }
}

fn snapshot() -> Answer<()> {
    // Conversations of a thousand tokens or so.
    let chain = |first: u64| KvEvent::Stored {
        parent: None,
        hashes: (first..SNAPSHOT_BLOCKS.min(first + 64)).map(hash).collect(),
        tier: Tier::Device,
        group: 0,
    };
    let chains = (0..SNAPSHOT_BLOCKS).step_by(64).map(chain).collect();
    let pieces: Vec<Vec<u8>> =
        snapshot_chunks(0, 0, chains).into_iter().map(|piece| piece.encode_to_vec()).collect();
    let started = cpu_seconds()?;
    let mut reader = SnapshotReader::default();
    let mut whole = None;
    for piece in &pieces {
        whole = reader.take(&LIFE, v1::KvSnapshot::decode(piece.as_slice())?)?;
    }
    let whole = whole.ok_or("no last piece")?;
    let read = cpu_seconds()? - started;
    let index = KvIndex::new(IndexLimits::default());
    let applied = index.reset(whole.rank, whole.sequence_next, whole.contents);
    let all = cpu_seconds()? - started;
    if applied != Applied::Ok || index.stats().blocks != SNAPSHOT_BLOCKS {
        return Err("the index did not take the snapshot".into());
    }
    println!(
        "{{\"shape\":\"snapshot\",\"blocks\":{SNAPSHOT_BLOCKS},\"messages\":{},\
         \"decode_convert_per_cpu_second\":{:.0},\"with_index_per_cpu_second\":{:.0}}}",
        pieces.len(),
        SNAPSHOT_BLOCKS as f64 / read,
        SNAPSHOT_BLOCKS as f64 / all,
    );
    Ok(())
}

fn cpu_seconds() -> Answer<f64> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds: f64 = text.split_whitespace().next().ok_or("an empty schedstat")?.parse()?;
    Ok(nanoseconds / 1e9)
}
