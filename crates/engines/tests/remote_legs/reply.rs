//! Answers in the engine's own words.

use std::time::Duration;

use forebay_engines::{Driver, LegEvent, Notice, Reply, StartError, remote::RemoteLimits};
use tokio::time::timeout;

use crate::rig::*;

const CHAT: &str = r#"{"model":"model","messages":[],"stream":true}"#;

async fn begin(plan: Plan, json: &str, streams: bool) -> (Attached, forebay_engines::LegStream, Asked, Line) {
    let mut double = Double::start().await;
    let attached = plan.attach(&double.url);
    let stream = attached.start(client_leg(1, json, streams));
    let (asked, line) = double.asked().await;
    (attached, stream, asked, line)
}

fn delta(text: &str) -> String {
    format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}"#)
}

/// The bytes of the answer.
fn bytes(events: &[LegEvent]) -> String {
    let data = events.iter().filter_map(|event| match event {
        LegEvent::Reply(Reply::Data(data)) => Some(&data[..]),
        _ => None,
    });
    String::from_utf8(data.flatten().copied().collect()).expect("text")
}

#[tokio::test]
async fn a_stream_is_passed_on_byte_for_byte() {
    let (attached, mut stream, asked, mut line) = begin(vllm(), CHAT, true).await;
    assert_eq!(asked.path, "/v1/chat/completions");
    let expected = r#"{"model":"served","messages":[],"stream":true,"cache_salt":"tenant"}"#;
    assert_eq!(std::str::from_utf8(&asked.body), Ok(expected));
    let usage = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}}"#;
    let whole = format!(
        ": ping\n\ndata: {}\r\n\r\nevent: x\ndata: {}\n\ndata: {usage}\n\ndata: [DONE]\n\n",
        delta("a"),
        delta("ä")
    );
    line.events().await;
    for piece in whole.as_bytes().chunks(17) {
        line.piece(piece).await;
    }
    line.raw(b"0\r\n\r\n").await;
    let events = read(&mut stream).await;
    assert_eq!(bytes(&events), whole);
    let told = told(&events);
    assert!(told.starts_with("started(0) head(200, text/event-stream; charset=utf-8) data("), "{told}");
    assert!(told.ends_with("usage(9,4,2) ended"), "{told}");
    for event in &events {
        if let LegEvent::Reply(Reply::Data(data)) = event {
            let ends: [&[u8]; 4] = [b"\n\n", b"\r\n\r\n", b"\r\n\r", b"\n"];
            // A line feed alone ends the carriage return before it, which came in an earlier piece.
            assert!(
                ends[..3].iter().any(|end| data.ends_with(end)) || data == ends[3],
                "whole events: {data:?}"
            );
        }
    }
    assert_eq!(attached.notices(), []);
}

#[tokio::test]
async fn what_comes_at_once_is_passed_on_together_and_whole() {
    let (attached, mut stream, _, mut line) = begin(vllm(), CHAT, true).await;
    line.events().await;
    line.events_at_once((0..500).map(|number| delta(&number.to_string()))).await;
    let events = read(&mut stream).await;
    let whole: String = (0..500).map(|number| format!("data: {}\n\n", delta(&number.to_string()))).collect();
    assert_eq!(bytes(&events), format!("{whole}data: [DONE]\n\n"));
    assert!(events.len() < 100, "{} events for 501 pieces", events.len());
    attached.idle().await;
}

