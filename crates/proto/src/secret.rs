//! Secrets that travel, and what is printed instead of them.

use std::{fmt, sync::Arc};

use crate::v1;

/// A text that is never printed. [`Secret::expose`] is the only way to it, so that its uses can be searched for.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Keeps `text`.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Debug for v1::DataPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, api_key } = self;
        let api_key = if api_key.is_empty() { "" } else { "***" };
        f.debug_struct("DataPlane").field("url", url).field("api_key", &api_key).finish()
    }
}

impl fmt::Debug for v1::HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key: _, block_size_tokens } = self;
        f.debug_struct("HashKey").field("key", &"***").field("block_size_tokens", block_size_tokens).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_secret() {
        let hello = v1::Hello {
            data_plane: Some(v1::DataPlane { url: "http://h:1".to_owned(), api_key: "sk-geheim".to_owned() }),
            ..v1::Hello::default()
        };
        let welcome = v1::Welcome {
            hash_key: Some(v1::HashKey { key: b"geheimgeheimgehe".to_vec(), block_size_tokens: 16 }),
            ..v1::Welcome::default()
        };
        let printed = format!("{hello:?} {welcome:?} {:?}", Secret::new("geheim"));
        assert!(printed.contains("http://h:1") && printed.contains("***"), "{printed}");
        assert!(!printed.contains("geheim") && !printed.contains("103, 101"), "{printed}");
    }
}
