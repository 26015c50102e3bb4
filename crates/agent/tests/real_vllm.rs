//! An agent over a real vLLM. Takes minutes, so it is run by name, with the program that `scripts/vllm/install.sh` made and
//! a model folder that `scripts/vllm/engines.py` can make:
//!
//! ```text
//! FOREBAY_TEST_VLLM=~/.cache/forebay/vllm-0.32/bin/vllm FOREBAY_TEST_MODEL=FOLDER \
//!     cargo test -p forebay-agent --test real_vllm -- --ignored --nocapture
//! ```

#![allow(clippy::print_stdout, reason = "it takes minutes and says where it is")]

#[path = "support/engine.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod engine;
#[path = "support/gateway.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod gateway;

use std::{sync::Arc, time::Duration};

use forebay_agent::{Command, Exit, Limits, Options, run};
use forebay_engines::remote::client::{ClientSettings, Endpoint, HttpClient, Limits as HttpLimits, Secret};
use forebay_proto::v1::from_agent::Body as Said;
use forebay_registry::{Memory, Registry};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use engine::{Home, runs};
use gateway::{Gateway, LEASE, Peer};

/// For a start on a busy machine of two cores.
const START_MAX: Duration = Duration::from_secs(600);

async fn ready(peer: &mut Peer) {
    let began = Instant::now();
    let mut sentence = String::new();
    while peer.ranks[0].is_none() {
        let read = timeout(START_MAX, peer.read()).await.expect("a start has an end");
        assert!(read, "the stream ended: {:?}", peer.died());
        if let Some(progress) = peer.progress.as_ref().filter(|progress| progress.sentence != sentence) {
            println!("{:6.1} s  {}: {}", began.elapsed().as_secs_f64(), progress.state, progress.sentence);
            sentence.clone_from(&progress.sentence);
        }
    }
    println!("{:6.1} s  ready; notes: {:#?}", began.elapsed().as_secs_f64(), peer.notes);
}

#[tokio::test]
#[ignore = "needs a real vLLM, and minutes"]
#[allow(clippy::disallowed_methods, reason = "says where they are")]
async fn a_real_engine_is_started_adopted_and_ended() {
    let program = std::env::var("FOREBAY_TEST_VLLM").expect("FOREBAY_TEST_VLLM");
    let model = std::env::var("FOREBAY_TEST_MODEL").expect("FOREBAY_TEST_MODEL");
    let line = format!(
        "env HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_HOST_IP=127.0.0.1 \
         VLLM_CPU_OMP_THREADS_BIND=0 UCX_TLS=tcp,shm,self {program} serve {model} --dtype float32 --enforce-eager \
         --max-model-len 1024 --block-size 32 --served-model-name smol"
    );
    let command: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let home = Home::new();
    let registry = Memory::new(Duration::from_secs(60));
    let mut gateway = Gateway::start(None).await;
    let _announced = registry.announce(gateway.record()).expect("a record");
    let options = || Options {
        limits: Limits { stop_max: Duration::from_secs(60), ..Limits::default() },
        ..Options::new("e".into(), command.clone(), home.path().to_owned(), Arc::new(registry.clone()))
    };
    let (commands, orders) = mpsc::channel(1);
    let first = tokio::spawn(run(options(), orders));
    let mut peer = gateway.welcomed("gw", LEASE).await;
    ready(&mut peer).await;
    println!("facts: {:#?}", home.life());
    let data_plane = peer.stream.hello.data_plane.clone();
    let client = HttpClient::new(&ClientSettings::default()).expect("a client");
    let key = data_plane.api_key.map(|key| Secret::new(key.expose()));
    let engine = Endpoint::new(&data_plane.url, client, key.as_ref()).expect("a URL");
    for first_token in 0..10 {
        let prompt: Vec<u32> = (1_000 + first_token..1_100 + first_token).collect();
        let body = serde_json::json!({ "model": "smol", "prompt": prompt, "max_tokens": 4 });
        let limits = HttpLimits { body_bytes_max: 1 << 20, deadline: std::time::Instant::now() + START_MAX };
        engine.post_json("/v1/completions", body.to_string().into(), limits).await.expect("an answer");
        let blocks = |peer: &Peer| peer.ranks[0].as_ref().map_or(0, |(_, blocks)| blocks.len());
        // 100 tokens are six blocks of the fleet's size, and three of the engine's.
        if timeout(Duration::from_secs(5), peer.until("blocks", |peer| blocks(peer) >= 6)).await.is_ok() {
            break;
        }
        assert!(first_token < 9, "no block was ever announced");
    }
    let pid = home.pid().expect("written down");
    commands.send(Command::Leave).await.expect("the agent runs");
    assert!(matches!(first.await.expect("no panic"), Ok(Exit::Left)));

    let (commands, orders) = mpsc::channel(1);
    let second = tokio::spawn(run(options(), orders));
    let mut next = gateway.welcomed("gw", LEASE).await;
    ready(&mut next).await;
    assert_eq!((home.pid(), next.stream.hello.incarnation), (Some(pid), peer.stream.hello.incarnation));
    let known = peer.ranks[0].as_ref().map(|(_, blocks)| blocks.clone());
    next.until("its cache", |peer| peer.ranks[0].as_ref().map(|(_, blocks)| blocks.clone()) == known).await;
    commands.send(Command::Stop).await.expect("the agent runs");
    next.until_its_end().await;
    assert!(next.other.iter().any(|said| matches!(said, Said::Drain(_))));
    println!("last words: {:?}", next.died().map(|died| &died.last_words));
    assert!(matches!(second.await.expect("no panic"), Ok(Exit::Stopped)));
    assert!(!runs(pid));
}
