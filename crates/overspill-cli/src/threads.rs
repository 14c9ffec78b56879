//! The threads that compute.

use anyhow::Context;
use rayon::ThreadPoolBuilder;

/// More threads than this only fight for memory.
const THREADS_MAX: usize = 256;

/// Starts the computing threads: as many as `RAYON_NUM_THREADS` says, within reason, or one per core.
pub(crate) fn start() -> anyhow::Result<()> {
    let wished =
        std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&n| n > 0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = wished.unwrap_or(cores).min(THREADS_MAX);
    let started = ThreadPoolBuilder::new().num_threads(threads).build_global();
    started.with_context(|| format!("cannot start {threads} threads; is there a limit on processes?"))
}
