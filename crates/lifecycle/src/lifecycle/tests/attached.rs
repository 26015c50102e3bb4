//! What engines in other processes add: hand-overs without a first token, answers that are passed on unread, silence.

use super::*;

fn opaque() -> Lifecycle {
    let request = Start { form: Form::Opaque, ..request(1, 5) };
    Lifecycle::start(Duration::ZERO, request, LIMITS).0
}

fn with(terms: Terms, event: Event) -> Event {
    match event {
        Event::Placed { placement, plan, legs, .. } => Event::Placed { placement, plan, legs, terms },
        other => other,
    }
}

fn prefilled(leg: u64) -> Event {
    Event::Prefilled { leg: LegId(leg), first: FirstToken::OfDecode }
}

#[test]
fn a_decode_leg_may_draw_the_first_token_itself() {
    let mut life = begun(1, 5);
    expect(&mut life, split(0, 1, 2, 10), &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Prefill)]);
    let work = Work::Decode { from: LegId(10), from_rank: rank(1), first: Vec::new() };
    expect(&mut life, prefilled(10), &[report(1, Health::Ok), start(11, 2, Purpose::Prompt, &[0], 5, work)]);
    assert_eq!(life.token(LegId(10), 0, 100, 4), Accepted::No, "the prefill leg's token is not sent");
    send(&mut life, 11, 0, 100, &[4, STOP]);
    let over =
        [finish_choice(0, FinishReason::Stop), report(2, Health::Ok), release_held(10, 1), Action::Finish];
    expect(&mut life, Event::LegEnded { leg: LegId(11) }, &over);
}

#[test]
fn an_opaque_answer_ends_with_its_leg() {
    let mut life = opaque();
    expect(&mut life, aggregated(0, 1, 10), &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Aggregated)]);
    assert_eq!(life.passed(LegId(99)), Accepted::No, "of another leg");
    assert_eq!(life.passed(LegId(10)), Accepted::Yes);
    let over = [finish_choice(0, FinishReason::Stop), report(1, Health::Ok), Action::Finish];
    expect(&mut life, Event::LegEnded { leg: LegId(10) }, &over);
}

#[test]
fn an_opaque_answer_moves_only_before_its_first_byte() {
    let mut life = opaque();
    expect(&mut life, aggregated(0, 1, 10), &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Aggregated)]);
    let again = [report(1, Health::Failed), place(1, Purpose::Prompt, &[1])];
    expect(&mut life, Event::LegLost { leg: LegId(10) }, &again);
    expect(&mut life, aggregated(1, 2, 20), &[start(20, 2, Purpose::Prompt, &[0], 5, Work::Aggregated)]);
    assert_eq!(life.passed(LegId(20)), Accepted::Yes);
    let lost = Action::Fail(Failure::LostMidStream { tokens_sent: 1 });
    expect(&mut life, Event::LegLost { leg: LegId(20) }, &[report(2, Health::Failed), lost]);
}

#[test]
fn what_another_engine_cannot_continue_is_not_continued() {
    let mut life = begun(1, 5);
    let terms = Terms { continues: false, stall_after: None };
    expect(
        &mut life,
        with(terms, aggregated(0, 1, 10)),
        &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Aggregated)],
    );
    send(&mut life, 10, 0, 100, &[4]);
    let lost = Action::Fail(Failure::LostMidStream { tokens_sent: 1 });
    expect(&mut life, Event::LegLost { leg: LegId(10) }, &[report(1, Health::Failed), lost]);
}

#[test]
fn a_leg_that_falls_silent_is_replaced() {
    let mut life = begun(1, 5);
    let terms = Terms { continues: true, stall_after: Some(seconds(2)) };
    life.step(seconds(1), with(terms, aggregated(0, 1, 10)));
    assert_eq!(life.deadline(), Some(LIMITS.first_token_max), "a leg that has sent nothing may still queue");
    send(&mut life, 10, 0, 100, &[4]);
    life.heard(seconds(1), LegId(10));
    assert_eq!(life.deadline(), Some(seconds(3)));
    life.heard(seconds(2), LegId(10));
    assert_eq!(life.step(seconds(3), Event::Tick), [], "it was heard a second ago");
    let purpose = Purpose::Continue { choice: 0, generated_tokens: 1 };
    let moved = [cancel(10, 1), report(1, Health::Failed), place(1, purpose, &[1])];
    assert_eq!(life.step(seconds(4), Event::Tick), moved);
    assert_eq!(life.token(LegId(10), 0, 101, 5), Accepted::No, "it speaks again too late");
}

#[test]
fn a_rejected_request_is_not_tried_elsewhere() {
    let mut life = begun(1, 5);
    expect(&mut life, aggregated(0, 1, 10), &[start(10, 1, Purpose::Prompt, &[0], 5, Work::Aggregated)]);
    let refused = Event::LegRefused { leg: LegId(10), why: Refusal::Rejected };
    expect(&mut life, refused, &[Action::Fail(Failure::Rejected)]);
}
