//! Whether memory stays where it is, and what to do if it may not.
//!
//! Locking, and registering memory with a ring, need a limit that is small on many systems. Work goes on without; how
//! large the limit is and how large it would have to be is told once for a pool, in its report.

use std::fmt;

use rustix::process::{Resource, getrlimit};

const KIB: u64 = 1 << 10;
/// What a ring needs for itself, beside the memory that is registered with it, is counted against the same limit.
const RING_KIB: u64 = 1 << 10;

/// Whether the pool's memory is locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Locking {
    /// The memory stays where it is.
    Locked,
    /// The kernel may page it out, because it refused to lock it.
    Unlocked {
        /// The kernel's refusal and what would lift it.
        reason: String,
    },
}

impl fmt::Display for Locking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Locking::Locked => f.write_str("locked"),
            Locking::Unlocked { reason } => write!(f, "unlocked: {reason}"),
        }
    }
}

/// Which limit keeps `more_bytes` from being locked beside what is locked already, and what it takes to raise it.
pub(crate) fn limit_advice(more_bytes: usize) -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let needed = locked_kib(&status) + (more_bytes as u64).div_ceil(KIB) + RING_KIB;
    advice(getrlimit(Resource::Memlock).current.map(|bytes| bytes / KIB), needed)
}

fn advice(limit_kib: Option<u64>, needed_kib: u64) -> String {
    match limit_kib {
        Some(limit) if limit < needed_kib => format!(
            "the limit of locked memory is {limit} KiB and must be at least {needed_kib} KiB: raise it with `ulimit -l \
             {needed_kib}`, for a user with `memlock` in /etc/security/limits.conf, for a service with \
             LimitMEMLOCK={needed_kib}K"
        ),
        // Something else refused: a container's rules, or memory that is short.
        Some(limit) => format!("the limit of locked memory, {limit} KiB, is not what keeps it from that"),
        None => "no limit of locked memory keeps it from that".to_owned(),
    }
}

/// Reads from `status` (the text of `/proc/self/status`) how much the process has locked already.
fn locked_kib(status: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap_or_default();
    value.trim().trim_end_matches("kB").trim_end().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_names_the_limit_and_what_it_must_be() {
        let low = advice(Some(64), 5120);
        for part in
            ["is 64 KiB", "at least 5120 KiB", "`ulimit -l 5120`", "limits.conf", "LimitMEMLOCK=5120K"]
        {
            assert!(low.contains(part), "{low}");
        }
        assert!(!advice(Some(5120), 5120).contains("ulimit"), "a limit that suffices is not to be raised");
        assert!(!advice(None, 5120).contains("ulimit"));
    }

    #[test]
    fn what_is_locked_already_is_read_from_the_status() {
        assert_eq!(locked_kib("VmPeak:\t   1 kB\nVmLck:\t     132 kB\nVmPin:\t       7 kB\n"), 132);
        assert_eq!(locked_kib("VmLck:\tmany\n"), 0);
        assert_eq!(locked_kib(""), 0);
    }
}
