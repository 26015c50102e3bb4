use std::{sync::Arc, time::Duration};

use forebay_placement::Plan;
use forebay_types::{FinishReason, FirstToken, Incarnation, LegId, RankId, TokenId};

use super::*;
use crate::words::{LegOrder, PlacementId, Terms, Unplaced};

mod attached;
mod fleet;

const STOP: TokenId = 7;
const LIMITS: Limits = Limits {
    placements_max: 2,
    losses_max: 2,
    migrations_max: 1,
    placement_retry: Duration::from_millis(100),
    first_token_max: Duration::from_secs(10),
    total_max: Duration::from_secs(60),
};

fn rank(incarnation: u64) -> RankId {
    RankId { incarnation: Incarnation(incarnation), dp_rank: 0 }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn request(choices: u32, output_tokens_max: u32) -> Start {
    Start {
        prompt_tokens: 100,
        choices,
        output_tokens_max,
        stop_tokens: Arc::new([STOP]),
        form: Form::Tokens,
    }
}

fn begun(choices: u32, output_tokens_max: u32) -> Lifecycle {
    let (lifecycle, actions) = Lifecycle::start(Duration::ZERO, request(choices, output_tokens_max), LIMITS);
    assert_eq!(actions, [place(0, Purpose::Prompt, &[])]);
    lifecycle
}

fn place(placement: u32, purpose: Purpose, exclude: &[u64]) -> Action {
    let exclude = exclude.iter().copied().map(rank).collect();
    Action::Place { placement: PlacementId(placement), purpose, exclude }
}

fn aggregated(placement: u32, incarnation: u64, leg: u64) -> Event {
    let plan = Plan::Aggregated { rank: rank(incarnation) };
    Event::Placed {
        placement: PlacementId(placement),
        plan,
        legs: [LegId(leg), LegId(leg + 1)],
        terms: Terms::default(),
    }
}

fn split(placement: u32, prefill: u64, decode: u64, leg: u64) -> Event {
    let plan = Plan::Split { prefill: rank(prefill), decode: rank(decode) };
    Event::Placed {
        placement: PlacementId(placement),
        plan,
        legs: [LegId(leg), LegId(leg + 1)],
        terms: Terms::default(),
    }
}

fn start(leg: u64, at: u64, prompt: Purpose, choices: &[u32], output_tokens_max: u32, work: Work) -> Action {
    let choices = choices.to_vec();
    Action::Start(LegOrder { leg: LegId(leg), rank: rank(at), prompt, choices, output_tokens_max, work })
}

fn report(incarnation: u64, health: Health) -> Action {
    Action::Report { rank: rank(incarnation), health }
}

fn cancel(leg: u64, incarnation: u64) -> Action {
    Action::CancelLeg { leg: LegId(leg), rank: rank(incarnation) }
}

fn release_held(leg: u64, incarnation: u64) -> Action {
    Action::ReleaseHeld { leg: LegId(leg), rank: rank(incarnation) }
}

fn finish_choice(choice: u32, reason: FinishReason) -> Action {
    Action::FinishChoice { choice, reason }
}

fn finished(leg: u64, choice: u32, reason: FinishReason) -> Event {
    Event::ChoiceFinished { leg: LegId(leg), choice, reason }
}

/// Steps at second 1 and compares.
#[track_caller]
fn expect(lifecycle: &mut Lifecycle, event: Event, actions: &[Action]) {
    assert_eq!(lifecycle.step(seconds(1), event), actions);
}

/// Accepts `tokens` of a choice, in order, the first at `position`.
#[track_caller]
fn send(lifecycle: &mut Lifecycle, leg: u64, choice: u32, position: u32, tokens: &[TokenId]) {
    for (position, &token) in (position..).zip(tokens) {
        assert_eq!(
            lifecycle.token(LegId(leg), choice, position, token),
            Accepted::Yes,
            "position {position}"
        );
    }
}

#[test]
fn an_aggregated_answer() {
    let mut life = begun(1, 5);
    expect(&mut life, aggregated(0, 1, 10), &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Aggregated)]);
    expect(&mut life, Event::LegStarted { leg: LegId(10), cached_tokens: 48 }, &[]);
    send(&mut life, 10, 0, 100, &[1, 2, STOP]);
    expect(&mut life, finished(10, 0, FinishReason::Stop), &[finish_choice(0, FinishReason::Stop)]);
    expect(&mut life, Event::LegEnded { leg: LegId(10) }, &[report(1, Health::Ok), Action::Finish]);
    assert_eq!((life.outcome(), life.deadline()), (Some(&Outcome::Finished), None));
    assert_eq!((life.cached_tokens(), life.tokens_sent(), life.generated(0)), (48, 3, &[1, 2, STOP][..]));
    expect(&mut life, Event::ClientGone, &[]);
}

