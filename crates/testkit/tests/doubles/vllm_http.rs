//! What a vLLM double answers over HTTP.

use crate::common::{LONG, get, metric, post, post_with, token_ids};
use forebay_testkit::{ApiKey, Token, VllmDouble, VllmOptions, VllmVersion, client, continuation, tokenizer};
use http::Method;
use serde_json::{Value, json};

fn scale_out() -> VllmOptions {
    VllmOptions { scale_out: true, ..VllmOptions::default() }
}

#[tokio::test]
async fn models_name_root_length_and_adapters() {
    let options =
        VllmOptions { root: Some("/models/m".into()), adapters: vec!["tuned".into()], ..Default::default() };
    let double = VllmDouble::start(options).await;
    let cards = get(&double.url(), "/v1/models").await.json()["data"].clone();
    assert_eq!((&cards[0]["id"], &cards[0]["root"]), (&json!("double"), &json!("/models/m")));
    assert_eq!((&cards[0]["max_model_len"], &cards[0]["parent"]), (&json!(4096), &Value::Null));
    assert_eq!((&cards[1]["id"], &cards[1]["parent"]), (&json!("tuned"), &json!("double")));
    assert_eq!(get(&double.url(), "/health").await.status, 200);
    assert_eq!(get(&double.url(), "/version").await.json(), json!({"version": "0.32.0"}));
}

