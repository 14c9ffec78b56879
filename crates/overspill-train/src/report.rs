//! What a run was: the numbers behind the table and the JSON at its end.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::home::IoReport;
use crate::trainer::StepReport;
use crate::wear::Rated;

/// The whole run in numbers. Field names are stable; sizes are bytes, times are seconds, rates are 10⁹ bytes per
/// second.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// Number of parameters; shared ones count once.
    pub parameters: u64,
    /// The rule of the update: `adamw`.
    pub optimizer: &'static str,
    /// How weights are stored: `f32`, `bf16` or `fp16` (both with exact masters), or `bf16-stochastic`.
    pub weights: &'static str,
    /// How moments are stored: `f32`, `bf16` or `8bit`.
    pub moments: &'static str,
    /// Weights, gradients and the optimizer's records, as they lie on storage.
    pub state_bytes: u64,
    /// What `--memory` allowed; `null` for a run in ordinary memory.
    pub memory_budget_bytes: Option<u64>,
    /// What the plan expected to need of it.
    pub memory_planned_bytes: Option<u64>,
    /// Highest resident memory of the process (`VmHWM`).
    pub peak_rss_bytes: u64,
    /// Resident memory of the process before it read or allocated anything for the run.
    pub baseline_rss_bytes: u64,
    /// Bytes written before the first step: the initial state.
    pub bytes_written_initially: u64,
    /// Bytes read during the steps.
    pub bytes_read: u64,
    /// Bytes written during the steps.
    pub bytes_written: u64,
    /// Both, per parameter and step.
    pub bytes_per_parameter_step: f64,
    /// Bytes written per step, as the plan said before the run.
    pub bytes_written_per_step_planned: u64,
    /// Bytes written per step, measured.
    pub bytes_written_per_step: u64,
    /// Bytes written for the state since it was made, in all runs together.
    pub bytes_written_lifetime: u64,
    /// What each drive is rated to be written; `null` when nobody said.
    pub endurance_bytes: Option<u64>,
    /// The directory whose drive takes the most and is worn out first; `null` when there is one drive, or no rating.
    pub endurance_directory: Option<String>,
    /// Share of that drive's rated life that this run used; `null` without a rating.
    pub life_used_fraction: Option<f64>,
    /// Days in which the run's steps, one after the other, would wear out a new drive of this rating; `null` without a
    /// rating, and without steps.
    pub days_to_wear_out: Option<f64>,
    /// Bytes read, over the time at least one read was under way.
    pub io_read_gbps: f64,
    /// Bytes written, over the time at least one write was under way.
    pub io_write_gbps: f64,
    /// Share of the time of all transfers during which the computation went on.
    pub io_hidden_fraction: f64,
    /// Number of the first step, from 1: more than that when an earlier run was resumed.
    pub first_step: u64,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Those of them whose scaled gradient overflowed, and that updated nothing.
    pub steps_skipped: u64,
    /// What the loss of the next step would be multiplied with; `null` of weights that need no scale.
    pub loss_scale: Option<f64>,
    /// Tokens per second over all steps.
    pub tokens_per_second: f64,
    /// Median duration of a step.
    pub step_seconds_median: f64,
    /// Median duration of the optimizer's update within a step.
    pub update_seconds_median: f64,
    /// Loss of the first step; `null` when there was nothing left to do.
    pub loss_first: Option<f64>,
    /// Loss of the last step, likewise.
    pub loss_last: Option<f64>,
    /// Mean loss per token of each step.
    pub losses: Vec<f64>,
    /// Which backend moved the bytes; `memory` when none did.
    pub backend: String,
    /// Why not a better one; `null` when there is none.
    pub degraded_reason: Option<String>,
    /// Depth of the pipeline.
    pub depth: usize,
    /// Bytes of the state that stayed in memory for good; `None` when all of it was there.
    pub resident_bytes: Option<u64>,
    /// Bytes of one tile of one array.
    pub tile_bytes: usize,
    /// The directories that the state was spread over; empty when it was in memory.
    pub volumes: Vec<VolumeSummary>,
}

/// One directory that the state was spread over.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeSummary {
    /// The directory, as it was given.
    pub directory: String,
    /// Its share of the state, in proportion to those of the others.
    pub weight: u32,
    /// Which backend moved its bytes.
    pub backend: String,
    /// Why not a better one; `null` when there is none.
    pub degraded_reason: Option<String>,
    /// Engines side by side.
    pub rings: usize,
    /// Bytes of a chunk of each.
    pub chunk_bytes: usize,
    /// Chunks that each has with the kernel at a time.
    pub queue_depth: usize,
    /// Speed of reads by which the weight was found, from a profile or measured; `null` when nobody asked.
    pub read_gbps: Option<f64>,
    /// Speed of writes, likewise.
    pub write_gbps: Option<f64>,
}

impl fmt::Display for VolumeSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { directory, weight, backend, rings, .. } = self;
        write!(f, "volume {directory}: weight {weight}")?;
        if let (Some(read), Some(write)) = (self.read_gbps, self.write_gbps) {
            write!(f, ", {read:.1} GB/s read, {write:.1} GB/s written")?;
        }
        write!(f, ", by {backend}")?;
        if *rings > 1 { write!(f, " on {rings} rings") } else { Ok(()) }
    }
}

