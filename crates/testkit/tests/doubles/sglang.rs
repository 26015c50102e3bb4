//! What an SGLang double answers, publishes and hands over.

use std::time::Duration;

use forebay_testkit::subscriber::{Subscriber, replay};
use forebay_testkit::{
    SglangDouble, SglangEventOptions, SglangMode, SglangOptions, Token, client, continuation, tokenizer,
};
use http::Method;
use serde_json::{Value, json};

use crate::common::{LONG, get, metric, post, post_with};

const PROMPT: &str = "Paris is the capital of France, Berlin is the capital of Germany.";
const COUNT: usize = 20;

fn expected() -> Vec<Token> {
    continuation(1, &tokenizer::encode(PROMPT), COUNT)
}

fn body() -> Value {
    json!({
        "input_ids": tokenizer::encode(PROMPT),
        "sampling_params": {"max_new_tokens": COUNT, "temperature": 0, "ignore_eos": true},
    })
}

fn in_room(room: u64, prefill: &SglangDouble) -> Value {
    let mut body = body();
    body["bootstrap_host"] = json!("127.0.0.1");
    body["bootstrap_port"] = json!(prefill.bootstrap_port());
    body["bootstrap_room"] = json!(room);
    body
}

fn ids(answer: &Value) -> Vec<Token> {
    serde_json::from_value(answer["output_ids"].clone()).unwrap()
}

#[tokio::test]
async fn generate_gives_ids_text_and_meta_info() {
    let double = SglangDouble::start(SglangOptions::default()).await;
    let answer = post(&double.url(), "/generate", &body()).await.json();
    assert_eq!(ids(&answer), expected());
    assert_eq!(answer["text"], json!(tokenizer::decode(&expected(), true)));
    let meta = &answer["meta_info"];
    assert_eq!(meta["finish_reason"], json!({"type": "length", "length": COUNT}));
    assert_eq!((&meta["prompt_tokens"], &meta["completion_tokens"]), (&json!(PROMPT.len()), &json!(COUNT)));
    let again = post(&double.url(), "/generate", &body()).await.json();
    assert_eq!(again["meta_info"]["cached_tokens"], json!(PROMPT.len() / 16 * 16));
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0});
    let chat = post(&double.url(), "/v1/chat/completions", &chat).await.json();
    assert_eq!(
        (&chat["choices"][0]["finish_reason"], &chat["usage"]["completion_tokens"]),
        (&json!("length"), &json!(5))
    );
}

#[tokio::test]
async fn streams_hold_everything_so_far_unless_told_otherwise() {
    for incremental_streaming in [false, true] {
        let options = SglangOptions { incremental_streaming, ..SglangOptions::default() };
        let double = SglangDouble::start(options).await;
        let mut body = body();
        body["stream"] = json!(true);
        let events = post(&double.url(), "/generate", &body).await.events();
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
        let chunks: Vec<Value> =
            events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        let all: Vec<Token> = if incremental_streaming {
            chunks.iter().flat_map(ids).collect()
        } else {
            assert!(chunks.windows(2).all(|pair| ids(&pair[1]).starts_with(&ids(&pair[0]))));
            ids(chunks.last().unwrap())
        };
        assert_eq!(all, expected(), "incremental: {incremental_streaming}");
    }
}

#[tokio::test]
async fn discovery_tells_where_everything_is() {
    let options = SglangOptions {
        dp: 2,
        load_socket: true,
        model_path: Some("/models/m".into()),
        ..Default::default()
    };
    let double = SglangDouble::start(options).await;
    let info = get(&double.url(), "/server_info").await.json();
    assert_eq!(
        (&info["page_size"], &info["dp_size"], &info["disaggregation_mode"]),
        (&json!(16), &json!(2), &json!("null"))
    );
    let events = &info["kv_events"];
    let port = |name: &str| events[name].as_u64().unwrap();
    assert_eq!(
        double.event_endpoints()[1].events,
        format!("tcp://127.0.0.1:{}", port("endpoint_port_base") + 1)
    );
    assert_eq!(
        double.load_endpoints()[1],
        format!("tcp://127.0.0.1:{}", port("load_endpoint_port_base") + 1)
    );
    assert_eq!((&events["endpoint_host"], &events["block_size"]), (&json!("*"), &json!(16)));
    let model = get(&double.url(), "/model_info").await.json();
    assert_eq!((&model["model_path"], &model["tokenizer_path"]), (&json!("/models/m"), &json!("/models/m")));
    assert_eq!(get(&double.url(), "/v1/models").await.json()["data"][0]["max_model_len"], json!(4096));
    for healthy in ["/health", "/health_generate", "/ready"] {
        assert_eq!(get(&double.url(), healthy).await.status, 200);
    }
}

