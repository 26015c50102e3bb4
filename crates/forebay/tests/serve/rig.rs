//! A serving process.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for anything; a bound on hanging, not a measurement.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// A serving process, ended with its test.
pub(crate) struct Serving {
    pub(crate) child: Child,
    pub(crate) address: String,
    pub(crate) admin: String,
}

impl Serving {
    /// Starts on ports of the system's choice and reads from the log which they are.
    pub(crate) fn start(flags: &[&str]) -> Self {
        let mut child = forebay()
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--admin-listen",
                "127.0.0.1:0",
                "--log-format",
                "json",
            ])
            .args(flags)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut log = BufReader::new(child.stderr.take().expect("it is piped"));
        let (mut line, mut seen) = (String::new(), String::new());
        let (address, admin) = loop {
            line.clear();
            assert!(log.read_line(&mut line).expect("the log is text") > 0, "it ended: {seen}");
            seen.push_str(&line);
            let record: serde_json::Value = serde_json::from_str(&line).expect("a line is an object");
            let field = |name: &str| record[name].as_str().map(ToOwned::to_owned);
            if let (Some(public), Some(admin)) = (field("public"), field("admin")) {
                break (public, admin);
            }
        };
        // The rest is read away, or the pipe would fill.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let serving = Self { child, address, admin };
        let began = Instant::now();
        while !serving.get(&serving.address, "/ready").starts_with("HTTP/1.1 200") {
            assert!(began.elapsed() < PATIENCE, "never ready");
            std::thread::yield_now();
        }
        serving
    }

    pub(crate) fn get(&self, address: &str, path: &str) -> String {
        exchange(address, format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
    }

    pub(crate) fn chat(&self, body: &str) -> TcpStream {
        let mut stream = connect(&self.address);
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: asked\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).expect("it is read");
        stream.write_all(body.as_bytes()).expect("it is read");
        stream
    }

    pub(crate) fn terminate(&self) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it lives");
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn forebay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.env_clear().env("HOME", "/nonexistent");
    command
}

pub(crate) fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("something listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes it");
    stream
}

/// Writes as much as is taken, then reads: a request may be refused before its end.
pub(crate) fn exchange(address: &str, request: &[u8]) -> String {
    let mut stream = connect(address);
    let _refused_early = stream.write_all(request);
    let mut answer = Vec::new();
    let _reset_after_it = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}