/// Collects what the steps report.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    losses: Vec<f64>,
    elapsed: Vec<Duration>,
    updates: Vec<Duration>,
    skipped: u64,
}

/// The measured part of a summary.
pub(crate) struct Measured {
    pub(crate) io_before: IoReport,
    pub(crate) io_after: IoReport,
    pub(crate) tokens_per_step: usize,
    pub(crate) parameters: usize,
    pub(crate) rated: Option<Rated>,
}

impl Ledger {
    pub(crate) fn record(&mut self, step: &StepReport) {
        self.losses.push(step.loss);
        self.elapsed.push(step.elapsed);
        self.updates.push(step.update_elapsed);
        self.skipped += u64::from(step.skipped);
    }

    /// Number and duration of the steps so far.
    pub(crate) fn so_far(&self) -> (usize, Duration) {
        (self.elapsed.len(), self.elapsed.iter().sum())
    }

    /// Fills in everything that was measured.
    pub(crate) fn summarize(self, measured: &Measured, summary: &mut Summary) {
        let io = measured.io_after.since(&measured.io_before);
        let steps = self.losses.len();
        let total: Duration = self.elapsed.iter().sum();
        summary.peak_rss_bytes = memory_of_process("VmHWM").unwrap_or(0);
        summary.bytes_written_initially = measured.io_before.bytes_written;
        summary.bytes_read = io.bytes_read;
        summary.bytes_written = io.bytes_written;
        summary.bytes_written_per_step = io.bytes_written / (steps as u64).max(1);
        summary.bytes_written_lifetime = io.bytes_written_lifetime;
        let moved = (io.bytes_read + io.bytes_written) as f64;
        summary.bytes_per_parameter_step = ratio(moved, (measured.parameters * steps) as f64);
        summary.io_read_gbps = ratio(io.bytes_read as f64 / 1e9, io.read_busy.as_secs_f64());
        summary.io_write_gbps = ratio(io.bytes_written as f64 / 1e9, io.write_busy.as_secs_f64());
        summary.io_hidden_fraction = match io.busy.is_zero() {
            true => 1.0,
            false => (1.0 - ratio(io.waited.as_secs_f64(), io.busy.as_secs_f64())).max(0.0),
        };
        if let Some(rated) = &measured.rated {
            let wear = rated.wear(measured.io_after.bytes_written, io.bytes_written, total);
            summary.endurance_bytes = Some(rated.endurance.bytes());
            summary.endurance_directory = rated.directory.clone();
            summary.life_used_fraction = Some(wear.life_used_fraction);
            summary.days_to_wear_out = wear.days_to_wear_out;
        }
        summary.steps = steps as u64;
        summary.steps_skipped = self.skipped;
        summary.tokens_per_second = ratio((measured.tokens_per_step * steps) as f64, total.as_secs_f64());
        summary.step_seconds_median = median(self.elapsed).as_secs_f64();
        summary.update_seconds_median = median(self.updates).as_secs_f64();
        summary.loss_first = self.losses.first().copied();
        summary.loss_last = self.losses.last().copied();
        summary.losses = self.losses;
    }
}

impl IoReport {
    /// What happened since an earlier report; what counts over all runs stays.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            bytes_read: self.bytes_read.saturating_sub(earlier.bytes_read),
            bytes_written: self.bytes_written.saturating_sub(earlier.bytes_written),
            bytes_written_lifetime: self.bytes_written_lifetime,
            busy: self.busy.saturating_sub(earlier.busy),
            read_busy: self.read_busy.saturating_sub(earlier.read_busy),
            write_busy: self.write_busy.saturating_sub(earlier.write_busy),
            waited: self.waited.saturating_sub(earlier.waited),
        }
    }
}

/// Zero when there is nothing to divide by.
fn ratio(dividend: f64, divisor: f64) -> f64 {
    if divisor > 0.0 { dividend / divisor } else { 0.0 }
}

fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort_unstable();
    durations.get(durations.len() / 2).copied().unwrap_or_default()
}

/// A field of `/proc/self/status` that is an amount of memory (`VmRSS`, `VmHWM`), in bytes.
pub fn memory_of_process(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_resident_memory_and_a_peak_above_it() {
        let (resident, peak) = (memory_of_process("VmRSS").unwrap(), memory_of_process("VmHWM").unwrap());
        assert!(resident > 1 << 20 && peak >= resident);
        assert_eq!(memory_of_process("VmNothing"), None);
    }

    #[test]
    fn the_median_of_an_even_number_is_the_upper_middle() {
        let seconds = |s: &[u64]| median(s.iter().copied().map(Duration::from_secs).collect());
        assert_eq!(seconds(&[]), Duration::ZERO);
        assert_eq!(seconds(&[9, 1, 5]), Duration::from_secs(5));
        assert_eq!(seconds(&[1, 9]), Duration::from_secs(9));
    }
}