/// Of two choices one ends with its first token: only the other is decoded.
#[test]
fn a_split_answer_hands_its_first_tokens_over() {
    let mut life = begun(2, 5);
    expect(&mut life, split(0, 1, 2, 10), &[start(10, 1, Purpose::Prompt, &[0, 1], 5, Work::Prefill)]);
    send(&mut life, 10, 0, 100, &[3]);
    send(&mut life, 10, 1, 100, &[STOP]);
    let work = Work::Decode { from: LegId(10), from_rank: rank(1), first: vec![(0, 3)] };
    expect(
        &mut life,
        Event::Prefilled { leg: LegId(10), first: FirstToken::Handed },
        &[
            report(1, Health::Ok),
            finish_choice(1, FinishReason::Stop),
            start(11, 2, Purpose::Prompt, &[0], 5, work),
        ],
    );
    expect(&mut life, Event::LegEnded { leg: LegId(10) }, &[]);
    expect(&mut life, Event::KvArrived { leg: LegId(11) }, &[release_held(10, 1)]);
    assert_eq!(life.token(LegId(10), 0, 101, 4), Accepted::No, "the prefill leg has had its say");
    send(&mut life, 11, 0, 101, &[4, 5, 6, 8]);
    assert_eq!(life.token(LegId(11), 0, 105, 9), Accepted::No, "five are enough");
    expect(&mut life, finished(11, 0, FinishReason::Length), &[finish_choice(0, FinishReason::Length)]);
    expect(&mut life, Event::LegEnded { leg: LegId(11) }, &[report(2, Health::Ok), Action::Finish]);
}

#[test]
fn an_answer_of_one_token_needs_no_decode_leg() {
    let mut life = begun(1, 1);
    expect(&mut life, split(0, 1, 2, 10), &[start(10, 1, Purpose::Prompt, &[0], 1, Work::Prefill)]);
    send(&mut life, 10, 0, 100, &[3]);
    expect(
        &mut life,
        Event::Prefilled { leg: LegId(10), first: FirstToken::Handed },
        &[report(1, Health::Ok), finish_choice(0, FinishReason::Length), release_held(10, 1), Action::Finish],
    );
}

#[test]
fn before_the_first_token_a_request_is_placed_again() {
    let mut life = begun(1, 5);
    expect(&mut life, aggregated(0, 1, 10), &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Aggregated)]);
    let again = [report(1, Health::Failed), place(1, Purpose::Prompt, &[1])];
    expect(&mut life, Event::LegLost { leg: LegId(10) }, &again);
    expect(&mut life, aggregated(1, 2, 20), &[start(20, 2, Purpose::Prompt, &[0], 5, Work::Aggregated)]);
    let refused = Event::LegRefused { leg: LegId(20), why: Refusal::Unfit };
    expect(&mut life, refused, &[Action::Fail(Failure::Refused { attempts: 2 })]);
}

