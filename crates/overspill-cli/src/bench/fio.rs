//! fio as the measure of what a disk can do, given the same conditions: direct, io_uring, huge pages, registered
//! buffers and files.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::output;

/// Where the kernel keeps the number of reserved huge pages.
const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages for fio's buffers: 32 of 1 MiB, and some for its own use.
const PAGES_NEEDED: u64 = 48;

/// An installed fio.
#[derive(Debug)]
pub(crate) struct Fio {
    version: String,
    memory: Memory,
}

/// What fio's buffers lie on.
#[derive(Debug)]
enum Memory {
    /// Reserved huge pages; how many there were before, if we reserved more.
    Huge { _restore: Option<RestorePages> },
    /// 4 KiB pages: a comparison with it flatters us.
    Small,
}

#[derive(Debug)]
struct RestorePages(String);

impl Drop for RestorePages {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(NR_HUGEPAGES, &self.0) {
            output::say(&format!("note: cannot set {NR_HUGEPAGES} back to {}: {error}", self.0));
        }
    }
}

/// What a run of fio moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    Read,
    Write,
}

impl Fio {
    /// The installed fio with huge pages, if there are or can be any; `None` when fio is not installed.
    pub(crate) fn find() -> Option<Self> {
        let output = Command::new("fio").arg("--version").stderr(Stdio::null()).output().ok()?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Some(Self { version, memory: Memory::reserve() })
    }

    /// How to get it.
    pub(crate) const INSTALL: &str = "fio is not installed: apt-get install fio";

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Whether fio's buffers are on huge pages, as ours are.
    pub(crate) fn has_huge_pages(&self) -> bool {
        matches!(self.memory, Memory::Huge { .. })
    }

    /// Moves the whole file once and returns the rate in 10⁹ bytes per second.
    pub(crate) fn gbps(&self, file: &Path, bytes: u64, workload: Workload) -> anyhow::Result<f64> {
        let memory = if self.has_huge_pages() { "mmaphuge" } else { "malloc" };
        let (mode, name) = match workload {
            Workload::Read => ("read", "overspill-read"),
            Workload::Write => ("write", "overspill-write"),
        };
        let output = Command::new("fio")
            .args(["--output-format=json", "--ioengine=io_uring", "--direct=1", "--bs=1M", "--iodepth=32"])
            .args(["--fixedbufs=1", "--registerfiles=1", "--scramble_buffers=0"])
            .args(["--thread=1", "--fallocate=none", "--overwrite=1", "--allow_file_create=0"])
            .arg(format!("--name={name}"))
            .arg(format!("--rw={mode}"))
            .arg(format!("--iomem={memory}"))
            .arg(format!("--size={bytes}"))
            .arg(format!("--filename={}", file.display()))
            .stdin(Stdio::null())
            .output()
            .context("cannot run fio")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("fio failed ({}): {}", output.status, said.lines().next().unwrap_or("no message"));
        }
        parse(&output.stdout, workload)
    }
}

impl Memory {
    fn reserve() -> Self {
        if free_pages() >= PAGES_NEEDED {
            return Self::Huge { _restore: None };
        }
        let Ok(before) = std::fs::read_to_string(NR_HUGEPAGES) else { return Self::Small };
        let wanted = before.trim().parse::<u64>().unwrap_or(0) + PAGES_NEEDED;
        if std::fs::write(NR_HUGEPAGES, wanted.to_string()).is_err() {
            return Self::Small;
        }
        let restore = RestorePages(before.trim().to_owned());
        if free_pages() >= PAGES_NEEDED { Self::Huge { _restore: Some(restore) } } else { Self::Small }
    }
}

fn free_pages() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// The parts of fio's JSON that matter.
#[derive(Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i32,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    bw_bytes: u64,
}

fn parse(json: &[u8], workload: Workload) -> anyhow::Result<f64> {
    // fio may write warnings before its JSON.
    let start = json.iter().position(|&byte| byte == b'{').context("fio wrote no JSON")?;
    let output: Output = serde_json::from_slice(&json[start..]).context("fio wrote JSON of another kind")?;
    let job = output.jobs.first().context("fio reported no job")?;
    if job.error != 0 {
        bail!("fio reported error {}", job.error);
    }
    let direction = match workload {
        Workload::Read => &job.read,
        Workload::Write => &job.write,
    };
    if direction.bw_bytes == 0 {
        bail!("fio moved nothing");
    }
    Ok(direction.bw_bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = r#"fio: a warning
        {"fio version": "fio-3.33", "jobs": [{"jobname": "overspill-read", "error": 0,
         "read": {"io_bytes": 1073741824, "bw_bytes": 3500000000, "bw": 3417968, "iops": 3337.8},
         "write": {"io_bytes": 0, "bw_bytes": 0, "bw": 0, "iops": 0.0}}]}"#;

    #[test]
    fn the_rate_is_that_of_the_direction_asked_for() {
        assert_eq!(parse(OUTPUT.as_bytes(), Workload::Read).unwrap(), 3.5);
        assert!(parse(OUTPUT.as_bytes(), Workload::Write).is_err(), "nothing was written");
    }

    #[test]
    fn an_error_of_fio_is_not_a_result() {
        let failed = OUTPUT.replace("\"error\": 0", "\"error\": 28");
        assert!(parse(failed.as_bytes(), Workload::Read).unwrap_err().to_string().contains("28"));
        assert!(parse(b"fio: no such file", Workload::Read).is_err());
    }
}
