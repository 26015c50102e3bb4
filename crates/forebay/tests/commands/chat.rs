//! `chat` against a scripted OpenAI-compatible server.

use std::io::{Read as _, Write as _};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Reply, Server, forebay, run, run_with_input};

const SPLIT: &str = include_str!("../fixtures/decision-split.json");

fn piece(text: &str) -> String {
    json!({"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]})
        .to_string()
}

fn usage() -> String {
    json!({"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43,
           "prompt_tokens_details": {"cached_tokens": 32}}})
    .to_string()
}

fn answer(text: &str) -> Reply {
    let (half, rest) = text.split_at(text.len() / 2);
    let end = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}).to_string();
    Reply::events("req-7f3a", &[&piece(half), &piece(rest), &end, &usage(), "[DONE]"])
}

fn models() -> Reply {
    Reply::json(
        r#"{"object":"list","data":[{"id":"first","object":"model"},{"id":"second","object":"model"}]}"#,
    )
}

/// A server with two models that answers every question with `reply`.
fn server(reply: Reply) -> Server {
    Server::start(move |request| match request.line.as_str() {
        "GET /v1/models" => models(),
        "POST /v1/chat/completions" => reply.clone(),
        "GET /fleet/v1/decisions/req-7f3a" => Reply::json(SPLIT),
        other => Reply::json(&format!("\"{other}\"")).status(404),
    })
}

/// The bodies of all questions that were asked.
fn questions(server: &Server) -> Vec<Value> {
    let asked = server.requests().into_iter().filter(|request| request.line.starts_with("POST"));
    asked.map(|request| serde_json::from_str(&request.body).expect("a question is JSON")).collect()
}

#[test]
fn one_question_prints_its_answer_and_nothing_else() {
    let server = server(answer("Hello, wörld"));
    let ran = run(&["chat", "-m", "hi", "--url", &server.url]).ok();
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("Hello, wörld\n", ""));
    assert_eq!(
        questions(&server),
        [json!({"model": "first", "messages": [{"role": "user", "content": "hi"}], "stream": true,
                "stream_options": {"include_usage": true}})]
    );
}

#[test]
fn flags_and_the_key_are_passed_on() {
    let server = server(answer("ok"));
    let url = format!("{}/v1", server.url);
    let arguments = [
        "chat",
        "-m",
        "-x",
        "--url",
        &url,
        "--model",
        "second",
        "--system",
        "brief",
        "--temperature",
        "0.5",
        "--max-tokens",
        "7",
        "--seed",
        "11",
        "--request-id",
        "mine",
    ];
    let output = forebay(&arguments).env("FOREBAY_API_KEY", "fbk-1").output().expect("the binary runs");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        questions(&server),
        [json!({"model": "second", "temperature": 0.5, "max_tokens": 7, "seed": 11, "stream": true,
                "stream_options": {"include_usage": true},
                "messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": "-x"}]})]
    );
    let requests = server.requests();
    assert_eq!(requests.len(), 1, "a named model needs no list");
    for header in ["authorization: Bearer fbk-1", "x-request-id: mine", "content-type: application/json"] {
        assert!(requests[0].head.iter().any(|line| line == header), "{header}: {:?}", requests[0].head);
    }
}

#[test]
fn a_dash_reads_the_question_from_standard_input() {
    let server = server(answer("ok"));
    run_with_input(&["chat", "-m", "-", "--url", &server.url], "line one\nline two\n").ok();
    assert_eq!(questions(&server)[0]["messages"][0]["content"], "line one\nline two\n");
}

#[test]
fn a_conversation_from_a_pipe_remembers_and_explains_itself() {
    let server = server(answer("Hello!"));
    let input = "/explain\none\n\ntwo\n/explain\n/rest\n/help\n/reset\nthree\n";
    let arguments = ["chat", "--url", &server.url, "--admin-url", &server.url];
    let ran = run_with_input(&arguments, input).ok();
    assert_eq!(ran.out, "Hello!\nHello!\nHello!\n");
    let asked: Vec<Vec<String>> = questions(&server)
        .iter()
        .map(|question| {
            let messages = question["messages"].as_array().expect("messages").iter();
            messages.map(|message| message["content"].as_str().expect("text").to_owned()).collect()
        })
        .collect();
    assert_eq!(asked, [vec!["one"], vec!["one", "Hello!", "two"], vec!["three"]]);
    for part in [
        "There is no request to explain yet.\n",
        "3 tokens, ",
        "32 of 40 prompt tokens cached, req-7f3a\n",
        "embedded-0 → embedded-1",
        "There is no /rest; did you mean /reset?\n",
        "/reset    forget the conversation\n",
        "The conversation is forgotten.\n",
    ] {
        assert!(ran.err.contains(part), "{part:?} in {}", ran.err);
    }
}

