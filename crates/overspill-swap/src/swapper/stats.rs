//! What a swapper counts.

use std::time::Duration;

/// The name of the time that callers were blocked because no buffer was free, or for a flush.
pub const WAIT_TIMER: &str = "async_swapper_wait";

/// How many buffers are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BufferStates {
    /// Empty and waiting for tensors.
    pub free: usize,
    /// Taking tensors: one, or none.
    pub filling: usize,
    /// With the engine.
    pub writing: usize,
    /// Holding tensors that could not be written.
    pub failed: usize,
}

/// What was swapped out since the first buffers were added. Tensors count when their whole buffer is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapStats {
    /// Tensors.
    pub tensors: u64,
    /// Their elements.
    pub numel: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What was written for them, in bytes: each tensor rounded up to a multiple of 4096.
    pub bytes_written: u64,
    /// How often a caller was blocked.
    pub waits: u64,
    /// For how long.
    pub waited: Duration,
}

impl SwapStats {
    /// The times that were measured, by name; none before the first wait.
    #[must_use]
    pub fn timers(&self) -> Vec<(&'static str, Duration)> {
        if self.waits == 0 { Vec::new() } else { vec![(WAIT_TIMER, self.waited)] }
    }
}