#[tokio::test]
async fn all_three_apis_give_the_same_tokens() {
    let double = VllmDouble::start(scale_out()).await;
    let prompt = tokenizer::encode("Once upon a time, in a forebay");
    let expected = continuation(1, &prompt, 24);
    let rest = json!({"max_tokens": 24, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let with = |name: &str, value: Value| {
        let mut body = rest.clone();
        body[name] = value;
        body
    };
    let by_text =
        post(&double.url(), "/v1/completions", &with("prompt", json!("Once upon a time, in a forebay")))
            .await;
    assert_eq!(token_ids(&by_text.json()), expected);
    assert_eq!(by_text.json()["choices"][0]["prompt_token_ids"], json!(prompt));
    assert_eq!(by_text.json()["choices"][0]["text"], json!(tokenizer::decode(&expected, true)));
    let by_ids = post(&double.url(), "/v1/completions", &with("prompt", json!(prompt))).await;
    assert_eq!(token_ids(&by_ids.json()), expected);
    let body = json!({"token_ids": prompt, "sampling_params": {"max_tokens": 24, "temperature": 0, "ignore_eos": true}});
    let generated = post(&double.url(), "/inference/v1/generate", &body).await.json();
    assert_eq!(token_ids(&generated), expected);
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let chat = post(&double.url(), "/v1/chat/completions", &with("messages", messages.clone())).await.json();
    let rendered = tokenizer::encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(chat["prompt_token_ids"], json!(rendered));
    assert_eq!(token_ids(&chat), continuation(1, &rendered, 24));
    let tokenized = post(&double.url(), "/tokenize", &json!({"messages": messages})).await.json();
    assert_eq!(tokenized["tokens"], json!(rendered));
    let back = post(&double.url(), "/detokenize", &json!({"tokens": rendered})).await.json();
    assert_eq!(back["prompt"], json!("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"));
}

#[tokio::test]
async fn whole_answers_have_the_captured_fields() {
    let double = VllmDouble::start(scale_out()).await;
    let captured = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    let body =
        json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "return_token_ids": true});
    let chat = post(&double.url(), "/v1/chat/completions", &body).await;
    let real = captured(include_str!("../../fixtures/vllm/nixl_pd/4_decode_response.json"));
    same_fields(&chat.json(), &real, "chat");
    let body = json!({"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 1}});
    let generated = post(&double.url(), "/inference/v1/generate", &body).await.json();
    let mut real = captured(include_str!("../../fixtures/vllm/nixl_pd/tito_2_prefill_response.json"));
    real["kv_transfer_params"] = Value::Null;
    same_fields(&generated, &real, "generate");
}

/// The same keys, at every depth that both have.
fn same_fields(ours: &Value, real: &Value, at: &str) {
    match (ours, real) {
        (Value::Object(ours), Value::Object(real)) => {
            let names = |map: &serde_json::Map<String, Value>| {
                let mut names: Vec<String> = map.keys().cloned().collect();
                names.sort();
                names
            };
            assert_eq!(names(ours), names(real), "{at}");
            for (name, value) in ours {
                same_fields(value, &real[name], &format!("{at}.{name}"));
            }
        }
        (Value::Array(ours), Value::Array(real)) if !real.is_empty() && !ours.is_empty() => {
            same_fields(&ours[0], &real[0], &format!("{at}[]"));
        }
        _ => {}
    }
}

#[tokio::test]
async fn streams_are_framed_as_captured() {
    let double = VllmDouble::start(scale_out()).await;
    let body = json!({
        "token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 5, "temperature": 0}, "stream": true,
        "output_mode": "text", "stream_options": {"include_usage": true},
    });
    let answer = post(&double.url(), "/inference/v1/generate", &body).await;
    let real = include_str!("../../fixtures/vllm/nixl_pd/tito_4_decode_stream.txt");
    let events = answer.events();
    let real: Vec<&str> = real.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let parse = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    same_fields(&parse(&events[0]), &parse(real[0]), "first");
    let before_last = |list: Vec<&str>, back: usize| parse(list[list.len() - back]);
    let ours: Vec<&str> = events.iter().map(String::as_str).collect();
    same_fields(&before_last(ours.clone(), 3), &before_last(real.clone(), 3), "last token");
    same_fields(&before_last(ours.clone(), 2), &before_last(real.clone(), 2), "usage");
    assert_eq!((ours.last(), real.last()), (Some(&"[DONE]"), Some(&"[DONE]")));
    assert_eq!(answer.headers["content-type"], "text/event-stream; charset=utf-8");
}

#[tokio::test]
async fn streamed_text_and_tokens_add_up_to_the_whole_answer() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let mut body = json!({
            "prompt": "tell", "messages": [{"role": "user", "content": "tell"}], "max_tokens": 200, "temperature": 0,
            "return_token_ids": true,
        });
        let whole = post(&double.url(), path, &body).await.json();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let events: Vec<Value> = post(&double.url(), path, &body)
            .await
            .events()
            .iter()
            .filter(|event| *event != "[DONE]")
            .map(|event| serde_json::from_str(event).unwrap())
            .collect();
        let mut tokens: Vec<Token> = Vec::new();
        let mut text = String::new();
        for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
            text += choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap();
            let ids = choice.get("token_ids").cloned().unwrap_or_default();
            tokens.extend(serde_json::from_value::<Option<Vec<Token>>>(ids).unwrap().unwrap_or_default());
        }
        assert_eq!(tokens, token_ids(&whole), "{path}");
        let choice = &whole["choices"][0];
        assert_eq!(json!(text), *choice.get("text").unwrap_or(&choice["message"]["content"]), "{path}");
        assert!(text.contains('€'), "characters of several tokens occur");
        let usage = &events.last().unwrap()["usage"];
        assert_eq!(usage["completion_tokens"], json!(200));
        assert_eq!(usage["prompt_tokens"], whole["usage"]["prompt_tokens"]);
    }
}