#[test]
fn a_question_without_an_answer_is_not_remembered() {
    let broken = r#"event: error
data: {"error":{"message":"the engine was lost after 1 tokens","type":"server_error","code":"engine_lost"}}"#;
    let server = server(Reply::events("r", &[&piece("Hel"), broken]));
    let ran = run_with_input(&["chat", "--url", &server.url], "one\ntwo\n").ok();
    assert_eq!(ran.out, "Hel\nHel\n");
    assert_eq!(ran.err.matches("error: the engine was lost after 1 tokens (code engine_lost)\n").count(), 2);
    assert_eq!(questions(&server)[1]["messages"].as_array().expect("messages").len(), 1);
}

#[test]
fn an_answer_that_breaks_is_a_failure() {
    let check = |reply: Reply, code: i32, out: &str, part: &str| {
        let server = server(reply);
        let ran = run(&["chat", "-m", "hi", "--url", &server.url]);
        assert_eq!((ran.code, ran.out.as_str()), (code, out), "{ran:?}");
        assert!(ran.err.contains(part), "{part} in {ran:?}");
    };
    let refusal = r#"{"error":{"message":"4 requests are in flight","code":"too_many"}}"#;
    check(Reply::events("r", &[&piece("Hel")]), 1, "Hel\n", "the stream closed without [DONE]");
    check(Reply::events("r", &["{]"]), 1, "", "no part of an answer");
    check(Reply::json(refusal).status(429), 1, "", "4 requests are in flight (status 429, code too_many)");
    check(Reply::json(refusal).status(401), 1, "", "FOREBAY_API_KEY");
    check(Reply::json(refusal).status(404), 4, "", "status 404");
    check(Reply::json("{}"), 1, "", "not a stream of events");
}

#[test]
fn a_server_without_models_is_told_apart() {
    let server = Server::with_pages(&[("GET /v1/models", Reply::json(r#"{"object":"list","data":[]}"#))]);
    let ran = run(&["chat", "-m", "hi", "--url", &server.url]);
    assert_eq!(ran.code, 4);
    assert!(ran.err.contains("serves no model now"), "{ran:?}");
}

#[test]
fn ctrl_c_cancels_the_answer_at_the_server_too() {
    let server = server(Reply::events("r", &[&piece("Hel")]).then_hold());
    let mut child = forebay(&["chat", "-m", "hi", "--url", &server.url]).spawn().expect("the binary runs");
    let mut out = child.stdout.take().expect("a pipe");
    let mut first = [0; 3];
    out.read_exact(&mut first).expect("the first piece");
    kill_process(Pid::from_child(&child), Signal::INT).expect("the chat lives");
    server.client_hung_up();
    assert_eq!(child.wait().expect("the binary ends").code(), Some(130));
}

#[test]
fn ctrl_c_in_a_conversation_stops_the_answer_and_not_the_conversation() {
    let server = Server::start(|request| match request.line.as_str() {
        "GET /v1/models" => models(),
        _ if request.body.contains("endless") => Reply::events("r", &[&piece("Hel")]).then_hold(),
        _ => answer("Bye"),
    });
    let mut child = forebay(&["chat", "--url", &server.url])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(b"endless\n").expect("the chat reads");
    let mut out = child.stdout.take().expect("a pipe");
    out.read_exact(&mut [0; 3]).expect("the first piece");
    kill_process(Pid::from_child(&child), Signal::INT).expect("the chat lives");
    server.client_hung_up();
    stdin.write_all(b"short\n").expect("the chat reads on");
    drop(stdin);
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("text");
    assert_eq!(rest, "\nBye\n");
    assert_eq!(child.wait().expect("the binary ends").code(), Some(0));
    let asked = questions(&server);
    assert_eq!(
        asked[1]["messages"],
        json!([{"role": "user", "content": "short"}]),
        "the stopped turn is forgotten"
    );
}
