//! Times one placement among 64 ranks, 8 of them warm: `cargo bench -p forebay-placement`.
#![allow(clippy::print_stdout, reason = "a bench prints its figure")]

use std::{hint::black_box, sync::Arc, time::Duration, time::Instant};

use forebay_perf_model::{LinkModel, LinkPrior, RankModel, StepCoefficients};
use forebay_placement::{
    Breaker, Form, Links, Policy, RankState, RankView, Request, Reserved, Snapshot, Weights, place,
};
use forebay_types::{BlockHash, FirstToken, Incarnation, Leaning, RankId, RankLoad, Role};

/// The quickest of many short rounds: on a shared machine the rest measures the neighbours.
const ROUNDS: u64 = 100;
const PLACEMENTS: u64 = 1_000;

fn rank(n: u64) -> RankView {
    let decoding = (n % 24) as u32;
    RankView {
        id: RankId { incarnation: Incarnation(n), dp_rank: 0 },
        engine: format!("sim-{n}").into(),
        model: "m".into(),
        role: Role::Both,
        state: RankState::Ready,
        breaker: Breaker::Closed,
        load: RankLoad {
            running: decoding,
            decoding,
            waiting: (n % 3) as u32,
            prefill_tokens: n % 3 * 700,
            context_tokens: u64::from(decoding) * 1000,
            blocks_total: 20_000,
            blocks_free: 15_000,
            ..RankLoad::default()
        },
        load_age: Duration::from_millis(3),
        others: 0,
        reserved: Reserved::default(),
        prefill_share: (n % 10) as f64 / 20.0,
        perf: Arc::new(RankModel::learned(StepCoefficients::H100_8B)),
        steps_together: false,
        block_size_tokens: 16,
        block_bytes: 2 << 20,
        step_tokens_max: 8192,
        context_tokens_max: 32_768,
        waiting_max: 64,
        kv_layout: 1,
        can_export: true,
        can_import: true,
        needs_warming: false,
        first_token: FirstToken::Handed,
        takes_tokens: true,
        takes_body: false,
        itl_p99_seconds: 0.0,
        leaning: Leaning::Neither,
    }
}

fn main() {
    let mut links = Links::new(LinkModel::new(LinkPrior::NVLINK));
    for n in 0..512_u64 {
        links.observe(Incarnation(n % 64), Incarnation(n * 7 % 61), 1 << 28, 0.01);
    }
    let snapshot = Snapshot::new(1, (0..64).map(rank).collect(), links);
    let overlaps: Vec<(RankId, u32)> =
        (0..8).map(|n| (RankId { incarnation: Incarnation(n * 5), dp_rank: 0 }, 60)).collect();
    for policy in Policy::ALL {
        let mut quickest = f64::INFINITY;
        for round in 0..ROUNDS {
            let started = Instant::now();
            for turn in 0..PLACEMENTS {
                let seed = round * PLACEMENTS + turn;
                let request = Request {
                    model: "m",
                    prompt_tokens: 2000 + (seed % 100) as u32,
                    overlaps: &overlaps,
                    overlap_block_tokens: 16,
                    form: Form::Tokens,
                    output_tokens_expected: 200,
                    output_tokens_max: 1024,
                    choices: 1,
                    excluded: &[],
                    beginning: Some(BlockHash(seed % 50)),
                };
                let decision = place(&snapshot, &request, policy, &Weights::default(), seed);
                black_box(decision.expect("the fleet has room"));
            }
            quickest = quickest.min(started.elapsed().as_secs_f64());
        }
        println!("place among 64 ranks, {policy}: {:.2} µs", quickest * 1e6 / PLACEMENTS as f64);
    }
}
