//! Agents over real processes: engines that start, die, hang and are found again.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/gateway.rs"]
mod gateway;

use std::{sync::Arc, time::Duration};

use forebay_agent::{
    AgentError, Command, Exit, Limits, Options, Stopped, read_log, restart::RestartPolicy, run, signals,
    stop_engine,
};
use forebay_engines::remote::{
    ObserveSettings,
    client::{ClientSettings, Endpoint, HttpClient, HttpError, Limits as HttpLimits, Secret},
};
use forebay_proto::{EngineState, Notice, v1::from_agent::Body as Said};
use forebay_registry::{Announcement, Join, JoinSettings, Memory, Registry, SystemResolver};
use forebay_types::Incarnation;
use rustix::process::Signal;
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, timeout},
};

use engine::{AgentProcess, Home, flag, kill_group, runs, signal, until, words};
use gateway::{Gateway, LEASE, Peer, SOON};

#[tokio::test]
#[ignore = "an engine's process, started by other tests"]
async fn engine_process() {
    if let Some(words) = words() {
        engine::serve(&words).await;
    }
}

/// Words: the state folder, a gateway's address or `-`, `stop` or `leave`, then words of the engine.
#[tokio::test]
#[ignore = "an agent's process, started by other tests"]
async fn agent_process() {
    let Some(words) = words() else {
        return;
    };
    let engine: Vec<&str> = words[3..].iter().map(String::as_str).collect();
    let registry: Arc<dyn Registry> = match words[1].as_str() {
        "-" => Arc::new(Memory::new(Duration::from_secs(10))),
        address => {
            let names = vec![address.parse().expect("an address")];
            Arc::new(Join::new(names, Arc::new(SystemResolver), JoinSettings::default()).expect("a name"))
        }
    };
    let options = Options {
        limits: limits(),
        ..Options::new("e".into(), engine::engine("", &engine), words[0].clone().into(), registry)
    };
    let commands = signals::commands(words[2] == "stop").expect("signals");
    let exit = run(options, commands).await;
    println!("ended with {exit:?}");
    exit.expect("no error");
}

fn limits() -> Limits {
    Limits {
        drain_max: Duration::from_secs(20),
        stop_max: Duration::from_secs(20),
        start_max: SOON,
        hang_max: SOON,
    }
}

fn quick() -> RestartPolicy {
    let first = Duration::from_millis(20);
    RestartPolicy { first, max: Duration::from_millis(100), ..RestartPolicy::default() }
}

/// An agent in this process, with one gateway.
struct Rig {
    home: Home,
    registry: Memory,
    gateway: Gateway,
    _announced: Announcement,
}

impl Rig {
    async fn new() -> Self {
        let registry = Memory::new(Duration::from_secs(60));
        let gateway = Gateway::start(None).await;
        let announced = registry.announce(gateway.record()).expect("a record");
        Self { home: Home::new(), registry, gateway, _announced: announced }
    }

    fn options(&self, command: Vec<String>) -> Options {
        Options {
            limits: limits(),
            restart: quick(),
            ..Options::new("e".into(), command, self.home.path().to_owned(), Arc::new(self.registry.clone()))
        }
    }

    fn start(&self, words: &[&str]) -> Running {
        Running::start(self.options(engine::engine("", words)))
    }

    /// The next stream of an engine that serves, with its cache.
    async fn serving(&mut self) -> Peer {
        let mut peer = self.gateway.welcomed("gw", LEASE).await;
        peer.until("a ready engine", |peer| peer.life.dp_ranks == 1 && peer.ranks[0].is_some()).await;
        peer
    }
}

/// An agent as a task. Dropped, it dies suddenly.
struct Running {
    commands: mpsc::Sender<Command>,
    task: JoinHandle<Result<Exit, AgentError>>,
}

impl Running {
    fn start(options: Options) -> Self {
        let (commands, orders) = mpsc::channel(4);
        Self { commands, task: tokio::spawn(run(options, orders)) }
    }

    async fn tell(&self, command: Command) {
        self.commands.send(command).await.expect("the agent runs");
    }

