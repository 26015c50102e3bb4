//! HTTP and gRPC: the same answers, the same refusals, the same bounds.

use forebay_index_server::{ListenLimits, service::Limits};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_proto::index_v1 as v1;
use futures::StreamExt as _;
use serde_json::{Value, json};
use tonic::Code;

use super::rig::{BLOCK, Publisher, Server, prompt, soon, stored};

/// Registers an engine that is fed by hand.
async fn fed(server: &Server, name: &str) {
    let answer = server.ask("POST", "/v1/engines", json!({ "name": name, "model": "m" })).await;
    assert_eq!((answer.status.as_u16(), &answer.json["created"]), (201, &json!(true)), "{}", answer.text);
}

fn chain(blocks: &[u32]) -> Vec<u64> {
    let hasher = BlockHasher::new(HashKey::GOLDEN, BLOCK);
    hasher.chain(hasher.root("m", ""), &prompt(blocks)).into_iter().map(|hash| hash.0).collect()
}

#[tokio::test]
async fn both_doors_say_the_same_by_tokens_and_by_hashes() {
    let server = Server::start().await;
    let engine = Publisher::start(true).await;
    engine.publish(0, vec![stored(1, None), stored(2, Some(1))]).await;
    server.register("a", &engine).await;
    fed(&server, "b").await;
    let batch = json!({ "engine": "b", "batches": [{ "sequence": 0, "events": [
        { "type": "stored", "hashes": ["70", "0x47"], "tokens": prompt(&[1, 2]), "block_size_tokens": BLOCK },
        { "type": "removed", "hashes": [71] },
    ] }] });
    let published = server.ask("POST", "/v1/events", batch).await;
    assert_eq!(published.json, json!({ "applied": 1, "repeated": 0, "notes": [] }), "{}", published.text);
    server.until_held(&[1, 2, 3], &[("a", 0, 2), ("b", 0, 1)]).await;

    let by_tokens = json!({ "model": "m", "tokens": prompt(&[1, 2, 3]), "with_hashes": true });
    let by_tokens = server.ask("POST", "/v1/query", by_tokens).await.json;
    let hashes = by_tokens["hashes"].as_array().unwrap().clone();
    let expected: Vec<Value> = chain(&[1, 2, 3]).iter().map(|hash| json!(format!("{hash:#018x}"))).collect();
    assert_eq!(hashes, expected);
    let by_hashes = json!({ "hashes": hashes, "with_hashes": true });
    assert_eq!(server.ask("POST", "/v1/query", by_hashes).await.json, by_tokens);
    let decimals: Vec<String> = chain(&[1, 2, 3]).iter().map(u64::to_string).collect();
    let by_decimals = json!({ "hashes": decimals, "with_hashes": true, "model": "m" });
    assert_eq!(server.ask("POST", "/v1/query", by_decimals).await.json, by_tokens);
    assert_eq!(by_tokens["ranks"][0]["tiers"], json!({ "device": 2, "host": 2, "disk": 2, "remote": 2 }));

    let mut grpc = server.grpc().await;
    let tokens =
        v1::QueryRequest { model: "m".into(), tokens: prompt(&[1, 2, 3]), ..v1::QueryRequest::default() };
    let by_tokens = soon(grpc.query(tokens)).await.unwrap().into_inner();
    let hashes = v1::QueryRequest { hashes: chain(&[1, 2, 3]), ..v1::QueryRequest::default() };
    assert_eq!(soon(grpc.query(hashes)).await.unwrap().into_inner(), by_tokens);
    let found: Vec<_> = by_tokens.ranks.iter().map(|it| (it.engine.as_str(), it.blocks, it.tokens)).collect();
    assert_eq!(found, [("a", 2, 8), ("b", 1, 4)]);
    let best = v1::QueryRequest { hashes: chain(&[1]), ranks_max: 1, ..v1::QueryRequest::default() };
    assert_eq!(soon(grpc.query(best)).await.unwrap().into_inner().ranks.len(), 1);

    let engines = soon(grpc.engines(v1::EnginesRequest {})).await.unwrap().into_inner().engines;
    let states: Vec<_> =
        engines.iter().map(|it| (it.name.as_str(), it.state(), it.ranks[0].blocks)).collect();
    assert_eq!(states, [("a", v1::State::Following, 2), ("b", v1::State::Following, 1)]);
    let over_grpc = soon(grpc.stats(v1::StatsRequest {})).await.unwrap().into_inner();
    let over_http = server.get("/v1/stats").await.json;
    assert_eq!(json!(over_grpc.entries), over_http["index"]["entries"]);
    assert_eq!((over_grpc.engines, over_grpc.blocks, over_grpc.block_size_tokens), (2, 2, BLOCK));
    drop(grpc);
    server.stop().await;
}

