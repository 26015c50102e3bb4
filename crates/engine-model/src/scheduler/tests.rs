use std::collections::{BTreeMap, BTreeSet, HashMap};

use forebay_kv_hash::HashKey;
use forebay_types::{BlockHash, FinishReason, Sampling, device_blocks};
use proptest::prelude::*;

use super::*;
use crate::{
    content::{digest_next, sampled_token},
    job::Output,
    plan::StepPlan,
};

const SIZE: u32 = 4;
const CANDIDATES: u32 = 97;
/// One of the tokens that can be drawn: some choices end early.
const STOP: TokenId = 13;

fn hasher() -> BlockHasher {
    BlockHasher::new(HashKey::GOLDEN, SIZE)
}

fn config(blocks_total: u32) -> SchedulerConfig {
    SchedulerConfig {
        chunk_tokens_max: u32::MAX,
        imports_first: false,
        block_size_tokens: SIZE,
        blocks_total,
        step_tokens_max: 16,
        sequences_max: 8,
        waiting_max: 64,
        context_tokens_max: 256,
    }
}

fn sampling() -> Sampling {
    Sampling {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        seed: 9,
        output_tokens_max: 0,
        stop_tokens: [].into(),
        logprobs: None,
    }
}

fn draw(slots: &[u64], choice: u32) -> TokenId {
    let candidates: Vec<TokenId> = (0..CANDIDATES).collect();
    let digests = slots.chunks(SIZE as usize).map(|block| *block.last().expect("not empty"));
    sampled_token(digests, choice, &sampling(), &candidates)
}

/// What a rank must produce for one choice: computed without blocks, batches or caches.
fn oracle(prompt: &[TokenId], choice: u32, output_tokens_max: u32, context: u32) -> Vec<TokenId> {
    let mut slots = Vec::new();
    let push = |slots: &mut Vec<u64>, token: TokenId| {
        let position = slots.len() as u32;
        slots.push(digest_next(slots.last().copied().unwrap_or(0), token, position));
    };
    prompt.iter().for_each(|token| push(&mut slots, *token));
    let mut output = Vec::new();
    loop {
        let token = draw(&slots, choice);
        output.push(token);
        let length = slots.len() as u32 + 1;
        if token == STOP || output.len() as u32 == output_tokens_max || length >= context {
            return output;
        }
        push(&mut slots, token);
    }
}

/// A rank with a real pool of digests: what it holds is what it computes from.
struct Rank {
    scheduler: Scheduler,
    kv: Vec<[u64; SIZE as usize]>,
    generations: Vec<u64>,
    index: BTreeSet<BlockHash>,
    outputs: BTreeMap<(LegId, u32), Vec<TokenId>>,
    finished: BTreeMap<(LegId, u32), FinishReason>,
    ended: BTreeSet<LegId>,
    held: BTreeMap<LegId, Vec<u32>>,
    started: BTreeMap<LegId, u32>,
    imports: Vec<crate::plan::Import>,
    steps: u32,
}

