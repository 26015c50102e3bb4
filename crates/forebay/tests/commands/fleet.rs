//! `status` and `explain` against a scripted admin address.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Reply, Server, forebay, run};

const ENGINES: &str = include_str!("../fixtures/engines.json");
const PREDICTIONS: &str = r#"[{"model": "tiny", "requests": 812, "ttft_error_p50_seconds": 0.004, "ttft_error_p90_seconds": 0.021,
    "ttft_error_p99_seconds": 0.15, "ttft_bias_seconds": -0.001, "ttft_p50_seconds": 0.118,
    "itl_error_p50_seconds": 0.0002, "itl_error_p90_seconds": 0.0011, "itl_error_p99_seconds": 0.0048, "itl_bias_seconds": 0.0001,
    "itl_p50_seconds": 0.0091, "cached_tokens_predicted": 200000, "cached_tokens_missed": 5000}]"#;
const SPLIT: &str = include_str!("../fixtures/decision-split.json");

fn list(items: &str) -> String {
    format!(r#"{{"object":"list","data":{items}}}"#)
}

fn admin() -> Server {
    Server::with_pages(&[
        ("GET /fleet/v1/engines", Reply::json(&list(ENGINES))),
        ("GET /fleet/v1/predictions", Reply::json(&list(PREDICTIONS))),
        ("GET /fleet/v1/decisions?limit=1", Reply::json(&list(&format!("[{SPLIT}]")))),
        ("GET /fleet/v1/decisions/req-7f3a", Reply::json(SPLIT)),
        ("GET /fleet/v1/decisions/a%2Fb", Reply::json(SPLIT)),
    ])
}

#[test]
fn status_is_a_table() {
    let server = admin();
    insta::assert_snapshot!(run(&["status", "--admin-url", &server.url]).ok().out);
}

#[test]
fn status_as_json_is_what_the_server_sent() {
    let server = admin();
    let out = run(&["status", "--json", "--admin-url", &server.url]).ok().out;
    assert_eq!(out, format!("{}\n", list(ENGINES)));
}

#[test]
fn status_takes_its_address_from_the_environment_and_its_width_from_columns() {
    let server = admin();
    let output = forebay(&["status"])
        .env("FOREBAY_ADMIN_URL", &server.url)
        .env("COLUMNS", "90")
        .output()
        .expect("the binary runs");
    let out = String::from_utf8(output.stdout).expect("text");
    let table = out.split("\n\n").next().expect("a table");
    assert!(table.contains("embedded-0") && table.lines().all(|line| line.chars().count() <= 90), "{out}");
}

#[test]
fn watching_a_pipe_prints_one_table_after_another_until_ctrl_c() {
    let looks = AtomicU32::new(0);
    let server = Server::start(move |asked| match looks.fetch_add(1, Ordering::Relaxed) {
        _ if asked.line.contains("predictions") => Reply::json("{}").status(404),
        2 => Reply::json("{}").status(503),
        _ => Reply::json(&list(ENGINES)),
    });
    let arguments = ["status", "--watch", "--interval", "1ms", "--admin-url", &server.url];
    let mut child = forebay(&arguments).spawn().expect("the binary runs");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut tables = 0;
    let mut saw_trouble = false;
    while tables < 3 {
        let line = lines.next().expect("the watch goes on").expect("text");
        tables += u32::from(line.starts_with("ENGINE"));
        saw_trouble |= line.contains("503");
    }
    assert!(saw_trouble, "a server in trouble is shown and waited for");
    kill_process(Pid::from_child(&child), Signal::INT).expect("the watch lives");
    // Whatever it still says is read, so that it is not stopped by a full pipe.
    lines.for_each(drop);
    let mut err = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("text");
    assert_eq!((child.wait().expect("the binary ends").code(), err.as_str()), (Some(0), ""));
}

#[test]
fn explain_tells_one_request_whole() {
    let server = admin();
    let by_id = run(&["explain", "req-7f3a", "--inputs", "--admin-url", &server.url]).ok().out;
    insta::assert_snapshot!(by_id);
    let last = run(&["explain", "--last", "--inputs", "--admin-url", &server.url]).ok().out;
    assert_eq!(last, by_id);
    run(&["explain", "a/b", "--admin-url", &server.url]).ok();
}

#[test]
fn explain_as_json_is_the_record_as_the_server_sent_it() {
    let server = admin();
    for which in ["req-7f3a", "--last"] {
        let out = run(&["explain", which, "--json", "--admin-url", &server.url]).ok().out;
        assert_eq!(out, format!("{SPLIT}\n"), "{which}");
    }
}

#[test]
fn an_idle_server_has_nothing_to_explain() {
    let server = Server::with_pages(&[("GET /fleet/v1/decisions?limit=1", Reply::json(&list("[]")))]);
    let ran = run(&["explain", "--last", "--admin-url", &server.url]);
    assert_eq!(ran.code, 4);
    assert_eq!(
        ran.err,
        format!("error: {} has decided nothing yet; send a request first\n", server.authority())
    );
}

#[test]
fn a_server_of_another_kind_is_recognised() {
    let broken = SPLIT.replace("\"chosen\": 0", "\"chosen\": 9");
    assert_ne!(broken, SPLIT);
    let server = Server::with_pages(&[
        ("GET /fleet/v1/engines", Reply::json("<html>")),
        ("GET /fleet/v1/decisions/x", Reply::json("{}")),
        ("GET /fleet/v1/decisions/y", Reply::json(&broken)),
    ]);
    for arguments in [["status", "--color=auto"], ["explain", "x"], ["explain", "y"]] {
        let ran = run(&[&arguments[..], &["--admin-url", &server.url]].concat());
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.err.contains("is it a Forebay address?"), "{ran:?}");
    }
}
