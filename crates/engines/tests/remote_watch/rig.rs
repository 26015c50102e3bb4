//! What the tests here share.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use forebay_engines::{
    Notice, Report, Reports,
    remote::{
        AttachSettings, AttachSpec, Attached, ObserveSettings, Observer, Overrides, TokenizerProbe,
        client::{ClientSettings, Endpoint, HttpClient, Secret},
        observe,
    },
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_testkit::tokenizer;
use forebay_types::{BlockHash, Incarnation, KvEvent, RankLoad, TokenId, device_blocks};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::timeout,
};

/// Nothing here takes nearly so long, even on a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Of the fleet; engines here have blocks of the same size unless a test says otherwise.
pub const BLOCK: u32 = 16;

pub fn hasher() -> BlockHasher {
    BlockHasher::new(HashKey::GOLDEN, BLOCK)
}

/// Waits for what must come.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it came in time")
}

pub fn endpoint(url: &str, key: Option<&str>) -> Endpoint {
    let client = HttpClient::new(&ClientSettings::default()).unwrap();
    Endpoint::new(url, client, key.map(Secret::new).as_ref()).unwrap()
}

pub fn spec() -> AttachSpec {
    AttachSpec {
        name: "e0".into(),
        dialect: None,
        role: None,
        incarnation: Incarnation(7),
        model: None,
        block_size_tokens: BLOCK,
        tokenizer: Some(Arc::new(Tokenizer)),
        overrides: Overrides::default(),
        settings: AttachSettings {
            document_within: Duration::from_secs(5),
            generate_within: Duration::from_secs(10),
            ..AttachSettings::default()
        },
    }
}

/// The doubles' own.
pub struct Tokenizer;

impl TokenizerProbe for Tokenizer {
    fn prompt(&self, text: &str) -> Result<Vec<TokenId>, String> {
        Ok(tokenizer::encode(text))
    }

    fn chat(&self, messages: &[(&str, &str)]) -> Result<Vec<TokenId>, String> {
        let messages: Vec<_> =
            messages.iter().map(|(role, content)| ((*role).to_owned(), (*content).to_owned())).collect();
        Ok(tokenizer::encode(&tokenizer::render_chat(&messages, true)))
    }
}

/// A server of a few lines: answers by method and path, query left out; 404 for the rest.
#[allow(dead_code, reason = "each test uses its own part")]
pub struct Scripted {
    pub url: String,
    pub port: u16,
}

impl Scripted {
    pub async fn start(
        answer: impl Fn(&str, &Value) -> Option<(u16, String)> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let answer = Arc::new(answer);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, answer.clone()));
            }
        });
        Self { url: format!("http://127.0.0.1:{port}"), port }
    }

    /// One that always answers the same.
    pub async fn fixed(answers: &[(&str, u16, &str)]) -> Self {
        let answers: BTreeMap<String, (u16, String)> = answers
            .iter()
            .map(|(route, status, body)| ((*route).to_owned(), (*status, (*body).to_owned())))
            .collect();
        Self::start(move |route, _| answers.get(route).cloned()).await
    }
}

type Answer = dyn Fn(&str, &Value) -> Option<(u16, String)> + Send + Sync;

