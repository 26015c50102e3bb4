use std::collections::BTreeSet;

use forebay_types::{BlockHash, Tier, TokenId};
use proptest::prelude::*;

use super::*;

const BLOCK: u32 = 4;

fn service() -> Service {
    Service::new(ServiceSettings { block_size_tokens: BLOCK, ..ServiceSettings::default() })
}

fn fed(service: &Service, name: &str, dp_ranks: u32) {
    let spec = EngineSpec { name: name.into(), model: "m".into(), dp_ranks, ..EngineSpec::default() };
    assert!(service.register(spec.check().unwrap()).unwrap().is_some());
}

fn tokens(blocks: &[u32]) -> Vec<TokenId> {
    blocks.iter().flat_map(|block| (0..BLOCK).map(move |token| block * 100 + token)).collect()
}

/// Our hashes of a prompt of these blocks.
fn chain(service: &Service, blocks: &[u32]) -> Vec<u64> {
    let hasher = service.hasher();
    hasher.chain(hasher.root("m", ""), &tokens(blocks)).into_iter().map(|BlockHash(hash)| hash).collect()
}

fn stored(parent: Option<u64>, hashes: &[u64]) -> FedEvent {
    FedEvent::Stored(FedStored { parent, ..own_stored(hashes) })
}

/// A chain from a prompt's beginning, by our hashes.
fn own_stored(hashes: &[u64]) -> FedStored {
    FedStored {
        parent: None,
        hashes: hashes.to_vec(),
        tokens: Vec::new(),
        block_size_tokens: 0,
        salt: None,
        lora: None,
        tier: Tier::Device,
        layers: FedLayers::default(),
    }
}

/// By an engine's hashes.
fn announced(parent: Option<u64>, hashes: &[u64], blocks: &[u32]) -> FedEvent {
    FedEvent::Stored(FedStored {
        parent,
        hashes: hashes.to_vec(),
        tokens: tokens(blocks),
        block_size_tokens: BLOCK,
        salt: None,
        lora: None,
        tier: Tier::Device,
        layers: FedLayers::default(),
    })
}

fn removed(hashes: &[u64]) -> FedEvent {
    FedEvent::Removed { hashes: hashes.to_vec(), tier: Tier::Device, group: None }
}

fn publish(
    service: &Service,
    to: (&str, &str, u32),
    sequence: u64,
    events: Vec<FedEvent>,
) -> Result<Published, &'static str> {
    let (engine, life, dp_rank) = to;
    let to = Recipient { engine, life, dp_rank };
    let batch = FedBatch { sequence, events };
    service.publish(to, batch, Instant::now()).map_err(|refused| refused.code)
}

fn ok(service: &Service, to: (&str, &str, u32), sequence: u64, events: Vec<FedEvent>) {
    assert_eq!(publish(service, to, sequence, events).map(|it| it.applied), Ok(1));
}

/// Who holds how many blocks, best first.
fn held(service: &Service, blocks: &[u32]) -> Vec<(String, u16, u32)> {
    let by_tokens =
        Prefix::Tokens { model: "m".into(), tokens: tokens(blocks), salt: String::new(), lora: None };
    let hashes = chain(service, blocks).into_iter().map(BlockHash).collect();
    let by_tokens = service.query(by_tokens, usize::MAX).unwrap();
    let by_hashes = service.query(Prefix::Hashes { model: None, hashes }, usize::MAX).unwrap();
    assert_eq!(by_tokens, by_hashes);
    let one = |overlap: Overlap| (overlap.engine.as_str().to_owned(), overlap.dp_rank, overlap.tiers.device);
    by_tokens.ranks.into_iter().map(one).collect()
}

fn of(name: &str, dp_rank: u16, blocks: u32) -> (String, u16, u32) {
    (name.to_owned(), dp_rank, blocks)
}

