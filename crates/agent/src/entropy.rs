//! The clock and the dice of this crate's shells.

use std::time::{SystemTime, UNIX_EPOCH};

use forebay_proto::Secret;

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Any number.
pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// A number from [0, 1).
pub(crate) fn share() -> f64 {
    (random() >> 11) as f64 / (1u64 << 53) as f64
}

/// An API key for one incarnation: 256 bits.
pub(crate) fn key() -> Secret {
    let mut bytes = [0; 32];
    fill(&mut bytes);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Secret::new(format!("fb-{hex}"))
}

fn fill(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("Linux has a random source");
}
