//! The agents' door, from outside: scripted agents over real sockets.

mod agent;
mod groups;

use std::time::Duration;

use forebay_engines::remote::TokenRoute;
use forebay_gateway::{
    cluster::ClusterSettings,
    orchestrator::api::{EngineStatus, LogsAnswer, Orchestrate},
};
use forebay_proto::{
    Hello, TokenizerFile, tokenizer_chunks, tokenizer_unavailable,
    v1::{self, from_agent::Body, from_gateway::Body as Answer},
};
use forebay_testkit::{VllmDouble, VllmOptions};
use forebay_types::Role;

use agent::{Agent, LEASE, Rig, hello, key};

#[tokio::test]
async fn an_engine_joins_with_its_cache_and_leaves_with_its_death() {
    let rig = Rig::start().await;
    let mut agent = rig.attach(hello("e", 7)).await;
    rig.until(|engines| engines.len() == 1 && engines[0].state == "ready").await;
    agent.snapshot(0, 5, &[1, 2, 3]).await;
    agent.delta(0, 5, &[4]).await;
    rig.until(|engines| engines[0].indexed_blocks == 4).await;
    agent.send(Body::Load(v1::Load {
        dp_rank: 0,
        load: Some(v1::RankLoad { running: 9, ..v1::RankLoad::default() }),
        age_ms: 0,
    }));
    rig.until(|engines| engines[0].load.running == 9).await;
    agent.send(Body::Died(v1::Died { last_words: "signal 9".to_owned(), log_tail: vec![] }));
    rig.until(Vec::is_empty).await;
}

#[tokio::test]
async fn half_of_a_pair_is_not_ready() {
    let rig = Rig::start().await;
    let _prefill = rig.attach(Hello { role: Role::Prefill, ..hello("p", 7) }).await;
    rig.until(|engines| engines.len() == 1 && engines[0].state == "ready").await;
    assert!(!rig.orchestrator.is_ready(), "nobody decodes");
    let mut decode = rig.attach(Hello { role: Role::Decode, ..hello("d", 8) }).await;
    rig.until(|engines| engines.len() == 2 && engines[1].state == "ready").await;
    assert!(rig.orchestrator.is_ready());
    decode.send(Body::Died(v1::Died::default()));
    rig.until(|engines| engines.len() == 1).await;
    assert!(!rig.orchestrator.is_ready());
}

#[tokio::test]
async fn a_thousand_engines_register() {
    const ENGINES: usize = 1_000;
    let patient = Duration::from_secs(60);
    let rig = Rig::start_with(ClusterSettings {
        gateway: "gw".to_owned(),
        hash_key: key(),
        heartbeat: Duration::from_secs(5),
        silence_max: patient,
        lease: patient,
        engines_max: ENGINES,
    })
    .await;
    let mut agents = Vec::new();
    for number in 0..ENGINES {
        let mut agent = rig.attach_without_heartbeat(hello(&format!("e{number}"), number as u64 + 1)).await;
        agent.snapshot(0, 0, &[number as u64 + 1]).await;
        agents.push(agent);
    }
    let counted = |engines: &Vec<EngineStatus>| {
        engines.iter().filter(|engine| engine.state == "ready" && engine.indexed_blocks == 1).count()
    };
    rig.until(|engines| counted(engines) == ENGINES).await;
    let reject = rig.rejected(hello("one more", 5_000)).await;
    assert_eq!(reject.reason(), v1::RejectReason::TooManyEngines, "{}", reject.sentence);
    // A host with a tenth of them dies.
    agents.drain(..ENGINES / 10);
    rig.until(|engines| counted(engines) == ENGINES - ENGINES / 10).await;
}

#[tokio::test]
async fn a_gap_in_the_deltas_asks_for_a_snapshot_and_is_healed() {
    let rig = Rig::start().await;
    let mut agent = rig.attach(hello("e", 7)).await;
    agent.snapshot(0, 0, &[1, 2]).await;
    agent.delta(0, 3, &[9]).await;
    agent
        .expect(|answer| matches!(answer, Answer::RequestSnapshot(v1::RequestSnapshot { dp_rank: 0 })))
        .await;
    rig.until(|engines| engines[0].indexed_blocks == 0).await;
    agent.snapshot(0, 4, &[1, 2, 9]).await;
    rig.until(|engines| engines[0].indexed_blocks == 3).await;
}

