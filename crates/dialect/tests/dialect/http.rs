//! Requests and answers.

use forebay_dialect::{ApiKey, EngineModel, EngineOptions, HttpLimits};
use forebay_text::Tokenizer;
use hyper::Method;
use serde_json::{Value, json};

use crate::support::{
    Engine, Outcome, in_process, options, outcomes, prompt, reason, request, sampling, simulated, token_ids,
    with,
};

/// Answers over HTTP, whole and streamed, against the same engine in this process.
async fn same_tokens(model: EngineModel) {
    let engine = Engine::start(options(model.clone())).await;
    for (seed, temperature, choices, length) in
        [(1, 0.0, 1, 40), (2, 1.0, 1, 17), (3, 0.7, 3, 33), (4, 0.0, 1, 1)]
    {
        let (prompt, sampling) = (prompt(seed, length), sampling(temperature, u64::from(seed), 24));
        let expected = in_process(&model, &prompt, sampling.clone(), choices).await;
        assert!(expected.iter().all(|outcome| outcome.tokens.len() == 24));
        let body = request(&prompt, &sampling, choices);
        let whole = engine.client.post("/v1/completions", &body).await.good();
        assert_eq!(outcomes(&whole), expected, "seed {seed}");
        assert_eq!(whole["usage"]["prompt_tokens"], length);
        assert_eq!(whole["usage"]["completion_tokens"], 24 * choices);
        assert_eq!(token_ids(&whole["choices"][0]["prompt_token_ids"]), prompt);
        let streamed = engine.client.post("/v1/completions", &with(&body, &json!({"stream": true}))).await;
        assert_eq!(collected(&streamed.events(), choices as usize).0, expected, "seed {seed}, streamed");
        // The text is that of the tokens, whichever way it comes.
        for (choice, text) in collected(&streamed.events(), choices as usize).1.into_iter().enumerate() {
            assert_eq!(text, Tokenizer::bytes().decode(&expected[choice].tokens));
            assert_eq!(whole["choices"][choice]["text"], text);
        }
    }
    engine.until_idle().await;
}

