//! What requests may say, and what they are told when they may not.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

mod http_support;

use forebay_gateway::{
    http::RequestLimits,
    orchestrator::api::{GenerateRequest, RouteError},
};
use forebay_types::TokenId;
use http_support::*;

/// One line for each refusal: status, code, field, message.
async fn refusals(path: &str, bodies: &[&str], setup: Setup) -> String {
    let fake = greeter();
    let (gateway, _) = setup.gateway(&fake);
    let mut lines = Vec::new();
    for body in bodies {
        let reply = ask(gateway.public_router(), post(path, body.to_string())).await;
        let error = &reply.json()["error"];
        assert!(reply.header("x-request-id").is_some());
        assert!(matches!(error["type"].as_str(), Some("invalid_request_error")), "{body}: {}", reply.body);
        lines.push(format!(
            "{body}\n    {} {} {} {}",
            reply.status.as_u16(),
            error["code"].as_str().unwrap(),
            error["param"].as_str().unwrap_or("-"),
            error["message"].as_str().unwrap()
        ));
    }
    assert!(fake.requests.lock().is_empty(), "nothing of a refused request reaches the fleet");
    lines.join("\n")
}

#[tokio::test]
async fn bad_chat_requests_are_refused_by_name() {
    let with = |more: &str| chat_body(&format!(",{more}"));
    let members = [
        r#""temperature":-0.1"#,
        r#""temperature":2.5"#,
        r#""temperature":"hot""#,
        r#""temperature":1e999"#,
        r#""top_p":0"#,
        r#""top_p":1.01"#,
        r#""top_k":-2"#,
        r#""n":0"#,
        r#""n":17"#,
        r#""n":1.5"#,
        r#""max_tokens":0"#,
        r#""max_tokens":-3"#,
        r#""max_completion_tokens":0"#,
        r#""max_tokens":1000"#,
        r#""max_tokens":5,"max_completion_tokens":1000"#,
        r#""seed":1.5"#,
        r#""stop":"""#,
        r#""stop":["a",""]"#,
        r#""stop":[1]"#,
        r#""stop":["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"]"#,
        r#""stop_token_ids":[-1]"#,
        r#""logprobs":5"#,
        r#""top_logprobs":3"#,
        r#""logprobs":true,"top_logprobs":21"#,
        r#""stream":"yes""#,
        r#""stream_options":{"include_usage":true}"#,
        r#""stream":true,"stream_options":{"include_usage":1}"#,
        r#""min_tokens":3"#,
        r#""min_tokens":9,"max_tokens":8,"ignore_eos":true"#,
        r#""presence_penalty":0.5"#,
        r#""frequency_penalty":-1"#,
        r#""repetition_penalty":1.1"#,
        r#""min_p":0.05"#,
        r#""logit_bias":{"5":-100}"#,
        r#""response_format":{"type":"json_object"}"#,
        r#""tool_choice":"required""#,
        r#""tool_choice":{"type":"function","function":{"name":"f"}}"#,
        r#""tools":{"a":1}"#,
        r#""chat_template_kwargs":{"messages":1}"#,
        r#""model":"tiny""#,
    ];
    let mut bodies: Vec<String> = members.iter().map(|member| with(member)).collect();
    bodies.extend(
        [
            "",
            "{",
            "nonsense",
            "[]",
            "5",
            r#"{"model":"tiny"}"#,
            r#"{"messages":[]}"#,
            r#"{"model":"gpt-9","messages":[]}"#,
            r#"{"model":5,"messages":[]}"#,
            r#"{"model":"tiny","messages":[]}"#,
            r#"{"model":"tiny","messages":"hi"}"#,
            r#"{"model":"tiny","messages":[{}]}"#,
            r#"{"model":"tiny","messages":[{"role":"user","content":"a"},{"role":"user","content":5}]}"#,
            r#"{"model":"tiny","messages":[{"role":"user","content":[{"type":"text"}]}]}"#,
            r#"{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url"}]}]}"#,
            r#"{"model":"tiny","messages":[{"role":"user","content":"\ud800"}]}"#,
        ]
        .map(str::to_owned),
    );
    let bodies: Vec<&str> = bodies.iter().map(String::as_str).collect();
    insta::assert_snapshot!(refusals("/v1/chat/completions", &bodies, Setup::default()).await);
}