#[tokio::test]
async fn an_agent_that_comes_back_within_the_lease_finds_its_engine() {
    let rig = Rig::start().await;
    let mut agent = rig.attach(hello("e", 7)).await;
    agent.snapshot(0, 0, &[1, 2]).await;
    rig.until(|engines| engines[0].indexed_blocks == 2).await;
    drop(agent);
    rig.until(|engines| engines[0].state == "silent").await;
    let _agent = rig.attach(hello("e", 7)).await;
    rig.until(|engines| engines[0].state == "ready").await;
    let engines = rig.orchestrator.engines();
    assert_eq!((engines[0].restarts, engines[0].indexed_blocks), (0, 2), "the same life, with its cache");
}

#[tokio::test]
async fn a_silent_agent_takes_its_engine_out_of_rotation_and_then_out_of_the_fleet() {
    let rig = Rig::start().await;
    let mut agent = rig.attach_without_heartbeat(hello("e", 7)).await;
    rig.until(|engines| engines[0].state == "silent").await;
    rig.until(Vec::is_empty).await;
    assert!(agent.ended().await, "its stream is over too");
    let reject = rig.rejected(hello("e", 7)).await;
    assert_eq!(reject.reason(), v1::RejectReason::Lapsed, "{}", reject.sentence);
    let _again = rig.attach(hello("e", 8)).await;
    rig.until(|engines| engines.len() == 1 && engines[0].incarnation == 8).await;
}

#[tokio::test]
async fn a_name_belongs_to_one_engine_at_a_time() {
    let rig = Rig::start().await;
    let first = rig.attach(hello("e", 7)).await;
    let reject = rig.rejected(hello("e", 8)).await;
    assert_eq!(reject.reason(), v1::RejectReason::NameTaken, "{}", reject.sentence);
    drop(first);
    rig.until(|engines| engines[0].state == "silent").await;
    let _second = rig.attach(hello("e", 8)).await;
    rig.until(|engines| engines.len() == 1 && engines[0].incarnation == 8).await;
}

#[tokio::test]
async fn what_cannot_be_ends_the_stream_with_a_sentence() {
    let rig = Rig::start().await;
    let reject = rig.rejected_first(Body::Heartbeat(v1::Heartbeat { counter: 1 })).await;
    assert!(reject.sentence.contains("Hello"), "{}", reject.sentence);
    let future = v1::Hello { wire_version: 99, ..hello("e", 7).into() };
    let reject = rig.rejected_first(Body::Hello(future)).await;
    assert_eq!(reject.reason(), v1::RejectReason::WireVersion, "{}", reject.sentence);
    let mut agent = rig.attach(hello("e", 7)).await;
    agent.send(Body::Load(v1::Load { dp_rank: 5, load: Some(v1::RankLoad::default()), age_ms: 0 }));
    let answer = agent.expect(|answer| matches!(answer, Answer::Reject(_))).await;
    let Answer::Reject(reject) = answer else { unreachable!() };
    assert!(reject.sentence.contains("DP rank 5"), "{}", reject.sentence);
    rig.until(|engines| engines[0].state == "silent").await;
}

#[tokio::test]
async fn logs_are_asked_of_the_agent() {
    let rig = Rig::start().await;
    let mut agent = rig.attach(hello("e", 7)).await;
    let LogsAnswer::Asked(asked) = rig.orchestrator.logs("e", 2) else { panic!("its agent keeps it") };
    let asking = tokio::spawn(asked);
    let answer = agent.expect(|answer| matches!(answer, Answer::RequestLogs(_))).await;
    let Answer::RequestLogs(v1::RequestLogs { request_id, lines }) = answer else { unreachable!() };
    assert_eq!(lines, 2);
    agent.send(Body::Logs(v1::Logs { request_id, lines: vec!["a".to_owned(), "b".to_owned()] }));
    assert_eq!(asking.await.expect("it ends"), Ok(vec!["a".to_owned(), "b".to_owned()]));
    assert!(matches!(rig.orchestrator.logs("unknown", 2), LogsAnswer::UnknownEngine));
}

