//! Durations and sizes as people write them.

use std::time::Duration;

/// Units of time, largest first, in seconds.
const TIME_UNITS: [(&str, f64); 6] =
    [("d", 86_400.0), ("h", 3_600.0), ("m", 60.0), ("s", 1.0), ("ms", 1e-3), ("us", 1e-6)];

/// Units of size, largest first within each family.
const SIZE_UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("kB", 1_000),
    ("B", 1),
];

/// `10s`, `500ms`, `1.5h`; a bare number is seconds. `None` for anything else, negative and overlong ones included.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = split(text)?;
    let seconds = match unit {
        "" => 1.0,
        _ => TIME_UNITS.iter().find(|(name, _)| *name == unit)?.1,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()
}

/// The shortest text that [`parse_duration`] reads back exactly, down to microseconds.
pub(crate) fn show_duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    if micros == 0 {
        return "0s".to_owned();
    }
    // Days are read but not shown: "24h" is as clear as "1d".
    for (unit, size) in [("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000)] {
        if micros.is_multiple_of(size) {
            return format!("{}{unit}", micros / size);
        }
    }
    format!("{micros}us")
}

/// `4MiB`, `512KiB`, `1.5GB`; a bare number is bytes. `None` for anything else, and for what is no whole number of bytes.
pub(crate) fn parse_bytes(text: &str) -> Option<u64> {
    let (number, unit) = split(text)?;
    let size = match unit {
        "" => 1,
        _ => SIZE_UNITS.iter().find(|(name, _)| *name == unit)?.1,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(size);
    }
    let bytes = number.parse::<f64>().ok()? * size as f64;
    // Above 2^53 a float no longer names one integer.
    (bytes.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(&bytes)).then_some(bytes as u64)
}

/// The shortest text that [`parse_bytes`] reads back exactly.
pub(crate) fn show_bytes(bytes: u64) -> String {
    for (unit, size) in SIZE_UNITS.iter().take(4) {
        if bytes > 0 && bytes.is_multiple_of(*size) {
            return format!("{}{unit}", bytes / size);
        }
    }
    format!("{bytes}B")
}

/// The number in front, without underscores, and the unit behind. Exponents, signs, `inf` and `nan` are not numbers here.
fn split(text: &str) -> Option<(String, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = number.replace('_', "");
    if number.is_empty() { None } else { Some((number, unit.trim_start())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        let check =
            |text: &str, expected: Option<Duration>| assert_eq!(parse_duration(text), expected, "{text}");
        check("10s", Some(Duration::from_secs(10)));
        check("500ms", Some(Duration::from_millis(500)));
        check("250us", Some(Duration::from_micros(250)));
        check("2m", Some(Duration::from_secs(120)));
        check("1.5h", Some(Duration::from_secs(5_400)));
        check("1d", Some(Duration::from_secs(86_400)));
        check("10 s", Some(Duration::from_secs(10)));
        check("30", Some(Duration::from_secs(30)));
        check("0.25", Some(Duration::from_millis(250)));
        check("1_000ms", Some(Duration::from_secs(1)));
        for wrong in
            ["", "s", "-1s", "1e3s", "inf", "nan", "10 seconds", "1..5s", "10S", "99999999999999999999999h"]
        {
            check(wrong, None);
        }
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        let check = |text: &str, expected: Option<u64>| assert_eq!(parse_bytes(text), expected, "{text}");
        check("4MiB", Some(4 << 20));
        check("512KiB", Some(512 << 10));
        check("1.5GB", Some(1_500_000_000));
        check("0.5KiB", Some(512));
        check("1GB", Some(1_000_000_000));
        check("17", Some(17));
        check("17B", Some(17));
        check("1_000", Some(1_000));
        check("18446744073709551615", Some(u64::MAX));
        for wrong in ["", "MiB", "-1", "0.3B", "4mib", "4 megabytes", "18446744073709551616", "20000000TiB"] {
            check(wrong, None);
        }
    }

    #[test]
    fn what_is_shown_reads_back() {
        for micros in [0, 1, 999, 1_000, 1_500, 1_000_000, 90_000_000, 3_600_000_000, 86_400_000_000] {
            let duration = Duration::from_micros(micros);
            assert_eq!(parse_duration(&show_duration(duration)), Some(duration), "{micros} us");
        }
        for bytes in [0, 1, 1_023, 1_024, 1_000_000, 4 << 20, 3 << 30, u64::MAX] {
            assert_eq!(parse_bytes(&show_bytes(bytes)), Some(bytes), "{bytes} bytes");
        }
        assert_eq!(show_duration(Duration::from_secs(600)), "10m");
        assert_eq!(show_bytes(4 << 20), "4MiB");
    }
}
