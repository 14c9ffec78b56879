//! fio as the measure of what a disk can do, given the same conditions: direct, io_uring, huge pages, registered
//! buffers and files.

use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;

use super::cells::Traffic;
use crate::motion::files::FileSet;
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
pub(crate) struct Job<'a> {
    pub(crate) files: &'a FileSet,
    pub(crate) traffic: Traffic,
    /// How many times every block is moved.
    pub(crate) rounds: usize,
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

    /// Moves every block of the files and returns the rate in 10⁹ bytes per second. Random orders have every block
    /// once, as ours do, and mixed traffic draws the direction for each block. Files are taken one after the other,
    /// or at random where the blocks are; by turns is neither faster nor slower.
    pub(crate) fn gbps(&self, job: &Job<'_>) -> anyhow::Result<f64> {
        let memory = if self.has_huge_pages() { "mmaphuge" } else { "malloc" };
        let (mode, turns) = match job.traffic {
            Traffic::Read => ("read", "sequential"),
            Traffic::Write => ("write", "sequential"),
            Traffic::Mixed => ("randrw", "random"),
            Traffic::RandomRead => ("randread", "random"),
            Traffic::RandomWrite => ("randwrite", "random"),
        };
        let shape = job.files.shape();
        let output = Command::new("fio")
            // The names have no character that fio reads as something else; the directory's may.
            .current_dir(job.files.directory())
            .args(["--output-format=json", "--ioengine=io_uring", "--direct=1", "--iodepth=32"])
            .args(["--fixedbufs=1", "--registerfiles=1", "--scramble_buffers=0", "--rwmixread=50"])
            .args(["--thread=1", "--fallocate=none", "--overwrite=1", "--allow_file_create=0"])
            .arg(format!("--name=overspill-{mode}"))
            .arg(format!("--rw={mode}"))
            .arg(format!("--bs={}", shape.block_bytes))
            .arg(format!("--iomem={memory}"))
            .arg(format!("--size={}", shape.bytes()))
            .arg(format!("--nrfiles={}", shape.files))
            .arg(format!("--filename_format={}.$filenum", job.files.stem()))
            .arg(format!("--file_service_type={turns}"))
            .arg(format!("--loops={}", job.rounds))
            .stdin(Stdio::null())
            .output()
            .context("cannot run fio")?;
        if !output.status.success() {
            // It complains on either stream.
            let said = [output.stderr, output.stdout].concat();
            let said = String::from_utf8_lossy(&said);
            let line = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message");
            bail!("fio failed ({}): {line}", output.status);
        }
        parse(&output.stdout, shape.bytes() * job.rounds as u64)
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
    jobs: Vec<Outcome>,
}

#[derive(Deserialize)]
struct Outcome {
    error: i32,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    io_bytes: u64,
    /// Milliseconds.
    runtime: u64,
}

/// The rate of a run that was to move `bytes` bytes.
fn parse(json: &[u8], bytes: u64) -> anyhow::Result<f64> {
    // fio may write warnings before its JSON.
    let start = json.iter().position(|&byte| byte == b'{').context("fio wrote no JSON")?;
    let output: Output = serde_json::from_slice(&json[start..]).context("fio wrote JSON of another kind")?;
    let job = output.jobs.first().context("fio reported no job")?;
    if job.error != 0 {
        bail!("fio reported error {}", job.error);
    }
    let moved = job.read.io_bytes + job.write.io_bytes;
    if moved != bytes {
        bail!("fio moved {moved} bytes instead of {bytes}");
    }
    let milliseconds = job.read.runtime.max(job.write.runtime).max(1);
    Ok(moved as f64 / milliseconds as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = r#"fio: a warning
        {"fio version": "fio-3.33", "jobs": [{"jobname": "overspill-mixed", "error": 0,
         "read": {"io_bytes": 600000000, "bw_bytes": 1500000000, "runtime": 400, "iops": 3337.8},
         "write": {"io_bytes": 400000000, "bw_bytes": 1333333333, "runtime": 300, "iops": 0.0}}]}"#;

    #[test]
    fn the_rate_is_that_of_both_directions_together() {
        assert_eq!(parse(OUTPUT.as_bytes(), 1_000_000_000).unwrap(), 2.5);
    }

    #[test]
    fn an_error_of_fio_is_not_a_result_and_half_the_work_neither() {
        let failed = OUTPUT.replace("\"error\": 0", "\"error\": 28");
        assert!(parse(failed.as_bytes(), 1_000_000_000).unwrap_err().to_string().contains("28"));
        assert!(parse(b"fio: no such file", 1_000_000_000).is_err());
        assert!(parse(OUTPUT.as_bytes(), 2_000_000_000).unwrap_err().to_string().contains("instead"));
    }
}
