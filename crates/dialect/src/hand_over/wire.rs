//! What is said on the side channel. One TCP connection a hand-over, opened by the decode engine.
//!
//! | from | what |
//! | --- | --- |
//! | decode | [`Hello`]: 4 bytes of length, JSON |
//! | prefill | [`Welcome`]: the same |
//! | decode | any number of `1`, a count, that many block indices |
//! | prefill | for each: `0`, a 16-byte check, the block's bytes; or `1`: it is no longer there |
//! | decode | `2`: free the KV |
//! | prefill | `0`, and closes |
//!
//! Integers are big-endian. Every length is bounded before it is believed.

use std::{hash::Hasher as _, io};

use forebay_types::TokenId;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use siphasher::sip128::{Hasher128, SipHasher13};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Raised with every change of what is said here.
pub(super) const PROTOCOL: u32 = 1;
/// Bytes of a [`Hello`] or [`Welcome`].
const GREETING_BYTES_MAX: usize = 8 * 1024;
/// Blocks that one request may name.
pub(super) const BLOCKS_PER_READ_MAX: usize = 64;

/// Identity of a prompt: model, salt and tokens. What keeps one prompt's KV from ever being taken for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PromptIdentity([u8; 32]);

impl PromptIdentity {
    pub(crate) fn of(model: &str, salt: &str, tokens: &[TokenId]) -> Self {
        let mut hasher = Sha256::new();
        for text in [model, salt] {
            hasher.update((text.len() as u64).to_le_bytes());
            hasher.update(text);
        }
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }

    fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The check of one block of this prompt: 128 bits over its place and its bytes, keyed by the prompt. It finds what
    /// was damaged, swapped or taken from elsewhere; it is no proof against a forger.
    pub(super) fn check(&self, index: u32, bytes: &[u8]) -> [u8; CHECK_BYTES] {
        let key = self.0.first_chunk().expect("16 of 32 bytes");
        let mut hasher = SipHasher13::new_with_key(key);
        hasher.write_u32(index.to_le());
        hasher.write(bytes);
        hasher.finish128().as_bytes()
    }
}

/// Bytes of a block's check.
pub(super) const CHECK_BYTES: usize = 16;

/// The decode engine's first words. Both sides must agree on all of it; `request_id` names the KV.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) protocol: u32,
    /// The prefill engine's life.
    pub(super) engine_id: String,
    /// The prefill leg. Nobody can guess it: with `engine_id` it is the permission to read.
    pub(super) request_id: String,
    pub(super) shape: KvShape,
    /// Of the prompt.
    pub(super) tokens: u32,
    /// [`PromptIdentity`] in hexadecimal.
    pub(super) prompt: String,
    /// Nothing will be read: shape and prompt need not agree.
    pub(super) only_free: bool,
}

impl Hello {
    pub(super) fn new(
        engine_id: &str,
        request_id: &str,
        shape: KvShape,
        prompt: (PromptIdentity, u32),
    ) -> Self {
        Self {
            protocol: PROTOCOL,
            engine_id: engine_id.to_owned(),
            request_id: request_id.to_owned(),
            shape,
            tokens: prompt.1,
            prompt: prompt.0.hex(),
            only_free: false,
        }
    }

    pub(super) fn is_of(&self, prompt: PromptIdentity, tokens: u32) -> bool {
        self.tokens == tokens && self.prompt == prompt.hex()
    }
}

/// What must be equal for one engine to compute on another's KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KvShape {
    /// Fingerprint of weights, arithmetic and layout ([`forebay_engines::KvAbilities::layout`]).
    pub(crate) layout: u64,
    pub(crate) block_size_tokens: u32,
    pub(crate) block_bytes: u64,
}

/// The prefill engine's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Welcome {
    /// The KV is held for you.
    Granted {
        /// The prompt's blocks.
        blocks: u32,
    },
    /// It is not.
    Refused {
        reason: Refusal,
        /// A sentence, for the log of whoever asked.
        message: String,
    },
}

/// Why KV is not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Refusal {
    /// Another version of this page.
    Protocol,
    /// The engine that held it is gone: this is a later life, or another engine.
    WrongEngine,
    /// Never held, freed, or its lease is over.
    NotHeld,
    /// Weights, layout or block size differ.
    OtherShape,
    /// The KV is that of another prompt.
    OtherPrompt,
}

