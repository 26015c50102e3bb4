//! Which engines can exchange KV.
//!
//! In: what is known of two engines. Out: [`kv_layout`], equal only for engines that may be paired, and [`apart`], the
//! sentence that says why two may not.
//!
//! vLLM's own handshake refuses a partner of another version, model, dtype or connector; the request then fails or is
//! computed again. It does *not* refuse another block size: with NIXL on a CPU, blocks of 32 read as blocks of 64 gave
//! fluent nonsense with status 200. So everything that can be known is compared before a pair is used at all.

use crate::discovery::Server;

/// What decides whether the KV of one engine is good for another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Whose server.
    pub server: Server,
    /// Of the server. KV has no format that outlives a release.
    pub version: Option<String>,
    /// Folder or repository of the weights.
    pub root: Option<String>,
    /// Of the weights' arithmetic. vLLM tells it only in development mode, so start both engines of a pair with it or
    /// neither.
    pub dtype: Option<String>,
    /// Of the cache; `auto` is the dtype above.
    pub cache_dtype: Option<String>,
    /// Tokens of a block.
    pub block_size_tokens: u32,
    /// What moves KV, where it is known: `nixl`, `mooncake`, ...
    pub connector: Option<String>,
}

impl Layout {
    /// The fields that are compared, each with its name in a sentence.
    fn parts(&self) -> [(&'static str, Option<String>); 7] {
        let Self { server, version, root, dtype, cache_dtype, block_size_tokens, connector } = self;
        [
            ("server", Some(server_name(*server).to_owned())),
            ("version", version.clone()),
            ("model", root.as_deref().map(|root| root.trim_end_matches('/').to_owned())),
            ("block size", Some(format!("{block_size_tokens} tokens"))),
            ("cache dtype", cache_dtype.clone()),
            ("dtype", dtype.clone()),
            ("KV connector", connector.clone()),
        ]
    }
}

fn server_name(server: Server) -> &'static str {
    match server {
        Server::Vllm => "vLLM",
        Server::Sglang => "SGLang",
        Server::Trtllm => "TensorRT-LLM",
        Server::LlamaCpp => "llama.cpp",
        Server::Other => "an OpenAI server",
    }
}

/// A number that is equal for engines that may exchange KV and, but for chance, for no others. FNV-1a over every part and
/// its length: the same in every process and release, for agents tell it to gateways.
pub fn kv_layout(layout: &Layout) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = OFFSET;
    let mut write = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
        }
    };
    for (name, value) in layout.parts() {
        write(name.as_bytes());
        // The length first, or neighbours could run together; an absent part is none of its values.
        match value {
            Some(value) => {
                write(&(value.len() as u64).to_le_bytes());
                write(value.as_bytes());
            }
            None => write(&u64::MAX.to_le_bytes()),
        }
    }
    hash
}

/// Why two engines may not exchange KV, as a sentence that names them; `None` if they may.
pub fn apart(one: (&str, &Layout), other: (&str, &Layout)) -> Option<String> {
    let ((one_name, one), (other_name, other)) = (one, other);
    let differs = one.parts().into_iter().zip(other.parts()).find(|(one, other)| one.1 != other.1);
    let ((what, one), (_, other)) = differs?;
    let said = |value: Option<String>| value.unwrap_or_else(|| "not told".to_owned());
    Some(format!(
        "{one_name} and {other_name} cannot exchange KV: the {what} of {one_name} is {}, of {other_name} {}",
        said(one),
        said(other)
    ))
}

#[cfg(test)]
mod tests;
