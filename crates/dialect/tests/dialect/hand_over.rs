//! Requests that are split over two engines.

use std::time::Duration;

use forebay_dialect::{ConnectorOptions, EngineModel, EngineOptions, KvRole, LoadFailurePolicy};
use forebay_engines::EngineLimits;
use forebay_types::{Sampling, TokenId};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::{
    Engine, in_process, limits, options, outcomes, prompt, request, sampling, simulated, with, with_role,
};

const TRANSFERRED: &str = "vllm:prompt_tokens_by_source_total{source=\"external_kv_transfer\"}";
const COMPUTED: &str = "vllm:prompt_tokens_by_source_total{source=\"local_compute\"}";

async fn pair(model: EngineModel) -> (Engine, Engine) {
    let prefill = Engine::start(with_role(model.clone(), KvRole::Producer)).await;
    (prefill, Engine::start(with_role(model, KvRole::Consumer)).await)
}

/// What an orchestrator does with a request first: the prefill leg. Gives its answer.
async fn prefill(engine: &Engine, body: &Value) -> Value {
    let leg = with(
        body,
        &json!({
            "max_tokens": 1, "stream": false,
            "kv_transfer_params": {
                "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
                "remote_block_ids": null, "remote_host": null, "remote_port": null,
            },
        }),
    );
    engine.client.post("/v1/completions", &leg).await.good()
}

/// The same, seen to hold its KV: when the engine is idle after that, the KV was freed.
async fn hold(engine: &Engine, body: &Value) -> Value {
    let answer = prefill(engine, body).await;
    engine.until("the KV is held", |metrics| metrics.value("vllm:kv_cache_usage_perc") > 0.0).await;
    answer
}

/// And then.
fn decode_leg(body: &Value, prefilled: &Value) -> Value {
    with(body, &json!({"kv_transfer_params": prefilled["kv_transfer_params"]}))
}

