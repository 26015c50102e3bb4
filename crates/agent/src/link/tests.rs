use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use forebay_engines::{KvSnapshot, remote};
use forebay_proto::{
    Accepts, CacheSight, DataPlane, Dialect, EngineFacts, HashKey, KvAbilities, Progress, Secret,
    TokenizerReader,
};
use forebay_registry::HostPort;
use forebay_types::{BlockHash, KvEvent, KvEventBatch, RankId, RankLoad, Tier};

use self::gateway::{Gateway, KEY, LEASE, Peer, RANKS, SOON, apply, welcome as welcoming};
use super::*;
use crate::{feed::FeedLimits, tokenizer::Source};

#[path = "../../tests/support/gateway.rs"]
mod gateway;

/// An agent without an engine: its board is filled by the test.
struct Agent {
    shared: Arc<Shared>,
    drains: mpsc::Receiver<String>,
    tokenizer: watch::Sender<Source>,
    sequences: [u64; RANKS as usize],
    truth: [BTreeSet<BlockHash>; RANKS as usize],
}

const FIRST: Incarnation = Incarnation(1_000);

impl Agent {
    fn new(tls: Option<TlsFiles>) -> Self {
        let (drains_sender, drains) = mpsc::channel(1);
        let (tokenizer, source) = watch::channel(Source::Unknown("there is none".to_owned()));
        let shared = Arc::new(Shared {
            engine: "e".into(),
            role: Role::Both,
            labels: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
            board: Board::new(FeedLimits { batches_max: 64, hashes_max: 32_768 }),
            key: FleetKey::new(),
            minter: Mutex::new(Minter::after(FIRST)),
            log: LogRing::default(),
            tokenizer: source,
            tls,
            insecure: false,
            drains: drains_sender,
        });
        Self { shared, drains, tokenizer, sequences: [0; 2], truth: Default::default() }
    }

    /// With an engine that serves.
    fn ready() -> Self {
        let agent = Self::new(None);
        agent.begin(FIRST);
        agent.serve();
        agent
    }

    fn serve(&self) {
        self.shared.board.ready(facts(), "vllm".to_owned(), CacheSight::Events);
        self.shared.board.restart_feed(Some(KEY));
    }

    fn begin(&self, incarnation: Incarnation) {
        let data_plane = DataPlane { url: "http://127.0.0.1:1".to_owned(), api_key: Some(Secret::new("k")) };
        let progress = Progress { state: EngineState::Loading, sentence: "it starts".to_owned() };
        self.shared.board.begin(incarnation, "vllm".to_owned(), data_plane, progress);
    }

    fn link(&self, record: GatewayRecord) -> Linked {
        let (listed, follow) = watch::channel(true);
        let (link, state) = Link::new(self.shared.clone(), record);
        Linked { listed, state, task: tokio::spawn(link.keep(follow)) }
    }

    fn event(&mut self, dp_rank: u16, event: KvEvent) {
        let index = usize::from(dp_rank);
        apply(&mut self.truth[index], &event);
        let rank = RankId { incarnation: FIRST, dp_rank };
        let batch = KvEventBatch { rank, sequence: self.sequences[index], events: vec![event] };
        self.sequences[index] += 1;
        assert_eq!(self.shared.board.kv([batch]), Vec::<u16>::new());
    }

    fn store(&mut self, dp_rank: u16, hashes: std::ops::Range<u64>) {
        self.event(dp_rank, stored(hashes));
    }

    fn knows_all(&self, peer: &Peer) -> bool {
        (0..usize::from(RANKS))
            .all(|rank| peer.ranks[rank].as_ref().is_some_and(|(next, _)| *next == self.sequences[rank]))
    }

    fn assert_equal(&self, peer: &Peer) {
        for rank in 0..usize::from(RANKS) {
            assert_eq!(
                peer.ranks[rank].as_ref().map(|(_, blocks)| blocks),
                Some(&self.truth[rank]),
                "rank {rank}"
            );
        }
    }
}

struct Linked {
    listed: watch::Sender<bool>,
    state: watch::Receiver<LinkState>,
    task: tokio::task::JoinHandle<()>,
}

