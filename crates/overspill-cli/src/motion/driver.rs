//! What the engine costs: processor time of its driver thread, as the kernel counts it.

use std::path::PathBuf;

use anyhow::Context;

/// The name of the engine's driver thread.
const DRIVER: &str = "overspill-io";

/// The driver threads of all engines that run now.
#[derive(Debug)]
pub(crate) struct Drivers {
    stats: Vec<PathBuf>,
}

/// Processor time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ProcessorTime {
    pub(crate) user: f64,
    pub(crate) system: f64,
}

impl Drivers {
    /// Finds the threads by their name.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let tasks = "/proc/self/task";
        let entries = std::fs::read_dir(tasks).with_context(|| format!("cannot read {tasks}"))?;
        let mut stats = Vec::new();
        for task in entries.flatten().map(|entry| entry.path()) {
            let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            if name.trim_end() == DRIVER {
                stats.push(task.join("stat"));
            }
        }
        Ok(Self { stats })
    }

    /// What they have used so far, together.
    pub(crate) fn used(&self) -> anyhow::Result<ProcessorTime> {
        let mut used = ProcessorTime::default();
        for path in &self.stats {
            let read = std::fs::read_to_string(path);
            let text = read.with_context(|| format!("cannot read {}", path.display()))?;
            let (user, system) =
                ticks(&text).with_context(|| format!("cannot understand {}", path.display()))?;
            let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
            used.user += user as f64 / ticks_per_second;
            used.system += system as f64 / ticks_per_second;
        }
        Ok(used)
    }
}

impl ProcessorTime {
    /// Adds what was used between two moments.
    pub(crate) fn add(&mut self, before: Self, after: Self) {
        self.user += after.user - before.user;
        self.system += after.system - before.system;
    }
}

/// User and system time of a thread: the fields 14 and 15, counted behind the name, which may hold spaces.
fn ticks(stat: &str) -> Option<(u64, u64)> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_found_behind_any_name() {
        let stat = "7 (a) S (b) S 1 7 7 0 -1 4194304 100 0 0 0 12 34 0 0 20 0 1 0 5 1 2";
        assert_eq!(ticks(stat), Some((12, 34)));
        assert_eq!(ticks("7 (a) S 1"), None);
        assert!(ticks(&std::fs::read_to_string("/proc/self/stat").unwrap()).is_some());
    }
}