impl Rank {
    fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config, hasher()),
            kv: vec![[0; SIZE as usize]; config.blocks_total as usize],
            generations: vec![0; config.blocks_total as usize],
            index: BTreeSet::new(),
            outputs: BTreeMap::new(),
            finished: BTreeMap::new(),
            ended: BTreeSet::new(),
            held: BTreeMap::new(),
            started: BTreeMap::new(),
            imports: Vec::new(),
            steps: 0,
        }
    }

    /// One step; whether anything was computed.
    fn step(&mut self) -> bool {
        let mut plan = StepPlan::default();
        self.scheduler.plan(&mut plan);
        for (block, generation) in &plan.rewritten {
            assert!(generation.0 > self.generations[*block as usize], "a generation went back");
            self.generations[*block as usize] = generation.0;
        }
        self.started.extend(plan.started.iter().map(|started| (started.leg, started.cached_tokens)));
        self.imports.append(&mut plan.imports);
        for copy in &plan.copies {
            self.kv[copy.to as usize] = self.kv[copy.from as usize];
        }
        let total: usize = plan.chunks.iter().map(|chunk| plan.tokens(chunk).len()).sum();
        assert!(total <= self.scheduler.config.step_tokens_max as usize);
        let mut drawn = Vec::new();
        let mut written = BTreeSet::new();
        for chunk in &plan.chunks {
            let table = plan.blocks(chunk);
            let slot =
                |position: u32| (table[(position / SIZE) as usize] as usize, (position % SIZE) as usize);
            let mut position = chunk.start;
            for token in plan.tokens(chunk) {
                let previous =
                    position.checked_sub(1).map_or(0, |before| self.kv[slot(before).0][slot(before).1]);
                assert!(written.insert(slot(position)), "two rows write one slot");
                self.kv[slot(position).0][slot(position).1] = digest_next(previous, *token, position);
                position += 1;
            }
            let slots: Vec<u64> = (0..position).map(|at| self.kv[slot(at).0][slot(at).1]).collect();
            drawn.extend(plan.samples(chunk).iter().map(|&choice| (chunk.leg, choice, draw(&slots, choice))));
        }
        let mut outputs = Vec::new();
        self.scheduler.complete(&drawn, &mut outputs);
        outputs.into_iter().for_each(|output| self.take(output));
        self.apply_events();
        self.check();
        self.steps += 1;
        !plan.is_empty()
    }

    fn take(&mut self, output: Output) {
        match output {
            Output::Token { leg, choice, token, .. } => {
                self.outputs.entry((leg, choice)).or_default().push(token)
            }
            Output::Finished { leg, choice, reason } => {
                assert!(self.finished.insert((leg, choice), reason).is_none())
            }
            Output::Held { leg, blocks, .. } => {
                for (block, generation) in &blocks {
                    assert_eq!(self.generations[*block as usize], generation.0);
                }
                self.held.insert(leg, blocks.into_iter().map(|(block, _)| block).collect());
            }
            Output::Ended { leg } => assert!(self.ended.insert(leg), "{leg} ended twice"),
        }
    }

    fn apply_events(&mut self) {
        let mut events = Vec::new();
        self.scheduler.drain_events(&mut events);
        for event in events {
            match event {
                KvEvent::Stored { parent, hashes, .. } => {
                    assert!(parent.is_none_or(|parent| self.index.contains(&parent)), "stored under nothing");
                    hashes.into_iter().for_each(|hash| assert!(self.index.insert(hash), "stored twice"));
                }
                KvEvent::Removed { hashes, .. } => {
                    hashes
                        .iter()
                        .for_each(|hash| assert!(self.index.remove(hash), "removed what was not there"));
                }
                KvEvent::Groups(_) => panic!("one group goes without saying"),
                KvEvent::Cleared => self.index.clear(),
            }
        }
        assert_eq!(self.index, device_blocks(&self.scheduler.cached()).collect());
    }

    fn check(&self) {
        let Scheduler { running, waiting, importing, held, copies, pool, .. } = &self.scheduler;
        let mut owners: HashMap<u32, u32> = HashMap::new();
        let sequences = running.iter().chain(waiting).chain(importing);
        let of_sequences = sequences.flat_map(|sequence| &sequence.blocks);
        let of_copies = copies.iter().map(|copy| &copy.from);
        for block in of_sequences.chain(held.values().flatten()).chain(of_copies) {
            *owners.entry(*block).or_default() += 1;
        }
        pool.check(&owners);
        assert!(running.is_sorted_by_key(|sequence| sequence.order));
        assert!(waiting.iter().is_sorted_by_key(|sequence| sequence.order));
        let waiting_tokens: u64 = waiting.iter().map(|sequence| u64::from(sequence.prefill_left())).sum();
        assert_eq!(self.scheduler.waiting_prefill_tokens, waiting_tokens);
    }

    fn run(&mut self) {
        let before = self.steps;
        while self.step() {
            assert!(self.steps - before < 20_000, "no end in sight");
        }
    }

    fn assert_clean(&self) {
        assert!(self.scheduler.is_idle());
        let accounting = self.scheduler.accounting();
        assert_eq!(accounting.free + accounting.cached, self.scheduler.config.blocks_total, "{accounting:?}");
    }
}