impl Linked {
    /// Waits until the agent has read the Welcome.
    async fn up(&mut self) {
        self.state("the stream stands", |state| matches!(state, LinkState::Up(_))).await;
    }

    async fn state(&mut self, what: &str, holds: impl FnMut(&LinkState) -> bool) -> LinkState {
        let held = timeout(SOON, self.state.wait_for(holds)).await.unwrap_or_else(|_| panic!("{what} soon"));
        held.expect("the link runs").clone()
    }
}

impl Drop for Linked {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn stored(hashes: std::ops::Range<u64>) -> KvEvent {
    KvEvent::Stored { parent: None, hashes: hashes.map(BlockHash).collect(), tier: Tier::Device, group: 0 }
}

fn facts() -> EngineFacts {
    EngineFacts {
        model: "m".to_owned(),
        served_aliases: Vec::new(),
        dp_ranks: RANKS,
        block_size_tokens: 16,
        block_bytes: 0,
        blocks_total: 100,
        step_tokens_max: 8_192,
        context_tokens_max: 4_096,
        waiting_max: 256,
        kv: KvAbilities { layout: 1, can_export: false, can_import: false, needs_warming: false },
        accepts: Accepts { tokens: true, body: true },
        continues_sampling: false,
        dialect: Dialect {
            version: "0.32.0".to_owned(),
            speech: remote::Speech {
                dialect: remote::Dialect::Vllm,
                model: "m".into(),
                tokens: Some(remote::TokenRoute::Completions),
                hand_over: remote::HandOver::None,
                ranks: remote::RankPin::Header,
                salts_cache: true,
                abort: remote::Abort::Close,
            },
        },
        step_prior: forebay_perf_model::StepCoefficients::H100_8B,
        notes: vec!["a note".to_owned()],
    }
}

#[tokio::test]
async fn a_gateway_learns_of_an_engine_from_its_start_on() {
    let agent = Agent::new(None);
    let mut gateway = Gateway::start(None).await;
    let mut link = agent.link(gateway.record());
    agent.begin(FIRST);
    let mut peer = gateway.welcomed("gw", LEASE).await;
    let Hello {
        wire_version,
        agent_version: _,
        engine,
        kind,
        incarnation,
        role,
        progress,
        facts: found,
        data_plane,
        labels,
        cache_sight: _,
    } = peer.stream.hello.clone();
    assert_eq!((wire_version, engine.as_str(), kind.as_str(), incarnation), (1, "e", "vllm", FIRST));
    assert_eq!((role, progress.state, found, labels.len()), (Role::Both, EngineState::Loading, None, 1));
    assert_eq!(data_plane.api_key, Some(Secret::new("k")));
    link.state("it is taken in", |state| *state == LinkState::Up(FIRST)).await;
    let compiling = Progress { state: EngineState::Compiling, sentence: "compiling".to_owned() };
    agent.shared.board.progress(compiling.clone());
    peer.until("the progress", |peer| peer.progress.as_ref() == Some(&compiling)).await;
    agent.serve();
    agent.shared.board.load(1, RankLoad { running: 3, ..RankLoad::default() }, std::time::Instant::now());
    peer.until("both caches and the load", |peer| peer.snapshots == 2 && peer.loads.contains_key(&1)).await;
    assert_eq!(peer.loads[&1].running, 3);
    agent.shared.board.drain("an operator".to_owned());
    peer.until("the drain", |peer| {
        peer.other.iter().any(|said| matches!(said, Said::Drain(drain) if drain.sentence == "an operator"))
    })
    .await;
}

#[tokio::test]
async fn two_gateways_follow_random_changes_exactly() {
    let mut agent = Agent::ready();
    let (mut first, mut second) = (Gateway::start(None).await, Gateway::start(None).await);
    let _links = [agent.link(first.record()), agent.link(second.record())];
    let mut early = first.welcomed("gw-0", LEASE).await;
    let mut dice = 1u64;
    let mut roll = move |sides: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % sides
    };
    let mut late = None;
    for turn in 0..400 {
        let dp_rank = roll(2) as u16;
        let from = roll(500);
        let event = match roll(20) {
            0 => KvEvent::Cleared,
            1..=7 => KvEvent::Removed {
                hashes: (from..from + 1 + roll(9)).map(BlockHash).collect(),
                group: 0,
                tier: Tier::Device,
            },
            _ => stored(from..from + 1 + roll(9)),
        };
        agent.event(dp_rank, event);
        if turn == 200 {
            late = Some(second.welcomed("gw-1", LEASE).await);
        }
        if roll(3) == 0 {
            early.read().await;
        }
    }
    let mut late = late.expect("welcomed");
    early.until("all changes", |peer| agent.knows_all(peer)).await;
    late.until("all changes", |peer| agent.knows_all(peer)).await;
    agent.assert_equal(&early);
    agent.assert_equal(&late);
}