#[test]
fn the_best_rank_comes_first() {
    let service = service();
    fed(&service, "a", 2);
    fed(&service, "b", 1);
    let hashes = chain(&service, &[1, 2, 3]);
    ok(&service, ("a", "", 0), 0, vec![stored(None, &hashes[..1])]);
    ok(&service, ("a", "", 1), 0, vec![stored(None, &hashes)]);
    ok(&service, ("b", "", 0), 0, vec![announced(None, &[7, 8], &[1, 2])]);
    assert_eq!(held(&service, &[1, 2, 3, 4]), [of("a", 1, 3), of("b", 0, 2), of("a", 0, 1)]);
    let best = Prefix::Hashes { model: None, hashes: hashes.into_iter().map(BlockHash).collect() };
    assert_eq!(service.query(best, 1).unwrap().ranks.len(), 1);
    ok(&service, ("b", "", 0), 1, vec![removed(&[8])]);
    assert_eq!(held(&service, &[1, 2]), [of("a", 1, 2), of("a", 0, 1), of("b", 0, 1)]);
    assert_eq!(held(&service, &[9]), []);
}

#[test]
fn models_salts_and_adapters_are_kept_apart() {
    let service = service();
    fed(&service, "a", 1);
    let salted = |salt: Option<&str>, lora: Option<&str>, hash| match announced(None, &[hash], &[1]) {
        FedEvent::Stored(it) => {
            FedEvent::Stored(FedStored { salt: salt.map(Into::into), lora: lora.map(Into::into), ..it })
        }
        other => other,
    };
    ok(&service, ("a", "", 0), 0, vec![salted(Some("s"), None, 1), salted(None, Some("l"), 2)]);
    let check = |model: &str, salt: &str, lora: Option<&str>, expected: Result<usize, &str>| {
        let lora = lora.map(ToOwned::to_owned);
        let prefix = Prefix::Tokens { model: model.into(), tokens: tokens(&[1]), salt: salt.into(), lora };
        let found = service.query(prefix, usize::MAX);
        assert_eq!(found.map(|it| it.ranks.len()).map_err(|refused| refused.code), expected);
    };
    check("m", "", None, Ok(0));
    check("m", "s", None, Ok(1));
    check("m", "t", None, Ok(0));
    check("m", "", Some("l"), Ok(1));
    check("m", "s", Some("l"), Ok(0));
    check("n", "", None, Err("model_not_found"));
    check("", "", None, Err("invalid_value"));
    service.unregister("a").unwrap();
    check("m", "s", None, Err("model_not_found"));
}

#[test]
fn a_gap_empties_a_rank_until_it_is_cleared_or_told_whole() {
    let service = service();
    fed(&service, "a", 1);
    let to = ("a", "", 0);
    let hashes = chain(&service, &[1, 2]);
    ok(&service, to, 0, vec![stored(None, &hashes)]);
    let again = publish(&service, to, 0, vec![stored(None, &hashes)]).unwrap();
    assert_eq!((again.applied, again.repeated), (0, 1));
    assert_eq!(publish(&service, to, 2, vec![]), Err("sequence_gap"));
    assert_eq!(held(&service, &[1, 2]), []);
    let state = || service.status(Instant::now())[0].state;
    assert_eq!(state(), State::Stale);
    assert_eq!(
        publish(&service, to, 1, vec![]),
        Err("sequence_gap"),
        "the one that was missing comes too late"
    );
    ok(&service, to, 5, vec![stored(None, &hashes), FedEvent::Cleared, stored(None, &hashes[..1])]);
    assert_eq!((held(&service, &[1, 2]), state()), (vec![of("a", 0, 1)], State::Following));
    assert_eq!(service.status(Instant::now())[0].ranks[0].batches_lost, 4);

    assert_eq!(publish(&service, to, 9, vec![]), Err("sequence_gap"));
    let whole = vec![own_stored(&hashes)];
    let to_a = Recipient { engine: "a", life: "", dp_rank: 0 };
    service.snapshot(to_a, 10, whole, Instant::now()).unwrap();
    assert_eq!((held(&service, &[1, 2]), state()), (vec![of("a", 0, 2)], State::Following));
    ok(&service, to, 10, vec![removed(&hashes[1..])]);
    assert_eq!(held(&service, &[1, 2]), [of("a", 0, 1)]);
}

