//! What is reported of an engine while it lives, and when it dies.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_engines::{
    CacheSight, Launch as _, Notice,
    remote::{
        AttachSettings, HeldKv, ObserveSettings, RemoteContext, RemoteLauncher, RemoteLimits, RemoteSpec,
        attach,
        client::{ClientSettings, Endpoint, HttpClient},
    },
};
use forebay_testkit::{EventGarbage, Fault, KvEventOptions, VllmDouble, VllmOptions, tokenizer};
use forebay_types::{Incarnation, TokenId};
use serde_json::{Value, json};

use super::rig::{Tokenizer, Watched, endpoint, hasher, quick, soon, spec};

/// A prompt of `blocks` blocks, unlike others.
fn prompt(name: &str, blocks: usize) -> Vec<TokenId> {
    tokenizer::encode(&format!("{name:-<width$}", width = 16 * blocks))
}

/// Has the engine compute a prompt, and some tokens more.
async fn compute(endpoint: &Endpoint, prompt: &[TokenId], rank: Option<u16>, tokens: u32) {
    complete(endpoint, &json!({"prompt": prompt, "max_tokens": tokens}), rank).await;
}

async fn complete(endpoint: &Endpoint, asked: &Value, rank: Option<u16>) {
    let mut body = json!({"model": "double", "temperature": 0, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(asked.as_object().unwrap().clone());
    let mut headers = http::HeaderMap::new();
    if let Some(rank) = rank {
        headers.insert("x-data-parallel-rank", rank.into());
    }
    let sent = endpoint.post_stream("/v1/completions", &headers, body.to_string().into());
    let answer = soon(sent).await.unwrap();
    assert_eq!(answer.status, 200);
    soon(answer.whole(1 << 20)).await.unwrap();
}

async fn watched(options: VllmOptions, settings: ObserveSettings) -> (VllmDouble, Endpoint, Watched) {
    let double = VllmDouble::start(options).await;
    let endpoint = endpoint(&double.url(), None);
    let attached = soon(attach(&endpoint, &spec())).await.unwrap();
    let watched = Watched::begin(&endpoint, &attached, settings);
    (double, endpoint, watched)
}

fn silent(watched: &Watched) -> bool {
    let mut last = watched.notices.iter().rev();
    last.find_map(|notice| match notice {
        Notice::Silent { .. } => Some(true),
        Notice::Heard => Some(false),
        _ => None,
    })
    .unwrap_or(false)
}

#[tokio::test]
async fn load_is_known_by_rank() {
    let options = VllmOptions { dp: 2, step: Duration::from_millis(10), ..VllmOptions::default() };
    let (_double, endpoint, mut watched) = watched(options, quick()).await;
    watched.until("both ranks are there", |it| it.loads.len() == 2).await;
    assert_eq!(watched.loads[&1].blocks_total, 513);
    let long = prompt("busy", 4);
    let running = compute(&endpoint, &long, Some(1), 200);
    let showing = watched.until("one runs", |it| it.loads[&1].running == 1);
    tokio::join!(running, showing);
    watched.until("it is counted", |it| it.loads[&1].running == 0 && it.loads[&1].prompt_tokens >= 64).await;
    assert_eq!(watched.loads[&0].running, 0);
}

#[tokio::test]
async fn decode_steps_are_learned() {
    let options = VllmOptions { step: Duration::from_millis(5), ..VllmOptions::default() };
    let (_double, endpoint, mut watched) = watched(options, quick()).await;
    let prompt = prompt("steps", 2);
    let running = compute(&endpoint, &prompt, None, 400);
    let learning = watched.until("steps are reported", |it| it.steps > 0);
    tokio::join!(running, learning);
}

#[tokio::test]
async fn what_is_cached_is_known_block_by_block() {
    let (_double, endpoint, mut watched) =
        watched(VllmOptions { dp: 2, ..VllmOptions::default() }, quick()).await;
    let (one, two) = (prompt("one", 3), prompt("two", 5));
    compute(&endpoint, &one, Some(0), 1).await;
    compute(&endpoint, &two, Some(1), 1).await;
    watched.until("both are cached", |it| it.holds(0, "double", &one) && it.holds(1, "double", &two)).await;
    assert!(!watched.holds(1, "double", &one) && !watched.holds(0, "double", &two));
    let figures = watched.observer.events();
    assert!(figures.iter().all(|(_, figures)| figures.batches > 0 && figures.cache.blocks_device > 0));

    watched.blocks.clear();
    watched.observer.request_snapshot(1);
    watched.until("a snapshot came", |it| it.holds(1, "double", &two)).await;
    let three = prompt("three", 2);
    compute(&endpoint, &three, Some(1), 1).await;
    watched.until("and the numbers go on", |it| it.holds(1, "double", &three)).await;
}

/// A prompt whose first block another tenant has as well shares nothing with it.
#[tokio::test]
async fn salts_keep_tenants_apart() {
    let (_double, endpoint, mut watched) = watched(VllmOptions::default(), quick()).await;
    let prompt = prompt("secret", 3);
    complete(&endpoint, &json!({"prompt": prompt, "max_tokens": 1, "cache_salt": "tenant-7"}), None).await;
    watched
        .until("it is cached under its salt", |it| {
            let hasher = hasher();
            let chain = hasher.chain(hasher.root("double", "tenant-7"), &prompt);
            it.blocks.get(&0).is_some_and(|blocks| chain.iter().all(|block| blocks.contains(block)))
        })
        .await;
    assert!(!watched.holds(0, "double", &prompt));
}

#[tokio::test]
async fn who_comes_late_knows_what_was_cached_before() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let endpoint = endpoint(&double.url(), None);
    let early = prompt("early", 4);
    compute(&endpoint, &early, None, 1).await;
    let attached = soon(attach(&endpoint, &spec())).await.unwrap();
    let mut watched = Watched::begin(&endpoint, &attached, quick());
    watched.until("the replay brought it", |it| it.holds(0, "double", &early)).await;
    assert!(!watched.notices.iter().any(|notice| matches!(notice, Notice::Note(_))), "{:?}", watched.notices);
}

#[tokio::test]
async fn a_replay_that_begins_too_late_is_said() {
    let events = KvEventOptions { buffer_steps: 2, ..KvEventOptions::default() };
    let double = VllmDouble::start(VllmOptions { kv_events: Some(events), ..VllmOptions::default() }).await;
    let endpoint = endpoint(&double.url(), None);
    for name in ["first", "second", "third", "fourth"] {
        compute(&endpoint, &prompt(name, 3), None, 1).await;
    }
    let attached = soon(attach(&endpoint, &spec())).await.unwrap();
    let mut watched = Watched::begin(&endpoint, &attached, quick());
    watched.until("the loss is said", |it| it.has_note("of rank 0 are lost")).await;
    let later = prompt("later", 3);
    compute(&endpoint, &later, None, 1).await;
    watched.until("what is new is known", |it| it.holds(0, "double", &later)).await;
    assert!(!watched.holds(0, "double", &prompt("first", 3)), "it fell out of the ring");
}

#[tokio::test]
async fn a_gap_is_healed_by_replay() {
    let (double, endpoint, mut watched) = watched(VllmOptions::default(), quick()).await;
    let (one, lost, next) = (prompt("one", 2), prompt("lost", 3), prompt("next", 2));
    compute(&endpoint, &one, None, 1).await;
    watched.until("it is followed", |it| it.holds(0, "double", &one)).await;
    double.control().lose_events(1);
    compute(&endpoint, &lost, None, 1).await;
    compute(&endpoint, &next, None, 1).await;
    watched.until("all are known", |it| it.holds(0, "double", &lost) && it.holds(0, "double", &next)).await;
    assert!(watched.holds(0, "double", &one) && !watched.has_note("lost"), "{:?}", watched.notices);
}

#[tokio::test]
async fn without_a_replay_a_gap_empties_the_rank() {
    let events = KvEventOptions { replay: false, ..KvEventOptions::default() };
    let options = VllmOptions { kv_events: Some(events), ..VllmOptions::default() };
    let double = VllmDouble::start(options).await;
    let endpoint = endpoint(&double.url(), None);
    let attached = soon(attach(&endpoint, &spec())).await.unwrap();
    let mut watched = Watched::begin(&endpoint, &attached, quick());
    let (one, next) = (prompt("one", 2), prompt("next", 2));
    // A publisher drops what it sends before it has heard of a subscriber.
    let mut tries = 0;
    while !watched.holds(0, "double", &one) {
        tries += 1;
        compute(&endpoint, &prompt(&format!("try {tries}"), 2), None, 1).await;
        compute(&endpoint, &one, None, 1).await;
        let before = watched.observer.events()[0].1.batches;
        if tries > 1 && before > 0 {
            break;
        }
    }
    double.control().lose_events(1);
    compute(&endpoint, &prompt("lost", 3), None, 1).await;
    compute(&endpoint, &next, None, 1).await;
    watched
        .until("the loss is said", |it| it.has_note("of rank 0 are lost") && it.holds(0, "double", &next))
        .await;
    assert!(!watched.holds(0, "double", &one), "it counts as gone");
}

#[tokio::test]
async fn garbage_on_the_event_socket_is_borne() {
    let (double, endpoint, mut watched) = watched(VllmOptions::default(), quick()).await;
    let one = prompt("one", 2);
    compute(&endpoint, &one, None, 1).await;
    watched.until("it is followed", |it| it.holds(0, "double", &one)).await;
    for garbage in EventGarbage::ALL {
        double.control().send_garbage(0, garbage).await;
    }
    watched.until("it is said", |it| it.has_note("KV events of rank 0 cannot be right")).await;
    let next = prompt("next", 2);
    compute(&endpoint, &next, None, 1).await;
    watched.until("and the stream goes on", |it| it.holds(0, "double", &next)).await;
    assert!(watched.holds(0, "double", &one), "nothing was lost");

    for _ in 0..3 {
        for garbage in EventGarbage::ALL {
            double.control().send_garbage(0, garbage).await;
        }
    }
    let blind = |notice: &Notice| matches!(notice, Notice::CacheSight(CacheSight::Approximate { .. }));
    watched.until("it is no longer listened to", |it| it.notices.iter().any(blind)).await;
    watched.until("and the rank counts as empty", |it| it.blocks[&0].is_empty()).await;
    watched.observer.request_snapshot(0);
    watched.until("snapshots are answered still", |it| it.blocks[&0].is_empty()).await;
    assert!(watched.died.is_none());
}

#[tokio::test]
async fn lies_about_blocks_fence_an_engine() {
    let (double, endpoint, mut watched) = watched(VllmOptions::default(), quick()).await;
    double.control().inject(Fault::WrongEventBlockSize { tokens: 32 });
    compute(&endpoint, &prompt("liar", 4), None, 1).await;
    let fenced = |it: &Watched| {
        it.notices.iter().any(|notice| {
            matches!(notice, Notice::Fenced { why } if why.contains("blocks of 32 tokens, but it was declared with 16"))
        })
    };
    watched.until("it is fenced", fenced).await;
}

#[tokio::test]
async fn parents_that_never_were_are_not_believed() {
    let (double, endpoint, mut watched) = watched(VllmOptions::default(), quick()).await;
    let one = prompt("one", 2);
    compute(&endpoint, &one, None, 1).await;
    watched.until("it is followed", |it| it.holds(0, "double", &one)).await;
    double.control().inject(Fault::UnknownParents);
    for number in 0..20 {
        compute(&endpoint, &prompt(&format!("orphan {number}"), 6), None, 1).await;
    }
    let blind = |it: &Watched| {
        it.notices.iter().any(|notice| {
            matches!(notice, Notice::CacheSight(CacheSight::Approximate { why }) if why.contains("never announced"))
        })
    };
    watched.until("it is no longer listened to", blind).await;
    watched.until("and the rank counts as empty", |it| it.blocks[&0].is_empty()).await;
}

#[tokio::test]
async fn a_death_is_known_at_once() {
    let settings = ObserveSettings { poll_every: Duration::from_secs(60), ..quick() };
    let (double, _endpoint, mut watched) = watched(VllmOptions::default(), settings).await;
    watched.until("it is looked at", |it| !it.loads.is_empty()).await;
    double.control().die().await;
    // As a leg does that finds its connection broken.
    watched.trouble.notify_one();
    let began = Instant::now();
    watched.until("its death is known", |it| it.died.is_some()).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(watched.died.as_ref().unwrap().contains("refuses the connection"), "{:?}", watched.died);
}

#[tokio::test]
async fn a_dead_engine_core_is_a_death() {
    let options = VllmOptions { death_linger: Duration::from_secs(60), ..VllmOptions::default() };
    let (double, _endpoint, mut watched) = watched(options, quick()).await;
    watched.until("it is looked at", |it| !it.loads.is_empty()).await;
    double.control().kill_engine_core();
    watched.until("its death is known", |it| it.died.is_some()).await;
    assert!(watched.died.as_ref().unwrap().contains("503"), "{:?}", watched.died);
}

#[tokio::test]
async fn silence_is_borne_for_a_while() {
    let (double, _endpoint, mut watched) = watched(VllmOptions::default(), quick()).await;
    watched.until("it is looked at", |it| !it.loads.is_empty()).await;
    double.control().inject(Fault::Hang);
    watched.until("it is silent", silent).await;
    assert!(watched.died.is_none());
    double.control().heal();
    watched.until("it is heard again", |it| !silent(it)).await;
}

#[tokio::test]
async fn silence_ends_with_the_lease() {
    let settings = ObserveSettings { lease: Duration::from_millis(1200), ..quick() };
    let (double, _endpoint, mut watched) = watched(VllmOptions::default(), settings).await;
    watched.until("it is looked at", |it| !it.loads.is_empty()).await;
    double.control().inject(Fault::Hang);
    watched.until("its lease lapses", |it| it.died.is_some()).await;
    assert!(watched.notices.iter().any(|notice| matches!(notice, Notice::Silent { .. })));
    assert!(watched.died.as_ref().unwrap().starts_with("silent for "), "{:?}", watched.died);
}

#[tokio::test]
async fn a_restart_between_two_looks_is_a_death() {
    let settings = ObserveSettings { poll_every: Duration::from_secs(60), ..quick() };
    let (double, endpoint, mut watched) = watched(VllmOptions::default(), settings).await;
    let one = prompt("one", 2);
    compute(&endpoint, &one, None, 1).await;
    watched.until("it is followed", |it| it.holds(0, "double", &one)).await;
    double.control().die().await;
    double.control().restart().await.unwrap();
    watched.trouble.notify_one();
    watched.until("its death is known", |it| it.died.is_some()).await;
    assert!(watched.died.as_ref().unwrap().contains("it restarted"), "{:?}", watched.died);
}

fn context() -> Arc<RemoteContext> {
    let numbers = std::sync::atomic::AtomicU64::new(1);
    Arc::new(RemoteContext {
        client: HttpClient::new(&ClientSettings::default()).unwrap(),
        hasher: hasher(),
        attach: AttachSettings::default(),
        observe: quick(),
        limits: RemoteLimits::default(),
        runtime: tokio::runtime::Handle::current(),
        rooms: Arc::new(move || numbers.fetch_add(1, std::sync::atomic::Ordering::Relaxed)),
        held: Arc::new(HeldKv::default()),
    })
}

#[tokio::test]
async fn a_launcher_finds_life_after_life() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let spec = RemoteSpec { tokenizer: Some(Arc::new(Tokenizer)), ..RemoteSpec::new(double.url()) };
    let launcher = RemoteLauncher::new(spec, context()).unwrap();
    assert_eq!(launcher.name().as_str(), format!("127.0.0.1:{}", double.port()));
    assert_eq!(launcher.kind(), "remote");
    let first = soon(launcher.launch(Incarnation(1))).await.unwrap();
    assert_eq!((launcher.kind(), first.facts().kind), ("vllm", "vllm"));
    assert_eq!(first.facts().incarnation, Incarnation(1));
    double.control().die().await;
    soon(async { while first.reports().next().await.died.is_none() {} }).await;
    let error = soon(launcher.launch(Incarnation(2))).await.err().unwrap();
    assert!(error.to_string().contains("refuses the connection"), "{error}");
    double.control().restart().await.unwrap();
    let second = soon(launcher.launch(Incarnation(3))).await.unwrap();
    assert_eq!(second.facts().incarnation, Incarnation(3));
    assert!(RemoteLauncher::new(RemoteSpec::new("ftp://x"), context()).is_err());
}
