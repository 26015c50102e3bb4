//! What holds after any events: sums equal those of a naive model, snapshots those of a naive rebuild.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proptest::{collection::vec, prelude::*};

use super::*;

fn any_rank() -> impl Strategy<Value = RankId> {
    (0_u64..5, 0_u16..3).prop_map(|(incarnation, dp_rank)| rank(incarnation, dp_rank))
}

fn any_amount() -> impl Strategy<Value = Reserved> {
    (0_u64..5000, 0_u64..5000, 0_u64..500, 0_u32..3, 0_u32..3, 0_u32..300).prop_map(
        |(prefill_tokens, context_tokens, output_tokens, sequences, decodes, blocks)| Reserved {
            prefill_tokens,
            context_tokens,
            output_tokens,
            sequences,
            decodes,
            blocks,
        },
    )
}

fn any_progress() -> impl Strategy<Value = Progress> {
    prop_oneof![
        (0_u64..3000).prop_map(|at| Progress::Accepted { at: ms(at) }),
        Just(Progress::Started),
        Just(Progress::Decoding),
        (0_u64..600).prop_map(|tokens| Progress::Generated { tokens }),
    ]
}

fn any_event() -> impl Strategy<Value = Event> {
    let incarnation = || (0_u64..5).prop_map(Incarnation);
    let id = || (0_u64..12).prop_map(ReservationId);
    prop_oneof![
        3 => (0_u64..5, 0_u64..3, 1_u16..3, any::<bool>()).prop_map(|(life, name, dp_ranks, sampled)| {
            let load_sight = if sampled { LoadSight::Sampled } else { LoadSight::EveryStep };
            Event::Joined(EngineFacts { load_sight, ..facts(&format!("e{name}"), life, dp_ranks) })
        }),
        2 => incarnation().prop_map(Event::Ready),
        1 => incarnation().prop_map(Event::Draining),
        1 => incarnation().prop_map(Event::Lost),
        6 => (any_rank(), 0_u32..9, 0_u32..9, 0_u64..3000).prop_map(|(rank, waiting, running, as_of)| {
            let load = RankLoad { waiting, running, decoding: running, ..RankLoad::default() };
            Event::Load { rank, load, as_of: ms(as_of) }
        }),
        3 => (any_rank(), 0_u32..500, 0_u32..9, 0.0..0.5_f64).prop_map(|(rank, prefill_tokens, decodes, seconds)| {
            let step = StepObservation { prefill_tokens, decodes, seconds, ..StepObservation::default() };
            Event::Step { rank, step }
        }),
        8 => (id(), any_rank(), any_amount()).prop_map(|(id, rank, amount)| Event::Reserved { id, rank, amount }),
        8 => (id(), any_progress()).prop_map(|(id, progress)| Event::Progress { id, progress }),
        5 => id().prop_map(Event::Released),
        2 => any_rank().prop_map(Event::LegOk),
        4 => any_rank().prop_map(Event::LegFailed),
        2 => (any_rank(), any_rank(), 1_u64..1 << 30, 0.001..2.0_f64)
            .prop_map(|(from, to, bytes, seconds)| Event::Transferred { from, to, bytes, seconds }),
    ]
}

/// Events, each some milliseconds after the one before, and whether a snapshot is taken after it, and held.
fn any_history() -> impl Strategy<Value = Vec<(u64, Event, bool, bool)>> {
    vec((0_u64..300, any_event(), any::<bool>(), any::<bool>()), 1..120)
}

fn small() -> FleetSettings {
    FleetSettings {
        ranks_max: 6,
        reservations_max: 9,
        links_max: 3,
        lost_remembered_max: 8,
        ..FleetSettings::default()
    }
}

/// What was promised, kept as a list of facts from which sums are taken anew each time.
#[derive(Default)]
struct Naive {
    lives: BTreeMap<u64, (String, u16, LoadSight)>,
    ended: BTreeSet<u64>,
    promises: BTreeMap<u64, Promise>,
}

struct Promise {
    rank: RankId,
    amount: Reserved,
    /// Milliseconds.
    accepted_at: Option<u64>,
    started: bool,
    decoding: bool,
    /// The same three, as of the rank's last load report.
    shown: (bool, bool, bool),
    generated: u64,
}

