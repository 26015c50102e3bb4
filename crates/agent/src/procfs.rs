//! What `/proc` says about processes.

use std::{fs, io};

use forebay_types::Incarnation;

/// The variable by which a process of an engine's life is found if its agent died before it wrote down the process's
/// number.
pub(crate) const LIFE_VARIABLE: &str = "FOREBAY_AGENT_LIFE";

/// A process's line in `/proc/PID/stat`, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    /// `R`, `S`, `Z`, ...
    pub(crate) state: char,
    /// Process group.
    pub(crate) group: i32,
    /// When it started, in clock ticks since the machine did.
    pub(crate) start_ticks: u64,
}

impl Stat {
    /// Whether it has ended and only waits to be collected.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// The process with this number.
///
/// # Errors
/// There is none, or its line cannot be read.
pub(crate) fn stat(pid: i32) -> io::Result<Stat> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse(&line)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is garbled")))
}

/// The name in parentheses may hold anything, parentheses too.
fn parse(line: &str) -> Option<Stat> {
    let mut fields = line.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let group = fields.nth(1)?.parse().ok()?;
    let start_ticks = fields.nth(16)?.parse().ok()?;
    Some(Stat { state, group, start_ticks })
}

/// Which run of the machine this is.
///
/// # Errors
/// It cannot be read.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The leader of the process group that was started for this life.
pub(crate) fn leader_of(life: Incarnation) -> Option<i32> {
    processes()
        .find(|&pid| is_marked(pid, life) && stat(pid).is_ok_and(|stat| stat.group == pid && !stat.is_over()))
}

/// Whether this group is the one that was started for this life, whose leader may be gone.
pub(crate) fn group_is_of(group: i32, life: Incarnation) -> bool {
    let member = |pid| stat(pid).is_ok_and(|stat| stat.group == group && !stat.is_over());
    processes().any(|pid| member(pid) && is_marked(pid, life))
}

/// Processes inherit the mark. Others' environments cannot be read: they are not ours.
fn is_marked(pid: i32, life: Incarnation) -> bool {
    let mark = format!("{LIFE_VARIABLE}={life}");
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
}

/// Whether any process of this group lives.
pub(crate) fn group_lives(group: i32) -> bool {
    processes().any(|pid| stat(pid).is_ok_and(|stat| stat.group == group && !stat.is_over()))
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name() {
        let rest = "S 1 4242 4242 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 9 0 777 1000 2000";
        for name in ["vllm", "VLLM::EngineCore", "a b) R 9 (c"] {
            let stat = parse(&format!("17 ({name}) {rest}")).expect("readable");
            assert_eq!(stat, Stat { state: 'S', group: 4242, start_ticks: 777 }, "{name}");
        }
        assert_eq!(parse("17 (cut) S 1"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn the_running_process_is_found() {
        let own = std::process::id() as i32;
        let stat = stat(own).expect("this process");
        assert!(!stat.is_over() && stat.start_ticks > 0);
        assert!(group_lives(stat.group));
        assert!(!boot_id().expect("on Linux").is_empty());
        assert_eq!(leader_of(Incarnation(u64::MAX)), None);
    }
}
