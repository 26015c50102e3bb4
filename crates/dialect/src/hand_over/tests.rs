//! Both ends of a hand-over over real sockets.

use std::{
    sync::mpsc::{Receiver, sync_channel},
    time::{Duration, Instant},
};

use forebay_kv_move::{BlockPair, BlockRef, CopyPlan, Layout, MoveError, Options, Outcome, Region, Ticket};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;

const BLOCK_BYTES: u64 = 64;
/// More than one request's worth.
const BLOCKS: u32 = wire::BLOCKS_PER_READ_MAX as u32 + 6;
const SHAPE: KvShape = KvShape { layout: 7, block_size_tokens: 4, block_bytes: BLOCK_BYTES };
const TOKENS: u32 = BLOCKS * 4 - 1;
const PATIENCE: Duration = Duration::from_secs(20);

/// A prefill engine that holds one prompt, and a decode engine.
struct Pair {
    source: Region,
    shared: Arc<Shared>,
    released: Arc<Mutex<Vec<LegId>>>,
    destination: Region,
    puller: Arc<Puller>,
    stats: Arc<TransferStats>,
    from: PullFrom,
    identity: PromptIdentity,
    _stop: watch::Sender<()>,
}

async fn pair() -> Pair {
    let layout = Layout { block_bytes: BLOCK_BYTES, blocks: BLOCKS };
    let source = Region::create("source", layout).unwrap();
    // In another order than the prompt's.
    let blocks: Arc<[BlockRef]> = (0..BLOCKS).rev().map(|block| BlockRef { block, generation: 3 }).collect();
    for (index, block) in blocks.iter().enumerate() {
        source.set_generation(block.block, block.generation);
        source.copy_in(block.block, &[index as u8 + 1; BLOCK_BYTES as usize]);
    }
    let released = Arc::new(Mutex::new(Vec::new()));
    let log = released.clone();
    let shared = Arc::new(Shared {
        engine_id: "life-1".to_owned(),
        shape: SHAPE,
        held: HeldTable::default(),
        release: Box::new(move |leg| log.lock().push(leg)),
    });
    let identity = PromptIdentity::of("m", "", &[1, 2, 3]);
    let until = Instant::now() + PATIENCE;
    let held =
        Held { leg: LegId(5), region: source.clone(), blocks, tokens: TOKENS, prompt: identity, until };
    shared.held.insert("req-1".to_owned(), held, Instant::now());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (stop, stopping) = watch::channel(());
    tokio::spawn(source::serve(listener, shared.clone(), 4, stopping));
    let stats = Arc::new(TransferStats::default());
    let from = PullFrom {
        engine_id: "life-1".to_owned(),
        request_id: "req-1".to_owned(),
        host: "127.0.0.1".to_owned(),
        port,
        cached_tokens: 0,
    };
    let destination = Region::create("destination", layout).unwrap();
    (0..BLOCKS).for_each(|block| destination.set_generation(block, 9));
    let puller = Puller::new(Handle::current(), stats.clone());
    Pair { source, shared, released, destination, puller, stats, from, identity, _stop: stop }
}

type Ends = Receiver<Outcome>;

impl Pair {
    /// Asks for the prompt's blocks `indices`, to be put at the same indices here.
    fn submit(&self, indices: &[u32], deadline: Duration) -> (Expected, Ticket, Ends) {
        let expected = self.puller.expect(&self.from, SHAPE, (self.identity, TOKENS), TOKENS - 1).unwrap();
        let pair = |&index: &u32| BlockPair {
            source: expected.blocks[index as usize],
            destination: BlockRef { block: index, generation: 9 },
        };
        let pairs = indices.iter().map(pair).collect();
        let plan = CopyPlan::new(expected.stand_in.clone(), self.destination.clone(), pairs).unwrap();
        let (sender, ends) = sync_channel(2);
        let done = Box::new(move |outcome| sender.try_send(outcome).expect("one outcome"));
        let ticket = self.puller.submit(plan, Options::until(Instant::now() + deadline), done).unwrap();
        (expected, ticket, ends)
    }

    async fn outcome(&self, indices: &[u32]) -> Outcome {
        let (_expected, _ticket, ends) = self.submit(indices, PATIENCE);
        end(ends).await
    }