#[test]
fn what_comes_late_from_a_life_that_is_over_never_counts() {
    let service = service();
    fed(&service, "a", 1);
    let hashes = chain(&service, &[1, 2]);
    ok(&service, ("a", "first", 0), 0, vec![stored(None, &hashes)]);
    let before = service.status(Instant::now())[0].incarnation;
    ok(&service, ("a", "second", 0), 0, vec![]);
    assert_eq!(held(&service, &[1, 2]), []);
    let status = &service.status(Instant::now())[0];
    assert!(status.incarnation > before && status.restarts == 1);
    for sequence in [0, 1] {
        let late = publish(&service, ("a", "first", 0), sequence, vec![stored(None, &hashes)]);
        assert_eq!(late, Err("life_is_over"));
    }
    ok(&service, ("a", "", 0), 1, vec![stored(None, &hashes[..1])]);
    assert_eq!(held(&service, &[1, 2]), [of("a", 0, 1)]);

    // What a follower reports late meets the same end.
    let engine = service.engine("a").unwrap();
    let rank = RankId { incarnation: before, dp_rank: 0 };
    assert_eq!(service.apply(&engine, &KvEventBatch { rank, sequence: 0, events: vec![] }), None);
    service.unregister("a").unwrap();
    let rank = RankId { incarnation: engine.life.lock().incarnation, dp_rank: 0 };
    assert_eq!(service.apply(&engine, &KvEventBatch { rank, sequence: 0, events: vec![] }), None);
    assert_eq!(service.reset(&engine, KvSnapshot { rank, sequence_next: 0, contents: vec![] }), None);
    assert!(!service.next_life(&engine, None));
    assert_eq!(service.stats().index.ranks, 0);
}

#[test]
fn engines_are_registered_once() {
    let limits = Limits { engines_max: 2, ..Limits::default() };
    let index = IndexLimits { ranks_max: 8, ..IndexLimits::default() };
    let service = Service::new(ServiceSettings { limits, index, ..ServiceSettings::default() });
    let register = |name: &str, model: &str, dp_ranks: u32| {
        let spec = EngineSpec { name: name.into(), model: model.into(), dp_ranks, ..EngineSpec::default() };
        service.register(spec.check().unwrap()).map(|it| it.is_some()).map_err(|refused| refused.code)
    };
    assert_eq!(register("a", "m", 1), Ok(true));
    assert_eq!(register("a", "m", 1), Ok(false), "the same again");
    assert_eq!(register("a", "n", 1), Err("engine_exists"));
    assert_eq!(register("b", "m", 8), Err("too_many_ranks"));
    assert_eq!(register("b", "m", 7), Ok(true));
    assert_eq!(register("c", "m", 1), Err("too_many_engines"));
    assert_eq!(service.unregister("b").map_err(|refused| refused.code), Ok(()));
    assert_eq!(service.unregister("b").map_err(|refused| refused.code), Err("engine_not_found"));
    assert_eq!(register("c", "m", 7), Ok(true));
}

