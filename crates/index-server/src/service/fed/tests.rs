use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_types::Incarnation;

use super::*;

const RANK: RankId = RankId { incarnation: Incarnation(7), dp_rank: 0 };

fn rank() -> FedRank {
    let hasher = BlockHasher::new(HashKey::GOLDEN, 2);
    let settings =
        RankSettings { hasher, model: "m".into(), engine_block_size_tokens: Some(2), blocks_max: 100 };
    FedRank::new(RANK, settings)
}

fn stored(hashes: &[u64], tokens: &[TokenId], block_size_tokens: u32) -> FedEvent {
    FedEvent::Stored(FedStored {
        parent: None,
        hashes: hashes.to_vec(),
        tokens: tokens.to_vec(),
        block_size_tokens,
        salt: None,
        lora: None,
        tier: Tier::Device,
        layers: FedLayers::default(),
    })
}

fn take(rank: &mut FedRank, sequence: u64, events: Vec<FedEvent>) -> Result<Taken, Refused> {
    rank.take(Instant::now(), FedBatch { sequence, events })
}

#[test]
fn an_engines_hashes_become_ours() {
    let mut rank = rank();
    let taken = take(&mut rank, 0, vec![stored(&[70, 71], &[1, 2, 3, 4], 2)]).unwrap();
    let hasher = BlockHasher::new(HashKey::GOLDEN, 2);
    let hashes = hasher.chain(hasher.root("m", ""), &[1, 2, 3, 4]);
    let events = vec![KvEvent::Stored { parent: None, hashes: hashes.clone(), tier: Tier::Device, group: 0 }];
    let batch = KvEventBatch { rank: RANK, sequence: 0, events };
    assert_eq!(taken, Taken::Apply { anew: false, batch, notes: Vec::new() });
    let mut cached = rank.cached();
    cached.sort();
    let mut expected = hashes;
    expected.sort();
    assert_eq!(cached, expected);
    let Taken::Apply { notes, .. } =
        take(&mut rank, 1, vec![FedEvent::Removed { hashes: vec![99], tier: Tier::Device, group: None }])
            .unwrap()
    else {
        panic!("it counts")
    };
    assert!(notes[0].contains("were removed that were not stored"), "{notes:?}");
}

#[test]
fn another_block_size_than_registered_is_refused() {
    let refused = take(&mut rank(), 0, vec![stored(&[70], &[1, 2, 3], 3)]).unwrap_err();
    assert_eq!(refused.param.as_deref(), Some("events[0].block_size_tokens"));
    assert!(refused.message.contains("registered with 2"), "{refused}");
}

#[test]
fn a_clearing_within_a_batch_is_told_in_its_place() {
    let mut rank = rank();
    let events = vec![stored(&[1], &[], 0), FedEvent::Cleared, stored(&[2], &[5, 6], 2), FedEvent::Cleared];
    let Taken::Apply { batch, .. } = take(&mut rank, 0, events).unwrap() else { panic!("it counts") };
    assert_eq!(batch.events.iter().filter(|event| **event == KvEvent::Cleared).count(), 2);
    assert_eq!(batch.events.len(), 4);
    assert_eq!(rank.cached(), []);
}