#[tokio::test]
async fn a_document_is_passed_on_whole() {
    let (_attached, mut stream, _, line) = begin(vllm(), r#"{"messages":[]}"#, false).await;
    let body = r#"{"choices":[{"message":{"content":"the \"error\" is"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}"#;
    line.json(200, body).await;
    let events = read(&mut stream).await;
    assert_eq!(bytes(&events), body);
    let told = told(&events);
    assert!(told.starts_with("started(0) head(200, application/json) data("), "{told}");
    assert!(told.ends_with("usage(3,0,1) ended"), "{told}");
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_the_clients_to_read() {
    for status in [400, 404, 405, 409, 413, 415, 422] {
        let (attached, mut stream, _, line) = begin(vllm(), CHAT, true).await;
        line.json(status, r#"{"error":{"message":"no"}}"#).await;
        let expected =
            format!(r#"head({status}, application/json) data("{{\"error\":{{\"message\":\"no\"}}}}") ended"#);
        assert_eq!(told(&read(&mut stream).await), expected);
        assert_eq!(attached.notices(), []);
    }
    // The same, said inside a stream that was to begin: SGLang does.
    let (_attached, mut stream, _, mut line) = begin(sglang(), CHAT, true).await;
    line.events().await;
    line.piece(b": ping\n\n").await;
    line.event(r#"{"error":{"message":"no","code":400}}"#).await;
    line.done().await;
    let expected =
        r#"head(400, application/json) data("{\"error\":{\"message\":\"no\",\"code\":400}}") ended"#;
    assert_eq!(told(&read(&mut stream).await), expected);
}

#[tokio::test]
async fn what_is_wrong_with_the_engine_is_not() {
    let check = async |status: u16, body: &str, expected: &str| {
        let (attached, mut stream, _, line) = begin(vllm(), CHAT, true).await;
        line.json(status, body).await;
        assert_eq!(told(&read(&mut stream).await), expected, "{status} {body}");
        attached
    };
    check(500, "", "failed").await;
    check(429, "", "full").await;
    check(503, r#"{"error":"The request queue is full."}"#, "full").await;
    check(408, "", "failed").await;
    let attached = check(403, "", "failed").await;
    assert!(matches!(&attached.notices()[..], [Notice::Note(_)]));
    let attached = check(200, r#"{"error":{"message":"dead","code":500}}"#, "failed").await;
    assert!(attached.was_in_trouble().await);
}

#[tokio::test]
async fn a_stream_that_fails_midway_passes_its_whole_events_and_no_more() {
    let cut: [(&str, &[u8]); 4] = [
        ("half an event", b"data: {\"cho"),
        ("a complaint", b"data: {\"error\":{\"message\":\"dead\",\"code\":500}}\n\ndata: [DONE]\n\n"),
        ("no text", b"data: \xff\n\n"),
        ("nothing", b""),
    ];
    for (what, rest) in cut {
        let (_attached, mut stream, _, mut line) = begin(vllm(), CHAT, true).await;
        line.events().await;
        line.event(&delta("a")).await;
        let before = read_until(&mut stream, |event| matches!(event, LegEvent::Reply(Reply::Data(_)))).await;
        if !rest.is_empty() {
            line.piece(rest).await;
        }
        drop(line);
        let after = read(&mut stream).await;
        assert_eq!(bytes(&before), format!("data: {}\n\n", delta("a")), "{what}");
        assert_eq!(told(&after), "lost", "{what}");
    }
}

#[tokio::test]
async fn a_body_of_events_without_their_end_is_lost() {
    let (_attached, mut stream, _, mut line) = begin(vllm(), CHAT, true).await;
    line.events().await;
    line.event(&delta("a")).await;
    line.raw(b"0\r\n\r\n").await;
    assert!(told(&read(&mut stream).await).ends_with(") lost"));
}

#[tokio::test]
async fn an_engine_without_a_route_for_tokens_takes_words_alone() {
    let mut plan = vllm();
    plan.speech.tokens = None;
    let text = plan.attach(&nowhere().await);
    assert_eq!(text.engine.start(leg(1, &[1], 1)).err(), Some(StartError::WrongForm));
    assert!(text.engine.start(client_leg(1, "{}", false)).is_ok());
}

#[tokio::test]
async fn a_document_beyond_the_limit_is_no_answer() {
    let mut plan = vllm();
    plan.limits = RemoteLimits { answer_bytes_max: 1000, ..plan.limits };
    let (_attached, mut stream, _, line) = begin(plan, "{}", false).await;
    line.json(200, &format!(r#"{{"choices":"{}"}}"#, "x".repeat(2000))).await;
    assert_eq!(told(&read(&mut stream).await), "failed");
}

#[tokio::test]
async fn a_slow_client_holds_the_engine_up_instead_of_filling_memory() {
    const MOST: usize = 64 << 20;
    let mut plan = vllm();
    plan.limits = RemoteLimits { reply_pieces_max: 4, ..plan.limits };
    let (_attached, mut stream, _, mut line) = begin(plan, CHAT, true).await;
    line.events().await;
    let event = format!("data: {}\n\n", delta(&"x".repeat(16 * 1024)));
    let mut sent = 0;
    // Until the sockets are full: nobody reads the leg.
    while sent < MOST && timeout(Duration::from_millis(500), line.piece(event.as_bytes())).await.is_ok() {
        sent += event.len();
    }
    assert!(sent < MOST, "all was taken");
    let read = read_until(&mut stream, |event| matches!(event, LegEvent::Reply(Reply::Data(_)))).await;
    assert!(bytes(&read).len() < 4 << 20, "{} bytes waited", bytes(&read).len());
}