    async fn exit(mut self) -> Result<Exit, AgentError> {
        timeout(SOON, &mut self.task).await.expect("the agent ends").expect("no panic")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The engine that a gateway was told of.
fn engine_of(peer: &Peer) -> Endpoint {
    let data_plane = &peer.stream.hello.data_plane;
    let client = HttpClient::new(&ClientSettings::default()).expect("a client");
    let key = data_plane.api_key.as_ref().map(|key| Secret::new(key.expose()));
    Endpoint::new(&data_plane.url, client, key.as_ref()).expect("a URL")
}

fn http_limits() -> HttpLimits {
    HttpLimits { body_bytes_max: 1 << 20, deadline: std::time::Instant::now() + SOON }
}

/// Has the engine compute something: three full blocks of prompt.
async fn complete(engine: &Endpoint, first_token: u32, output_tokens: u32) -> Result<(), HttpError> {
    let prompt: Vec<u32> = (first_token..first_token + 48).collect();
    let body = serde_json::json!({ "model": "double", "prompt": prompt, "max_tokens": output_tokens, "temperature": 0 });
    engine.post_json("/v1/completions", body.to_string().into(), http_limits()).await.map(drop)
}

/// Has the engine cache three blocks or more, and the gateway know of them. What an engine publishes in the instant in
/// which somebody subscribes is only missed once it publishes more: hence perhaps several requests.
async fn cache_something(engine: &Endpoint, peer: &mut Peer) {
    for first_token in 0..100 {
        complete(engine, first_token, 1).await.expect("an answer");
        let known = peer.until("three blocks", |peer| blocks(peer) >= 3);
        if timeout(Duration::from_millis(300), known).await.is_ok() {
            return;
        }
    }
    panic!("the gateway never learned of a block");
}

fn blocks(peer: &Peer) -> usize {
    peer.ranks[0].as_ref().map_or(0, |(_, blocks)| blocks.len())
}

fn notices(peer: &Peer) -> Vec<Notice> {
    let notice = |said: &Said| {
        if let Said::Notice(notice) = said { Notice::try_from(notice.clone()).ok() } else { None }
    };
    peer.other.iter().filter_map(notice).collect()
}

#[tokio::test]
async fn an_engine_is_started_followed_and_its_death_known_within_a_second() {
    let mut rig = Rig::new().await;
    let hold = rig.home.file("go");
    let before = "sleep 1000 & echo worker $!;";
    let command = engine::engine(before, &["--hold", hold.to_str().expect("a path")]);
    let _agent = Running::start(rig.options(command));
    let mut peer = rig.gateway.welcomed("gw", LEASE).await;
    let loading = |peer: &Peer| {
        peer.progress.as_ref().is_some_and(|told| told.sentence == "loading weights, 3 of 4 shards")
    };
    peer.until("its progress", loading).await;
    std::fs::write(&hold, "").expect("written");
    peer.until("a ready engine", |peer| peer.ranks[0].is_some()).await;

    let engine = engine_of(&peer);
    cache_something(&engine, &mut peer).await;
    let wrong = engine.with_key(Some(&Secret::new("wrong"))).expect("a key");
    assert!(matches!(
        wrong.get("/v1/models", http_limits()).await,
        Err(HttpError::Status { status: 401, .. })
    ));

    let pid = rig.home.pid().expect("written down");
    let lines = read_log(rig.home.path(), &"e".into(), 100).expect("a log");
    let worker = lines
        .iter()
        .find_map(|line| line.strip_prefix("worker "))
        .and_then(|pid| pid.parse().ok())
        .expect("a worker");
    assert!(runs(worker));
    let killed = Instant::now();
    signal(pid, Signal::KILL);
    peer.until_its_end().await;
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    let died = peer.died().expect("its last words");
    assert_eq!(died.last_words, "killed by SIGKILL, as when memory runs out");
    assert!(died.log_tail.iter().any(|line| line.contains("startup complete")), "{:?}", died.log_tail);
    until("the end of its worker", || !runs(worker)).await;

    let next = rig.serving().await;
    let (old, new) = (&peer.stream.hello, &next.stream.hello);
    assert!(new.incarnation > old.incarnation && new.data_plane.api_key != old.data_plane.api_key);
    assert_eq!(new.data_plane.url, old.data_plane.url, "its address stays");
    assert_eq!((new.progress.state, blocks(&next)), (EngineState::Loading, 0));
    assert!(
        matches!(complete(&engine, 100, 1).await, Err(HttpError::Status { status: 401, .. })),
        "the old key is void"
    );
}

#[tokio::test]
async fn an_agent_killed_with_sigkill_leaves_its_engine_serving_and_the_next_one_adopts_it() {
    let mut rig = Rig::new().await;
    let address = rig.gateway.address.to_string();
    let state = rig.home.path().to_str().expect("a path").to_owned();
    let first = AgentProcess::start(&[&state, &address, "leave"]);
    let mut peer = rig.serving().await;
    let engine = engine_of(&peer);
    cache_something(&engine, &mut peer).await;
    let pid = rig.home.pid().expect("written down");

    first.kill().await;
    peer.until_its_end().await;
    assert!(peer.died().is_none() && runs(pid));
    complete(&engine, 200, 1).await.expect("it serves without an agent");

    let _second = rig.start(&[]);
    let mut next = rig.serving().await;
    let known = peer.ranks[0].as_ref().expect("known").1.clone();
    let all = |peer: &Peer| {
        peer.ranks[0]
            .as_ref()
            .is_some_and(|(_, blocks)| blocks.is_superset(&known) && blocks.len() > known.len())
    };
    next.until("what was cached before and since, under the same names", all).await;
    let (old, new) = (&peer.stream.hello, &next.stream.hello);
    assert_eq!((new.incarnation, &new.data_plane), (old.incarnation, &old.data_plane), "the same life");
    assert_eq!(rig.home.pid(), Some(pid));

    // Its death is noticed though it is no child of this agent.
    let killed = Instant::now();
    signal(pid, Signal::KILL);
    next.until_its_end().await;
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    let died = next.died().expect("its last words");
    assert!(died.last_words.starts_with("the process is gone (it was adopted"), "{}", died.last_words);
    assert_ne!(rig.home.next_pid(Some(pid)).await, pid, "the next life");
}

#[tokio::test]
async fn an_engine_that_still_starts_is_adopted_too_even_if_its_number_was_not_written_down() {
    let mut rig = Rig::new().await;
    let hold = rig.home.file("go");
    let words = ["--hold", hold.to_str().expect("a path")];
    let first = rig.start(&words);
    let peer = rig.gateway.welcomed("gw", LEASE).await;
    let pid = rig.home.next_pid(None).await;
    drop(first);
    let mut state = rig.home.state().expect("written down");
    let life = state.life.as_mut().expect("a life");
    life.process = None;
    until("the agent's end", || {
        forebay_agent::state::EngineFolder::holder(rig.home.path(), &"e".into()).is_ok_and(|it| it.is_none())
    })
    .await;
    std::fs::write(rig.home.file("e/state.json"), serde_json::to_vec(&state).expect("plain"))
        .expect("written");
    let _second = rig.start(&words);
    let mut next = rig.gateway.welcomed("gw", LEASE).await;
    assert_eq!(next.stream.hello.incarnation, peer.stream.hello.incarnation);
    assert_eq!(rig.home.next_pid(None).await, pid);
    std::fs::write(&hold, "").expect("written");
    next.until("a ready engine", |peer| peer.ranks[0].is_some()).await;
}

#[tokio::test]
async fn an_agent_that_leaves_keeps_the_engine_and_one_that_stops_drains_it_first() {
    let mut rig = Rig::new().await;
    let first = rig.start(&["--step-ms", "20"]);
    let peer = rig.serving().await;
    let pid = rig.home.pid().expect("written down");
    first.tell(Command::Leave).await;
    assert!(matches!(first.exit().await, Ok(Exit::Left)));
    assert!(runs(pid));

    let second = rig.start(&["--step-ms", "20"]);
    let mut next = rig.serving().await;
    assert_eq!(next.stream.hello.incarnation, peer.stream.hello.incarnation);
    let engine = engine_of(&next);
    let request = tokio::spawn(async move { complete(&engine, 100, 100).await });
    let runs_now = |peer: &Peer| peer.loads.get(&0).is_some_and(|load| load.running == 1);
    next.until("a running request", runs_now).await;
    second.tell(Command::Stop).await;
    next.until_its_end().await;
    let drained = next.other.iter().position(|said| matches!(said, Said::Drain(_)));
    let died = next.other.iter().position(|said| matches!(said, Said::Died(_)));
    assert!(drained.is_some() && drained < died, "{:?}", next.other);
    assert_eq!(
        next.died().map(|died| died.last_words.as_str()),
        Some("it was ended: its agent was told to end it")
    );
    assert!(matches!(second.exit().await, Ok(Exit::Stopped)));
    request.await.expect("no panic").expect("the request was served to its end");
    assert!(!runs(pid) && rig.home.state().is_some_and(|state| state.life.is_none()));
}

#[tokio::test]
async fn an_engine_that_does_not_end_is_killed_with_its_group() {
    let mut rig = Rig::new().await;
    let mut options = rig.options(engine::engine("trap '' TERM;", &[]));
    options.limits.stop_max = Duration::from_millis(200);
    let agent = Running::start(options);
    let mut peer = rig.serving().await;
    let pid = rig.home.pid().expect("written down");
    agent.tell(Command::Stop).await;
    assert!(matches!(agent.exit().await, Ok(Exit::Stopped)));
    assert!(!runs(pid));
    peer.until_its_end().await;
    assert!(peer.died().is_some());
}

#[tokio::test]
async fn an_engine_that_cannot_start_is_tried_again_and_the_pattern_is_told() {
    let mut rig = Rig::new().await;
    let script = "echo run >> \"$0\"; echo 'ValueError: No common block size for 16'; exit 3";
    let runs_file = rig.home.file("runs");
    let command = ["sh", "-c", script, runs_file.to_str().expect("a path")].map(str::to_owned).to_vec();
    let mut options = rig.options(command);
    options.url = Some("http://127.0.0.1:1".to_owned());
    let agent = Running::start(options);
    let mut words = Vec::new();
    let mut incarnations = Vec::new();
    loop {
        let mut peer = rig.gateway.welcomed("gw", LEASE).await;
        incarnations.push(peer.stream.hello.incarnation);
        let sentence = peer.stream.hello.progress.sentence.clone();
        peer.until_its_end().await;
        words.extend(peer.died().map(|died| died.last_words.clone()));
        if sentence.starts_with("it died 5 times within 900 s") {
            break;
        }
    }
    assert!(
        words.iter().all(|words| words == "exit code 3: ValueError: No common block size for 16"),
        "{words:?}"
    );
    assert!(incarnations.is_sorted_by(|a, b| a < b), "{incarnations:?}");
    let starts = std::fs::read_to_string(&runs_file).expect("it ran").lines().count();
    assert!(starts >= 5, "{starts} starts");
    agent.tell(Command::Stop).await;
    assert!(agent.exit().await.is_ok());
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error_at_once() {
    let rig = Rig::new().await;
    let mut options = rig.options(vec!["/nowhere/vllm".to_owned(), "serve".to_owned(), "m".to_owned()]);
    options.url = None;
    let error = Running::start(options).exit().await.expect_err("no such program");
    assert_eq!(error.to_string(), "cannot start `/nowhere/vllm`");
    assert!(rig.home.state().is_some_and(|state| state.life.is_none()), "nothing is left behind");
}

#[tokio::test]
async fn a_state_whose_process_is_gone_or_that_is_garbled_begins_a_new_life() {
    let mut rig = Rig::new().await;
    let first = rig.start(&[]);
    // Kept to the agent's end: a stream that this side drops would be opened again.
    let mut old = rig.serving().await;
    let pid = rig.home.pid().expect("written down");
    drop(first);
    old.until_its_end().await;
    kill_group(pid);
    until("its end", || !runs(pid)).await;
    let second = rig.start(&[]);
    let mut new = rig.serving().await;
    let (old, incarnation) = (old.stream.hello.incarnation, new.stream.hello.incarnation);
    assert!(incarnation > old);

    let pid = rig.home.next_pid(Some(pid)).await;
    drop(second);
    new.until_its_end().await;
    kill_group(pid);
    std::fs::write(rig.home.file("e/state.json"), "{").expect("written");
    let _third = rig.start(&[]);
    let mut peer = rig.gateway.welcomed("gw", LEASE).await;
    let mut notes = Vec::new();
    while notes.is_empty() {
        assert!(peer.read().await, "it becomes ready");
        notes.clone_from(&peer.notes);
    }
    assert!(notes.iter().any(|note| note.contains("state.json cannot be used")), "{notes:?}");
    assert!(peer.stream.hello.incarnation > incarnation, "numbers rise without a state, too");
}

#[tokio::test]
async fn a_second_agent_of_an_engine_is_refused() {
    let mut rig = Rig::new().await;
    let _first = rig.start(&[]);
    rig.serving().await;
    let error = rig.start(&[]).exit().await.expect_err("held").to_string();
    let own = std::process::id();
    assert_eq!(
        error,
        format!(
            "another agent (process {own}) has engine e: end that one first, or give this one another name"
        )
    );
}

#[tokio::test]
async fn somebody_else_at_the_engine_s_address_is_not_adopted() {
    let mut rig = Rig::new().await;
    let first = rig.start(&[]);
    let standing = rig.serving().await;
    let old = standing.stream.hello.incarnation;
    let engine = rig.home.pid().expect("written down");
    let mut state = rig.home.state().expect("written down");
    first.tell(Command::Leave).await;
    assert!(matches!(first.exit().await, Ok(Exit::Left)));
    drop(standing);
    // The same process, another key: as if its number were taken over and something else answered.
    state.life.as_mut().expect("a life").key = Some(forebay_proto::Secret::new("fb-other"));
    std::fs::write(rig.home.file("e/state.json"), serde_json::to_vec(&state).expect("plain"))
        .expect("written");
    let _second = rig.start(&[]);
    let mut peer = rig.gateway.welcomed("gw", LEASE).await;
    assert_eq!(peer.stream.hello.incarnation, old);
    peer.until_its_end().await;
    let words = &peer.died().expect("its last words").last_words;
    assert!(words.starts_with("it was killed: what answers at its address is not this engine"), "{words}");
    assert!(!runs(engine));
    assert!(rig.serving().await.stream.hello.incarnation > old);
}

#[tokio::test]
async fn an_engine_that_hangs_lapses_and_returns_as_a_new_incarnation() {
    let mut rig = Rig::new().await;
    let mut options = rig.options(engine::engine("", &[]));
    options.observe = impatient();
    let _agent = Running::start(options);
    let mut peer = rig.serving().await;
    cache_something(&engine_of(&peer), &mut peer).await;
    let pid = rig.home.pid().expect("written down");
    signal(pid, Signal::STOP);
    peer.until_its_end().await;
    assert!(notices(&peer).iter().any(|notice| matches!(notice, Notice::Silent { .. })), "{:?}", peer.other);
    assert!(peer.died().is_some_and(|died| died.last_words.contains("silent for")), "{:?}", peer.died());
    let mut next = rig.gateway.welcomed("gw", LEASE).await;
    assert!(next.stream.hello.incarnation > peer.stream.hello.incarnation);
    signal(pid, Signal::CONT);
    let before = peer.ranks[0].as_ref().map(|known| &known.1);
    next.until("its whole cache", |peer| peer.ranks[0].as_ref().map(|known| &known.1) == before).await;
    assert_eq!(rig.home.pid(), Some(pid), "the same process");
}

#[tokio::test]
async fn an_engine_that_hangs_for_good_is_killed_and_started_again() {
    let mut rig = Rig::new().await;
    let mut options = rig.options(engine::engine("", &[]));
    options.observe = impatient();
    options.limits.hang_max = Duration::from_millis(700);
    let _agent = Running::start(options);
    rig.serving().await;
    let pid = rig.home.pid().expect("written down");
    signal(pid, Signal::STOP);
    let next = rig.home.next_pid(Some(pid)).await;
    assert!(runs(next) && !runs(pid));
}

fn impatient() -> ObserveSettings {
    ObserveSettings {
        poll_every: Duration::from_millis(50),
        silent_after: Duration::from_millis(200),
        lease: Duration::from_millis(600),
        ..ObserveSettings::default()
    }
}

#[tokio::test]
async fn stop_engine_ends_agent_and_engine_or_the_engine_alone() {
    let home = Home::new();
    let state = home.path().to_str().expect("a path").to_owned();
    let name = "e".into();
    assert_eq!(stop_engine(home.path(), &name, limits()).await.expect("no state"), Stopped::DidNotRun);
    let mut agent = AgentProcess::start(&[&state, "-", "leave"]);
    let pid = home.next_pid(None).await;
    assert_eq!(stop_engine(home.path(), &name, limits()).await.expect("ended"), Stopped::ByItsAgent);
    assert!(!runs(pid));
    assert_eq!(agent.ended().await, Some(0));

    let agent = AgentProcess::start(&[&state, "-", "leave"]);
    let pid = home.next_pid(None).await;
    agent.kill().await;
    assert!(runs(pid));
    assert_eq!(stop_engine(home.path(), &name, limits()).await.expect("ended"), Stopped::WithoutAgent);
    assert!(!runs(pid) && home.life().is_none());
    assert_eq!(stop_engine(home.path(), &name, limits()).await.expect("no life"), Stopped::DidNotRun);
}

#[tokio::test]
async fn signals_mean_what_is_documented() {
    //    flag      signal         the engine runs on
    let rows = [("leave", Signal::TERM, true), ("leave", Signal::INT, false), ("stop", Signal::TERM, false)];
    for (flag, told, stays) in rows {
        let home = Home::new();
        let mut agent = AgentProcess::start(&[home.path().to_str().expect("a path"), "-", flag]);
        let pid = home.next_pid(None).await;
        signal(agent.pid(), Signal::HUP);
        signal(agent.pid(), told);
        assert_eq!(agent.ended().await, Some(0), "{flag} {told:?}");
        assert_eq!(runs(pid), stays, "{flag} {told:?}");
    }
}

#[tokio::test]
async fn a_users_signal_is_passed_on() {
    let home = Home::new();
    let script = "trap 'echo got it' USR1; echo ready; while :; do sleep 0.05; done";
    let registry = Arc::new(Memory::new(Duration::from_secs(60)));
    let command = ["sh", "-c", script].map(str::to_owned).to_vec();
    let url = Some("http://127.0.0.1:1".to_owned());
    let agent = Running::start(Options {
        url,
        ..Options::new("e".into(), command, home.path().to_owned(), registry)
    });
    let logged = |line: &str| {
        read_log(home.path(), &"e".into(), 10).is_ok_and(|lines| lines.iter().any(|it| it == line))
    };
    until("its trap", || logged("ready")).await;
    agent.tell(Command::Signal(Signal::USR1)).await;
    until("the signal", || logged("got it")).await;
}

#[tokio::test]
async fn a_drain_outlives_its_agent() {
    let mut rig = Rig::new().await;
    let first = rig.start(&[]);
    let mut peer = rig.serving().await;
    let order = forebay_proto::v1::from_gateway::Body::DrainEngine(forebay_proto::v1::DrainEngine {});
    peer.stream.say(order).await;
    peer.until("the drain", |peer| peer.other.iter().any(|said| matches!(said, Said::Drain(_)))).await;
    let pid = rig.home.pid().expect("written down");
    drop(first);
    let _second = rig.start(&[]);
    let next = rig.gateway.welcomed("gw", LEASE).await;
    assert_eq!(
        (next.stream.hello.progress.state, next.stream.hello.incarnation),
        (EngineState::Draining, peer.stream.hello.incarnation)
    );
    assert!(runs(pid), "a drained engine runs until it is told to end");
    assert!(next.stream.hello.incarnation > Incarnation(0) && flag(&[], "--x").is_none());
}