/// Choices of a stream: outcomes and texts.
fn collected(events: &[Value], choices: usize) -> (Vec<Outcome>, Vec<String>) {
    let mut outcomes = vec![Outcome { tokens: Vec::new(), reason: "" }; choices];
    let mut texts = vec![String::new(); choices];
    for event in events {
        for choice in event["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            outcomes[index].tokens.extend(token_ids(&choice["token_ids"]));
            let text = choice.get("text").unwrap_or(&choice["delta"]["content"]);
            texts[index].push_str(text.as_str().unwrap());
            if !choice["finish_reason"].is_null() {
                assert_eq!(outcomes[index].reason, "", "a choice finishes once");
                outcomes[index].reason = reason(&choice["finish_reason"]);
            }
        }
    }
    (outcomes, texts)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_engine_answers_as_it_does_in_process() {
    same_tokens(EngineModel::RandomTiny).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simulated_engine_answers_as_it_does_in_process() {
    same_tokens(simulated(0.0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_is_the_template_around_a_completion() {
    let engine = Engine::start(options(simulated(0.0))).await;
    let messages = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo"}]);
    let body = json!({
        "model": "sim", "messages": messages, "max_completion_tokens": 12, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true,
    });
    let whole = engine.client.post("/v1/chat/completions", &body).await.good();
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["role"], &whole["object"]), (&json!("assistant"), &json!("chat.completion")));
    let tokens = token_ids(&whole["choices"][0]["token_ids"]);
    assert_eq!((tokens.len(), &whole["choices"][0]["finish_reason"]), (12, &json!("length")));
    assert_eq!(message["content"], Tokenizer::bytes().decode(&tokens));

    let tokenized = engine.client.post("/tokenize", &json!({"messages": messages})).await.good();
    assert_eq!(tokenized["tokens"], whole["prompt_token_ids"]);
    assert_eq!(tokenized["count"], whole["usage"]["prompt_tokens"]);
    let completion = json!({"prompt": tokenized["tokens"], "max_tokens": 12, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let completion = engine.client.post("/v1/completions", &completion).await.good();
    assert_eq!(token_ids(&completion["choices"][0]["token_ids"]), tokens);

    let stream = with(&body, &json!({"stream": true, "stream_options": {"include_usage": true}}));
    let mut events = engine.client.post("/v1/chat/completions", &stream).await.events();
    let counts = events.pop().unwrap();
    assert_eq!(
        (counts["choices"].as_array().unwrap().len(), &counts["usage"]["completion_tokens"]),
        (0, &json!(12))
    );
    let (opening, rest) = events.split_first().unwrap();
    assert_eq!(opening["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(opening["prompt_token_ids"], tokenized["tokens"]);
    let (streamed, texts) = collected(rest, 1);
    assert_eq!((&streamed[0].tokens, texts[0].as_str()), (&tokens, message["content"].as_str().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn text_ends_at_stop_strings_and_stop_tokens() {
    let engine = Engine::start(options(simulated(0.0))).await;
    let base = json!({"prompt": "once upon a time", "max_tokens": 64, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let free = engine.client.post("/v1/completions", &base).await.good();
    let (text, tokens) =
        (free["choices"][0]["text"].as_str().unwrap(), token_ids(&free["choices"][0]["token_ids"]));
    assert_eq!((text.len(), tokens.len()), (64, 64), "one byte a token");
    // Two characters from the middle, where they come first.
    let needle = &text[20..23];
    let at = text.find(needle).unwrap();
    let stopped =
        engine.client.post("/v1/completions", &with(&base, &json!({"stop": [needle]}))).await.good();
    let choice = &stopped["choices"][0];
    assert_eq!((choice["text"].as_str().unwrap(), &choice["stop_reason"]), (&text[..at], &json!(needle)));
    assert_eq!((&choice["finish_reason"], token_ids(&choice["token_ids"]).len()), (&json!("stop"), at + 3));
    assert_eq!(stopped["usage"]["completion_tokens"], at + 3);

    let token = tokens[30];
    let at = tokens.iter().position(|other| *other == token).unwrap();
    let stopped =
        engine.client.post("/v1/completions", &with(&base, &json!({"stop_token_ids": [token]}))).await.good();
    let choice = &stopped["choices"][0];
    assert_eq!((choice["text"].as_str().unwrap(), &choice["stop_reason"]), (&text[..at], &json!(token)));
    assert_eq!(token_ids(&choice["token_ids"]), tokens[..=at]);
    let metrics = engine.until_idle().await;
    assert_eq!(metrics.value("vllm:request_success_total{finished_reason=\"stop\"}"), 2.0);
    assert_eq!(metrics.value("vllm:request_success_total{finished_reason=\"length\"}"), 1.0);
    assert_eq!(metrics.value("vllm:request_success_total{finished_reason=\"abort\"}"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_are_answered_in_order() {
    let engine = Engine::start(options(simulated(0.0))).await;
    let ask = |prompts: Value| json!({"prompt": prompts, "n": 2, "seed": 3, "max_tokens": 5, "ignore_eos": true, "return_token_ids": true});
    let both = engine.client.post("/v1/completions", &ask(json!([prompt(1, 9), prompt(2, 30)]))).await.good();
    let first = engine.client.post("/v1/completions", &ask(json!(prompt(1, 9)))).await.good();
    let second = engine.client.post("/v1/completions", &ask(json!(prompt(2, 30)))).await.good();
    assert_eq!(outcomes(&both), [outcomes(&first), outcomes(&second)].concat());
    assert_eq!(both["usage"]["prompt_tokens"], 39);
    assert_eq!(token_ids(&both["choices"][2]["prompt_token_ids"]), prompt(2, 30));
    assert_eq!(both["choices"][3]["index"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_is_found_again_under_its_own_salt_alone() {
    let engine = Engine::start(options(simulated(0.0))).await;
    let ask =
        |salt: &str| json!({"prompt": prompt(1, 40), "max_tokens": 2, "cache_salt": salt, "temperature": 0});
    let mut cached = Vec::new();
    for salt in ["", "", "tenant-7", "tenant-7", "tenant-8"] {
        let answer = engine.client.post("/v1/completions", &ask(salt)).await.good();
        cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap());
    }
    assert_eq!(cached, [0, 32, 0, 32, 0]);
    let metrics = engine.metrics().await;
    assert_eq!(metrics.value("vllm:prompt_tokens_total"), 200.0);
    assert_eq!(metrics.value("vllm:prompt_tokens_by_source_total{source=\"local_cache_hit\"}"), 64.0);
    assert_eq!(metrics.value("vllm:prompt_tokens_by_source_total{source=\"local_compute\"}"), 136.0);
    assert_eq!(metrics.value("vllm:prefix_cache_hits_total"), 64.0);
    assert_eq!(metrics.value("vllm:generation_tokens_total"), 10.0);
    assert_eq!(metrics.value("vllm:inter_token_latency_seconds_count"), 5.0);
    assert_eq!(metrics.value("vllm:request_prefill_time_seconds_count"), 5.0);
    assert!(metrics.has("process_start_time_seconds"));
    let config = metrics.text.lines().find(|line| line.starts_with("vllm:cache_config_info{")).unwrap();
    assert!(config.contains("block_size=\"16\"") && config.contains("num_gpu_blocks=\"256\""), "{config}");
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_come_where_they_are_asked_for() {
    let engine = Engine::start(options(EngineModel::RandomTiny)).await;
    let body = json!({"prompt": prompt(1, 20), "max_tokens": 4, "temperature": 0, "ignore_eos": true, "logprobs": 2, "return_token_ids": true});
    let answer = engine.client.post("/v1/completions", &body).await.good();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 4);
    for (chosen, top) in logprobs["token_logprobs"]
        .as_array()
        .unwrap()
        .iter()
        .zip(logprobs["top_logprobs"].as_array().unwrap())
    {
        let best =
            top.as_object().unwrap().values().map(|value| value.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert!(chosen.as_f64().unwrap() <= 0.0 && (chosen.as_f64().unwrap() - best).abs() < 1e-9);
    }
    let chat = json!({
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": true, "top_logprobs": 1,
        "ignore_eos": true, "temperature": 0,
    });
    let answer = engine.client.post("/v1/chat/completions", &chat).await.good();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(
        content.len() == 3
            && content.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_small_routes_say_what_this_is() {
    let engine = Engine::start(options(simulated(0.0))).await;
    for path in ["/health", "/ping"] {
        let answer = engine.client.get(path).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    }
    let version = engine.client.get("/version").await.good();
    assert!(version["version"].as_str().unwrap().starts_with("0.32.0"));
    assert!(version["server"].as_str().unwrap().starts_with("forebay-dialect"), "it is no vLLM, and says so");
    let models = engine.client.get("/v1/models").await.good();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("sim"), &json!(4096))
    );
    assert_eq!(engine.client.get("/load").await.good(), json!({"server_load": 0}));
    let text = "grüße <|im_end|>";
    let tokens =
        engine.client.post("/tokenize", &json!({"prompt": text, "return_token_strs": true})).await.good();
    assert_eq!((tokens["count"].as_u64(), tokens["token_strs"].as_array().unwrap().len()), (Some(9), 9));
    let back = engine.client.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await.good();
    assert_eq!(back["prompt"], "grüße ", "special tokens have no text");
    let sources = engine.client.get("/kv_event_sources").await.good();
    let port = engine.addresses.kv_events_port.unwrap();
    assert_eq!(sources["0"]["endpoint"], format!("tcp://*:{port}"));
    assert_eq!(
        (engine.client.get("/nothing").await.status, engine.client.get("/v1/completions").await.status),
        (404, 405)
    );
    assert_eq!(engine.client.post("/inference/v1/generate", &json!({})).await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_cannot_be_are_refused_in_vllms_shape() {
    let limits = HttpLimits { body_bytes_max: 20_000, ..HttpLimits::default() };
    let engine = Engine::start(EngineOptions { http: limits, ..options(EngineModel::RandomTiny) }).await;
    let context = engine.client.get("/v1/models").await.good()["data"][0]["max_model_len"].as_u64().unwrap();
    for (body, status, said) in [
        (json!({"prompt": "a", "model": "gpt"}), 404, "The model `gpt` does not exist."),
        (json!({"prompt": []}), 400, "prompt is empty"),
        (json!({"prompt": [70_000]}), 400, "out of vocabulary"),
        (json!({"prompt": "a", "max_tokens": context}), 400, "maximum context length"),
        (json!({"prompt": prompt(1, context as u32), "max_tokens": 1}), 400, "maximum context length"),
        (json!({"prompt": "a", "n": 0}), 400, "n is 0"),
        (json!({"prompt": "a", "kv_transfer_params": {"do_remote_prefill": true}}), 400, "remote_block_ids"),
        (json!({"prompt": "a".repeat(30_000)}), 413, "20000 bytes"),
    ] {
        let answer = engine.client.post("/v1/completions", &body).await;
        assert_eq!(answer.status, status, "{}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["code"], status);
        assert!(error["message"].as_str().unwrap().contains(said), "{error}");
        assert!(error["type"].is_string());
    }
    let good = json!({"prompt": "a", "max_tokens": 1}).to_string().into_bytes();
    for (rank, status) in [("0", 200), ("1", 400), ("x", 400)] {
        let headers = [("x-data-parallel-rank", rank)];
        let answer = engine.client.send(Method::POST, "/v1/completions", &headers, good.clone()).await;
        assert_eq!(answer.status, status, "rank {rank}: {}", answer.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_guards_what_vllm_guards() {
    let key = ApiKey::new("sesame");
    assert_eq!(format!("{key:?}"), "***");
    let engine = Engine::start(EngineOptions { api_key: Some(key), ..options(simulated(0.0)) }).await;
    let body = json!({"prompt": "a", "max_tokens": 1});
    for wrong in [None, Some("sesam"), Some("")] {
        let mut client = engine.client.clone();
        client.key = wrong.map(str::to_owned);
        for refused in [client.post("/v1/completions", &body).await, client.get("/v1/models").await] {
            assert_eq!((refused.status, refused.json()), (401, json!({"error": "Unauthorized"})));
        }
        assert_eq!(client.get("/health").await.status, 200);
        assert_eq!(client.get("/metrics").await.status, 200);
    }
    let mut client = engine.client.clone();
    client.key = Some("sesame".to_owned());
    assert_eq!(client.post("/v1/completions", &body).await.status, 200);
    let basic = [("authorization", "Basic sesame")];
    assert_eq!(engine.client.send(Method::GET, "/v1/models", &basic, Vec::new()).await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_requests_id_is_that_of_its_answer() {
    let engine = Engine::start(options(simulated(0.0))).await;
    let body = json!({"prompt": "a", "max_tokens": 1}).to_string().into_bytes();
    let named = [("x-request-id", "pd-1")];
    let answer = engine.client.send(Method::POST, "/v1/completions", &named, body.clone()).await;
    assert_eq!((answer.good()["id"].as_str(), answer.request_id.as_str()), (Some("cmpl-pd-1"), "pd-1"));
    let odd = "x".repeat(500);
    let odd = [("x-request-id", odd.as_str())];
    let answer = engine.client.send(Method::POST, "/v1/completions", &odd, body).await;
    assert_eq!(answer.request_id.len(), 32, "another one is made");
    assert_eq!(answer.good()["id"], format!("cmpl-{}", answer.request_id));
}