#[tokio::test]
async fn events_are_pages_with_signed_hashes_told_once() {
    let double = SglangDouble::start(SglangOptions::default()).await;
    for _ in 0..2 {
        post(&double.url(), "/generate", &body()).await;
    }
    let replay_at = double.event_endpoints()[0].replay.clone().unwrap();
    let batches = replay(&replay_at, 0, LONG).await.unwrap();
    let stored: Vec<&Value> = batches.iter().flat_map(|batch| batch.events()).collect();
    assert_eq!(
        stored.len(),
        (PROMPT.len() + COUNT - 1) / 16,
        "each page once, though two requests computed some"
    );
    assert!(stored.iter().all(|event| event["block_hashes"].as_array().unwrap().len() == 1));
    for pair in stored.windows(2) {
        assert_eq!(pair[1]["parent_block_hash"], pair[0]["block_hashes"][0]);
    }
    let hashes = stored.iter().map(|event| event["block_hashes"][0].as_i64());
    assert!(hashes.clone().all(|hash| hash.is_some()), "they fit into 64 signed bits");
    let other = SglangDouble::start(SglangOptions::default()).await;
    post(&other.url(), "/generate", &body()).await;
    assert_eq!(other.cached_hashes(0), double.cached_hashes(0), "the same in every engine");
}

#[tokio::test]
async fn older_releases_replay_without_topic() {
    let kv_events = Some(SglangEventOptions { replay_topic: false, ..Default::default() });
    let double = SglangDouble::start(SglangOptions { kv_events, ..Default::default() }).await;
    post(&double.url(), "/generate", &body()).await;
    let batches = replay(double.event_endpoints()[0].replay.as_ref().unwrap(), 0, LONG).await.unwrap();
    assert_eq!((batches[0].topic.as_ref(), batches[0].sequence), (None, 0));
}

#[tokio::test]
async fn loads_are_told_by_rank_and_published() {
    let double = SglangDouble::start(SglangOptions { dp: 2, load_socket: true, ..Default::default() }).await;
    let mut subscriber = Subscriber::connect(&double.load_endpoints()[1]).await.unwrap();
    let mut pinned = body();
    pinned["routed_dp_rank"] = json!(1);
    pinned["sampling_params"]["max_new_tokens"] = json!(3000);
    let (url, load) = (double.url(), async {
        double.wait_until(LONG, |double| double.gauges(1).running == 1).await;
        let loads = get(&double.url(), "/v1/loads?include=core").await.json()["loads"].clone();
        assert_eq!((&loads[0]["num_running_reqs"], &loads[1]["num_running_reqs"]), (&json!(0), &json!(1)));
        assert!(loads[1].get("queues").is_none());
        let one = get(&double.url(), "/v1/loads?dp_rank=1").await.json()["loads"].clone();
        assert_eq!((one.as_array().unwrap().len(), &one[0]["dp_rank"]), (1, &json!(1)));
        assert_eq!(metric(&double.url(), &["sglang:num_running_reqs", "dp_rank=\"1\""]).await, 1.0);
        let stat = subscriber.next(LONG).await.unwrap();
        assert_eq!((stat.topic.as_deref(), &stat.payload[0]), (Some("load"), &json!("LoadStat")));
        assert_eq!((stat.payload.as_array().unwrap().len(), &stat.payload[5]), (11, &json!(1)));
        let aborted = json!({"abort_all": true});
        assert_eq!(post(&double.url(), "/abort_request", &aborted).await.status, 200);
    });
    let (answer, ()) = tokio::join!(post(&url, "/generate", &pinned), load);
    assert_eq!(answer.json()["meta_info"]["finish_reason"]["type"], json!("abort"));
    assert_eq!(get(&double.url(), "/v1/loads?include=nothing").await.status, 400);
}

