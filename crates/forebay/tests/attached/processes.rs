//! Whole fleets of processes on loopback, on ports of the system's choice, each ended with its test.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::Value;

/// Longest wait for anything; a bound on hanging, not a measurement.
const PATIENCE: Duration = Duration::from_secs(90);

/// The model that `scripts/fetch-model.sh` fetches; its tokenizer is known on both sides.
pub(crate) fn model() -> String {
    let folder = std::env::var_os("FOREBAY_MODEL_FOLDER").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").expect("a home")).join(".cache/forebay/models")
    });
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/fetch-model.sh", path.display());
    path.to_string_lossy().into_owned()
}

/// The id under which it is served.
pub(crate) const MODEL: &str = "smollm2";

fn forebay(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.env_clear().env("HOME", "/nonexistent").args(arguments).stdin(Stdio::null());
    command
}

/// A process of this program.
pub(crate) struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Starts it and reads its standard error away, keeping it for failures.
    fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary runs");
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, kept) = (child.stderr.take().expect("it is piped"), log.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut kept = kept.lock().expect("nobody panics with it");
                kept.push_str(&line);
                kept.push('\n');
            }
        });
        Self { child, log }
    }

    /// Runs a command to its end.
    pub(crate) fn run(arguments: &[&str]) -> (bool, String) {
        let output = forebay(arguments).output().expect("the binary runs");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it ends");
    }

    /// The first line of its log that `wanted` takes.
    fn said<T>(&self, what: &str, wanted: impl Fn(&str) -> Option<T>) -> T {
        until(what, || self.log.lock().expect("nobody panics with it").lines().find_map(&wanted))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("--- log of {}:\n{}", self.child.id(), self.log.lock().expect("nobody panics with it"));
        }
    }
}

/// Waits for a state.
pub(crate) fn until<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// `forebay engine`.
pub(crate) struct Engine {
    pub(crate) process: Process,
    /// Host and port.
    pub(crate) address: String,
}

impl Engine {
    pub(crate) fn start(flags: &[&str]) -> Self {
        let mut command = forebay(&["engine", "embedded", "--port", "0"]);
        let mut process = Process::start({
            command.args(flags).stdout(Stdio::piped());
            command
        });
        let mut line = String::new();
        let stdout = process.child.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it says where it is");
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("no addresses: {line}"));
        Self { process, address: said["http"].as_str().expect("an address").to_owned() }
    }

    pub(crate) fn real(role: &str) -> Self {
        Self::start(&["--model", &model(), "--served-model-name", MODEL, "--role", role])
    }

    pub(crate) fn url(&self) -> String {
        format!("vllm=http://{}", self.address)
    }

    /// A figure of its `/metrics`, added up over labels; 0 if it is not there.
    pub(crate) fn metric(&self, name: &str, label: &str) -> f64 {
        let text = String::from_utf8(get(&self.address, "/metrics").body).expect("text");
        text.lines()
            .filter(|line| line.starts_with(name) && line.contains(label))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

/// `forebay serve`.
pub(crate) struct Gateway {
    pub(crate) process: Process,
    pub(crate) public: String,
    pub(crate) admin: String,
    pub(crate) cluster: Option<String>,
}

impl Gateway {
    pub(crate) fn start(flags: &[&str]) -> Self {
        let mut command = forebay(&[
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--admin-listen",
            "127.0.0.1:0",
            "--log-format",
            "json",
        ]);
        command.args(flags);
        let process = Process::start(command);
        let field = |name: &'static str| {
            move |line: &str| {
                let record: Value = serde_json::from_str(line).ok()?;
                record[name].as_str().map(ToOwned::to_owned)
            }
        };
        let public = process.said("its address", field("public"));
        let admin = process.said("its admin address", field("admin"));
        let cluster = flags.contains(&"--cluster-listen").then(|| process.said("its door", field("agents")));
        Self { process, public, admin, cluster }
    }

    /// For attached engines, with the model's tokenizer.
    pub(crate) fn of(engines: &[&str]) -> Self {
        let model = model();
        let mut flags = vec!["--tokenizer", &model];
        engines.iter().for_each(|engine| flags.extend(["--engine", engine]));
        Self::start(&flags)
    }

    /// The engines as `/fleet/v1/engines` lists them.
    pub(crate) fn engines(&self) -> Vec<Value> {
        let list: Value = serde_json::from_slice(&get(&self.admin, "/fleet/v1/engines").body).expect("JSON");
        list["data"].as_array().expect("a list").clone()
    }

    /// Waits until so many engines are ready.
    pub(crate) fn until_ready(&self, count: usize) {
        until("the engines are ready", || {
            let ready = self.engines().iter().filter(|engine| engine["state"] == "ready").count();
            (ready == count).then_some(())
        });
    }

    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = String::from_utf8(get(&self.admin, "/metrics").body).expect("text");
        text.lines()
            .filter(|line| line.starts_with(name))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

/// `forebay agent` with an engine of this program.
pub(crate) struct Agent(pub(crate) Process);

impl Agent {
    pub(crate) fn start(name: &str, role: &str, folder: &str, join: &str, engine: &[&str]) -> Self {
        let binary = env!("CARGO_BIN_EXE_forebay");
        let mut command = forebay(&["agent", "--join", join, "--name", name, "--role", role]);
        command.args(["--state-folder", folder, "--", binary, "engine", "embedded"]).args(engine);
        Self(Process::start(command))
    }
}

/// An answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The text of the first choice.
    pub(crate) fn text(&self) -> String {
        let json = self.json();
        let choice = &json["choices"][0];
        let text = choice["message"]["content"].as_str().or(choice["text"].as_str());
        text.unwrap_or_else(|| panic!("no text: {json}")).to_owned()
    }
}

