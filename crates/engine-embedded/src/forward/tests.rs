use proptest::prelude::*;

use super::*;
use crate::{VecPool, copy_block, hash::SplitMix};

const BLOCK_SIZE: u32 = 16;

fn prompt(random: &mut SplitMix, length: usize) -> Vec<TokenId> {
    (0..length).map(|_| (random.next() % 264) as u32).collect()
}

fn pool(weights: &Weights, blocks: u32) -> VecPool {
    let mut pool = VecPool::new(blocks, weights.kv_block_bytes(BLOCK_SIZE), BLOCK_SIZE);
    // What nobody wrote must not count, even where it is no number.
    (0..blocks).for_each(|block| pool.payload_mut(block).fill(f32::NAN));
    pool
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Logits and KV of a sequence computed by itself, in one chunk, in blocks 0, 1, 2 and so on.
fn alone(executor: &mut Executor, tokens: &[TokenId]) -> (Vec<u32>, Vec<Vec<u32>>) {
    let table: Vec<u32> = (0..(tokens.len() as u32).div_ceil(BLOCK_SIZE)).collect();
    let mut pool = pool(&executor.weights.clone(), table.len() as u32);
    let mut logits = Logits::new();
    let chunk = ChunkInput { start: 0, tokens, blocks: &table, want_logits: true };
    executor.execute(&mut pool, &[chunk], &mut logits);
    assert_eq!(logits.rows(), 1);
    (bits(logits.row(0)), table.iter().map(|block| bits(pool.payload(*block))).collect())
}

/// A shuffled list of all block numbers.
fn shuffled(random: &mut SplitMix, count: u32) -> Vec<u32> {
    let mut blocks: Vec<u32> = (0..count).collect();
    for i in (1..blocks.len()).rev() {
        blocks.swap(i, (random.next() % (i as u64 + 1)) as usize);
    }
    blocks
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The invariant: any batch, any chunking, any blocks, any instruction set, the same bits.
    #[test]
    fn rows_do_not_see_their_batch(seed: u64, lengths in prop::collection::vec(1_usize..150, 1..6)) {
        let mut random = SplitMix::new(seed);
        let weights = Weights::random_tiny(seed % 3);
        let mut reference = Executor::new(weights.clone(), BLOCK_SIZE);
        let prompts: Vec<Vec<TokenId>> = lengths.iter().map(|length| prompt(&mut random, *length)).collect();
        let expected: Vec<_> = prompts.iter().map(|prompt| alone(&mut reference, prompt)).collect();

        let sets = InstructionSet::available();
        let set = sets[(random.next() % sets.len() as u64) as usize];
        let mut executor =
            Executor::with_instruction_set(weights.clone(), BLOCK_SIZE, set).expect("available");
        let needed = |prompt: &Vec<TokenId>| (prompt.len() as u32).div_ceil(BLOCK_SIZE);
        let mut free = shuffled(&mut random, prompts.iter().map(needed).sum());
        let mut pool = pool(&weights, free.len() as u32);
        let tables: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| free.split_off(free.len() - needed(prompt) as usize)).collect();
        let mut done = vec![0; prompts.len()];
        let mut found = vec![None; prompts.len()];
        let mut logits = Logits::new();
        while found.iter().any(Option::is_none) {
            // A step: some of the unfinished sequences, in any order, each some tokens further.
            let mut chunks = Vec::new();
            let mut finishing = Vec::new();
            for index in shuffled(&mut random, prompts.len() as u32) {
                let index = index as usize;
                let left = prompts[index].len() - done[index];
                if left == 0 || random.next().is_multiple_of(3) {
                    continue;
                }
                let count = 1 + (random.next() % left as u64) as usize;
                let wanted = count == left;
                chunks.push(ChunkInput {
                    start: done[index] as u32,
                    tokens: &prompts[index][done[index]..done[index] + count],
                    blocks: &tables[index],
                    want_logits: wanted,
                });
                done[index] += count;
                if wanted {
                    finishing.push(index);
                }
            }
            executor.execute(&mut pool, &chunks, &mut logits);
            prop_assert_eq!(logits.rows(), finishing.len());
            for (row, index) in finishing.into_iter().enumerate() {
                found[index] = Some(bits(logits.row(row)));
            }
        }
        for (index, (logits, blocks)) in expected.iter().enumerate() {
            prop_assert!(found[index].as_ref() == Some(logits), "logits of sequence {} on {}", index, set);
            for (number, block) in tables[index].iter().zip(blocks) {
                prop_assert!(&bits(pool.payload(*number)) == block, "KV of sequence {} on {}", index, set);
            }
        }
    }
}

