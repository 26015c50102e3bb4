//! `forebay bench` against engines of this program, each a process of its own, and against scripted servers.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Ran, Reply, Server, forebay, run};

/// `forebay engine sim`, as fast as it can.
struct Engine {
    child: Child,
    url: String,
}

impl Engine {
    fn start() -> Self {
        let mut command = forebay(&["engine", "sim", "--port", "0", "--sim-speed", "0"]);
        let mut child = command.stderr(Stdio::null()).spawn().expect("the binary runs");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it says where it is");
        let said: Value = serde_json::from_str(&line).expect("one line of JSON");
        let url = format!("http://{}", said["http"].as_str().expect("an address"));
        Self { child, url }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

fn bench(arguments: &[&str]) -> Ran {
    run(&[&["bench"], arguments].concat())
}

/// The report of a run that went well.
fn measured(arguments: &[&str]) -> Value {
    let ran = bench(&[arguments, &["--json"]].concat()).ok();
    serde_json::from_str(&ran.out).expect("JSON")
}

fn models() -> Reply {
    Reply::json(r#"{"object":"list","data":[{"id":"m","object":"model"}]}"#)
}

fn answer() -> Reply {
    let piece = |text: &str| json!({"choices": [{"index": 0, "delta": {"content": text}}]}).to_string();
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 3,
                       "prompt_tokens_details": {"cached_tokens": 4}}});
    Reply::events("r", &[&piece("one"), &piece(" two"), &usage.to_string(), "[DONE]"])
}

/// A server with one model that answers every question with `reply`.
fn server(reply: Reply) -> Server {
    Server::start(move |request| match request.line.as_str() {
        "GET /v1/models" => models(),
        "POST /v1/chat/completions" => reply.clone(),
        other => Reply::json(&format!("\"{other}\"")).status(404),
    })
}

/// The bodies of all questions, in the order of their texts.
fn questions(server: &Server) -> BTreeSet<String> {
    let asked = server.requests().into_iter().filter(|request| request.line.starts_with("POST"));
    asked.map(|request| request.body).collect()
}

#[test]
fn the_help_of_bench_has_examples() {
    insta::assert_snapshot!(run(&["bench", "-h"]).ok().out);
}

#[test]
fn a_closed_loop_sends_so_many_and_counts_their_tokens() {
    let engine = Engine::start();
    let folder = tempfile::tempdir().expect("a folder of its own");
    let out = folder.path().join("bench.json").display().to_string();
    let arguments = ["--url", &engine.url, "--requests", "25", "--concurrency", "4", "--warmup", "3"];
    let watch = format!("engine={}", engine.child.id());
    let more = ["--output-tokens", "7", "--slo", "ttft=60s,itl=60s", "--watch", &watch, "--out", &out];
    let report = measured(&[&arguments[..], &more].concat());
    let written = std::fs::read_to_string(&out).expect("it was written");
    assert_eq!(serde_json::from_str::<Value>(&written).expect("JSON"), report, "the file is what was said");
    let target = &report["targets"][0];
    let figures = &target["figures"];
    assert_eq!((&figures["requests"], &figures["answered"]), (&json!(25), &json!(25)), "{report:#}");
    assert_eq!(figures["output_tokens"], 25 * 7, "{report:#}");
    assert_eq!(figures["errors"], json!({}));
    assert_eq!(figures["goodput"]["share"], 1.0);
    assert!(figures["ttft"]["p50"].is_number() && figures["itl"]["p99"].is_number(), "{report:#}");
    assert!(target["watched"][0]["peak_rss_bytes"].as_u64().expect("Linux says") > 0, "{report:#}");
}

#[test]
fn an_open_loop_of_conversations_sends_so_many() {
    let engine = Engine::start();
    let open = ["--url", &engine.url, "--requests", "20", "--rate", "500", "--output-tokens", "5"];
    let report = measured(&[&open[..], &["--turns", "3", "--shared-tokens", "40", "--groups", "2"]].concat());
    let figures = &report["targets"][0]["figures"];
    assert_eq!((&figures["answered"], &figures["output_tokens"]), (&json!(20), &json!(100)), "{report:#}");
    assert!(figures["lateness"]["p99"].is_number(), "{report:#}");
}

#[test]
fn a_server_against_itself_sees_no_prompt_twice() {
    let server = server(answer());
    let (requests, slices) = (["--requests", "4"], ["--slices", "3", "--warmup", "2"]);
    let report =
        measured(&[&["--url", &server.url, "--against", &server.url][..], &requests, &slices].concat());
    for target in report["targets"].as_array().expect("a list") {
        assert_eq!(target["slices"].as_array().expect("a list").len(), 3);
        let figures = &target["figures"];
        assert_eq!((&figures["requests"], &figures["output_tokens"]), (&json!(12), &json!(36)), "{report:#}");
        assert_eq!(figures["cached_share"], 0.4);
    }
    let compared = &report["comparison"][0]["second_over_first"];
    assert_eq!(compared["verdict"], "too_few_slices", "{report:#}");
    assert_eq!(questions(&server).len(), 2 * (12 + 2), "all bodies differ");
    let text = bench(&["--url", &server.url, "--against", &server.url, "--requests", "2"]).ok().out;
    assert!(text.contains("The second against the first") && text.contains("E2E P50"), "{text}");
}