#[tokio::test]
async fn a_drain_reaches_the_agent_and_shows() {
    let rig = Rig::start().await;
    let mut agent = rig.attach(hello("e", 7)).await;
    rig.until(|engines| engines[0].state == "ready").await;
    assert!(rig.orchestrator.drain("e") && !rig.orchestrator.drain("unknown"));
    agent.expect(|answer| matches!(answer, Answer::DrainEngine(_))).await;
    rig.until(|engines| engines[0].state == "draining").await;
}

#[tokio::test]
async fn welcome_says_how_the_fleet_names_blocks() {
    let rig = Rig::start().await;
    let agent = rig.attach(hello("e", 7)).await;
    assert_eq!(agent.welcome.hash_key, key());
    assert_eq!(agent.welcome.lease, LEASE);
    assert!(agent.welcome.heartbeat_interval < LEASE);
    assert!(Duration::ZERO < agent.welcome.heartbeat_interval);
}

/// An engine that takes tokens of a model that nobody here has the tokenizer of.
fn hello_with_tokens(engine: &str, incarnation: u64, double: &VllmDouble) -> Hello {
    let mut hello = hello(engine, incarnation);
    hello.data_plane.url = double.url();
    let facts = hello.facts.as_mut().expect("it serves");
    facts.accepts.tokens = true;
    facts.dialect.speech.tokens = Some(TokenRoute::Completions);
    facts.dialect.speech.model = double.options().model.as_str().into();
    hello
}

async fn asked_for_its_tokenizer(agent: &mut Agent) -> u64 {
    match agent.expect(|answer| matches!(answer, Answer::RequestTokenizer(_))).await {
        Answer::RequestTokenizer(v1::RequestTokenizer { request_id }) => request_id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_tokenizer_comes_from_the_engines_host() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let rig = Rig::start().await;
    let mut agent = rig.attach(hello_with_tokens("e", 7, &double)).await;
    let request_id = asked_for_its_tokenizer(&mut agent).await;
    // One at a time: the second engine of the model waits for the first one's.
    let mut other = rig.attach(hello_with_tokens("f", 8, &double)).await;
    assert!(rig.orchestrator.models().is_empty(), "nothing is served before it is known how");
    agent.send(Body::Drain(v1::Drain::default()));
    let files = [TokenizerFile { name: "tokenizer.json".to_owned(), bytes: vec![1; 300_000].into() }];
    for piece in tokenizer_chunks(request_id, &files).expect("it fits") {
        agent.send(Body::Tokenizer(piece));
    }
    rig.until(|engines| engines.len() == 2 && engines.iter().any(|engine| engine.state == "ready")).await;
    rig.until(|engines| engines.iter().any(|engine| engine.state == "draining")).await;
    assert!(rig.orchestrator.models()[0].takes_tokens);
    // What they told of their caches in the meantime was not heard.
    for agent in [&mut agent, &mut other] {
        agent.expect(|answer| matches!(answer, Answer::RequestSnapshot(_))).await;
    }
}

#[tokio::test]
async fn without_its_tokenizer_an_engine_is_given_text() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let rig = Rig::start().await;
    let empty = [TokenizerFile { name: "tokenizer.json".to_owned(), bytes: vec![].into() }];
    for (name, incarnation, why) in [("e", 7, "its folder is on another host"), ("f", 8, "it is empty")] {
        let mut agent = rig.attach(hello_with_tokens(name, incarnation, &double)).await;
        let request_id = asked_for_its_tokenizer(&mut agent).await;
        let pieces: Vec<_> = match name {
            "e" => vec![tokenizer_unavailable(request_id, why)],
            _ => tokenizer_chunks(request_id, &empty).expect("it fits").collect(),
        };
        for piece in pieces {
            agent.send(Body::Tokenizer(piece));
        }
        rig.until(|engines| engines.len() == 1 && engines[0].state == "ready").await;
        assert!(!rig.orchestrator.models()[0].takes_tokens);
        let engine = &rig.orchestrator.engines()[0];
        assert!(engine.notes.iter().any(|note| note.contains(why)), "{:?}", engine.notes);
        agent.send(Body::Died(v1::Died::default()));
        rig.until(Vec::is_empty).await;
    }
}
