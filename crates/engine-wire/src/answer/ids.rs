//! Token ids in JSON, read without a list of them being made.

use forebay_types::TokenId;
use serde_json::value::RawValue;

/// The prompt's token ids as an engine says that it read them.
#[derive(Debug, Clone, Copy)]
pub struct PromptEcho<'a>(pub(super) &'a RawValue);

impl PromptEcho<'_> {
    /// Whether they are these.
    pub fn is(&self, prompt: &[TokenId]) -> bool {
        let mut expected = prompt.iter();
        for id in ids(self.0) {
            if id.as_ref() != expected.next() {
                return false;
            }
        }
        expected.next().is_none()
    }
}

impl PartialEq for PromptEcho<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

/// The numbers of a JSON list; `None` for an element that is no token id. Of anything but a list: one `None`.
pub(super) fn ids(list: &RawValue) -> impl Iterator<Item = Option<TokenId>> + '_ {
    let text = list.get().trim();
    let inside = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    // The text of a raw value is valid JSON, so a list of numbers has no comma but between them.
    let elements = match inside.map(str::trim) {
        Some("") => None,
        Some(inside) => Some(inside),
        None => Some("?"),
    };
    elements.into_iter().flat_map(|inside| inside.split(',')).map(|element| element.trim().parse().ok())
}
