//! A decoder of msgpack that knows nothing of the encoder under test.

use serde_json::{Value, json};

/// Decodes one value, which must be all there is.
pub(crate) fn decode(bytes: &[u8]) -> Value {
    let mut rest = bytes;
    let value = value(&mut rest);
    assert!(rest.is_empty(), "{} bytes are left over", rest.len());
    value
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, after) = rest.split_at(count);
    *rest = after;
    taken
}

fn number(rest: &mut &[u8], bytes: usize) -> u64 {
    take(rest, bytes).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn value(rest: &mut &[u8]) -> Value {
    let marker = take(rest, 1)[0];
    match marker {
        0x00..=0x7f => json!(marker),
        0x80..=0x8f => map(rest, usize::from(marker & 15)),
        0x90..=0x9f => array(rest, usize::from(marker & 15)),
        0xa0..=0xbf => text(rest, usize::from(marker & 31)),
        0xc0 => Value::Null,
        0xcb => json!(f64::from_bits(number(rest, 8))),
        0xcc => json!(number(rest, 1)),
        0xcd => json!(number(rest, 2)),
        0xce => json!(number(rest, 4)),
        0xcf => json!(number(rest, 8)),
        0xd9 => {
            let length = number(rest, 1) as usize;
            text(rest, length)
        }
        0xdc => {
            let length = number(rest, 2) as usize;
            array(rest, length)
        }
        0xdd => {
            let length = number(rest, 4) as usize;
            array(rest, length)
        }
        0xde => {
            let length = number(rest, 2) as usize;
            map(rest, length)
        }
        other => panic!("marker {other:#x} is not expected"),
    }
}

fn text(rest: &mut &[u8], length: usize) -> Value {
    json!(std::str::from_utf8(take(rest, length)).unwrap())
}

fn array(rest: &mut &[u8], length: usize) -> Value {
    (0..length).map(|_| value(rest)).collect()
}

fn map(rest: &mut &[u8], length: usize) -> Value {
    let entries = (0..length).map(|_| (value(rest).as_str().unwrap().to_owned(), value(rest)));
    Value::Object(entries.collect())
}
