//! Engines that refuse, die, fall silent or lie: each has its expected end, and none of it reaches a client as an answer.

use std::time::{Duration, Instant};

use forebay_engines::{Driver, Leg, LegEvent, Notice, StartError};

use crate::rig::*;

/// What became of a leg, and of the engine's reputation.
struct Outcome {
    events: String,
    last: LegEvent,
    notices: Vec<Notice>,
    in_trouble: bool,
}

/// Plays `script` as the answer to one leg of `[10, 11]` with up to 4 tokens.
async fn play<F: Future<Output = ()>>(plan: Plan, script: impl FnOnce(Line) -> F) -> (Outcome, Attached) {
    let mut double = Double::start().await;
    let attached = plan.attach(&double.url);
    let mut stream = attached.start(leg(1, &[10, 11], 4));
    let (_, line) = double.asked().await;
    script(line).await;
    let events = read(&mut stream).await;
    attached.idle().await;
    let outcome = Outcome {
        events: told(&events),
        last: events.last().cloned().expect("a last event"),
        notices: attached.notices(),
        in_trouble: attached.was_in_trouble().await,
    };
    (outcome, attached)
}

fn reason(event: &LegEvent) -> String {
    match event {
        LegEvent::Lost { reason } => reason.to_string(),
        LegEvent::Refused(error) => error.to_string(),
        other => panic!("{other:?} is no setback"),
    }
}

