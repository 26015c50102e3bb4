use bytes::Bytes;
use forebay_engine_events::{
    BLOCKS_MAX_DEFAULT, EngineHash, Removed, Stored,
    encode::{Dialect, encode},
    frames::{ReplyShape, publication, replay_end, replayed},
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_types::{BlockHash, Incarnation, Tier, TokenId, device_blocks};

use super::*;

const RANK: RankId = RankId { incarnation: Incarnation(7), dp_rank: 0 };
const BLOCK: u32 = 4;

fn settings() -> RankSettings {
    RankSettings {
        hasher: BlockHasher::new(HashKey::GOLDEN, BLOCK),
        model: "m".into(),
        engine_block_size_tokens: Some(BLOCK),
        blocks_max: BLOCKS_MAX_DEFAULT,
    }
}

fn feed() -> Feed {
    Feed::new(RANK, false, settings())
}

fn tokens(block: u64) -> Vec<TokenId> {
    (0..BLOCK).map(|token| block as u32 * 100 + token).collect()
}

fn stored(block: u64, parent: Option<u64>) -> EngineEvent {
    EngineEvent::Stored(Stored::plain(parent.map(EngineHash), vec![EngineHash(block)], tokens(block), BLOCK))
}

fn removed(block: u64) -> EngineEvent {
    EngineEvent::Removed(Removed { hashes: vec![EngineHash(block)], tier: Tier::Device, group: None })
}

fn payload(number: u64, events: Vec<EngineEvent>) -> Vec<u8> {
    encode(&EventBatch { time_seconds: 1000.0 + number as f64, events, dp_rank: Some(0) }, Dialect::VllmMap)
}

fn message(number: u64, events: Vec<EngineEvent>) -> Vec<Bytes> {
    publication("kv", number, payload(number, events)).map(Bytes::from).to_vec()
}

fn reply(number: u64, events: Vec<EngineEvent>) -> Vec<Bytes> {
    replayed(ReplyShape::WithTopic, "kv", number, payload(number, events))
        .into_iter()
        .map(Bytes::from)
        .collect()
}

/// The hash of a prompt of these blocks, as requests are hashed.
fn own(blocks: &[u64]) -> BlockHash {
    let hasher = BlockHasher::new(HashKey::GOLDEN, BLOCK);
    let tokens: Vec<_> = blocks.iter().flat_map(|block| tokens(*block)).collect();
    *hasher.chain(hasher.root("m", ""), &tokens).last().unwrap()
}

fn held(feed: &Feed) -> Vec<BlockHash> {
    let mut blocks: Vec<_> = device_blocks(&feed.snapshot().contents).collect();
    blocks.sort();
    blocks
}

fn sorted(mut blocks: Vec<BlockHash>) -> Vec<BlockHash> {
    blocks.sort();
    blocks
}

/// Batches as an index would apply them: numbers without gaps, and what is held at the end.
fn replay_into_a_set(batches: &[KvEventBatch], first: u64) -> Vec<BlockHash> {
    let mut blocks = std::collections::BTreeSet::new();
    for (index, batch) in batches.iter().enumerate() {
        assert_eq!((batch.rank, batch.sequence), (RANK, first + index as u64));
        for event in &batch.events {
            match event {
                KvEvent::Stored { hashes, .. } => blocks.extend(hashes.iter().copied()),
                KvEvent::Removed { hashes, .. } => blocks.retain(|block| !hashes.contains(block)),
                KvEvent::Groups(_) => {}
                KvEvent::Cleared => blocks.clear(),
            }
        }
    }
    blocks.into_iter().collect()
}

#[test]
fn batches_come_out_numbered_by_themselves() {
    let mut feed = feed();
    assert_eq!(feed.published(&message(0, vec![stored(1, None)])), Step::Taken);
    assert_eq!(feed.published(&message(1, vec![])), Step::Taken, "nothing for the index");
    assert_eq!(feed.published(&message(2, vec![stored(2, Some(1)), removed(1)])), Step::Taken);
    let out = feed.take();
    assert_eq!(replay_into_a_set(&out.batches, 0), [own(&[1, 2])]);
    assert_eq!(out.batches.len(), 2);
    assert_eq!((feed.snapshot().sequence_next, held(&feed)), (2, vec![own(&[1, 2])]));
    assert!(out.notes.is_empty() && feed.take().batches.is_empty());
}

#[test]
fn who_comes_late_learns_by_replay() {
    let mut feed = feed();
    let third = message(2, vec![stored(3, Some(2))]);
    assert_eq!(feed.published(&third), Step::Missing { from: 0 });
    assert_eq!(feed.replayed(&reply(0, vec![stored(1, None)])), Some(Step::Taken));
    assert_eq!(feed.replayed(&reply(1, vec![stored(2, Some(1))])), Some(Step::Taken));
    assert_eq!(feed.replayed(&reply(2, vec![stored(3, Some(2))])), Some(Step::Taken));
    let end: Vec<_> = replay_end(ReplyShape::WithTopic).into_iter().map(Bytes::from).collect();
    assert_eq!(feed.replayed(&end), None);
    assert_eq!(feed.published(&third), Step::Taken, "a duplicate");
    assert_eq!(held(&feed), sorted(vec![own(&[1]), own(&[1, 2]), own(&[1, 2, 3])]));
    assert!(feed.take().notes.is_empty());
}

/// What a replay no longer reaches is said, and not held against the engine.
#[test]
fn a_ring_that_is_too_short_starts_empty() {
    let mut feed = feed();
    let blocks = 2 * MISPLACED_MIN;
    let first = reply(500, vec![stored(500, Some(499)), removed(7)]);
    assert_eq!(feed.replayed(&first), Some(Step::Missing { from: 0 }));
    assert_eq!(feed.give_up_gap_of_replay(&first), Step::Taken);
    for number in 501..500 + blocks {
        let orphan = stored(number, Some(number - 1));
        assert_eq!(feed.replayed(&reply(number, vec![orphan, removed(7)])), Some(Step::Taken));
    }
    assert_eq!(feed.replayed(&reply(500 + blocks, vec![stored(1, None)])), Some(Step::Taken));
    let out = feed.take();
    assert_eq!(out.notes.len(), 1, "{:?}", out.notes);
    assert!(out.notes[0].contains("KV events 0 to 499 of rank 0 are lost"), "{}", out.notes[0]);
    assert_eq!(replay_into_a_set(&out.batches, 0), [own(&[1])]);
}

#[test]
fn an_unhealable_gap_empties_the_rank_and_goes_on() {
    let mut feed = feed();
    assert_eq!(feed.published(&message(0, vec![stored(1, None)])), Step::Taken);
    let late = message(5, vec![stored(9, None)]);
    assert_eq!(feed.published(&late), Step::Missing { from: 1 });
    assert_eq!((feed.lost(), feed.is_lossy()), (0, false));
    assert_eq!(feed.give_up_gap(&late), Step::Taken);
    assert_eq!((feed.lost(), feed.is_lossy()), (4, true));
    assert_eq!(feed.published(&message(6, vec![stored(2, Some(1)), removed(1)])), Step::Taken);
    let out = feed.take();
    assert_eq!(replay_into_a_set(&out.batches, 0), [own(&[9])]);
    assert_eq!(held(&feed), [own(&[9])]);
    assert!(out.notes[0].contains("KV events 1 to 4"), "{:?}", out.notes);
    assert_eq!(feed.published(&message(7, vec![EngineEvent::Cleared])), Step::Taken);
    assert_eq!((feed.lost(), feed.is_lossy()), (4, false), "nothing is cached, so nothing is unknown");
}

#[test]
fn a_smaller_number_is_another_life() {
    let mut feed = feed();
    for number in 0..3 {
        assert_eq!(feed.published(&message(number, vec![])), Step::Taken);
    }
    let mut restarted = message(0, vec![]);
    restarted[2] =
        encode(&EventBatch { time_seconds: 9999.0, events: vec![], dp_rank: None }, Dialect::VllmMap).into();
    assert_eq!(feed.published(&restarted), Step::Restarted);
}

fn garbage(number: u64) -> Vec<Bytes> {
    publication("kv", number, vec![0xc1; 9]).map(Bytes::from).to_vec()
}

#[test]
fn garbage_beside_the_stream_loses_nothing() {
    let mut feed = feed();
    assert_eq!(feed.published(&message(0, vec![stored(1, None)])), Step::Taken);
    assert_eq!(feed.published(&[Bytes::from_static(b"?")]), Step::Taken);
    assert_eq!(feed.published(&garbage(u32::MAX.into())), Step::Taken);
    assert_eq!(feed.published(&message(1, vec![stored(2, Some(1))])), Step::Taken);
    assert_eq!(held(&feed), sorted(vec![own(&[1]), own(&[1, 2])]));
    assert_eq!(feed.take().notes.len(), 2);
}

#[test]
fn a_garbled_batch_is_lost_only_if_the_replay_has_it_so() {
    let mut feed = feed();
    assert_eq!(feed.published(&message(0, vec![stored(1, None)])), Step::Taken);
    assert_eq!(feed.published(&garbage(1)), Step::Taken);
    let third = message(2, vec![stored(3, None)]);
    assert_eq!(feed.published(&third), Step::Missing { from: 1 });
    let mut healed = Feed::new(RANK, false, settings());
    assert_eq!(healed.replayed(&reply(0, vec![stored(1, None)])), Some(Step::Taken));
    assert_eq!(healed.replayed(&reply(1, vec![stored(2, Some(1))])), Some(Step::Taken));
    assert_eq!(healed.published(&third), Step::Taken);
    assert_eq!(held(&healed), sorted(vec![own(&[1]), own(&[1, 2]), own(&[3])]));
    let same: Vec<_> =
        replayed(ReplyShape::WithoutTopic, "", 1, vec![0xc1; 9]).into_iter().map(Bytes::from).collect();
    assert_eq!(feed.replayed(&same), Some(Step::Taken));
    assert_eq!(feed.published(&third), Step::Taken);
    let out = feed.take();
    assert_eq!(replay_into_a_set(&out.batches, 0), [own(&[3])]);
    assert!(
        out.notes.iter().any(|note| note.contains("KV events 1 to 1 of rank 0 are lost")),
        "{:?}",
        out.notes
    );
}

#[test]
fn who_speaks_garbage_for_long_is_no_longer_heard() {
    let mut feed = feed();
    assert_eq!(feed.published(&message(0, vec![stored(1, None)])), Step::Taken);
    let verdicts: Vec<_> = (1..20).map(|number| feed.published(&garbage(number))).collect();
    let last = verdicts.iter().find(|step| **step != Step::Taken).unwrap();
    let Step::Distrusted(why) = last else { panic!("{last:?}") };
    assert!(why.starts_with("KV events of rank 0 cannot be right: "), "{why}");
    assert_eq!(replay_into_a_set(&feed.take().batches, 0), []);
}

#[test]
fn another_block_size_fences_the_engine() {
    let mut feed = feed();
    assert_eq!(feed.published(&message(0, vec![stored(1, None)])), Step::Taken);
    let EngineEvent::Stored(mut wrong) = stored(2, None) else { unreachable!() };
    wrong.block_size_tokens = 2 * BLOCK;
    wrong.tokens.extend([7; BLOCK as usize]);
    let Step::Fenced(why) = feed.published(&message(1, vec![EngineEvent::Stored(wrong)])) else {
        panic!("it was believed")
    };
    assert!(why.contains("blocks of 8 tokens, but it was declared with 4"), "{why}");
    assert_eq!(held(&feed), []);
}

#[test]
fn too_many_blocks_out_of_place_are_a_lie() {
    let mut feed = feed();
    let steps: Vec<_> = (0..2 * MISPLACED_MIN)
        .map(|number| feed.published(&message(number, vec![stored(number + 5, Some(number + 1_000_000))])))
        .collect();
    let lie = steps.iter().position(|step| matches!(step, Step::Distrusted(_))).unwrap();
    assert_eq!(lie as u64, MISPLACED_MIN, "one more than is borne");
    assert_eq!(feed.take().notes.len(), 1, "told once");
}

#[test]
fn a_few_blocks_out_of_place_are_told_once() {
    let mut feed = feed();
    for number in 0..20 {
        assert_eq!(feed.published(&message(number, vec![removed(number + 1)])), Step::Taken);
    }
    let notes = feed.take().notes;
    assert_eq!(notes.len(), 1, "{notes:?}");
}

#[test]
fn one_rank_of_many_must_be_the_one_that_it_says() {
    let two = RankId { dp_rank: 1, ..RANK };
    let wrong = message(0, vec![stored(1, None)]);
    assert!(matches!(Feed::new(two, true, settings()).published(&wrong), Step::Distrusted(_)));
    // A single rank of a larger group behind its own server counts as 0 here, whatever it is there.
    assert_eq!(Feed::new(two, false, settings()).published(&wrong), Step::Taken);
}
