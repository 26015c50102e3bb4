//! Runs drawn from a seed: a small fleet, a mixed load, and faults that all heal. Whatever happens, what must hold does.
//!
//! Start at [`Chaos::draw`]. Fleets are small and pools tight, so that queues fill, blocks run out and prompts are evicted
//! within seconds of virtual time.

use std::sync::Arc;

use forebay_engine_model::SchedulerConfig;
use forebay_fleet::LoadSight;
use forebay_lifecycle::Limits;
use forebay_perf_model::{KvLayout, Profile};
use forebay_placement::Policy;
use forebay_types::{FirstToken, Role};

use crate::{
    clock::Time,
    content::{Kind, Piece, name},
    draw::Draw,
    engine::{Delivery, EngineKind, EngineSpec},
    faults::{Fault, Trouble},
    gateway::GatewaySettings,
    rule::Rule,
    sim::{Ran, Run, RunSettings},
    workload::{Session, Turn},
};

/// Arrivals and the beginnings of faults.
const SECONDS: f64 = 15.0;
const FAULTS_MAX: u64 = 7;
const FAULT_SECONDS: f64 = 4.0;
const BLOCK_TOKENS: u32 = 16;

/// What one seed stands for.
pub struct Chaos {
    /// Fleet, gateways and faults; checked after every event.
    pub settings: RunSettings,
    /// What arrives.
    pub sessions: Vec<Session>,
}

impl Chaos {
    /// The run of this seed.
    pub fn draw(seed: u64) -> Self {
        let mut draw = Draw::new(seed, "chaos");
        let rule = rule(&mut draw);
        let engines = engines(rule, &mut draw);
        let gateways = 1 + draw.below(3) as usize;
        let faults = 0..draw.below(FAULTS_MAX + 1);
        let faults = faults.map(|_| fault(engines.len() as u64, gateways as u64, &mut draw)).collect();
        let gateway = GatewaySettings {
            first_token: if is(0.5, &mut draw) { FirstToken::Handed } else { FirstToken::OfDecode },
            sight: if is(0.5, &mut draw) { LoadSight::EveryStep } else { LoadSight::Sampled },
            profiled: is(0.7, &mut draw),
            ..GatewaySettings::new(rule, seed)
        };
        let limits = Limits {
            first_token_max: Time::from_seconds(30.0).duration(),
            total_max: Time::from_seconds(90.0).duration(),
            ..Limits::default()
        };
        let settings = RunSettings {
            faults,
            gateway,
            gateways,
            limits,
            delivery: if is(0.5, &mut draw) { Delivery::Asynchronous } else { Delivery::WithStep },
            report_delay_seconds: if is(0.5, &mut draw) { 0.0 } else { 0.05 * draw.unit() },
            gives_up: false,
            is_checked: true,
            ..RunSettings::new(engines, rule, seed, Time::from_seconds(SECONDS))
        };
        Self { settings, sessions: sessions(seed, &mut draw) }
    }

    /// Runs it; `is_logged`: with a line for each thing that happens.
    pub fn run(&self, is_logged: bool) -> Ran {
        let settings = RunSettings { is_logged, ..self.settings.clone() };
        Run::new(&settings, &self.sessions).go()
    }
}

fn is(chance: f64, draw: &mut Draw) -> bool {
    draw.unit() <= chance
}

fn rule(draw: &mut Draw) -> Rule {
    match draw.below(10) {
        0 => Rule::Sticky,
        1 => Rule::Static { prefill: 1, decode: 1 + draw.below(3) as usize, policy: Policy::Cost },
        2 => Rule::Static { prefill: 2, decode: 2, policy: Policy::LeastLoad },
        3 => Rule::Policy(Policy::ALL[draw.below(Policy::ALL.len() as u64) as usize]),
        _ => Rule::Policy(Policy::Cost),
    }
}

fn engines(rule: Rule, draw: &mut Draw) -> Vec<EngineSpec> {
    let count = rule.engines().unwrap_or(2 + draw.below(5) as usize);
    let is_group = rule.engines().is_none() && is(0.2, draw);
    let profile = if is_group { "h100x2-qwen3-30b-a3b" } else { "h100-llama8b" };
    let profile = Arc::new(Profile::built_in(profile).expect("it is built in"));
    let hands_over = rule.engines().is_some() || (!is_group && is(0.7, draw));
    let kind = EngineKind {
        profile,
        layout: hands_over.then_some(KvLayout::CrossLayerBlocks),
        link: None,
        kv_bytes_per_token: 131_072,
        scheduler: SchedulerConfig {
            block_size_tokens: BLOCK_TOKENS,
            blocks_total: 150 + draw.below(1000) as u32,
            step_tokens_max: 256 << draw.below(4),
            chunk_tokens_max: if is(0.3, draw) { 128 } else { u32::MAX },
            imports_first: is(0.5, draw),
            sequences_max: 2 + draw.below(24) as u32,
            waiting_max: 2 + draw.below(30) as u32,
            context_tokens_max: 4096,
        },
    };
    let dp_ranks = if is_group { 2 } else { 1 };
    let startup = if is(0.3, draw) { Time::from_seconds(4.0 * draw.unit()) } else { Time::ZERO };
    let spec =
        |number| EngineSpec { kind: kind.clone(), dp_ranks, role: rule.role(number), gpus: 1, startup };
    let mut engines: Vec<EngineSpec> = (0..count).map(spec).collect();
    // Now and then one that is pinned, beside those that are not.
    if rule.engines().is_none() && hands_over && is(0.2, draw) {
        engines[0].role = Role::Prefill;
    }
    engines
}