fn job(leg: u64, prompt: &[TokenId], choices: u32, output_tokens_max: u32, work: Work) -> Job {
    let root = hasher().root("m", "");
    Job {
        leg: LegId(leg),
        prompt: prompt.into(),
        hashes: hasher().chain(root, prompt).into(),
        root,
        choices: (0..choices).collect(),
        output_tokens_max,
        stop_tokens: [STOP].into(),
        work,
    }
}

fn prompt(seed: u32, length: u32) -> Vec<TokenId> {
    (0..length).map(|i| (i * 31 + seed * 7 + i * i) % 89).collect()
}

/// Hands KV of `leg` from one rank to another as the shell would.
fn hand_over(from: &Rank, to: &mut Rank, leg: u64, blocks: &[u32], damage: bool) {
    let at = to.imports.iter().position(|import| import.leg == LegId(leg)).expect("an import was asked for");
    let import = to.imports.remove(at);
    for (source, local) in import.blocks {
        to.kv[local as usize] = from.kv[blocks[source as usize] as usize];
    }
    to.scheduler.import_finished(LegId(leg), !damage);
    to.apply_events();
    to.check();
}

#[test]
fn a_job_alone_gives_the_reference_tokens_and_gives_all_blocks_back() {
    let mut rank = Rank::new(config(64));
    rank.scheduler.submit(job(1, &prompt(1, 19), 1, 12, Work::Aggregated)).expect("there is room");
    rank.run();
    assert_eq!(rank.outputs[&(LegId(1), 0)], oracle(&prompt(1, 19), 0, 12, 256));
    assert_eq!(rank.ended, [LegId(1)].into());
    rank.assert_clean();
}

#[test]
fn a_second_turn_finds_the_first_in_the_cache() {
    let mut rank = Rank::new(config(64));
    rank.scheduler.submit(job(1, &prompt(1, 20), 1, 9, Work::Aggregated)).expect("there is room");
    rank.run();
    let mut turn = prompt(1, 20);
    turn.extend(&rank.outputs[&(LegId(1), 0)]);
    let computed = turn.len() as u32 - 1; // the last token was drawn, never computed
    turn.extend([3, 1, 4]);
    rank.scheduler.submit(job(2, &turn, 1, 4, Work::Aggregated)).expect("there is room");
    rank.run();
    assert_eq!(rank.started[&LegId(2)], computed / SIZE * SIZE);
    assert_eq!(rank.outputs[&(LegId(2), 0)], oracle(&turn, 0, 4, 256));
}

#[test]
fn a_repeated_prompt_still_computes_its_last_token() {
    let mut rank = Rank::new(config(64));
    for leg in [1, 2] {
        rank.scheduler.submit(job(leg, &prompt(5, 16), 1, 3, Work::Aggregated)).expect("there is room");
        rank.run();
    }
    assert_eq!(rank.started[&LegId(2)], 12, "three of four blocks: the last token's block is its own");
    assert_eq!(rank.outputs[&(LegId(1), 0)], rank.outputs[&(LegId(2), 0)]);
}

#[test]
fn equal_prompts_side_by_side_end_up_sharing_blocks() {
    let mut rank = Rank::new(config(64));
    for leg in 0..4 {
        rank.scheduler.submit(job(leg, &prompt(2, 16), 1, 6, Work::Aggregated)).expect("there is room");
    }
    rank.run();
    let expected = oracle(&prompt(2, 16), 0, 6, 256);
    for leg in 0..4 {
        assert_eq!(rank.outputs[&(LegId(leg), 0)], expected);
    }
    assert_eq!(rank.scheduler.accounting().cached, (16 + expected.len() as u32 - 1) / SIZE);
}

