//! The observer against libzmq, by pyzmq as the publisher. `scripts/fetch-pyzmq.sh` fetches it.

use std::{path::PathBuf, process::Stdio};

use forebay_engine_events::{
    EngineEvent, EngineHash, EventBatch, Stored,
    encode::{Dialect, encode},
};
use forebay_engine_wire::discovery::KvSource;
use forebay_engines::remote::attach;
use forebay_types::TokenId;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use super::rig::{BLOCK, Scripted, Watched, endpoint, quick, soon, spec};

fn python() -> PathBuf {
    let cache = std::env::home_dir().expect("a home folder").join(".cache/forebay/pyzmq/bin/python");
    assert!(
        cache.exists(),
        "pyzmq is not there: run scripts/fetch-pyzmq.sh (looked for {})",
        cache.display()
    );
    cache
}

struct Publisher {
    child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    events: u16,
    replay: u16,
}

impl Publisher {
    /// `mode` is a variable that the publisher minds.
    async fn start(ports: Option<(u16, u16)>, mode: Option<&str>) -> Self {
        let mut command = Command::new(python());
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/remote_watch/publisher.py"));
        if let Some((events, replay)) = ports {
            command.args([events.to_string(), replay.to_string()]);
        }
        if let Some(mode) = mode {
            command.env(mode, "1");
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let commands = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let ports = soon(answers.next_line()).await.unwrap().expect("the publisher runs");
        let (events, replay) = ports.split_once(' ').unwrap();
        let (events, replay) = (events.parse().unwrap(), replay.parse().unwrap());
        Self { child, commands, answers, events, replay }
    }

    async fn obey(&mut self, command: &str) {
        self.commands.write_all(format!("{command}\n").as_bytes()).await.unwrap();
        assert_eq!(soon(self.answers.next_line()).await.unwrap().as_deref(), Some("done"));
    }

    /// Stores blocks as vLLM would say it.
    async fn store(&mut self, verb: &str, blocks: &[u64], time_seconds: f64) {
        let hex: String = payload(blocks, time_seconds).iter().map(|byte| format!("{byte:02x}")).collect();
        self.obey(&format!("{verb} {hex}")).await;
    }

    async fn kill(mut self) -> (u16, u16) {
        self.child.kill().await.unwrap();
        (self.events, self.replay)
    }
}

/// The tokens of blocks that follow each other from a prompt's start.
fn tokens(blocks: &[u64]) -> Vec<TokenId> {
    blocks.iter().flat_map(|block| (0..BLOCK).map(move |token| *block as u32 * 1000 + token)).collect()
}

fn payload(blocks: &[u64], time_seconds: f64) -> Vec<u8> {
    let stored = Stored::plain(None, blocks.iter().copied().map(EngineHash).collect(), tokens(blocks), BLOCK);
    let batch = EventBatch { time_seconds, events: vec![EngineEvent::Stored(stored)], dp_rank: Some(0) };
    encode(&batch, Dialect::VllmMap)
}

/// A vLLM of a few lines whose events are pyzmq's.
async fn watched(publisher: &Publisher) -> Watched {
    let server = Scripted::fixed(&[
        ("GET /v1/models", 200, r#"{"data":[{"id":"m","owned_by":"vllm","max_model_len":4096}]}"#),
        ("GET /health", 200, ""),
        ("GET /metrics", 200, "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 0\n"),
        ("POST /v1/completions", 200, r#"{"choices":[{"token_ids":[1]}]}"#),
    ])
    .await;
    let endpoint = endpoint(&server.url, None);
    let mut spec = spec();
    spec.overrides.kv_events = Some(KvSource {
        dp_rank: 0,
        events: format!("tcp://*:{}", publisher.events),
        replay: Some(format!("tcp://*:{}", publisher.replay)),
        topic: "kv-events".into(),
    });
    let attached = soon(attach(&endpoint, &spec)).await.unwrap();
    assert_eq!(attached.facts.cache_sight, forebay_engines::CacheSight::Events);
    Watched::begin(&endpoint, &attached, quick())
}

async fn late_subscriber_then_gap(mode: Option<&str>) {
    let mut publisher = Publisher::start(None, mode).await;
    publisher.store("publish", &[1, 2, 3], 1.0).await;
    publisher.store("publish", &[4], 2.0).await;
    let mut watched = watched(&publisher).await;
    watched
        .until("the replay brought it", |it| {
            it.holds(0, "m", &tokens(&[1, 2, 3])) && it.holds(0, "m", &tokens(&[4]))
        })
        .await;
    publisher.store("lose", &[5, 6], 3.0).await;
    publisher.store("publish", &[7], 4.0).await;
    watched
        .until("the gap is healed", |it| {
            it.holds(0, "m", &tokens(&[5, 6])) && it.holds(0, "m", &tokens(&[7]))
        })
        .await;
    assert!(
        watched.holds(0, "m", &tokens(&[1, 2, 3])) && watched.notices.is_empty(),
        "{:?}",
        watched.notices
    );

    publisher.store("lose", &[8], 5.0).await;
    publisher.obey("forget 0").await;
    publisher.store("publish", &[9], 6.0).await;
    watched
        .until("a gap that nobody can heal is said", |it| it.has_note("KV events 4 to 4 of rank 0 are lost"))
        .await;
    watched.until("and what follows is followed", |it| it.holds(0, "m", &tokens(&[9]))).await;
    assert!(!watched.holds(0, "m", &tokens(&[1])), "the rank was emptied");
}

#[tokio::test]
async fn late_subscriber_then_gap_with_todays_replies() {
    late_subscriber_then_gap(None).await;
}

#[tokio::test]
async fn late_subscriber_then_gap_with_older_replies() {
    late_subscriber_then_gap(Some("OLD_REPLIES")).await;
}

/// What is published before the publisher knows of its subscriber reaches nobody; it is learned though nothing follows.
#[tokio::test]
async fn what_was_missed_while_subscribing_is_asked_for() {
    let mut publisher = Publisher::start(None, None).await;
    publisher.store("publish", &[1], 1.0).await;
    let mut watched = watched(&publisher).await;
    watched.until("the replay brought it", |it| it.holds(0, "m", &tokens(&[1]))).await;
    publisher.store("lose", &[2], 2.0).await;
    watched.until("what was missed is known", |it| it.holds(0, "m", &tokens(&[2]))).await;
}

#[tokio::test]
async fn a_restarted_publisher_begins_another_life() {
    let mut publisher = Publisher::start(None, None).await;
    for block in 1..=5 {
        publisher.store("publish", &[block], block as f64).await;
    }
    let mut watched = watched(&publisher).await;
    watched.until("it is followed", |it| it.holds(0, "m", &tokens(&[5]))).await;
    let (events, replay) = publisher.kill().await;
    let mut again = Publisher::start(Some((events, replay)), None).await;
    // The first ones of a new publisher reach nobody; the replay after the connection is back has them.
    again.store("publish", &[100], 100.0).await;
    again.store("publish", &[101], 101.0).await;
    watched.until("smaller numbers are a restart", |it| it.died.is_some()).await;
    assert!(watched.died.as_ref().unwrap().contains("KV events begin anew"), "{:?}", watched.died);
}

/// Frames of a few megabytes, and many of a few bytes, arrive whole and in order.
#[tokio::test]
async fn large_and_many_messages_arrive() {
    let mut publisher = Publisher::start(None, None).await;
    let mut watched = watched(&publisher).await;
    let long: Vec<u64> = (1..=4000).collect();
    publisher.store("publish", &long, 1.0).await;
    for number in 0..200 {
        publisher.store("publish", &[10_000 + number], 2.0 + number as f64).await;
    }
    watched
        .until("all are known", |it| it.holds(0, "m", &tokens(&long)) && it.holds(0, "m", &tokens(&[10_199])))
        .await;
    assert!((0..200).all(|number| watched.holds(0, "m", &tokens(&[10_000 + number]))));
    assert!(watched.notices.is_empty(), "{:?}", watched.notices);
}

/// An engine's answer to a replay is longer than its socket has room for, so much of it is dropped, and its end.
#[tokio::test]
async fn a_replay_of_which_much_is_dropped_is_asked_for_again() {
    let mut publisher = Publisher::start(None, Some("FULL_SOCKET")).await;
    for number in 0..45 {
        publisher.store("lose", &[number], number as f64).await;
    }
    let mut watched = watched(&publisher).await;
    watched.until("the last is known", |it| it.holds(0, "m", &tokens(&[44]))).await;
    assert!((0..45).all(|number| watched.holds(0, "m", &tokens(&[number]))));
    assert!(watched.notices.is_empty(), "{:?}", watched.notices);
}
