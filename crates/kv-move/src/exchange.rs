//! Passing a region to another process: its memfd over a Unix socket, with a description of the blocks that are meant.
//!
//! In: a connected stream socket. Out: the region as the other side may use it (mapped for reading), and a
//! [`KvDescriptor`]. The message is a header (`magic u32, version u16, zero u16, body length u32`), whose first byte
//! carries the descriptor (`SCM_RIGHTS`), then a body; all little-endian.
//!
//! Invariants: nothing from the peer is trusted (lengths bounded before memory is taken, the region validated by
//! [`Region::open`], every block reference checked against it), and no file descriptor leaks, however many came.
//! Both functions block: give the socket timeouts, and keep them off async threads.

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags,
    },
};

use crate::{
    lease::LeaseId,
    plan::BlockRef,
    region::{Region, RegionError, RegionKey},
};

/// Blocks that one message may name: 65,536 blocks of 16 tokens are a million tokens, the longest contexts there are.
pub const DESCRIPTOR_BLOCKS_MAX: usize = 1 << 16;

const MAGIC: u32 = u32::from_le_bytes(*b"FBKX");
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 12;
const FIXED_BYTES: usize = 40;
const BLOCK_BYTES: usize = 12;

/// KV that may be fetched: which blocks of which pool, what is in them and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvDescriptor {
    /// The pool.
    pub region: RegionKey,
    /// The blocks, in the order of the tokens.
    pub blocks: Vec<BlockRef>,
    /// Tokens whose KV is in the blocks; the last block may be part full.
    pub tokens: u32,
    /// The lease that keeps them as they are, in the owner's [`LeaseTable`](crate::LeaseTable).
    pub lease: LeaseId,
    /// What was left of the lease when this was sent (whole microseconds on the wire). A duration, since two processes
    /// need not share a clock; the receiver counts from before it began to wait for the message, or takes off a
    /// margin, and sets no later deadline.
    pub lease_remaining: Duration,
}

/// What arrived.
#[derive(Debug)]
pub struct Received {
    /// Mapped for reading.
    pub region: Region,
    /// Its blocks are all within the region.
    pub descriptor: KvDescriptor,
}

/// Why a region was not sent or received. Close the socket: where in the stream the other side is cannot be known.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The socket failed or timed out.
    #[error("the exchange socket failed: reconnect")]
    Socket(#[source] io::Error),
    /// The other side closed the socket before a message began.
    #[error("the other side closed the exchange: take its pools as lost")]
    Closed,
    /// Something else speaks on this socket.
    #[error("the peer does not speak the exchange protocol: check the socket's path")]
    NotExchange,
    /// The peer speaks another version.
    #[error(
        "the peer speaks exchange version {found}, this program {expected}: run the same version on both sides"
    )]
    Version {
        /// The peer's.
        found: u16,
        /// Ours.
        expected: u16,
    },
    /// A message that cannot be right, or too many blocks to send.
    #[error(
        "a descriptor of {blocks} blocks in {body_bytes} bytes cannot be: at most {DESCRIPTOR_BLOCKS_MAX} blocks"
    )]
    Length {
        /// Blocks named.
        blocks: usize,
        /// Length of the body.
        body_bytes: usize,
    },
    /// A message must carry exactly one.
    #[error("the message carried {found} file descriptors instead of one")]
    FileDescriptors {
        /// How many came (more than two are cut off by the kernel and count as two).
        found: usize,
    },
    /// The descriptor is not a region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The description is of another pool than came, or is sent.
    #[error("the descriptor names pool {named}, the region is {found}: fence the peer")]
    OtherRegion {
        /// In the descriptor.
        named: RegionKey,
        /// In the region.
        found: RegionKey,
    },
    /// A block that the pool has not.
    #[error("the descriptor names block {block} of a pool of {blocks} blocks: fence the peer")]
    Range {
        /// The index.
        block: u32,
        /// Size of the pool.
        blocks: u32,
    },
}

impl From<io::Error> for ExchangeError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

/// Sends `region`'s memfd and `descriptor`. The other side calls [`recv_region`].
///
/// # Errors
/// `Length`, `OtherRegion` and `Range` before anything is sent; else `Socket`.
pub fn send_region(
    stream: &UnixStream,
    region: &Region,
    descriptor: &KvDescriptor,
) -> Result<(), ExchangeError> {
    check(region, descriptor)?;
    let body = encode(descriptor)?;
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    message.extend(MAGIC.to_le_bytes());
    message.extend(VERSION.to_le_bytes());
    message.extend([0; 2]);
    message.extend((body.len() as u32).to_le_bytes());
    message.extend(body);

    let fds = [region.fd()];
    let sent = loop {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let pushed = ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        debug_assert!(pushed, "the space is reckoned for one descriptor");
        let parts = [IoSlice::new(&message)];
        match rustix::net::sendmsg(stream.as_fd(), &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            result => break result.map_err(io::Error::from)?,
        }
    };
    // The descriptor went with the first byte; what the socket's buffer had no room for follows plainly.
    let mut stream = stream;
    stream.write_all(&message[sent..])?;
    Ok(())
}

