use forebay_perf_model::{LinkModel, LinkPrior, RankModel, StepCoefficients};
use forebay_placement::{Breaker, Links, RankView, Reserved};
use forebay_types::{FirstToken, RankId, RankLoad};
use proptest::prelude::*;

use super::*;

const PROMPT_SECONDS: f64 = 0.1;

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn peer(number: u64) -> Peer {
    Peer {
        incarnation: Incarnation(number),
        step_tokens_max: 8192,
        prefill_share: 0.0,
        prefill_seconds: PROMPT_SECONDS,
        kv_use: 0.1,
        ranks: 1,
        leaning: Leaning::Neither,
    }
}

/// A fleet that does as it is told.
struct Fleet {
    leanings: Leanings,
    peers: Vec<Peer>,
    now: f64,
    placed: f64,
    moves: Vec<(f64, usize)>,
}

impl Fleet {
    fn of(peers: Vec<Peer>) -> Self {
        Self {
            leanings: Leanings::new(LeaningSettings::default()),
            peers,
            now: 0.0,
            placed: 0.0,
            moves: Vec::new(),
        }
    }

    fn new(engines: u64) -> Self {
        Self::of((1..=engines).map(peer).collect())
    }

    /// For so long, prompts of 4,000 new tokens and answers of 200 come at a rate that is so many engines' prefill load.
    fn run(&mut self, load: f64, for_seconds: f64) -> &mut Self {
        self.run_with(load, for_seconds, 4000, 200)
    }

    fn run_with(&mut self, load: f64, for_seconds: f64, new_tokens: u32, output_tokens: u32) -> &mut Self {
        let (gap, until) = (PROMPT_SECONDS / load, self.now + for_seconds);
        self.placed = self.placed.max(self.now);
        while self.now < until {
            self.now += 1.0;
            while self.placed + gap <= self.now {
                self.placed += gap;
                self.leanings.placed(seconds(self.placed), new_tokens, 0, output_tokens);
            }
            let before = self.leanings.prefills();
            for (incarnation, leaning) in
                self.leanings.review(seconds(self.now), &self.peers, &Around::default())
            {
                self.peers.iter_mut().find(|it| it.incarnation == incarnation).unwrap().leaning = leaning;
            }
            if self.leanings.prefills() != before {
                self.moves.push((self.now, self.leanings.prefills()));
            }
        }
        self
    }

    fn leaning(&self) -> String {
        let letter = |peer: &Peer| match peer.leaning {
            Leaning::Neither => '-',
            Leaning::Prefill => 'P',
            Leaning::Decode => 'd',
        };
        self.peers.iter().map(letter).collect()
    }
}

#[test]
fn as_many_lean_to_prefill_as_prompts_keep_busy() {
    assert_eq!(Fleet::new(2).run(0.65, 30.0).leaning(), "Pd");
    assert_eq!(Fleet::new(4).run(2.1, 30.0).leaning(), "PPdd");
    assert_eq!(Fleet::new(8).run(4.2, 30.0).leaning(), "PPPPdddd");
    assert_eq!(Fleet::new(8).run(0.2, 30.0).leaning(), "--------", "prompts are rare");
    assert_eq!(Fleet::new(1).run(0.9, 30.0).leaning(), "-", "there is nobody to hand over to");
}

#[test]
fn nothing_leans_before_the_load_is_known() {
    let mut fleet = Fleet::new(4);
    assert_eq!(fleet.run(2.0, 9.0).leaning(), "----");
    assert_eq!(fleet.run(2.0, 3.0).leaning(), "PPdd");
}

#[test]
fn short_prompts_and_short_answers_need_no_engine_kept_for_them() {
    assert_eq!(Fleet::new(4).run_with(2.0, 30.0, 1200, 200).leaning(), "----");
    assert_eq!(Fleet::new(4).run_with(2.0, 30.0, 4000, 8).leaning(), "----");
    let mut fleet = Fleet::new(4);
    fleet.run(2.0, 30.0).run_with(2.0, 60.0, 1000, 200);
    assert_eq!(fleet.leaning(), "----", "prompts became short");
}

