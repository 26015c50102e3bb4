//! Blocks a second that the observer of an attached engine takes on one core, from the engine's ZMQ socket to events for the
//! index: `cargo run --release -p forebay-engines --example event_intake [BLOCKS_A_SECOND [SECONDS]]`.
//!
//! The publisher is another process. Its messages are encoded before the clock starts, shaped like captures of vLLM: a
//! batch stores a prompt of 80 tokens in blocks of 16 and removes one that was stored before; a hundred thousand blocks are
//! held throughout. It sends as many as asked for (400,000 blocks a second). Prints one line of JSON: what was taken, the
//! time that this process ran on a processor, and the quotient of both.
#![allow(clippy::print_stdout, reason = "prints its figure")]

use std::{
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_engine_events::{
    EngineEvent, EngineHash, EventBatch, GroupKind, Removed, Stored,
    encode::{Dialect, encode},
};
use forebay_engine_wire::{
    discovery::{Dialled, Server, ZmqAddress},
    metrics::Pool,
};
use forebay_engines::{
    Accepts, CacheSight, EngineFacts, KvAbilities, Notice, Reports,
    remote::{
        ObservePlan, ObserveSettings, Observer,
        client::{ClientSettings, Endpoint, HttpClient},
        observe,
    },
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_perf_model::StepCoefficients;
use forebay_types::{Incarnation, KvEvent, Role, Tier, TokenId};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpListener,
    process::Command,
    sync::Notify,
    time::{interval, timeout},
};
use zeromq::{PubSocket, Socket as _, SocketSend as _, ZmqMessage};

const BLOCK_TOKENS: u32 = 16;
const PROMPT_BLOCKS: u64 = 5;
/// Prompts in all, which come again and again, and those that are held at a time.
const PROMPTS: u64 = 60_000;
const PROMPTS_HELD: u64 = 20_000;
/// How often the publisher catches up with its rate.
const TICK: Duration = Duration::from_millis(5);

/// Spreads bits, so that hashes and tokens look like an engine's. Not for anything else.
fn mix(seed: u64) -> u64 {
    let mixed = (seed ^ seed >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ mixed >> 32
}

fn hashes(prompt: u64) -> Vec<EngineHash> {
    (0..PROMPT_BLOCKS).map(|block| EngineHash(mix(prompt << 16 | block))).collect()
}

fn payload(prompt: u64, removed: Option<u64>) -> Bytes {
    let tokens = PROMPT_BLOCKS * u64::from(BLOCK_TOKENS);
    let removals = removed
        .into_iter()
        .flat_map(hashes)
        .map(|hash| EngineEvent::Removed(Removed { hashes: vec![hash], tier: Tier::Device, group: Some(0) }));
    let stored = EngineEvent::Stored(Stored {
        hashes: hashes(prompt),
        parent: None,
        tokens: (0..tokens).map(|index| (mix(prompt * tokens + index) % 128_000) as TokenId).collect(),
        block_size_tokens: BLOCK_TOKENS,
        lora_id: None,
        lora_name: None,
        salt: None,
        extra_keys: Some(vec![Vec::new(); PROMPT_BLOCKS as usize]),
        tier: Tier::Device,
        group: Some(0),
        kind: Some(GroupKind::FullAttention),
        window_tokens: None,
    });
    let events = removals.chain([stored]).collect();
    encode(&EventBatch { time_seconds: 1.0, events, dp_rank: Some(0) }, Dialect::VllmMap).into()
}

/// The publisher: prints its port, repeats batch 0 until it is told to go, then sends `batches` in all.
async fn publish(blocks_a_second: u64, batches: u64) {
    let first: Vec<Bytes> = (0..PROMPTS_HELD).map(|prompt| payload(prompt, None)).collect();
    let later: Vec<Bytes> = (0..PROMPTS)
        .map(|prompt| payload(prompt, Some((prompt + PROMPTS - PROMPTS_HELD) % PROMPTS)))
        .collect();
    let mut socket = PubSocket::new();
    let bound = socket.bind("tcp://127.0.0.1:0").await.expect("a port");
    println!("{bound}");
    let mut send = async |number: u64| {
        let payload = first.get(number as usize).unwrap_or(&later[(number % PROMPTS) as usize]);
        let number = Bytes::copy_from_slice(&number.to_be_bytes());
        let message =
            ZmqMessage::try_from(vec![Bytes::new(), number, payload.clone()]).expect("three frames");
        socket.send(message).await.expect("a publisher can always send");
    };
    let mut go = String::new();
    let mut orders = BufReader::new(tokio::io::stdin());
    while timeout(TICK, orders.read_line(&mut go)).await.is_err() {
        send(0).await;
    }
    let (began, mut ticks, mut sent) = (Instant::now(), interval(TICK), 1);
    while sent < batches {
        ticks.tick().await;
        let due = (began.elapsed().as_secs_f64() * (blocks_a_second / PROMPT_BLOCKS) as f64) as u64;
        while sent < due.min(batches) {
            send(sent).await;
            sent += 1;
        }
    }
    // The socket sends in the background: it ends when the other side has all and ends this process.
    let _never = orders.read_line(&mut go).await;
}

/// Seconds that all threads of this process ran.
fn cpu_seconds() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux keeps it");
    let nanoseconds: u64 = tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    nanoseconds as f64 / 1e9
}

/// An engine of which nothing is there but its health and its event socket.
async fn engine(events: ZmqAddress) -> (Endpoint, ObservePlan, EngineFacts) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                while matches!(stream.read(&mut request).await, Ok(1..)) {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.ok()?;
                }
                Some(())
            });
        }
    });
    let client = HttpClient::new(&ClientSettings::default()).expect("no TLS settings");
    let endpoint = Endpoint::new(&url, client, None).expect("a URL");
    let plan = ObservePlan {
        server: Server::Vllm,
        health: "/health",
        metrics: false,
        loads: false,
        pool: Pool { blocks_total: 0, block_size_tokens: BLOCK_TOKENS },
        step_tokens_max: 8192,
        first_rank: 0,
        started_seconds: None,
        block_size_tokens: Some(BLOCK_TOKENS),
        events: vec![Dialled { dp_rank: 0, events, replay: None, topic: String::new() }],
    };
    let facts = EngineFacts {
        engine: "published".into(),
        kind: "vllm",
        incarnation: Incarnation(1),
        model: "m".into(),
        role: Role::Both,
        dp_ranks: 1,
        block_size_tokens: BLOCK_TOKENS,
        block_bytes: 0,
        blocks_total: 0,
        step_tokens_max: 8192,
        context_tokens_max: 8192,
        waiting_max: 1,
        kv: KvAbilities::default(),
        accepts: Accepts::TOKENS,
        continues_sampling: false,
        cache_sight: CacheSight::Events,
        notes: Vec::new(),
        prior: StepCoefficients::H100_8B,
    };
    (endpoint, plan, facts)
}