#[tokio::test]
async fn what_sglang_refuses_is_refused() {
    let double = SglangDouble::start(SglangOptions { dp: 2, ..Default::default() }).await;
    let check = async |path: &str, body: Value, status: u16, text: &str| {
        let answer = post(&double.url(), path, &body).await;
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        assert!(answer.text().contains(text), "{}", answer.text());
    };
    check("/generate", json!({}), 400, r#"{"error":{"message":"#).await;
    check("/generate", json!({"text": "a", "input_ids": [1]}), 400, "only one").await;
    check("/generate", json!({"text": "a", "routed_dp_rank": 2}), 400, "out of range [0, 2)").await;
    check("/generate", json!({"text": "a".repeat(5000)}), 400, "longer than the model's context").await;
    check("/generate", json!({"text": "a", "sampling_params": {"max_new_tokens": 5000}}), 400, "exceeds")
        .await;
    check("/v1/completions", json!({"prompt": ""}), 400, r#""object":"error""#).await;
    assert_eq!(double.counts(0), Default::default());
    let streamed =
        post(&double.url(), "/generate", &json!({"text": "a", "routed_dp_rank": 2, "stream": true})).await;
    assert_eq!((streamed.status, streamed.events().last().map(String::as_str)), (200, Some("[DONE]")));
    assert!(streamed.events()[0].contains("out of range [0, 2)"));
}

#[tokio::test]
async fn a_pair_meets_in_a_room_and_gives_the_tokens_of_one_engine() {
    let (p, d) = (
        SglangDouble::start(SglangOptions::prefill()).await,
        SglangDouble::start(SglangOptions::decode()).await,
    );
    let request = in_room(u64::MAX / 3, &p);
    let (url_p, url_d) = (p.url(), d.url());
    let (first, answer) =
        tokio::join!(post(&url_p, "/generate", &request), post(&url_d, "/generate", &request));
    assert_eq!(ids(&answer.json()), expected());
    assert_eq!(ids(&first.json()), expected()[..1], "a prefill server's answer is the first token");
    assert_eq!((d.counts(0).computed, d.counts(0).external_hits as usize), (0, PROMPT.len()));
    let mut streamed = in_room(8, &p);
    streamed["stream"] = json!(true);
    let (_, answer) =
        tokio::join!(post(&url_p, "/generate", &streamed), post(&url_d, "/generate", &streamed));
    let last: Value = serde_json::from_str(answer.events().iter().rev().nth(1).unwrap()).unwrap();
    assert_eq!(ids(&last), expected());
    assert_eq!(p.gauges(0).usage, 0.0);
}

#[tokio::test]
async fn the_first_token_is_the_prefill_servers() {
    let (p, d) = (
        SglangDouble::start(SglangOptions::prefill()).await,
        SglangDouble::start(SglangOptions::decode()).await,
    );
    let mut request = in_room(5, &p);
    request["sampling_params"]["temperature"] = json!(1.0);
    let (url_p, url_d) = (p.url(), d.url());
    let (first, answer) =
        tokio::join!(post(&url_p, "/generate", &request), post(&url_d, "/generate", &request));
    assert_eq!(ids(&answer.json())[0], ids(&first.json())[0]);
    request["bootstrap_room"] = json!(6);
    request["sampling_params"]["max_new_tokens"] = json!(1);
    let (first, answer) =
        tokio::join!(post(&url_p, "/generate", &request), post(&url_d, "/generate", &request));
    assert_eq!(ids(&answer.json()), ids(&first.json()), "an answer of one token ends with it");
}

#[tokio::test]
async fn partners_that_never_come_are_not_waited_for_for_ever() {
    let p = SglangDouble::start(SglangOptions {
        bootstrap_timeout: Duration::from_millis(80),
        ..SglangOptions::prefill()
    });
    let d = SglangDouble::start(SglangOptions {
        bootstrap_timeout: Duration::from_millis(80),
        ..SglangOptions::decode()
    });
    let (p, d) = tokio::join!(p, d);
    let alone = post(&d.url(), "/generate", &in_room(1, &p)).await;
    assert_eq!(alone.status, 500);
    assert!(alone.text().contains("Decode transfer failed"), "{}", alone.text());
    let alone = post(&p.url(), "/generate", &in_room(2, &p)).await;
    assert_eq!(alone.status, 500);
    assert!(alone.text().contains("Prefill bootstrap failed"), "{}", alone.text());
    p.control().die().await;
    let mut streamed = in_room(3, &p);
    streamed["stream"] = json!(true);
    let answer = post(&d.url(), "/generate", &streamed).await;
    assert_eq!(answer.status, 200);
    assert!(answer.events()[0].contains("\"abort\"") && answer.events()[1] == "[DONE]");
    assert!(d.alive());
    assert_eq!(d.gauges(0).usage, 0.0);
}

#[tokio::test]
async fn plain_requests_are_refused_or_kill() {
    for mode in [SglangMode::Prefill, SglangMode::Decode] {
        let double = SglangDouble::start(SglangOptions { mode, ..Default::default() }).await;
        let answer = post(&double.url(), "/generate", &body()).await;
        assert_eq!(answer.status, 400, "{mode:?}");
        assert!(answer.text().contains("without bootstrap room id"));
    }
    let p = SglangDouble::start(SglangOptions { dp: 2, ..SglangOptions::prefill() }).await;
    let url = format!("{}/generate", p.url());
    let asked = client::send(Method::POST, &url, &[], &body(), LONG).await;
    assert!(asked.is_err(), "the connection breaks: nobody catches the assertion");
    p.wait_until(LONG, |p| !p.alive()).await;
}

#[tokio::test]
async fn the_fake_host_needs_no_partner() {
    let p = SglangDouble::start(SglangOptions::prefill()).await;
    let mut warm_up = body();
    warm_up["bootstrap_host"] = json!("2.2.2.2");
    warm_up["bootstrap_room"] = json!(0);
    assert_eq!(post(&p.url(), "/generate", &warm_up).await.status, 200);
    let d = SglangDouble::start(SglangOptions::decode()).await;
    let answer = post(&d.url(), "/generate", &warm_up).await;
    assert_eq!(answer.status, 200);
    assert_ne!(ids(&answer.json()), expected(), "nothing was handed over");
}

#[tokio::test]
async fn rooms_choose_the_prefill_rank() {
    let p = SglangDouble::start(SglangOptions { dp: 2, ..SglangOptions::prefill() }).await;
    let d = SglangDouble::start(SglangOptions::decode()).await;
    let (url_p, url_d) = (p.url(), d.url());
    for room in [10, 11] {
        let request = in_room(room, &p);
        let (_, answer) =
            tokio::join!(post(&url_p, "/generate", &request), post(&url_d, "/generate", &request));
        assert_eq!(ids(&answer.json()), expected());
        assert_eq!(p.counts((room % 2) as usize).generated, 1);
    }
    let mut pinned = in_room(12, &p);
    pinned["routed_dp_rank"] = json!(1);
    let mut told = in_room(12, &p);
    told["disagg_prefill_dp_rank"] = json!(1);
    let (_, answer) = tokio::join!(post(&url_p, "/generate", &pinned), post(&url_d, "/generate", &told));
    assert_eq!(ids(&answer.json()), expected(), "told where the prompt is");
    let mut untold = in_room(14, &p);
    let mut pinned = in_room(14, &p);
    pinned["routed_dp_rank"] = json!(1);
    untold["sampling_params"]["max_new_tokens"] = json!(2);
    let (_, answer) = tokio::join!(post(&url_p, "/generate", &pinned), post(&url_d, "/generate", &untold));
    assert_eq!(answer.status, 500, "it waits at rank 0");
}

#[tokio::test]
async fn unequal_page_sizes_kill_the_decode_server() {
    let p = SglangDouble::start(SglangOptions::prefill()).await;
    let d = SglangDouble::start(SglangOptions { page_size: 32, ..SglangOptions::decode() }).await;
    let url = format!("{}/generate", d.url());
    let asked = client::send(Method::POST, &url, &[], &in_room(4, &p), LONG).await;
    assert!(asked.is_err());
    d.wait_until(LONG, |d| !d.alive()).await;
}

#[tokio::test]
async fn headers_override_the_body_if_they_may() {
    for header_overrides in [false, true] {
        let d = SglangDouble::start(SglangOptions { header_overrides, ..SglangOptions::decode() }).await;
        let headers = [("x-override-bootstrap-host", "2.2.2.2"), ("x-override-bootstrap-room", "7")];
        let answer = post_with(&d.url(), "/generate", &headers, &body()).await;
        assert_eq!(answer.status, if header_overrides { 200 } else { 400 });
    }
}

#[tokio::test]
async fn the_bootstrap_server_speaks_sglangs_routes() {
    let p = SglangDouble::start(SglangOptions { dp: 2, ..SglangOptions::prefill() }).await;
    let base = format!("http://127.0.0.1:{}", p.bootstrap_port().unwrap());
    let all = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1";
    let info = get(&base, all).await.json();
    assert_eq!(
        (&info["dp_size"], &info["page_size"], &info["follow_bootstrap_room"]),
        (&json!(2), &json!(16), &json!(true))
    );
    assert_eq!(get(&base, "/route").await.status, 400);
    post(&base, "/register_dp_rank", &json!({"bootstrap_room": 9, "dp_rank": 1})).await;
    let ranks = post(&base, "/query_dp_ranks", &json!({"bootstrap_rooms": [9, 10]})).await.json();
    assert_eq!(ranks, json!({"9": 1}));
    assert_eq!(get(&base, "/health").await.text(), "OK");
}