#[tokio::test]
async fn a_slow_gateway_gets_a_fresh_snapshot_and_holds_nobody_up() {
    let mut agent = Agent::ready();
    let (mut slow, mut fast) = (Gateway::start(None).await, Gateway::start(None).await);
    let _links = [agent.link(slow.record()), agent.link(fast.record())];
    let mut slow = slow.welcomed("slow", LEASE).await;
    let mut fast = fast.welcomed("fast", LEASE).await;
    slow.until("its first snapshots", |peer| peer.snapshots == 2).await;
    // Far more than the log and the connection hold, while it reads nothing.
    const BATCHES: u64 = 300;
    const BLOCKS: u64 = 1_000;
    for n in 0..BATCHES {
        let blocks = n * BLOCKS..(n + 1) * BLOCKS;
        agent.store(0, blocks.clone());
        let hashes = blocks.take(BLOCKS as usize - 10).map(BlockHash).collect();
        agent.event(0, KvEvent::Removed { hashes, tier: Tier::Device, group: 0 });
        fast.until("every change at once", |peer| agent.knows_all(peer)).await;
    }
    slow.until("everything", |peer| agent.knows_all(peer)).await;
    agent.assert_equal(&slow);
    agent.assert_equal(&fast);
    assert_eq!(fast.snapshots, 2);
    assert!(slow.snapshots > 2, "it was far behind");
    assert!(slow.messages < fast.messages, "{} and {}", slow.messages, fast.messages);
}

#[tokio::test]
async fn a_gap_at_the_gateway_is_healed_by_a_snapshot() {
    let mut agent = Agent::ready();
    let mut gateway = Gateway::start(None).await;
    let _link = agent.link(gateway.record());
    let mut peer = gateway.welcomed("gw", LEASE).await;
    agent.store(0, 0..5);
    peer.until("the change", |peer| agent.knows_all(peer)).await;
    let before = peer.snapshots;
    peer.ranks[0] = None;
    peer.stream.say(Heard::RequestSnapshot(v1::RequestSnapshot { dp_rank: 0 })).await;
    peer.until("a snapshot", |peer| peer.snapshots > before).await;
    agent.assert_equal(&peer);
    agent.store(0, 5..9);
    peer.until("the next change", |peer| agent.knows_all(peer)).await;
    agent.assert_equal(&peer);
}

#[tokio::test]
async fn a_gap_at_the_agent_is_healed_for_every_gateway() {
    let mut agent = Agent::ready();
    let mut gateway = Gateway::start(None).await;
    let _link = agent.link(gateway.record());
    let mut peer = gateway.welcomed("gw", LEASE).await;
    agent.store(0, 0..5);
    peer.until("the change", |peer| agent.knows_all(peer)).await;
    let rank = RankId { incarnation: FIRST, dp_rank: 0 };
    let late = KvEventBatch { rank, sequence: 7, events: vec![stored(90..95)] };
    assert_eq!(agent.shared.board.kv([late]), [0]);
    assert_eq!(agent.shared.board.gaps(), [0]);
    agent.shared.board.snapshot(KvSnapshot { rank, sequence_next: 8, contents: vec![stored(80..95)] });
    (agent.sequences[0], agent.truth[0]) = (8, (80..95).map(BlockHash).collect());
    peer.until("the whole cache", |peer| agent.knows_all(peer)).await;
    agent.assert_equal(&peer);
}

