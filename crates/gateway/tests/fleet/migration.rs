//! Engines that die under requests.

use std::time::Duration;

use forebay_engines::EngineLimits;
use forebay_gateway::orchestrator::{OrchestratorSettings, api::Orchestrate};
use forebay_lifecycle::Limits;
use forebay_types::Role;

use crate::rig::{Answer, Plan, Rig, prompt, request};

/// What the request gives when nothing happens to it.
async fn reference(choices: u32) -> Answer {
    Rig::start(Plan::default()).await.answer(request("reference", prompt(1, 300), choices, 60)).await
}

async fn dies_after(tokens: usize, choices: u32) {
    let expected = reference(choices).await;
    let rig = Rig::start(Plan::default()).await;
    let mut response = rig.submit(request("r", prompt(1, 300), choices, 60)).expect("it has a place");
    let mut answer = Answer::default();
    let sent = |answer: &Answer| answer.tokens.iter().map(Vec::len).sum::<usize>();
    while sent(&answer) < tokens {
        assert!(answer.read_some(&mut response).await);
    }
    let busy = rig.orchestrator.engines().into_iter().find(|engine| engine.load.running > 0);
    rig.engine(busy.expect("one runs it").engine.as_str()).crash();
    while answer.read_some(&mut response).await {}
    assert_eq!(answer.tokens, expected.tokens, "{choices} choices, dead after {tokens} tokens");
    assert_eq!(answer.error, None);
    let record = rig.record("r");
    assert!(record.legs.iter().any(|leg| leg.outcome == "lost"), "{record:?}");
    assert!(record.placements.iter().any(|placement| placement.purpose == "migration"));
    assert_eq!(rig.metrics.migrations.get(), u64::from(choices));
    rig.assert_nothing_leaks().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_goes_on_without_a_repeated_or_missing_token_when_its_engine_dies() {
    dies_after(1, 1).await;
    dies_after(17, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_choice_goes_on() {
    dies_after(20, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_dies_before_the_first_token_costs_a_retry() {
    let expected = reference(1).await;
    // Slow enough that the prompt is still being computed when its engine dies.
    let limits = EngineLimits { step_tokens_max: 64, ..Plan::default().limits };
    let rig = Rig::start(Plan { speed: 0.05, limits, ..Plan::default() }).await;
    let response = rig.submit(request("r", prompt(1, 300), 1, 1)).expect("it has a place");
    rig.until(|rig| {
        rig.orchestrator.engines().iter().any(|engine| engine.load.running > 0 || engine.load.waiting > 0)
    })
    .await;
    let busy = rig.orchestrator.engines().into_iter().find(|e| e.load.running + e.load.waiting > 0);
    rig.engine(busy.expect("it was just seen").engine.as_str()).crash();
    let answer = Answer::read(response).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.tokens[0], expected.tokens[0][..1]);
    let record = rig.record("r");
    let purposes: Vec<&str> = record.placements.iter().map(|placement| placement.purpose.as_str()).collect();
    assert_eq!(purposes, ["first", "retry"]);
    assert_ne!(record.legs[0].engine, record.legs[1].engine);
    assert_eq!(rig.metrics.retries.get(), 1);
    rig.assert_nothing_leaks().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_engine_that_dies_in_a_split_request_is_replaced() {
    let expected = reference(1).await;
    let roles = [Role::Prefill, Role::Decode, Role::Decode];
    let rig = Rig::start(Plan { roles: &roles, ..Plan::default() }).await;
    let mut response = rig.submit(request("r", prompt(1, 300), 1, 60)).expect("it has a place");
    let mut answer = Answer::default();
    while answer.tokens.first().map_or(0, Vec::len) < 12 {
        assert!(answer.read_some(&mut response).await);
    }
    let busy = rig.orchestrator.engines().into_iter().find(|engine| engine.load.running > 0);
    rig.engine(busy.expect("one decodes it").engine.as_str()).crash();
    while answer.read_some(&mut response).await {}
    assert_eq!(answer.tokens, expected.tokens);
    assert!(rig.record("r").transfers.len() >= 2, "split again: {:?}", rig.record("r").legs);
    rig.assert_nothing_leaks().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_waits_for_the_only_engine_to_come_back() {
    let expected = reference(1).await;
    let settings = OrchestratorSettings { restart_back_off: Duration::from_millis(1), ..Default::default() };
    let rig = Rig::start(Plan { roles: &[Role::Both], settings, ..Plan::default() }).await;
    let mut response = rig.submit(request("r", prompt(1, 300), 1, 60)).expect("it has a place");
    let mut answer = Answer::default();
    while answer.tokens.first().map_or(0, Vec::len) < 5 {
        assert!(answer.read_some(&mut response).await);
    }
    rig.engine("sim-0").crash();
    while answer.read_some(&mut response).await {}
    assert_eq!(answer.tokens, expected.tokens);
    rig.assert_nothing_leaks().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_engine_dead_ends_the_response_with_an_error_and_comes_back() {
    let settings = OrchestratorSettings {
        restart_back_off: Duration::from_millis(1),
        limits: Limits { migrations_max: 0, ..Limits::default() },
        ..OrchestratorSettings::default()
    };
    let rig = Rig::start(Plan { roles: &[Role::Both], settings, ..Plan::default() }).await;
    let mut response = rig.submit(request("r", prompt(1, 300), 1, 2000)).expect("it has a place");
    let mut answer = Answer::default();
    while answer.tokens.first().map_or(0, Vec::len) < 5 {
        assert!(answer.read_some(&mut response).await);
    }
    let before = rig.orchestrator.engines()[0].incarnation;
    rig.engine("sim-0").crash();
    while answer.read_some(&mut response).await {}
    let error = answer.error.expect("it cannot go on");
    assert!(error.contains("engine was lost after"), "{error}");
    // A new life, and it serves.
    rig.until(|rig| rig.orchestrator.engines()[0].incarnation > before).await;
    rig.until(|rig| rig.orchestrator.engines()[0].state == "ready").await;
    let again = rig.answer(request("again", prompt(1, 300), 1, 10)).await;
    assert_eq!(again.tokens[0].len(), 10);
    rig.assert_nothing_leaks().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_fleet_says_when_to_come_back_and_loses_nothing() {
    let limits = EngineLimits { waiting_max: 2, sequences_max: 1, ..Plan::default().limits };
    let rig = Rig::start(Plan { roles: &[Role::Both], limits, speed: 1.0, ..Plan::default() }).await;
    let mut running = Vec::new();
    let refused = loop {
        let id = format!("r{}", running.len());
        match rig.submit(request(&id, prompt(running.len() as u32, 300), 1, 20)) {
            Ok(response) => running.push(response),
            Err(error) => break error,
        }
        assert!(running.len() < 20, "a bound of 2 was to hold");
    };
    assert!(refused.to_string().contains("retry in"), "{refused}");
    for response in running {
        assert_eq!(Answer::read(response).await.tokens[0].len(), 20);
    }
    rig.assert_nothing_leaks().await;
}