/// What the decode engine asks for after the greeting.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read(Vec<u32>),
    Free,
}

const READ: u8 = 1;
const FREE: u8 = 2;
/// Said before a block, or to confirm.
pub(super) const OK: u8 = 0;
/// Said instead of a block that is gone.
pub(super) const STALE: u8 = 1;

pub(super) async fn write_greeting<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    greeting: &T,
) -> io::Result<()> {
    let json = serde_json::to_vec(greeting)?;
    let mut frame = Vec::with_capacity(4 + json.len());
    frame.extend_from_slice(&(json.len() as u32).to_be_bytes());
    frame.extend_from_slice(&json);
    stream.write_all(&frame).await?;
    stream.flush().await
}

pub(super) async fn read_greeting<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<T> {
    let length = stream.read_u32().await? as usize;
    if length > GREETING_BYTES_MAX {
        return Err(invalid("a greeting is too long"));
    }
    let mut json = vec![0; length];
    stream.read_exact(&mut json).await?;
    Ok(serde_json::from_slice(&json)?)
}

pub(super) async fn write_read(stream: &mut (impl AsyncWrite + Unpin), indices: &[u32]) -> io::Result<()> {
    debug_assert!(indices.len() <= BLOCKS_PER_READ_MAX);
    let mut frame = Vec::with_capacity(5 + 4 * indices.len());
    frame.push(READ);
    frame.extend_from_slice(&(indices.len() as u32).to_be_bytes());
    indices.iter().for_each(|index| frame.extend_from_slice(&index.to_be_bytes()));
    stream.write_all(&frame).await?;
    stream.flush().await
}

pub(super) async fn write_free(stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    stream.write_u8(FREE).await?;
    stream.flush().await
}

/// The next request; `None` where the peer closed.
pub(super) async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Request>> {
    let mut operation = [0];
    if stream.read(&mut operation).await? == 0 {
        return Ok(None);
    }
    match operation[0] {
        FREE => Ok(Some(Request::Free)),
        READ => {
            let count = stream.read_u32().await? as usize;
            if count > BLOCKS_PER_READ_MAX {
                return Err(invalid("a request names too many blocks"));
            }
            let mut indices = Vec::with_capacity(count);
            for _ in 0..count {
                indices.push(stream.read_u32().await?);
            }
            Ok(Some(Request::Read(indices)))
        }
        _ => Err(invalid("an unknown request")),
    }
}

pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompts_identity_is_its_models_its_salts_and_its_tokens() {
        let base = PromptIdentity::of("m", "s", &[1, 2]);
        assert_eq!(base, PromptIdentity::of("m", "s", &[1, 2]));
        let others = [
            PromptIdentity::of("m", "s", &[1, 3]),
            PromptIdentity::of("m", "s", &[1]),
            PromptIdentity::of("m", "", &[1, 2]),
            PromptIdentity::of("ms", "", &[1, 2]),
        ];
        assert!(others.iter().all(|other| *other != base));
        let check = base.check(3, &[7; 64]);
        let mut damaged = [7; 64];
        damaged[63] ^= 1;
        assert_ne!(check, base.check(3, &damaged));
        assert_ne!(check, base.check(4, &[7; 64]));
        assert_ne!(check, others[0].check(3, &[7; 64]));
    }

    #[tokio::test]
    async fn lengths_are_bounded_before_they_are_believed() {
        let greeting = ((GREETING_BYTES_MAX + 1) as u32).to_be_bytes();
        assert!(read_greeting::<Welcome>(&mut &greeting[..]).await.is_err());
        let mut request = vec![READ];
        request.extend_from_slice(&u32::MAX.to_be_bytes());
        assert!(read_request(&mut &request[..]).await.is_err());
        assert!(read_request(&mut &[9_u8][..]).await.is_err());
        assert_eq!(read_request(&mut &[][..]).await.unwrap(), None);
    }

    #[tokio::test]
    async fn requests_arrive_as_they_were_sent() {
        let mut bytes = Vec::new();
        write_read(&mut bytes, &[3, 70_000]).await.unwrap();
        write_free(&mut bytes).await.unwrap();
        let mut rest = &bytes[..];
        assert_eq!(read_request(&mut rest).await.unwrap(), Some(Request::Read(vec![3, 70_000])));
        assert_eq!(read_request(&mut rest).await.unwrap(), Some(Request::Free));
        assert!(rest.is_empty());
    }
}