impl Naive {
    fn lives(&self, rank: RankId) -> bool {
        self.lives.get(&rank.incarnation.0).is_some_and(|(_, dp_ranks, _)| rank.dp_rank < *dp_ranks)
    }

    fn end(&mut self, life: u64) {
        if self.lives.remove(&life).is_some() {
            self.ended.insert(life);
            self.promises.retain(|_, promise| promise.rank.incarnation.0 != life);
        }
    }

    fn apply(&mut self, now: Duration, event: &Event) {
        match event {
            Event::Joined(facts) => {
                let (life, name) = (facts.incarnation.0, facts.engine.to_string());
                if self.lives.contains_key(&life) || self.ended.contains(&life) {
                    return;
                }
                let earlier =
                    self.lives.iter().find(|(_, (engine, ..))| *engine == name).map(|(&life, _)| life);
                let others = self.lives.iter().filter(|(other, _)| Some(**other) != earlier);
                let ranks: usize = others.map(|(_, (_, dp_ranks, _))| usize::from(*dp_ranks)).sum();
                if ranks + usize::from(facts.dp_ranks) <= small().ranks_max {
                    earlier.into_iter().for_each(|life| self.end(life));
                    self.lives.insert(life, (name, facts.dp_ranks, facts.load_sight));
                }
            }
            Event::Lost(life) => self.end(life.0),
            Event::Load { rank, as_of, .. } => {
                for promise in self.promises.values_mut().filter(|promise| promise.rank == *rank) {
                    if promise.accepted_at.is_some_and(|at| ms(at) <= *as_of) {
                        promise.shown = (true, promise.started, promise.decoding);
                    }
                }
            }
            Event::Reserved { id, rank, amount } => {
                let room = self.promises.len() < small().reservations_max;
                if self.lives(*rank) && room && !self.promises.contains_key(&id.0) {
                    let promise = Promise {
                        rank: *rank,
                        amount: *amount,
                        accepted_at: None,
                        started: false,
                        decoding: false,
                        shown: (false, false, false),
                        generated: 0,
                    };
                    self.promises.insert(id.0, promise);
                }
            }
            Event::Progress { id, progress } => {
                if let Some(promise) = self.promises.get_mut(&id.0) {
                    let at = if let Progress::Accepted { at } = progress { *at } else { now };
                    let at = at.as_millis() as u64;
                    promise.accepted_at = Some(promise.accepted_at.map_or(at, |before| before.min(at)));
                    promise.started |= !matches!(progress, Progress::Accepted { .. });
                    promise.decoding |= !matches!(progress, Progress::Accepted { .. } | Progress::Started);
                    if let Progress::Generated { tokens } = progress {
                        promise.generated = promise.generated.max(*tokens);
                    }
                }
            }
            Event::Released(id) => {
                self.promises.remove(&id.0);
            }
            _ => {}
        }
    }

    fn reserved(&self, rank: RankId) -> Reserved {
        let sampled = self.lives[&rank.incarnation.0].2 == LoadSight::Sampled;
        let mut sum = Reserved::default();
        for promise in self.promises.values().filter(|promise| promise.rank == rank) {
            let shown_when_sampled = (true, promise.decoding, promise.decoding);
            let (queued, allocated, decoding) = if sampled { shown_when_sampled } else { promise.shown };
            let amount = promise.amount;
            if !queued {
                sum.sequences += amount.sequences;
                sum.prefill_tokens += if promise.decoding { 0 } else { amount.prefill_tokens };
            }
            if !allocated {
                sum.blocks += amount.blocks;
            }
            if !decoding {
                sum.context_tokens += amount.context_tokens;
                sum.decodes += amount.decodes;
            }
            sum.output_tokens += amount.output_tokens - promise.generated.min(amount.output_tokens);
        }
        sum
    }
}

impl Naive {
    /// Of a rank whose load is sampled: sequences of ours that wait and run, their prompt tokens and context.
    fn known(&self, rank: RankId) -> (u32, u32, u64, u64) {
        let mut known = (0, 0, 0, 0);
        if self.lives[&rank.incarnation.0].2 == LoadSight::Sampled {
            for promise in self.promises.values().filter(|promise| promise.rank == rank) {
                if promise.decoding {
                    known.1 += promise.amount.sequences;
                    known.3 += promise.amount.context_tokens + promise.generated;
                } else {
                    known.0 += promise.amount.sequences;
                    known.2 += promise.amount.prefill_tokens;
                }
            }
        }
        known
    }
}

