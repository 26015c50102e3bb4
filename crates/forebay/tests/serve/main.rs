//! `forebay serve` as a process: ready, asked, stopped, and told wrong things.

#[cfg(target_os = "linux")]
mod bad_input;
mod rig;

use std::{io::Read, net::TcpListener, process::Output, time::Instant};

use rig::{PATIENCE, Serving, forebay};

fn refused(flags: &[&str]) -> Output {
    let output = forebay().arg("serve").args(flags).output().expect("the binary runs");
    assert!(!output.status.success());
    output
}

#[test]
fn a_stream_that_runs_at_sigterm_is_finished_and_the_exit_code_is_0() {
    let mut serving = Serving::start(&["--engine", "sim:2", "--sim-speed", "5"]);
    let mut stream = serving.chat(
        r#"{"model":"sim","messages":[{"role":"user","content":"hello"}],"max_tokens":400,"stream":true}"#,
    );
    let mut begun = [0; 600];
    stream.read_exact(&mut begun).expect("it streams");
    serving.terminate();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).expect("it streams to the end");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    let status = serving.child.wait().expect("it ends");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_request_can_be_explained_and_counted_afterwards() {
    let serving = Serving::start(&["--engine", "sim:1,role=prefill", "--engine", "sim:1,role=decode"]);
    let mut answer = String::new();
    let body = r#"{"model":"sim","messages":[{"role":"user","content":"hello"}],"max_tokens":8}"#;
    serving.chat(body).read_to_string(&mut answer).expect("it is text");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("x-request-id: asked"), "{answer}");
    let admin = format!("http://{}", serving.admin);
    let run = |arguments: &[&str]| {
        let output =
            forebay().args(arguments).args(["--admin-url", &admin]).output().expect("the binary runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("it is text")
    };
    let explained = run(&["explain", "asked"]);
    for expected in ["sim-0 → sim-1", "prefill", "decode", "KV transfers", "finished"] {
        assert!(explained.contains(expected), "no `{expected}` in:\n{explained}");
    }
    assert!(run(&["explain", "--last", "--json"]).contains("\"transfers\""));
    assert!(run(&["status"]).contains("sim-1"));
    let metrics = serving.get(&serving.admin, "/metrics");
    assert!(metrics.contains("forebay_transfers_total{outcome=\"done\"} 1"), "{metrics}");
}

#[test]
fn real_kv_moves_between_embedded_engines_of_random_weights() {
    let serving = Serving::start(&[
        "--model",
        "random-tiny",
        "--engine",
        "embedded:1,role=prefill",
        "--engine",
        "embedded:1,role=decode",
    ]);
    let ask = || {
        let mut answer = String::new();
        let body = r#"{"model":"random-tiny","messages":[{"role":"user","content":"What is a forebay?"}],
                       "max_tokens":24,"temperature":0}"#;
        serving.chat(body).read_to_string(&mut answer).expect("it is text");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let text = answer.split_once("\"content\":").expect("an answer").1.to_owned();
        text.split_once(",\"refusal\"").expect("its end").0.to_owned()
    };
    assert_eq!(ask(), ask(), "the same question, the second time from the cache");
    let decisions = serving.get(&serving.admin, "/fleet/v1/decisions");
    assert!(decisions.contains("\"outcome\":\"done\""), "{decisions}");
}

#[test]
fn a_thousand_clients_that_hang_up_leave_nothing_behind() {
    let serving = Serving::start(&[
        "--engine",
        "sim:2",
        "--engine",
        "sim:1,role=prefill",
        "--engine",
        "sim:1,role=decode",
        "--sim-speed",
        "50",
        "--kv-lease-seconds",
        "600s",
    ]);
    let mut state = 3_u64;
    let mut draw = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for number in 0..1000 {
        let words = "river ".repeat(draw(60) as usize);
        let body = format!(
            r#"{{"model":"sim","messages":[{{"role":"user","content":"{words}{}"}}],"max_tokens":200,"n":{},"stream":true}}"#,
            number % 7,
            1 + draw(2)
        );
        let mut stream = serving.chat(&body);
        // Some hang up before the answer begins, the others somewhere in it.
        let mut some = vec![0; draw(4) as usize * 700];
        if !some.is_empty() {
            let _ = stream.read(&mut some).expect("an answer begins");
        }
    }
    let began = Instant::now();
    loop {
        let engines = serving.get(&serving.admin, "/fleet/v1/engines");
        let body = engines.split_once("\r\n\r\n").expect("a body").1;
        let engines: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let engines = engines["data"].as_array().expect("a list").clone();
        let quiet = engines.iter().all(|engine| {
            let load = &engine["load"];
            load["running"] == 0 && load["waiting"] == 0 && load["blocks_free"] == load["blocks_total"]
        });
        let metrics = serving.get(&serving.admin, "/metrics");
        if quiet && metrics.contains("forebay_requests_in_flight 0") {
            let counted = metrics.lines().find_map(|line| line.strip_prefix("forebay_disconnects_total "));
            let left: u32 = counted.expect("it is counted").parse().expect("a number");
            assert!(left > 250, "only {left} of 1000 hung up before the end");
            break;
        }
        assert!(began.elapsed() < PATIENCE, "never quiet: {engines:#?}");
        std::thread::yield_now();
    }
}