#[test]
fn one_seed_sends_the_same_bytes() {
    let asked = |seed: &str| {
        let server = server(answer());
        let arguments = ["--url", &server.url, "--requests", "7", "--turns", "3", "--shared-tokens", "9"];
        measured(&[&arguments[..], &["--seed", seed, "--no-stream"]].concat());
        questions(&server)
    };
    let (one, same, other) = (asked("5"), asked("5"), asked("6"));
    assert_eq!(one.len(), 7);
    assert_eq!(one, same);
    assert!(one.is_disjoint(&other));
    let last = one.iter().max_by_key(|body| body.len()).expect("some");
    let last: Value = serde_json::from_str(last).expect("JSON");
    let roles: Vec<_> =
        last["messages"].as_array().expect("a list").iter().map(|message| &message["role"]).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant", "user"]);
    assert_eq!(last["messages"][2]["content"], "one two");
    assert_eq!((&last["ignore_eos"], &last["max_tokens"]), (&json!(true), &json!(64)));
}

#[test]
fn errors_are_counted_by_kind_with_the_first_message() {
    let check = |reply: Reply, kind: &str, part: &str| {
        let server = server(reply);
        let ran = bench(&["--url", &server.url, "--requests", "3", "--concurrency", "1", "--json"]);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.err.contains("answered no request"), "{}", ran.err);
        let report: Value = serde_json::from_str(&ran.out).expect("JSON");
        let error = &report["targets"][0]["figures"]["errors"][kind];
        assert_eq!(error["count"], 3, "{kind}: {}", ran.out);
        assert!(error["first_message"].as_str().expect("text").contains(part), "{kind}: {}", ran.out);
    };
    let refusal = Reply::json(r#"{"error":{"message":"slow down","code":"rate_limited"}}"#);
    check(refusal.status(429), "status 429", "slow down");
    let half = json!({"choices": [{"delta": {"content": "x"}}]}).to_string();
    check(Reply::events("r", &[&half]), "cut off", "[DONE]");
    let gone = r#"{"error":{"message":"the engine died"}}"#;
    check(Reply::events("r", &[&half, gone, "[DONE]"]), "error in the stream", "the engine died");
    check(Reply::json("7"), "strange", "no chat completion");
}

#[test]
fn ctrl_c_ends_it_and_prints_what_was_measured() {
    let half = json!({"choices": [{"delta": {"content": "x"}}]}).to_string();
    let server = server(Reply::events("r", &[&half]).then_hold());
    let arguments = ["bench", "--url", &server.url, "--requests", "5", "--concurrency", "1"];
    let child = forebay(&arguments).spawn().expect("the binary runs");
    while questions(&server).is_empty() {
        std::thread::park_timeout(Duration::from_millis(20));
    }
    kill_process(Pid::from_child(&child), Signal::INT).expect("it runs");
    server.client_hung_up();
    let ran = Ran::from(child.wait_with_output().expect("it ends"));
    assert_eq!(ran.code, 130, "{ran:?}");
    assert!(ran.out.contains("0 requests") && ran.out.contains("interrupted"), "{}", ran.out);
}

#[test]
fn bad_input_is_told_with_what_to_do() {
    let check = |arguments: &[&str], code: i32, part: &str| {
        let ran = bench(arguments);
        assert_eq!(ran.code, code, "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(part), "{arguments:?}: {}", ran.err);
        assert!(!ran.err.contains("panicked"), "{arguments:?}: {}", ran.err);
    };
    let gone =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("an address");
    check(&["--url", &format!("http://{gone}")], 3, "nothing answers at");
    check(&["--url", "https://h"], 2, "https is not available");
    check(&["--url", "http://h", "--rate", "0"], 2, "expected a number above 0");
    check(&["--url", "http://h", "--slo", "soon"], 2, "such as ttft=500ms");
    check(&["--url", "http://h", "--slo", "prefills=2"], 2, "give ttft and itl");
    check(&["--url", "http://h", "--slices", "3"], 2, "--against");
    check(&["--url", "http://h", "--out", "/nowhere/b.json"], 2, "a folder that exists");
    check(&["--url", "http://h", "--key-env", "NOWHERE"], 2, "the variable is not set");
    check(&["--url", "http://h", "--watch", "x=4194304"], 2, "no such process");
    let open = server(answer());
    check(&["--url", &open.url, "--model", "other"], 4, "give --model one of: m");
    let refusal = Reply::json(r#"{"error":{"message":"no key","code":null}}"#).status(401);
    let closed = Server::with_pages(&[("GET /v1/models", refusal)]);
    check(&["--url", &closed.url], 1, "give a key by the environment variable FOREBAY_API_KEY");
}