#[test]
fn a_step_may_use_kv_of_an_earlier_chunk_and_sequences_may_share_blocks() {
    let mut random = SplitMix::new(3);
    let weights = Weights::random_tiny(0);
    let mut executor = Executor::new(weights.clone(), BLOCK_SIZE);
    let tokens = prompt(&mut random, 300);
    let mut branch = tokens[..240].to_vec();
    branch.extend(prompt(&mut random, 20));
    let mut pool = pool(&weights, 64);
    let main: Vec<u32> = (0..20).collect();
    // The branch shares the first 15 blocks, which this same step computes.
    let side: Vec<u32> = (0..15).chain(40..44).collect();
    let mut logits = Logits::new();
    let chunks = [
        ChunkInput { start: 0, tokens: &tokens, blocks: &main, want_logits: true },
        ChunkInput { start: 240, tokens: &branch[240..], blocks: &side, want_logits: true },
    ];
    executor.execute(&mut pool, &chunks, &mut logits);
    assert_eq!(bits(logits.row(0)), alone(&mut executor, &tokens).0);
    assert_eq!(bits(logits.row(1)), alone(&mut executor, &branch).0);
}

#[test]
fn a_fork_continues_from_a_copy_of_a_partial_block() {
    let mut random = SplitMix::new(4);
    let weights = Weights::random_tiny(0);
    let mut executor = Executor::new(weights.clone(), BLOCK_SIZE);
    let tokens = prompt(&mut random, 24);
    let mut pool = pool(&weights, 4);
    let mut logits = Logits::new();
    let first = ChunkInput { start: 0, tokens: &tokens[..20], blocks: &[0, 1], want_logits: false };
    executor.execute(&mut pool, &[first], &mut logits);
    assert_eq!(logits.rows(), 0);
    copy_block(&mut pool, 1, 3);
    pool.payload_mut(1).fill(0.0);
    let rest = ChunkInput { start: 20, tokens: &tokens[20..], blocks: &[0, 3], want_logits: true };
    executor.execute(&mut pool, &[rest], &mut logits);
    assert_eq!(bits(logits.row(0)), alone(&mut executor, &tokens).0);
}

#[test]
fn two_blocks_that_change_places_change_the_logits() {
    let mut random = SplitMix::new(5);
    let weights = Weights::random_tiny(0);
    let mut executor = Executor::new(weights.clone(), BLOCK_SIZE);
    let tokens = prompt(&mut random, 65);
    let mut pool = pool(&weights, 5);
    let mut logits = Logits::new();
    let start = ChunkInput { start: 0, tokens: &tokens[..64], blocks: &[0, 1, 2, 3], want_logits: false };
    executor.execute(&mut pool, &[start], &mut logits);
    let mut last = |blocks: &[u32]| {
        let chunk = ChunkInput { start: 64, tokens: &tokens[64..], blocks, want_logits: true };
        executor.execute(&mut pool, &[chunk], &mut logits);
        bits(logits.row(0))
    };
    assert_ne!(last(&[0, 1, 2, 3, 4]), last(&[0, 2, 1, 3, 4]));
}

#[test]
fn mistakes_of_a_scheduler_are_caught_before_anything_is_written() {
    let weights = Weights::random_tiny(0);
    let attempt = |block_size: u32, start: u32, tokens: &[TokenId], blocks: &[u32]| {
        let mut pool = VecPool::new(4, weights.kv_block_bytes(block_size), block_size);
        let mut executor = Executor::new(weights.clone(), BLOCK_SIZE);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let chunk = ChunkInput { start, tokens, blocks, want_logits: false };
            executor.execute(&mut pool, &[chunk], &mut Logits::new());
        }));
        let untouched = (0..4).all(|block| pool.payload(block).iter().all(|x| *x == 0.0));
        result.map_err(|_| assert!(untouched)).is_ok()
    };
    assert!(attempt(16, 0, &[1, 2], &[3]));
    assert!(!attempt(32, 0, &[1, 2], &[3]), "another block size");
    assert!(!attempt(16, 0, &[], &[3]), "nothing to do");
    assert!(!attempt(16, 15, &[1, 2], &[3]), "a table too short");
    assert!(!attempt(16, 0, &[1, 2], &[4]), "a block outside the pool");
    assert!(!attempt(16, 0, &[1, 264], &[3]), "a token outside the vocabulary");
    assert!(!attempt(16, 4_096, &[1], &[0; 300]), "a position outside the context");
    assert!(std::panic::catch_unwind(|| Executor::new(weights.clone(), 24)).is_err(), "an odd block size");
}
