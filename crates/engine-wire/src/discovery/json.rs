//! Tolerant reading of other people's JSON: what is missing, of another type or beyond a bound is not told.

use serde_json::Value;

use super::{NAME_BYTES_MAX, Unreadable};

pub(super) fn document(body: &[u8]) -> Result<Value, Unreadable> {
    serde_json::from_slice(body)
        .map_err(|error| Unreadable::NotJson { line: error.line(), column: error.column() })
}

/// A name: not empty, not endless.
pub(super) fn text(value: &Value, key: &str) -> Option<String> {
    let text = value.get(key)?.as_str()?;
    (!text.is_empty() && text.len() <= NAME_BYTES_MAX).then(|| text.to_owned())
}

/// A sentence of any length.
pub(super) fn long_text(value: &Value, key: &str) -> Option<String> {
    value.get(key)?.as_str().map(str::to_owned)
}

/// The first `bytes_max` bytes of `text`, or a few less: no character is cut.
pub(super) fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// A count. Integers alone; beyond the type's range counts as not told.
pub(super) fn number<N: TryFrom<u64>>(value: &Value, key: &str) -> Option<N> {
    value.get(key)?.as_u64().and_then(|number| N::try_from(number).ok())
}

pub(super) fn flag(value: &Value, key: &str) -> Option<bool> {
    value.get(key)?.as_bool()
}

pub(super) fn array<'a>(value: &'a Value, key: &str) -> Option<&'a [Value]> {
    value.get(key)?.as_array().map(Vec::as_slice)
}

/// An object under `key`; null where there is none, from which nothing can be read.
pub(super) fn object<'a>(value: &'a Value, key: &str) -> &'a Value {
    value.get(key).filter(|value| value.is_object()).unwrap_or(&Value::Null)
}
