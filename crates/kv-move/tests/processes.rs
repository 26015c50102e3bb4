//! Two real processes, one pool each: the memfd goes over a Unix socket, and one of them may die.
//!
//! The second process is this test binary again, told by its arguments to run one of the `child_*` functions below. They
//! are ignored tests: on their own they have no peer on standard input and end at once.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests are tests; clippy knows only the functions marked so"
)]

use std::{
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use forebay_kv_move::{
    BlockPair, BlockRef, CopyPlan, ExchangeError, KvDescriptor, Layout, LeaseError, LeaseTable, MoveError,
    Options, Outcome, Received, Region, SharedMemoryMover, SharedMemorySettings, block_on_move, recv_region,
    send_region,
};
use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(60);
const LAYOUT: Layout = Layout { block_bytes: 64 << 10, blocks: 48 };
/// Blocks of the pool that hold the prompt, in the order of its tokens: two runs and two single blocks.
const PROMPT: [u32; 8] = [7, 8, 9, 30, 31, 2, 40, 0];

fn content(block: u32, generation: u64) -> Vec<u8> {
    let first = block as usize * 31 + generation as usize * 7;
    (0..LAYOUT.block_bytes as usize).map(|at| ((first + at) * 11 % 251) as u8).collect()
}

fn generation(block: u32) -> u64 {
    1000 + u64::from(block)
}

/// A pool as a prefill engine leaves it, and what it tells about it.
fn prefilled() -> (Region, KvDescriptor) {
    let region = Region::create("kv-prefill", LAYOUT).unwrap();
    for block in PROMPT {
        region.set_generation(block, generation(block));
        region.copy_in(block, &content(block, generation(block)));
        region.publish_checksum(block);
    }
    let mut leases = LeaseTable::new(1);
    let lease = leases.grant(0, Duration::ZERO, PATIENCE).unwrap();
    let descriptor = KvDescriptor {
        region: region.key(),
        blocks: PROMPT.map(|block| BlockRef { block, generation: generation(block) }).to_vec(),
        tokens: 8 * 16 - 3,
        lease,
        lease_remaining: PATIENCE,
    };
    (region, descriptor)
}

/// What a decode engine does: fetches the named blocks into a pool of its own, from block 1 on.
fn fetch(received: &Received) -> (Region, Outcome) {
    let pool = Region::create("kv-decode", Layout { blocks: 16, ..LAYOUT }).unwrap();
    let pairs = received.descriptor.blocks.iter().zip(1..).map(|(source, block)| {
        pool.set_generation(block, 5);
        BlockPair { source: *source, destination: BlockRef { block, generation: 5 } }
    });
    let plan = CopyPlan::new(received.region.clone(), pool.clone(), pairs.collect()).unwrap();
    let mover = SharedMemoryMover::new(SharedMemorySettings::default()).unwrap();
    let deadline = Instant::now() + received.descriptor.lease_remaining;
    let outcome = block_on_move(&mover, plan, Options::verified_until(deadline)).unwrap();
    (pool, outcome)
}

/// What was fetched, against what the prompt's blocks should hold.
fn assert_prompt_arrived(pool: &Region) {
    let mut bytes = vec![0; LAYOUT.block_bytes as usize];
    for (block, at) in PROMPT.into_iter().zip(1..) {
        pool.copy_out(at, &mut bytes);
        assert!(bytes == content(block, generation(block)), "block {block} is not at {at}");
    }
}

/// One of the functions below in a process of its own, which is killed when the test ends, however that is.
struct Peer {
    child: Child,
    socket: UnixStream,
}

impl Peer {
    fn start(test: &str) -> Self {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--ignored", "--nocapture"])
            .stdin(OwnedFd::from(there))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, socket: here }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn read_byte(&mut self) -> u8 {
        let mut byte = [0];
        self.socket.read_exact(&mut byte).unwrap();
        byte[0]
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Already gone in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The socket to the parent; `None` if this process was not started by one.
fn parent() -> Option<UnixStream> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    rustix::net::getsockname(&stdin).ok()?;
    let socket = UnixStream::from(stdin);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    Some(socket)
}

/// Decode side: receives, waits for a byte, fetches, answers with one byte for the outcome.
#[test]
#[ignore = "runs in a process of its own, started by the tests below"]
fn child_fetches() {
    let Some(mut socket) = parent() else { return };
    let received = recv_region(&socket).unwrap();
    assert!(!received.region.is_writable());
    socket.read_exact(&mut [0]).unwrap();
    let (pool, outcome) = fetch(&received);
    let answer = match outcome {
        Outcome::Done(report) => {
            assert_eq!((report.blocks, report.bytes), (8, 8 * LAYOUT.block_bytes));
            assert_eq!(report.pieces, 5);
            assert_prompt_arrived(&pool);
            b'd'
        }
        Outcome::Failed(MoveError::Stale { block: 30, expected: 1030, found: 1031 }) => b's',
        other => panic!("{other:?}"),
    };
    socket.write_all(&[answer]).unwrap();
}

/// Prefill side: sends its pool, starts to rewrite block 40, and waits for its end.
#[test]
#[ignore = "runs in a process of its own, started by the tests below"]
fn child_owns() {
    let Some(mut socket) = parent() else { return };
    let (region, descriptor) = prefilled();
    send_region(&socket, &region, &descriptor).unwrap();
    region.set_generation(11, 1);
    region.copy_in(11, &vec![1; LAYOUT.block_bytes as usize]);
    socket.write_all(b"w").unwrap();
    // Until the parent rewinds this process with a signal, or ends itself.
    let _ = socket.read(&mut [0]);
    region.set_generation(40, 9999);
    socket.write_all(b"r").unwrap();
    let _ = socket.read(&mut [0]);
}

#[test]
fn another_process_fetches_blocks_with_one_copy() {
    let (region, descriptor) = prefilled();
    let mut peer = Peer::start("child_fetches");
    send_region(&peer.socket, &region, &descriptor).unwrap();
    peer.socket.write_all(b"g").unwrap();
    assert_eq!(peer.read_byte(), b'd');
    assert!(peer.child.wait().unwrap().success());
}

#[test]
fn a_block_that_its_owner_reused_is_stale_in_the_other_process() {
    let (region, descriptor) = prefilled();
    let mut peer = Peer::start("child_fetches");
    send_region(&peer.socket, &region, &descriptor).unwrap();
    region.set_generation(30, 1031);
    peer.socket.write_all(b"g").unwrap();
    assert_eq!(peer.read_byte(), b's');
    assert!(peer.child.wait().unwrap().success());
}

/// What holds after a kill -9: memory stays, complete blocks are readable, a block whose rewriting had begun is stale,
/// the socket ends (so the reader knows), and the lease, which only its owner could renew, runs out.
#[test]
fn a_killed_owner_leaves_readable_memory_and_a_lease_that_ends() {
    let mut peer = Peer::start("child_owns");
    let received = recv_region(&peer.socket).unwrap();
    assert_eq!(peer.read_byte(), b'w');
    peer.kill();

    let (pool, outcome) = fetch(&received);
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    assert_prompt_arrived(&pool);
    assert!(matches!(recv_region(&peer.socket), Err(ExchangeError::Closed)), "a lost peer is seen");

    // The reader's own record of what it was told: nobody renews it, so it is over at its end, and a deadline that keeps
    // to it lets no transfer begin.
    let mut told = LeaseTable::new(1);
    let lease = told.grant(0, Duration::ZERO, received.descriptor.lease_remaining).unwrap();
    let end = received.descriptor.lease_remaining;
    assert_eq!(told.renew(lease, end, end), Err(LeaseError::Over { lease }));
    let over = Received {
        descriptor: KvDescriptor { lease_remaining: Duration::ZERO, ..received.descriptor },
        ..received
    };
    assert_eq!(fetch(&over).1, Outcome::TimedOut);
}

#[test]
fn a_block_that_was_being_rewritten_when_its_owner_died_is_stale() {
    let mut peer = Peer::start("child_owns");
    let received = recv_region(&peer.socket).unwrap();
    assert_eq!(peer.read_byte(), b'w');
    peer.socket.write_all(b"g").unwrap();
    assert_eq!(peer.read_byte(), b'r');
    peer.kill();
    let expected = MoveError::Stale { block: 40, expected: 1040, found: 9999 };
    assert_eq!(fetch(&received).1, Outcome::Failed(expected));
}

/// Reading asks nothing of the owner: one that is stopped delays nobody.
#[test]
fn a_stopped_owner_holds_nobody_up() {
    let mut peer = Peer::start("child_owns");
    let received = recv_region(&peer.socket).unwrap();
    assert_eq!(peer.read_byte(), b'w');
    kill_process(peer.pid(), Signal::STOP).unwrap();
    let (pool, outcome) = fetch(&received);
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    assert_prompt_arrived(&pool);
}