/// A view without its model, which is compared by identity.
fn text(view: &RankView) -> String {
    let blank = Arc::new(forebay_perf_model::RankModel::learned(StepCoefficients::H100_8B));
    format!("{:?}", RankView { perf: blank, ..view.clone() })
}

proptest! {
    #[test]
    fn reserved_totals_equal_a_naive_sum(history in any_history()) {
        let mut fleet = Fleet::new(small());
        let mut naive = Naive::default();
        let mut now = ms(0);
        for (wait, event, _, _) in history {
            now += ms(wait);
            naive.apply(now, &event);
            fleet.apply(now, event);
            let snapshot = fleet.snapshot(now);
            let ranks = naive.lives.iter().flat_map(|(&life, &(_, dp_ranks, _))| (0..dp_ranks).map(move |dp| rank(life, dp)));
            prop_assert_eq!(snapshot.ranks().iter().map(|view| view.id).collect::<Vec<_>>(), ranks.collect::<Vec<_>>());
            for view in snapshot.ranks() {
                prop_assert_eq!(view.reserved, naive.reserved(view.id));
                let known = naive.known(view.id);
                let load = (view.load.waiting, view.load.running, view.load.prefill_tokens, view.load.context_tokens);
                prop_assert!(load.0 >= known.0 && load.1 >= known.1 && load.2 >= known.2 && load.3 >= known.3);
            }
            prop_assert_eq!(fleet.reservations(), naive.promises.len());
        }
        let ids: Vec<u64> = naive.promises.keys().copied().collect();
        for id in ids {
            fleet.apply(now, Event::Released(ReservationId(id)));
        }
        prop_assert!(fleet.snapshot(now).ranks().iter().all(|view| view.reserved == Reserved::default()));
        prop_assert!(fleet.ranks.iter().all(|rank| rank.watched.is_empty()), "nothing is kept of what was released");
    }

    #[test]
    fn a_snapshot_equals_a_naive_rebuild(history in any_history()) {
        let settings = small();
        let mut fleet = Fleet::new(settings);
        let mut now = ms(0);
        let mut held: Vec<(Arc<forebay_placement::Snapshot>, Vec<String>)> = Vec::new();
        let mut last = fleet.snapshot(now);
        for (wait, event, take, hold) in history {
            now += ms(wait);
            fleet.apply(now, event);
            if !take {
                continue;
            }
            let snapshot = fleet.snapshot(now);
            let shown = ms(now.as_millis() as u64 / 10 * 10);
            prop_assert_eq!(snapshot.ranks().len(), fleet.ranks.len());
            for (view, rank) in snapshot.ranks().iter().zip(&fleet.ranks) {
                let rebuilt = rank.view(shown, &settings);
                prop_assert_eq!(text(view), text(&rebuilt));
                prop_assert!(Arc::ptr_eq(&view.perf, &rebuilt.perf));
                prop_assert!((0.0..=1.0).contains(&view.prefill_share));
            }
            prop_assert!(snapshot.links.measured().len() <= settings.links_max);
            prop_assert!(snapshot.generation >= last.generation);
            prop_assert_eq!(snapshot.generation == last.generation, Arc::ptr_eq(&snapshot, &last));
            if hold {
                held.push((snapshot.clone(), snapshot.ranks().iter().map(text).collect()));
            }
            last = snapshot;
        }
        for (snapshot, before) in held {
            prop_assert_eq!(snapshot.ranks().iter().map(text).collect::<Vec<_>>(), before, "what is held does not change");
        }
    }

    #[test]
    fn ignored_events_change_nothing(history in any_history()) {
        let mut fleet = Fleet::new(small());
        let mut now = ms(0);
        for (wait, event, _, _) in history {
            now += ms(wait);
            let (before, counters) = (fleet.snapshot(now), fleet.counters());
            let applied = fleet.apply(now, event);
            let same = Arc::ptr_eq(&before, &fleet.snapshot(now));
            if let Applied::Ignored(_) = applied {
                prop_assert!(same);
                prop_assert_ne!(counters, fleet.counters());
            } else if applied == Applied::Unchanged {
                prop_assert!(same);
            } else {
                prop_assert!(!same, "a change shows");
            }
        }
    }
}