async fn split_equals_aggregated(model: EngineModel) {
    let (prefill_engine, decode_engine) = pair(model.clone()).await;
    let mut sent = 0.0;
    // Whole blocks, one token more, one less, several choices, and a prompt of which nothing is a full block.
    for (seed, temperature, choices, length) in
        [(1, 0.0, 1, 64), (2, 1.0, 1, 65), (3, 0.8, 3, 63), (4, 1.0, 2, 9), (5, 0.0, 1, 2)]
    {
        let (prompt, sampling) = (prompt(seed, length), sampling(temperature, u64::from(seed), 20));
        let expected = in_process(&model, &prompt, sampling.clone(), choices).await;
        let body = request(&prompt, &sampling, choices);
        let prefilled = hold(&prefill_engine, &body).await;
        let params = &prefilled["kv_transfer_params"];
        assert_eq!(
            (&params["remote_num_tokens"], &params["transfer_mode"]),
            (&json!(length), &json!("pull"))
        );
        assert_eq!(params["remote_block_ids"][0].as_array().unwrap().len() as u32, length.div_ceil(16));
        assert_eq!(params["remote_engine_id"], prefill_engine.addresses.engine_id);
        let first: Vec<TokenId> =
            outcomes(&prefilled).into_iter().flat_map(|outcome| outcome.tokens).collect();
        assert_eq!(first, expected.iter().map(|outcome| outcome.tokens[0]).collect::<Vec<_>>());
        let decoded =
            decode_engine.client.post("/v1/completions", &decode_leg(&body, &prefilled)).await.good();
        assert_eq!(outcomes(&decoded), expected, "seed {seed}");
        assert_eq!(decoded["usage"]["prompt_tokens"], length);
        assert!(decoded["kv_transfer_params"].is_null());
        sent += f64::from(length);
        prefill_engine.until_idle().await;
    }
    let metrics = decode_engine.until_idle().await;
    assert_eq!((metrics.value(TRANSFERRED), metrics.value(COMPUTED)), (sent, 0.0));
    assert_eq!(metrics.value("vllm:external_prefix_cache_hits_total"), sent);
    assert_eq!(metrics.value("vllm:nixl_bytes_transferred_count"), 5.0);
    assert!(metrics.value("vllm:nixl_bytes_transferred_sum") > 0.0);
    assert_eq!(metrics.value("vllm:nixl_num_failed_transfers_total"), 0.0);
    assert_eq!(metrics.value("forebay:kv_blocks_unpublished_total"), 0.0);
    let expired = prefill_engine.metrics().await.value("vllm:nixl_num_kv_expired_reqs_total");
    assert_eq!(expired, 0.0, "what was fetched was freed");
    let stage = "vllm:num_requests_kv_fetch_by_stage{stage=\"in_progress\"}";
    assert!(metrics.has(stage) && !prefill_engine.metrics().await.has(stage), "only consumers fetch");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_engine_continues_anothers_prompt() {
    split_equals_aggregated(EngineModel::RandomTiny).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simulated_engine_continues_anothers_prompt() {
    split_equals_aggregated(simulated(0.0)).await;
}

/// A case: a prompt and what an engine alone answers to it.
async fn case(model: &EngineModel, seed: u32, length: u32) -> (Value, Value) {
    let (prompt, sampling): (_, Sampling) = (prompt(seed, length), sampling(0.0, 1, 12));
    let expected = in_process(model, &prompt, sampling.clone(), 1).await;
    (request(&prompt, &sampling, 1), json!(expected[0].tokens))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_split_answer_streams_and_chats_like_any_other() {
    let model = simulated(0.0);
    let (prefill_engine, decode_engine) = pair(model.clone()).await;
    let (body, expected) = case(&model, 1, 50).await;
    let prefilled = hold(&prefill_engine, &body).await;
    let stream = with(
        &decode_leg(&body, &prefilled),
        &json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    let events = decode_engine.client.post("/v1/completions", &stream).await.events();
    let tokens: Vec<&Value> =
        events.iter().filter_map(|event| event["choices"][0]["token_ids"].as_array()).flatten().collect();
    assert_eq!(json!(tokens), expected);
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 12);

    let chat = json!({"messages": [{"role": "user", "content": "hello there, engine"}], "temperature": 0, "max_tokens": 1, "return_token_ids": true, "ignore_eos": true});
    let leg = with(&chat, &json!({"kv_transfer_params": {"do_remote_decode": true}}));
    let prefilled = prefill_engine.client.post("/v1/chat/completions", &leg).await.good();
    assert!(prefilled["kv_transfer_params"]["remote_request_id"].as_str().unwrap().starts_with("chatcmpl-"));
    let chat = with(&chat, &json!({"max_tokens": 9}));
    let decoded =
        decode_engine.client.post("/v1/chat/completions", &decode_leg(&chat, &prefilled)).await.good();
    let alone = prefill_engine.client.post("/v1/chat/completions", &chat).await.good();
    assert_eq!(decoded["choices"], alone["choices"], "a producer takes plain requests too");
    prefill_engine.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_decode_engine_has_already_is_not_fetched() {
    let model = simulated(0.0);
    let (prefill_engine, decode_engine) = pair(model.clone()).await;
    let (body, expected) = case(&model, 1, 70).await;
    // Its first 48 tokens.
    let head = json!({"prompt": prompt(1, 70)[..49], "max_tokens": 1});
    decode_engine.client.post("/v1/completions", &head).await.good();
    let prefilled = hold(&prefill_engine, &body).await;
    let decoded = decode_engine.client.post("/v1/completions", &decode_leg(&body, &prefilled)).await.good();
    assert_eq!(json!(outcomes(&decoded)[0].tokens), expected);
    let metrics = decode_engine.until_idle().await;
    assert_eq!(metrics.value(TRANSFERRED), 22.0);
    assert_eq!(metrics.value("vllm:nixl_bytes_transferred_sum"), 2.0 * 16.0 * 8.0, "two blocks of digests");
    prefill_engine.until_idle().await;
}

/// A port that passes everything on to `to`, but for one bit of the last byte of each block that it sees.
async fn damaging(to: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
            tokio::spawn(async move {
                let ((mut up, mut down), (mut answers, mut questions)) =
                    (client.into_split(), server.into_split());
                let asking = tokio::spawn(async move {
                    let _ended = tokio::io::copy(&mut up, &mut questions).await;
                });
                let mut bytes = vec![0; 4096];
                while let Ok(read @ 1..) = answers.read(&mut bytes).await {
                    // Blocks are longer than greetings' ends and confirmations.
                    if read > 64 && bytes[0] != 0 || read > 100 {
                        bytes[read - 1] ^= 1;
                    }
                    if down.write_all(&bytes[..read]).await.is_err() {
                        break;
                    }
                }
                asking.abort();
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_kv_is_never_computed_on() {
    let model = simulated(0.0);
    let (prefill_engine, decode_engine) = pair(model.clone()).await;
    let (body, expected) = case(&model, 2, 60).await;
    let mut prefilled = prefill(&prefill_engine, &body).await;
    let port = prefilled["kv_transfer_params"]["remote_port"].as_u64().unwrap() as u16;
    prefilled["kv_transfer_params"]["remote_port"] = json!(damaging(port).await);
    let decoded = decode_engine.client.post("/v1/completions", &decode_leg(&body, &prefilled)).await.good();
    assert_eq!(json!(outcomes(&decoded)[0].tokens), expected, "computed again");
    let metrics = decode_engine.until_idle().await;
    assert_eq!((metrics.value(TRANSFERRED), metrics.value(COMPUTED)), (0.0, 60.0));
    assert_eq!(
        metrics.value("forebay:failed_transfers_by_reason_total{reason=\"damaged\"}"),
        1.0,
        "{}",
        metrics.text
    );
    assert_eq!(decoded["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_that_cannot_be_is_computed_again_or_fails_as_configured() {
    let model = simulated(0.0);
    let (prefill_engine, lenient) = pair(model.clone()).await;
    let connector = ConnectorOptions {
        load_failure: LoadFailurePolicy::Fail,
        ..ConnectorOptions::loopback(KvRole::Consumer)
    };
    let strict = Engine::start(EngineOptions { connector: Some(connector), ..options(model.clone()) }).await;
    let (body, expected) = case(&model, 3, 40).await;
    let good = prefill(&prefill_engine, &body).await;
    let (_, foreign) =
        (0, prefill(&prefill_engine, &request(&prompt(9, 40), &sampling(0.0, 1, 12), 1)).await);
    let with_param = |key: &str, value: Value| {
        let mut changed = good.clone();
        changed["kv_transfer_params"][key] = value;
        changed
    };
    let mut failures = 0.0;
    for (prefilled, reason) in [
        (with_param("remote_port", json!(1)), "unreachable"),
        (with_param("remote_engine_id", json!("another-life")), "not_held"),
        (with_param("remote_request_id", json!("cmpl-guessed")), "not_held"),
        (foreign, "other_prompt"),
    ] {
        let leg = decode_leg(&body, &prefilled);
        let refused = strict.client.post("/v1/completions", &leg).await;
        assert_eq!(refused.status, 500, "{reason}: {}", refused.body);
        assert_eq!(refused.json()["error"]["type"], "InternalServerError");
        let salted = with(&leg, &json!({"cache_salt": reason})); // each computed from nothing
        let _ = lenient.client.post("/v1/completions", &salted).await.good();
        let decoded = lenient.client.post("/v1/completions", &leg).await.good();
        assert_eq!(json!(outcomes(&decoded)[0].tokens), expected, "{reason}");
        failures += 1.0;
        let metrics = strict.until_idle().await;
        assert_eq!(metrics.value("vllm:nixl_num_failed_transfers_total"), failures);
        assert!(
            metrics.value(&format!("forebay:failed_transfers_by_reason_total{{reason=\"{reason}\"}}")) >= 1.0
        );
    }
    assert_eq!(lenient.until_idle().await.value(TRANSFERRED), 0.0);
    // The right parameters still serve.
    let decoded = strict.client.post("/v1/completions", &decode_leg(&body, &good)).await.good();
    assert_eq!(json!(outcomes(&decoded)[0].tokens), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_of_other_block_sizes_do_not_read_each_other() {
    let model = simulated(0.0);
    let prefill_engine = Engine::start(with_role(model.clone(), KvRole::Producer)).await;
    let limits = EngineLimits { block_size_tokens: 32, ..limits() };
    let other = Engine::start(EngineOptions { limits, ..with_role(model.clone(), KvRole::Consumer) }).await;
    let (body, _) = case(&model, 4, 80).await;
    // Digests are drawn from by block, so an engine of another block size has other tokens: its own.
    let alone = outcomes(
        &other.client.post("/v1/completions", &with(&body, &json!({"cache_salt": "x"}))).await.good(),
    );
    let prefilled = hold(&prefill_engine, &body).await;
    let decoded = other.client.post("/v1/completions", &decode_leg(&body, &prefilled)).await.good();
    assert_eq!(outcomes(&decoded), alone);
    let metrics = other.metrics().await;
    assert_eq!(metrics.value("forebay:failed_transfers_by_reason_total{reason=\"other_shape\"}"), 1.0);
    prefill_engine.until_idle().await; // it was told to free, though nothing was read
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_that_nobody_fetches_is_freed_at_the_end_of_its_lease() {
    let model = simulated(0.0);
    let limits = EngineLimits { kv_lease: Duration::from_millis(200), ..limits() };
    let options = EngineOptions { limits, ..with_role(model.clone(), KvRole::Producer) };
    let prefill_engine = Engine::start(options).await;
    let decode_engine = Engine::start(with_role(model.clone(), KvRole::Consumer)).await;
    let (body, expected) = case(&model, 5, 50).await;
    let prefilled = prefill(&prefill_engine, &body).await;
    let expired = "vllm:nixl_num_kv_expired_reqs_total";
    prefill_engine.until("the lease ends", |metrics| metrics.value(expired) == 1.0).await;
    prefill_engine.until_idle().await;
    let decoded = decode_engine.client.post("/v1/completions", &decode_leg(&body, &prefilled)).await.good();
    assert_eq!(json!(outcomes(&decoded)[0].tokens), expected, "computed again");
    let failed =
        decode_engine.metrics().await.value("forebay:failed_transfers_by_reason_total{reason=\"not_held\"}");
    assert_eq!(failed, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_leg_that_ends_early_frees_the_prefill_engine() {
    let model = simulated(0.0);
    let (prefill_engine, _) = pair(model.clone()).await;
    // So full that a decode leg waits before it fetches anything.
    let limits = EngineLimits { sequences_max: 1, ..limits() };
    let full = Engine::start(EngineOptions { limits, ..with_role(simulated(0.5), KvRole::Consumer) }).await;
    let endless = json!({"prompt": prompt(8, 30), "max_tokens": 2000, "ignore_eos": true, "stream": true});
    let _running = full.client.stream("/v1/completions", &endless).await;
    let (body, _) = case(&model, 6, 50).await;
    let prefilled = hold(&prefill_engine, &body).await;
    let (client, leg) = (full.client.clone(), decode_leg(&body, &prefilled));
    let waiting = tokio::spawn(async move { client.post("/v1/completions", &leg).await });
    full.until("it waits", |metrics| metrics.value("vllm:num_requests_waiting") == 1.0).await;
    waiting.abort();
    prefill_engine.until_idle().await;
    assert_eq!(prefill_engine.metrics().await.value("vllm:nixl_num_kv_expired_reqs_total"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_leg_whose_client_left_holds_nothing() {
    let (prefill_engine, _) = pair(simulated(0.0)).await;
    let slow = Engine::start(with_role(simulated(0.05), KvRole::Producer)).await;
    let leg =
        json!({"prompt": prompt(1, 2000), "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": true}});
    let client = slow.client.clone();
    let asked = tokio::spawn(async move { client.post("/v1/completions", &leg).await });
    slow.until("it runs", |metrics| metrics.value("vllm:num_requests_running") == 1.0).await;
    asked.abort();
    slow.until_idle().await;
    drop(prefill_engine);
}

#[tokio::test(flavor = "multi_thread")]
async fn hand_overs_that_vllm_would_die_of_are_refused() {
    let (prefill_engine, decode_engine) = pair(simulated(0.0)).await;
    let (body, expected) = case(&simulated(0.0), 7, 40).await;
    let prefilled = prefill(&prefill_engine, &body).await;
    for key in ["remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port"] {
        let mut incomplete = prefilled.clone();
        incomplete["kv_transfer_params"].as_object_mut().unwrap().remove(key);
        let refused = decode_engine.client.post("/v1/completions", &decode_leg(&body, &incomplete)).await;
        assert_eq!(refused.status, 400);
        assert!(refused.body.contains(key), "{}", refused.body);
    }
    let decoded = decode_engine.client.post("/v1/completions", &decode_leg(&body, &prefilled)).await.good();
    assert_eq!(json!(outcomes(&decoded)[0].tokens), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_that_no_hand_over_fits_are_computed_where_they_land() {
    let model = simulated(0.0);
    let (prefill_engine, decode_engine) = pair(model.clone()).await;
    // One token; and a prompt whose last token would end the answer.
    let ending = [prompt(1, 20), vec![u32::from(b'!')]].concat();
    for (prompt, stop) in [(prompt(1, 1), json!([])), (ending, json!([u32::from(b'!')]))] {
        let body = json!({"prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": true, "stop_token_ids": stop});
        let prefilled = hold(&prefill_engine, &body).await;
        let decoded =
            decode_engine.client.post("/v1/completions", &decode_leg(&body, &prefilled)).await.good();
        let alone = prefill_engine.client.post("/v1/completions", &body).await.good();
        assert_eq!(outcomes(&decoded), outcomes(&alone));
        prefill_engine.until_idle().await;
    }
    assert_eq!(decode_engine.metrics().await.value(TRANSFERRED), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_connector_the_parameters_mean_nothing() {
    let engine = Engine::start(EngineOptions { connector: None, ..options(simulated(0.0)) }).await;
    let (body, _) = case(&simulated(0.0), 8, 40).await;
    assert!(prefill(&engine, &body).await["kv_transfer_params"].is_null());
    assert!(!engine.metrics().await.has("vllm:nixl_num_failed_transfers_total"));
    engine.until_idle().await;
}
