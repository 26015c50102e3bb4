//! Hashes that somebody chose to fall together in the tables. Engines' own are keyed; these are what remains.

use super::*;
use crate::spread::tests::hash_of;

/// As many as one likes with the same first 22 bits, some with all 40 bits that a table looks at.
fn forged(number: u64) -> u64 {
    hash_of(0xdead_bc00 | number as u32 >> 3 & 0x3ff, 7, number as u32)
}

fn check_flood(index: &KvIndex, honest: &[u64], sequence: u64, lens: &[u64]) {
    let mut next = 0;
    for (sequence, &len) in (sequence..sequence + 3000).zip(lens.iter().cycle()) {
        let chain: Vec<u64> = (next..next + len).map(forged).collect();
        next += len;
        assert_eq!(index.apply(&batch(rank(B, 0), sequence, vec![stored(&chain)])), Applied::Ok);
        let stats = index.stats();
        assert!(stats.bytes <= index.limits.bytes_max as u64, "{stats:?}");
        for (_, depth) in overlaps(index, &chain) {
            assert!(u64::from(depth) <= len);
        }
        if sequence % 100 == 0 {
            assert_eq!(overlaps(index, honest), [(rank(A, 0), honest.len() as u32)], "{stats:?}");
        }
    }
    assert!(index.stats().refused > 0, "{:?}", index.stats());
}

fn check_forgotten(index: &KvIndex) {
    index.remove_rank(rank(A, 0));
    index.remove_rank(rank(B, 0));
    tidy(index);
    let stats = index.stats();
    assert_eq!((stats.blocks, stats.entries, stats.segments), (0, 0, 0), "{stats:?}");
}

#[test]
fn hashes_that_tables_cannot_tell_apart_are_told_apart() {
    let index = KvIndex::new(IndexLimits::default());
    let same = |number| hash_of(0x1234_5678, 7, number);
    for number in 0..1000 {
        let events = vec![stored(&[same(number), mix(number.into())])];
        assert_eq!(
            index.apply(&batch(rank(A, number as u16 % 2), u64::from(number) / 2, events)),
            Applied::Ok
        );
    }
    for number in 0..1000 {
        let chain = [same(number), mix(number.into())];
        assert_eq!(overlaps(&index, &chain), [(rank(A, number as u16 % 2), 2)], "{number}");
        assert_eq!(overlaps(&index, &[same(number), mix(1000)]).len(), 1);
    }
    assert_eq!(overlaps(&index, &[same(1000)]), []);
}

#[test]
fn forged_chains_are_refused_within_the_budget() {
    for lens in [&[1][..], &[64], &[3, 100]] {
        let index = KvIndex::new(IndexLimits { bytes_max: BYTES_MIN, ranks_max: 2 });
        let honest: Vec<u64> = (0..200).map(mix).collect();
        assert_eq!(index.apply(&batch(rank(A, 0), 0, vec![stored(&honest)])), Applied::Ok);
        check_flood(&index, &honest, 0, lens);
        check_forgotten(&index);
        assert!(index.stats().bytes <= 300 << 10, "{:?}", index.stats());
    }
}

#[test]
fn forged_chains_are_refused_where_the_budget_is_spent() {
    let index = KvIndex::new(IndexLimits { bytes_max: BYTES_MIN, ranks_max: 2 });
    let honest: Vec<u64> = (0..200).map(mix).collect();
    assert_eq!(index.apply(&batch(rank(A, 0), 0, vec![stored(&honest)])), Applied::Ok);
    for turn in 0..1000 {
        let chain: Vec<u64> = (0..60).map(|block| mix((turn + 1) << 20 | block)).collect();
        assert_eq!(index.apply(&batch(rank(B, 0), turn, vec![stored(&chain)])), Applied::Ok);
        assert_eq!(overlaps(&index, &honest).len(), 1);
    }
    assert!(index.stats().evicted > 0, "{:?}", index.stats());
    check_flood(&index, &honest, 1000, &[64]);
    check_forgotten(&index);
}