async fn serve(mut stream: TcpStream, answer: Arc<Answer>) -> Option<()> {
    let mut buffer = Vec::new();
    let head = loop {
        if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(&mut buffer).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8(buffer[..head].to_vec()).ok()?.to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.map_or(0, |length| length.trim().parse().unwrap());
    while buffer.len() < head + 4 + length {
        if stream.read_buf(&mut buffer).await.ok()? == 0 {
            return None;
        }
    }
    let request = std::str::from_utf8(&buffer[..head]).ok()?;
    let mut line = request.lines().next()?.split(' ');
    let (method, path) = (line.next()?, line.next()?.split('?').next()?);
    let body = serde_json::from_slice(&buffer[head + 4..]).unwrap_or(Value::Null);
    let (status, body) =
        answer(&format!("{method} {path}"), &body).unwrap_or((404, r#"{"detail":"Not Found"}"#.into()));
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.ok()?;
    stream.write_all(body.as_bytes()).await.ok()?;
    stream.shutdown().await.ok()
}

/// Bounds that make waiting short.
pub fn quick() -> ObserveSettings {
    ObserveSettings {
        poll_every: Duration::from_millis(100),
        silent_after: Duration::from_millis(600),
        lease: Duration::from_secs(3),
        ..ObserveSettings::default()
    }
}

/// An engine that is watched, and what was reported of it so far.
pub struct Watched {
    pub observer: Observer,
    pub reports: Arc<Reports>,
    pub trouble: Arc<Notify>,
    pub notices: Vec<Notice>,
    pub died: Option<Arc<str>>,
    pub loads: BTreeMap<u16, RankLoad>,
    pub steps: usize,
    /// By rank, as an index would have them.
    pub blocks: BTreeMap<u16, BTreeSet<BlockHash>>,
    next: BTreeMap<u16, u64>,
}

impl Watched {
    pub fn begin(endpoint: &Endpoint, attached: &Attached, settings: ObserveSettings) -> Self {
        let (reports, trouble) = (Arc::new(Reports::default()), Arc::new(Notify::new()));
        let observer = observe(
            endpoint.clone(),
            attached.plan.clone(),
            &attached.facts,
            hasher(),
            settings,
            reports.clone(),
            trouble.clone(),
        );
        Self {
            observer,
            reports,
            trouble,
            notices: Vec::new(),
            died: None,
            loads: BTreeMap::new(),
            steps: 0,
            blocks: BTreeMap::new(),
            next: BTreeMap::new(),
        }
    }

    /// Reads reports until `state` holds.
    pub async fn until(&mut self, what: &str, mut state: impl FnMut(&Self) -> bool) {
        let waiting = async {
            while !state(self) {
                let report = self.reports.next().await;
                self.take(report);
            }
        };
        let in_time = timeout(PATIENCE, waiting).await.is_ok();
        assert!(in_time, "{what}: not in time; notices {:?}, died {:?}", self.notices, self.died);
    }

    /// As the orchestrator does: snapshots first, then batches that are next.
    fn take(&mut self, report: Report) {
        for snapshot in report.snapshots {
            let rank = snapshot.rank.dp_rank;
            self.next.insert(rank, snapshot.sequence_next);
            self.blocks.insert(rank, device_blocks(&snapshot.contents).collect());
        }
        for batch in report.kv {
            let rank = batch.rank.dp_rank;
            let next = self.next.entry(rank).or_default();
            assert_eq!(batch.sequence, *next, "numbers without gaps");
            *next += 1;
            let blocks = self.blocks.entry(rank).or_default();
            for event in batch.events {
                match event {
                    KvEvent::Stored { hashes, .. } => blocks.extend(hashes),
                    KvEvent::Removed { hashes, .. } => blocks.retain(|block| !hashes.contains(block)),
                    KvEvent::Groups(_) => {}
                    KvEvent::Cleared => blocks.clear(),
                }
            }
        }
        self.loads.extend(report.loads.iter().map(|report| (report.dp_rank, report.load)));
        self.steps += report.steps.len();
        self.notices.extend(report.notices);
        self.died = report.died;
    }

    /// Whether all of a prompt's blocks are cached at a rank, by what was reported.
    pub fn holds(&self, dp_rank: u16, model: &str, prompt: &[TokenId]) -> bool {
        let hasher = hasher();
        let chain = hasher.chain(hasher.root(model, ""), prompt);
        let blocks = self.blocks.get(&dp_rank);
        !chain.is_empty() && blocks.is_some_and(|blocks| chain.iter().all(|block| blocks.contains(block)))
    }

    pub fn has_note(&self, text: &str) -> bool {
        self.notices.iter().any(|notice| matches!(notice, Notice::Note(note) if note.contains(text)))
    }
}