#[tokio::test]
async fn within_the_lease_an_engine_comes_back_as_it_was_after_it_as_a_new_one() {
    let mut agent = Agent::ready();
    agent.store(0, 0..5);
    let mut gateway = Gateway::start(None).await;
    let _link = agent.link(gateway.record());
    let first = gateway.welcomed("gw", LEASE).await;
    assert_eq!(first.stream.hello.incarnation, FIRST);
    drop(first);
    let short = Duration::from_millis(100);
    let second = gateway.welcomed("gw", short).await;
    assert_eq!(second.stream.hello.incarnation, FIRST, "the lease stands");
    drop(second);
    let lapsed = Instant::now() + short;
    // A stream that is broken off before it is welcomed renews nothing.
    let mut attached = gateway.attached().await;
    while Instant::now() <= lapsed + short {
        drop(attached);
        attached = gateway.attached().await;
    }
    assert!(attached.hello.incarnation > FIRST, "the lease lapsed");
    let presented = attached.hello.incarnation;
    attached.say(Heard::Welcome(welcoming("gw", LEASE).into())).await;
    let mut peer = Peer::new(attached);
    peer.until("a new snapshot", |peer| agent.knows_all(peer)).await;
    agent.assert_equal(&peer);
    drop(peer);
    assert_eq!(gateway.attached().await.hello.incarnation, presented, "the new one's lease stands");
}

#[tokio::test]
async fn a_gateway_that_says_that_the_lease_lapsed_is_believed() {
    let agent = Agent::ready();
    let (mut gateway, mut other) = (Gateway::start(None).await, Gateway::start(None).await);
    let _links = [agent.link(gateway.record()), agent.link(other.record())];
    let mut steady = other.welcomed("other", LEASE).await;
    let attached = gateway.attached().await;
    let reject = v1::Reject { sentence: "too late".to_owned(), reason: RejectReason::Lapsed.into() };
    attached.say(Heard::Reject(reject)).await;
    let again = gateway.welcomed("gw", LEASE).await;
    assert!(again.stream.hello.incarnation > FIRST);
    steady.until("its snapshots", |peer| peer.snapshots == 2).await;
    assert_eq!(steady.stream.hello.incarnation, FIRST, "another gateway's lease is its own");
}

#[tokio::test]
async fn a_gateway_that_hangs_is_dialled_again() {
    let agent = Agent::ready();
    let mut gateway = Gateway::start(None).await;
    let mut link = agent.link(gateway.record());
    let mut peer = gateway.welcomed("gw", Duration::from_millis(300)).await;
    peer.acks = false;
    let began = Instant::now();
    peer.until_its_end().await;
    assert!(began.elapsed() >= Duration::from_millis(250), "the lease is kept");
    let down = link
        .state("the link is down", |state| matches!(state, LinkState::Down(why) if why.contains("lease")))
        .await;
    assert_eq!(down, LinkState::Down("the gateway has said nothing for its lease of 0.3 s".to_owned()));
    gateway.attached().await;
}

#[tokio::test]
async fn a_death_is_told_within_a_second_and_the_next_life_on_a_new_stream() {
    let agent = Agent::ready();
    let (mut reads, mut hangs) = (Gateway::start(None).await, Gateway::start(None).await);
    let _links = [agent.link(reads.record()), agent.link(hangs.record())];
    let mut peer = reads.welcomed("reads", LEASE).await;
    let stuck = hangs.welcomed("hangs", LEASE).await;
    peer.until("its snapshots", |peer| peer.snapshots == 2).await;
    let began = Instant::now();
    agent.shared.board.died("killed by SIGKILL", vec!["a line".to_owned()]);
    peer.until_its_end().await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let died = peer.died().expect("its last words");
    assert_eq!(
        (died.last_words.as_str(), died.log_tail.as_slice()),
        ("killed by SIGKILL", &["a line".to_owned()][..])
    );
    agent.begin(Incarnation(2_000));
    assert_eq!(reads.attached().await.hello.incarnation, Incarnation(2_000));
    assert_eq!(
        hangs.attached().await.hello.incarnation,
        Incarnation(2_000),
        "one that read nothing is not waited for"
    );
    drop(stuck);
}

