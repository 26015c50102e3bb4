//! What a process used, as Linux counts it. Elsewhere nothing is known.

/// Ticks of a second in `/proc`: the same on every architecture that this runs on, whatever the kernel's own clock.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds of this process so far.
pub(super) fn own_cpu_seconds() -> Option<f64> {
    cpu_seconds_in(&std::fs::read_to_string("/proc/self/stat").ok()?)
}

/// CPU seconds of a process so far, in user and system mode.
pub(super) fn cpu_seconds(pid: u32) -> Option<f64> {
    cpu_seconds_in(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The most memory that a process held since it began.
pub(super) fn peak_rss_bytes(pid: u32) -> Option<u64> {
    peak_in(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

fn cpu_seconds_in(stat: &str) -> Option<f64> {
    // The second field is the name in parentheses, which may hold spaces and parentheses of its own.
    let after_name = stat.rsplit_once(')')?.1;
    let mut fields = after_name.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS_PER_SECOND)
}

fn peak_in(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1_024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_past_strange_names() {
        let stat = "42 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20";
        assert_eq!(cpu_seconds_in(stat), Some(3.0));
        assert_eq!(cpu_seconds_in("42 (x"), None);
        assert_eq!(peak_in("Name:\tx\nVmHWM:\t    2048 kB\n"), Some(2_097_152));
    }
}
