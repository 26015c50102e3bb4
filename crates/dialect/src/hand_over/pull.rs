//! The decode engine's end of the side channel.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use super::wire::{
    BLOCKS_PER_READ_MAX, CHECK_BYTES, Hello, OK, PromptIdentity, Refusal, STALE, Welcome, invalid,
    read_greeting, write_free, write_greeting, write_read,
};

/// Time to connect. A silent host is found out within it; a refused connection at once.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);
/// Time to free KV, connecting included. Beyond it the lease does.
pub(super) const FREE_TIME_MAX: Duration = Duration::from_secs(5);

/// Why KV did not arrive.
#[derive(Debug, thiserror::Error)]
pub(super) enum PullError {
    /// Nobody answers there, or not in these words.
    #[error("the prefill engine's side channel cannot be reached")]
    Unreachable(#[source] io::Error),
    /// The prefill engine said no.
    #[error("the prefill engine refused: {message}")]
    Refused { reason: Refusal, message: String },
    /// The prompt's blocks are not as many as this engine has for it.
    #[error("the prefill engine holds {found} blocks for this prompt, {expected} are needed")]
    Blocks { expected: u32, found: u32 },
    /// The block was reused there.
    #[error("block {index} of the prompt was reused at the prefill engine")]
    Stale { index: u32 },
    /// What arrived is not what was sent.
    #[error("block {index} of the prompt was damaged on its way")]
    Damaged { index: u32 },
    /// This engine gave the destination away.
    #[error("block {block} here was given to another sequence during the hand-over")]
    Reallocated { block: u32 },
    /// The connection broke.
    #[error("the side channel broke off")]
    Broken(#[source] io::Error),
}

impl PullError {
    /// Its name in the metrics.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Refused { reason: Refusal::NotHeld | Refusal::WrongEngine, .. } => "not_held",
            Self::Refused { reason: Refusal::OtherPrompt, .. } | Self::Blocks { .. } => "other_prompt",
            Self::Refused { reason: Refusal::OtherShape | Refusal::Protocol, .. } => "other_shape",
            Self::Stale { .. } => "stale",
            Self::Damaged { .. } => "damaged",
            Self::Reallocated { .. } => "reallocated",
            Self::Broken(_) => "broken",
        }
    }

    /// Whether the prefill engine may still hold the KV, and hears us.
    pub(super) fn leaves_kv_held(&self) -> bool {
        match self {
            Self::Unreachable(_) => false,
            Self::Refused { reason, .. } => !matches!(reason, Refusal::NotHeld | Refusal::WrongEngine),
            _ => true,
        }
    }
}

/// A granted hand-over.
pub(super) struct Connection {
    stream: BufReader<TcpStream>,
    prompt: PromptIdentity,
    /// Of the prompt.
    pub(super) blocks: u32,
    block_bytes: usize,
}

impl Connection {
    pub(super) async fn open(
        host: &str,
        port: u16,
        hello: &Hello,
        prompt: PromptIdentity,
    ) -> Result<Self, PullError> {
        let stream = timeout(CONNECT_TIME_MAX, TcpStream::connect((host, port))).await;
        let stream = stream.map_err(io::Error::from).flatten().map_err(PullError::Unreachable)?;
        stream.set_nodelay(true).map_err(PullError::Unreachable)?;
        let mut stream = BufReader::new(stream);
        write_greeting(&mut stream, hello).await.map_err(PullError::Unreachable)?;
        match read_greeting(&mut stream).await.map_err(PullError::Unreachable)? {
            Welcome::Granted { blocks } => {
                Ok(Self { stream, prompt, blocks, block_bytes: hello.shape.block_bytes as usize })
            }
            Welcome::Refused { reason, message } => Err(PullError::Refused { reason, message }),
        }
    }

    /// Reads blocks in the order of `indices` and gives each to `take`, whole and checked.
    pub(super) async fn read(
        &mut self,
        indices: &[u32],
        mut take: impl FnMut(usize, &[u8]) -> Result<(), PullError>,
    ) -> Result<(), PullError> {
        let mut bytes = vec![0; self.block_bytes];
        let mut taken = 0;
        for some in indices.chunks(BLOCKS_PER_READ_MAX) {
            write_read(&mut self.stream, some).await.map_err(PullError::Broken)?;
            for &index in some {
                self.read_one(index, &mut bytes).await?;
                take(taken, &bytes)?;
                taken += 1;
            }
        }
        Ok(())
    }

    async fn read_one(&mut self, index: u32, bytes: &mut [u8]) -> Result<(), PullError> {
        match self.stream.read_u8().await.map_err(PullError::Broken)? {
            OK => {}
            STALE => return Err(PullError::Stale { index }),
            _ => return Err(PullError::Broken(invalid("an unknown answer"))),
        }
        let mut check = [0; CHECK_BYTES];
        self.stream.read_exact(&mut check).await.map_err(PullError::Broken)?;
        self.stream.read_exact(bytes).await.map_err(PullError::Broken)?;
        if self.prompt.check(index, bytes) == check { Ok(()) } else { Err(PullError::Damaged { index }) }
    }

    /// Lets the prefill engine free the KV.
    pub(super) async fn free(mut self) -> io::Result<()> {
        write_free(&mut self.stream).await?;
        match self.stream.read_u8().await? {
            OK => Ok(()),
            _ => Err(invalid("an unknown answer")),
        }
    }
}
