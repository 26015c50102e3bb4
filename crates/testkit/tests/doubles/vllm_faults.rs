//! Ways in which a vLLM double misbehaves.

use std::time::{Duration, Instant};

use crate::common::{LONG, get, post};
use forebay_testkit::{Fault, VllmDouble, VllmOptions, client};
use http::Method;
use serde_json::{Value, json};

/// Long enough to tell that nothing comes.
const SILENCE: Duration = Duration::from_millis(150);

fn body(stream: bool) -> Value {
    json!({"prompt": "x", "max_tokens": 10, "temperature": 0, "ignore_eos": true, "stream": stream})
}

async fn with(fault: Fault) -> VllmDouble {
    let double = VllmDouble::start(VllmOptions::default()).await;
    double.control().inject(fault);
    double
}

async fn ask(double: &VllmDouble, stream: bool, timeout: Duration) -> std::io::Result<client::Answer> {
    client::send(Method::POST, &format!("{}/v1/completions", double.url()), &[], &body(stream), timeout).await
}

#[tokio::test]
async fn a_dead_process_refuses_and_breaks_connections() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let long = json!({"prompt": "x", "max_tokens": 4000, "ignore_eos": true, "stream": true});
    let url = format!("{}/v1/completions", double.url());
    let mut open = client::open(Method::POST, &url, &[], &long).await.unwrap();
    open.next().await.unwrap();
    double.control().die().await;
    let rest = async { while let Ok(Some(_)) = open.next().await {} };
    tokio::time::timeout(LONG, rest).await.expect("the stream breaks");
    let error = ask(&double, false, LONG).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(!double.alive());
    double.control().restart().await.unwrap();
    assert_eq!(ask(&double, false, LONG).await.unwrap().status, 200);
}

#[tokio::test]
async fn a_hanging_server_accepts_and_says_nothing() {
    let double = with(Fault::Hang).await;
    let error = ask(&double, false, SILENCE).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    double.control().heal();
    assert_eq!(ask(&double, false, LONG).await.unwrap().status, 200);
}

#[tokio::test]
async fn a_slamming_server_closes_at_once() {
    let double = with(Fault::CloseAfterAccept).await;
    let error = ask(&double, false, LONG).await.unwrap_err();
    assert_ne!(error.kind(), std::io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_black_hole_answers_errors_fast_and_looks_healthy() {
    let double = with(Fault::InternalError).await;
    let started = Instant::now();
    assert_eq!(ask(&double, true, LONG).await.unwrap().status, 500);
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(get(&double.url(), "/health").await.status, 200);
}

#[tokio::test]
async fn a_slow_engine_takes_its_time() {
    let options = VllmOptions { step: Duration::from_millis(2), ..VllmOptions::default() };
    let double = VllmDouble::start(options).await;
    double.control().inject(Fault::Slow { factor: 10.0 });
    let started = Instant::now();
    assert_eq!(ask(&double, false, LONG).await.unwrap().status, 200);
    assert!(started.elapsed() >= Duration::from_millis(200), "ten steps of 20 ms");
}

#[tokio::test]
async fn a_stream_stalls_in_the_middle() {
    let double = with(Fault::StallAfter { tokens: 3 }).await;
    let url = format!("{}/v1/completions", double.url());
    let mut open = client::open(Method::POST, &url, &[], &body(true)).await.unwrap();
    let mut text = String::new();
    while let Ok(piece) = tokio::time::timeout(SILENCE, open.next()).await {
        text += &String::from_utf8_lossy(&piece.unwrap().expect("it does not end"));
    }
    assert!(text.matches("data: ").count() >= 3 && !text.contains("[DONE]"));
}

#[tokio::test]
async fn a_stream_breaks_in_the_middle() {
    let double = with(Fault::CloseAfter { tokens: 3 }).await;
    let url = format!("{}/v1/completions", double.url());
    let mut open = client::open(Method::POST, &url, &[], &body(true)).await.unwrap();
    let broken = async {
        loop {
            match open.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a proper end"),
                Err(_) => return,
            }
        }
    };
    tokio::time::timeout(LONG, broken).await.unwrap();
    assert!(ask(&double, false, LONG).await.is_err(), "half a body, then nothing");
}

#[tokio::test]
async fn a_line_that_never_ends() {
    let double = with(Fault::EndlessLine).await;
    let url = format!("{}/v1/completions", double.url());
    let mut open = client::open(Method::POST, &url, &[], &body(true)).await.unwrap();
    let mut bytes = 0;
    while bytes < 4 << 20 {
        let piece = open.next().await.unwrap().expect("it does not end");
        assert!(!piece.contains(&b'\n'));
        bytes += piece.len();
    }
}

#[tokio::test]
async fn other_wrong_answers() {
    let double = with(Fault::InvalidUtf8).await;
    let answer = ask(&double, true, LONG).await.unwrap();
    assert!(std::str::from_utf8(&answer.body).is_err());
    double.control().inject(Fault::ErrorBody);
    let answer = ask(&double, true, LONG).await.unwrap();
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (200, &json!(500)));
    double.control().inject(Fault::WrongModel { name: "impostor".into() });
    assert_eq!(get(&double.url(), "/v1/models").await.json()["data"][0]["id"], json!("impostor"));
    double.control().inject(Fault::OtherTokenizer);
    let tokens = post(&double.url(), "/tokenize", &json!({"prompt": "ab"})).await.json();
    assert_eq!(tokens["tokens"], json!([98, 99]));
}

