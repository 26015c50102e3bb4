//! Numbers for people: three significant figures and a unit.

/// `38 µs`, `4.2 ms`, `230 ms`, `1.93 s`.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 0.999_5e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 9.95e-3 => format!("{:.1} ms", s * 1e3),
        s if s < 0.999_5 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// `512 B`, `1.4 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1_024.0 && unit + 1 < units.len() {
        size /= 1_024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.1} {}", units[unit]) }
}

/// `2.1 GB/s`; a dash where no time passed.
pub(crate) fn bandwidth(bytes: u64, seconds: f64) -> String {
    if seconds <= 0.0 {
        return "–".to_owned();
    }
    let rate = bytes as f64 / seconds;
    match rate {
        r if r >= 1e9 => format!("{:.1} GB/s", r / 1e9),
        r if r >= 1e6 => format!("{:.1} MB/s", r / 1e6),
        r => format!("{:.1} kB/s", r / 1e3),
    }
}

/// `part` of `whole` in percent; a dash where there is no whole.
pub(crate) fn percent(part: f64, whole: f64) -> String {
    if whole <= 0.0 { "–".to_owned() } else { format!("{:.0}%", 100.0 * part / whole) }
}

/// `1 token`, `2 tokens`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Milliseconds since the Unix epoch as `2026-11-22 13:40:12.345 UTC`.
pub(crate) fn utc(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (year, month, day) = civil(days);
    let (hours, minutes, seconds) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1_000 % 60);
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}.{:03} UTC", ms % 1_000)
}

/// Year, month and day of a number of days since 1970-01-01, after Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms": years begin in March, so that the leap day is the last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        let check = |shown: String, expected: &str| assert_eq!(shown, expected);
        check(seconds(0.0), "0 µs");
        check(seconds(38e-6), "38 µs");
        check(seconds(0.999_9e-3), "1.0 ms");
        check(seconds(0.004_23), "4.2 ms");
        check(seconds(0.23), "230 ms");
        check(seconds(0.999_7), "1.00 s");
        check(seconds(1.931), "1.93 s");
        check(bytes(512), "512 B");
        check(bytes(1_468_006), "1.4 MiB");
        check(bytes(u64::MAX), "16777216.0 TiB");
        check(bandwidth(2_100_000_000, 1.0), "2.1 GB/s");
        check(bandwidth(1_500_000, 0.5), "3.0 MB/s");
        check(bandwidth(1, 0.0), "–");
        check(percent(1.0, 3.0), "33%");
        check(percent(0.0, 0.0), "–");
        check(count(1, "block"), "1 block");
        check(count(0, "block"), "0 blocks");
    }

    #[test]
    fn dates_are_right_around_leap_days_and_centuries() {
        let check = |unix_ms: u64, expected: &str| assert_eq!(utc(unix_ms), expected);
        check(0, "1970-01-01 00:00:00.000 UTC");
        check(951_782_399_999, "2000-02-28 23:59:59.999 UTC");
        check(951_782_400_000, "2000-02-29 00:00:00.000 UTC");
        check(1_709_251_200_000, "2024-03-01 00:00:00.000 UTC");
        check(4_107_542_400_000, "2100-03-01 00:00:00.000 UTC");
        check(1_795_354_812_345, "2026-11-22 13:40:12.345 UTC");
    }
}
