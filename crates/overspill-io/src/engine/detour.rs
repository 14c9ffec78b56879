//! Chunks that direct I/O cannot take as they are.
//!
//! Direct I/O moves whole sectors to and from aligned memory. A chunk that begins or ends inside a sector goes through
//! a bounce block that covers its *window*, the sectors that it touches:
//!
//! ```text
//! read    window ──► bounce block ──► the chunk's bytes are copied out
//! write   window ──► bounce block, zeros behind the file's end     (not if the window has no byte to keep)
//!                    the chunk's bytes are copied in ──► window, and the file ends where it should
//! ```
//!
//! Where a file ends is seen when its window comes in, not before: others may have cut it or made it longer.
//!
//! The kernel sees the bounce block only, so the operation keeps its own memory. Nothing else may happen to the file
//! between the two halves of a write: the [gate](super::gate) sees to that. A [`Detour`] travels with its transfer; it
//! ends as a [`Turn::Land`], and its bounce block goes home then.

use std::ops::Range;

use rustix::io::Errno;

use super::chunk::{Chunk, Fault};
use super::completion::classify;
use super::op::Op;
use crate::backend::Transfer;
use crate::error::{Direction, IoError};
use crate::file::File;
use crate::memory::block::Block;
use crate::{BlockClass, Pool};

/// Most bytes that one bounce block holds.
pub(crate) const BOUNCE_BYTES: usize = 128 << 10;
/// Bounce blocks of one engine.
pub(crate) const BOUNCES: usize = 16;

/// A chunk on its way through a bounce block.
pub(crate) struct Detour {
    chunk: Chunk,
    /// The sectors of the file that the chunk touches.
    window: Range<u64>,
    /// Where in the window the chunk begins.
    skip: usize,
    stage: Stage,
}

/// What the window is on its way for.
#[derive(Clone, Copy)]
enum Stage {
    /// It comes in for a read.
    Fetch,
    /// It comes in for a write, which keeps what is around the chunk.
    Merge,
    /// It goes out.
    Store { ending: Ending },
}

/// What a written window does to the end of the file.
#[derive(Clone, Copy)]
enum Ending {
    /// Nothing that the chunk does not.
    Untouched,
    /// It may write padding behind byte `file_end`, where the file is to end.
    Padded { file_end: u64 },
}

impl Ending {
    /// A file that is to end at `file_end` or behind the window, which ends at `window_end`.
    fn at(file_end: u64, window_end: u64) -> Ending {
        if file_end < window_end { Ending::Padded { file_end } } else { Ending::Untouched }
    }
}

/// What happens next to a chunk on a detour.
pub(super) enum Turn {
    /// The window, or what is left of it, is to be moved.
    Submit(Transfer),
    /// It is over: `moved` bytes of the chunk, and what went wrong.
    Land { chunk: Chunk, moved: usize, fault: Option<Fault> },
}

impl Detour {
    /// Sets out with `chunk` of `op`.
    pub(super) fn begin(chunk: Chunk, op: &Op, bounces: &mut Bounces) -> Turn {
        match Detour::plan(&chunk, op, bounces) {
            Ok((window, stage, bounce)) => {
                let skip = (op.offset + chunk.start as u64 - window.start) as usize;
                Detour { chunk, window, skip, stage }.set_out(op, bounce)
            }
            Err(errno) => Turn::Land { chunk, moved: 0, fault: Some(Fault::Errno(errno)) },
        }
    }

    /// The chunk that it carries.
    pub(super) fn chunk(&self) -> &Chunk {
        &self.chunk
    }

    /// Goes on with the kernel's answer to the transfer that carried it.
    pub(super) fn go_on(self, arrival: Answered, op: &mut Op) -> Turn {
        let Answered { mut carrier, bounce, result } = arrival;
        let mut arrived = carrier.done;
        let answer = classify(result, carrier.wanted());
        let progress = carrier.advance(answer, op.file.alignment(), &mut arrived);
        match (self.stage, progress) {
            (_, Ok(())) if carrier.wanted() > 0 => self.carry(carrier, op, bounce),
            // Nothing more arrives behind the file's end.
            (Stage::Fetch, Ok(()) | Err(Fault::Zero)) => self.copy_out(arrived, &bounce, op),
            (Stage::Merge, Ok(()) | Err(Fault::Zero)) => {
                let file_end = self.chunk_end().max(self.window.start + arrived as u64);
                let ending = Ending::at(file_end, self.window.end);
                self.copy_in(arrived, ending, op, bounce)
            }
            (Stage::Store { ending }, progress) => self.written(progress.err(), ending, op),
            (_, Err(fault)) => Turn::Land { chunk: self.chunk, moved: 0, fault: Some(fault) },
        }
    }

