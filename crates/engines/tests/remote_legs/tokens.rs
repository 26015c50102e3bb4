//! Legs of tokens that go well, and those that are called off.

use forebay_engines::{
    Driver, LegEvent, StartError, Work,
    remote::{Abort, RankPin, RemoteLimits, Speech, TokenRoute},
};
use forebay_types::{Role, Sampling};
use std::sync::Arc;

use crate::rig::*;

/// With chance in it.
fn drawn(leg: forebay_engines::Leg) -> forebay_engines::Leg {
    let sampling = Sampling { temperature: 0.5, ..(*leg.sampling).clone() };
    forebay_engines::Leg { sampling: Arc::new(sampling), ..leg }
}

#[tokio::test]
async fn a_prompt_of_tokens_is_answered_in_tokens() {
    let mut double = Double::start().await;
    let attached = vllm().attach(&double.url);
    let mut stream = attached.start(leg(1, &[10, 11, 12], 8));
    let (asked, mut line) = double.asked().await;
    assert_eq!(asked.path, "/v1/completions");
    assert_eq!(asked.headers["authorization"], "Bearer the-key");
    assert_eq!(asked.headers["x-request-id"], "req-0000000000000001");
    assert_eq!(asked.headers.get("x-data-parallel-rank"), None);
    let body = asked.json();
    assert_eq!(body["prompt"], serde_json::json!([10, 11, 12]));
    assert_eq!((&body["model"], &body["max_tokens"]), (&"served".into(), &8.into()));
    assert_eq!((&body["cache_salt"], &body["stream"]), (&"tenant".into(), &true.into()));
    line.events().await;
    let first = chunk(0, &[5], None).replace(r#""index":0"#, r#""index":0,"prompt_token_ids":[10,11,12]"#);
    line.event(&first).await;
    line.event(&chunk(0, &[6, 2], Some("stop"))).await;
    line.event(&usage(3, 2, 3)).await;
    line.done().await;
    let expected = "started(0) 0@3=5 0@4=6 0@5=2 0:Stop usage(3,2,3) ended";
    assert_eq!(told(&read(&mut stream).await), expected);
    // The connection is used again, by a request with an id of its own.
    attached.idle().await;
    let mut stream = attached.start(leg(2, &[10], 1));
    let (asked, line) = double.asked().await;
    assert_eq!(asked.connection, 0);
    assert_eq!(asked.headers["x-request-id"], "req-0000000000000002");
    line.json(400, r#"{"error":{"message":"no"}}"#).await;
    assert_eq!(told(&read(&mut stream).await), "rejected(400, no)");
    assert_eq!(attached.notices(), []);
    assert!(!attached.was_in_trouble().await);
}

#[tokio::test]
async fn events_of_one_read_wake_the_reader_once() {
    let mut double = Double::start().await;
    let attached = vllm().attach(&double.url);
    let mut stream = attached.start(leg(1, &[10], 8));
    let (_, mut line) = double.asked().await;
    line.events().await;
    let both = format!("data: {}\n\ndata: {}\n\n", chunk(0, &[5], None), chunk(0, &[6], None));
    line.piece(both.as_bytes()).await;
    let mut events = Vec::new();
    assert!(soon(stream.next_batch(&mut events)).await);
    assert_eq!(told(&events), "started(0) 0@1=5 0@2=6");
    line.event(&chunk(0, &[7], Some("length"))).await;
    line.done().await;
    assert_eq!(told(&read(&mut stream).await), "0@3=7 0:Length ended");
}

#[tokio::test]
async fn no_token_is_lost_of_many_that_come_at_once() {
    let mut double = Double::start().await;
    let attached = vllm().attach(&double.url);
    let mut stream = attached.start(leg(1, &[10], 500));
    let (_, mut line) = double.asked().await;
    line.events().await;
    line.events_at_once((1..=500).map(|number| chunk(0, &[5], (number == 500).then_some("length")))).await;
    let told = told(&read(&mut stream).await);
    assert_eq!(told.matches("=5").count(), 500, "{told}");
    assert!(told.ends_with("0:Length ended"), "{told}");
}

#[tokio::test]
async fn answers_are_told_apart_by_the_requests_own_numbers() {
    let mut double = Double::start().await;
    let attached = vllm().attach(&double.url);
    let mut stream = attached.start(drawn(forebay_engines::Leg { choices: vec![4, 1], ..leg(1, &[10], 8) }));
    let (asked, mut line) = double.asked().await;
    assert_eq!(asked.json()["n"], 2);
    line.events().await;
    line.event(&chunk(1, &[5], None)).await;
    line.event(&chunk(0, &[6], Some("length"))).await;
    line.event(&chunk(1, &[7], Some("length"))).await;
    line.done().await;
    assert_eq!(told(&read(&mut stream).await), "started(0) 1@1=5 4@1=6 4:Length 1@2=7 1:Length ended");
}

#[tokio::test]
async fn the_most_likely_answer_is_asked_for_once_and_given_to_every_choice() {
    let mut double = Double::start().await;
    let attached = vllm().attach(&double.url);
    let mut stream = attached.start(forebay_engines::Leg { choices: vec![0, 1], ..leg(1, &[10], 8) });
    let (asked, mut line) = double.asked().await;
    assert_eq!(asked.json()["n"], 1, "vLLM refuses to draw the same twice");
    line.events().await;
    line.event(&chunk(0, &[5, 2], Some("stop"))).await;
    line.event(&usage(1, 0, 2)).await;
    line.done().await;
    let expected = "started(0) 0@1=5 1@1=5 0@2=2 1@2=2 0:Stop 1:Stop usage(1,0,4) ended";
    assert_eq!(told(&read(&mut stream).await), expected);
    assert_eq!(attached.notices(), []);
}

#[tokio::test]
async fn log_probabilities_come_with_their_tokens() {
    let mut double = Double::start().await;
    let attached = vllm().attach(&double.url);
    let plain = leg(1, &[10], 8);
    let sampling = Sampling { logprobs: Some(1), ..(*plain.sampling).clone() };
    let mut stream = attached.start(forebay_engines::Leg { sampling: Arc::new(sampling), ..plain });
    let (_, mut line) = double.asked().await;
    line.events().await;
    let logprobs =
        r#"{"token_logprobs":[-1.5],"tokens":["token_id:5"],"top_logprobs":[{"token_id:9":-0.5}]}"#;
    let data = chunk(0, &[5], Some("length")).replace(r#""text":"t""#, &format!(r#""logprobs":{logprobs}"#));
    line.event(&data).await;
    line.done().await;
    let events = read(&mut stream).await;
    let logprobs = events.iter().find_map(|event| match event {
        LegEvent::Token(token) => token.logprobs.as_deref(),
        _ => None,
    });
    let logprobs = logprobs.expect("log probabilities");
    assert_eq!((logprobs.chosen, &logprobs.top[..]), (-1.5, &[(9, -0.5)][..]));
}

#[tokio::test]
async fn ranks_are_named_where_the_engine_looks() {
    let mut double = Double::start().await;
    let mut plan = vllm();
    (plan.dp_ranks, plan.speech.ranks) = (4, RankPin::Header);
    let attached = plan.attach(&double.url);
    let third = |id| forebay_engines::Leg { dp_rank: 3, ..leg(id, &[10], 1) };
    let _stream = attached.start(third(1));
    assert_eq!(double.asked().await.0.headers["x-data-parallel-rank"], "3");
    let mut plan = sglang();
    (plan.dp_ranks, plan.speech.ranks) = (4, RankPin::Field);
    let attached = plan.attach(&double.url);
    let _stream = attached.start(third(1));
    assert_eq!(double.asked().await.0.json()["routed_dp_rank"], 3);
    let beyond = forebay_engines::Leg { dp_rank: 4, ..leg(2, &[10], 1) };
    assert!(matches!(attached.engine.start(beyond), Err(StartError::Malformed { .. })));
}

#[tokio::test]
async fn vllms_own_route_takes_and_gives_tokens() {
    let mut double = Double::start().await;
    let mut plan = vllm();
    plan.speech.tokens = Some(TokenRoute::VllmGenerate);
    let attached = plan.attach(&double.url);
    let mut stream = attached.start(leg(1, &[10], 8));
    let (asked, mut line) = double.asked().await;
    assert_eq!(asked.path, "/inference/v1/generate");
    assert_eq!(asked.json()["token_ids"], serde_json::json!([10]));
    line.events().await;
    line.event(r#"{"request_id":"g","usage":null,"output_mode":"tokens","choices":[{"index":0,"finish_reason":"length","stop_reason":null,"token_ids":[5,6],"logprobs":null}]}"#).await;
    line.done().await;
    assert_eq!(told(&read(&mut stream).await), "started(0) 0@1=5 0@2=6 0:Length ended");
}

#[tokio::test]
async fn sglang_takes_and_gives_tokens() {
    let mut double = Double::start().await;
    let attached = sglang().attach(&double.url);
    let mut stream = attached.start(leg(1, &[10, 11], 8));
    let (asked, mut line) = double.asked().await;
    assert_eq!(asked.path, "/generate");
    assert_eq!(asked.json()["rid"], "req-0000000000000001");
    line.events().await;
    let event = |ids: &str, total: u32, finish: &str| {
        format!(
            r#"{{"text":"x","output_ids":{ids},"meta_info":{{"id":"r","finish_reason":{finish},"prompt_tokens":2,"completion_tokens":{total},"cached_tokens":1}}}}"#
        )
    };
    line.event(&event("[5]", 1, "null")).await;
    line.event(&event("[5,6,2]", 3, r#"{"type":"stop","matched":2}"#)).await;
    line.done().await;
    let expected = "started(1) 0@2=5 0@3=6 0@4=2 0:Stop usage(2,1,3) ended";
    assert_eq!(told(&read(&mut stream).await), expected);
}

#[tokio::test]
async fn an_engine_is_told_when_nobody_reads_any_more() {
    for (abort, path, body) in [
        (Abort::Close, "", ""),
        (
            Abort::VllmAbortRequests,
            "/inference/v1/abort_requests",
            r#"{"request_ids":["cmpl-req-0000000000000001-0"]}"#,
        ),
        (Abort::SglangAbortRequest, "/abort_request", r#"{"rid":"req-0000000000000001"}"#),
    ] {
        let mut double = Double::start().await;
        let plan = vllm();
        let plan = Plan { speech: Speech { abort, ..plan.speech.clone() }, ..plan };
        let attached = plan.attach(&double.url);
        let mut stream = attached.start(leg(1, &[10], 8));
        let (_, mut line) = double.asked().await;
        line.events().await;
        line.event(&chunk(0, &[5], None)).await;
        read_until(&mut stream, |event| matches!(event, LegEvent::Token(_))).await;
        drop(stream);
        line.closed().await;
        if !path.is_empty() {
            let (asked, line) = double.asked().await;
            assert_eq!((asked.path.as_str(), &asked.body[..]), (path, body.as_bytes()));
            line.json(200, "").await;
        }
        attached.idle().await;
        assert!(double.is_idle());
    }
}

#[tokio::test]
async fn a_leg_ends_with_the_last_choice_that_is_stopped() {
    let mut double = Double::start().await;
    let attached = vllm().attach(&double.url);
    let two = |id| drawn(forebay_engines::Leg { choices: vec![0, 1], ..leg(id, &[10], 8) });
    let mut stream = attached.start(two(1));
    let (_, mut line) = double.asked().await;
    line.events().await;
    line.event(&chunk(0, &[5], None)).await;
    read_until(&mut stream, |event| matches!(event, LegEvent::Token(_))).await;
    stream.stop_choice(0);
    line.event(&chunk(1, &[6], None)).await;
    read_until(&mut stream, |event| matches!(event, LegEvent::Token(_))).await;
    stream.stop_choice(1);
    assert_eq!(told(&read(&mut stream).await), "ended");
    line.closed().await;
    // One stopped, the other ended by itself: what was stopped goes on, and is not waited for.
    let mut stream = attached.start(two(2));
    let (_, mut line) = double.asked().await;
    stream.stop_choice(0);
    line.events().await;
    line.event(&chunk(0, &[5], None)).await;
    line.event(&chunk(1, &[6, 2], Some("stop"))).await;
    let events = told(&read(&mut stream).await);
    assert!(events.ends_with("1@1=6 1@2=2 1:Stop ended"), "{events}");
    line.closed().await;
}

#[tokio::test]
async fn legs_are_taken_up_to_a_bound() {
    let mut double = Double::start().await;
    let mut plan = vllm();
    plan.waiting_max = 1;
    plan.limits = RemoteLimits { running_max: 1, ..plan.limits };
    let attached = plan.attach(&double.url);
    let first = attached.start(leg(1, &[10], 8));
    let _second = attached.start(leg(2, &[10], 8));
    let refused = attached.engine.start(leg(3, &[10], 8)).err();
    assert_eq!(refused, Some(StartError::QueueFull { waiting_max: 1 }));
    let (_, line) = double.asked().await;
    let _other = double.asked().await;
    drop(first);
    line.closed().await;
    soon(async {
        while attached.engine.legs_running() > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let _third = attached.start(leg(3, &[10], 8));
}

#[tokio::test]
async fn what_an_engine_cannot_do_is_refused_at_once() {
    let url = nowhere().await;
    let attached = vllm().attach(&url);
    let refused = |leg| attached.engine.start(leg).expect_err("a refusal");
    let long = vec![1; 4096];
    assert_eq!(
        refused(leg(1, &long, 8)),
        StartError::TooLong { needed_tokens: 4097, context_tokens_max: 4096 }
    );
    assert!(matches!(refused(leg(1, &[], 8)), StartError::Malformed { .. }));
    assert!(matches!(refused(leg(1, &[1], 0)), StartError::Malformed { .. }));
    let mut plan = vllm();
    plan.speech.tokens = None;
    let text = plan.attach(&url);
    assert_eq!(text.engine.start(leg(1, &[1], 1)).err(), Some(StartError::WrongForm));
    // SGLang's servers of a pair answer no plain request: the prefill server dies of it.
    let mut plan = sglang();
    plan.role = Role::Prefill;
    let prefill = plan.attach(&url);
    assert_eq!(prefill.engine.start(leg(1, &[1], 1)).err(), Some(StartError::WrongForm));
    let half = forebay_engines::Leg { work: Work::Prefill, ..leg(1, &[1], 1) };
    assert!(matches!(prefill.engine.start(half), Err(StartError::Malformed { .. })));
}

#[tokio::test]
async fn a_life_that_ends_takes_its_legs_along() {
    let mut double = Double::start().await;
    let attached = vllm().attach(&double.url);
    let mut stream = attached.start(leg(1, &[10], 8));
    let (_, line) = double.asked().await;
    attached.engine.stop();
    assert_eq!(told(&read(&mut stream).await), "lost");
    line.closed().await;
    assert_eq!(attached.engine.start(leg(2, &[10], 8)).err(), Some(StartError::Gone));
    assert!(attached.reports.is_dead());
    // Whoever forgets the driver need not stop it.
    let attached = vllm().attach(&double.url);
    let mut stream = attached.start(leg(1, &[10], 8));
    let (_, line) = double.asked().await;
    drop(attached);
    assert_eq!(told(&read(&mut stream).await), "lost");
    line.closed().await;
}