#[test]
fn choices_share_one_prefill() {
    let mut rank = Rank::new(config(64));
    rank.scheduler.submit(job(1, &prompt(3, 18), 4, 8, Work::Aggregated)).expect("there is room");
    let mut plan = StepPlan::default();
    rank.scheduler.plan(&mut plan);
    assert_eq!(plan.prefill_tokens, 16, "the step's budget, once for all choices");
    let mut outputs = Vec::new();
    rank.scheduler.complete(&[], &mut outputs);
    // (the harness computes digests, so run the job again from the start)
    let mut rank = Rank::new(config(64));
    rank.scheduler.submit(job(1, &prompt(3, 18), 4, 8, Work::Aggregated)).expect("there is room");
    rank.run();
    for choice in 0..4 {
        assert_eq!(
            rank.outputs[&(LegId(1), choice)],
            oracle(&prompt(3, 18), choice, 8, 256),
            "choice {choice}"
        );
    }
    rank.assert_clean();
}

#[test]
fn a_full_pool_preempts_the_youngest_and_loses_nothing() {
    let mut rank = Rank::new(config(16));
    for leg in 0..6 {
        rank.scheduler
            .submit(job(leg, &prompt(leg as u32, 12), 1, 30, Work::Aggregated))
            .expect("there is room");
    }
    rank.run();
    assert!(rank.scheduler.load().preemptions > 0, "the pool was meant to be too small");
    for leg in 0..6 {
        assert_eq!(rank.outputs[&(LegId(leg), 0)], oracle(&prompt(leg as u32, 12), 0, 30, 64), "leg {leg}");
    }
    rank.assert_clean();
}

#[test]
fn a_split_job_gives_the_same_tokens_with_one_or_more_choices() {
    for (length, choices) in [(3, 1), (16, 1), (21, 1), (21, 3), (32, 2)] {
        let (mut p, mut d) = (Rank::new(config(64)), Rank::new(config(64)));
        let prompt = prompt(length, length);
        p.scheduler.submit(job(1, &prompt, choices, 10, Work::Prefill)).expect("there is room");
        p.run();
        let first: Vec<_> = (0..choices).map(|choice| (choice, p.outputs[&(LegId(1), choice)][0])).collect();
        assert!(first.iter().all(|(_, token)| *token != STOP), "pick another prompt");
        d.scheduler
            .submit(job(2, &prompt, choices, 10, Work::Decode { first: first.clone() }))
            .expect("room");
        d.run();
        let blocks = p.held[&LegId(1)].clone();
        hand_over(&p, &mut d, 2, &blocks, false);
        p.scheduler.release_held(LegId(1));
        d.run();
        for (choice, first) in first {
            let mut tokens = vec![first];
            tokens.extend(d.outputs.get(&(LegId(2), choice)).into_iter().flatten());
            assert_eq!(tokens, oracle(&prompt, choice, 10, 256), "{length} tokens, choice {choice}");
        }
        p.assert_clean();
        d.assert_clean();
    }
}

