//! What JSON allows and no engine should be given: nesting without end, and halves of surrogate pairs.
//!
//! The fields of a body that is passed on are never parsed here, so nothing else would find these. Engines parse them
//! with a parser that calls itself, or make text of them that has no encoding.

use super::errors::ApiError;

/// Deepest nesting, as of what is parsed here.
const DEPTH_MAX: usize = 128;

/// Looks through `json`, which must be JSON, once and without memory.
///
/// # Errors
/// 400 that names the place.
pub(crate) fn refuse_unfit(json: &[u8]) -> Result<(), ApiError> {
    let (mut depth, mut at) = (0_usize, 0);
    while let Some(byte) = json.get(at) {
        match byte {
            b'"' => {
                at = end_of_string(json, at + 1)?;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEPTH_MAX {
            let place = place(json, at);
            let message = format!("the body nests deeper than {DEPTH_MAX} levels at {place}; nest less");
            return Err(ApiError::invalid("invalid_json", message));
        }
        at += 1;
    }
    Ok(())
}

/// The place after the string that begins at `at`.
fn end_of_string(json: &[u8], mut at: usize) -> Result<usize, ApiError> {
    loop {
        let rest = json.get(at..).unwrap_or_default();
        let Some(special) = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')) else {
            return Ok(json.len());
        };
        at += special;
        if json[at] == b'"' {
            return Ok(at + 1);
        }
        at = match (unit(json, at), unit(json, at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => at + 12,
            (Some(lone @ 0xd800..=0xdfff), _) => {
                let place = place(json, at);
                let message = format!(
                    "`\\u{lone:04x}` at {place} is half of a surrogate pair and no character; leave it out or send \
                     both halves"
                );
                return Err(ApiError::invalid("invalid_json", message));
            }
            _ => at + 2,
        };
    }
}

/// The UTF-16 code unit that is escaped at `at`, if one is.
fn unit(json: &[u8], at: usize) -> Option<u32> {
    let hex = json.get(at..at + 6)?.strip_prefix(b"\\u")?;
    u32::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()
}

/// As serde_json names it.
fn place(json: &[u8], at: usize) -> String {
    let before = &json[..at];
    let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
    let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
    format!("line {line} column {column}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_and_halves_are_found_where_they_are() {
        let check = |json: &str, says: Option<&str>| {
            let refused = refuse_unfit(json.as_bytes()).err().map(|error| error.message);
            assert_eq!(refused.is_some(), says.is_some(), "{json}: {refused:?}");
            let said = refused.unwrap_or_default();
            assert!(says.is_none_or(|says| said.contains(says)), "{json}: {said}");
        };
        let nested = |open: &str, close: &str, depth: usize| {
            format!("{{\"a\":{}{}}}", open.repeat(depth), close.repeat(depth))
        };
        check(&nested("[", "]", 127), None);
        check(&nested("[", "]", 128), Some("deeper than 128 levels at line 1 column 133"));
        check(&nested("{\"a\":", "1}", 128).replace("1}", "}"), Some("deeper"));
        check(&nested("[", "]", 1_000_000), Some("deeper"));
        check(&format!("[\"{}\",[],[],{{}}]", "[".repeat(1000)), None);
        check(r#"["\"[[[", "\\", "\ud83d\ude00 \u00e9 \uD83D\uDE00"]"#, None);
        check("[1,\n \"ab\\ud800\"]", Some(r"`\ud800` at line 2 column 5 is half"));
        check(r#"["\udc00\ud800"]"#, Some(r"`\udc00`"));
        check(r#"["\ud800\ud800\udc00"]"#, Some(r"`\ud800` at line 1 column 3"));
        check(r#"{"\ud800":1}"#, Some("column 3"));
        check(r#"["\\ud800"]"#, None);
        for cut in ["\"", "[\"\\", "[\"\\u", "[\"\\ud8", "\"\\ud800\\"] {
            let _no_panic = refuse_unfit(cut.as_bytes());
        }
    }
}
