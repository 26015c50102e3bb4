//! What an engine is, from what its information routes answer.
//!
//! In: bodies of `/v1/models`, `/version`, `/kv_event_sources`, `/server_info`, `/props`, `/openapi.json`, already bounded
//! in length by whoever fetched them. Out: `Found…` values. Start at [`identify`]; each maker's own documents are in
//! [`vllm`], [`sglang`] and [`llama_cpp`], where KV events come from in [`KvSource`].
//!
//! Invariants: nothing panics, whatever an engine answers; a field that is missing or has another type counts as not told,
//! for these documents change with every release. Only a document whose shape as a whole is another one is [`Unreadable`].

mod address;
mod json;
pub mod llama_cpp;
pub mod sglang;
pub mod vllm;

use std::collections::BTreeSet;

use serde_json::Value;

pub use address::{AddressError, Dialled, KvSource, ZmqAddress};

use crate::metrics::Scrape;
use json::{array, document, number, text};

/// Models that are read of one answer; what follows is left out.
pub const MODELS_MAX: usize = 1024;
/// Bytes of a name. A longer one counts as not told.
pub const NAME_BYTES_MAX: usize = 1024;
/// Routes that are read of one OpenAPI document.
const ROUTES_MAX: usize = 4096;

/// A document that is not what its route should answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not JSON at all.
    #[error("not JSON (line {line}, column {column})")]
    NotJson {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// JSON of another shape.
    #[error("no {missing} in it")]
    Shape {
        /// What should be there.
        missing: &'static str,
    },
}

/// Whose server it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Server {
    /// `vllm serve`, and what imitates it.
    Vllm,
    /// `sglang.launch_server`.
    Sglang,
    /// TensorRT-LLM's `trtllm-serve`.
    Trtllm,
    /// llama.cpp's `llama-server`.
    LlamaCpp,
    /// Some other server with OpenAI's routes.
    Other,
}

/// One line of `/v1/models`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FoundModel {
    /// What requests name.
    pub id: String,
    /// Folder or repository of the weights.
    pub root: Option<String>,
    /// The model that this is an adapter of.
    pub parent: Option<String>,
    /// Longest sequence, prompt and output.
    pub context_tokens_max: Option<u32>,
    /// Whose server lists it; several write their own name here.
    pub owner: Option<String>,
}

/// What `/v1/models` lists, in its order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FoundModels {
    /// Models with weights of their own: one, with as many entries as it has names, in every server known so far.
    pub base: Vec<FoundModel>,
    /// LoRA adapters.
    pub adapters: Vec<FoundModel>,
}

impl FoundModels {
    /// Whether the entries of [`base`](Self::base) are names of one model, by its root.
    pub fn one_model(&self) -> bool {
        self.base.windows(2).all(|pair| pair[0].root == pair[1].root)
    }
}

/// Reads `/v1/models`.
///
/// # Errors
/// If it is no JSON object with a list `data`.
pub fn models(body: &[u8]) -> Result<FoundModels, Unreadable> {
    let document = document(body)?;
    let data = array(&document, "data").ok_or(Unreadable::Shape { missing: "list `data`" })?;
    let mut found = FoundModels::default();
    for entry in data.iter().take(MODELS_MAX) {
        let Some(id) = text(entry, "id") else {
            continue;
        };
        // llama.cpp puts its figures one level down.
        let meta = entry.get("meta").unwrap_or(&Value::Null);
        let model = FoundModel {
            id,
            root: text(entry, "root"),
            parent: text(entry, "parent"),
            context_tokens_max: number(entry, "max_model_len").or_else(|| number(meta, "n_ctx")),
            owner: text(entry, "owned_by"),
        };
        // vLLM lists an adapter with its base as `parent`.
        if model.parent.is_some() { found.adapters.push(model) } else { found.base.push(model) }
    }
    Ok(found)
}

/// Reads `/version`: vLLM and TensorRT-LLM answer `{"version": …}`.
///
/// # Errors
/// If there is no such field.
pub fn version(body: &[u8]) -> Result<String, Unreadable> {
    text(&document(body)?, "version").ok_or(Unreadable::Shape { missing: "text `version`" })
}

/// The routes of an OpenAPI document, for their presence alone.
///
/// # Errors
/// If there is no object `paths`.
pub fn routes(body: &[u8]) -> Result<BTreeSet<String>, Unreadable> {
    let document = document(body)?;
    let paths = document.get("paths").and_then(Value::as_object);
    let paths = paths.ok_or(Unreadable::Shape { missing: "object `paths`" })?;
    Ok(paths.keys().filter(|path| path.len() <= NAME_BYTES_MAX).take(ROUTES_MAX).cloned().collect())
}

/// The sentence of an error answer in OpenAI's shape, or in one of the shapes that FastAPI and SGLang use; cut to
/// [`NAME_BYTES_MAX`]. `None` if there is none.
pub fn error_message(body: &[u8]) -> Option<String> {
    let document = document(body).ok()?;
    let nested = document.get("error").unwrap_or(&Value::Null);
    let message = json::long_text(nested, "message")
        .or_else(|| json::long_text(&document, "message"))
        .or_else(|| json::long_text(&document, "detail"))
        .or_else(|| json::long_text(&document, "error"))?;
    Some(json::cut(&message, NAME_BYTES_MAX).to_owned())
}

/// What is known when the kind of a server is to be told. All of it is optional: a key may be missing, a route closed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clues<'a> {
    /// `/v1/models`.
    pub models: Option<&'a FoundModels>,
    /// `/metrics`.
    pub metrics: Option<&'a Scrape>,
    /// `/server_info` was SGLang's.
    pub sglang: Option<&'a sglang::FoundSglang>,
    /// `/props` was llama.cpp's.
    pub llama_cpp: Option<&'a llama_cpp::FoundLlamaCpp>,
}

/// Tells whose server answered. `None` if nothing did that any server of this kind answers.
///
/// What a server calls itself goes before what its other routes suggest: proxies and imitations offer many routes.
pub fn identify(clues: &Clues<'_>) -> Option<Server> {
    let owner = clues.models.and_then(|models| {
        let first = models.base.first().or(models.adapters.first())?;
        first.owner.as_deref()
    });
    match owner {
        Some("vllm") => return Some(Server::Vllm),
        Some("sglang") => return Some(Server::Sglang),
        Some("tensorrt_llm") => return Some(Server::Trtllm),
        Some("llamacpp") => return Some(Server::LlamaCpp),
        _ => {}
    }
    if clues.sglang.is_some() {
        return Some(Server::Sglang);
    }
    if clues.llama_cpp.is_some() {
        return Some(Server::LlamaCpp);
    }
    match clues.metrics.and_then(Scrape::server) {
        Some(server) => Some(server),
        None => clues.models.map(|_| Server::Other),
    }
}

#[cfg(test)]
mod tests;
