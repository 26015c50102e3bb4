//! An orchestrator over doubles of vLLM that misbehave: what each fault may cost, and what it may never.

mod rig;

use std::time::Duration;

use forebay_gateway::orchestrator::api::Orchestrate;
use forebay_testkit::{Fault, VllmOptions};

use rig::{Rig, expected, prompt};

/// Steps slow enough that an answer of 40 tokens can be caught on its way.
fn slow() -> VllmOptions {
    VllmOptions { step: Duration::from_millis(20), ..rig::options() }
}

#[tokio::test]
async fn a_killed_engine_costs_no_token() {
    let rig = Rig::start(vec![slow(), slow()]).await;
    let (answer, busy) = rig.begin(&prompt(1), 60).await;
    rig.doubles[busy].control().die().await;
    assert_eq!(answer.read().await, Ok(expected(&prompt(1), 60)));
    rig.until_state(busy, "lost").await;
    rig.assert_nothing_is_held().await;
}

#[tokio::test]
async fn a_stalled_stream_is_continued_elsewhere() {
    let rig = Rig::start(vec![rig::options(), rig::options()]).await;
    for double in &rig.doubles {
        double.control().inject(Fault::StallAfter { tokens: 5 });
    }
    // Whichever takes it stalls after five tokens; the other one must not.
    let (answer, busy) = rig.begin(&prompt(2), 30).await;
    rig.doubles[1 - busy].control().heal();
    assert_eq!(answer.read().await, Ok(expected(&prompt(2), 30)));
    rig.assert_nothing_is_held().await;
}

#[tokio::test]
async fn half_a_stream_is_continued_elsewhere() {
    let rig = Rig::start(vec![rig::options(), rig::options()]).await;
    rig.doubles[0].control().inject(Fault::CloseAfter { tokens: 3 });
    for number in 0..6 {
        assert_eq!(rig.ask(&prompt(number), 20).await, Ok(expected(&prompt(number), 20)), "{number}");
    }
    rig.assert_nothing_is_held().await;
}

/// An engine that refuses in a millisecond is idle and quick: a router by load would send it everything.
#[tokio::test]
async fn quick_errors_are_no_black_hole() {
    let rig = Rig::start(vec![rig::options(), rig::options()]).await;
    rig.doubles[0].control().inject(Fault::InternalError);
    for number in 0..12 {
        assert_eq!(rig.ask(&prompt(number), 8).await, Ok(expected(&prompt(number), 8)), "{number}");
    }
    let status = rig.orchestrator.engines();
    assert_ne!(status[0].breaker, "closed", "it rests: {status:?}");
    rig.assert_nothing_is_held().await;
}

#[tokio::test]
async fn an_engine_that_accepts_and_slams_the_door_is_left() {
    let rig = Rig::start(vec![rig::options(), rig::options()]).await;
    rig.doubles[0].control().inject(Fault::CloseAfterAccept);
    for number in 0..6 {
        assert_eq!(rig.ask(&prompt(number), 8).await, Ok(expected(&prompt(number), 8)), "{number}");
    }
    rig.assert_nothing_is_held().await;
}

#[tokio::test]
async fn a_hanging_engine_leaves_rotation_and_comes_back() {
    let rig = Rig::start(vec![rig::options(), rig::options()]).await;
    rig.doubles[0].control().inject(Fault::Hang);
    rig.until_state(0, "silent").await;
    for number in 0..4 {
        assert_eq!(rig.ask(&prompt(number), 8).await, Ok(expected(&prompt(number), 8)), "{number}");
    }
    rig.doubles[0].control().heal();
    rig.until_state(0, "ready").await;
}

#[tokio::test]
async fn what_an_engine_lies_never_reaches_a_client() {
    for fault in [Fault::EndlessLine, Fault::InvalidUtf8, Fault::ErrorBody] {
        let rig = Rig::start(vec![rig::options(), rig::options()]).await;
        rig.doubles[0].control().inject(fault.clone());
        for number in 0..4 {
            assert_eq!(rig.ask(&prompt(number), 8).await, Ok(expected(&prompt(number), 8)), "{fault:?}");
        }
        rig.assert_nothing_is_held().await;
    }
}

#[tokio::test]
async fn a_request_that_kills_what_it_touches_kills_two() {
    let poisoned = || VllmOptions {
        poison: Some("abracadabra".to_owned()),
        death_linger: Duration::ZERO,
        ..rig::options()
    };
    let rig = Rig::start(vec![poisoned(), poisoned(), poisoned()]).await;
    let killer: Vec<u32> =
        forebay_testkit::tokenizer::encode("now say abracadabra, please, and then good night");
    let error = rig.ask(&killer, 8).await.expect_err("nobody can answer it");
    assert!(error.contains("lost on"), "{error}");
    rig.until(|engines| engines.iter().filter(|engine| engine.state == "lost").count() == 2).await;
    let error = rig.ask(&killer, 8).await.expect_err("it is known");
    assert!(error.contains("2 engines died"), "{error}");
    assert_eq!(rig.ask(&prompt(1), 8).await, Ok(expected(&prompt(1), 8)), "the third one serves on");
}

#[tokio::test]
async fn a_slow_engine_is_slow_and_right() {
    let rig = Rig::start(vec![slow()]).await;
    rig.doubles[0].control().inject(Fault::Slow { factor: 10.0 });
    assert_eq!(rig.ask(&prompt(3), 6).await, Ok(expected(&prompt(3), 6)));
}

/// An engine whose tokenizer agreed when it joined and no longer does is given no more tokens.
#[tokio::test]
async fn an_audit_ends_token_mode() {
    let rig = Rig::start(vec![rig::options()]).await;
    let text = "7: the mill turns as long as the river runs";
    let tokens = forebay_testkit::tokenizer::encode(text);
    let asked = || rig.doubles[0].seen().iter().filter(|seen| seen.path == "/tokenize").count();
    let before = asked();
    assert_eq!(rig.ask_audited(text, 4).await, Ok(expected(&tokens, 4)));
    rig.until(|_| asked() == before + 1).await;
    assert!(rig.orchestrator.models()[0].takes_tokens);
    rig.doubles[0].control().inject(Fault::OtherTokenizer);
    assert_eq!(rig.ask_audited(text, 4).await, Ok(expected(&tokens, 4)));
    rig.until(|_| !rig.orchestrator.models()[0].takes_tokens).await;
    let engine = &rig.orchestrator.engines()[0];
    assert!(engine.notes.iter().any(|note| note.contains("disagrees with ours on a request")), "{engine:?}");
    let error = rig.ask(&tokens, 4).await.expect_err("tokens have no place any more");
    assert!(error.contains("no engine"), "{error}");
    rig.assert_nothing_is_held().await;
}
