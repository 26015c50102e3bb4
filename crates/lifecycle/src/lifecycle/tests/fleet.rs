//! The lifecycle over a simulated fleet in which anything may die, be refused, come late, come twice or be skipped.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

const PROMPT_TOKENS: u32 = 100;

/// How bad the world is: chances in 256.
#[derive(Debug, Clone, Copy)]
struct Faults {
    die: u8,
    refuse: u8,
    skip: u8,
    repeat: u8,
    end_early: u8,
    kv_fails: u8,
    no_place: u8,
    client_goes: u8,
    stop_string: u8,
}

const NO_FAULTS: Faults = Faults {
    die: 0,
    refuse: 0,
    skip: 0,
    repeat: 0,
    end_early: 0,
    kv_fails: 0,
    no_place: 0,
    client_goes: 0,
    stop_string: 0,
};

/// One thing that a leg says.
#[derive(Debug, Clone)]
enum Said {
    Token { choice: u32, position: u32 },
    Event(Event),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Live,
    Ended,
    Cancelled,
}

struct Leg {
    rank: RankId,
    status: Status,
    /// What it has yet to say. A cancelled leg may still say it: messages were on the way.
    queue: VecDeque<Said>,
    held: bool,
    released: u32,
}

struct Sim {
    random: u64,
    faults: Faults,
    ranks: u64,
    request: Start,
    life: Lifecycle,
    now: Duration,
    legs: BTreeMap<LegId, Leg>,
    leg_next: u64,
    questions: Vec<(PlacementId, Vec<RankId>)>,
    places: u32,
    /// Tokens delivered to the client.
    sent: Vec<u32>,
    ended: Vec<Option<FinishReason>>,
    stopped: BTreeSet<u32>,
    terminal: Option<Action>,
}

/// The sequence that every engine computes: choice `c` ends with a stop token after 1 to 15 tokens.
fn reference(choice: u32, position: u32) -> TokenId {
    let index = position - PROMPT_TOKENS;
    if index == choice * 7 % 15 { STOP } else { 1000 + choice * 100 + index }
}

impl Sim {
    fn new(seed: u64, faults: Faults, ranks: u64, request: Start, limits: Limits) -> Self {
        let choices = request.choices as usize;
        let (life, actions) = Lifecycle::start(Duration::ZERO, request.clone(), limits);
        let mut sim = Self {
            random: seed,
            faults,
            ranks,
            request,
            life,
            now: Duration::ZERO,
            legs: BTreeMap::new(),
            leg_next: 0,
            questions: Vec::new(),
            places: 0,
            sent: vec![0; choices],
            ended: vec![None; choices],
            stopped: BTreeSet::new(),
            terminal: None,
        };
        sim.perform(actions);
        sim
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % bound.max(1)
    }

    fn happens(&mut self, chance: u8) -> bool {
        self.below(256) < u64::from(chance)
    }

    /// Runs until the request has ended, then delivers what is still on the way.
    fn run(&mut self) {
        for _ in 0..10_000 {
            if self.terminal.is_some() {
                self.drain();
                return;
            }
            let passed = self.below(3);
            self.now += Duration::from_millis(passed);
            self.one_thing_happens();
        }
        panic!("the request neither ended nor failed");
    }

    fn one_thing_happens(&mut self) {
        if self.happens(self.faults.client_goes / 16) {
            return self.step(Event::ClientGone);
        }
        let speaking: Vec<LegId> =
            self.legs.iter().filter(|(_, leg)| !leg.queue.is_empty()).map(|(&id, _)| id).collect();
        let pick = self.below((speaking.len() + self.questions.len()) as u64) as usize;
        if let Some(&leg) = speaking.get(pick) {
            self.speak(leg);
        } else if pick - speaking.len() < self.questions.len() {
            let (placement, exclude) = self.questions.swap_remove(pick - speaking.len());
            self.answer(placement, &exclude);
        } else {
            let deadline = self.life.deadline().expect("a live request has a deadline");
            self.now = self.now.max(deadline);
            self.step(Event::Tick);
        }
    }