#[test]
fn after_the_first_token_a_choice_goes_on_elsewhere() {
    let mut life = begun(1, 5);
    expect(&mut life, aggregated(0, 1, 10), &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Aggregated)]);
    send(&mut life, 10, 0, 100, &[1, 2]);
    let purpose = Purpose::Continue { choice: 0, generated_tokens: 2 };
    expect(
        &mut life,
        Event::LegLost { leg: LegId(10) },
        &[report(1, Health::Failed), place(1, purpose, &[1])],
    );
    assert_eq!(life.token(LegId(10), 0, 102, 3), Accepted::No, "a late token of the dead leg");
    expect(&mut life, split(1, 2, 3, 20), &[start(20, 2, purpose, &[0], 3, Work::Prefill)]);
    assert_eq!(life.token(LegId(20), 0, 101, 2), Accepted::No, "repeated");
    send(&mut life, 20, 0, 102, &[3]);
    let work = Work::Decode { from: LegId(20), from_rank: rank(2), first: vec![(0, 3)] };
    let decode = [report(2, Health::Ok), start(21, 3, purpose, &[0], 3, work)];
    expect(&mut life, Event::Prefilled { leg: LegId(20), first: FirstToken::Handed }, &decode);
    // The second loss is one too many: one migration is allowed.
    expect(
        &mut life,
        Event::LegLost { leg: LegId(21) },
        &[
            report(3, Health::Failed),
            release_held(20, 2),
            Action::Fail(Failure::LostMidStream { tokens_sent: 3 }),
        ],
    );
}

/// The engine died between a choice's last token and saying so.
#[test]
fn a_choice_that_has_its_last_token_is_not_continued() {
    let mut life = begun(2, 2);
    expect(&mut life, aggregated(0, 1, 10), &[start(10, 1, Purpose::Prompt, &[0, 1], 2, Work::Aggregated)]);
    send(&mut life, 10, 0, 100, &[STOP]);
    send(&mut life, 10, 1, 100, &[1, 2]);
    expect(
        &mut life,
        Event::LegLost { leg: LegId(10) },
        &[
            report(1, Health::Failed),
            finish_choice(0, FinishReason::Stop),
            finish_choice(1, FinishReason::Length),
            Action::Finish,
        ],
    );
}

#[test]
fn a_prefill_engine_may_die_once_its_kv_is_on_the_way() {
    let mut life = begun(1, 5);
    expect(&mut life, split(0, 1, 2, 10), &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Prefill)]);
    send(&mut life, 10, 0, 100, &[3]);
    assert_eq!(
        life.step(seconds(1), Event::Prefilled { leg: LegId(10), first: FirstToken::Handed }).len(),
        2
    );
    expect(&mut life, Event::LegLost { leg: LegId(10) }, &[report(1, Health::Failed)]);
    expect(&mut life, Event::KvFailed { leg: LegId(11) }, &[release_held(10, 1)]);
    expect(&mut life, Event::KvFailed { leg: LegId(11) }, &[]);
    send(&mut life, 11, 0, 101, &[STOP]);
    expect(
        &mut life,
        Event::LegEnded { leg: LegId(11) },
        &[finish_choice(0, FinishReason::Stop), report(2, Health::Ok), Action::Finish],
    );
}

#[test]
fn a_client_that_goes_leaves_nothing_behind() {
    let gone = Action::Fail(Failure::ClientGone);
    let mut life = begun(1, 5);
    expect(&mut life, Event::ClientGone, std::slice::from_ref(&gone));
    expect(&mut life, aggregated(0, 1, 10), &[]);

    let mut life = begun(1, 5);
    assert_eq!(life.step(seconds(1), split(0, 1, 2, 10)).len(), 1);
    expect(&mut life, Event::ClientGone, &[cancel(10, 1), gone.clone()]);
    assert_eq!(life.token(LegId(10), 0, 100, 3), Accepted::No);

    let mut life = begun(1, 5);
    assert_eq!(life.step(seconds(1), split(0, 1, 2, 10)).len(), 1);
    send(&mut life, 10, 0, 100, &[3]);
    assert_eq!(
        life.step(seconds(1), Event::Prefilled { leg: LegId(10), first: FirstToken::Handed }).len(),
        2
    );
    expect(&mut life, Event::ClientGone, &[cancel(11, 2), release_held(10, 1), gone]);
    expect(&mut life, Event::KvArrived { leg: LegId(11) }, &[]);
}