#[test]
fn a_failed_import_is_computed_again_and_a_cancelled_one_is_quarantined() {
    let (mut p, mut d) = (Rank::new(config(64)), Rank::new(config(64)));
    let prompt = prompt(7, 22);
    p.scheduler.submit(job(1, &prompt, 2, 10, Work::Prefill)).expect("there is room");
    p.run();
    let first: Vec<_> = (0..2).map(|choice| (choice, p.outputs[&(LegId(1), choice)][0])).collect();
    let blocks = p.held[&LegId(1)].clone();
    d.scheduler.submit(job(2, &prompt, 2, 10, Work::Decode { first: first.clone() })).expect("there is room");
    d.run();
    hand_over(&p, &mut d, 2, &blocks, true);
    d.run();
    for (choice, first) in &first {
        let mut tokens = vec![*first];
        tokens.extend(d.outputs.get(&(LegId(2), *choice)).into_iter().flatten());
        assert_eq!(tokens, oracle(&prompt, *choice, 10, 256), "choice {choice}");
    }
    d.assert_clean();

    d.scheduler.submit(job(3, &prompt, 2, 10, Work::Decode { first })).expect("there is room");
    d.step();
    assert!(d.scheduler.cancel(LegId(3)));
    d.check();
    let quarantined = d.scheduler.accounting().quarantined;
    assert!(quarantined > 0 && !d.scheduler.is_idle());
    d.scheduler.import_finished(LegId(3), true);
    d.check();
    d.assert_clean();
}

#[test]
fn a_bound_on_chunks_leaves_room_in_the_step_for_others() {
    let mut rank = Rank::new(SchedulerConfig { chunk_tokens_max: 6, ..config(64) });
    rank.scheduler.submit(job(1, &prompt(1, 30), 1, 1, Work::Aggregated)).unwrap();
    rank.scheduler.submit(job(2, &prompt(2, 12), 1, 1, Work::Aggregated)).unwrap();
    let mut plan = StepPlan::default();
    rank.scheduler.plan(&mut plan);
    let chunks: Vec<(u64, usize)> =
        plan.chunks.iter().map(|chunk| (chunk.leg.0, plan.tokens(chunk).len())).collect();
    assert_eq!(chunks, [(1, 6), (2, 6)], "of a step of 16");
}

/// Two prompts fill every step for a while. A decode leg that comes after them begins to import with the next step, or
/// when the prompts are done, as vLLM has it.
#[test]
fn an_import_computes_nothing_and_need_not_wait_for_prompts() {
    let import_begins_after = |imports_first: bool| {
        let mut rank = Rank::new(SchedulerConfig { imports_first, ..config(64) });
        rank.scheduler.submit(job(1, &prompt(1, 40), 1, 1, Work::Aggregated)).unwrap();
        rank.scheduler.submit(job(2, &prompt(2, 40), 1, 1, Work::Aggregated)).unwrap();
        rank.step();
        let first = vec![(0, 7)];
        rank.scheduler.submit(job(3, &prompt(3, 8), 1, 4, Work::Decode { first })).unwrap();
        (1..10).find(|_| {
            rank.step();
            rank.imports.iter().any(|import| import.leg == LegId(3))
        })
    };
    // 80 tokens are five steps, of which one is over.
    assert_eq!((import_begins_after(true), import_begins_after(false)), (Some(1), Some(5)));
}

#[test]
fn a_stop_string_ends_one_choice_and_the_last_one_ends_the_job() {
    let mut rank = Rank::new(config(64));
    rank.scheduler.submit(job(1, &prompt(3, 18), 2, 40, Work::Aggregated)).expect("there is room");
    for _ in 0..4 {
        rank.step();
    }
    assert!(!rank.scheduler.stop_choice(LegId(1), 1));
    rank.check();
    let stopped = rank.outputs[&(LegId(1), 1)].len();
    rank.step();
    assert_eq!(rank.outputs[&(LegId(1), 1)].len(), stopped);
    assert!(rank.scheduler.stop_choice(LegId(1), 0));
    rank.assert_clean();
}