#[tokio::test]
async fn answers_end_where_they_are_told_to() {
    let double = VllmDouble::start(VllmOptions { eos_one_in: 20, ..Default::default() }).await;
    let ask = |extra: Value| {
        let mut body =
            json!({"prompt": "end", "max_tokens": 100, "temperature": 0, "return_token_ids": true});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let url = double.url();
        async move { post(&url, "/v1/completions", &body).await.json()["choices"][0].clone() }
    };
    let ended = ask(json!({})).await;
    assert_eq!((&ended["finish_reason"], &ended["stop_reason"]), (&json!("stop"), &Value::Null));
    let tokens: Vec<Token> = serde_json::from_value(ended["token_ids"].clone()).unwrap();
    assert_eq!(tokens.last(), Some(&tokenizer::IM_END));
    assert_eq!(ended["text"], json!(tokenizer::decode(&tokens, true)), "the end token has no text");
    let ignored = ask(json!({"ignore_eos": true})).await;
    assert_eq!(
        (&ignored["finish_reason"], ignored["token_ids"].as_array().unwrap().len()),
        (&json!("length"), 100)
    );
    let text = ended["text"].as_str().unwrap();
    let stop: String = text.chars().skip(3).take(3).collect();
    let stopped = ask(json!({"stop": stop})).await;
    assert_eq!((&stopped["finish_reason"], &stopped["stop_reason"]), (&json!("stop"), &json!(stop)));
    assert_eq!(stopped["text"], json!(text[..text.find(&stop).unwrap()]));
    let token = tokens[4];
    let stopped = ask(json!({"stop_token_ids": [token]})).await;
    assert_eq!((&stopped["finish_reason"], &stopped["stop_reason"]), (&json!("stop"), &json!(token)));
}

#[tokio::test]
async fn seeds_repeat_and_their_absence_does_not() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let ask = |seed: Option<u64>| {
        let body = json!({"prompt": "x", "max_tokens": 40, "temperature": 0.8, "seed": seed, "return_token_ids": true});
        let url = double.url();
        async move { token_ids(&post(&url, "/v1/completions", &body).await.json()) }
    };
    assert_eq!(ask(Some(7)).await, ask(Some(7)).await);
    assert_ne!(ask(Some(7)).await, ask(Some(8)).await);
    assert_ne!(ask(None).await, ask(None).await);
    let body = json!({"prompt": "x", "max_tokens": 9, "temperature": 1, "seed": 7, "n": 2});
    let choices = post(&double.url(), "/v1/completions", &body).await.json()["choices"].clone();
    assert_ne!(choices[0]["text"], choices[1]["text"]);
}

#[tokio::test]
async fn what_vllm_refuses_is_refused() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let check = async |path: &str, body: Value, status: u16, kind: &str, param: Option<&str>| {
        let answer = post(&double.url(), path, &body).await;
        let error = answer.json()["error"].clone();
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        assert_eq!(
            (&error["type"], &error["param"], &error["code"]),
            (&json!(kind), &json!(param), &json!(status))
        );
    };
    let (c, m) = ("/v1/completions", "/v1/chat/completions");
    check(c, json!({"prompt": "x", "model": "other"}), 404, "NotFoundError", Some("model")).await;
    check(c, json!({"prompt": ""}), 400, "Bad Request", Some("prompt")).await;
    check(c, json!({"prompt": 5}), 400, "Bad Request", Some("body.prompt")).await;
    check(c, json!({"prompt": "x", "max_tokens": "many"}), 400, "Bad Request", Some("body.max_tokens")).await;
    check(c, json!({"prompt": "x", "max_tokens": 0}), 400, "BadRequestError", Some("max_tokens")).await;
    check(c, json!({"prompt": "x", "max_tokens": 5000}), 400, "BadRequestError", Some("max_tokens")).await;
    check(c, json!({"prompt": "x".repeat(5000)}), 400, "BadRequestError", Some("input_tokens")).await;
    check(c, json!({"prompt": [1, 400]}), 400, "BadRequestError", Some("prompt")).await;
    check(c, json!({"prompt": "x", "temperature": -1}), 400, "BadRequestError", Some("temperature")).await;
    check(c, json!({"prompt": "x", "temperature": 0, "n": 2}), 400, "BadRequestError", None).await;
    check(
        c,
        json!({"prompt": "x", "stream_options": {"include_usage": true}}),
        400,
        "Bad Request",
        Some("stream_options"),
    )
    .await;
    check(c, json!({"prompt": "x", "cache_salt": ""}), 400, "Bad Request", Some("body.cache_salt")).await;
    check(
        c,
        json!({"prompt": "x", "kv_transfer_params": "p"}),
        400,
        "Bad Request",
        Some("body.kv_transfer_params"),
    )
    .await;
    check(m, json!({}), 400, "Bad Request", Some("body.messages")).await;
    check(m, json!({"messages": [{"content": "x"}]}), 400, "Bad Request", Some("body.messages.role")).await;
    check(
        m,
        json!({"messages": [{"role": "user", "content": "x"}], "tools": []}),
        400,
        "Bad Request",
        Some("tools"),
    )
    .await;
    check("/inference/v1/generate", json!({"token_ids": [1]}), 403, "PermissionDeniedError", None).await;
    check("/nowhere", json!({}), 404, "Not Found", None).await;
    let answer = get(&double.url(), "/v1/completions").await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (405, &json!(405)));
    assert_eq!(double.counts(0), Default::default(), "nothing of it reached the engine");
}

