//! llama.cpp's own document: `/props`.

use super::{
    Unreadable,
    json::{document, number, object, text},
};

/// What `/props` says, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FoundLlamaCpp {
    /// Build, as a text.
    pub build: Option<String>,
    /// Tokens that one slot holds, prompt and output.
    pub context_tokens_max: Option<u32>,
    /// Sequences that it runs at a time.
    pub slots: Option<u32>,
    /// File of the weights.
    pub model_path: Option<String>,
}

/// Reads `/props`.
///
/// # Errors
/// If there are no `default_generation_settings`: it is somebody else's `/props`.
pub fn props(body: &[u8]) -> Result<FoundLlamaCpp, Unreadable> {
    let document = document(body)?;
    let settings = object(&document, "default_generation_settings");
    if settings.is_null() {
        return Err(Unreadable::Shape { missing: "object `default_generation_settings`" });
    }
    Ok(FoundLlamaCpp {
        build: text(&document, "build_info"),
        context_tokens_max: number(settings, "n_ctx"),
        slots: number(&document, "total_slots"),
        model_path: text(&document, "model_path"),
    })
}