fn fault(engines: u64, gateways: u64, draw: &mut Draw) -> Fault {
    let mut engine = || draw.below(engines) as u32;
    let (first, second) = (engine(), engine());
    let trouble = match draw.below(14) {
        0..=2 => Trouble::Crash { engine: first },
        3 => Trouble::Vanish { engine: first },
        4 | 5 => Trouble::Hang { engine: first },
        6 => Trouble::Slow { engine: first, factor: 1.0 + 9.0 * draw.unit() },
        7 => Trouble::Drain { engine: first },
        8 => {
            let mut share = || 0.3 * draw.unit();
            Trouble::Events { engine: first, lost: share(), doubled: share(), late: share() }
        }
        9 => Trouble::StaleLoad { engine: first },
        10 => Trouble::Transfers { from: first, to: second },
        11 => Trouble::GatewayLoss { gateway: draw.below(gateways) as u32 },
        12 => match is(0.5, draw) {
            true => Trouble::RegistryAway,
            false => Trouble::Skew { engine: first, seconds: 4.0 * draw.unit() - 2.0 },
        },
        _ => Trouble::ClientsLeave { share: draw.unit() },
    };
    let at = Time::from_seconds(SECONDS * draw.unit());
    Fault { at, lasts: Some(Time::from_seconds(draw.exponential(FAULT_SECONDS))), trouble }
}

/// Chats of one to four turns, some with a common beginning; short prompts, long ones, and some that are too long.
fn sessions(seed: u64, draw: &mut Draw) -> Vec<Session> {
    let count = 10 + draw.below(60);
    let systems = 1 + draw.below(3);
    let mut sessions: Vec<Session> = (0..count)
        .map(|number| {
            let key = number + 1;
            let system = Piece { name: name(Kind::System, seed, draw.below(systems)), tokens: 16 * 12 };
            let turns = (0..1 + draw.below(4)).map(|turn| {
                let words = draw.lognormal_tokens(150.0, 1.3, 1, 4500);
                let said = Piece { name: name(Kind::User, key, turn), tokens: words };
                let answer = draw.lognormal_tokens(40.0, 1.0, 1, 400);
                Turn {
                    new: if turn == 0 { vec![system, said] } else { vec![said] },
                    answer: Piece { name: name(Kind::Answer, key, turn), tokens: answer },
                    think: Time::from_seconds(draw.exponential(0.5)),
                }
            });
            let turns = turns.collect();
            Session { at: Time::from_seconds(SECONDS * draw.unit()), key, tenant: (number % 3) as u32, turns }
        })
        .collect();
    sessions.sort_by_key(|session| session.at);
    sessions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Ending;

    /// Runs seeds; the first that does not hold ends it, with what repeats it.
    fn hold(seeds: std::ops::Range<u64>) {
        let (mut finished, mut failed) = (0, 0);
        for seed in seeds {
            let Ran { violations, outcomes, .. } = Chaos::draw(seed).run(false);
            assert!(
                violations.is_empty(),
                "{violations:?}; `forebay simulate --chaos --seed {seed} --log` repeats it"
            );
            let with = |ending| outcomes.iter().filter(|outcome| outcome.ending == ending).count();
            assert_eq!(with(Ending::Open), 0, "seed {seed}");
            finished += with(Ending::Finished);
            failed += with(Ending::Failed) + with(Ending::Rejected);
        }
        assert!(finished > 5 * failed, "{finished} finished, {failed} failed");
    }

    #[test]
    fn what_must_hold_does_first_hundred() {
        hold(0..100);
    }

    #[test]
    fn what_must_hold_does_second_hundred() {
        hold(100..200);
    }

    #[test]
    fn what_must_hold_does_third_hundred() {
        hold(200..300);
    }

    #[test]
    fn a_seed_is_the_same_run_every_time() {
        for seed in [3, 7, 11] {
            let log = || Chaos::draw(seed).run(true).log;
            assert_eq!(log(), log());
        }
    }
}
