//! `forebay profile` against engines of this program, each a process of its own that speaks as vLLM does.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use forebay_perf_model::{Profile, StepCoefficients, StepModel};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{Ran, Reply, Server, forebay, run};

/// A bound on hanging, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// `forebay engine sim`, which takes as long as it says.
struct Engine {
    child: Child,
    address: String,
}

impl Engine {
    fn start(key: Option<&str>) -> Self {
        let mut command = forebay(&["engine", "sim", "--port", "0", "--blocks", "1024"]);
        if let Some(key) = key {
            command.env("FOREBAY_ENGINE_API_KEY", key);
        }
        let mut child = command.stderr(Stdio::null()).spawn().expect("the binary runs");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it says where it is");
        let said: Value = serde_json::from_str(&line).expect("one line of JSON");
        Self { child, address: said["http"].as_str().expect("an address").to_owned() }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests that run there now.
    fn running(&self) -> f64 {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        let request = format!("GET /metrics HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.address);
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("text");
        let line = text.lines().find(|line| line.starts_with("vllm:num_requests_running"));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).expect("its gauge")
    }

    /// Someone else's request, which runs for half a minute or until this is dropped.
    fn occupy(&self) -> TcpStream {
        let body = r#"{"model":"sim","prompt":[11,12,13],"max_tokens":4000,"stream":true,"ignore_eos":true}"#;
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(request.as_bytes()).expect("it reads");
        until("it runs", || (self.running() >= 1.0).then_some(()));
        stream
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

fn until<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// A measurement under way that has said how long it will take; what it goes on to say is read at its end.
struct Measuring {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Measuring {
    fn start(arguments: &[&str]) -> Self {
        let mut child = forebay(&[&["profile"], arguments].concat()).spawn().expect("the binary runs");
        let mut stderr = BufReader::new(child.stderr.take().expect("it is piped"));
        let mut line = String::new();
        stderr.read_line(&mut line).expect("it says what it does");
        assert!(line.contains("Ctrl-C ends it"), "{line}");
        Self { child, stderr }
    }

    fn end(mut self) -> Ran {
        let mut err = String::new();
        self.stderr.read_to_string(&mut err).expect("text");
        Ran { err, ..Ran::from(self.child.wait_with_output().expect("it ends")) }
    }
}

#[test]
fn the_help_of_profile_has_examples() {
    insta::assert_snapshot!(run(&["profile", "-h"]).ok().out);
}

#[test]
fn an_engine_and_a_pair_are_measured_into_a_profile() {
    let (engine, other) = (Engine::start(None), Engine::start(None));
    let folder = tempfile::tempdir().expect("a folder of its own");
    let out = folder.path().join("sim.json").display().to_string();
    let ran = run(&[
        "profile",
        "--engine",
        &engine.url(),
        "--pair",
        &other.url(),
        "--prompt-tokens-max",
        "512",
        "--sequences-max",
        "4",
        "--minutes",
        "1",
        "--out",
        &out,
        "--about",
        "no machine",
        "--json",
    ])
    .ok();
    let document: Value = serde_json::from_str(&ran.out).expect("JSON");
    let text = std::fs::read_to_string(&out).expect("it was written");
    assert_eq!(
        serde_json::from_str::<Value>(&text).expect("JSON"),
        document["profile"],
        "the file is what was said"
    );
    let profile = Profile::parse(&text).expect("a profile");
    assert_eq!(profile.name(), "sim");
    assert!(profile.measured().contains("no machine; steps of 8192 tokens"), "{}", profile.measured());
    let kinds: Vec<_> =
        document["errors"].as_array().expect("a list").iter().map(|kind| &kind["kind"]).collect();
    assert_eq!(
        kinds,
        ["prefill", "cached prefix", "decode", "prefill beside decodes", "hand-over"],
        "{}",
        ran.out
    );

    // What the engine takes by itself; a machine that is busy makes it take longer, hardly shorter.
    let truth = StepModel::new(StepCoefficients::H100_8B);
    let step = profile.decode_step_seconds(2, 1_000) / truth.decode_step_seconds(2, 1_000);
    let prompt = profile.prefill_seconds(1_000, 0, 8_192) / truth.prefill_seconds(1_000, 0, 8_192);
    assert!((0.7..10.0).contains(&step) && (0.7..10.0).contains(&prompt), "{step}, {prompt}: {text}");

    // Whoever plans with it can read it.
    let simulated = run(&["simulate", "--workload", "fresh", "--seconds", "2", "--rate", "2", "--fleet", &{
        let fleet = folder.path().join("fleet.toml");
        std::fs::write(&fleet, format!("[[engine]]\nprofile = {out:?}\n")).expect("a folder of its own");
        fleet.display().to_string()
    }]);
    assert_eq!(simulated.code, 0, "{simulated:?}");
}

#[test]
fn engines_that_cannot_be_measured_are_named_with_what_to_do() {
    let check = |arguments: &[&str], code: i32, part: &str| {
        let ran = run(&[&["profile"], arguments].concat());
        assert_eq!(ran.code, code, "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(part), "{arguments:?}: {}", ran.err);
    };
    let gone =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("an address");
    check(&["--engine", &format!("http://{gone}")], 3, "nothing listens on that port; check that it runs");
    check(&["--engine", "sim"], 2, "give the URL of a running engine");
    check(&["--engine", "http://h", "--out", "/nowhere/p.json"], 2, "a folder that exists");
    check(&["--engine", "http://h", "--minutes", "0"], 2, "give minutes from");
    let models = Reply::json(r#"{"object":"list","data":[{"id":"m","object":"model"}]}"#);
    let texts = Server::with_pages(&[("GET /v1/models", models)]);
    check(&["--engine", &format!("openai={}", texts.url)], 1, "takes no prompts of token ids");
    let closed = Engine::start(Some("a-key"));
    check(&["--engine", &closed.url()], 1, "give its key (key_file or key_env)");
}

#[test]
fn an_engine_that_serves_others_is_left_alone() {
    let engine = Engine::start(None);
    let others = engine.occupy();
    let ran = run(&["profile", "--engine", &engine.url()]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.err.contains("serves others (1 request runs or waits)"), "{}", ran.err);
    assert!(ran.err.contains("--even-if-busy"), "{}", ran.err);
    drop(others);
}

#[test]
fn ctrl_c_cancels_what_runs_and_writes_no_profile() {
    let engine = Engine::start(None);
    let folder = tempfile::tempdir().expect("a folder of its own");
    let out = folder.path().join("sim.json");
    let measuring = Measuring::start(&["--engine", &engine.url(), "--out", out.to_str().expect("text")]);
    until("it measures", || (engine.running() >= 1.0).then_some(()));
    kill_process(Pid::from_child(&measuring.child), Signal::INT).expect("it measures");
    let ran = measuring.end();
    assert_eq!((ran.code, ran.out.as_str()), (130, ""), "{}", ran.err);
    assert!(ran.err.contains("sim.json was not written") && !out.exists(), "{}", ran.err);
    until("the engine is idle", || (engine.running() == 0.0).then_some(()));
}

#[test]
fn an_engine_that_dies_is_said_to_have_died() {
    let mut engine = Engine::start(None);
    let folder = tempfile::tempdir().expect("a folder of its own");
    let out = folder.path().join("sim.json");
    let measuring = Measuring::start(&["--engine", &engine.url(), "--out", out.to_str().expect("text")]);
    engine.child.kill().expect("it is ours");
    let ran = measuring.end();
    assert_eq!(ran.code, 1, "{}", ran.err);
    assert!(
        ran.err.contains("was lost") && ran.err.contains("measure again") && !out.exists(),
        "{}",
        ran.err
    );
}
