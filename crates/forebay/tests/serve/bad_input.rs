//! `forebay serve` as a process under clients that mean it ill: what its memory does.
//!
//! Memory is what the kernel says of the process, so the bounds are generous; the figures are printed.

use std::{fs, net::TcpStream, time::Instant};

use crate::rig::{PATIENCE, Serving, exchange};

const MIB: usize = 1 << 20;

/// With a simulated engine, whose time costs none.
fn simulated(flags: &[&str]) -> Serving {
    Serving::start(&[&["--engine", "sim:1", "--sim-speed", "0"], flags].concat())
}

impl Serving {
    fn post(&self, path: &str, body: &str) -> String {
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: ");
        exchange(&self.address, format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())
    }

    fn serves_another(&self) {
        let body = r#"{"model":"sim","messages":[{"role":"user","content":"hello"}],"max_tokens":4}"#;
        let answer = self.post("/v1/chat/completions", body);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    fn metric(&self, name: &str) -> usize {
        let metrics = self.get(&self.admin, "/metrics");
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {metrics}"))
    }

    /// `VmRSS` or `VmHWM`, its peak since [`Self::forget_peak`].
    fn bytes(&self, which: &str) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it lives");
        let line = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<usize>().ok());
        kib.expect("Linux says so") * 1024
    }

    fn forget_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").expect("its own user may");
    }

    /// By how much its memory was beyond `before` at most while `work` was done.
    fn growth(&self, before: usize, work: impl FnOnce()) -> usize {
        self.forget_peak();
        work();
        self.bytes("VmHWM").saturating_sub(before)
    }
}

/// As many connections as descriptors allow on both sides, 9,000 at most.
fn silent_connections() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // The server inherits it.
    let _unchanged = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(allowed).unwrap_or(usize::MAX).saturating_sub(200).min(9_000)
}

#[test]
fn nine_thousand_silent_connections_cost_little_and_keep_nobody_out() {
    let count = silent_connections();
    let serving = simulated(&[]);
    serving.serves_another();
    let mut silent = Vec::new();
    let grown = serving.growth(serving.bytes("VmRSS"), || {
        silent.extend((0..count).map(|_| TcpStream::connect(&serving.address).expect("it listens")));
        let began = Instant::now();
        while serving.metric("forebay_connections") < count {
            assert!(began.elapsed() < PATIENCE, "never accepted");
        }
    });
    println!("{count} silent connections: {} bytes each", grown / count);
    assert!(grown / count < 16 * 1024, "{} bytes for each of {count} silent connections", grown / count);
    serving.serves_another();
    drop(silent);

    // The same where there is room for few: each new one takes the place of the one that was silent for longest. Not so
    // many, for the kernel keeps what the server closes and the client does not, and 8,192 of those at most.
    let count = count.min(1_000);
    let serving = simulated(&["--connections-max", "100"]);
    let _silent: Vec<TcpStream> =
        (0..count).map(|_| TcpStream::connect(&serving.address).expect("it listens")).collect();
    serving.serves_another();
    assert!(serving.metric("forebay_connections") <= 102, "both addresses");
    assert!(serving.metric("forebay_connections_closed_for_room_total") >= count - 100);
}

#[test]
fn bodies_cost_a_small_multiple_of_what_they_weigh() {
    let wide = |item: &str| vec![item; 6 * MIB / (item.len() + 1)].join(",");
    let keys = (0..500_000).map(|key| format!("\"{key}\":0")).collect::<Vec<_>>().join(",");
    let chat = |members: &str| {
        format!(r#"{{"model":"sim","messages":[{{"role":"user","content":"a"}}],"max_tokens":1,{members}}}"#)
    };
    let shapes = [
        (
            "messages",
            format!(r#"{{"model":"sim","messages":[{}]}}"#, wide(r#"{"role":"user","content":""}"#)),
        ),
        ("stop", chat(&format!("\"stop\":[{}]", wide("\"\"")))),
        ("stop_token_ids", chat(&format!("\"stop_token_ids\":[{}]", wide("1")))),
        ("logit_bias", chat(&format!("\"logit_bias\":{{{keys}}}"))),
        ("tools", chat(&format!("\"tools\":[{}]", wide("[]")))),
        ("chat_template_kwargs", chat(&format!("\"chat_template_kwargs\":{{{keys}}}"))),
        ("tool_choice", chat(&format!("\"tool_choice\":[{}]", wide("[]")))),
        ("unknown", chat(&format!("\"unknown\":[{}]", wide("[]")))),
        ("content", chat("\"n\":1").replace("\"a\"", &format!("\"{}\"", "a".repeat(6 * MIB)))),
    ];
    for (name, body) in shapes {
        // A process each, for the allocator keeps what it had.
        let serving = simulated(&[]);
        serving.serves_another();
        let (before, mut answer) = (serving.bytes("VmRSS"), String::new());
        let grown = serving.growth(before, || answer = serving.post("/v1/chat/completions", &body));
        let times = grown / body.len();
        println!("{name}: {} KiB grow the process by {} KiB, {times} times", body.len() / 1024, grown / 1024);
        // Nobody looks into what is unknown, and the built-in template into no tools.
        let expected =
            if ["tools", "chat_template_kwargs", "unknown"].contains(&name) { "200" } else { "400" };
        assert_eq!(answer.get(9..12), Some(expected), "{name}: {answer}");
        assert!(times < 32, "{name}: {times} times its size");
    }
    let serving = simulated(&[]);
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for framing in ["content-length: 104857600", "transfer-encoding: chunked"] {
            let chunk = format!("100000\r\n{}\r\n", " ".repeat(MIB)).repeat(100);
            let request = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n{chunk}");
            let mut answer = String::new();
            let before = serving.bytes("VmRSS");
            let grown = serving.growth(before, || answer = exchange(&serving.address, request.as_bytes()));
            println!("100 MB, {framing}: {} KiB", grown / 1024);
            assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("body_too_large"), "{answer}");
            assert!(grown < 64 * MIB, "{} KiB for a body that was refused", grown / 1024);
        }
    }
    serving.serves_another();
    assert_eq!(serving.metric("forebay_body_bytes"), 0);
}
