//! Ways to the kernel.
//!
//! A [`Backend`] moves [`Transfer`]s: it takes one by value, holds it, memory and file included, for as long as the
//! kernel may touch them, and gives it back with the kernel's answer as an [`Arrival`]. All backends answer with the
//! number io_uring would give, so one driver and one conformance suite serve them all.

pub(crate) mod aio;
pub(crate) mod crew;
pub(crate) mod doorbell;
#[cfg(feature = "sim")]
pub(crate) mod fate;
#[cfg(feature = "sim")]
mod journal;
#[cfg(feature = "sim")]
pub(crate) mod power;
#[cfg(feature = "sim")]
pub(crate) mod sim;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod threads;
pub(crate) mod uring;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;

use self::doorbell::Doorbell;
use crate::engine::chunk::Chunk;
use crate::engine::detour::Detour;
use crate::error::Direction;
use crate::file::File;
use crate::memory::block::Block;

/// Which way to the kernel the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The best one that works here; a worse one is reported with its reason.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Linux AIO, or an error.
    Aio,
    /// Threads with positioned reads and writes.
    Threads,
    /// A simulated kernel with faults by seed.
    #[cfg(feature = "sim")]
    Sim(fate::SimConfig),
}

impl fmt::Display for BackendChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackendChoice::Auto => "auto",
            BackendChoice::Uring => "io_uring",
            BackendChoice::Aio => "aio",
            BackendChoice::Threads => "threads",
            #[cfg(feature = "sim")]
            BackendChoice::Sim(_) => "sim",
        })
    }
}

/// A name that no backend has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no I/O backend is called `{name}`; there are auto, io_uring, aio and threads")]
pub struct UnknownBackend {
    /// The name.
    pub name: String,
}

impl BackendChoice {
    /// Every choice there is.
    const ALL: [BackendChoice; 4] =
        [BackendChoice::Auto, BackendChoice::Uring, BackendChoice::Aio, BackendChoice::Threads];
}

impl FromStr for BackendChoice {
    type Err = UnknownBackend;

    fn from_str(name: &str) -> Result<BackendChoice, UnknownBackend> {
        let found = BackendChoice::ALL.into_iter().find(|choice| choice.to_string() == name);
        found.ok_or_else(|| UnknownBackend { name: name.to_owned() })
    }
}

/// Which way to the kernel is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// io_uring.
    Uring,
    /// Linux AIO, and threads for files that go through the page cache.
    Aio,
    /// Threads with positioned reads and writes.
    Threads,
    /// A simulated kernel.
    #[cfg(feature = "sim")]
    Sim,
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackendKind::Uring => "io_uring",
            BackendKind::Aio => "aio",
            BackendKind::Threads => "threads",
            #[cfg(feature = "sim")]
            BackendKind::Sim => "sim",
        })
    }
}

/// A chunk on its way, with everything the kernel may touch for it.
pub(crate) struct Transfer {
    pub(crate) chunk: Chunk,
    pub(crate) direction: Direction,
    pub(crate) file: File,
    /// Where in the file the block's first byte belongs.
    pub(crate) offset: u64,
    /// The chunk's bytes; those behind `chunk.done` are to be moved.
    pub(crate) block: Block,
    /// The chunk that a bounce block travels for.
    pub(crate) detour: Option<Box<Detour>>,
}

impl Transfer {
    /// File position of the next byte to move.
    pub(crate) fn position(&self) -> u64 {
        self.offset + self.chunk.done as u64
    }
}

/// A transfer that came back.
pub(crate) struct Arrival {
    pub(crate) transfer: Transfer,
    /// Bytes moved, or a negated errno.
    pub(crate) result: i32,
}

/// One way to the kernel, owned and called by one thread.
///
/// Dropping a backend whose transfers are not all back gives them up: their memory is never used again.
pub(crate) trait Backend {
    fn kind(&self) -> BackendKind;

    /// What wakes [`Backend::park`].
    fn doorbell(&self) -> &Arc<Doorbell>;

    /// Takes a transfer on; never blocks for it. No more are given than the depth the backend was made for.
    fn submit(&mut self, transfer: Transfer);

    /// Sends what was submitted on its way, and sleeps until a transfer is back, the doorbell rings, a signal comes
    /// or `deadline` passes. Appends what is back to `arrivals`, also if it fails; then nothing more will come back.
    fn park(&mut self, deadline: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno>;

    /// Lets go of what other threads gave up since the doorbell rang last.
    fn tidy(&mut self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for choice in BackendChoice::ALL {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert_eq!("uring".parse::<BackendChoice>(), Err(UnknownBackend { name: "uring".to_owned() }));
    }
}