#[tokio::test]
async fn a_gateway_with_another_hash_key_is_refused_with_a_sentence() {
    let mut agent = Agent::ready();
    let (mut first, mut second) = (Gateway::start(None).await, Gateway::start(None).await);
    let mut standing = agent.link(first.record());
    let mut peer = first.welcomed("gw-0", LEASE).await;
    standing.up().await;
    let mut link = agent.link(second.record());
    let attached = second.attached().await;
    let hash_key = HashKey { key: [8; 16], block_size_tokens: 16 };
    let welcome = Welcome { hash_key, ..welcoming("gw-1", LEASE) };
    attached.say(Heard::Welcome(welcome.into())).await;
    let mut refused = Peer::new(attached);
    refused.until_its_end().await;
    assert_eq!((refused.messages, refused.snapshots), (0, 0), "no hash leaves under a wrong key");
    let down =
        link.state("refused", |state| matches!(state, LinkState::Down(why) if why.contains("key"))).await;
    assert!(
        matches!(&down, LinkState::Down(why) if why.starts_with("gateway gw-1 names blocks by another key")),
        "{down:?}"
    );
    agent.store(0, 0..3);
    peer.until("the first gateway's changes", |peer| agent.knows_all(peer)).await;
}

#[tokio::test]
async fn one_gateway_under_two_addresses_gets_one_stream() {
    let agent = Agent::ready();
    let (mut one, mut two) = (Gateway::start(None).await, Gateway::start(None).await);
    let mut standing = agent.link(one.record());
    let mut peer = one.welcomed("gw", LEASE).await;
    standing.up().await;
    let mut twin = agent.link(two.record());
    let mut second = two.welcomed("gw", LEASE).await;
    second.until_its_end().await;
    assert_eq!(second.messages, 0);
    let down =
        twin.state("a twin", |state| matches!(state, LinkState::Down(why) if why.contains("already"))).await;
    assert_eq!(
        down,
        LinkState::Down("gateway gw is connected already, under another of its addresses".to_owned())
    );
    peer.until("the stream that stands", |peer| peer.snapshots == 2).await;
}

#[tokio::test]
async fn what_a_gateway_asks_for_is_answered() {
    let mut agent = Agent::ready();
    let mut gateway = Gateway::start(None).await;
    let _link = agent.link(gateway.record());
    let mut peer = gateway.welcomed("gw", LEASE).await;
    for number in 0..5 {
        agent.shared.log.push(&format!("line {number}"));
    }
    peer.stream.say(Heard::RequestLogs(v1::RequestLogs { request_id: 3, lines: 2 })).await;
    let logs = |peer: &Peer| {
        peer.other.iter().find_map(|said| if let Said::Logs(logs) = said { Some(logs.clone()) } else { None })
    };
    peer.until("the log", |peer| logs(peer).is_some()).await;
    let lines = vec!["line 3".to_owned(), "line 4".to_owned()];
    assert_eq!(logs(&peer), Some(v1::Logs { request_id: 3, lines }));

    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("tokenizer.json"), vec![b'x'; 3 << 20]).expect("written");
    agent.tokenizer.send_replace(Source::Folder(PathBuf::from(folder.path())));
    peer.stream.say(Heard::RequestTokenizer(v1::RequestTokenizer { request_id: 4 })).await;
    let last =
        |peer: &Peer| peer.other.iter().any(|said| matches!(said, Said::Tokenizer(piece) if piece.last));
    peer.until("the tokenizer", last).await;
    let mut reader = TokenizerReader::default();
    let pieces = peer
        .other
        .iter()
        .filter_map(|said| if let Said::Tokenizer(piece) = said { Some(piece.clone()) } else { None });
    let files = pieces
        .filter_map(|piece| reader.take(piece).expect("pieces that fit"))
        .next()
        .expect("the last")
        .expect("files");
    assert_eq!((files.len(), files[0].bytes.len()), (1, 3 << 20));

    peer.stream.say(Heard::DrainEngine(v1::DrainEngine {})).await;
    let asked = timeout(SOON, agent.drains.recv()).await.expect("soon").expect("an order");
    assert_eq!(asked, "an operator asked for it at a gateway");
}