    /// The window of `chunk`, what is to be done with it first, and the memory for that.
    fn plan(chunk: &Chunk, op: &Op, bounces: &mut Bounces) -> Result<(Range<u64>, Stage, Block), i32> {
        let sector = op.file.alignment() as u64;
        let first = op.offset + chunk.start as u64;
        let end = first + chunk.length as u64;
        let window = first - first % sector..end.next_multiple_of(sector);
        let stage = match op.direction {
            Direction::Read => Stage::Fetch,
            Direction::Write if (first..end) != window && has_bytes_from(&op.file, window.start)? => {
                Stage::Merge
            }
            Direction::Write => Stage::Store { ending: Ending::at(end, window.end) },
        };
        let bounce = bounces.take((window.end - window.start) as usize)?;
        Ok((window, stage, bounce))
    }

    /// Where in the file the chunk ends.
    fn chunk_end(&self) -> u64 {
        self.window.start + (self.skip + self.chunk.length) as u64
    }

    fn set_out(self, op: &Op, bounce: Block) -> Turn {
        match self.stage {
            Stage::Fetch | Stage::Merge => self.submit(op, bounce),
            Stage::Store { ending } => self.copy_in(0, ending, op, bounce),
        }
    }

    /// Gives a read its bytes, of which the first `arrived` of the window are there.
    fn copy_out(self, arrived: usize, bounce: &Block, op: &mut Op) -> Turn {
        let Detour { chunk, skip, .. } = self;
        let moved = arrived.saturating_sub(skip).min(chunk.length);
        op.held_mut(chunk.start, moved).copy_from_slice(&bounce[skip..skip + moved]);
        let fault = (moved < chunk.length).then_some(Fault::Zero);
        Turn::Land { chunk, moved, fault }
    }

    /// Puts a write's bytes over the window, whose first `arrived` bytes are those of the file.
    fn copy_in(self, arrived: usize, ending: Ending, op: &Op, mut bounce: Block) -> Turn {
        let Detour { chunk, skip, .. } = &self;
        bounce[arrived..].fill(0);
        bounce[*skip..skip + chunk.length].copy_from_slice(op.held(chunk.start, chunk.length));
        Detour { stage: Stage::Store { ending }, ..self }.submit(op, bounce)
    }

    /// Takes padding off the file's end, also if not all of the window was written.
    fn written(self, fault: Option<Fault>, ending: Ending, op: &Op) -> Turn {
        let Detour { chunk, window, .. } = self;
        let trimmed = match ending {
            Ending::Untouched => Ok(()),
            Ending::Padded { file_end } => trim(&op.file, file_end, window.end),
        };
        let fault = fault.or_else(|| trimmed.err().map(|error| Fault::Errno(errno_of(&error))));
        let moved = if fault.is_none() { chunk.length } else { 0 };
        Turn::Land { chunk, moved, fault }
    }

    /// Moves the whole window.
    fn submit(self, op: &Op, bounce: Block) -> Turn {
        let carrier = Chunk::carrier(self.chunk.op(), bounce.len());
        self.carry(carrier, op, bounce)
    }

    /// Moves what is left of the window.
    fn carry(self, carrier: Chunk, op: &Op, bounce: Block) -> Turn {
        let direction = match self.stage {
            Stage::Fetch | Stage::Merge => Direction::Read,
            Stage::Store { .. } => Direction::Write,
        };
        let (file, offset) = (op.file.clone(), self.window.start);
        let detour = Some(Box::new(self));
        Turn::Submit(Transfer { chunk: carrier, direction, file, offset, block: bounce, detour })
    }
}

/// The transfer of a window that came back, less its detour.
pub(super) struct Answered {
    /// What counts the window's progress.
    pub(super) carrier: Chunk,
    pub(super) bounce: Block,
    /// Bytes moved, or a negated errno.
    pub(super) result: i32,
}

/// The bounce blocks of one engine, mapped when the first one is needed. The queue lets no more chunks out that need
/// one than there are.
pub(super) struct Bounces {
    pool: Option<Pool>,
}

impl Bounces {
    pub(super) fn new() -> Bounces {
        Bounces { pool: None }
    }

    fn take(&mut self, bytes: usize) -> Result<Block, i32> {
        let pool = match &mut self.pool {
            Some(pool) => pool,
            none => {
                let class = BlockClass { name: "bounce", block_bytes: BOUNCE_BYTES, count: BOUNCES };
                none.insert(Pool::new(&[class]).map_err(|_| Errno::NOMEM.raw_os_error())?)
            }
        };
        pool.try_lease(bytes).map_err(|_| Errno::NOBUFS.raw_os_error())
    }
}

/// Whether the file may have bytes from `start` on. A disk may: what the file system says of its length is of no use.
fn has_bytes_from(file: &File, start: u64) -> Result<bool, i32> {
    if file.is_disk() {
        return Ok(true);
    }
    Ok(start < file.len().map_err(|error| errno_of(&error))?)
}

/// Makes the file end at `file_end` if it ends behind that, at most at `padded_end`. An end further behind is none of
/// our making.
fn trim(file: &File, file_end: u64, padded_end: u64) -> Result<(), IoError> {
    let length = file.len()?;
    if file_end < length && length <= padded_end { file.truncate(file_end) } else { Ok(()) }
}

fn errno_of(error: &IoError) -> i32 {
    error.errno().unwrap_or_else(|| Errno::IO.raw_os_error())
}
