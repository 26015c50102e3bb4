//! Prefill and decode by a pair of vLLM doubles.

use std::time::Duration;

use crate::common::{LONG, get, metric, post, post_with, token_ids};
use forebay_testkit::client::Answer;
use forebay_testkit::{
    ConnectorOptions, KvRole, LoadFailure, TransferMode, VllmDouble, VllmOptions, continuation, tokenizer,
};
use serde_json::{Value, json};

const PROMPT: &str = "Paris is the capital of France, Berlin is the capital of Germany, Madrid of Spain.";
const COUNT: usize = 20;

fn body(max_tokens: usize) -> Value {
    json!({"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "return_token_ids": true})
}

fn with(mut body: Value, params: &Value) -> Value {
    body["kv_transfer_params"] = params.clone();
    body
}

async fn prefill(double: &VllmDouble) -> Value {
    let params = json!({"do_remote_decode": true, "do_remote_prefill": false});
    let answer =
        post_with(&double.url(), "/v1/completions", &[("x-request-id", "pd")], &with(body(1), &params)).await;
    assert_eq!(answer.status, 200);
    answer.json()["kv_transfer_params"].clone()
}

async fn decode(double: &VllmDouble, params: &Value) -> Answer {
    post_with(&double.url(), "/v1/completions", &[("x-request-id", "pd")], &with(body(COUNT), params)).await
}

fn expected() -> Vec<u32> {
    continuation(1, &tokenizer::encode(PROMPT), COUNT)
}

/// A decode server with other connector options.
fn consumer(change: impl FnOnce(&mut ConnectorOptions)) -> VllmOptions {
    let mut connector = ConnectorOptions::new(KvRole::Consumer);
    change(&mut connector);
    VllmOptions { connector: Some(connector), ..VllmOptions::default() }
}

#[tokio::test]
async fn a_pair_gives_the_tokens_of_one_engine_and_the_counters_prove_it() {
    let (p, d) =
        (VllmDouble::start(VllmOptions::prefill()).await, VllmDouble::start(VllmOptions::decode()).await);
    let params = prefill(&p).await;
    assert_eq!(params["remote_block_ids"], json!([[1, 2, 3, 4, 5, 6]]), "block 0 is never used");
    assert_eq!(params["remote_num_tokens"], json!(PROMPT.len()));
    assert!(params["remote_request_id"].as_str().unwrap().starts_with("cmpl-pd-0-"));
    assert_eq!((p.gauges(0).held, p.gauges(0).usage > 0.0), (1, true));
    let answer = decode(&d, &params).await;
    assert_eq!(token_ids(&answer.json()), expected());
    assert_eq!(answer.json()["kv_transfer_params"], Value::Null);
    assert_eq!(
        answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"],
        json!(0),
        "the prefill engine's count"
    );
    let tokens = PROMPT.len() as f64;
    assert_eq!(metric(&d.url(), &["prompt_tokens_by_source_total", "external_kv_transfer"]).await, tokens);
    assert_eq!(metric(&d.url(), &["prompt_tokens_by_source_total", "local_compute"]).await, 0.0);
    assert_eq!(metric(&d.url(), &["vllm:external_prefix_cache_hits_total"]).await, tokens);
    assert_eq!(metric(&d.url(), &["vllm:nixl_xfer_time_seconds_count"]).await, 1.0);
    p.wait_until(LONG, |p| p.gauges(0).held == 0).await;
    assert_eq!(p.gauges(0).usage, 0.0);
    let aggregated = post(&p.url(), "/v1/completions", &body(COUNT)).await;
    assert_eq!(token_ids(&aggregated.json()), expected(), "a producer serves plain requests");
}

#[tokio::test]
async fn only_lacking_blocks_are_read_and_the_others_still_freed() {
    let (p, d) =
        (VllmDouble::start(VllmOptions::prefill()).await, VllmDouble::start(VllmOptions::decode()).await);
    post(&d.url(), "/v1/completions", &body(1)).await;
    let params = prefill(&p).await;
    assert_eq!(token_ids(&decode(&d, &params).await.json()), expected());
    assert_eq!(d.counts(0).external_hits as usize, PROMPT.len() % 16, "all full blocks were cached here");
    p.wait_until(LONG, |p| p.gauges(0).held == 0).await;
}

#[tokio::test]
async fn pulled_blocks_are_cached_and_announced() {
    let (p, d) =
        (VllmDouble::start(VllmOptions::prefill()).await, VllmDouble::start(VllmOptions::decode()).await);
    let params = prefill(&p).await;
    decode(&d, &params).await;
    let replay_at = d.event_endpoints()[0].replay.clone().unwrap();
    let batches = forebay_testkit::subscriber::replay(&replay_at, 0, LONG).await.unwrap();
    assert_eq!(batches[0].events()[0]["block_hashes"].as_array().unwrap().len(), PROMPT.len() / 16);
    let again = post(&d.url(), "/v1/completions", &body(COUNT)).await;
    assert_eq!(token_ids(&again.json()), expected());
    assert!(d.counts(0).prefix_hits > 0);
}

#[tokio::test]
async fn missing_block_ids_kill_the_decode_engine() {
    let d =
        VllmDouble::start(VllmOptions { death_linger: Duration::from_millis(300), ..VllmOptions::decode() })
            .await;
    let killed = decode(&d, &json!({"do_remote_prefill": true})).await;
    assert_eq!((killed.status, &killed.json()["error"]["type"]), (500, &json!("InternalServerError")));
    assert!(killed.text().contains("EngineCore encountered an issue"));
    assert_eq!(post(&d.url(), "/v1/completions", &body(1)).await.status, 500, "later requests as well");
    assert_eq!(get(&d.url(), "/health").await.status, 503);
    let gone = async {
        while tokio::net::TcpStream::connect(("127.0.0.1", d.port())).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, gone).await.expect("then the server closes");
    d.control().restart().await.unwrap();
    assert_eq!(post(&d.url(), "/v1/completions", &body(1)).await.status, 200);
}

#[tokio::test]
async fn a_server_without_a_connector_ignores_the_parameters() {
    let plain = VllmDouble::start(VllmOptions::default()).await;
    let answer = decode(&plain, &json!({"do_remote_prefill": true})).await;
    assert_eq!(token_ids(&answer.json()), expected());
    assert_eq!(prefill(&plain).await, Value::Null);
}

#[tokio::test]
async fn incomplete_parameters_strand_the_request() {
    let (p, d) =
        (VllmDouble::start(VllmOptions::prefill()).await, VllmDouble::start(VllmOptions::decode()).await);
    let mut params = prefill(&p).await;
    params.as_object_mut().unwrap().remove("remote_port");
    tokio::select! {
        _ = decode(&d, &params) => panic!("nobody brings its KV"),
        () = d.wait_until(LONG, |d| d.gauges(0).waiting_for_kv == 1) => {}
    }
    d.wait_until(LONG, |d| d.gauges(0).waiting == 0).await;
    assert_eq!(d.gauges(0).usage, 0.0, "the client's leaving frees it");
}

#[tokio::test]
async fn an_unreachable_side_channel_fails_or_recomputes_by_policy() {
    let p = VllmDouble::start(VllmOptions::prefill()).await;
    let params = prefill(&p).await;
    p.control().die().await;
    let failing = VllmDouble::start(VllmOptions::decode()).await;
    let answer = decode(&failing, &params).await;
    assert_eq!((answer.status, &answer.json()["error"]["message"]), (500, &json!("Internal server error")));
    assert!(failing.alive(), "the engine survives");
    assert_eq!(metric(&failing.url(), &["vllm:nixl_num_failed_transfers_total"]).await, 1.0);
    let mut streamed = with(body(COUNT), &params);
    streamed["stream"] = json!(true);
    let answer = post(&failing.url(), "/v1/completions", &streamed).await;
    assert_eq!((answer.status, answer.events().last().map(String::as_str)), (200, Some("[DONE]")));
    assert!(answer.events()[0].contains("\"code\":500"));
    let recomputing = VllmDouble::start(consumer(|c| c.load_failure = LoadFailure::Recompute)).await;
    assert_eq!(token_ids(&decode(&recomputing, &params).await.json()), expected());
    assert_eq!(recomputing.counts(0).computed as usize, PROMPT.len());
}

#[tokio::test]
async fn a_restarted_or_unlike_prefill_engine_is_refused_by_the_handshake() {
    let (p, d) =
        (VllmDouble::start(VllmOptions::prefill()).await, VllmDouble::start(VllmOptions::decode()).await);
    let params = prefill(&p).await;
    p.control().restart().await.unwrap();
    assert_eq!(decode(&d, &params).await.status, 500, "another engine id behind the port");
    let unlike = VllmDouble::start(consumer(|c| c.cache_dtype = "fp8".into())).await;
    let params = prefill(&p).await;
    assert_eq!(decode(&unlike, &params).await.status, 500);
    assert_eq!(token_ids(&decode(&d, &params).await.json()), expected());
}

#[tokio::test]
async fn unequal_block_sizes_give_garbage_under_status_200() {
    let p = VllmDouble::start(VllmOptions::prefill()).await;
    for block_size in [8, 32] {
        let d = VllmDouble::start(VllmOptions { block_size, blocks: 2049, ..VllmOptions::decode() }).await;
        let answer = decode(&d, &prefill(&p).await).await;
        assert_eq!((answer.status, &answer.json()["choices"][0]["finish_reason"]), (200, &json!("length")));
        assert_ne!(token_ids(&answer.json()), expected(), "block size {block_size}");
    }
}

#[tokio::test]
async fn another_prompts_blocks_give_garbage() {
    let (p, d) =
        (VllmDouble::start(VllmOptions::prefill()).await, VllmDouble::start(VllmOptions::decode()).await);
    let params = prefill(&p).await;
    let other = json!({
        "prompt": PROMPT.replace("Paris", "Athens")[..PROMPT.len()], "max_tokens": COUNT, "temperature": 0,
        "return_token_ids": true, "kv_transfer_params": params,
    });
    let prompt = tokenizer::encode(other["prompt"].as_str().unwrap());
    let answer = post(&d.url(), "/v1/completions", &other).await;
    assert_eq!(answer.status, 200);
    assert_ne!(token_ids(&answer.json()), continuation(1, &prompt, COUNT));
}

#[tokio::test]
async fn fewer_blocks_than_the_prompt_needs_kill_the_decode_engine() {
    let (p, d) =
        (VllmDouble::start(VllmOptions::prefill()).await, VllmDouble::start(VllmOptions::decode()).await);
    let mut params = prefill(&p).await;
    params["remote_block_ids"] = json!([[1, 2]]);
    assert_eq!(decode(&d, &params).await.status, 500);
    assert!(!d.alive());
}

#[tokio::test]
async fn nobody_fetches_and_the_lease_ends() {
    let mut options = VllmOptions::prefill();
    options.connector.as_mut().unwrap().lease = Duration::from_millis(60);
    let p = VllmDouble::start(options).await;
    let params = prefill(&p).await;
    p.wait_until(LONG, |p| p.gauges(0).held == 0).await;
    assert_eq!(metric(&p.url(), &["vllm:nixl_num_kv_expired_reqs_total"]).await, 1.0);
    assert_eq!(p.gauges(0).usage, 0.0);
    // The decode engine is not told: it reads what the blocks hold by now.
    for filler in 0..600 {
        let body = json!({"prompt": format!("{filler:0>60}"), "max_tokens": 1});
        post(&p.url(), "/v1/completions", &body).await;
    }
    let d = VllmDouble::start(VllmOptions::decode()).await;
    let answer = decode(&d, &params).await;
    assert_eq!(answer.status, 200);
    assert_ne!(token_ids(&answer.json()), expected());
    assert_eq!(metric(&p.url(), &["vllm:nixl_num_notifications_after_expiry_total"]).await, 1.0);
}

#[tokio::test]
async fn a_waiting_decode_engine_keeps_the_lease_alive() {
    let mut options = VllmOptions::prefill();
    options.connector.as_mut().unwrap().lease = Duration::from_millis(300);
    let p = VllmDouble::start(options).await;
    let d = VllmDouble::start(consumer(|c| c.lease = Duration::from_millis(300))).await;
    d.control().pause();
    let params = prefill(&p).await;
    let waits = async {
        tokio::time::timeout(Duration::from_millis(900), std::future::pending::<()>()).await.unwrap_err();
        assert_eq!(p.gauges(0).held, 1, "three leases later");
        d.control().resume();
    };
    let (answer, ()) = tokio::join!(decode(&d, &params), waits);
    assert_eq!(token_ids(&answer.json()), expected());
}

#[tokio::test]
async fn a_rejected_decode_request_frees_the_prefill_engines_blocks() {
    let (p, d) =
        (VllmDouble::start(VllmOptions::prefill()).await, VllmDouble::start(VllmOptions::decode()).await);
    let params = prefill(&p).await;
    let mut body = with(body(COUNT), &params);
    body["model"] = json!("other");
    assert_eq!(post(&d.url(), "/v1/completions", &body).await.status, 404);
    p.wait_until(LONG, |p| p.gauges(0).held == 0).await;
    assert_eq!(p.counts(0).leases_expired, 0);
}

#[tokio::test]
async fn a_streamed_prefill_leg_loses_its_parameters_and_keeps_its_blocks() {
    let p = VllmDouble::start(VllmOptions::prefill()).await;
    let mut streamed = with(body(1), &json!({"do_remote_decode": true}));
    streamed["stream"] = json!(true);
    let answer = post(&p.url(), "/v1/completions", &streamed).await;
    assert!(!answer.text().contains("remote_block_ids"));
    assert_eq!(p.gauges(0).held, 1);
}

#[tokio::test]
async fn push_sends_both_legs_at_once() {
    let push = |role| {
        let connector = Some(ConnectorOptions { mode: TransferMode::Push, ..ConnectorOptions::new(role) });
        VllmOptions { connector, ..VllmOptions::default() }
    };
    let (p, d) =
        (VllmDouble::start(push(KvRole::Producer)).await, VllmDouble::start(push(KvRole::Consumer)).await);
    let first = prefill(&p).await;
    assert_eq!(first["transfer_mode"], json!("push"));
    assert_eq!(token_ids(&decode(&d, &first).await.json()), expected(), "in turn");
    p.wait_until(LONG, |p| p.gauges(0).held == 0).await;
    d.control().restart().await.unwrap();
    let side_channel = first["remote_port"].clone();
    let params = json!({
        "do_remote_prefill": true, "remote_engine_id": p.engine_ids()[0], "remote_host": "127.0.0.1",
        "remote_port": side_channel, "tp_size": 1,
    });
    let (answer, _) = tokio::join!(decode(&d, &params), prefill(&p));
    assert_eq!(token_ids(&answer.json()), expected(), "at once");
    let pulling = VllmDouble::start(VllmOptions::decode()).await;
    assert_eq!(decode(&pulling, &first).await.status, 500, "modes must match");
}