#[test]
fn the_count_follows_the_load_one_at_a_time() {
    let mut fleet = Fleet::new(8);
    fleet.run(2.0, 60.0).run(5.0, 120.0).run(2.0, 120.0).run(0.1, 120.0);
    let counts: Vec<usize> = fleet.moves.iter().map(|&(_, count)| count).collect();
    assert_eq!(counts, [2, 3, 4, 5, 4, 3, 2, 1, 0]);
    let gaps = fleet.moves.windows(2).map(|pair| pair[1].0 - pair[0].0);
    assert!(gaps.into_iter().all(|gap| gap >= 10.0), "{:?}", fleet.moves);
}

#[test]
fn engines_with_the_largest_steps_prefill_and_keep_doing_so() {
    let small = |number| Peer { step_tokens_max: 832, ..peer(number) };
    let mut fleet = Fleet::of(vec![small(1), peer(2), small(3), peer(4)]);
    assert_eq!(fleet.run(2.0, 30.0).leaning(), "dPdP");
    // One that computes more prompts at the moment does not take over.
    let mut fleet = Fleet::new(3);
    assert_eq!(fleet.run(1.0, 30.0).leaning(), "Pdd");
    fleet.peers[2].prefill_share = 0.9;
    assert_eq!(fleet.run(1.0, 60.0).leaning(), "Pdd");
}

#[test]
fn another_engine_takes_the_place_of_one_that_went() {
    let mut fleet = Fleet::new(3);
    assert_eq!(fleet.run(1.0, 30.0).leaning(), "Pdd");
    fleet.peers.remove(0);
    fleet.peers.push(peer(9));
    assert_eq!(fleet.run(1.0, 1.0).leaning(), "Pdd");
    assert_eq!(fleet.peers[0].incarnation, Incarnation(2));
    fleet.peers.truncate(1);
    assert_eq!(fleet.run(1.0, 1.0).leaning(), "-", "alone it does both");
}

#[test]
fn what_all_hold_has_to_fit_into_those_that_decode() {
    let mut fleet = Fleet::of((1..=4).map(|number| Peer { kv_use: 0.35, ..peer(number) }).collect());
    // 1.4 pools are held: two can hold them at 0.75, and 0.6 to begin with takes three.
    assert_eq!(fleet.run(2.0, 30.0).leaning(), "----", "one alone would keep prompts waiting");
    assert_eq!(fleet.run(1.0, 60.0).leaning(), "Pddd");
}

#[test]
fn room_that_runs_out_is_given_back_at_once() {
    let mut fleet = Fleet::new(4);
    assert_eq!(fleet.run(2.0, 11.0).leaning(), "PPdd");
    fleet.peers.iter_mut().filter(|peer| peer.leaning == Leaning::Decode).for_each(|peer| peer.kv_use = 0.9);
    fleet.run(2.0, 1.0);
    assert!(fleet.leanings.prefills() < 2, "{}", fleet.leaning());
}

#[test]
fn who_sees_half_of_the_sequences_takes_the_load_for_twice_its_own() {
    let load_seen_as = |own_share: f64| {
        let mut leanings = Leanings::new(LeaningSettings::default());
        let peers: Vec<Peer> = (1..=8).map(peer).collect();
        for prompt in 0..400 {
            leanings.placed(seconds(f64::from(prompt) * PROMPT_SECONDS / 2.0), 4000, 0, 200);
        }
        leanings.review(seconds(20.0), &peers, &Around { own_share, ..Around::default() });
        leanings.prefills()
    };
    assert_eq!((load_seen_as(1.0), load_seen_as(0.5)), (2, 4));
    assert!(load_seen_as(0.0) < 8, "a share of nothing is no reason to keep no engine for decodes");
}

#[test]
fn what_pinned_engines_compute_nobody_leans_for() {
    let prefills = |pinned_prefills| {
        let mut leanings = Leanings::new(LeaningSettings::default());
        let peers: Vec<Peer> = (1..=8).map(peer).collect();
        for prompt in 0..400 {
            leanings.placed(seconds(f64::from(prompt) * PROMPT_SECONDS / 2.0), 4000, 0, 200);
        }
        leanings.review(seconds(20.0), &peers, &Around { pinned_prefills, ..Around::default() });
        leanings.prefills()
    };
    assert_eq!([0, 1, 2, 9].map(prefills), [2, 1, 0, 0]);
}

#[test]
fn disabled_it_is_never_due() {
    let mut leanings = Leanings::new(LeaningSettings { enabled: false, ..LeaningSettings::default() });
    leanings.placed(Duration::ZERO, 4000, 0, 200);
    assert!(!leanings.is_due(seconds(100.0)));
}