    /// Waits until the source's engine was told to free the prompt.
    async fn freed(&self) {
        let freed = async {
            while self.released.lock().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, freed).await.expect("the source was not told");
        assert_eq!(*self.released.lock(), [LegId(5)]);
        assert!(self.shared.held.get("req-1", Instant::now()).is_none());
    }

    fn failures(&self) -> Vec<(&'static str, u64)> {
        self.stats.read().failed.into_iter().collect()
    }

    /// The destination block holds the prompt's block `index`.
    fn holds(&self, index: u32) -> bool {
        let mut bytes = [0; BLOCK_BYTES as usize];
        self.destination.copy_out(index, &mut bytes);
        bytes == [index as u8 + 1; BLOCK_BYTES as usize]
    }
}

async fn end(ends: Ends) -> Outcome {
    tokio::task::spawn_blocking(move || {
        let outcome = ends.recv_timeout(PATIENCE).expect("a ticket ends");
        assert!(ends.try_recv().is_err(), "a ticket ends once");
        outcome
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_arrives_and_the_source_is_freed() {
    let pair = pair().await;
    let wanted: Vec<u32> = (2..BLOCKS).collect();
    let Outcome::Done(report) = pair.outcome(&wanted).await else {
        panic!("it failed: {:?}", pair.failures())
    };
    assert_eq!((report.blocks, report.bytes), (BLOCKS - 2, u64::from(BLOCKS - 2) * BLOCK_BYTES));
    assert!(wanted.iter().all(|index| pair.holds(*index)));
    assert!(!pair.holds(0) && !pair.holds(1), "nobody asked for these");
    pair.freed().await;
    let read = pair.stats.read();
    assert_eq!((read.bytes.count(), read.bytes.sum(), read.failed.len()), (1, report.bytes as f64, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_everything_here_already_the_source_is_freed_all_the_same() {
    let pair = pair().await;
    assert!(matches!(pair.outcome(&[]).await, Outcome::Done(report) if report.blocks == 0));
    pair.freed().await;
    assert_eq!(pair.stats.read().bytes.count(), 0, "nothing was transferred");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_that_is_never_asked_for_is_freed() {
    let pair = pair().await;
    drop(pair.puller.expect(&pair.from, SHAPE, (pair.identity, TOKENS), TOKENS - 1).unwrap());
    pair.freed().await;
    let pair = self::pair().await;
    // Even where the shapes differ: nothing is read.
    let other = KvShape { layout: 8, ..SHAPE };
    pair.puller.decline(&pair.from, other, (pair.identity, TOKENS));
    pair.freed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reused_block_fails_the_hand_over() {
    let pair = pair().await;
    pair.source.set_generation(BLOCKS - 1 - 4, 4); // the prompt's block 4
    let outcome = pair.outcome(&[3, 4, 5]).await;
    assert!(matches!(outcome, Outcome::Failed(MoveError::Stale { block: 4, .. })), "{outcome:?}");
    assert!(pair.holds(3) && !pair.holds(4) && !pair.holds(5));
    pair.freed().await;
    assert_eq!(pair.failures(), [("stale", 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_was_given_away_is_not_written() {
    let pair = pair().await;
    pair.destination.set_generation(4, 10);
    let outcome = pair.outcome(&[4]).await;
    assert!(
        matches!(outcome, Outcome::Failed(MoveError::DestinationReallocated { block: 4, .. })),
        "{outcome:?}"
    );
    assert!(!pair.holds(4));
    pair.freed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_agree_is_refused() {
    let refused = |change: fn(&mut Pair), reason: &'static str| async move {
        let mut pair = pair().await;
        change(&mut pair);
        assert_eq!(pair.outcome(&[0]).await, Outcome::Failed(MoveError::PeerGone), "{reason}");
        assert_eq!(pair.failures(), [(reason, 1)]);
        assert!(!pair.holds(0), "{reason}");
    };
    refused(|pair| pair.from.engine_id = "life-2".to_owned(), "not_held").await;
    refused(|pair| pair.from.request_id = "req-2".to_owned(), "not_held").await;
    refused(|pair| pair.identity = PromptIdentity::of("m", "", &[1, 2, 4]), "other_prompt").await;
    refused(|pair| drop(pair.shared.held.remove("req-1")), "not_held").await;
    refused(|pair| pair.from.port = 1, "unreachable").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_shapes_are_refused() {
    let pair = pair().await;
    for shape in [
        KvShape { layout: 8, ..SHAPE },
        KvShape { block_size_tokens: 8, ..SHAPE },
        KvShape { block_bytes: 128, ..SHAPE },
    ] {
        let hello = wire::Hello::new("life-1", "req-1", shape, (pair.identity, TOKENS));
        let opened = pull::Connection::open("127.0.0.1", pair.from.port, &hello, pair.identity).await;
        let Err(error) = opened else { panic!("{shape:?} was accepted") };
        assert_eq!(error.reason(), "other_shape");
    }
    assert!(pair.released.lock().is_empty(), "the KV is still there for who may have it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_that_changed_on_its_way_is_found() {
    let mut pair = pair().await;
    pair.from.port = flipping(pair.from.port).await;
    let outcome = pair.outcome(&[0, 1, 2, 3]).await;
    assert!(matches!(outcome, Outcome::Failed(MoveError::ChecksumMismatch { .. })), "{outcome:?}");
    assert_eq!(pair.failures(), [("damaged", 1)]);
    assert!((0..4).any(|index| !pair.holds(index)));
    pair.freed().await;
}

/// A port that passes everything on, but for one bit of the last byte of the first connection's second answer.
async fn flipping(to: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut first = true;
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
            let damage = std::mem::replace(&mut first, false);
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let up = async {
                    let _ended = tokio::io::copy(&mut from_client, &mut to_server).await;
                    let _closed = to_server.shutdown().await;
                };
                let down = async {
                    // The greeting, then the blocks.
                    let length = from_server.read_u32().await.unwrap_or(0);
                    let mut greeting = vec![0; length as usize];
                    let _read = from_server.read_exact(&mut greeting).await;
                    let _written = to_client.write_u32(length).await;
                    let _written = to_client.write_all(&greeting).await;
                    if damage {
                        let mut block = vec![0; 1 + wire::CHECK_BYTES + BLOCK_BYTES as usize];
                        let _read = from_server.read_exact(&mut block).await;
                        *block.last_mut().unwrap() ^= 4;
                        let _written = to_client.write_all(&block).await;
                    }
                    let _ended = tokio::io::copy(&mut from_server, &mut to_client).await;
                    let _closed = to_client.shutdown().await;
                };
                tokio::join!(up, down);
            });
        }
    });
    port
}

/// A port that accepts and says nothing.
async fn silent() -> (u16, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (listener.local_addr().unwrap().port(), listener)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_engine_costs_no_more_than_the_deadline() {
    let mut pair = pair().await;
    let (port, _listener) = silent().await;
    pair.from.port = port;
    let (_expected, _ticket, ends) = pair.submit(&[0], Duration::from_millis(50));
    assert_eq!(end(ends).await, Outcome::TimedOut);
    assert_eq!(pair.failures(), [("timed_out", 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_hand_over_ends_at_once() {
    let mut pair = pair().await;
    let (port, _listener) = silent().await;
    pair.from.port = port;
    let (_expected, ticket, ends) = pair.submit(&[0], PATIENCE);
    ticket.cancel();
    ticket.cancel();
    assert_eq!(end(ends).await, Outcome::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_was_expected_is_fetched() {
    let pair = pair().await;
    let plan = CopyPlan::new(pair.source.clone(), pair.destination.clone(), Vec::new()).unwrap();
    let refused = pair.puller.submit(plan, Options::until(Instant::now() + PATIENCE), Box::new(|_| ()));
    assert!(matches!(refused, Err(forebay_kv_move::SubmitError::Unreachable { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_a_connection_and_nothing_else() {
    let pair = pair().await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0, 0, 2, b'{', b'}'], &[0, 0, 0, 0]] {
        let mut stream = TcpStream::connect(("127.0.0.1", pair.from.port)).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap();
        assert!(closed.is_err() || rest.is_empty(), "{rest:?}");
    }
    assert!(matches!(pair.outcome(&[0]).await, Outcome::Done(_)));
}