    fn speak(&mut self, id: LegId) {
        let leg = self.legs.get_mut(&id).unwrap();
        let said = leg.queue.pop_front().unwrap();
        let was_live = leg.status == Status::Live;
        match said {
            Said::Token { choice, position } => {
                let token = reference(choice, position);
                if self.life.token(id, choice, position, token) == Accepted::Yes {
                    assert!(was_live, "a token of a leg that is over");
                    let sent = &mut self.sent[choice as usize];
                    assert_eq!(position, PROMPT_TOKENS + *sent, "repeated or missing");
                    *sent += 1;
                    if self.happens(self.faults.stop_string / 4) {
                        self.stopped.insert(choice);
                        self.step(Event::StopMatched { choice });
                    }
                }
            }
            Said::Event(event) => {
                self.step(event);
                let leg = self.legs.get_mut(&id).unwrap();
                // Unless this very step cancelled it.
                if leg.status == Status::Live {
                    match event {
                        Event::Prefilled { .. } => {
                            leg.status = Status::Ended;
                            leg.held = true;
                        }
                        Event::LegEnded { .. } | Event::LegLost { .. } | Event::LegRefused { .. } => {
                            leg.status = Status::Ended;
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    fn answer(&mut self, placement: PlacementId, exclude: &[RankId]) {
        let free: Vec<RankId> = (0..self.ranks).map(rank).filter(|rank| !exclude.contains(rank)).collect();
        if free.is_empty() || self.happens(self.faults.no_place) {
            let why = if free.is_empty() || self.happens(64) { Unplaced::Never } else { Unplaced::Retry };
            return self.step(Event::NotPlaced { placement, why });
        }
        let first = free[self.below(free.len() as u64) as usize];
        let second = free[self.below(free.len() as u64) as usize];
        let plan = match first == second {
            true => Plan::Aggregated { rank: first },
            false => Plan::Split { prefill: first, decode: second },
        };
        for _ in 0..1 + u8::from(self.happens(self.faults.repeat)) {
            let legs = [LegId(self.leg_next), LegId(self.leg_next + 1)];
            self.leg_next += 2;
            self.step(Event::Placed { placement, plan, legs, terms: Terms::default() });
        }
    }

    fn step(&mut self, event: Event) {
        let actions = self.life.step(self.now, event);
        self.perform(actions);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            assert!(self.terminal.is_none(), "{action:?} after the end");
            match action {
                Action::Place { placement, exclude, .. } => {
                    self.places += 1;
                    self.questions.push((placement, exclude));
                }
                Action::Start(order) => self.start(&order),
                Action::CancelLeg { leg, rank } => {
                    let leg = self.legs.get_mut(&leg).expect("started");
                    assert_eq!(
                        (leg.status, leg.rank),
                        (Status::Live, rank),
                        "cancelled twice, or after its end"
                    );
                    leg.status = Status::Cancelled;
                }
                Action::StopChoice { leg, rank, choice } => {
                    let leg = self.legs.get_mut(&leg).expect("started");
                    assert_eq!((leg.status, leg.rank), (Status::Live, rank));
                    if self.random.is_multiple_of(2) {
                        leg.queue
                            .retain(|said| !matches!(said, Said::Token { choice: c, .. } if *c == choice));
                    }
                }
                Action::ReleaseHeld { leg, rank } => {
                    let leg = self.legs.get_mut(&leg).expect("started");
                    assert_eq!(leg.rank, rank);
                    leg.released += 1;
                }
                Action::FinishChoice { choice, reason } => {
                    let ended = self.ended[choice as usize].replace(reason);
                    assert_eq!(ended, None, "choice {choice} ended twice");
                }
                Action::Report { .. } => {}
                Action::Finish | Action::Fail(_) => self.terminal = Some(action),
            }
        }
    }

    /// Writes down all that a leg will say.
    fn start(&mut self, order: &LegOrder) {
        let id = order.leg;
        let mut said = VecDeque::from([Said::Event(Event::LegStarted { leg: id, cached_tokens: 0 })]);
        let mut position = PROMPT_TOKENS;
        if let Purpose::Continue { choice, generated_tokens } = order.prompt {
            assert_eq!(order.choices, [choice]);
            assert_eq!(
                generated_tokens,
                self.sent[choice as usize] - u32::from(matches!(order.work, Work::Decode { .. }))
            );
            position += generated_tokens;
        }
        let end = position + order.output_tokens_max;
        assert_eq!(end, PROMPT_TOKENS + self.request.output_tokens_max);
        let mut open = order.choices.clone();
        match &order.work {
            Work::Aggregated => self.draw(id, &mut said, &mut open, position..end, end),
            Work::Prefill => {
                self.draw(id, &mut said, &mut open, position..position + 1, end);
                if !open.is_empty() || self.happens(128) {
                    said.push_back(Said::Event(Event::Prefilled { leg: id, first: FirstToken::Handed }));
                }
            }
            Work::Decode { from, from_rank, first } => {
                let source = &self.legs[from];
                assert_eq!((source.rank, source.released), (*from_rank, 0), "its KV is held");
                let expected: Vec<_> =
                    open.iter().map(|&choice| (choice, reference(choice, position))).collect();
                assert_eq!(first, &expected);
                said.push_back(Said::Event(match self.happens(self.faults.kv_fails) {
                    true => Event::KvFailed { leg: id },
                    false => Event::KvArrived { leg: id },
                }));
                self.draw(id, &mut said, &mut open, position + 1..end, end);
            }
        }
        said.push_back(Said::Event(Event::LegEnded { leg: id }));
        self.spoil(id, &mut said);
        let leg = Leg { rank: order.rank, status: Status::Live, queue: said, held: false, released: 0 };
        assert!(self.legs.insert(id, leg).is_none(), "one leg was started twice");
    }

    /// A leg's tokens at `positions`; choices that end leave `open`.
    fn draw(
        &self,
        leg: LegId,
        said: &mut VecDeque<Said>,
        open: &mut Vec<u32>,
        positions: std::ops::Range<u32>,
        end: u32,
    ) {
        for position in positions {
            open.retain(|&choice| {
                said.push_back(Said::Token { choice, position });
                let reason = match reference(choice, position) {
                    STOP => FinishReason::Stop,
                    _ if position + 1 == end => FinishReason::Length,
                    _ => return true,
                };
                said.push_back(Said::Event(Event::ChoiceFinished { leg, choice, reason }));
                false
            });
        }
    }

    /// What goes wrong with a leg is decided at its start; when it shows depends on the order of everything.
    fn spoil(&mut self, leg: LegId, said: &mut VecDeque<Said>) {
        if self.happens(self.faults.refuse) {
            let why = if self.happens(128) { Refusal::Gone } else { Refusal::Unfit };
            *said = VecDeque::from([Said::Event(Event::LegRefused { leg, why })]);
            return;
        }
        if self.happens(self.faults.skip) {
            // Not the last of a choice: no later position would show that it is missing.
            let is_last =
                |i: usize| matches!(said.get(i + 1), Some(Said::Event(Event::ChoiceFinished { .. })));
            let tokens: Vec<usize> =
                (0..said.len()).filter(|&i| matches!(said[i], Said::Token { .. }) && !is_last(i)).collect();
            if !tokens.is_empty() {
                said.remove(tokens[self.below(tokens.len() as u64) as usize]);
            }
        }
        for _ in 0..3 {
            if self.happens(self.faults.repeat) {
                let from = self.below(said.len() as u64) as usize;
                let to = from + 1 + self.below((said.len() - from) as u64) as usize;
                said.insert(to, said[from].clone());
            }
        }
        if self.happens(self.faults.die) {
            said.truncate(self.below(said.len() as u64 + 1) as usize);
            said.push_back(Said::Event(Event::LegLost { leg }));
        } else if self.happens(self.faults.end_early) {
            said.truncate(self.below(said.len() as u64) as usize);
            said.push_back(Said::Event(Event::LegEnded { leg }));
        }
    }

    /// After the end nothing has any effect.
    fn drain(&mut self) {
        for leg in self.legs.keys().copied().collect::<Vec<_>>() {
            while !self.legs[&leg].queue.is_empty() {
                self.speak(leg);
            }
        }
        for (placement, exclude) in std::mem::take(&mut self.questions) {
            self.answer(placement, &exclude);
        }
        self.step(Event::Tick);
        self.step(Event::ClientGone);
        assert_eq!(self.life.deadline(), None);
    }

    fn check(&self, limits: &Limits) {
        for (id, leg) in &self.legs {
            assert!(leg.status != Status::Live, "leg {id} was left behind");
            assert_eq!(leg.released, u32::from(leg.held), "KV of leg {id}: released {} times", leg.released);
        }
        assert!(self.places <= limits.placements_max + self.request.choices * limits.migrations_max);
        for choice in 0..self.request.choices {
            let tokens: Vec<_> = (PROMPT_TOKENS..PROMPT_TOKENS + self.sent[choice as usize])
                .map(|p| reference(choice, p))
                .collect();
            assert_eq!(self.life.generated(choice), tokens);
        }
        match self.terminal.as_ref().unwrap() {
            Action::Finish => (0..self.request.choices).for_each(|choice| self.check_whole(choice)),
            Action::Fail(Failure::LostMidStream { tokens_sent }) => {
                assert!(*tokens_sent > 0 && *tokens_sent == u64::from(self.sent.iter().sum::<u32>()));
            }
            Action::Fail(Failure::LostUnanswered { attempts } | Failure::Refused { attempts }) => {
                assert!(*attempts > 0 && self.sent.iter().all(|&sent| sent == 0));
            }
            Action::Fail(Failure::NotPlaced) => assert!(self.legs.is_empty()),
            Action::Fail(Failure::ClientGone | Failure::DeadlineExceeded { .. }) => {}
            other => panic!("{other:?} is no end"),
        }
    }

    /// A choice of a finished request has all its tokens and says rightly why there are no more.
    fn check_whole(&self, choice: u32) {
        let sent = self.sent[choice as usize];
        let reason = self.ended[choice as usize].expect("every choice of a finished request has ended");
        let last = sent.checked_sub(1).map(|last| reference(choice, PROMPT_TOKENS + last));
        if last == Some(STOP) {
            assert_eq!(reason, FinishReason::Stop);
        } else if sent == self.request.output_tokens_max {
            assert!(reason == FinishReason::Length || self.stopped.contains(&choice));
        } else {
            assert!(
                self.stopped.contains(&choice) && reason == FinishReason::Stop,
                "choice {choice}: {sent} tokens"
            );
        }
    }
}

prop_compose! {
    fn faults()(f in prop::array::uniform9(prop_oneof![3 => Just(0u8), 3 => 0u8..40, 1 => 0u8..200])) -> Faults {
        let [die, refuse, skip, repeat, end_early, kv_fails, no_place, client_goes, stop_string] = f;
        Faults { die, refuse, skip, repeat, end_early, kv_fails, no_place, client_goes, stop_string }
    }
}

prop_compose! {
    fn limits()(
        placements_max in 1u32..4, losses_max in 1u32..4, migrations_max in 0u32..4,
        retry_ms in 1u64..20, first_ms in prop_oneof![5u64..100, Just(u64::MAX)], total_ms in prop_oneof![20u64..200, Just(u64::MAX)],
    ) -> Limits {
        Limits {
            placements_max,
            losses_max,
            migrations_max,
            placement_retry: Duration::from_millis(retry_ms),
            first_token_max: Duration::from_millis(first_ms),
            total_max: Duration::from_millis(total_ms),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// See the crate's documentation for what this holds against any order of events.
    #[test]
    fn whatever_dies_a_request_ends_once_and_leaves_nothing(
        seed: u64, faults in faults(), limits in limits(),
        ranks in 1u64..6, choices in 1u32..5, output_tokens_max in 1u32..12,
    ) {
        let mut sim = Sim::new(seed, faults, ranks, request(choices, output_tokens_max), limits);
        sim.run();
        sim.check(&limits);
    }

    /// Engines die, but places and attempts suffice and time does not run out: then the answer is whole.
    #[test]
    fn with_attempts_to_spare_every_answer_is_whole(
        seed: u64, die in 0u8..128, refuse in 0u8..64, skip in 0u8..64, repeat in 0u8..128, kv_fails: u8,
        choices in 1u32..5, output_tokens_max in 1u32..12,
    ) {
        let faults = Faults { die, refuse, skip, repeat, kv_fails, ..NO_FAULTS };
        let limits = Limits {
            placements_max: 1000,
            losses_max: 1000, migrations_max: 1000, placement_retry: Duration::from_millis(1),
            first_token_max: Duration::MAX, total_max: Duration::MAX,
        };
        let mut sim = Sim::new(seed, faults, 1000, request(choices, output_tokens_max), limits);
        sim.run();
        sim.check(&limits);
        prop_assert_eq!(sim.terminal, Some(Action::Finish));
    }
}