#[tokio::test]
async fn a_rank_out_of_range_is_told_inside_of_a_stream() {
    let double = VllmDouble::start(VllmOptions { dp: 2, ..Default::default() }).await;
    let mut body = json!({"prompt": "x", "max_tokens": 2});
    let rank = |rank: &'static str| [("x-data-parallel-rank", rank)];
    assert_eq!(post_with(&double.url(), "/v1/completions", &rank("1"), &body).await.status, 200);
    assert_eq!((double.counts(0).generated, double.counts(1).generated), (0, 2));
    let refused = post_with(&double.url(), "/v1/completions", &rank("2"), &body).await;
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["error"]["message"], json!("data_parallel_rank 2 is out of range [0, 2)."));
    body["stream"] = json!(true);
    let streamed = post_with(&double.url(), "/v1/completions", &rank("2"), &body).await;
    assert_eq!(streamed.status, 200);
    assert!(streamed.events()[0].contains("out of range") && streamed.events()[1] == "[DONE]");
}

#[tokio::test]
async fn the_api_key_guards_v1_and_inference_alone() {
    let key = Some(ApiKey("secret".into()));
    let double = VllmDouble::start(VllmOptions { api_key: key, ..Default::default() }).await;
    let refused = get(&double.url(), "/v1/models").await;
    assert_eq!((refused.status, refused.json()), (401, json!({"error": "Unauthorized"})));
    let url = format!("{}/v1/models", double.url());
    let given = [("authorization", "Bearer secret")];
    assert_eq!(client::send(Method::GET, &url, &given, &Value::Null, LONG).await.unwrap().status, 200);
    for open in ["/health", "/metrics", "/kv_event_sources"] {
        assert_eq!(get(&double.url(), open).await.status, 200, "{open}");
    }
    assert!(!format!("{:?}", double.options()).contains("secret"));
}

#[tokio::test]
async fn request_ids_come_back_in_answers() {
    let double = VllmDouble::start(VllmOptions { request_id_headers: true, ..Default::default() }).await;
    let id = [("x-request-id", "req-a")];
    let answer = post_with(&double.url(), "/v1/completions", &id, &json!({"prompt": "x"})).await;
    assert_eq!(
        (answer.json()["id"].as_str(), &answer.headers["x-request-id"]),
        (Some("cmpl-req-a"), &"req-a".parse().unwrap())
    );
    let seen = double.seen();
    assert_eq!(
        (seen[0].path.as_str(), seen[0].headers["x-request-id"].as_str()),
        ("/v1/completions", "req-a")
    );
}

#[tokio::test]
async fn a_client_that_leaves_aborts_its_request() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    for stream in [true, false] {
        let body = json!({"prompt": "x", "max_tokens": 4000, "ignore_eos": true, "stream": stream});
        let url = format!("{}/v1/completions", double.url());
        let asking = client::open(Method::POST, &url, &[], &body);
        if stream {
            let mut open = asking.await.unwrap();
            open.next().await.unwrap();
            drop(open);
        } else {
            tokio::select! {
                _ = asking => panic!("4,000 steps take longer"),
                () = double.wait_until(LONG, |double| double.gauges(0).running == 1) => {}
            }
        }
        double.wait_until(LONG, |double| double.gauges(0).running == 0).await;
        assert_eq!(double.gauges(0).usage, 0.0);
    }
    assert_eq!(double.counts(0).aborted, 2);
    assert_eq!(
        metric(&double.url(), &["vllm:request_success_total", "\"abort\""]).await,
        0.0,
        "vLLM does not count it"
    );
}