#[test]
fn malformed_batches_are_refused_whole() {
    let service = service();
    fed(&service, "a", 1);
    let to = ("a", "", 0);
    let hashes = chain(&service, &[1, 2]);
    let check = |events: Vec<FedEvent>, code: &'static str| {
        assert_eq!(publish(&service, to, 0, events), Err(code));
    };
    check(vec![stored(None, &[])], "invalid_value");
    check(vec![removed(&[])], "invalid_value");
    check(vec![announced(None, &[1, 2], &[1])], "invalid_value");
    check(vec![stored(None, &hashes), announced(None, &[1], &[1])], "mixed_hashes");
    check(vec![removed(&vec![1; 200_000])], "too_many_values");
    check(vec![FedEvent::Cleared; 40_000], "too_many_values");
    let salted = match stored(None, &hashes) {
        FedEvent::Stored(it) => FedEvent::Stored(FedStored { salt: Some("s".into()), ..it }),
        other => other,
    };
    check(vec![salted], "invalid_value");
    assert_eq!(publish(&service, ("a", "", 1), 0, vec![]), Err("invalid_value"), "no such rank");
    assert_eq!(publish(&service, ("a", "", 70_000), 0, vec![]), Err("invalid_value"));
    assert_eq!(publish(&service, ("b", "", 0), 0, vec![]), Err("engine_not_found"));
    assert_eq!(publish(&service, ("a", "\n", 0), 0, vec![]), Err("invalid_value"));
    assert_eq!(publish(&service, to, u64::MAX, vec![]), Err("invalid_value"));
    ok(&service, to, 0, vec![stored(None, &hashes)]);
    assert_eq!(publish(&service, to, 1, vec![announced(None, &[1], &[1])]), Err("mixed_hashes"));
    ok(&service, to, 1, vec![FedEvent::Cleared, announced(None, &[1], &[1])]);
    assert_eq!(held(&service, &[1, 2]), [of("a", 0, 1)]);

    let followed = EngineSpec::parse("name=f,model=m,events=tcp://h:1").unwrap().check().unwrap();
    service.register(followed).unwrap();
    assert_eq!(publish(&service, ("f", "", 0), 0, vec![]), Err("engine_is_followed"));
}

#[test]
fn look_ups_are_bounded() {
    let limits = Limits { query_tokens_max: 8, query_hashes_max: 2, ..Limits::default() };
    let service = Service::new(ServiceSettings { limits, ..ServiceSettings::default() });
    fed(&service, "a", 1);
    let tokens =
        |count| Prefix::Tokens { model: "m".into(), tokens: vec![1; count], salt: String::new(), lora: None };
    let hashes = |count| Prefix::Hashes { model: None, hashes: vec![BlockHash(1); count] };
    let code = |prefix| service.query(prefix, 9).map(|_| "ok").unwrap_or_else(|refused| refused.code);
    assert_eq!(code(tokens(8)), "ok");
    assert_eq!(code(tokens(9)), "too_many_values");
    assert_eq!(code(tokens(0)), "ok");
    assert_eq!(code(hashes(2)), "ok");
    assert_eq!(code(hashes(3)), "too_many_values");
}

#[test]
fn a_prefix_counts_as_far_as_every_group_of_layers_can_serve_it() {
    let service = service();
    fed(&service, "a", 1);
    let to = ("a", "", 0);
    let of_group = |event: FedEvent, group, kind: &str| match event {
        FedEvent::Stored(stored) => {
            let layers =
                FedLayers { group: Some(group), kind: Some(kind.into()), window_tokens: Some(1 + 2 * BLOCK) };
            FedEvent::Stored(FedStored { layers, ..stored })
        }
        other => other,
    };
    let all = announced(None, &[11, 12, 13, 14], &[1, 2, 3, 4]);
    ok(&service, to, 0, vec![of_group(all.clone(), 0, "full_attention")]);
    assert_eq!(held(&service, &[1, 2, 3, 4]), [of("a", 0, 4)]);
    ok(&service, to, 1, vec![of_group(announced(None, &[11], &[1]), 3, "sliding_window")]);
    assert_eq!(held(&service, &[1, 2, 3, 4]), [of("a", 0, 1)]);
    ok(&service, to, 2, vec![of_group(all, 3, "sliding_window")]);
    let dropped = FedEvent::Removed { hashes: vec![11, 11, 12], tier: Tier::Device, group: Some(3) };
    ok(&service, to, 3, vec![dropped]);
    assert_eq!(held(&service, &[1, 2, 3, 4]), [of("a", 0, 4)], "the window is there");
    assert_eq!(held(&service, &[1, 2, 3]), [], "not that of a shorter prompt");
    // After a clearing the rank may be told by our hashes, which have no groups.
    let ours = chain(&service, &[1, 2]);
    ok(&service, to, 4, vec![FedEvent::Cleared, stored(None, &ours)]);
    assert_eq!(held(&service, &[1, 2]), [of("a", 0, 2)]);
    let ours = of_group(stored(None, &[1]), 0, "mamba");
    fed(&service, "b", 1);
    assert_eq!(publish(&service, ("b", "", 0), 0, vec![ours]), Err("invalid_value"));
}