#[tokio::test]
async fn a_dump_is_all_that_is_held() {
    let server = Server::start().await;
    let engine = Publisher::start(true).await;
    engine.publish(0, vec![stored(1, None), stored(2, Some(1))]).await;
    server.register("a", &engine).await;
    server.until_held(&[1, 2], &[("a", 0, 2)]).await;
    fed(&server, "b").await;
    // More than one piece.
    let many: Vec<String> = (1..=5000_u64).map(|hash| format!("{hash:#x}")).collect();
    let snapshot = json!({ "sequence_next": 3, "stored": [{ "hashes": many }] });
    let taken = server.ask("PUT", "/v1/engines/b/ranks/0/snapshot", snapshot).await;
    assert_eq!(taken.status, 200, "{}", taken.text);

    let dump = server.get("/v1/dump").await;
    let lines: Vec<Value> = dump.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (done, pieces) = lines.split_last().unwrap();
    assert_eq!(*done, json!({ "done": true, "ranks": 2, "blocks": 5002 }));
    let of = |name: &str| -> Vec<u64> {
        let pieces = pieces.iter().filter(|piece| piece["engine"] == name);
        let hashes = pieces.flat_map(|piece| piece["hashes"].as_array().unwrap());
        let number = |hash: &Value| {
            u64::from_str_radix(hash.as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap()
        };
        let mut hashes: Vec<u64> = hashes.map(number).collect();
        hashes.sort_unstable();
        hashes
    };
    let mut expected = chain(&[1, 2]);
    expected.sort_unstable();
    assert_eq!(of("a"), expected);
    assert_eq!(of("b"), (1..=5000).collect::<Vec<u64>>());
    assert!(pieces.iter().all(|piece| piece["hashes"].as_array().unwrap().len() <= 4096));

    let mut grpc = server.grpc().await;
    let asked = v1::DumpRequest { engine: "a".into() };
    let pieces: Vec<_> = soon(soon(grpc.dump(asked)).await.unwrap().into_inner().collect::<Vec<_>>()).await;
    let bodies: Vec<_> = pieces.into_iter().map(|piece| piece.unwrap().body.unwrap()).collect();
    let [v1::dump_response::Body::Piece(piece), v1::dump_response::Body::Done(done)] = &bodies[..] else {
        panic!("one piece and the end: {bodies:?}")
    };
    let mut hashes = piece.hashes.clone();
    hashes.sort_unstable();
    assert_eq!((hashes, done.blocks), (expected, 2));
    // The dump changed nothing.
    server.until_held(&[1, 2], &[("a", 0, 2)]).await;
}

#[tokio::test]
async fn batches_are_streamed_over_grpc() {
    let server = Server::start().await;
    let mut grpc = server.grpc().await;
    let register = |name: &str| v1::RegisterRequest {
        name: name.into(),
        model: "m".into(),
        ..v1::RegisterRequest::default()
    };
    let created = soon(grpc.register(register("a"))).await.unwrap().into_inner().created;
    let again = soon(grpc.register(register("a"))).await.unwrap().into_inner().created;
    assert!(created && !again);
    let stored = |blocks: &[u32]| v1::Event {
        event: Some(v1::event::Event::Stored(v1::Stored { hashes: chain(blocks), ..v1::Stored::default() })),
    };
    let cleared = v1::Event { event: Some(v1::event::Event::Cleared(v1::Cleared {})) };
    let message = |sequence: u64, events: Vec<v1::Event>| v1::PublishRequest {
        engine: "a".into(),
        life: "first".into(),
        dp_rank: 0,
        body: Some(v1::publish_request::Body::Batch(v1::Batch { sequence, events })),
    };
    let sent = [message(0, vec![stored(&[1, 2])]), message(1, vec![]), message(1, vec![])];
    let answer = soon(grpc.publish(futures::stream::iter(sent))).await.unwrap().into_inner();
    assert_eq!((answer.applied, answer.repeated), (2, 1));
    server.until_held(&[1, 2], &[("a", 0, 2)]).await;

    let late = [message(5, vec![]), message(6, vec![])];
    let refused = soon(grpc.publish(futures::stream::iter(late))).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange);
    assert_eq!(refused.metadata().get("forebay-code").unwrap(), "sequence_gap");
    server.until_held(&[1, 2], &[]).await;
    let healed = [message(7, vec![cleared, stored(&[1])])];
    assert_eq!(soon(grpc.publish(futures::stream::iter(healed))).await.unwrap().into_inner().applied, 1);
    server.until_held(&[1, 2], &[("a", 0, 1)]).await;
    let snapshot = v1::PublishRequest {
        body: Some(v1::publish_request::Body::Snapshot(v1::Snapshot {
            sequence_next: 0,
            stored: vec![v1::Stored { hashes: chain(&[1, 2]), ..v1::Stored::default() }],
        })),
        life: "second".into(),
        ..message(0, vec![])
    };
    soon(grpc.publish(futures::stream::iter([snapshot]))).await.unwrap();
    server.until_held(&[1, 2], &[("a", 0, 2)]).await;
    let refused = soon(grpc.publish(futures::stream::iter([message(8, vec![])]))).await.unwrap_err();
    assert_eq!(
        (refused.code(), server.engine("a").await["restarts"].clone()),
        (Code::FailedPrecondition, json!(1))
    );
    let empty = v1::Event { event: None };
    let second = v1::PublishRequest { life: "second".into(), ..message(0, vec![empty]) };
    let refused = soon(grpc.publish(futures::stream::iter([second]))).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let gone = v1::UnregisterRequest { name: "a".into() };
    soon(grpc.unregister(gone.clone())).await.unwrap();
    assert_eq!(soon(grpc.unregister(gone)).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn bad_input_is_refused_by_name() {
    let server = Server::start().await;
    fed(&server, "a").await;
    let rows: &[(&str, &str, &str, u16, &str, &str)] = &[
        // method, path, body, status, code, param
        ("GET", "/v2/engines", "", 404, "not_found", ""),
        ("PUT", "/v1/query", "{}", 405, "method_not_allowed", ""),
        ("POST", "/v1/query", "", 400, "invalid_json", ""),
        ("POST", "/v1/query", "{", 400, "invalid_json", ""),
        ("POST", "/v1/query", "{} {}", 400, "invalid_json", ""),
        ("POST", "/v1/query", "[]", 400, "invalid_value", ""),
        ("POST", "/v1/query", "{}", 400, "invalid_value", "tokens"),
        ("POST", "/v1/query", r#"{"tokens":[1]}"#, 400, "invalid_value", "model"),
        ("POST", "/v1/query", r#"{"model":"m","tokens":[1],"hashes":["1"]}"#, 400, "invalid_value", "tokens"),
        ("POST", "/v1/query", r#"{"model":"m","tokens":[1,-2]}"#, 400, "invalid_value", "tokens[1]"),
        ("POST", "/v1/query", r#"{"model":"m","tokens":"hello"}"#, 400, "invalid_value", "tokens"),
        ("POST", "/v1/query", r#"{"hashes":["1","xyz"]}"#, 400, "invalid_value", "hashes[1]"),
        ("POST", "/v1/query", r#"{"hashes":["1"],"salt":"s"}"#, 400, "invalid_value", "hashes"),
        ("POST", "/v1/query", r#"{"model":"n","tokens":[1]}"#, 404, "model_not_found", "model"),
        ("POST", "/v1/query", r#"{"model":"m","tokens":[1],"color":1}"#, 400, "invalid_value", "color"),
        ("POST", "/v1/engines", r#"{"name":"x"}"#, 400, "invalid_value", ""),
        ("POST", "/v1/engines", r#"{"name":"","model":"m"}"#, 400, "invalid_value", "name"),
        ("POST", "/v1/engines", r#"{"name":"x/y","model":"m"}"#, 400, "invalid_value", "name"),
        ("POST", "/v1/engines", r#"{"name":"x","model":"m","events":"h:1"}"#, 400, "invalid_value", "events"),
        ("POST", "/v1/engines", r#"{"name":"x","model":"m","events":7}"#, 400, "invalid_value", "events"),
        (
            "POST",
            "/v1/engines",
            r#"{"name":"x","model":"m","dp_ranks":5000}"#,
            400,
            "invalid_value",
            "dp_ranks",
        ),
        ("POST", "/v1/engines", r#"{"name":"a","model":"other"}"#, 409, "engine_exists", "name"),
        ("DELETE", "/v1/engines/zzz", "", 404, "engine_not_found", "engine"),
        ("GET", "/v1/dump?engine=a&engine=b", "", 400, "invalid_value", ""),
        ("DELETE", "/v1/engines/%FF", "", 400, "invalid_value", ""),
        ("GET", "/v1/dump?engine=zzz", "", 404, "engine_not_found", "engine"),
        (
            "POST",
            "/v1/events",
            r#"{"engine":"zzz","batches":[{"sequence":0}]}"#,
            404,
            "engine_not_found",
            "engine",
        ),
        (
            "POST",
            "/v1/events",
            r#"{"engine":"a","batches":[{"sequence":3}]}"#,
            409,
            "sequence_gap",
            "batches[0].sequence",
        ),
        (
            "POST",
            "/v1/events",
            r#"{"engine":"a","batches":[{"sequence":0,"events":[{"type":"cleared"}]},{"sequence":1,"events":[{"type":"stored","hashes":[]}]}]}"#,
            400,
            "invalid_value",
            "batches[1].events[0].hashes",
        ),
        (
            "POST",
            "/v1/events",
            r#"{"engine":"a","batches":[{"sequence":0,"events":[{"type":"melted"}]}]}"#,
            400,
            "invalid_value",
            "*",
        ),
        ("PUT", "/v1/engines/a/ranks/x/snapshot", "{}", 400, "invalid_value", "dp_rank"),
        (
            "PUT",
            "/v1/engines/a/ranks/9/snapshot",
            r#"{"sequence_next":0,"stored":[]}"#,
            400,
            "invalid_value",
            "dp_rank",
        ),
    ];
    for (method, path, body, status, code, param) in rows {
        let answer = server.ask(method, path, body).await;
        let error = &answer.json["error"];
        assert_eq!(
            (answer.status.as_u16(), error["code"].as_str()),
            (*status, Some(*code)),
            "{path} {body}: {}",
            answer.text
        );
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{}", answer.text);
        if *param != "*" {
            assert_eq!(error["param"].as_str().unwrap_or_default(), *param, "{path} {body}: {}", answer.text);
        }
    }
    assert_eq!(server.get("/health").await.status, 200);
    let metrics = server.get("/metrics").await.text;
    for line in [
        "forebay_index_calls_total{door=\"http\",call=\"query\",outcome=\"model_not_found\"} 1",
        "forebay_index_engines{state=\"following\"} 1",
        "forebay_index_ranks{index=\"announced\"} 1",
        "forebay_index_query_seconds_count 0",
        "# EOF",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

#[tokio::test]
async fn everything_has_a_bound() {
    let limits = Limits { engines_max: 1, query_hashes_max: 4, dumps_max: 0, ..Limits::default() };
    let listen = ListenLimits { body_bytes_max: 1000, ..ListenLimits::default() };
    let server = Server::with(limits, listen).await;
    fed(&server, "a").await;
    let check = async |method: &str, path: &str, body: Value, status: u16, code: &str| {
        let answer = server.ask(method, path, body).await;
        let found = answer.json["error"]["code"].as_str().map(ToOwned::to_owned);
        assert_eq!((answer.status.as_u16(), found.as_deref()), (status, Some(code)), "{}", answer.text);
    };
    check("POST", "/v1/query", json!({ "hashes": vec!["1"; 500] }), 413, "body_too_large").await;
    check("POST", "/v1/query", json!({ "hashes": vec!["1"; 5] }), 400, "too_many_values").await;
    check("POST", "/v1/engines", json!({ "name": "b", "model": "m" }), 429, "too_many_engines").await;
    check("GET", "/v1/dump", Value::Null, 429, "too_many_dumps").await;
    let mut grpc = server.grpc().await;
    let long = v1::QueryRequest { hashes: vec![1; 500], ..v1::QueryRequest::default() };
    let refused = soon(grpc.query(long)).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let dump = soon(grpc.dump(v1::DumpRequest::default())).await.map(|_| ()).unwrap_err();
    assert_eq!(dump.code(), Code::ResourceExhausted);
}
