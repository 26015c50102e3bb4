//! Clients that leave, engines that die, servers that end; and what is left then.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_dialect::{
    ConnectorOptions, DialectParts, DialectServer, Ended, EngineOptions, EngineProcess, EventOptions,
    HttpLimits, KvConnector, KvRole, ModelText, StartFailure,
};
use forebay_engines::{
    Driver, Launch,
    simulated::{SimulatedFleet, SimulatedLauncher, StepCoefficients},
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_text::{ChatTemplate, Tokenizer};
use forebay_types::{EngineName, Incarnation, Role};
use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime::Handle};

use crate::support::{
    BLOCK_SIZE, Engine, PATIENCE, client::Client, limits, options, prompt, simulated, with,
};

/// So slow that nothing ends by itself.
const SLOW: f64 = 0.5;

fn endless() -> Value {
    json!({"prompt": prompt(3, 100), "max_tokens": 2000, "ignore_eos": true, "stream": true, "n": 2})
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_hang_up_leave_nothing_behind() {
    let engine = Engine::start(options(simulated(SLOW))).await;
    let mut streams = Vec::new();
    for _ in 0..8 {
        streams.push(engine.client.stream("/v1/completions", &endless()).await);
    }
    engine
        .until("all run", |metrics| {
            let busy =
                metrics.value("vllm:num_requests_running") == 16.0 && metrics.value("forebay:legs") == 8.0;
            busy && metrics.value("vllm:kv_cache_usage_perc") > 0.0
        })
        .await;
    assert_eq!(engine.client.get("/load").await.good()["server_load"], 8);
    drop(streams);
    // Nor do those who never read a byte.
    let whole = with(&endless(), &json!({"stream": false}));
    let waiting = engine.client.clone();
    let asked = tokio::spawn(async move { waiting.post("/v1/completions", &whole).await });
    engine
        .until("the whole answer is under way", |metrics| metrics.value("vllm:prompt_tokens_total") > 800.0)
        .await;
    asked.abort();
    let idle = engine.until_idle().await;
    assert_eq!(idle.value("vllm:request_success_total{finished_reason=\"abort\"}"), 18.0);
    assert_eq!(idle.value("forebay:kv_blocks_unpublished_total"), 0.0);
    let begun = Instant::now();
    while engine.client.get("/load").await.good()["server_load"] != 0 {
        assert!(begun.elapsed() < PATIENCE, "a request is counted that is no more");
    }
    let generated = idle.value("vllm:generation_tokens_total");
    assert_eq!(engine.metrics().await.value("vllm:generation_tokens_total"), generated, "nothing runs on");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_bound_are_turned_away() {
    let http = HttpLimits { requests_max: 2, ..HttpLimits::default() };
    let engine = Engine::start(EngineOptions { http, ..options(simulated(SLOW)) }).await;
    let first = engine.client.stream("/v1/completions", &endless()).await;
    let _second = engine.client.stream("/v1/completions", &endless()).await;
    let refused = engine.client.post("/v1/completions", &endless()).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!(503)));
    drop(first);
    engine.until("room", |metrics| metrics.value("forebay:legs") == 1.0).await;
    let _third = engine.client.stream("/v1/completions", &endless()).await;
    let metrics = engine.metrics().await;
    assert_eq!(metrics.value("vllm:admission_rejections_total{reason=\"max_num_queued_reqs\"}"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_of_the_engine_reads_the_same() {
    let limits = forebay_engines::EngineLimits { sequences_max: 1, waiting_max: 1, ..limits() };
    let engine = Engine::start(EngineOptions { limits, ..options(simulated(SLOW)) }).await;
    let single = with(&endless(), &json!({"n": 1}));
    let _running = engine.client.stream("/v1/completions", &single).await;
    let (client, body) = (engine.client.clone(), single.clone());
    let waiting = tokio::spawn(async move { client.post("/v1/completions", &body).await });
    engine.until("one waits", |metrics| metrics.value("vllm:num_requests_waiting") == 1.0).await;
    assert_eq!(engine.client.post("/v1/completions", &single).await.status, 503);
    let metrics = engine.metrics().await;
    assert_eq!(metrics.value("vllm:num_requests_waiting_by_reason{reason=\"capacity\"}"), 1.0);
    assert_eq!(metrics.value("vllm:admission_rejections_total{reason=\"max_num_queued_reqs\"}"), 1.0);
    waiting.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_end_at_their_own_limit_of_time() {
    let http = HttpLimits { request_time_max: Duration::from_millis(300), ..HttpLimits::default() };
    let engine = Engine::start(EngineOptions { http, ..options(simulated(SLOW)) }).await;
    let whole = with(&endless(), &json!({"stream": false}));
    assert_eq!(engine.client.post("/v1/completions", &whole).await.status, 504);
    engine.until_idle().await;
}

/// An engine whose life the test holds in its hands.
async fn by_hand() -> (Arc<SimulatedLauncher>, DialectServer) {
    let hasher = BlockHasher::new(HashKey([4; 16]), BLOCK_SIZE);
    let connector = KvConnector::new(ConnectorOptions::loopback(KvRole::Both), Handle::current());
    let tokenizer = Tokenizer::bytes();
    let fleet = SimulatedFleet {
        model: "sim".into(),
        context_tokens_max: 4096,
        limits: limits(),
        hasher,
        mover: connector.mover(),
        runtime: Handle::current(),
        candidates: tokenizer.plain_tokens().into(),
        timing: StepCoefficients::H100_8B,
        speed: SLOW,
    };
    let launcher = Arc::new(SimulatedLauncher::new(EngineName::from("mortal"), Role::Both, fleet));
    let driver: Arc<dyn Driver> = launcher.launch(Incarnation(1)).await.unwrap();
    let text = ModelText {
        stop_tokens: tokenizer.eos().into(),
        tokenizer,
        template: ChatTemplate::chatml(),
        vocabulary_tokens: u32::MAX,
    };
    let parts = DialectParts {
        driver,
        hasher,
        text,
        api_key: None,
        connector: Some(connector),
        events: Some(EventOptions::default()),
        limits: HttpLimits::default(),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (launcher, DialectServer::bind(listener, parts).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_dies_takes_its_server_with_it() {
    let (launcher, server) = by_hand().await;
    let client = Client::new(server.addresses().http);
    let serving = tokio::spawn(server.serve(std::future::pending()));
    let mut stream = client.stream("/v1/completions", &endless()).await;
    launcher.current().unwrap().crash();
    let mut rest = String::new();
    while let Some(piece) = stream.piece().await {
        rest.push_str(&piece);
    }
    let error = rest.split("\n\n").find(|event| event.contains("\"error\"")).expect("the client is told");
    assert!(error.contains("EngineDeadError") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
    drop(stream);
    let Ended::EngineDied { reason } = serving.await.unwrap() else { panic!("it ended otherwise") };
    assert!(reason.contains("crash"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_told_to_end_finishes_what_runs() {
    let engine = Engine::start(options(simulated(20.0))).await;
    let body = json!({"prompt": prompt(1, 30), "max_tokens": 200, "ignore_eos": true, "stream": true});
    let mut stream = engine.client.stream("/v1/completions", &body).await;
    let ended = tokio::spawn(engine.stop());
    let mut rest = String::new();
    while let Some(piece) = stream.piece().await {
        rest.push_str(&piece);
    }
    assert!(rest.contains("\"length\"") && rest.ends_with("data: [DONE]\n\n"));
    drop(stream);
    assert_eq!(ended.await.unwrap(), Ended::Shutdown { cut: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_another_life() {
    let first = Engine::start(options(simulated(0.0))).await;
    let life = first.addresses.engine_id.clone();
    assert_eq!(life.len(), 36);
    first.stop().await;
    let second = Engine::start(options(simulated(0.0))).await;
    assert_ne!(second.addresses.engine_id, life);
    let json = serde_json::to_value(&second.addresses).unwrap();
    assert!(
        json["http"].is_string() && json["kv_events_port"].is_number() && json["side_channel"].is_string()
    );
}

#[tokio::test]
async fn open_sockets_need_a_key_or_a_word() {
    let everywhere = [0, 0, 0, 0].into();
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let refused = EngineProcess::start(options(simulated(0.0)), listener).await;
    assert!(matches!(refused.err().unwrap(), StartFailure::Exposed { socket: "HTTP without a key", .. }));
    let events = EventOptions { bind: everywhere, ..EventOptions::default() };
    let connector = ConnectorOptions { bind: everywhere, ..ConnectorOptions::loopback(KvRole::Both) };
    for exposed in [
        EngineOptions { events: Some(events), ..options(simulated(0.0)) },
        EngineOptions { connector: Some(connector), ..options(simulated(0.0)) },
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let refused = EngineProcess::start(exposed.clone(), listener).await.err().unwrap();
        assert!(refused.to_string().contains("--insecure"), "{refused}");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        assert!(EngineProcess::start(EngineOptions { insecure: true, ..exposed }, listener).await.is_ok());
    }
}