#[tokio::test]
async fn refusals_are_told_apart() {
    let check = async |plan: Plan, status: u16, body: &str, expected: &str, in_trouble: bool| {
        let (outcome, _) = play(plan, async |line| line.json(status, body).await).await;
        assert_eq!(outcome.events, expected, "{status} {body}");
        assert_eq!(outcome.in_trouble, in_trouble, "{status} {body}");
        outcome.notices
    };
    let said = |message: &str| format!(r#"{{"error":{{"message":"{message}","code":0}}}}"#);
    for status in [400, 404, 413, 422] {
        check(vllm(), status, &said("no"), &format!("rejected({status}, no)"), false).await;
    }
    check(vllm(), 429, "", "full", false).await;
    check(vllm(), 503, &said("The engine is currently busy"), "full", false).await;
    check(vllm(), 503, &said("shutting down"), "failed", true).await;
    check(vllm(), 500, &said("oops"), "failed", true).await;
    check(vllm(), 502, "<html>", "failed", true).await;
    check(vllm(), 405, "", "failed", false).await;
    check(vllm(), 204, "", "failed", false).await;
    // Whoever asked may be what killed it.
    check(vllm(), 500, &said("EngineDeadError: EngineCore encountered an issue"), "lost", true).await;
    let notices = check(vllm(), 401, &said("Unauthorized"), "failed", false).await;
    match &notices[..] {
        [Notice::Note(note)] => assert!(note.contains("refuses our key with status 401"), "{note}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_error_with_status_200_is_no_answer() {
    let error = r#"{"error":{"message":"no","type":"x","code":400}}"#;
    let in_stream = async |plan: Plan, before: Option<String>| {
        let script = async |mut line: Line| {
            line.events().await;
            if let Some(before) = before {
                line.event(&before).await;
            }
            line.event(error).await;
            line.done().await;
        };
        play(plan, script).await.0
    };
    let (document, _) = play(vllm(), async |line| line.json(200, error).await).await;
    assert_eq!(document.events, "failed", "vLLM checks requests before its head: this is its own failure");
    assert_eq!(in_stream(vllm(), None).await.events, "failed");
    assert_eq!(in_stream(sglang(), None).await.events, "rejected(400, no)", "SGLang checks them after");
    let late = in_stream(vllm(), Some(chunk(0, &[5], None))).await;
    assert_eq!(late.events, "started(0) 0@2=5 lost");
    assert!(reason(&late.last).contains("gave the answer up: no"), "{:?}", late.last);
    for notices in [document.notices, late.notices] {
        assert_eq!(notices, [], "an engine that says that it failed does not lie");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_lost() {
    let check = async |what: &str,
                       script: &dyn Fn(Line) -> futures::future::BoxFuture<'static, ()>,
                       expected: &str| {
        let (outcome, _) = play(vllm(), script).await;
        assert_eq!(outcome.events, expected, "{what}");
        assert!(outcome.in_trouble, "{what}: its observer should look");
        assert_eq!(outcome.notices, [], "{what}");
    };
    check("no byte", &|line| Box::pin(async move { drop(line) }), "lost").await;
    let half_head = |mut line: Line| -> futures::future::BoxFuture<'static, ()> {
        Box::pin(async move { line.raw(b"HTTP/1.1 200 OK\r\ncontent-").await })
    };
    check("half a head", &half_head, "lost").await;
    let half_stream = |mut line: Line| -> futures::future::BoxFuture<'static, ()> {
        Box::pin(async move {
            line.events().await;
            line.event(&chunk(0, &[5], None)).await;
            line.piece(b"data: {\"choi").await;
        })
    };
    check("half a stream", &half_stream, "started(0) 0@2=5 lost").await;
    let early_end = |mut line: Line| -> futures::future::BoxFuture<'static, ()> {
        Box::pin(async move {
            line.events().await;
            line.event(&chunk(0, &[5], None)).await;
            line.done().await;
        })
    };
    check("an end before the answer's", &early_end, "started(0) 0@2=5 lost").await;
    let clean_close = |mut line: Line| -> futures::future::BoxFuture<'static, ()> {
        Box::pin(async move {
            line.events().await;
            line.event(&chunk(0, &[5], None)).await;
            line.raw(b"0\r\n\r\n").await;
        })
    };
    check("a body that ends without an end", &clean_close, "started(0) 0@2=5 lost").await;
}

#[tokio::test]
async fn what_breaks_off_after_the_last_choice_harms_nothing() {
    let (outcome, _) = play(vllm(), async |mut line: Line| {
        line.events().await;
        line.event(&chunk(0, &[5, 2], Some("stop"))).await;
    })
    .await;
    assert_eq!(outcome.events, "started(0) 0@2=5 0@3=2 0:Stop ended");
}

#[tokio::test]
async fn silence_ends_at_the_deadline() {
    for begun in [false, true] {
        let mut double = Double::start().await;
        let attached = vllm().attach(&double.url);
        let deadline = Instant::now() + Duration::from_millis(300);
        let mut stream = attached.start(Leg { deadline, ..leg(1, &[10], 4) });
        let (_, mut line) = double.asked().await;
        if begun {
            line.events().await;
            line.event(&chunk(0, &[5], None)).await;
        }
        let events = read(&mut stream).await;
        assert_eq!(told(&events), if begun { "started(0) 0@1=5 lost" } else { "lost" });
        assert!(reason(events.last().expect("a last")).contains("did not end in time"));
        line.closed().await;
    }
}

#[tokio::test]
async fn an_engine_that_is_not_there_is_refused_and_looked_at() {
    let attached = vllm().attach(&nowhere().await);
    let events = read(&mut attached.start(leg(1, &[10], 4))).await;
    assert_eq!(told(&events), "failed");
    assert!(reason(&events[0]).contains("nothing listens"), "{}", reason(&events[0]));
    assert!(attached.was_in_trouble().await);
}

/// What an engine answers that cannot be true; nothing of it may pass, and nothing more goes there.
async fn check_lie(what: &str, plan: Plan, answer: Vec<Vec<u8>>, expected: &str, why: &str) {
    let script = async |mut line: Line| {
        line.events().await;
        for piece in answer {
            let mut bytes = format!("{:x}\r\n", piece.len()).into_bytes();
            bytes.extend_from_slice(&piece);
            bytes.extend_from_slice(b"\r\n");
            if !line.try_raw(&bytes).await {
                return; // it was found out
            }
        }
        line.closed().await;
    };
    let (outcome, attached) = play(plan, script).await;
    assert_eq!(outcome.events, expected, "{what}");
    match &outcome.notices[..] {
        [Notice::Fenced { why: said }] => {
            assert!(said.contains(why), "{what}: {said}");
            assert_eq!(reason(&outcome.last).trim_start_matches("the engine failed: "), &**said, "{what}");
            let refused = attached.engine.start(leg(2, &[10], 4)).err();
            assert_eq!(refused, Some(StartError::Failed { message: said.clone() }), "{what}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

fn events(data: &[String]) -> Vec<Vec<u8>> {
    data.iter().map(|data| format!("data: {data}\n\n").into_bytes()).collect()
}

#[tokio::test]
async fn an_engine_that_lies_is_fenced() {
    let check = async |what: &str, data: &[String], expected: &str, why: &str| {
        check_lie(what, vllm(), events(data), expected, why).await;
    };
    let text = r#"{"choices":[{"index":0,"text":"hello","finish_reason":null}]}"#.to_owned();
    check("text for tokens", &[text], "failed", "without token ids").await;
    let other = chunk(0, &[5], None).replace(r#""index":0"#, r#""index":0,"prompt_token_ids":[1,10,11]"#);
    check("another prompt", &[other], "failed", "another prompt").await;
    check("another length", &[usage(3, 0, 0)], "failed", "counts another prompt").await;
    check("another choice", &[chunk(1, &[5], None)], "failed", "choice 1").await;
    let more = [chunk(0, &[5, 6, 7], None), chunk(0, &[8, 9], None)];
    check("too much", &more, "started(0) 0@2=5 0@3=6 0@4=7 0@5=8 lost", "more than the 4 tokens").await;
    check("no token", &[chunk(0, &[50_000], None)], "failed", "not in the vocabulary").await;
    let after = [chunk(0, &[2], None), chunk(0, &[5], None)];
    check("past its stop", &after, "started(0) 0@2=2 lost", "a token that ends the answer").await;
    let end = [chunk(0, &[5], Some("length")), chunk(0, &[6], None)];
    check("past its end", &end, "started(0) 0@2=5 0:Length lost", "after the end").await;
    let odd = chunk(0, &[5], Some("because"));
    check("an unknown end", &[odd], "failed", "unknown reason").await;
    let miscounted = [chunk(0, &[5], Some("length")), usage(2, 0, 7), "[DONE]".to_owned()];
    check("a wrong count", &miscounted, "started(0) 0@2=5 0:Length lost", "counts 7 tokens where it sent 1")
        .await;
    check("no JSON", &["{{{".to_owned()], "failed", "no JSON").await;
    check(
        "a negative token",
        &[r#"{"choices":[{"token_ids":[-5]}]}"#.to_owned()],
        "failed",
        "unexpected shape",
    )
    .await;
}

#[tokio::test]
async fn garbage_on_the_stream_is_fenced() {
    check_lie("no text", vllm(), vec![b"data: \xff\xfe\n\n".to_vec()], "failed", "not UTF-8").await;
    let endless = vec![vec![b'x'; 256 * 1024]; 16];
    check_lie("a line without end", vllm(), endless, "failed", "longer than").await;
    let line = format!("data: {}\n", "x".repeat(200 * 1024));
    let endless = vec![line.into_bytes(); 16];
    check_lie("an event without end", vllm(), endless, "failed", "longer than").await;
    let count = r#"{"output_ids":[5],"meta_info":{"finish_reason":null,"completion_tokens":3}}"#;
    let contradiction = vec![format!("data: {count}\n\n").into_bytes()];
    check_lie("SGLang's counts", sglang(), contradiction, "failed", "do not add up").await;
}

#[tokio::test]
async fn a_stream_that_is_none_is_fenced() {
    let (outcome, _) = play(vllm(), async |line: Line| line.document(200, "text/html", "<html>").await).await;
    assert_eq!(outcome.events, "failed");
    assert!(matches!(&outcome.notices[..], [Notice::Fenced { why }] if why.contains("text/html")));
}
