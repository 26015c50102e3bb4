//! What engines say, decoded: the words between the wire and [`RankCache`](crate::RankCache).
//!
//! One shape for vLLM and SGLang, old and new. Nothing here is checked for sense: the decoder checks types and bounds,
//! `RankCache` whether what is said can be true.

use std::fmt;

use forebay_types::{Tier, TokenId};

/// An engine's own name for one block given its whole prefix: opaque, comparable only within one rank.
///
/// Engines send it in three shapes, and one block has one `EngineHash` whichever it is:
/// - an unsigned integer (vLLM's default): itself; vLLM makes it of its hash's last 8 bytes, big-endian;
/// - bytes (vLLM with integer hashes switched off: 32 of them): the last 8, big-endian, the same number therefore;
/// - a signed integer (SGLang): its 64 bits in two's complement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineHash(pub u64);

impl fmt::Display for EngineHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The events of one scheduler step of one rank.
#[derive(Debug, Clone, PartialEq)]
pub struct EventBatch {
    /// When the engine published it by its own wall clock, in seconds since 1970. To measure staleness and to tell a
    /// restarted engine from a repeated batch; never to order events.
    pub time_seconds: f64,
    /// In the order in which they happened.
    pub events: Vec<EngineEvent>,
    /// Data-parallel rank that the publisher says it is. Engines without data parallelism leave it out or say 0.
    pub dp_rank: Option<u16>,
}

/// One change of what an engine caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineEvent {
    /// Full blocks became reusable.
    Stored(Stored),
    /// Blocks went.
    Removed(Removed),
    /// Nothing is cached any more.
    Cleared,
    /// A type that this version does not know.
    Unknown {
        /// Its name, cut after 64 bytes.
        tag: Box<str>,
    },
}

/// Full blocks became reusable: a chain, first block first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The chain.
    pub hashes: Vec<EngineHash>,
    /// The block before it; `None` if it starts a prompt, or if the engine does not say (see `tokens`).
    pub parent: Option<EngineHash>,
    /// The tokens of all blocks, one block after another. Empty where the engine only names blocks that it stored
    /// elsewhere before, as vLLM does when it offloads. SGLang with EAGLE sends pairs of neighbours: their first ones.
    pub tokens: Vec<TokenId>,
    /// Tokens in a block, by the engine.
    pub block_size_tokens: u32,
    /// Number of the LoRA adapter; engines of today say its name instead.
    pub lora_id: Option<u32>,
    /// Name of the LoRA adapter that computed the blocks.
    pub lora_name: Option<Box<str>>,
    /// SGLang's `cache_salt`. vLLM's is in `extra_keys`.
    pub salt: Option<Box<str>>,
    /// vLLM: what else went into each block's hash, an empty list for nothing; one list a block. `None` if the engine
    /// does not say (vLLM before 0.17, SGLang).
    pub extra_keys: Option<Vec<Vec<ExtraKey>>>,
    /// Where.
    pub tier: Tier,
    /// Which of the model's groups of layers; `None` where there is only one.
    pub group: Option<u32>,
    /// What kind of cache that group has.
    pub kind: Option<GroupKind>,
    /// How many tokens back its layers look, if they have a sliding window.
    pub window_tokens: Option<u32>,
}

impl Stored {
    /// Blocks of plain text on the device: no adapter, no salt, no other keys, one group of layers.
    pub fn plain(
        parent: Option<EngineHash>,
        hashes: Vec<EngineHash>,
        tokens: Vec<TokenId>,
        block_size_tokens: u32,
    ) -> Self {
        Self {
            hashes,
            parent,
            tokens,
            block_size_tokens,
            lora_id: None,
            lora_name: None,
            salt: None,
            extra_keys: None,
            tier: Tier::Device,
            group: None,
            kind: None,
            window_tokens: None,
        }
    }
}

/// Blocks went, in any order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The blocks.
    pub hashes: Vec<EngineHash>,
    /// From where.
    pub tier: Tier,
    /// From which group of layers.
    pub group: Option<u32>,
}

/// Something beside the tokens that went into a block's hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtraKey {
    /// A text: the adapter's name or, in a prompt's first block, the cache salt.
    Text(Box<str>),
    /// Anything else (an image's hash and place, a digest of embeddings) as the engine sent it: one msgpack value.
    Other(Box<[u8]>),
}

impl ExtraKey {
    /// The key of a media item, as vLLM makes it: its hash and where in the block it starts, in tokens.
    pub fn media(hash: &str, offset_tokens: i64) -> Self {
        let mut bytes = Vec::new();
        crate::encode::write_media(&mut bytes, hash, offset_tokens);
        Self::Other(bytes.into())
    }
}

macro_rules! group_kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// What a group of layers caches, in vLLM's words.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum GroupKind {
            $($(#[$doc])* $kind,)*
            /// A kind that this version does not know.
            Other,
        }

        impl GroupKind {
            /// The kind that the engine calls so.
            pub fn from_name(name: &str) -> Self {
                match name {
                    $($name => Self::$kind,)*
                    _ => Self::Other,
                }
            }

            /// The engine's word for it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                    Self::Other => "other",
                }
            }
        }
    };
}

group_kinds! {
    /// Every token attends to every token before it.
    FullAttention = "full_attention",
    /// The same over a compressed cache.
    MlaAttention = "mla_attention",
    /// Full attention with sink tokens.
    SinkFullAttention = "sink_full_attention",
    /// Only the last tokens count.
    SlidingWindow = "sliding_window",
    /// The same over a compressed cache.
    SlidingWindowMla = "sliding_window_mla",
    /// Only the tokens of the same chunk count.
    ChunkedLocalAttention = "chunked_local_attention",
    /// A state, not tokens.
    Mamba = "mamba",
    /// An encoder's own attention.
    EncoderOnlyAttention = "encoder_only_attention",
    /// Attention to an encoder's output.
    CrossAttention = "cross_attention",
    /// The engine does not say.
    Unknown = "unknown",
}