pub(crate) fn get(address: &str, path: &str) -> Answer {
    read(open(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"), ""))
}

/// A request whose answer is read later.
pub(crate) fn post(address: &str, path: &str, body: &Value) -> BufReader<TcpStream> {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    open(address, &head, &body)
}

pub(crate) fn ask(address: &str, path: &str, body: &Value) -> Answer {
    read(post(address, path, body))
}

fn open(address: &str, head: &str, body: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(address).expect("something listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes it");
    stream.write_all(head.as_bytes()).expect("it is read");
    stream.write_all(body.as_bytes()).expect("it is read");
    BufReader::new(stream)
}

/// Reads an answer to its end, in pieces or not.
pub(crate) fn read(mut reader: BufReader<TcpStream>) -> Answer {
    let mut line = String::new();
    reader.read_line(&mut line).expect("a status line");
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    let mut in_pieces = false;
    loop {
        line.clear();
        reader.read_line(&mut line).expect("a head");
        if line.trim().is_empty() {
            break;
        }
        in_pieces |= line.to_ascii_lowercase().starts_with("transfer-encoding: chunked");
    }
    let mut body = Vec::new();
    if !in_pieces {
        reader.read_to_end(&mut body).expect("a body");
        return Answer { status, body };
    }
    loop {
        line.clear();
        reader.read_line(&mut line).expect("a piece's size");
        let size = usize::from_str_radix(line.trim(), 16).unwrap_or(0);
        if size == 0 {
            return Answer { status, body };
        }
        let start = body.len();
        body.resize(start + size, 0);
        reader.read_exact(&mut body[start..]).expect("a piece");
        reader.read_line(&mut line).expect("its end");
    }
}

/// The text of a streamed answer, and whether it ended with `[DONE]`.
pub(crate) fn streamed(reader: BufReader<TcpStream>) -> (String, bool) {
    let answer = read(reader);
    let text = String::from_utf8(answer.body).expect("text");
    let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let mut said = String::new();
    for event in events.clone().filter(|event| *event != "[DONE]") {
        let event: Value = serde_json::from_str(event).expect("an event is JSON");
        if let Some(choice) = event["choices"].get(0) {
            said += choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
        }
    }
    (said, text.trim_end().ends_with("data: [DONE]"))
}