fn rank(incarnation: u64, dp_rank: u16) -> RankView {
    RankView {
        id: RankId { incarnation: Incarnation(incarnation), dp_rank },
        engine: "engine".into(),
        model: "m".into(),
        role: Role::Both,
        leaning: Leaning::Neither,
        state: RankState::Ready,
        breaker: Breaker::Closed,
        load: RankLoad { blocks_total: 100, blocks_free: 60, ..RankLoad::default() },
        load_age: Duration::ZERO,
        others: 0,
        reserved: Reserved { blocks: 10, ..Reserved::default() },
        prefill_share: 0.0,
        perf: std::sync::Arc::new(RankModel::learned(StepCoefficients::H100_8B)),
        steps_together: false,
        block_size_tokens: 16,
        block_bytes: 1,
        step_tokens_max: 8192,
        context_tokens_max: 100_000,
        waiting_max: 64,
        kv_layout: 1,
        can_export: true,
        can_import: true,
        needs_warming: false,
        first_token: FirstToken::Handed,
        takes_tokens: true,
        takes_body: false,
        itl_p99_seconds: 0.0,
    }
}

#[test]
fn peers_are_ready_engines_of_the_model_that_can_exchange_kv() {
    let ranks = vec![
        rank(1, 0),
        rank(1, 1),
        rank(2, 0),
        RankView { role: Role::Prefill, ..rank(3, 0) },
        RankView { state: RankState::Draining, ..rank(4, 0) },
        RankView { model: "other".into(), ..rank(5, 0) },
        RankView { can_import: false, ..rank(6, 0) },
        RankView { steps_together: true, ..rank(7, 0) },
        RankView { kv_layout: 2, ..rank(8, 0) },
    ];
    let snapshot = Snapshot::new(1, ranks, Links::new(LinkModel::new(LinkPrior::NVLINK)));
    let prompt = MeanPrompt { new_tokens: 4000.0, attention: 8e6, output_tokens: 200.0 };
    let peers = Peer::of(&snapshot, "m", &prompt);
    let found: Vec<_> = peers.iter().map(|peer| (peer.incarnation.0, peer.ranks)).collect();
    assert_eq!(found, [(1, 2), (2, 1)]);
    assert_eq!(peers[0].kv_use, 0.5);
    assert!((0.01..1.0).contains(&peers[0].prefill_seconds), "{}", peers[0].prefill_seconds);
    assert_eq!(Peer::of(&snapshot, "nobody's", &prompt), []);
    assert_eq!(Around::of(&snapshot, "m"), Around { own_share: 1.0, pinned_prefills: 1 });
}

proptest! {
    /// Whatever the engines say: never all prefill, never one leaning without the other, no change that changes nothing.
    #[test]
    fn there_is_always_somebody_to_decode(
        rounds in prop::collection::vec(
            (0.0..20.0f64, prop::collection::vec((0u64..12, 0.0..2.0f64, prop_oneof![Just(f64::NAN), 0.0..1.0f64]), 0..9)),
            1..40,
        ),
    ) {
        let mut leanings = Leanings::new(LeaningSettings::default());
        let mut leaning = std::collections::BTreeMap::new();
        for (round, (rate, engines)) in rounds.into_iter().enumerate() {
            let now = round as f64 * 4.0 + 4.0;
            for prompt in 0..(rate * 4.0) as u32 {
                leanings.placed(seconds(now - 4.0 + f64::from(prompt) / rate.max(1.0)), 4000, 0, 200);
            }
            let mut peers: Vec<Peer> = engines
                .into_iter()
                .map(|(number, kv_use, prefill_seconds)| Peer {
                    kv_use,
                    prefill_seconds,
                    leaning: leaning.get(&number).copied().unwrap_or_default(),
                    ..peer(number)
                })
                .collect();
            peers.sort_by_key(|peer| peer.incarnation);
            peers.dedup_by_key(|peer| peer.incarnation);
            for (incarnation, new) in leanings.review(seconds(now), &peers, &Around::default()) {
                prop_assert_ne!(leaning.insert(incarnation.0, new), Some(new));
            }
            let lean = |to| peers.iter().filter(|peer| leaning.get(&peer.incarnation.0).copied().unwrap_or_default() == to).count();
            prop_assert_eq!(lean(Leaning::Prefill), leanings.prefills());
            prop_assert_eq!(lean(Leaning::Prefill) > 0, lean(Leaning::Decode) > 0);
        }
    }
}