#[test]
fn submissions_are_refused_with_a_reason() {
    let mut rank = Rank::new(SchedulerConfig { waiting_max: 1, ..config(4) });
    let mut refused = |job: Job| rank.scheduler.submit(job).expect_err("must be refused");
    let long = refused(job(1, &prompt(1, 16), 1, 4, Work::Aggregated));
    assert_eq!(long, SubmitError::TooLong { prompt_tokens: 16, context_tokens_max: 16 });
    assert!(matches!(refused(job(1, &[], 1, 4, Work::Aggregated)), SubmitError::Malformed { .. }));
    assert!(matches!(refused(job(1, &[1], 0, 4, Work::Aggregated)), SubmitError::Malformed { .. }));
    assert!(matches!(refused(job(1, &[1], 1, 0, Work::Aggregated)), SubmitError::Malformed { .. }));
    let ended = Work::Decode { first: vec![(0, STOP)] };
    assert!(matches!(refused(job(1, &[1], 1, 4, ended)), SubmitError::Malformed { .. }));
    rank.scheduler.submit(job(1, &[1], 1, 4, Work::Aggregated)).expect("there is room");
    let mut refused = |job: Job| rank.scheduler.submit(job).expect_err("must be refused");
    assert!(matches!(refused(job(1, &[1], 1, 4, Work::Aggregated)), SubmitError::Malformed { .. }));
    assert_eq!(refused(job(2, &[1], 1, 4, Work::Aggregated)), SubmitError::QueueFull { waiting_max: 1 });
}

#[test]
fn a_block_of_another_prompt_under_the_same_hash_is_never_reused() {
    let mut rank = Rank::new(config(64));
    let (one, two) = (prompt(1, 12), prompt(2, 12));
    rank.scheduler.submit(job(1, &one, 1, 3, Work::Aggregated)).expect("there is room");
    rank.run();
    let forged =
        Job { hashes: job(0, &one, 1, 3, Work::Aggregated).hashes, ..job(2, &two, 1, 3, Work::Aggregated) };
    rank.scheduler.submit(forged).expect("there is room");
    rank.run();
    assert_eq!(rank.started[&LegId(2)], 0);
    assert_eq!(rank.outputs[&(LegId(2), 0)], oracle(&two, 0, 3, 256));
    rank.assert_clean();
}

#[derive(Debug, Clone)]
enum Act {
    Submit { family: u32, length: u32, choices: u32, output: u32, prefill: bool },
    Import { nth: usize, ok: bool },
    Decode { nth: usize },
    Release { nth: usize },
    Cancel { nth: usize },
    Stop { nth: usize, choice: u32 },
    Steps(u32),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..4_u32, 1..40_u32, 1..4_u32, 1..25_u32, any::<bool>())
            .prop_map(|(family, length, choices, output, prefill)| Act::Submit { family, length, choices, output, prefill }),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(nth, ok)| Act::Import { nth, ok }),
        2 => any::<usize>().prop_map(|nth| Act::Decode { nth }),
        1 => any::<usize>().prop_map(|nth| Act::Release { nth }),
        1 => any::<usize>().prop_map(|nth| Act::Cancel { nth }),
        1 => (any::<usize>(), 0..4_u32).prop_map(|(nth, choice)| Act::Stop { nth, choice }),
        6 => (1..8_u32).prop_map(Act::Steps),
    ]
}

