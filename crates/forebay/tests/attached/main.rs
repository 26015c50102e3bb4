//! Fleets of processes: engines in vLLM's dialect, attached by URL or brought by agents, behind `forebay serve`.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a test finds the model where the environment says, and prints the logs of what failed"
)]

mod processes;

use std::io::BufRead as _;

use serde_json::{Value, json};

use processes::{Agent, Engine, Gateway, MODEL, Process, ask, get, post, read, streamed, until};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Some 60 tokens: several KV blocks.
const PROMPT: &str = "A river begins as rain on a hill, gathers in brooks and streams, and runs down through valleys and \
                      plains, past mills and towns, until it is wide and slow and meets the sea, where its water is \
                      salt and its name is lost. The longest rivers of the world are";

fn completion(prompt: &str, max_tokens: u32) -> Value {
    json!({ "model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0 })
}

#[test]
fn attached_engines_answer_as_they_do_alone() {
    let (alone, engine) = (Engine::real("both"), Engine::real("both"));
    let gateway = Gateway::of(&[&engine.url()]);
    gateway.until_ready(1);
    let status = &gateway.engines()[0];
    assert_eq!(
        (status["kind"].as_str(), status["cache_sight"].as_str()),
        (Some("vllm"), Some("events")),
        "{status}"
    );
    let expected = ask(&alone.address, COMPLETIONS, &completion(PROMPT, 24)).text();
    assert_eq!(ask(&gateway.public, COMPLETIONS, &completion(PROMPT, 24)).text(), expected);
    let mut body = completion(PROMPT, 24);
    body["stream"] = true.into();
    assert_eq!(streamed(post(&gateway.public, COMPLETIONS, &body)), (expected, true));
    until("its KV events are indexed", || {
        (gateway.metric("forebay_rank_indexed_blocks") > 2.0).then_some(())
    });
    let again = ask(&gateway.public, COMPLETIONS, &completion(PROMPT, 4)).json();
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(16), "{again}");
    // Tools are the engine's to parse: the body goes as it came, and its answer comes back in its own words.
    let chat = json!({ "model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4,
                       "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}] });
    let passed = ask(&gateway.public, CHAT, &chat);
    assert_eq!(passed.status, 200, "{}", String::from_utf8_lossy(&passed.body));
    assert!(passed.json().get("system_fingerprint").is_some(), "an engine's own words: {}", passed.json());
}

#[test]
fn a_split_moves_kv_between_processes_and_changes_nothing() {
    let (prefill, decode) = (Engine::real("prefill"), Engine::real("decode"));
    let expected = ask(&Engine::real("both").address, COMPLETIONS, &completion(PROMPT, 24)).text();
    let (p, d) = (format!("{},role=prefill", prefill.url()), format!("{},role=decode", decode.url()));
    let gateway = Gateway::of(&[&p, &d]);
    gateway.until_ready(2);
    // Until the pair is warm there is no plan for a request.
    let answer = until("the pair is warm", || {
        let answer = ask(&gateway.public, COMPLETIONS, &completion(PROMPT, 24));
        (answer.status == 200).then_some(answer)
    });
    assert_eq!(answer.text(), expected);
    let moved = decode.metric("vllm:prompt_tokens_by_source_total", "external_kv_transfer");
    assert!(moved >= 32.0, "{moved} tokens moved");
    until("the prefill engine has let go of the KV", || {
        (prefill.metric("vllm:num_requests_running", "") == 0.0).then_some(())
    });
}

#[test]
fn an_answer_goes_on_when_its_engine_is_killed() {
    let engines = [Engine::real("both"), Engine::real("both")];
    let expected = ask(&Engine::real("both").address, COMPLETIONS, &completion(PROMPT, 400)).text();
    let gateway = Gateway::of(&[&engines[0].url(), &engines[1].url()]);
    gateway.until_ready(2);
    let mut body = completion(PROMPT, 400);
    body["stream"] = true.into();
    let mut reader = post(&gateway.public, COMPLETIONS, &body);
    // The head and the first event: it runs.
    while !reader.fill_buf().expect("it streams").windows(5).any(|bytes| bytes == b"data:") {}
    let busy = until("one of them runs it", || {
        engines.iter().position(|engine| engine.metric("vllm:num_requests_running", "") > 0.0)
    });
    let mut engines = engines;
    engines[busy].process.kill();
    let name = engines[busy].address.clone();
    assert_eq!(streamed(reader), (expected, true), "not a token is lost or repeated");
    assert!(gateway.metric("forebay_migrations_total") >= 1.0);
    until("it is out of the fleet", || {
        let states = gateway.engines();
        states.iter().any(|engine| engine["engine"] == *name && engine["state"] == "lost").then_some(())
    });
}

#[test]
fn without_a_tokenizer_text_is_passed_on_and_routed_by_what_was_sent() {
    let engine = Engine::start(&["--served-model-name", MODEL]);
    let gateway = Gateway::start(&["--engine", &engine.url()]);
    gateway.until_ready(1);
    let chat = json!({ "model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8,
                       "temperature": 0 });
    let (direct, through) = (ask(&engine.address, CHAT, &chat), ask(&gateway.public, CHAT, &chat));
    assert_eq!(through.text(), direct.text());
    until("what was routed is remembered", || {
        (gateway.metric("forebay_rank_indexed_blocks") > 0.0).then_some(())
    });
    let mut stream = chat.clone();
    stream["stream"] = true.into();
    assert_eq!(streamed(post(&gateway.public, CHAT, &stream)), (direct.text(), true));
    let mut bad = chat.clone();
    bad["max_tokens"] = json!("many");
    assert_eq!(ask(&gateway.public, CHAT, &bad).status, ask(&engine.address, CHAT, &bad).status);
    for field in ["kv_transfer_params", "bootstrap_room"] {
        let mut harmful = chat.clone();
        harmful[field] = json!({ "do_remote_prefill": true });
        let refused = ask(&gateway.public, CHAT, &harmful);
        assert_eq!(
            (refused.status, &refused.json()["error"]["code"]),
            (400, &json!("forbidden_parameter")),
            "{field}"
        );
    }
    assert_eq!(get(&engine.address, "/health").status, 200);
}

#[test]
fn doctor_says_what_it_found_and_what_is_missing() {
    let engine = Engine::start(&["--served-model-name", MODEL]);
    let (usable, text) = Process::run(&["doctor", "--engine", &engine.url()]);
    assert!(usable && text.contains("vllm, model smollm2, 1 rank"), "{text}");
    assert!(text.contains("no tokenizer"), "{text}");
    let closed =
        format!("http://{}", std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let (usable, text) = Process::run(&["doctor", "--engine", &closed]);
    assert!(!usable && text.contains("error"), "{text}");
}

#[test]
fn an_agent_may_die_and_its_engine_serves_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().to_str().expect("text");
    let model = processes::model();
    let mut gateway =
        Gateway::start(&["--engine", "none", "--tokenizer", &model, "--cluster-listen", "127.0.0.1:0"]);
    let join = gateway.cluster.clone().expect("it has a door");
    let engine = ["--model", &model, "--served-model-name", MODEL];
    let mut agent = Agent::start("a", "both", folder, &join, &engine);
    gateway.until_ready(1);
    let life = gateway.engines()[0]["incarnation"].clone();
    let expected = ask(&gateway.public, COMPLETIONS, &completion(PROMPT, 16)).text();
    agent.0.kill();
    until("nothing new goes there", || (gateway.engines()[0]["state"] == "silent").then_some(()));
    let agent = Agent::start("a", "both", folder, &join, &engine);
    gateway.until_ready(1);
    assert_eq!(gateway.engines()[0]["incarnation"], life, "the same life was adopted");
    assert_eq!(ask(&gateway.public, COMPLETIONS, &completion(PROMPT, 16)).text(), expected);
    // A gateway that comes later knows all of it, the cache included.
    gateway.process.kill();
    let gateway = Gateway::start(&["--engine", "none", "--tokenizer", &model, "--cluster-listen", &join]);
    gateway.until_ready(1);
    assert_eq!(gateway.engines()[0]["incarnation"], life);
    until("it has the cache from the agent", || {
        (gateway.metric("forebay_rank_indexed_blocks") > 2.0).then_some(())
    });
    let (asked, log) = Process::run(&["logs", "a", "--admin-url", &format!("http://{}", gateway.admin)]);
    assert!(asked && log.contains("engine_id"), "{log}");
    drop(agent);
    let (stopped, text) = Process::run(&["agent", "--stop-engine", "--name", "a", "--state-folder", folder]);
    assert!(stopped, "{text}");
    let gone = read(post(&gateway.public, COMPLETIONS, &completion(PROMPT, 1)));
    assert!(gone.status >= 400, "its engine has ended");
}
