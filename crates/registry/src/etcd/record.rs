//! A gateway's record as it lies in etcd.

use serde::{Deserialize, Serialize};

use crate::record::{GatewayRecord, HostPort, check_name};

/// Bytes of a value that are read; a record has some hundred.
const VALUE_BYTES_MAX: usize = 4_096;

/// JSON. A reader ignores fields that it does not know; a field that is not understood by the version before is
/// therefore one that may be ignored.
#[derive(Debug, Serialize, Deserialize)]
struct Value {
    address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    server_name: Option<String>,
}

/// The value of a record; its name is in the key.
pub(super) fn encode(record: &GatewayRecord) -> Vec<u8> {
    let GatewayRecord { name: _, address, server_name } = record;
    let value = Value { address: address.to_string(), server_name: server_name.clone() };
    serde_json::to_vec(&value).expect("strings are JSON")
}

/// The record of a key and its value, or a sentence that says what is wrong with it.
pub(super) fn decode(name: &str, value: &[u8]) -> Result<GatewayRecord, String> {
    check_name("gateway", name).map_err(|error| error.to_string())?;
    if value.len() > VALUE_BYTES_MAX {
        return Err(format!("its value has {} bytes, at most {VALUE_BYTES_MAX} are read", value.len()));
    }
    let Value { address, server_name } =
        serde_json::from_slice(value).map_err(|error| format!("its value is not a record: {error}"))?;
    let address: HostPort = address.parse().map_err(|error| format!("{error}"))?;
    let record = GatewayRecord { name: name.to_owned(), address, server_name };
    record.check().map_err(|error| error.to_string())?;
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_unknown_fields_are_ignored() {
        let address = "[fd00::7]:7070".parse().unwrap();
        let plain = GatewayRecord::new("gw-0", address).unwrap();
        let named = GatewayRecord { server_name: Some("gw.example".to_owned()), ..plain.clone() };
        for record in [&plain, &named] {
            assert_eq!(decode("gw-0", &encode(record)).as_ref(), Ok(record));
        }
        assert_eq!(decode("gw-0", br#"{"address":"[fd00::7]:7070","newer":{"a":[1]}}"#), Ok(plain));
    }

    #[test]
    fn what_is_no_record_is_refused_in_a_sentence() {
        let rows: [(&str, &[u8], &str); 6] = [
            ("gw-0", b"", "its value is not a record"),
            ("gw-0", b"\xff\xfe", "its value is not a record"),
            ("gw-0", br#"{"address":"nowhere"}"#, "`nowhere` is not HOST:PORT"),
            ("gw-0", br#"{"address":"0.0.0.0:1"}"#, "0.0.0.0:1 cannot be dialled"),
            ("a/b", br#"{"address":"h:1"}"#, "`a/b` is not a gateway's name"),
            ("gw-0", &[b' '; 5_000], "its value has 5000 bytes"),
        ];
        for (name, value, wrong) in rows {
            let error = decode(name, value).expect_err(wrong);
            assert!(error.starts_with(wrong), "{error}");
        }
    }
}