/// What a leg was asked, and what of it was already delivered elsewhere.
struct Asked {
    prompt: Vec<TokenId>,
    choices: u32,
    output: u32,
    first: Vec<(u32, TokenId)>,
    prefill: bool,
    disturbed: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn whatever_happens_tokens_are_right_and_blocks_come_back(
        acts in prop::collection::vec(act(), 1..60),
        blocks in 14..40_u32,
    ) {
        // One rank plays both sides: it imports from its own held blocks.
        let mut rank = Rank::new(config(blocks));
        let context = rank.scheduler.config.context_tokens_max;
        let mut asked: BTreeMap<u64, Asked> = BTreeMap::new();
        let mut sources: BTreeMap<u64, u64> = BTreeMap::new();
        let mut next = 0;
        for act in acts {
            match act {
                Act::Submit { family, length, choices, output, prefill } => {
                    next += 1;
                    let work = if prefill { Work::Prefill } else { Work::Aggregated };
                    let prompt = prompt(family, length);
                    if rank.scheduler.submit(job(next, &prompt, choices, output, work)).is_ok() {
                        asked.insert(next, Asked { prompt, choices, output, first: vec![], prefill, disturbed: false });
                    }
                }
                Act::Decode { nth } => {
                    let Some(&source) = pick(rank.held.keys(), nth) else { continue };
                    let (leg, of) = (next + 1, &asked[&source.0]);
                    if of.disturbed {
                        continue;
                    }
                    let first: Vec<_> =
                        (0..of.choices).map(|choice| (choice, rank.outputs[&(source, choice)][0])).collect();
                    let work = Work::Decode { first: first.clone() };
                    let (prompt, choices, output) = (of.prompt.clone(), of.choices, of.output);
                    if prompt.len() as u32 + 1 < context
                        && rank.scheduler.submit(job(leg, &prompt, choices, output, work)).is_ok()
                    {
                        next = leg;
                        sources.insert(leg, source.0);
                        asked.insert(leg, Asked { prompt, choices, output, first, prefill: false, disturbed: false });
                    }
                }
                Act::Import { nth, ok } => finish_import(&mut rank, &sources, nth, ok),
                Act::Release { nth } => {
                    if let Some(&leg) = pick(rank.held.keys(), nth) {
                        rank.held.remove(&leg);
                        rank.scheduler.release_held(leg);
                    }
                }
                Act::Cancel { nth } => {
                    if let Some(&leg) = pick(asked.keys(), nth) {
                        rank.scheduler.cancel(LegId(leg));
                        rank.held.remove(&LegId(leg));
                        asked.get_mut(&leg).expect("it was picked").disturbed = true;
                    }
                }
                Act::Stop { nth, choice } => {
                    if let Some(&leg) = pick(asked.keys(), nth) {
                        rank.scheduler.stop_choice(LegId(leg), choice);
                        asked.get_mut(&leg).expect("it was picked").disturbed = true;
                    }
                }
                Act::Steps(steps) => (0..steps).for_each(|_| { rank.step(); }),
            }
            rank.check();
        }
        // Everything that waits for the outside gets it; then everything must end.
        for _ in 0..1000 {
            rank.run();
            while !rank.imports.is_empty() {
                finish_import(&mut rank, &sources, 0, true);
            }
            let held: Vec<LegId> = rank.held.keys().copied().collect();
            for leg in held {
                rank.held.remove(&leg);
                rank.scheduler.release_held(leg);
            }
            if rank.scheduler.is_idle() {
                break;
            }
        }
        rank.assert_clean();
        for (leg, of) in asked {
            for choice in 0..of.choices {
                let mut got: Vec<TokenId> =
                    of.first.iter().filter(|(c, _)| *c == choice).map(|(_, token)| *token).collect();
                got.extend(rank.outputs.get(&(LegId(leg), choice)).into_iter().flatten());
                let expected = oracle(&of.prompt, choice, of.output, context);
                let expected = if of.prefill { &expected[..1] } else { &expected[..] };
                if of.disturbed {
                    prop_assert!(expected.starts_with(&got), "leg {leg} choice {choice}");
                } else {
                    prop_assert_eq!(&got[..], expected, "leg {} choice {}", leg, choice);
                    prop_assert!(rank.ended.contains(&LegId(leg)));
                }
            }
        }
    }
}

/// One step of a scheduler whose tokens are drawn from leg and position alone.
fn plain_step(scheduler: &mut Scheduler, outputs: &mut Vec<Output>) {
    let mut plan = StepPlan::of_shapes();
    scheduler.plan(&mut plan);
    let drawn: Vec<_> = plan
        .chunks
        .iter()
        .flat_map(|chunk| {
            let position = chunk.start + chunk.count;
            plan.samples(chunk)
                .iter()
                .map(move |&choice| (chunk.leg, choice, plain_token(chunk.leg, position)))
        })
        .collect();
    scheduler.complete(&drawn, outputs);
}

