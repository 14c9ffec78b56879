//! What a user may ask of an engine, and what they get.

use std::time::Duration;

use super::detour::BOUNCES;
use super::queue::Limits;
use crate::backend::{BackendChoice, BackendKind};
use crate::error::IoError;
use crate::memory::BLOCK_ALIGNMENT;

/// The kernel's answer to a transfer is a signed 32-bit number; a chunk stays well below it.
const CHUNK_BYTES_MAX: usize = 1 << 30;
/// A deeper queue than this only adds latency.
const QUEUE_DEPTH_MAX: usize = 4096;
/// More workers than this only fight for the processor.
const THREADS_MAX: usize = 256;

/// How an engine works. The default suits an NVMe drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Way to the kernel.
    pub backend: BackendChoice,
    /// Operations are cut into chunks of this many bytes; a multiple of [`BLOCK_ALIGNMENT`], at most 1 GiB.
    pub chunk_bytes: usize,
    /// Chunks that may be with the kernel at a time.
    pub queue_depth: usize,
    /// Bytes that may be with the kernel at a time; a single chunk may go whatever its length.
    pub bytes_in_flight_max: usize,
    /// Workers of the threads backend, and of Linux AIO for files that go through the page cache; each moves one chunk
    /// at a time.
    pub threads: usize,
    /// How long a shutdown waits for accepted operations to end.
    pub drain_patience: Duration,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            backend: BackendChoice::Auto,
            chunk_bytes: 1 << 20,
            queue_depth: 32,
            bytes_in_flight_max: 64 << 20,
            threads: 4,
            drain_patience: Duration::from_secs(60),
        }
    }
}

impl EngineConfig {
    pub(crate) fn check(&self) -> Result<(), IoError> {
        let refuse = |field, value, requirement| Err(IoError::Config { field, value, requirement });
        let &EngineConfig { chunk_bytes, queue_depth, bytes_in_flight_max, threads, .. } = self;
        if chunk_bytes == 0 || !chunk_bytes.is_multiple_of(BLOCK_ALIGNMENT) || chunk_bytes > CHUNK_BYTES_MAX {
            return refuse("chunk_bytes", chunk_bytes, "a multiple of 4096, at least 4096 and at most 1 GiB");
        }
        if !(1..=QUEUE_DEPTH_MAX).contains(&queue_depth) {
            return refuse("queue_depth", queue_depth, "at least 1 and at most 4096");
        }
        if bytes_in_flight_max == 0 {
            return refuse("bytes_in_flight_max", bytes_in_flight_max, "at least 1");
        }
        if !(1..=THREADS_MAX).contains(&threads) {
            return refuse("threads", threads, "at least 1 and at most 256");
        }
        Ok(())
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits { depth: self.queue_depth, bytes: self.bytes_in_flight_max, detours: BOUNCES }
    }
}

/// What an engine works with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineReport {
    /// Way to the kernel in use.
    pub backend: BackendKind,
    /// Why it is not the best one, if nobody asked for it.
    pub degraded: Option<String>,
    /// What else a user may want to know, such as what the kernel refused to register.
    pub notes: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_can_be_used() {
        assert_eq!(EngineConfig::default().check(), Ok(()));
    }

    #[test]
    fn values_that_cannot_work_are_refused_by_name() {
        let default = EngineConfig::default();
        let refused = [
            (EngineConfig { chunk_bytes: 0, ..default.clone() }, "chunk_bytes"),
            (EngineConfig { chunk_bytes: 5000, ..default.clone() }, "chunk_bytes"),
            (EngineConfig { chunk_bytes: 2 << 30, ..default.clone() }, "chunk_bytes"),
            (EngineConfig { queue_depth: 0, ..default.clone() }, "queue_depth"),
            (EngineConfig { queue_depth: 4097, ..default.clone() }, "queue_depth"),
            (EngineConfig { bytes_in_flight_max: 0, ..default.clone() }, "bytes_in_flight_max"),
            (EngineConfig { threads: 0, ..default.clone() }, "threads"),
            (EngineConfig { threads: 257, ..default }, "threads"),
        ];
        for (config, name) in refused {
            assert!(
                matches!(config.check(), Err(IoError::Config { field, .. }) if field == name),
                "{config:?}"
            );
        }
    }
}