#[test]
fn a_ranks_blocks_are_bounded() {
    let limits = Limits { blocks_max: 2, ..Limits::default() };
    let settings = ServiceSettings { block_size_tokens: BLOCK, limits, ..ServiceSettings::default() };
    let service = Service::new(settings);
    fed(&service, "a", 1);
    let hashes = chain(&service, &[1, 2, 3]);
    let published = publish(&service, ("a", "", 0), 0, vec![stored(None, &hashes)]).unwrap();
    assert!(published.notes[0].contains("1 blocks left out"), "{:?}", published.notes);
    assert_eq!(held(&service, &[1, 2, 3]), [of("a", 0, 2)]);
    let to = Recipient { engine: "a", life: "", dp_rank: 0 };
    let refused = service.snapshot(to, 1, vec![own_stored(&[1; 3])], Instant::now()).unwrap_err();
    assert_eq!(refused.code, "too_many_values");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is sent, in whatever order: an answer is at most what a plain set holds, and a dump is that set.
    #[test]
    fn nothing_is_claimed_that_was_not_said(
        steps in prop::collection::vec((0_u64..12, 0_u8..4, prop::sample::subsequence(vec![1_u32, 2, 3, 4], 1..4)), 1..40)
    ) {
        let service = service();
        fed(&service, "a", 1);
        let mut model: BTreeSet<u64> = BTreeSet::new();
        let (mut next, mut stale) = (0_u64, false);
        for (skip, kind, blocks) in steps {
            let hashes = chain(&service, &blocks);
            // Mostly in order.
            let sequence = match skip { 0 => next + 1, 1 => next.saturating_sub(1), _ => next };
            let event = match kind {
                0 | 1 => stored(None, &hashes),
                2 => removed(&hashes[hashes.len() - 1..]),
                _ => FedEvent::Cleared,
            };
            let clears = event == FedEvent::Cleared;
            let result = publish(&service, ("a", "", 0), sequence, vec![event]);
            if sequence < next {
                prop_assert_eq!(result.map(|it| it.repeated), Ok(1));
                continue;
            }
            if (sequence > next || stale) && !clears {
                prop_assert_eq!(result, Err("sequence_gap"));
                stale = true;
                model.clear();
                continue;
            }
            prop_assert_eq!(result.map(|it| it.applied), Ok(1));
            (next, stale) = (sequence + 1, false);
            match kind {
                0 | 1 => model.extend(&hashes),
                2 => drop(model.remove(&hashes[hashes.len() - 1])),
                _ => model.clear(),
            }
            let engine = service.engine("a").unwrap();
            let cached: BTreeSet<u64> =
                engine.life.lock().fed[&0].cached().into_iter().map(|BlockHash(hash)| hash).collect();
            prop_assert_eq!(&cached, &model);
            let prompt = chain(&service, &[1, 2, 3, 4]);
            let expected = prompt.iter().take_while(|hash| model.contains(hash)).count() as u32;
            let found = held(&service, &[1, 2, 3, 4]).first().map_or(0, |found| found.2);
            prop_assert!(found <= expected, "{} of {}", found, expected);
        }
    }
}