#[test]
fn a_stop_string_ends_a_choice_and_the_last_one_its_leg() {
    let mut life = begun(2, 5);
    assert_eq!(life.step(seconds(1), aggregated(0, 1, 10)).len(), 1);
    send(&mut life, 10, 0, 100, &[1, 2]);
    let stop = Action::StopChoice { leg: LegId(10), rank: rank(1), choice: 0 };
    let stopped = [finish_choice(0, FinishReason::Stop), stop];
    expect(&mut life, Event::StopMatched { choice: 0 }, &stopped);
    assert_eq!(life.token(LegId(10), 0, 102, 3), Accepted::No);
    expect(&mut life, Event::StopMatched { choice: 0 }, &[]);
    expect(
        &mut life,
        Event::StopMatched { choice: 1 },
        &[finish_choice(1, FinishReason::Stop), cancel(10, 1), Action::Finish],
    );
}

#[test]
fn a_leg_that_skips_a_token_is_replaced_at_once() {
    let mut life = begun(1, 5);
    assert_eq!(life.step(seconds(1), aggregated(0, 1, 10)).len(), 1);
    send(&mut life, 10, 0, 100, &[1]);
    assert_eq!(life.token(LegId(10), 0, 102, 3), Accepted::No);
    assert_eq!(life.token(LegId(10), 0, 101, 2), Accepted::No, "nothing from it is believed any more");
    assert_eq!(life.deadline(), Some(Duration::ZERO));
    let purpose = Purpose::Continue { choice: 0, generated_tokens: 1 };
    expect(&mut life, Event::Tick, &[cancel(10, 1), report(1, Health::Failed), place(1, purpose, &[1])]);
}

#[test]
fn deadlines_end_what_they_bound() {
    let mut life = begun(1, 5);
    assert_eq!(life.deadline(), Some(seconds(10)));
    assert_eq!(life.step(seconds(9), aggregated(0, 1, 10)).len(), 1);
    let failure = Failure::DeadlineExceeded { deadline: Deadline::FirstToken, limit: seconds(10) };
    assert_eq!(life.step(seconds(10), Event::Tick), [cancel(10, 1), Action::Fail(failure.clone())]);
    assert_eq!(failure.to_string(), "the request took longer than 10 s, the limit `first_token_max`");

    let mut life = begun(1, 5);
    assert_eq!(life.step(seconds(9), aggregated(0, 1, 10)).len(), 1);
    send(&mut life, 10, 0, 100, &[1]);
    assert_eq!(life.deadline(), Some(seconds(60)));
    assert_eq!(life.step(seconds(59), Event::Tick), []);
    let failure = Failure::DeadlineExceeded { deadline: Deadline::Total, limit: seconds(60) };
    assert_eq!(life.step(seconds(60), Event::Tick), [cancel(10, 1), Action::Fail(failure)]);
}

#[test]
fn a_place_that_may_come_free_is_asked_for_again() {
    let mut life = begun(1, 5);
    let none = |placement, why| Event::NotPlaced { placement: PlacementId(placement), why };
    expect(&mut life, none(0, Unplaced::Retry), &[]);
    assert_eq!(life.deadline(), Some(Duration::from_millis(1100)));
    expect(&mut life, none(0, Unplaced::Retry), &[]);
    assert_eq!(life.step(Duration::from_millis(1100), Event::Tick), [place(1, Purpose::Prompt, &[])]);
    expect(&mut life, none(1, Unplaced::Retry), &[Action::Fail(Failure::NotPlaced)]);
}

/// It outgrew every engine's context: that is an answer's end, not an error.
#[test]
fn a_choice_too_long_to_be_continued_ends_there() {
    let mut life = begun(1, 50);
    assert_eq!(life.step(seconds(1), aggregated(0, 1, 10)).len(), 1);
    send(&mut life, 10, 0, 100, &[1]);
    assert_eq!(life.step(seconds(1), Event::LegLost { leg: LegId(10) }).len(), 2);
    expect(
        &mut life,
        Event::NotPlaced { placement: PlacementId(1), why: Unplaced::TooLong },
        &[finish_choice(0, FinishReason::Length), Action::Finish],
    );
}
