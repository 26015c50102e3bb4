//! The program that scripts use.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::common::{get, post, token_ids};

struct Running(Child, Value);

impl Drop for Running {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _already_gone = self.0.wait();
    }
}

fn start(arguments: &[&str]) -> Running {
    let program = env!("CARGO_BIN_EXE_testkit");
    let mut child = Command::new(program).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let addresses = serde_json::from_str(&line).unwrap_or(Value::Null);
    Running(child, addresses)
}

#[tokio::test]
async fn two_processes_are_a_pair() {
    let connector = |role: &str| format!(r#"{{"connector": {{"role": "{role}", "lease": 2.5}}, "dp": 2}}"#);
    let (p, d) = (start(&["vllm", &connector("kv_producer")]), start(&["vllm", &connector("kv_consumer")]));
    let url = |running: &Running| running.1["url"].as_str().unwrap().to_owned();
    assert_eq!(p.1["kv_events"].as_array().unwrap().len(), 2);
    let mut body = json!({"prompt": "across two processes", "max_tokens": 1, "temperature": 0, "return_token_ids": true});
    body["kv_transfer_params"] = json!({"do_remote_decode": true});
    let first = post(&url(&p), "/v1/completions", &body).await.json();
    body["max_tokens"] = json!(9);
    body["kv_transfer_params"] = first["kv_transfer_params"].clone();
    let answer = post(&url(&d), "/v1/completions", &body).await.json();
    let prompt = forebay_testkit::tokenizer::encode("across two processes");
    assert_eq!(token_ids(&answer), forebay_testkit::continuation(1, &prompt, 9));
}

#[tokio::test]
async fn every_kind_starts_and_wrong_options_do_not() {
    for kind in ["sglang", "openai"] {
        let running = start(&[kind]);
        assert_eq!(get(running.1["url"].as_str().unwrap(), "/health").await.status, 200, "{kind}");
    }
    let wrong =
        Command::new(env!("CARGO_BIN_EXE_testkit")).args(["vllm", r#"{"blokcs": 5}"#]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("blokcs"));
}