/// Receives what [`send_region`] sent.
///
/// # Errors
/// Any [`ExchangeError`]; `Closed` is the peer's orderly or disorderly end between two messages.
pub fn recv_region(stream: &UnixStream) -> Result<Received, ExchangeError> {
    let mut header = [0; HEADER_BYTES];
    let (read, fds) = recv_with_descriptors(stream, &mut header)?;
    if read == 0 {
        return Err(ExchangeError::Closed);
    }
    let mut stream = stream;
    stream.read_exact(&mut header[read..])?;
    let field = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if header[..4] != MAGIC.to_le_bytes() {
        return Err(ExchangeError::NotExchange);
    }
    if field(4) != VERSION {
        return Err(ExchangeError::Version { found: field(4), expected: VERSION });
    }
    let body_bytes = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
    let blocks = body_bytes.saturating_sub(FIXED_BYTES) / BLOCK_BYTES;
    if body_bytes != FIXED_BYTES + blocks * BLOCK_BYTES || blocks > DESCRIPTOR_BLOCKS_MAX {
        return Err(ExchangeError::Length { blocks, body_bytes });
    }
    // Descriptors that a peer attaches to the body are closed by the kernel: a plain read takes none.
    let mut body = vec![0; body_bytes];
    stream.read_exact(&mut body)?;
    let descriptor = decode(&body)?;
    let found = fds.len();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_other| ExchangeError::FileDescriptors { found })?;
    let region = Region::open(fd)?;
    check(&region, &descriptor)?;
    Ok(Received { region, descriptor })
}

/// One read together with the descriptors that came with its bytes.
fn recv_with_descriptors(
    stream: &UnixStream,
    bytes: &mut [u8],
) -> Result<(usize, Vec<OwnedFd>), ExchangeError> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(bytes)];
        match rustix::net::recvmsg(stream.as_fd(), &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            result => break result.map_err(io::Error::from)?,
        }
    };
    // Owned from here on, so that each is closed whatever follows.
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ExchangeError::FileDescriptors { found: fds.len().max(2) });
    }
    Ok((received.bytes, fds))
}

fn check(region: &Region, descriptor: &KvDescriptor) -> Result<(), ExchangeError> {
    if descriptor.region != region.key() {
        return Err(ExchangeError::OtherRegion { named: descriptor.region, found: region.key() });
    }
    let blocks = region.layout().blocks;
    match descriptor.blocks.iter().find(|reference| reference.block >= blocks) {
        Some(reference) => Err(ExchangeError::Range { block: reference.block, blocks }),
        None => Ok(()),
    }
}

fn encode(descriptor: &KvDescriptor) -> Result<Vec<u8>, ExchangeError> {
    let blocks = descriptor.blocks.len();
    let body_bytes = FIXED_BYTES + blocks * BLOCK_BYTES;
    if blocks > DESCRIPTOR_BLOCKS_MAX {
        return Err(ExchangeError::Length { blocks, body_bytes });
    }
    let micros = u64::try_from(descriptor.lease_remaining.as_micros()).unwrap_or(u64::MAX);
    let mut body = Vec::with_capacity(body_bytes);
    body.extend(descriptor.region.epoch.to_le_bytes());
    body.extend(descriptor.region.id.to_le_bytes());
    body.extend(descriptor.lease.0.to_le_bytes());
    body.extend(micros.to_le_bytes());
    body.extend(descriptor.tokens.to_le_bytes());
    body.extend((blocks as u32).to_le_bytes());
    for reference in &descriptor.blocks {
        body.extend(reference.generation.to_le_bytes());
        body.extend(reference.block.to_le_bytes());
    }
    Ok(body)
}

/// `body` is as long as a whole number of blocks needs.
fn decode(body: &[u8]) -> Result<KvDescriptor, ExchangeError> {
    let (fixed, blocks) = body.split_at(FIXED_BYTES);
    let word = |bytes: &[u8], at: usize| {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes of a longer record"))
    };
    let half = |bytes: &[u8], at: usize| {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes of a longer record"))
    };
    let named = half(fixed, 36) as usize;
    if named * BLOCK_BYTES != blocks.len() {
        return Err(ExchangeError::Length { blocks: named, body_bytes: body.len() });
    }
    Ok(KvDescriptor {
        region: RegionKey { epoch: word(fixed, 0), id: word(fixed, 8) },
        lease: LeaseId(word(fixed, 16)),
        lease_remaining: Duration::from_micros(word(fixed, 24)),
        tokens: half(fixed, 32),
        blocks: blocks
            .chunks_exact(BLOCK_BYTES)
            .map(|bytes| BlockRef { generation: word(bytes, 0), block: half(bytes, 8) })
            .collect(),
    })
}

#[cfg(test)]
mod tests;
