//! Engines that are followed: what they publish, how they fail, how they come back.

use forebay_engine_events::EngineEvent;
use forebay_testkit::{KvEventOptions, VllmDouble, VllmOptions, tokenizer};
use serde_json::json;

use super::rig::{Publisher, Server, removed, soon, stored};

#[tokio::test]
async fn what_an_engine_publishes_is_found() {
    let server = Server::start().await;
    let engine = Publisher::start(true).await;
    engine.publish(0, vec![stored(1, None), stored(2, Some(1))]).await;
    server.register("a", &engine).await;
    server.until_held(&[1, 2, 3], &[("a", 0, 2)]).await;
    server.until("ready", async |it| it.get("/ready").await.status, |status| *status == 200).await;
    engine.publish(1, vec![stored(3, Some(2)), removed(2)]).await;
    server.until_held(&[1, 2, 3], &[("a", 0, 1)]).await;
    engine.publish(2, vec![EngineEvent::Cleared, stored(1, None), stored(2, Some(1))]).await;
    server.until_held(&[1, 2, 3], &[("a", 0, 2)]).await;
    let state = server.until_state("a", "following").await;
    let rank = &state["ranks"][0];
    assert_eq!(
        (&rank["blocks"], &rank["batches_lost"], &state["restarts"]),
        (&json!(2), &json!(0), &json!(0))
    );
    assert!(rank["last_event_seconds"].as_f64().unwrap() < 60.0, "{rank}");
    let gone = server.ask("DELETE", "/v1/engines/a", "").await;
    assert_eq!(gone.status, 204);
    let query = json!({ "model": "m", "tokens": [1, 2, 3, 4] });
    assert_eq!(server.ask("POST", "/v1/query", query).await.json["error"]["code"], "model_not_found");
    assert_eq!(server.get("/v1/stats").await.json["index"]["ranks"], 0);
    server.stop().await;
}

#[tokio::test]
async fn a_gap_is_filled_by_a_replay() {
    let server = Server::start().await;
    let engine = Publisher::start(true).await;
    server.register("a", &engine).await;
    engine.publish(0, vec![stored(1, None)]).await;
    server.until_held(&[1, 2, 3], &[("a", 0, 1)]).await;
    engine.lose(1, vec![stored(2, Some(1))]).await;
    engine.publish(2, vec![stored(3, Some(2))]).await;
    server.until_held(&[1, 2, 3], &[("a", 0, 3)]).await;
    let state = server.until_state("a", "following").await;
    assert_eq!(state["ranks"][0]["batches_lost"], 0);
}

#[tokio::test]
async fn a_gap_that_no_replay_fills_makes_a_rank_stale_until_it_is_cleared() {
    let server = Server::start().await;
    let engine = Publisher::start(false).await;
    server.register("a", &engine).await;
    // Who subscribes is not told when that is done: what comes before is lost without a trace.
    let first = async {
        let mut number = 0;
        while server.held(&[1]).await.is_empty() {
            engine.publish(number, vec![EngineEvent::Cleared, stored(1, None)]).await;
            number += 1;
        }
        number
    };
    let number = soon(first).await;
    server.until_state("a", "following").await;
    engine.lose(number, vec![removed(1)]).await;
    engine.publish(number + 1, vec![stored(2, None)]).await;
    let state = server.until_state("a", "stale").await;
    assert!(state["detail"].as_str().unwrap().contains("lost"), "{state}");
    server.until_held(&[1], &[]).await;
    engine.publish(number + 2, vec![EngineEvent::Cleared, stored(1, None)]).await;
    server.until_state("a", "following").await;
    server.until_held(&[1], &[("a", 0, 1)]).await;
}

#[tokio::test]
async fn a_restarted_engine_has_nothing_of_its_old_life() {
    let server = Server::start().await;
    let engine = Publisher::start(true).await;
    engine.publish(0, vec![stored(1, None)]).await;
    engine.publish(1, vec![stored(2, Some(1))]).await;
    server.register("a", &engine).await;
    server.until_held(&[1, 2], &[("a", 0, 2)]).await;
    let before = server.engine("a").await["incarnation"].as_u64().unwrap();
    let engine = engine.restart().await;
    engine.publish(0, vec![stored(1, None)]).await;
    server.until_held(&[1, 2], &[("a", 0, 1)]).await;
    let state = server.until_state("a", "following").await;
    assert!(state["incarnation"].as_u64().unwrap() > before, "{state}");
    assert!(state["restarts"].as_u64().unwrap() >= 1, "{state}");
    assert_eq!(server.get("/v1/stats").await.json["index"]["ranks"], 1);
}

