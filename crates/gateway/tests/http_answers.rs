//! What answers look like, whole and streamed, and how they end.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

mod http_support;

use axum::body::Body;
use forebay_gateway::orchestrator::api::{ResponseEvent, RouteError};
use forebay_types::{FinishReason, TokenId};
use futures::FutureExt;
use http_body_util::BodyExt;
use http_support::*;
use tower::ServiceExt;

fn bytes(choice: u32, bytes: &[u8]) -> Vec<ResponseEvent> {
    bytes.iter().map(|byte| token(choice, TokenId::from(*byte))).collect()
}

/// `bytes` on choice 0, then a good end at the token limit.
fn said(text: &[u8]) -> Vec<ResponseEvent> {
    let mut events = bytes(0, text);
    events.extend([finished(0, FinishReason::Length), done(12, 4, text.len() as u32)]);
    events
}

#[tokio::test]
async fn a_whole_chat_answer() {
    let reply = chat(&gateway(&Fake::saying(|_| answer("a \"b\"\n✓"))), "").await;
    assert_eq!(reply.header("content-type"), Some("application/json"));
    insta::assert_snapshot!(reply.body);
}

#[tokio::test]
async fn a_whole_completion_of_two_prompts_with_two_answers_each() {
    let fake = Fake::saying(|request| {
        let mut events = spoken(1, &format!("{}1", char::from(request.prompt[0] as u8)));
        events.extend(spoken(0, &format!("{}0", char::from(request.prompt[0] as u8))));
        events.push(done(1, 0, 6));
        events
    });
    let reply = complete(&gateway(&fake), r#""prompt":["A","B"],"n":2"#).await;
    insta::assert_snapshot!(reply.body);
}

#[tokio::test]
async fn a_streamed_chat_answer() {
    let gateway = gateway(&Fake::saying(|_| answer("hi ✓")));
    let plain = chat(&gateway, r#","stream":true"#).await;
    assert_eq!(plain.header("content-type"), Some("text/event-stream; charset=utf-8"));
    insta::assert_snapshot!("chat_stream", plain.events().join("\n"));
    let counted = chat(&gateway, r#","stream":true,"stream_options":{"include_usage":true}"#).await;
    insta::assert_snapshot!("chat_stream_with_usage", counted.events().join("\n"));
}

#[tokio::test]
async fn a_streamed_completion() {
    let gateway = gateway(&Fake::saying(|_| said(b"ok")));
    let reply =
        complete(&gateway, r#""prompt":"x","stream":true,"stream_options":{"include_usage":true}"#).await;
    insta::assert_snapshot!(reply.events().join("\n"));
}

#[tokio::test]
async fn log_probabilities_in_both_shapes() {
    let gateway = gateway(&Fake::saying(|_| {
        vec![
            token_with_logprobs(0, 0xc3, -0.5, &[(0xc3, -0.5), (65, f32::NEG_INFINITY)]),
            token_with_logprobs(0, 0xa9, -0.25, &[(0xa9, -0.25), (END, -3.0)]),
            token_with_logprobs(0, 66, 0.0, &[(66, 0.0), (67, -20.0)]),
            token_with_logprobs(0, END, -0.1, &[(END, -0.1)]),
            finished(0, FinishReason::Stop),
            done(3, 0, 4),
        ]
    }));
    let chat_whole = chat(&gateway, r#","logprobs":true,"top_logprobs":2"#).await;
    insta::assert_snapshot!("chat_logprobs", chat_whole.body);
    let chat_stream = chat(&gateway, r#","logprobs":true,"top_logprobs":2,"stream":true"#).await;
    insta::assert_snapshot!("chat_logprobs_stream", chat_stream.events().join("\n"));
    let text_whole = complete(&gateway, r#""prompt":"x","logprobs":2"#).await;
    insta::assert_snapshot!("completion_logprobs", text_whole.body);
    for reply in [chat_whole, text_whole] {
        reply.json();
    }
}

/// The text of choice 0 as the pieces of a stream, and why it ended.
async fn pieces(events: Vec<ResponseEvent>, more: &str) -> (Vec<String>, String) {
    let gateway = gateway(&Fake::saying(move |_| events.clone()));
    let reply = complete(&gateway, &format!(r#""prompt":"x","stream":true{more}"#)).await;
    let mut events = reply.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let mut reason = String::new();
    let mut texts = Vec::new();
    for event in events {
        let chunk: serde_json::Value = serde_json::from_str(&event).unwrap();
        let choice = &chunk["choices"][0];
        texts.push(choice["text"].as_str().unwrap().to_owned());
        if let Some(found) = choice["finish_reason"].as_str() {
            assert!(reason.is_empty(), "a choice finishes once");
            reason = found.to_owned();
        }
    }
    (texts, reason)
}

#[tokio::test]
async fn half_a_character_is_never_sent() {
    let check = async |text: &[u8], expected: &[&str]| assert_eq!(pieces(said(text), "").await.0, expected);
    check("é✓🦀".as_bytes(), &["é", "✓", "🦀", ""]).await;
    check(b"a\xf0\x9f\xa6", &["a", "\u{fffd}"]).await;
    check(b"\xff\xe2b", &["\u{fffd}", "\u{fffd}b", ""]).await;
}

#[tokio::test]
async fn stop_strings_end_an_answer_wherever_tokens_cut_them() {
    let check = async |text: &str, stop: &str, expected: &[&str], reason: &str| {
        let (texts, found) = pieces(said(text.as_bytes()), &format!(r#","stop":{stop}"#)).await;
        assert_eq!(
            (texts, found.as_str()),
            (expected.iter().map(|text| text.to_string()).collect(), reason),
            "{stop}"
        );
    };
    check("one STOP two", r#""STOP""#, &["o", "n", "e", " ", ""], "stop").await;
    check("abcabd", r#"["abd"]"#, &["abc", ""], "stop").await;
    check("SToo", r#""STOP""#, &["STo", "o", ""], "length").await;
    check("xST", r#""STOP""#, &["x", "ST"], "length").await;
    check("a✓b", r#""✓""#, &["a", ""], "stop").await;
    check("ab", r#"["zz","b","ab"]"#, &[""], "stop").await;
}

#[tokio::test]
async fn a_stop_string_ends_its_choice_in_the_fleet() {
    let (fake, senders) = Fake::by_hand();
    let gateway = gateway(&fake);
    let request = post("/v1/completions", r#"{"model":"tiny","prompt":"x","n":2,"stop":"!"}"#);
    let asking = tokio::spawn(ask(gateway.public_router(), request));
    let sender = next_sender(&senders).await;
    sender.send([token(0, 65), token(1, 33), token(1, 66)]);
    let feedback = std::future::poll_fn(|cx| sender.poll_feedback(cx)).await;
    assert_eq!(feedback, forebay_gateway::orchestrator::api::Feedback::StopMatched { choice: 1 });
    sender.send([
        token(1, 67),
        finished(1, FinishReason::Length),
        finished(0, FinishReason::Length),
        done(1, 0, 4),
    ]);
    let reply = asking.await.unwrap().json();
    let texts = [0, 1].map(|choice| {
        let choice = &reply["choices"][choice];
        (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
    });
    assert_eq!(texts, [("A".to_owned(), "length".to_owned()), (String::new(), "stop".to_owned())]);
    assert_eq!(reply["usage"]["completion_tokens"], 2, "only what was delivered counts");
}

#[tokio::test]
async fn failures_before_the_first_token_have_a_status() {
    let lost = RouteError::LostUnanswered { attempts: 2 };
    for stream in ["", r#","stream":true"#] {
        let error = lost.clone();
        let fake = Fake::saying(move |_| vec![ResponseEvent::Failed(error.clone())]);
        let reply = chat(&gateway(&fake), stream).await;
        assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (503, Some("1")));
        assert_eq!(reply.json()["error"]["code"], "engine_lost");
    }
    // Arrived together: nothing was sent yet, so the status still tells it.
    let error = RouteError::LostMidStream { tokens_sent: 1 };
    let fake = Fake::saying(move |_| vec![token(0, 65), ResponseEvent::Failed(error.clone())]);
    assert_eq!(chat(&gateway(&fake), r#","stream":true"#).await.status, 503);
}

#[tokio::test]
async fn a_stream_that_fails_ends_with_an_error_event_and_no_done() {
    let (fake, senders) = Fake::by_hand();
    let (gateway, metrics) = Setup::default().gateway(&fake);
    let router = gateway.public_router();
    let request = post("/v1/completions", r#"{"model":"tiny","prompt":["a","b"],"stream":true}"#);
    let asking = tokio::spawn(router.oneshot(request));
    while senders.lock().len() < 2 {
        tokio::task::yield_now().await;
    }
    let senders = std::mem::take(&mut *senders.lock());
    senders[1].send([token(0, 65)]);
    let response = asking.await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    senders[0].send([ResponseEvent::Failed(RouteError::LostMidStream { tokens_sent: 1 })]);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    insta::assert_snapshot!(String::from_utf8(body.to_vec()).unwrap());
    client_gone(&senders[1]).await;
    assert!(metrics.render(&[]).contains("endpoint=\"completions\",outcome=\"refused\"} 1\n"));
    assert_eq!(gateway.live_requests(), 0);
}

#[tokio::test]
async fn a_response_that_vanishes_or_lies_is_an_internal_error() {
    let check = async |events: Vec<ResponseEvent>, detail: &str| {
        let fake = Fake::saying(move |_| events.clone());
        let reply = complete(&gateway(&fake), r#""prompt":"x""#).await;
        assert_eq!(
            (reply.status.as_u16(), reply.json()["error"]["code"].as_str()),
            (500, Some("internal_error"))
        );
        assert!(reply.body.contains(detail), "{}", reply.body);
    };
    check(vec![], "ended without a result").await;
    check(vec![token(0, 65)], "ended without a result").await;
    check(vec![token(3, 65)], "choice 3 of 1").await;
    check(vec![token(0, 65), done(1, 0, 1)], "before its choice 0 did").await;
}

/// A body's frames are what hyper writes. It joins those that are ready into one write, so between two tokens the body
/// must say once that nothing is ready.
#[tokio::test]
async fn each_token_is_a_write_of_its_own() {
    let gateway = gateway(&Fake::saying(|_| answer("abc")));
    let request = post("/v1/completions", r#"{"model":"tiny","prompt":"x","stream":true}"#);
    let mut body: Body = gateway.public_router().oneshot(request).await.unwrap().into_body();
    let mut writes = vec![String::new()];
    loop {
        match body.frame().now_or_never() {
            None => writes.push(String::new()),
            Some(None) => break,
            Some(Some(frame)) => {
                let data = frame.unwrap().into_data().unwrap();
                writes.last_mut().unwrap().push_str(std::str::from_utf8(&data).unwrap());
            }
        }
    }
    let events: Vec<usize> = writes.iter().map(|write| write.matches("data: ").count()).collect();
    assert_eq!(events, [1, 1, 3], "a, b, then c with the finish and [DONE]: {writes:#?}");
}

#[tokio::test]
async fn metrics_tell_what_was_delivered() {
    let (gateway, metrics) = Setup::default().gateway(&Fake::saying(|_| answer("abcd")));
    chat(&gateway, r#","stream":true"#).await;
    chat(&gateway, "").await;
    let text = metrics.render(&[]);
    for line in [
        "forebay_requests_total{model=\"tiny\",endpoint=\"chat_completions\",outcome=\"ok\"} 2\n",
        "forebay_requests_in_flight 0\n",
        "forebay_ttft_seconds_count{model=\"tiny\"} 2\n",
        "forebay_itl_seconds_count{model=\"tiny\"} 8\n",
        "forebay_e2e_seconds_count{model=\"tiny\"} 2\n",
        "forebay_prompt_tokens_total{model=\"tiny\"} 24\n",
        "forebay_cached_tokens_total{model=\"tiny\"} 8\n",
        "forebay_output_tokens_total{model=\"tiny\"} 10\n",
        "forebay_disconnects_total 0\n",
    ] {
        assert!(text.contains(line), "{line}{text}");
    }
}
