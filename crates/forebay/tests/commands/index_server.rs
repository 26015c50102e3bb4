//! `forebay index-server` as a process: it says where it listens, answers, and ends when told to.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
};

use serde_json::Value;

use crate::support::{forebay, run};

#[test]
fn the_help_of_the_index_server_is_short() {
    insta::assert_snapshot!(run(&["index-server", "-h"]).ok().out);
}

#[test]
fn the_index_server_serves_until_it_is_told_to_end() {
    let arguments = [
        "index-server",
        "--listen",
        "127.0.0.1:0",
        "--grpc-listen",
        "127.0.0.1:0",
        "--engine",
        "name=a,model=m",
        "--index-bytes-max",
        "64MiB",
    ];
    let mut child = forebay(&arguments).spawn().expect("the binary runs");
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
    out.read_line(&mut line).expect("it says where it listens");
    let addresses: Value = serde_json::from_str(&line).expect("JSON");
    let http = addresses["http"].as_str().and_then(|url| url.strip_prefix("http://")).expect("a URL");
    assert!(addresses["grpc"].as_str().is_some_and(|address| address.starts_with("127.0.0.1:")), "{line}");

    let mut connection = TcpStream::connect(http).expect("it listens");
    let request = "GET /v1/engines HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
    connection.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(answer.contains(r#""name":"a","model":"m","state":"following""#), "{answer}");

    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).expect("it runs");
    let ended = child.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let log = String::from_utf8(ended.stderr).expect("text");
    assert!(log.contains("one was drawn") && log.contains("stopping"), "{log}");
}

#[test]
fn what_is_wrong_with_its_flags_is_said() {
    let check = |arguments: &[&str], code: i32, part: &str| {
        let ran = run(&[&["index-server"], arguments].concat());
        assert_eq!(ran.code, code, "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(part), "{arguments:?}: {}", ran.err);
    };
    check(&["--listen", "0.0.0.0:8082"], 2, "the index asks for no key");
    check(&["--grpc-listen", "[::]:8083"], 2, "`grpc-listen` is [::]:8083, which other machines can reach");
    check(&["--listen", "127.0.0.1:9", "--grpc-listen", "127.0.0.1:9"], 2, "they need an address each");
    check(&["--engine", "name=a"], 2, "`model` is missing or empty");
    check(&["--engine", "name=a,model=m,events=tcp://*:1"], 2, "give the one to dial");
    check(&["--lease", "0"], 2, "expected a duration");
    check(&["--index-bytes-max", "many"], 2, "index_bytes_max");
    check(
        &[
            "--listen",
            "127.0.0.1:0",
            "--grpc-listen",
            "127.0.0.1:0",
            "--engine",
            "name=a,model=m",
            "--engine",
            "name=a,model=n",
        ],
        1,
        "is registered with other addresses or another model",
    );
}