#[tokio::test]
async fn an_engine_out_of_reach_is_forgotten_after_the_lease() {
    let server = Server::start().await;
    let engine = Publisher::start(true).await;
    engine.publish(0, vec![stored(1, None)]).await;
    server.register("a", &engine).await;
    server.until_held(&[1], &[("a", 0, 1)]).await;
    drop(engine);
    server.until_state("a", "unreachable").await;
    server.until_held(&[1], &[]).await;
    let state = server.engine("a").await;
    assert_eq!(state["restarts"], 1, "{state}");
    assert_eq!(server.get("/ready").await.status, 200, "it was asked, and the state says what came of it");
}

#[tokio::test]
async fn an_engine_that_is_not_there_yet_is_found_when_it_comes() {
    let server = Server::start().await;
    let engine = Publisher::start(true).await;
    let (events, replay) = (engine.events.clone(), engine.replay.clone());
    let engine = {
        let gone = engine;
        let body = json!({ "name": "a", "model": "m", "events": events, "replay": replay });
        let restarted = gone.restart().await;
        assert_eq!(server.ask("POST", "/v1/engines", body).await.status, 201);
        restarted
    };
    engine.publish(0, vec![stored(1, None)]).await;
    server.until_held(&[1], &[("a", 0, 1)]).await;
}

/// A whole engine with a scheduler of its own and two ranks, as vLLM announces what it caches.
#[tokio::test]
async fn the_ranks_of_a_vllm_are_told_apart() {
    let server = Server::start().await;
    let options = VllmOptions { dp: 2, kv_events: Some(KvEventOptions::default()), ..VllmOptions::default() };
    let double = VllmDouble::start(options).await;
    let endpoints = double.event_endpoints();
    let events: Vec<_> = endpoints.iter().map(|it| &it.events).collect();
    let replay: Vec<_> = endpoints.iter().filter_map(|it| it.replay.as_ref()).collect();
    let body = json!({ "name": "v", "model": "double", "events": events, "replay": replay });
    assert_eq!(server.ask("POST", "/v1/engines", body).await.status, 201);
    let prompt = tokenizer::encode(&"a prompt of some length, and then some more of it ".repeat(3));
    let asked = json!({ "model": "double", "prompt": prompt, "max_tokens": 1, "ignore_eos": true });
    let url = format!("{}/v1/completions", double.url());
    let answer = soon(post(&url, &asked.to_string(), Some("1"))).await;
    assert_eq!(answer, 200);
    let query = json!({ "model": "double", "tokens": prompt });
    let found = server
        .until(
            "rank 1 holds it",
            async |it| it.ask("POST", "/v1/query", &query).await.json,
            |found| found["ranks"].as_array().is_some_and(|ranks| !ranks.is_empty()),
        )
        .await;
    assert_eq!(found["ranks"].as_array().unwrap().len(), 1, "{found}");
    let rank = &found["ranks"][0];
    assert_eq!((&rank["engine"], &rank["dp_rank"]), (&json!("v"), &json!(1)));
    assert!(rank["tokens"].as_u64().unwrap() + 32 > prompt.len() as u64, "{found}");
}

async fn post(url: &str, body: &str, rank: Option<&str>) -> u16 {
    use http_body_util::Full;
    use hyper_util::{client::legacy::Client, rt::TokioExecutor};
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<bytes::Bytes>>();
    let mut request = hyper::Request::post(url).header("content-type", "application/json");
    if let Some(rank) = rank {
        request = request.header("x-data-parallel-rank", rank);
    }
    let request = request.body(Full::new(bytes::Bytes::from(body.to_owned()))).unwrap();
    client.request(request).await.unwrap().status().as_u16()
}
