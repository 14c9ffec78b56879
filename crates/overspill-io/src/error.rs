//! What can go wrong between a file and a block.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::BackendKind;
use crate::memory::BLOCK_ALIGNMENT;
use crate::memory::block::Block;

/// Which way bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file into the block.
    Read,
    /// From the block into the file.
    Write,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Read => "read",
            Direction::Write => "write",
        })
    }
}

/// An operation that failed, and the memory it was given.
#[derive(Debug)]
pub struct Failed {
    /// What went wrong first.
    pub error: IoError,
    /// The operation's block: after a failed write with the bytes it was given, after a failed read with unspecified
    /// bytes. `None` only when the kernel may still hold a part of it, or when the driver thread panicked over it.
    pub block: Option<Block>,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Failed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Every failure of the engine and its files. Offsets, lengths and `done` are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The kernel refused or failed a transfer.
    #[error("cannot {direction} {length} bytes at {offset} of {}: {} ({done} bytes done)", path.display(), os(*errno))]
    Transfer {
        /// Which way the bytes moved.
        direction: Direction,
        /// The file.
        path: PathBuf,
        /// Where the operation began.
        offset: u64,
        /// How long the operation was.
        length: usize,
        /// How many of its bytes had moved; they need not be the first ones.
        done: usize,
        /// The kernel's answer.
        errno: i32,
    },
    /// The file ends inside the range to be read.
    #[error("{} ends before byte {}: read {done} of {length} bytes at {offset}", path.display(), offset.saturating_add(*length as u64))]
    EndOfFile {
        /// The file.
        path: PathBuf,
        /// Where the operation began.
        offset: u64,
        /// How long the operation was.
        length: usize,
        /// How many bytes there were.
        done: usize,
    },
    /// The kernel took no byte of a write and named no error.
    #[error("nothing more of {length} bytes at {offset} was written to {} ({done} bytes done)", path.display())]
    WriteZero {
        /// The file.
        path: PathBuf,
        /// Where the operation began.
        offset: u64,
        /// How long the operation was.
        length: usize,
        /// How many of its bytes had moved.
        done: usize,
    },
    /// A space is cut where blocks can be cut.
    #[error(
        "cannot {direction} {length} bytes at {offset} of a space of files: not a multiple of {BLOCK_ALIGNMENT}"
    )]
    SpaceOffset {
        /// Which way the bytes were to move.
        direction: Direction,
        /// Where the operation was to begin, in the space.
        offset: u64,
        /// How long the operation was to be.
        length: usize,
    },
    /// The file system cannot hold the file.
    #[error("no space for {}: {needed} more bytes needed, {}", path.display(), room(*needed, *free))]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes that the file lacks.
        needed: u64,
        /// Bytes that the file system still has for this user.
        free: u64,
    },
    /// A file cannot be made, opened, measured, allocated or flushed.
    #[error("cannot {action} {}: {}", path.display(), os(*errno))]
    File {
        /// The verb, such as `create`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        errno: i32,
    },
    /// What is there has no places to read and write at: it is a pipe, a socket or a directory.
    #[error("{}: neither a file nor a disk", path.display())]
    NotAFile {
        /// What is there.
        path: PathBuf,
    },
    /// The engine cannot work with this value.
    #[error("{field} is {value}, but must be {requirement}")]
    Config {
        /// The field, such as one of [`EngineConfig`](crate::EngineConfig).
        field: &'static str,
        /// Its value.
        value: usize,
        /// What it must be.
        requirement: &'static str,
    },
    /// The way to the kernel cannot be set up, or broke.
    #[error("{backend}: cannot {action}: {}", os(*errno))]
    Backend {
        /// Which way.
        backend: BackendKind,
        /// The verb and its object.
        action: &'static str,
        /// The kernel's answer.
        errno: i32,
    },
    /// The engine has been shut down; the operation was not begun, or not finished.
    #[error("the I/O engine has stopped")]
    EngineStopped,
    /// Of several engines, the one that serves this file has been shut down; the operation was not begun, or not
    /// finished.
    #[error("the I/O engine of {} has stopped", path.display())]
    LaneStopped {
        /// The file.
        path: PathBuf,
    },
    /// Shutting down took longer than the engine's drain patience.
    #[error("operations were not over after {patience:?}; {leaked_blocks} blocks are given up")]
    DrainTimeout {
        /// How long the engine waited.
        patience: Duration,
        /// Blocks that will not return to their pool, because the kernel may still touch them; at most so many if
        /// the driver thread itself hangs.
        leaked_blocks: usize,
    },
}

impl IoError {
    /// The kernel's answer, where there was one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            IoError::Transfer { errno, .. }
            | IoError::File { errno, .. }
            | IoError::Backend { errno, .. } => Some(*errno),
            IoError::NoSpace { .. } => Some(rustix::io::Errno::NOSPC.raw_os_error()),
            _ => None,
        }
    }

    /// How many bytes had moved.
    pub(crate) fn done(&self) -> usize {
        match self {
            IoError::Transfer { done, .. }
            | IoError::EndOfFile { done, .. }
            | IoError::WriteZero { done, .. } => *done,
            _ => 0,
        }
    }
}

/// What is left of a file system. Where more is free than is needed, something else forbids it: not every file system
/// counts a quota against what it says is free.
fn room(needed: u64, free: u64) -> String {
    if free < needed {
        format!("{free} free")
    } else {
        format!("and a quota allows less than the {free} that are free")
    }
}

/// The text of an errno, with its number.
fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_not_taken_for_a_full_disk() {
        let said = |needed, free| IoError::NoSpace { path: "/swap/data".into(), needed, free }.to_string();
        assert_eq!(said(10, 9), "no space for /swap/data: 10 more bytes needed, 9 free");
        let quota = "no space for /swap/data: 10 more bytes needed, and a quota allows less than the 10 that are free";
        assert_eq!(said(10, 10), quota);
    }
}
