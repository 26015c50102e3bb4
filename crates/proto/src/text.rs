//! Texts in messages: names are checked, sentences are cut.

use crate::{
    error::WireError,
    limits::{NAME_BYTES_MAX, SENTENCE_BYTES_MAX},
};

/// What stands for the part of a text that was cut away.
const CUT: &str = "…";

/// `text`, cut at a character's boundary so that it has at most `bytes_max` bytes; a cut shows as an ellipsis.
/// `bytes_max` is at least 3.
pub fn clip(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(bytes_max.saturating_sub(CUT.len()));
    format!("{}{CUT}", &text[..end])
}

/// A sentence for people, within its bound.
pub(crate) fn sentence(text: String) -> String {
    if text.len() <= SENTENCE_BYTES_MAX { text } else { clip(&text, SENTENCE_BYTES_MAX) }
}

/// A name: not empty, within its bound, nothing in it that would garble a line of a log or a terminal.
pub(crate) fn name(what: &'static str, text: String) -> Result<String, WireError> {
    if text.is_empty() {
        return Err(WireError::Text { what, wrong: "is empty" });
    }
    optional_name(what, text)
}

/// As [`name`], or empty.
pub(crate) fn optional_name(what: &'static str, text: String) -> Result<String, WireError> {
    WireError::at_most(what, "bytes", text.len(), NAME_BYTES_MAX)?;
    if text.chars().any(char::is_control) {
        return Err(WireError::Text { what, wrong: "has a control character in it" });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_keeps_whole_characters_and_the_bound() {
        //    text       bytes  clipped
        let rows = [
            ("short", 5, "short"),
            ("shorter", 6, "sho…"),
            ("äöüäöü", 8, "äö…"), // 2 bytes each: the third would need 6 + 3
            ("äöüäöü", 12, "äöüäöü"),
            ("abcd", 3, "…"),
        ];
        for (text, bytes, clipped) in rows {
            assert_eq!(clip(text, bytes), clipped, "{text} in {bytes}");
            assert!(clip(text, bytes).len() <= bytes);
        }
    }

    #[test]
    fn names_are_refused_in_sentences() {
        let refused =
            |text: &str| name("the engine's name", text.to_owned()).expect_err("refused").to_string();
        assert_eq!(refused(""), "the engine's name is empty");
        assert_eq!(refused("a\nb"), "the engine's name has a control character in it");
        assert_eq!(refused(&"x".repeat(257)), "the engine's name: 257 bytes, at most 256 are allowed");
        assert_eq!(name("a name", "vllm-0".to_owned()), Ok("vllm-0".to_owned()));
    }
}