#[tokio::test]
async fn requests_are_aborted_by_their_ids() {
    let double = VllmDouble::start(scale_out()).await;
    let body = json!({"token_ids": [1, 2], "sampling_params": {"max_tokens": 4000, "ignore_eos": true}});
    let id = [("x-request-id", "gone")];
    let url = double.url();
    let asking = post_with(&url, "/inference/v1/generate", &id, &body);
    let aborting = async {
        double.wait_until(LONG, |double| double.gauges(0).running == 1).await;
        let ids = json!({"request_ids": ["generate-tokens-gone"]});
        assert_eq!(post(&double.url(), "/inference/v1/abort_requests", &ids).await.status, 200);
    };
    let (answer, ()) = tokio::join!(asking, aborting);
    assert_eq!(answer.json()["choices"][0]["finish_reason"], json!("abort"));
}

#[tokio::test]
async fn metrics_have_the_captured_names_and_labels_and_live_values() {
    let double =
        VllmDouble::start(VllmOptions { dp: 2, block_size: 32, blocks: 129, ..Default::default() }).await;
    let prompt = "y".repeat(100);
    for _ in 0..2 {
        let body = json!({"prompt": prompt, "max_tokens": 4, "temperature": 0});
        post_with(&double.url(), "/v1/completions", &[("x-data-parallel-rank", "1")], &body).await;
    }
    let rank = "engine=\"1\"";
    assert_eq!(metric(&double.url(), &["vllm:prefix_cache_queries_total", rank]).await, 200.0);
    assert_eq!(metric(&double.url(), &["vllm:prefix_cache_hits_total", rank]).await, 96.0);
    assert_eq!(metric(&double.url(), &["prompt_tokens_by_source_total", rank, "local_compute"]).await, 104.0);
    assert_eq!(metric(&double.url(), &["vllm:generation_tokens_total", rank]).await, 8.0);
    assert_eq!(metric(&double.url(), &["vllm:generation_tokens_total", "engine=\"0\""]).await, 0.0);
    assert_eq!(
        metric(&double.url(), &["cache_config_info", ",block_size=\"32\"", "num_gpu_blocks=\"129\""]).await,
        1.0
    );
    let names = |text: &str| -> std::collections::BTreeSet<String> {
        let name = |line: &str| line.split(['{', ' ']).next().unwrap().to_owned();
        text.lines().filter(|line| line.starts_with("vllm:")).map(name).collect()
    };
    let ours = names(&get(&double.url(), "/metrics").await.text());
    assert_eq!(ours, names(include_str!("../../fixtures/vllm/http/metrics.txt")));
}

#[tokio::test]
async fn releases_differ_in_their_routes() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let sources = get(&double.url(), "/kv_event_sources").await.json();
    let fields: Vec<&String> = sources["0"].as_object().unwrap().keys().collect();
    assert_eq!(fields.len(), 8);
    assert!(sources["0"]["endpoint"].as_str().unwrap().starts_with("tcp://*:"));
    let older = VllmDouble::start(VllmOptions { version: VllmVersion::V0_26, ..Default::default() }).await;
    assert_eq!(get(&older.url(), "/kv_event_sources").await.status, 404);
}

#[tokio::test]
async fn every_route_is_one_of_the_captured_ones() {
    let double = VllmDouble::start(scale_out()).await;
    let real: Value = serde_json::from_str(include_str!("../../fixtures/vllm/http/openapi.json")).unwrap();
    for (path, methods) in real["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let url = format!("{}{path}", double.url());
            let method = method.to_uppercase().parse::<Method>().unwrap();
            let body = if method == Method::POST { json!({}) } else { Value::Null };
            let status = client::send(method, &url, &[], &body, LONG).await.unwrap().status;
            assert!(status != 404 && status != 405, "{path}: {status}");
        }
    }
}