#[tokio::test]
async fn a_poison_prompt_kills_what_it_touches() {
    let options = VllmOptions { poison: Some("XYZZY".into()), ..VllmOptions::default() };
    let double = VllmDouble::start(options).await;
    let answer =
        post(&double.url(), "/v1/completions", &json!({"prompt": "say XYZZY now", "max_tokens": 5})).await;
    assert_eq!(answer.status, 500);
    assert!(!double.alive());
}

#[tokio::test]
async fn a_paused_engine_accepts_and_waits() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    double.control().pause();
    let asking = ask(&double, false, LONG);
    let resuming = async {
        double.wait_until(LONG, |double| double.gauges(0).waiting == 1).await;
        assert_eq!(double.counts(0).steps, 0);
        double.control().resume();
    };
    assert_eq!(tokio::join!(asking, resuming).0.unwrap().status, 200);
}

#[tokio::test]
async fn waiting_requests_go_by_priority_where_that_is_scheduled() {
    let options = VllmOptions { priority_scheduling: true, running_max: 1, ..VllmOptions::default() };
    let double = VllmDouble::start(options).await;
    double.control().pause();
    let order = parking_lot::Mutex::new(Vec::new());
    let asking = futures::future::join_all([5, 1, 3].map(|priority| {
        let (url, order) = (double.url(), &order);
        async move {
            let body = json!({"prompt": "x", "max_tokens": 3, "priority": priority});
            post(&url, "/v1/completions", &body).await;
            order.lock().push(priority);
        }
    }));
    let resuming = async {
        double.wait_until(LONG, |double| double.gauges(0).waiting == 3).await;
        double.control().resume();
    };
    tokio::join!(asking, resuming);
    assert_eq!(*order.lock(), [1, 3, 5]);
}

#[tokio::test]
async fn a_full_pool_preempts_and_still_answers_right() {
    let options = VllmOptions { blocks: 14, max_model_len: 200, ..VllmOptions::default() };
    let double = VllmDouble::start(options).await;
    let prompts = ["first of the two prompts", "second of the two prompts"];
    let answers = futures::future::join_all(prompts.map(|prompt| {
        let url = double.url();
        let body = json!({"prompt": prompt, "max_tokens": 120, "temperature": 0, "return_token_ids": true});
        async move { post(&url, "/v1/completions", &body).await.json() }
    }))
    .await;
    assert!(double.counts(0).preempted > 0);
    for (prompt, answer) in prompts.iter().zip(&answers) {
        let expected = forebay_testkit::continuation(1, &forebay_testkit::tokenizer::encode(prompt), 120);
        assert_eq!(crate::common::token_ids(answer), expected);
    }
}