fn plain_token(leg: LegId, position: u32) -> TokenId {
    // Few tokens, so that legs come to have equal blocks.
    (position / 7 + leg.0 as u32 % 2) % 5
}

fn told(scheduler: &mut Scheduler) -> impl PartialEq + std::fmt::Debug + use<> {
    let mut events = Vec::new();
    scheduler.drain_events(&mut events);
    let sequences = scheduler.running.iter().map(|it| (it.leg, it.len(), it.blocks.len() as u32));
    let sequences: Vec<(LegId, u32, u32)> = sequences.collect();
    (events, scheduler.load(), scheduler.accounting(), sequences)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn quiet_steps_at_once_leave_what_they_leave_one_by_one(
        jobs in prop::collection::vec((1_u32..40, 1_u32..60, 0_u64..4), 1..8),
        blocks in 30_u32..120,
        takes in prop::collection::vec(1_u32..30, 1..12),
    ) {
        let (mut single, mut bulk) = {
            let new = || Scheduler::new(config(blocks), hasher());
            (new(), new())
        };
        for (number, &(prompt_tokens, output_tokens_max, common)) in jobs.iter().enumerate() {
            let prompt: Vec<TokenId> = (0..prompt_tokens).map(|at| at + 100 * common as u32).collect();
            let job = Job {
                leg: LegId(number as u64),
                hashes: hasher().chain(BlockHash(0), &prompt).into(),
                prompt: prompt.into(),
                root: BlockHash(0),
                choices: vec![0],
                output_tokens_max,
                stop_tokens: [].into(),
                work: Work::Aggregated,
            };
            let taken = single.submit(job.clone());
            prop_assert_eq!(taken, bulk.submit(job));
        }
        let mut takes = takes.iter().cycle();
        let mut quiet = 0;
        for _ in 0..400 {
            let steps = bulk.quiet_steps().min(*takes.next().expect("it has no end"));
            let mut outputs = [Vec::new(), Vec::new()];
            if steps == 0 {
                plain_step(&mut single, &mut outputs[0]);
                plain_step(&mut bulk, &mut outputs[1]);
                prop_assert_eq!(&outputs[0], &outputs[1]);
            } else {
                let legs = bulk.decoding_legs().count();
                (0..steps).for_each(|_| plain_step(&mut single, &mut outputs[0]));
                bulk.advance(steps, plain_token);
                prop_assert_eq!(outputs[0].len(), legs * steps as usize, "one token each, nothing ends");
                quiet += steps;
            }
            prop_assert_eq!(told(&mut single), told(&mut bulk));
        }
        prop_assert!(single.is_idle() && bulk.is_idle());
        let decoded = jobs.iter().any(|&(_, output, _)| output > 3);
        prop_assert!(quiet > 0 || !decoded || jobs.len() > 1);
    }
}

fn pick<T>(mut from: impl ExactSizeIterator<Item = T>, nth: usize) -> Option<T> {
    (from.len() > 0).then(|| from.nth(nth % from.len())).flatten()
}

/// Ends one import: with the source's KV if it is still held and `ok`, else as failed.
fn finish_import(rank: &mut Rank, sources: &BTreeMap<u64, u64>, nth: usize, ok: bool) {
    if rank.imports.is_empty() {
        return;
    }
    let import = rank.imports.remove(nth % rank.imports.len());
    let held = rank.held.get(&LegId(sources[&import.leg.0])).filter(|_| ok).cloned();
    if let Some(blocks) = &held {
        for (source, local) in &import.blocks {
            rank.kv[*local as usize] = rank.kv[blocks[*source as usize] as usize];
        }
    }
    rank.scheduler.import_finished(import.leg, held.is_some());
    rank.apply_events();
    rank.check();
}