/// Reads reports until `batches` were taken, or nothing more comes. Blocks stored, and what was complained of.
async fn take(reports: &Reports, observer: &Observer, batches: u64) -> (u64, Vec<String>) {
    let (mut stored, mut notes) = (0, Vec::new());
    loop {
        let Ok(report) = timeout(Duration::from_secs(3), reports.next()).await else {
            return (stored, notes);
        };
        for event in report.kv.iter().flat_map(|batch| &batch.events) {
            if let KvEvent::Stored { hashes, .. } = event {
                stored += hashes.len() as u64;
            }
        }
        notes.extend(report.notices.into_iter().filter_map(|notice| match notice {
            Notice::Heard | Notice::Silent { .. } => None,
            other => Some(format!("{other:?}")),
        }));
        notes.extend(report.died.map(|why| why.to_string()));
        if observer.events()[0].1.batches >= batches {
            return (stored, notes);
        }
    }
}

async fn measure(blocks_a_second: u64, seconds: u64) {
    let batches = blocks_a_second * seconds / PROMPT_BLOCKS;
    let mut child = Command::new(std::env::current_exe().expect("it runs"))
        .args(["publish".to_owned(), blocks_a_second.to_string(), batches.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("it can be started again");
    let mut orders = child.stdin.take().expect("piped");
    let mut said = BufReader::new(child.stdout.take().expect("piped")).lines();
    let bound = said.next_line().await.expect("it speaks").expect("it says its port");
    let (endpoint, plan, facts) = engine(ZmqAddress::parse(&bound).expect("an address")).await;
    let (reports, trouble) = (Arc::new(Reports::default()), Arc::new(Notify::new()));
    let hasher = BlockHasher::new(HashKey::GOLDEN, BLOCK_TOKENS);
    let observer =
        observe(endpoint, plan, &facts, hasher, ObserveSettings::default(), reports.clone(), trouble);
    // Batch 0 comes again and again: the subscription has arrived.
    let (first, _) = take(&reports, &observer, 1).await;
    let (cpu, clock) = (cpu_seconds(), Instant::now());
    orders.write_all(b"go\n").await.expect("it listens");
    let already = observer.events()[0].1.batches;
    let (stored, notes) = take(&reports, &observer, batches + already - 1).await;
    let (cpu, clock) = (cpu_seconds() - cpu, clock.elapsed().as_secs_f64());
    let figures = observer.events()[0].1;
    let result = json!({
        "blocks": stored,
        "blocks_offered": (batches - 1) * PROMPT_BLOCKS,
        "blocks_held": figures.cache.blocks_device,
        "blocks_before": first,
        "seconds": clock,
        "cpu_seconds": cpu,
        "blocks_a_cpu_second": stored as f64 / cpu,
        "blocks_a_second": stored as f64 / clock,
        "notes": notes,
    });
    println!("{result}");
}

/// One thread, so one core.
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number =
        |index: usize, default: u64| arguments.get(index).and_then(|it| it.parse().ok()).unwrap_or(default);
    if arguments.first().is_some_and(|first| first == "publish") {
        return publish(number(1, 400_000), number(2, 1)).await;
    }
    measure(number(0, 400_000), number(1, 10)).await;
}
