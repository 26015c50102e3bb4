//! Ids, traces, keys and pages.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

mod http_support;

use axum::http::{Request, header};
use forebay_gateway::decisions::DecisionRecord;
use http_support::*;
use serde_json::json;

/// SHA-256 of `hello`.
const KEYS: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824 acme";

fn with(
    mut request: Request<axum::body::Body>,
    name: &'static str,
    value: &str,
) -> Request<axum::body::Body> {
    request.headers_mut().insert(name, value.parse().unwrap());
    request
}

#[tokio::test]
async fn every_answer_carries_the_requests_id() {
    let fake = greeter();
    let router = gateway(&fake).public_router();
    let requests = || {
        [
            post("/v1/chat/completions", chat_body("")),
            post("/v1/chat/completions", chat_body(r#","stream":true"#)),
            post("/v1/chat/completions", "nonsense"),
            get("/v1/chat/completions"),
            get("/nowhere"),
            get("/health"),
        ]
    };
    for request in requests() {
        let reply = ask(router.clone(), with(request, "x-request-id", "mine-1")).await;
        assert_eq!(reply.header("x-request-id"), Some("mine-1"));
    }
    assert_eq!(fake.last_request().id.as_str(), "mine-1");
    for request in requests() {
        let reply = ask(router.clone(), with(request, "x-request-id", "has space")).await;
        assert!(reply.header("x-request-id").unwrap().starts_with("req-"));
    }
    let reply = chat(&gateway(&fake), "").await;
    let id = reply.header("x-request-id").unwrap();
    assert_eq!(reply.json()["id"], format!("chatcmpl-{id}"));
}

#[tokio::test]
async fn a_live_requests_id_is_not_given_twice() {
    let (fake, senders) = Fake::by_hand();
    let gateway = gateway(&fake);
    let asked = |_| {
        let request = with(post("/v1/chat/completions", chat_body("")), "x-request-id", "same");
        tokio::spawn(ask(gateway.public_router(), request))
    };
    let asking: Vec<_> = (0..2).map(asked).collect();
    while senders.lock().len() < 2 {
        tokio::task::yield_now().await;
    }
    for sender in senders.lock().iter() {
        sender.send(answer("x"));
    }
    let mut ids = Vec::new();
    for reply in asking {
        ids.push(reply.await.unwrap().header("x-request-id").unwrap().to_owned());
    }
    ids.sort();
    assert_eq!(ids[0], "same");
    assert!(ids[1].starts_with("same-") && ids[1].len() > 5, "{ids:?}");
    assert_eq!(gateway.live_requests(), 0);
}

#[tokio::test]
async fn a_trace_is_passed_on_if_it_is_one() {
    let router = gateway(&greeter()).public_router();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let reply = ask(router.clone(), with(get("/health"), "traceparent", trace)).await;
    assert_eq!(reply.header("traceparent"), Some(trace));
    let reply = ask(router, with(get("/health"), "traceparent", "00-zz")).await;
    assert_eq!(reply.header("traceparent"), None);
}

#[tokio::test]
async fn keys_open_everything_below_v1_and_name_the_tenant() {
    let fake = greeter();
    let (gateway, _) = Setup { keys: Some(KEYS), ..Setup::default() }.gateway(&fake);
    let router = gateway.public_router();
    let requests = || {
        [
            post("/v1/chat/completions", chat_body("")),
            get("/v1/models"),
            get("/v1/models/tiny"),
            get("/v1/else"),
        ]
    };
    for key in [None, Some("Bearer wrong"), Some("Bearer"), Some("Basic hello"), Some("hello")] {
        for request in requests() {
            let request = match key {
                Some(key) => with(request, "authorization", key),
                None => request,
            };
            let reply = ask(router.clone(), request).await;
            assert_eq!(
                (reply.status.as_u16(), reply.header("www-authenticate")),
                (401, Some("Bearer")),
                "{key:?}"
            );
            assert_eq!(reply.json()["error"]["code"], "invalid_api_key");
            assert!(reply.header("x-request-id").is_some());
        }
    }
    assert!(fake.requests.lock().is_empty());
    for request in requests().into_iter().take(3) {
        assert_eq!(ask(router.clone(), with(request, "authorization", "bearer hello")).await.status, 200);
    }
    assert_eq!(fake.last_request().tenant.as_str(), "acme");
    for path in ["/health", "/ready", "/openapi.json"] {
        assert_eq!(ask(router.clone(), get(path)).await.status, 200, "{path} needs no key");
    }
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let router = gateway(&greeter()).public_router();
    insta::assert_snapshot!(ask(router.clone(), get("/v1/models")).await.body);
    let reply = ask(router.clone(), get("/v1/models/org/other")).await;
    assert_eq!((reply.status.as_u16(), reply.json()["id"].as_str()), (200, Some("org/other")));
    let reply = ask(router, get("/v1/models/none")).await;
    assert_eq!(
        (reply.status.as_u16(), reply.json()["error"]["code"].as_str()),
        (404, Some("model_not_found"))
    );
    assert!(reply.body.contains("`org/other`, `tiny`"));
}

#[tokio::test]
async fn wrong_paths_and_methods_are_told_in_the_same_shape() {
    let gateway = gateway(&greeter());
    let reply = ask(gateway.public_router(), get("/v1/embeddings")).await;
    assert_eq!((reply.status.as_u16(), reply.json()["error"]["code"].as_str()), (404, Some("not_found")));
    let reply = ask(gateway.public_router(), get("/v1/completions")).await;
    assert_eq!((reply.status.as_u16(), reply.header(header::ALLOW.as_str())), (405, Some("POST")));
    assert_eq!(reply.json()["error"]["code"], "method_not_allowed");
    let reply = ask(gateway.public_router(), get("/v1/models/%ff")).await;
    assert_eq!((reply.status.as_u16(), reply.json()["error"]["param"].as_str()), (400, Some("id")));
    assert_eq!(ask(gateway.public_router(), get("/metrics")).await.status, 404, "operators listen elsewhere");
    assert_eq!(ask(gateway.admin_router(), get("/v1/models")).await.status, 404);
}

#[tokio::test]
async fn readiness_follows_the_fleet() {
    let fake = greeter();
    let gateway = gateway(&fake);
    for router in [gateway.public_router(), gateway.admin_router()] {
        fake.ready.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(ask(router.clone(), get("/ready")).await.status, 200);
        fake.ready.store(false, std::sync::atomic::Ordering::Relaxed);
        let reply = ask(router.clone(), get("/ready")).await;
        assert_eq!((reply.status.as_u16(), reply.json()["error"]["code"].as_str()), (503, Some("not_ready")));
        assert_eq!(ask(router, get("/health")).await.status, 200, "live all the same");
    }
}

fn record(id: &str) -> DecisionRecord {
    DecisionRecord {
        id: id.into(),
        arrived_unix_ms: 1,
        tenant: "anonymous".into(),
        model: MODEL.into(),
        prompt_tokens: 3,
        choices: 1,
        placements: vec![],
        legs: vec![],
        transfers: vec![],
        ttft_seconds: Some(0.5),
        e2e_seconds: None,
        cached_tokens: 0,
        output_tokens: 2,
        outcome: "running".into(),
    }
}

#[tokio::test]
async fn what_if_reads_a_body_as_the_public_address_would() {
    let fake = greeter();
    let router = gateway(&fake).admin_router();
    let ask_for = async |body: String| {
        let reply = ask(router.clone(), post("/fleet/v1/placements", body)).await;
        let error = reply.json()["error"].clone();
        (reply.status.as_u16(), error["code"].as_str().unwrap_or_default().to_owned())
    };
    let completion = json!({ "model": MODEL, "prompt": "one two" }).to_string();
    // The double's answer: what matters is that it was asked.
    for body in [chat_body(""), completion] {
        assert_eq!(ask_for(body).await, (503, "no_engine".to_owned()));
    }
    let asked = fake.requests.lock().clone();
    assert_eq!(asked.iter().map(|it| &*it.model).collect::<Vec<_>>(), [MODEL, MODEL]);
    assert!(asked[0].prompt.len() > asked[1].prompt.len(), "a template is around a chat");
    for (body, code) in [
        ("nonsense".to_owned(), "invalid_json"),
        ("{}".to_owned(), "missing_required_parameter"),
        (json!({ "model": "none", "messages": [] }).to_string(), "model_not_found"),
    ] {
        assert_eq!(ask_for(body.clone()).await.1, code, "{body}");
    }
    let metrics = ask(router, get("/metrics")).await.body;
    assert!(!metrics.contains("forebay_requests_total{"), "nothing is counted");
}

#[tokio::test]
async fn operators_see_engines_decisions_and_metrics() {
    let fake = greeter();
    for id in ["first", "with/slash", "last"] {
        fake.decisions.put(record(id));
    }
    let router = gateway(&fake).admin_router();
    let engines = ask(router.clone(), get("/fleet/v1/engines")).await.json();
    assert_eq!(engines["data"][0]["engine"], "embedded-0");
    let links = ask(router.clone(), get("/fleet/v1/links")).await.json();
    let link = &links["data"][0];
    assert_eq!((link["to"].as_str(), link["transfers"].as_u64()), (Some("embedded-1"), Some(3)));
    let predictions = ask(router.clone(), get("/fleet/v1/predictions")).await.json();
    assert!(predictions["data"].as_array().is_some_and(|models| models.len() <= 1), "{predictions}");
    let ids = async |query: &str| -> Vec<String> {
        let list = ask(router.clone(), get(&format!("/fleet/v1/decisions{query}"))).await.json();
        list["data"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids("").await, ["last", "with/slash", "first"]);
    assert_eq!(ids("?limit=1").await, ["last"]);
    assert_eq!(ids("?order=slowest&limit=2").await, ["last", "with/slash"], "equals: the newest first");
    assert_eq!(ids("?engine=none").await, Vec::<String>::new());
    let reply = ask(router.clone(), get("/fleet/v1/decisions?order=oldest")).await;
    assert_eq!((reply.status.as_u16(), reply.json()["error"]["param"].as_str()), (400, Some("order")));
    for query in ["limit=0", "limit=1001", "limit=-1", "limit=many"] {
        let reply = ask(router.clone(), get(&format!("/fleet/v1/decisions?{query}"))).await;
        assert_eq!(
            (reply.status.as_u16(), reply.json()["error"]["param"].as_str()),
            (400, Some("limit")),
            "{query}"
        );
    }
    let found = ask(router.clone(), get("/fleet/v1/decisions/with/slash")).await;
    assert_eq!(found.json()["outcome"], "running");
    assert_eq!(ask(router.clone(), get("/fleet/v1/decisions/none")).await.status, 404);
    let metrics = ask(router, get("/metrics")).await;
    assert!(metrics.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(metrics.body.contains("forebay_engine_running{engine=\"embedded-0\"} 2\n"));
    assert!(metrics.body.ends_with("# EOF\n"));
}

#[tokio::test]
async fn operators_change_the_policy() {
    let router = gateway(&greeter()).admin_router();
    let put =
        |body: &'static str| ask(router.clone(), Request::put("/fleet/v1/policy").body(body.into()).unwrap());
    assert_eq!(ask(router.clone(), get("/fleet/v1/policy")).await.json()["policy"], "cost");
    assert_eq!(put(r#"{"policy":"round-robin"}"#).await.json()["policy"], "round-robin");
    for (body, code) in [
        (r#"{"policy":"rond-robin"}"#, "invalid_value"),
        (r#"{"policy":5}"#, "invalid_type"),
        ("{}", "invalid_type"),
        ("", "invalid_json"),
    ] {
        let reply = put(body).await;
        assert_eq!(
            (reply.status.as_u16(), reply.json()["error"]["code"].as_str()),
            (400, Some(code)),
            "{body}"
        );
    }
    assert_eq!(ask(router.clone(), get("/fleet/v1/policy")).await.json()["policy"], "round-robin");
}