#[tokio::test]
async fn bad_completion_requests_are_refused_by_name() {
    let with = |members: &str| format!(r#"{{"model":"tiny",{members}}}"#);
    let members = [
        r#""max_tokens":1"#,
        r#""prompt":"""#,
        r#""prompt":[]"#,
        r#""prompt":["a",""]"#,
        r#""prompt":[[1],[]]"#,
        r#""prompt":[1,"a"]"#,
        r#""prompt":["a",[1]]"#,
        r#""prompt":[-1]"#,
        r#""prompt":[1,99999]"#,
        r#""prompt":[[1],[2,99999]]"#,
        r#""prompt":[4294967296]"#,
        r#""prompt":{"a":1}"#,
        r#""prompt":["a","b","c","d"]"#,
        r#""prompt":["a","b","c"],"n":2"#,
        r#""prompt":"a","echo":true"#,
        r#""prompt":"a","best_of":2"#,
        r#""prompt":"a","suffix":"z""#,
        r#""prompt":"a","logprobs":true"#,
        r#""prompt":"a","logprobs":21"#,
    ];
    let bodies: Vec<String> = members.iter().map(|member| with(member)).collect();
    let bodies: Vec<&str> = bodies.iter().map(String::as_str).collect();
    let request_limits = RequestLimits { prompts_max: 3, sequences_max: 5, ..RequestLimits::default() };
    let setup = Setup { request_limits, ..Setup::default() };
    insta::assert_snapshot!(refusals("/v1/completions", &bodies, setup).await);
}

#[tokio::test]
async fn a_prompt_beyond_the_context_is_told_both_lengths() {
    let fake = greeter();
    let gateway = gateway(&fake);
    for (members, lengths) in [
        (format!(r#""prompt":"{}""#, "x".repeat(500)), ["500", "500"]),
        (format!(r#""prompt":"{}","max_tokens":5"#, "x".repeat(496)), ["496", "500"]),
    ] {
        let reply = complete(&gateway, &members).await;
        let error = &reply.json()["error"];
        assert_eq!((reply.status.as_u16(), error["code"].as_str()), (400, Some("context_length_exceeded")));
        let message = error["message"].as_str().unwrap();
        assert!(lengths.iter().all(|length| message.contains(length)), "{message}");
    }
    let reply = complete(&gateway, &format!(r#""prompt":"{}""#, "x".repeat(499))).await;
    assert_eq!(reply.status, 200, "one token has room: {}", reply.body);
    assert_eq!(fake.last_request().sampling.output_tokens_max, 1);
}

#[tokio::test]
async fn a_templates_refusal_is_told_in_its_words() {
    let template = "{{ raise_exception('roles must alternate') }}";
    let (gateway, _) = Setup { template: Some(template), ..Setup::default() }.gateway(&greeter());
    let reply = chat(&gateway, "").await;
    let error = &reply.json()["error"];
    assert_eq!((reply.status.as_u16(), error["code"].as_str()), (400, Some("template_error")));
    assert!(error["message"].as_str().unwrap().contains("roles must alternate"));
}

/// What reached the fleet.
async fn submitted(path: &str, body: String) -> GenerateRequest {
    let fake = greeter();
    let reply = ask(gateway(&fake).public_router(), post(path, body)).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    fake.last_request()
}

#[tokio::test]
async fn parameters_reach_the_fleet() {
    let chat = |more: &str| submitted("/v1/chat/completions", chat_body(more));

    let plain = chat("").await;
    let prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";
    let mut expected = Vec::new();
    forebay_text::Tokenizer::bytes().encode(prompt, &mut expected).unwrap();
    assert_eq!(&*plain.prompt, &expected[..]);
    assert_eq!((plain.choices, &*plain.model, plain.tenant.as_str()), (1, MODEL, "anonymous"));
    let sampling = &plain.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (1.0, 1.0, 0));
    assert_eq!(
        sampling.output_tokens_max as usize,
        CONTEXT as usize - expected.len(),
        "the rest of the context"
    );
    assert_eq!((&*sampling.stop_tokens, sampling.logprobs), (&[END][..], None));
    assert_ne!(plain.sampling.seed, 0, "drawn");

    let full = chat(
        r#","temperature":0.5,"top_p":0.9,"top_k":40,"seed":-1,"max_tokens":7,"n":3,"stop_token_ids":[65],
           "logprobs":true,"top_logprobs":2,"stop":null,"presence_penalty":0,"response_format":{"type":"text"},
           "kv_transfer_params":{"do_remote_prefill":true},"priority":-9,"cache_salt":"x","user":"u","tools":[]"#,
    )
    .await;
    let sampling = &full.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.5, 0.9, 40));
    assert_eq!((sampling.seed, sampling.output_tokens_max, full.choices), (u64::MAX, 7, 3));
    assert_eq!((&*sampling.stop_tokens, sampling.logprobs), (&[END, 65][..], Some(2)));

    assert_eq!(chat(r#","max_tokens":7,"max_completion_tokens":9"#).await.sampling.output_tokens_max, 9);
    assert_eq!(chat(r#","seed":18446744073709551615"#).await.sampling.seed, u64::MAX);
    assert_eq!(chat(r#","top_k":-1"#).await.sampling.top_k, 0);
    assert_eq!(chat(r#","temperature":1e-9"#).await.sampling.temperature, 0.0);
    assert!(chat(r#","ignore_eos":true,"min_tokens":5"#).await.sampling.stop_tokens.is_empty());
    assert_eq!(&*chat(r#","ignore_eos":true,"stop_token_ids":[66]"#).await.sampling.stop_tokens, &[66]);

    let joined = submitted(
        "/v1/chat/completions",
        r#"{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"he"},{"type":"text","text":"llo"}]}]}"#
            .to_owned(),
    )
    .await;
    let mut expected = Vec::new();
    let prompt = prompt.replace("hello", "he\nllo");
    forebay_text::Tokenizer::bytes().encode(&prompt, &mut expected).unwrap();
    assert_eq!(&*joined.prompt, &expected[..]);
}

#[tokio::test]
async fn completions_take_prompts_in_four_shapes() {
    let check = async |prompt: &str, expected: &[&[TokenId]]| {
        let fake = greeter();
        let reply = complete(&gateway(&fake), &format!(r#""prompt":{prompt}"#)).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        let requests = fake.requests.lock();
        let prompts: Vec<&[TokenId]> = requests.iter().map(|request| &*request.prompt).collect();
        assert_eq!(prompts, expected, "{prompt}");
        assert!(requests.iter().all(|request| request.sampling.output_tokens_max == 16));
    };
    check(r#""AB""#, &[&[65, 66]]).await;
    check(r#"["AB","\u0043"]"#, &[&[65, 66], &[67]]).await;
    check("[65,66]", &[&[65, 66]]).await;
    check("[[65,66],[67]]", &[&[65, 66], &[67]]).await;
}

#[tokio::test]
async fn long_texts_are_tokenised_beside_the_streams_with_the_same_tokens() {
    let fake = greeter();
    let request_limits = RequestLimits { inline_text_bytes_max: 5, ..RequestLimits::default() };
    let (gateway, _) = Setup { request_limits, ..Setup::default() }.gateway(&fake);
    assert_eq!(complete(&gateway, r#""prompt":["short","longer"]"#).await.status, 200);
    let prompts: Vec<Vec<TokenId>> =
        fake.requests.lock().iter().map(|request| request.prompt.to_vec()).collect();
    assert_eq!(prompts, ["short", "longer"].map(|text| text.bytes().map(TokenId::from).collect::<Vec<_>>()));
}

#[tokio::test]
async fn several_prompts_have_ids_of_their_own() {
    let fake = greeter();
    let mut request = post("/v1/completions", r#"{"model":"tiny","prompt":["a","b"]}"#);
    request.headers_mut().insert("x-request-id", "mine".parse().unwrap());
    let reply = ask(gateway(&fake).public_router(), request).await;
    assert_eq!(reply.header("x-request-id"), Some("mine"));
    let ids: Vec<String> = fake.requests.lock().iter().map(|request| request.id.to_string()).collect();
    assert_eq!(ids, ["mine-0", "mine-1"]);
}

#[tokio::test]
async fn refusals_of_the_fleet_come_with_status_and_wait() {
    let fake = Fake::new(|_| Err(RouteError::TooManyInFlight { limit: 8, retry_after_seconds: 1.2 }));
    let (gateway, metrics) = Setup::default().gateway(&fake);
    let reply = chat(&gateway, r#","stream":true"#).await;
    assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (429, Some("2")));
    assert_eq!(reply.json()["error"]["code"], "too_many_requests");
    let text = metrics.render(&[]);
    let line = "forebay_requests_total{model=\"tiny\",endpoint=\"chat_completions\",outcome=\"refused\"} 1\n";
    assert!(text.contains(line), "{text}");
    assert!(text.contains("forebay_requests_in_flight 0\n"));
}

#[tokio::test]
async fn if_one_of_several_prompts_is_refused_the_rest_is_cancelled() {
    let (hand, senders) = Fake::by_hand();
    let mut submitted = 0;
    let fake = Fake::new(move |request| {
        submitted += 1;
        use forebay_gateway::orchestrator::api::Orchestrate;
        if submitted == 2 { Err(RouteError::ShuttingDown) } else { hand.submit(request.clone()) }
    });
    let reply = complete(&gateway(&fake), r#""prompt":["a","b","c"]"#).await;
    assert_eq!((reply.status.as_u16(), reply.json()["error"]["code"].as_str()), (503, Some("shutting_down")));
    let senders = std::mem::take(&mut *senders.lock());
    assert_eq!(senders.len(), 1);
    client_gone(&senders[0]).await;
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused() {
    let gateway = gateway(&greeter());
    for size in [64 * 1024 + 1, 10 * 1024 * 1024] {
        let reply = ask(gateway.public_router(), post("/v1/completions", vec![b' '; size])).await;
        let error = &reply.json()["error"];
        assert_eq!((reply.status.as_u16(), error["code"].as_str()), (413, Some("body_too_large")));
        assert!(error["message"].as_str().unwrap().contains("65536 bytes"));
    }
}
