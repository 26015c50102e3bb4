use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_lease_ends_at_its_end_and_not_before() {
    let mut table = LeaseTable::new(4);
    let lease = table.grant(7, seconds(10), seconds(5)).unwrap();
    assert!(table.is_live(lease, Duration::from_millis(14_999)));
    assert_eq!(table.expired(Duration::from_millis(14_999)), []);
    assert!(!table.is_live(lease, seconds(15)));
    assert_eq!(table.expired(seconds(15)), [Expired { lease, owner: 7 }]);
    assert_eq!(table.expired(seconds(15)), [], "reported once");
}

#[test]
fn an_ended_lease_cannot_be_renewed_even_before_it_was_collected() {
    let mut table = LeaseTable::new(4);
    let lease = table.grant(7, seconds(0), seconds(5)).unwrap();
    assert_eq!(table.renew(lease, seconds(5), seconds(5)), Err(LeaseError::Over { lease }));
    assert_eq!(table.expired(seconds(5)).len(), 1);
}

#[test]
fn renewal_moves_the_end_and_never_shortens() {
    let mut table = LeaseTable::new(4);
    let lease = table.grant(7, seconds(0), seconds(10)).unwrap();
    table.renew(lease, seconds(5), seconds(1)).unwrap();
    assert_eq!(table.end(lease), Some(seconds(10)));
    table.renew(lease, seconds(9), seconds(10)).unwrap();
    assert_eq!(table.next_end(), Some(seconds(19)));
    assert_eq!(table.expired(seconds(18)), []);
}

#[test]
fn the_bound_holds_and_release_makes_room() {
    let mut table = LeaseTable::new(2);
    let first = table.grant(1, seconds(0), seconds(1)).unwrap();
    table.grant(2, seconds(0), Duration::MAX).unwrap();
    assert_eq!(table.grant(3, seconds(0), seconds(1)), Err(LeaseError::Full { leases_max: 2 }));
    assert_eq!(table.release(first), Some(1));
    assert_eq!(table.release(first), None);
    assert_ne!(table.grant(3, seconds(0), seconds(1)).unwrap(), first, "ids are never reused");
}

#[derive(Debug, Clone)]
enum Step {
    Grant { ttl: u64 },
    Renew { nth: usize, ttl: u64 },
    Release { nth: usize },
    Wait { by: u64 },
    Collect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..20u64).prop_map(|ttl| Step::Grant { ttl }),
        (any::<usize>(), 0..20u64).prop_map(|(nth, ttl)| Step::Renew { nth, ttl }),
        any::<usize>().prop_map(|nth| Step::Release { nth }),
        (0..10u64).prop_map(|by| Step::Wait { by }),
        Just(Step::Collect),
    ]
}

proptest! {
    /// Against a list of ends: liveness agrees at every moment, and each lease leaves exactly once.
    #[test]
    fn agrees_with_a_naive_table(steps in prop::collection::vec(step(), 0..200)) {
        let (mut table, mut model, mut granted, mut now) = (LeaseTable::new(8), BTreeMap::new(), Vec::new(), 0);
        for step in steps {
            let pick = |nth: usize| granted.get(nth.checked_rem(granted.len()).unwrap_or(0)).copied();
            match step {
                Step::Wait { by } => now += by,
                Step::Grant { ttl } => match table.grant(granted.len() as u64, seconds(now), seconds(ttl)) {
                    Ok(id) => {
                        prop_assert!(model.len() < 8);
                        model.insert(id, now + ttl);
                        granted.push(id);
                    }
                    Err(error) => {
                        prop_assert_eq!(error, LeaseError::Full { leases_max: 8 });
                        prop_assert_eq!(model.len(), 8);
                    }
                },
                Step::Renew { nth, ttl } => if let Some(id) = pick(nth) {
                    let live = model.get(&id).is_some_and(|end| now < *end);
                    prop_assert_eq!(table.renew(id, seconds(now), seconds(ttl)).is_ok(), live);
                    if live {
                        model.entry(id).and_modify(|end| *end = (*end).max(now + ttl));
                    }
                },
                Step::Release { nth } => if let Some(id) = pick(nth) {
                    prop_assert_eq!(table.release(id).is_some(), model.remove(&id).is_some());
                },
                Step::Collect => for expired in table.expired(seconds(now)) {
                    let end = model.remove(&expired.lease);
                    prop_assert!(end.is_some_and(|end| end <= now), "ended early or twice");
                    prop_assert_eq!(granted[expired.owner as usize], expired.lease);
                },
            }
            prop_assert_eq!(table.len(), model.len());
            prop_assert_eq!(table.next_end(), model.values().min().map(|end| seconds(*end)));
            for id in &granted {
                prop_assert_eq!(table.is_live(*id, seconds(now)), model.get(id).is_some_and(|end| now < *end));
            }
        }
        prop_assert!(table.expired(Duration::MAX).len() == model.len());
        prop_assert!(table.is_empty());
    }
}
