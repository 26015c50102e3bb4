//! Reads msgpack into JSON values, for the suite and for tests of what is published.
//!
//! Binary data becomes a string of hexadecimal digits. Depth and lengths are bounded by the input's length.

use std::fmt::Write as _;

use rmp::Marker;
use rmp::decode as mp;
use serde_json::{Map, Value, json};

/// Nested arrays and maps.
const DEPTH_MAX: usize = 16;

/// Reads one value off the front of `bytes`; `None` if it is not msgpack that events use.
pub(crate) fn read(bytes: &mut &[u8]) -> Option<Value> {
    read_at(bytes, 0)
}

fn read_at(bytes: &mut &[u8], depth: usize) -> Option<Value> {
    let marker = Marker::from_u8(*bytes.first()?);
    if depth > DEPTH_MAX {
        return None;
    }
    let value = match marker {
        Marker::Null => {
            mp::read_nil(bytes).ok()?;
            Value::Null
        }
        Marker::True | Marker::False => json!(mp::read_bool(bytes).ok()?),
        Marker::F64 => json!(mp::read_f64(bytes).ok()?),
        Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
            let len = mp::read_str_len(bytes).ok()? as usize;
            json!(std::str::from_utf8(take(bytes, len)?).ok()?)
        }
        Marker::Bin8 | Marker::Bin16 => {
            let len = mp::read_bin_len(bytes).ok()? as usize;
            let mut hex = String::new();
            for byte in take(bytes, len)? {
                let _memory_takes_all = write!(hex, "{byte:02x}");
            }
            json!(hex)
        }
        Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => {
            let len = mp::read_array_len(bytes).ok()?;
            (0..len).map(|_| read_at(bytes, depth + 1)).collect::<Option<Vec<Value>>>()?.into()
        }
        Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => {
            let len = mp::read_map_len(bytes).ok()?;
            let mut map = Map::new();
            for _ in 0..len {
                let key = read_at(bytes, depth + 1)?.as_str()?.to_owned();
                map.insert(key, read_at(bytes, depth + 1)?);
            }
            Value::Object(map)
        }
        Marker::FixNeg(_) | Marker::I8 | Marker::I16 | Marker::I32 | Marker::I64 => {
            json!(mp::read_int::<i64, _>(bytes).ok()?)
        }
        _ => json!(mp::read_int::<u64, _>(bytes).ok()?),
    };
    Some(value)
}

fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(taken)
}
