//! How long one placement takes.
//!
//! What the gateway does for a request under its lock and just before: the index is asked for 64 hashes, the snapshot is
//! brought up to date, a plan is chosen and its record written, the load is reserved. Releasing it again is in the figure,
//! and so is one load report of a rank, since a fleet never stands still. Hashing the prompt is not.

use std::time::Instant;

use forebay_types::{BlockHash, LegId, RankLoad, Role, TenantId};
use serde_json::json;

use forebay_twin::{Ask, EngineSpec, Gateway, Time, Workload, mix};

use crate::options::Options;

const BLOCKS: usize = 64;
const ROUNDS: usize = 60;
/// Microseconds that a placement may take, by ranks.
const RANKS: [(usize, f64); 4] = [(8, f64::INFINITY), (64, 15.0), (256, f64::INFINITY), (1000, 120.0)];
/// Prompts that the fleet knows.
const PROMPTS: u64 = 256;

/// The command `time`.
pub fn time(options: &Options) -> Result<(), String> {
    let rule = options.rules().into_iter().find(|rule| rule.policy().is_some()).ok_or("no policy to time")?;
    let mut found = Vec::new();
    for (ranks, bar_us) in RANKS {
        let kind = Workload::FiveTurn.engine_kind(options.budgets[0], options.blocks);
        let engine = EngineSpec { kind, dp_ranks: 1, role: Role::Both, gpus: 1, startup: Time::ZERO };
        let mut gateway = Gateway::new(options.gateway_settings(rule, options.seed), &vec![engine; ranks]);
        let mut rounds = rounds(&mut gateway, ranks);
        rounds.sort_by(f64::total_cmp);
        let (quickest, median) = (rounds[0], rounds[rounds.len() / 2]);
        eprintln!("{rule} {ranks} ranks: {quickest:.1} us at best, {median:.1} us median");
        let bar = bar_us.is_finite().then_some(bar_us);
        found.push(json!({ "ranks": ranks, "us_best": quickest, "us_median": median, "us_bar": bar }));
    }
    println!("{:#}", json!({ "bench": "placement", "policy": rule.to_string(), "time": found }));
    Ok(())
}

/// The first quarter of a prompt is a system prompt that eight prompts share.
fn prompt(number: u64) -> Vec<BlockHash> {
    (0..BLOCKS as u64)
        .map(|block| {
            if block < BLOCKS as u64 / 4 { mix(number / 8 * 1000 + block) } else { mix(mix(number) ^ block) }
        })
        .map(BlockHash)
        .collect()
}

fn load(rank: usize, turn: usize) -> RankLoad {
    let decoding = ((rank * 7 + turn) % 40) as u32;
    let waiting = u32::from((rank + turn).is_multiple_of(5));
    RankLoad {
        running: decoding,
        decoding,
        waiting,
        prefill_tokens: u64::from(waiting) * 900,
        context_tokens: u64::from(decoding) * 2500,
        blocks_total: 28_000,
        blocks_free: 28_000 - decoding * 160,
        ..RankLoad::default()
    }
}

/// Microseconds of a placement, the mean of each round.
fn rounds(gateway: &mut Gateway, ranks: usize) -> Vec<f64> {
    let prompts: Vec<Vec<BlockHash>> = (0..PROMPTS).map(prompt).collect();
    let ids = gateway.ranks.clone();
    for (number, hashes) in prompts.iter().enumerate() {
        // Its own rank; of every eighth, another one too.
        let holders = [number, number + 11].into_iter().take(if number.is_multiple_of(8) { 2 } else { 1 });
        for holder in holders {
            gateway.cached(ids[holder % ranks], hashes.clone());
        }
    }
    let now = |turn: usize| Time::from_seconds(10.0 + turn as f64 * 1e-3);
    for (rank, &id) in ids.iter().enumerate() {
        gateway.sample(now(0), id, load(rank, 0));
    }
    let placements = 20_000 / ranks.max(20);
    let tenant = TenantId::from("bench");
    let mut turn = 0;
    let mut round = || {
        let began = Instant::now();
        for _ in 0..placements {
            turn += 1;
            let at = now(turn);
            let rank = mix(turn as u64) as usize % ranks;
            gateway.sample(at, ids[rank], load(rank, turn));
            let hashes = &prompts[mix(turn as u64 ^ 77) as usize % prompts.len()];
            let legs = [LegId(2 * turn as u64), LegId(2 * turn as u64 + 1)];
            let ask = Ask {
                session_key: 0,
                prompt_tokens: 1000 + BLOCKS as u32 / 2,
                hashes,
                legs,
                excluded: &[],
                tenant: &tenant,
            };
            let placed = gateway.place(at, &ask).expect("there is room");
            for leg in legs.into_iter().take(placed.reservations as usize) {
                gateway.release(at, leg);
            }
        }
        began.elapsed().as_secs_f64() * 1e6 / placements as f64
    };
    round();
    (0..ROUNDS).map(|_| round()).collect()
}
