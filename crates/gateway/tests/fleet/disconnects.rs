//! Clients that leave at random moments.

use forebay_gateway::orchestrator::api::Orchestrate;
use forebay_types::Role;
use tokio::runtime::Handle;

use crate::rig::{Answer, Plan, Rig, prompt, request};

/// Disconnects `count` clients one after the other, each after a random number of batches, and compares counters.
async fn leave(roles: &[Role], speed: f64, output_tokens: u32, count: u32) {
    let rig = Rig::start(Plan { roles, speed, ..Plan::default() }).await;
    rig.answer(request("warm", prompt(0, 40), 1, 4)).await;
    rig.assert_nothing_leaks().await;
    let tasks = Handle::current().metrics().num_alive_tasks();
    let mut state = 11_u64;
    let mut draw = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut cut_short = 0;
    for number in 0..count {
        let (family, length) = (draw(9) as u32, 8 + draw(400) as u32);
        let choices = 1 + draw(3) as u32;
        let mut response = rig
            .submit(request(&format!("r{number}"), prompt(family, length), choices, output_tokens))
            .expect("it has a place");
        let mut answer = Answer::default();
        let mut whole = false;
        // Half leave without reading, or an answer that comes in few batches would keep everyone; of these some wait for a while.
        for _ in 0..draw(2) * draw(12) {
            if !answer.read_some(&mut response).await {
                whole = true;
                break;
            }
        }
        for _ in 0..draw(40) {
            tokio::task::yield_now().await;
        }
        cut_short += u32::from(!whole);
        drop(response);
    }
    assert!(cut_short > count / 4, "only {cut_short} of {count} left early");
    rig.assert_nothing_leaks().await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), tasks, "tasks leaked");
    // And it still works.
    assert_eq!(rig.answer(request("after", prompt(3, 100), 1, 8)).await.tokens[0].len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clients_that_leave_take_nothing_with_them() {
    leave(&[Role::Both; 3], 50.0, 40, 500).await;
    leave(&[Role::Prefill, Role::Decode], 50.0, 40, 400).await;
    leave(&[Role::Both, Role::Prefill, Role::Decode], 0.0, 1000, 100).await;
}

/// Nobody reads that the prompt is computed and its KV held for a decode engine; then the client is gone.
#[tokio::test(flavor = "multi_thread")]
async fn kv_that_is_held_for_a_client_who_never_reads_is_freed_when_it_leaves() {
    let rig = Rig::start(Plan { roles: &[Role::Prefill, Role::Decode], ..Plan::default() }).await;
    let response = rig.submit(request("r", prompt(1, 300), 1, 20)).expect("it has a place");
    rig.until(|rig| {
        let load = rig.orchestrator.engines()[0].load;
        load.prompt_tokens > 0
            && load.running == 0
            && load.waiting == 0
            && load.blocks_free < load.blocks_total
    })
    .await;
    drop(response);
    rig.assert_nothing_leaks().await;
}
