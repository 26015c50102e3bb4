//! `forebay audit` against engines of this program, over real sockets.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Child, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use serde_json::{Value, json};

use crate::support::{Ran, Reply, Server, forebay, run};

/// A simulated engine with KV events, in real time sped up.
struct Engine {
    child: Child,
    address: String,
}

impl Engine {
    fn start(flags: &[&str]) -> Self {
        let arguments =
            [&["engine", "sim", "--port", "0", "--sim-speed", "20", "--blocks", "4096"], flags].concat();
        let mut child = forebay(&arguments).stderr(Stdio::null()).spawn().expect("the binary runs");
        let mut line = String::new();
        let out = child.stdout.take().expect("a pipe");
        BufReader::new(out).read_line(&mut line).expect("it says where it listens");
        let said: Value = serde_json::from_str(&line).expect("JSON");
        Self { child, address: said["http"].as_str().expect("an address").to_owned() }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn ask(&self, head: &str, body: &str) -> String {
        let mut connection = TcpStream::connect(&self.address).expect("it listens");
        let length = body.len();
        let request = format!(
            "{head} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        connection.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).expect("it answers");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer
    }

    fn complete(&self, prompt: &[u64], tokens: u64) {
        let body = json!({ "model": "sim", "prompt": prompt, "max_tokens": tokens, "ignore_eos": true });
        self.ask("POST /v1/completions", &body.to_string());
    }

    fn metric(&self, name: &str) -> f64 {
        let page = self.ask("GET /metrics", "");
        let lines = page.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

fn tokens(seed: u64, count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |index| 97 + (index * 7 + seed * 13 + index * index * (seed + 1)) % 26)
}

/// Prompts of a common beginning and an end of their own, sent in turns until somebody says that it is enough.
fn send(engines: &[Engine], client: u64, is_enough: &AtomicBool) -> u64 {
    let mut sent = 0;
    while !is_enough.load(Ordering::Relaxed) {
        let number = client * 100_000 + sent;
        let prompt: Vec<u64> = tokens(number % 2, 320).chain(tokens(number + 7, 100)).collect();
        engines[(sent % engines.len() as u64) as usize].complete(&prompt, 40);
        sent += 1;
    }
    sent
}

#[test]
fn a_fleet_is_audited_without_a_request_of_ours() {
    let engines = [Engine::start(&[]), Engine::start(&[])];
    let folder = tempfile::tempdir().expect("a folder of its own");
    let (report, record) = (folder.path().join("report.json"), folder.path().join("arrivals.jsonl"));
    let urls = engines.each_ref().map(Engine::url);
    let arguments = [
        "audit",
        "--engine",
        &urls[0],
        "--engine",
        &urls[1],
        "--minutes",
        "0.12",
        "--every",
        "200ms",
        "--seeds",
        "2",
        "--json",
        report.to_str().expect("text"),
        "--record",
        record.to_str().expect("text"),
    ];
    let is_enough = AtomicBool::new(false);
    let (audited, sent) = std::thread::scope(|scope| {
        let clients = [0, 1].map(|client| {
            scope.spawn({
                let (engines, is_enough) = (&engines, &is_enough);
                move || send(engines, client, is_enough)
            })
        });
        let audited = Ran::from(forebay(&arguments).output().expect("the binary runs"));
        is_enough.store(true, Ordering::Relaxed);
        (audited, clients.map(|client| client.join().expect("its requests are answered")).iter().sum::<u64>())
    });
    let audited = audited.ok();
    for word in ["measured", "as-seen", "round-robin", "forebay against as-seen"] {
        assert!(audited.out.contains(word), "{audited:?}");
    }
    let served: f64 = engines.iter().map(|engine| engine.metric("vllm:request_success_total")).sum();
    assert_eq!(served, sent as f64, "nobody else had anything generated");

    let report: Value =
        serde_json::from_str(&std::fs::read_to_string(&report).expect("it is there")).expect("JSON");
    let number = |pointer: &str| {
        let value = report.pointer(pointer).and_then(Value::as_f64);
        value.unwrap_or_else(|| panic!("no {pointer}: {report}"))
    };
    let (counted, by_events) = (number("/sight/requests"), number("/sight/by_events"));
    assert!((by_events / counted - 1.0).abs() < 0.15, "{report}");
    assert_eq!(number("/sight/blind_ranks"), 0.0);
    // The engines run at another speed than the profile's, but they share what they share.
    let (share, error) = (number("/measured/cached_share"), number("/error/cached_share"));
    assert!(share > 0.5 && error.abs() < 0.1, "{report}");
    assert_eq!(report["ways"].as_array().map(Vec::len), Some(3));

    let lines = std::fs::read_to_string(&record).expect("it is there");
    assert!((lines.lines().count() as f64 / counted - 1.0).abs() < 0.15, "{counted}");
    let trace = record.to_str().expect("text");
    let replayed = run(&["simulate", "--trace", trace, "--engines", "2", "--json", "-"]).ok();
    assert!(replayed.out.contains("cached_share"), "{replayed:?}");
}

#[test]
fn what_stands_in_the_way_of_an_audit_is_said() {
    let check = |arguments: &[&str], code: i32, part: &str| {
        let ran = run(&[&["audit"], arguments].concat());
        assert_eq!(ran.code, code, "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(part), "{arguments:?}: {}", ran.err);
    };
    check(&[], 2, "give `--engine http://HOST:PORT`");
    check(&["--engine", "sim:4"], 2, "give `--engine http://HOST:PORT`");
    check(&["--engine", "http://h", "--profile", "h100"], 1, "profiles built in are h100-llama8b");
    check(&["--engine", "http://h", "--profile", "h100x2-qwen3-30b-a3b"], 2, "step together");
    check(&["--engine", "http://h", "--minutes", "0"], 2, "above 0");
    // A port that nobody listens on: bound and let go.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let nobody = format!("http://{}", nobody.expect("an address"));
    check(&["--engine", &nobody], 3, "check that it runs");

    let models = r#"{"object": "list", "data": [{"id": "m", "object": "model"}]}"#;
    let mute = Server::with_pages(&[("GET /v1/models", Reply::json(models))]);
    check(&["--engine", &format!("openai={}", mute.url)], 1, "has no /metrics");

    let (one, other) = (Engine::start(&[]), Engine::start(&["--served-model-name", "another"]));
    check(
        &["--engine", &one.url(), "--engine", &other.url()],
        2,
        "audit the engines of each kind by themselves",
    );
    check(&["--engine", &one.url(), "--minutes", "0.01"], 1, "20 are needed");
}

#[test]
fn the_help_of_audit_has_examples() {
    insta::assert_snapshot!(run(&["audit", "-h"]).ok().out);
}