#[test]
fn a_busy_port_a_missing_model_and_a_wrong_setting_say_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("it is bound").to_string();
    let check = |flags: &[&str], expected: &[&str]| {
        let output = refused(flags);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        for expected in expected {
            assert!(text.contains(expected), "no `{expected}` in: {text}");
        }
        assert!(!text.contains("panicked"), "{text}");
    };
    check(&["--engine", "sim", "--listen", &address], &[&address, "listen", "another port"]);
    let quiet = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    check(
        &[&quiet[..], &["--model", "/nonexistent/x.gguf"]].concat(),
        &["/nonexistent/x.gguf", "fetch-model"],
    );
    check(&quiet, &["SmolLM2", "fetch-model", "random-tiny"]);
    check(&["--polcy", "cost"], &["--policy"]);
    check(&["--listen", "0.0.0.0:0", "--engine", "sim"], &["api_keys", "insecure"]);
    check(&["--block-size-tokens", "24"], &["block_size_tokens", "power of two"]);
    check(&["--block-size-tokens", "8"], &["block_size_tokens", "16 or more"]);
    let corrupt = tempfile::NamedTempFile::with_suffix(".gguf").expect("a file");
    std::fs::write(corrupt.path(), b"GGUF\x03\0\0\0 and then nothing good").expect("it is written");
    let path = corrupt.path().display().to_string();
    check(&[&quiet[..], &["--model", &path]].concat(), &[&path, "fetch-model"]);
}

/// What a gateway recorded, the twin replays: as many requests, as long, that share as much; and no word of what was said.
#[test]
fn a_recording_is_replayed_in_virtual_time() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("arrivals.jsonl");
    let file = path.display().to_string();
    let mut serving = Serving::start(&["--engine", "sim:2", "--sim-speed", "0", "--record", &file]);
    let mut said = "A swallow sings of summer. ".repeat(20);
    for turn in 0..5 {
        let body = format!(
            r#"{{"model": "sim", "max_tokens": 20, "user": "nobody", "messages": [{{"role": "user", "content": "{said}"}}]}}"#
        );
        let mut answer = String::new();
        serving.chat(&body).read_to_string(&mut answer).expect("text");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        said += &format!("And in turn {turn} the swallow goes on singing. ").repeat(3);
    }
    serving.terminate();
    let _ended = serving.child.wait().expect("it ends");

    let text = std::fs::read_to_string(&path).expect("it was written");
    assert!(!text.contains("swallow") && !text.contains("nobody"), "{text}");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    assert_eq!(lines.len(), 5);
    let tokens = |line: &serde_json::Value| line["prompt_tokens"].as_u64().expect("a number");
    assert!(lines.is_sorted_by_key(tokens) && tokens(&lines[0]) > 300, "{text}");

    let blocks = |line: &serde_json::Value| line["blocks"].as_array().expect("ids").clone();
    for turns in lines.windows(2) {
        // All but the blocks that hold what came after what was said before.
        let (before, after) = (blocks(&turns[0]), blocks(&turns[1]));
        let shared = before.iter().zip(&after).take_while(|(before, after)| before == after).count();
        assert!(shared * 4 > before.len() * 3, "{shared} of {before:?} in {after:?}");
    }

    let output = forebay().args(["simulate", "--trace", &file, "--engines", "2", "--json", "-"]).output();
    let output = output.expect("it runs");
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let summary = &document["runs"][0]["summary"];
    assert_eq!(
        (summary["requests"].as_u64(), summary["unfinished"].as_u64()),
        (Some(5), Some(0)),
        "{document}"
    );

    let compare = |arguments: &[&str]| {
        let output =
            forebay().args(["simulate", "--against", &file, "--engines", "2"]).args(arguments).output();
        String::from_utf8(output.expect("it runs").stdout).expect("text")
    };
    let table = compare(&[]);
    assert!(table.contains("5 requests of which both are known"), "{table}");
    assert!(table.contains("MEASURED") && table.contains("TTFT P50, ms"), "{table}");
    let document: serde_json::Value = serde_json::from_str(&compare(&["--json", "-"])).expect("JSON");
    let figures = document["runs"][0]["against"]["figures"].as_array().expect("figures").clone();
    assert!(
        figures.iter().all(|figure| figure["measured"].as_f64().is_some_and(|value| value > 0.0)),
        "{document}"
    );
}
