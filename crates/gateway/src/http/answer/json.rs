//! Writing JSON straight into a buffer: no tree, no intermediate string.

use bytes::{BufMut, BytesMut};

/// What a byte inside a JSON string becomes: 0 as it is, `u` a `\u00xx`, else a backslash and that letter.
const ESCAPES: [u8; 256] = {
    let mut table = [0; 256];
    let mut control = 0;
    while control < 0x20 {
        table[control] = b'u';
        control += 1;
    }
    table[b'\n' as usize] = b'n';
    table[b'\r' as usize] = b'r';
    table[b'\t' as usize] = b't';
    table[0x08] = b'b';
    table[0x0c] = b'f';
    table[b'"' as usize] = b'"';
    table[b'\\' as usize] = b'\\';
    table
};

/// Appends `text` as it stands between the quotes of a JSON string.
pub(crate) fn push_escaped(out: &mut BytesMut, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = text.as_bytes();
    let mut plain_from = 0;
    for (index, byte) in bytes.iter().enumerate() {
        let escape = ESCAPES[usize::from(*byte)];
        if escape == 0 {
            continue;
        }
        out.put_slice(&bytes[plain_from..index]);
        plain_from = index + 1;
        if escape == b'u' {
            out.put_slice(b"\\u00");
            out.put_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        } else {
            out.put_slice(&[b'\\', escape]);
        }
    }
    out.put_slice(&bytes[plain_from..]);
}

/// Appends `text` as a JSON string.
pub(crate) fn push_string(out: &mut BytesMut, text: &str) {
    out.put_u8(b'"');
    push_escaped(out, text);
    out.put_u8(b'"');
}

/// Appends a decimal integer.
pub(crate) fn push_integer(out: &mut BytesMut, value: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = value;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.put_slice(&digits[at..]);
}

/// Appends a log probability. JSON has no infinity: what is impossible is -9999, as with OpenAI and vLLM.
pub(crate) fn push_logprob(out: &mut BytesMut, value: f32) {
    use std::fmt::Write as _;
    let value = if value.is_nan() { -9999.0 } else { value.clamp(-9999.0, 0.0) };
    write!(out, "{value:?}").expect("writing to a buffer does not fail");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn string(text: &str) -> String {
        let mut out = BytesMut::new();
        push_string(&mut out, text);
        String::from_utf8(out.to_vec()).unwrap()
    }

    proptest! {
        #[test]
        fn strings_are_written_as_serde_writes_them(text: String) {
            prop_assert_eq!(string(&text), serde_json::to_string(&text).unwrap());
        }

        #[test]
        fn integers_are_decimal(value: u64) {
            let mut out = BytesMut::new();
            push_integer(&mut out, value);
            prop_assert_eq!(out.to_vec(), value.to_string().into_bytes());
        }

        #[test]
        fn log_probabilities_are_json_numbers(bits: u32) {
            let mut out = BytesMut::new();
            push_logprob(&mut out, f32::from_bits(bits));
            let read: f64 = serde_json::from_slice(&out).unwrap();
            prop_assert!((-9999.0..=0.0).contains(&read));
        }
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(string("a\u{1}\u{1f}\n\"\\\u{7f}é"), "\"a\\u0001\\u001f\\n\\\"\\\\\u{7f}é\"");
    }
}
