//! What a home's transfers did.

use std::time::Duration;

/// Totals of a home's transfers since it was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct IoReport {
    /// Bytes read from storage.
    pub bytes_read: u64,
    /// Bytes written to storage.
    pub bytes_written: u64,
    /// Bytes written for the state since it was made, in all runs together.
    pub bytes_written_lifetime: u64,
    /// Time during which at least one transfer was under way.
    pub busy: Duration,
    /// Time during which at least one read was under way.
    pub read_busy: Duration,
    /// Time during which at least one write was under way.
    pub write_busy: Duration,
    /// Time the trainer stood still for a transfer or for a block.
    pub waited: Duration,
}
