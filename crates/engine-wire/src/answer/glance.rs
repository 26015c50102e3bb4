//! A look into answers that are passed on in the engine's own words.

use serde::Deserialize;

use super::{Fault, Usage};

/// What matters in a piece of such an answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Glance {
    /// It is a complaint, not an answer.
    pub fault: Option<Fault>,
    /// It has the engine's count.
    pub usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    usage: Option<Usage>,
}

/// Looks into one event's data, or a whole document. Most pieces have nothing of interest; that is found out without
/// parsing them, and what cannot be parsed is left to the client.
pub fn glance(text: &str) -> Glance {
    let has = |needle: &str| memchr::memmem::find(text.as_bytes(), needle.as_bytes()).is_some();
    let fault = if has("\"error\"") || !has("\"choices\"") { Fault::in_document(text) } else { None };
    let usage = if has("\"usage\"") {
        serde_json::from_str::<Document>(text).ok().and_then(|document| document.usage)
    } else {
        None
    };
    Glance { fault, usage }
}