#[tokio::test]
async fn a_fence_and_a_lost_sight_are_known_to_streams_that_come_later() {
    let mut agent = Agent::ready();
    agent.store(0, 0..3);
    let blind = CacheSight::Approximate { why: "its events stopped".to_owned() };
    agent.shared.board.notice(forebay_proto::Notice::Fenced { why: "it lied".to_owned() });
    agent.shared.board.notice(forebay_proto::Notice::Heard);
    agent.shared.board.notice(forebay_proto::Notice::CacheSight(blind.clone()));
    let mut gateway = Gateway::start(None).await;
    let _link = agent.link(gateway.record());
    let mut peer = gateway.welcomed("gw", LEASE).await;
    assert_eq!(peer.stream.hello.cache_sight, blind);
    let fenced = |peer: &Peer| {
        let notice = |said: &Said| {
            if let Said::Notice(notice) = said {
                forebay_proto::Notice::try_from(notice.clone()).ok()
            } else {
                None
            }
        };
        peer.other
            .iter()
            .filter_map(notice)
            .any(|notice| notice == forebay_proto::Notice::Fenced { why: "it lied".to_owned() })
    };
    peer.until("the fence", fenced).await;
    assert_eq!(peer.snapshots, 0, "nothing is said of a cache that is out of sight");
    agent.store(0, 3..6);
    agent.shared.board.notice(forebay_proto::Notice::CacheSight(CacheSight::Events));
    peer.until("the caches, in sight again", |peer| agent.knows_all(peer)).await;
    agent.assert_equal(&peer);
}

#[tokio::test]
async fn a_gateway_on_another_host_is_not_dialled_without_tls() {
    let agent = Agent::ready();
    let address = HostPort::new("192.0.2.1", 7070).expect("an address");
    let mut link = agent.link(GatewayRecord::new("far", address).expect("a record"));
    let down =
        link.state("refused", |state| matches!(state, LinkState::Down(why) if why.contains("TLS"))).await;
    assert!(
        matches!(&down, LinkState::Down(why) if why.contains("192.0.2.1:7070 is not on this host and there is no TLS")),
        "{down:?}"
    );
    link.listed.send_replace(false);
    timeout(SOON, &mut link.task).await.expect("a link that is not listed ends").expect("no panic");
}

#[tokio::test]
async fn certificates_are_shown_and_believed() {
    let (server, client, stranger) =
        (certificates("localhost"), certificates("agent"), certificates("agent"));
    let (server, client) = (with_ca(&server, &client), with_ca(&client, &server));
    let stranger = with_ca(&stranger, &certificates("nobody"));
    let mut gateway = Gateway::start(Some(&server)).await;
    let record = GatewayRecord { server_name: Some("localhost".to_owned()), ..gateway.record() };
    let mut refused = Agent::new(Some(stranger));
    refused.begin(FIRST);
    let mut link = refused.link(record.clone());
    link.state("no connection", |state| matches!(state, LinkState::Down(why) if why.contains("no connection") || why.contains("broke"))).await;
    let agent = Agent::new(Some(client));
    agent.begin(FIRST);
    let _link = agent.link(record);
    let mut peer = gateway.welcomed("gw", LEASE).await;
    peer.until("heartbeats", |peer| peer.messages > 1).await;
    assert!(refused.drains.try_recv().is_err());
}

/// A certificate that signs itself, and its key, in PEM.
fn certificates(name: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// The files of one who believes the other.
fn with_ca((cert, key): &(String, String), (ca, _): &(String, String)) -> TlsFiles {
    use forebay_proto::tls::{Identity, Pem};
    let identity =
        Identity { cert: Pem::new("cert.pem", cert.as_bytes()), key: Pem::new("key.pem", key.as_bytes()) };
    TlsFiles::new(Pem::new("ca.pem", ca.as_bytes()), Some(identity)).expect("files that fit")
}
