//! Whatever is sent to whichever endpoint: an answer in the promised shape, never a panic, never the server's fault.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

mod http_support;

use axum::{body::Body, http::Request};
use http_support::*;
use proptest::{collection, prelude::*};

const PATHS: [&str; 13] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/tiny",
    "/health",
    "/ready",
    "/openapi.json",
    "/metrics",
    "/fleet/v1/engines",
    "/fleet/v1/links",
    "/fleet/v1/predictions",
    "/fleet/v1/decisions",
    "/fleet/v1/policy",
];

/// Every field that the bodies know, and some that they do not.
const FIELDS: [&str; 34] = [
    "model",
    "messages",
    "prompt",
    "stream",
    "stream_options",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "response_format",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "echo",
    "best_of",
    "suffix",
    "role",
    "content",
    "type",
    "kv_transfer_params",
];

fn scalar() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|value| value.to_string()),
        (-3..40_i64).prop_map(|value| value.to_string()),
        any::<i64>().prop_map(|value| value.to_string()),
        any::<f64>()
            .prop_filter("JSON has no infinities", |value| value.is_finite())
            .prop_map(|value| format!("{value:e}")),
        prop::sample::select(vec!["tiny", "user", "assistant", "text", "auto", "none", "function", ""])
            .prop_map(|word| format!("\"{word}\"")),
        any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap()),
    ]
}

fn member(value: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    (prop::sample::select(FIELDS.to_vec()), value).prop_map(|(name, value)| format!("\"{name}\":{value}"))
}

fn json() -> impl Strategy<Value = String> {
    scalar().prop_recursive(5, 60, 6, |inner| {
        prop_oneof![
            collection::vec(inner.clone(), 0..6).prop_map(|items| format!("[{}]", items.join(","))),
            collection::vec(member(inner), 0..6).prop_map(|members| format!("{{{}}}", members.join(","))),
        ]
    })
}

/// A request that is good but for one field.
fn almost_good() -> impl Strategy<Value = String> {
    let good = prop::sample::select(vec![
        r#""model":"tiny","messages":[{"role":"user","content":"a"}]"#,
        r#""model":"tiny","prompt":"a""#,
        r#""model":"tiny","prompt":[[1],[2]]"#,
        r#""model":"tiny","messages":[{"role":"user","content":"a"}],"stream":true"#,
    ]);
    (good, member(json())).prop_map(|(good, member)| format!("{{{good},{member}}}"))
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        2 => collection::vec(any::<u8>(), 0..300),
        3 => json().prop_map(String::into_bytes),
        6 => almost_good().prop_map(String::into_bytes),
        1 => (almost_good(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(text, at, byte)| {
            let mut bytes = text.into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes
        }),
    ]
}

async fn check(request: impl Fn() -> Request<Body>) {
    let gateway = gateway(&greeter());
    for router in [gateway.public_router(), gateway.admin_router()] {
        let reply = ask(router, request()).await;
        assert!(reply.status.as_u16() < 500, "{} {}", reply.status, reply.body);
        assert!(reply.header("x-request-id").is_some());
        if reply.status.is_client_error() && !reply.body.is_empty() {
            let error = &reply.json()["error"];
            assert!(error["code"].is_string() && error["message"].is_string(), "{}", reply.body);
            assert!(error["message"].as_str().unwrap().len() < 2_000, "bounded: {}", reply.body);
        }
        if reply.header("content-type") == Some("text/event-stream; charset=utf-8") {
            assert_eq!(reply.events().last().map(String::as_str), Some("[DONE]"), "{}", reply.body);
        }
    }
    assert_eq!(gateway.live_requests(), 0, "nothing is left behind");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_body_is_the_servers_fault(path in prop::sample::select(PATHS.to_vec()), body in body(), method in "GET|POST|PUT") {
        let request = || Request::builder().method(method.as_str()).uri(path).body(body.clone().into()).unwrap();
        runtime().block_on(check(request));
    }

    #[test]
    fn no_generating_body_is_the_servers_fault(chat: bool, body in body()) {
        let path = if chat { PATHS[0] } else { PATHS[1] };
        runtime().block_on(check(|| post(path, body.clone())));
    }

    #[test]
    fn no_path_query_or_header_is_the_servers_fault(
        tail in "[!-~]{0,40}",
        id in collection::vec(0x20..=0xff_u8, 0..200),
        method in "[A-Z]{1,9}",
    ) {
        for base in ["/", "/v1/models/", "/fleet/v1/decisions/", "/fleet/v1/decisions?limit="] {
            let Ok(uri) = format!("{base}{tail}").parse::<axum::http::Uri>() else { continue };
            let (Ok(id), Ok(_)) = (axum::http::HeaderValue::from_bytes(&id), method.parse::<axum::http::Method>()) else {
                continue;
            };
            let request = || {
                let request = Request::builder().method(method.as_str()).uri(uri.clone());
                request.header("x-request-id", &id).header("traceparent", &id).body(Body::empty()).unwrap()
            };
            runtime().block_on(check(request));
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}
