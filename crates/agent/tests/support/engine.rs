//! Real processes for the tests: this test's own program, started again as an engine or as an agent.
//!
//! `sh` hands the words over in a variable, for the test harness would take them for its own; `exec` keeps the process the
//! same. The engine is a double of vLLM that reads `--host`, `--port`, `--kv-events-config` and `VLLM_API_KEY`, and:
//! `--hold FILE` (it starts to listen when the file is there), `--step-ms N` (time of a step).

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use forebay_agent::state::{LifeState, State};
use forebay_testkit::{ApiKey, KvEventOptions, VllmDouble, VllmOptions};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::gateway::SOON;

/// The words of an engine in the variable that its process reads.
const WORDS: &str = "FOREBAY_TEST_WORDS";
/// Lines of a real start, for progress.
const START_LINES: [&str; 2] = [
    "(EngineCore pid=2) INFO 11-22 16:00:20 [gpu_model_runner.py:5040] Starting to load model double...",
    "Loading safetensors checkpoint shards:  75% Completed | 3/4 [00:01<00:00,  2.10it/s]",
];

/// A command that starts the test named `entry` of this program, with `words` behind it that the entry reads.
pub(crate) fn command(before: &str, entry: &str, words: &[&str]) -> Vec<String> {
    let program = std::env::current_exe().expect("a path").to_string_lossy().into_owned();
    let script = format!("{before} {WORDS}=\"$*\" exec \"$0\" --exact {entry} --ignored --nocapture");
    let words = words.iter().map(|&word| word.to_owned());
    ["sh".to_owned(), "-c".to_owned(), script, program].into_iter().chain(words).collect()
}

/// `vllm serve` in these tests.
pub(crate) fn engine(before: &str, words: &[&str]) -> Vec<String> {
    let all: Vec<&str> = ["vllm", "serve", "double"].iter().chain(words).copied().collect();
    command(before, "engine_process", &all)
}

/// The words that an entry was given; `None` if it is run as a test by mistake.
#[allow(clippy::disallowed_methods, reason = "how the process is told what to be")]
pub(crate) fn words() -> Option<Vec<String>> {
    let words = std::env::var(WORDS).ok()?;
    Some(words.split_whitespace().map(str::to_owned).collect())
}

/// The value behind a flag.
pub(crate) fn flag<'a>(words: &'a [String], name: &str) -> Option<&'a str> {
    let at = words.iter().position(|word| word == name)?;
    words.get(at + 1).map(String::as_str)
}

/// Serves as an engine until the process is killed.
#[allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a program: where vLLM finds its key, and its log"
)]
pub(crate) async fn serve(words: &[String]) {
    for line in START_LINES {
        println!("{line}");
    }
    if let Some(file) = flag(words, "--hold") {
        until("it may start", || Path::new(file).exists()).await;
    }
    let events: serde_json::Value =
        serde_json::from_str(flag(words, "--kv-events-config").expect("events")).expect("JSON");
    let endpoint = events["endpoint"].as_str().expect("an endpoint");
    let events_port = endpoint.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    let step_ms = flag(words, "--step-ms").and_then(|ms| ms.parse().ok()).unwrap_or(0);
    let _double = VllmDouble::start(VllmOptions {
        port: flag(words, "--port").and_then(|port| port.parse().ok()).expect("a port"),
        api_key: std::env::var("VLLM_API_KEY").ok().map(ApiKey),
        kv_events: Some(KvEventOptions { port: events_port, ..KvEventOptions::default() }),
        prompt_tokens_details: true,
        step: Duration::from_millis(step_ms),
        ..VllmOptions::default()
    })
    .await;
    println!("INFO:     Application startup complete.");
    std::future::pending::<()>().await;
}

/// Looks again and again until the state holds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let mut look = interval(Duration::from_millis(5));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let looking = async {
        while !holds() {
            look.tick().await;
        }
    };
    timeout(SOON, looking).await.unwrap_or_else(|_| panic!("{what} within {SOON:?}"));
}

/// A state folder, and whatever processes its engines' states name. They end with it.
pub(crate) struct Home {
    folder: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// What is written down of engine `e`.
    pub(crate) fn state(&self) -> Option<State> {
        serde_json::from_slice(&std::fs::read(self.file("e/state.json")).ok()?).ok()
    }

    pub(crate) fn life(&self) -> Option<LifeState> {
        self.state()?.life
    }

    /// The engine's process, as written down.
    pub(crate) fn pid(&self) -> Option<i32> {
        Some(self.life()?.process?.pid)
    }

    /// Waits for another process than `before`.
    pub(crate) async fn next_pid(&self, before: Option<i32>) -> i32 {
        let mut found = None;
        until("an engine's process", || {
            found = self.pid().filter(|pid| Some(*pid) != before);
            found.is_some()
        })
        .await;
        found.expect("waited for")
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            kill_group(pid);
        }
    }
}

/// Ends a process group that these tests started.
pub(crate) fn kill_group(pid: i32) {
    if let Some(group) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
}

pub(crate) fn signal(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process");
    rustix::process::kill_process(pid, signal).expect("it is there");
}

/// Whether a process runs, stopped ones included.
pub(crate) fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim().chars().next());
    state.is_some_and(|state| !"ZX".contains(state))
}

/// An agent in a process of its own. Killed when dropped.
pub(crate) struct AgentProcess {
    child: std::process::Child,
}

impl AgentProcess {
    pub(crate) fn start(words: &[&str]) -> Self {
        let words = command("", "agent_process", words);
        let child = std::process::Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
        Self { child }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Its exit code; `None` for a signal.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        let mut status = None;
        let began = Instant::now();
        until("the agent's end", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        })
        .await;
        assert!(began.elapsed() < SOON);
        status.expect("waited for").code()
    }

    pub(crate) async fn kill(mut self) {
        self.child.kill().expect("a child");
        self.ended().await;
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
