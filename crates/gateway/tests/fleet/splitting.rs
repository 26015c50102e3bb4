//! When a request is split over two engines, end to end.

use std::time::Duration;

use forebay_gateway::orchestrator::{OrchestratorSettings, api::Orchestrate};
use forebay_placement::Weights;
use forebay_planner::LeaningSettings;
use forebay_types::{Leaning, Role};

use crate::rig::{Answer, Plan, Rig, prompt, request};

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_fleet_serves_a_short_prompt_on_one_engine() {
    let rig = Rig::start(Plan::default()).await;
    rig.answer(request("r", prompt(1, 60), 1, 20)).await;
    let record = rig.record("r");
    assert_eq!(record.legs.len(), 1);
    assert_eq!(record.legs[0].work, "aggregated");
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_roles_are_obeyed_and_give_the_same_tokens() {
    let expected = Rig::start(Plan::default()).await.answer(request("r", prompt(1, 333), 2, 40)).await;
    let roles = [Role::Prefill, Role::Decode];
    let rig = Rig::start(Plan { roles: &roles, ..Plan::default() }).await;
    let answer = rig.answer(request("r", prompt(1, 333), 2, 40)).await;
    assert_eq!(answer.tokens, expected.tokens);
    let record = rig.record("r");
    let legs: Vec<_> = record.legs.iter().map(|leg| (leg.work.as_str(), leg.engine.as_str())).collect();
    assert_eq!(legs, [("prefill", "sim-0"), ("decode", "sim-1")]);
    let transfer = &record.transfers[0];
    assert_eq!((transfer.blocks, transfer.outcome.as_str()), (333_u32.div_ceil(16), "done"));
    assert_eq!(transfer.bytes, u64::from(transfer.blocks) * 16 * 8);
    rig.assert_nothing_leaks().await;
}

/// The rank that has a document in its cache keeps being fed questions about it; the other one only decodes. A long
/// answer about the document is then prefilled on the first and decoded on the second.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_request_splits_when_the_rank_that_has_its_prefix_is_fed_prefills() {
    let roles = [Role::Both; 2];
    // Its own decoding counts in full: it is split wherever another rank decodes quicker.
    let weights = Weights { transfer: 0.3, decode: 1.0, harm: 0.05, ..Weights::default() };
    let settings = OrchestratorSettings { weights, ..OrchestratorSettings::default() };
    let rig = Rig::start(Plan { roles: &roles, speed: 4.0, settings, ..Plan::default() }).await;
    let document = prompt(7, 6000);
    rig.answer(request("first", document.clone(), 1, 1)).await;
    let holder = rig.record("first").legs[0].engine.clone();
    let about = |number: u32, output: u32| {
        let question = document.iter().copied().chain(prompt(1000 + number, 1500)).collect();
        request(&format!("q{number}"), question, 1, output)
    };
    // One reader after the other keeps the holder busy with prefills; the request under test comes among them.
    let feed = async {
        for number in 0.. {
            Answer::read(rig.submit(about(number, 1)).expect("it has a place")).await;
        }
    };
    let ask = async {
        let share = |rig: &Rig| {
            let engines = rig.orchestrator.engines();
            engines
                .into_iter()
                .find(|engine| engine.engine == holder)
                .map_or(0.0, |engine| engine.prefill_share)
        };
        rig.until(|rig| share(rig) > 0.6).await;
        let question = document.iter().copied().chain(prompt(999_999, 400)).collect();
        rig.answer(request("long", question, 1, 120)).await
    };
    let answer = tokio::select! {
        () = feed => unreachable!("it goes on for ever"),
        answer = ask => answer,
    };
    assert_eq!(answer.tokens[0].len(), 120);
    let record = rig.record("long");
    let legs: Vec<_> = record.legs.iter().map(|leg| (leg.work.as_str(), leg.engine.clone())).collect();
    assert_eq!(
        legs.first(),
        Some(&("prefill", holder.clone())),
        "{:#?}",
        record.placements[0].explanation.table()
    );
    assert_eq!(legs.get(1).map(|leg| leg.0), Some("decode"));
    assert!(record.transfers.iter().any(|transfer| transfer.outcome == "done"));
}

/// Long prompts come without a pause: one of two engines is kept for them, and hands every one over.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_is_kept_for_prefill_while_prompts_are_long() {
    let leaning = LeaningSettings {
        review_every: Duration::from_millis(10),
        rest: Duration::from_millis(50),
        load_min: 0.01,
        ..LeaningSettings::default()
    };
    let settings = OrchestratorSettings { leaning, ..OrchestratorSettings::default() };
    let rig = Rig::start(Plan { roles: &[Role::Both; 2], speed: 20.0, settings, ..Plan::default() }).await;
    let long = |number: u32| request(&format!("r{number}"), prompt(number, 3000), 1, 40);
    let leanings = |rig: &Rig| {
        let mut leanings: Vec<_> = rig.orchestrator.engines().iter().map(|engine| engine.leaning).collect();
        leanings.sort_by_key(|leaning| *leaning as u8);
        leanings
    };
    let feed = async {
        for number in 0.. {
            Answer::read(rig.submit(long(number)).expect("it has a place")).await;
        }
    };
    let lean = rig.until(|rig| leanings(rig) == [Leaning::Prefill, Leaning::Decode]);
    tokio::select! {
        () = feed => unreachable!("it goes on for ever"),
        () = lean => {}
    }
    let keeps =
        |leaning| rig.orchestrator.engines().into_iter().find(|engine| engine.leaning == leaning).unwrap();
    let (prefill, decode) = (keeps(Leaning::Prefill).engine, keeps(Leaning::Decode).engine);
    rig.answer(long(1_000_000)).await;
    let record = rig.record("r1000000");
    let legs: Vec<_> = record.legs.iter().map(|leg| (leg.work.as_str(), leg.engine.clone())).collect();
    let split = [("prefill", prefill), ("decode", decode.clone())];
    assert!(legs == split || legs == [("aggregated", decode)], "{legs:?}");
    rig.assert_nothing_leaks().await;
}
