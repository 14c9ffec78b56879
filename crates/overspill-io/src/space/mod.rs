//! Several files as one space of bytes.
//!
//! A [`Space`] lies over lanes, each a file with an engine of its own: files of several disks, or several files of
//! one disk that is faster than one ring. [`Stripes`] say which byte is where. An operation on the space is cut into
//! at most as many operations of the lanes as it touches stripes, each with its part of the block; their answers are
//! put together behind the one ticket that the caller holds. A space of one lane is that lane: nothing is cut, and the
//! engine answers itself.
//!
//! A lane that fails fails what touches it, with an error that names its file, and nothing else. However many lanes
//! an operation had, its block comes back whole, after a failed write with every byte that it was given.

mod stripes;

use std::fmt;
use std::sync::Arc;

pub use self::stripes::{Piece, Stripes};
use crate::engine::Engine;
use crate::engine::op::Request;
use crate::engine::parts::Assembly;
use crate::engine::queue::Priority;
use crate::engine::stats::{EngineStats, Stats};
use crate::engine::ticket::{Promise, Reply, Ticket};
use crate::error::{Direction, Failed, IoError};
use crate::file::File;
use crate::memory::BLOCK_ALIGNMENT;
use crate::memory::block::Block;

/// One file of a space, and who moves its bytes.
#[derive(Clone, Debug)]
pub struct Lane {
    /// Moves the bytes; the one that opened the file.
    pub engine: Engine,
    /// Holds the lane's share of the space, dense from its first byte on.
    pub file: File,
    /// The lane's share, in proportion to those of the others.
    pub weight: u32,
}

/// One space of bytes over the files of several lanes. Clones share it.
#[derive(Clone)]
pub struct Space {
    lanes: Arc<[Lane]>,
    stripes: Arc<Stripes>,
    /// Of the operations on the space; those of a single lane are in its engine's.
    stats: Arc<Stats>,
}

impl Space {
    /// Lays a space over `lanes`, in stripes of `stripe_bytes`, such as [`Stripes::BYTES_DEFAULT`].
    ///
    /// # Errors
    ///
    /// As [`Stripes::new`]; [`IoError::NotAFile`] for a lane that has no offsets, as a pipe: nothing would end the wait for
    /// its bytes.
    pub fn new(lanes: Vec<Lane>, stripe_bytes: usize) -> Result<Space, IoError> {
        lanes.iter().try_for_each(|lane| lane.file.check_places())?;
        let weights: Vec<u32> = lanes.iter().map(|lane| lane.weight).collect();
        let stripes = Arc::new(Stripes::new(stripe_bytes, &weights)?);
        Ok(Space { lanes: lanes.into(), stripes, stats: Arc::new(Stats::default()) })
    }

    /// The lanes.
    #[must_use]
    pub fn lanes(&self) -> &[Lane] {
        &self.lanes
    }

    /// Which byte is where.
    #[must_use]
    pub fn stripes(&self) -> &Stripes {
        &self.stripes
    }

    /// Fills `block` with the bytes from `offset` on, a multiple of [`BLOCK_ALIGNMENT`]. Every failure comes through
    /// the ticket.
    pub fn read(&self, offset: u64, block: Block, priority: Priority) -> Ticket {
        let (promise, ticket) = self.promise();
        self.submit(Direction::Read, offset, block, priority, Reply::Block(promise));
        ticket
    }

    /// Puts the bytes of `block` at `offset`, a multiple of [`BLOCK_ALIGNMENT`], and brings the block back. Every
    /// failure comes through the ticket.
    pub fn write(&self, offset: u64, block: Block, priority: Priority) -> Ticket {
        let (promise, ticket) = self.promise();
        self.submit(Direction::Write, offset, block, priority, Reply::Block(promise));
        ticket
    }

    /// Puts the bytes of `block` at `offset`, a multiple of [`BLOCK_ALIGNMENT`], behind the caller's back: the block
    /// returns to its pool the moment the last lane has written its part. A failure comes through the ticket, with the
    /// whole block: the parts that were written wait for those that were not.
    pub fn write_behind(&self, offset: u64, block: Block, priority: Priority) -> Ticket<()> {
        let (promise, ticket) = self.promise();
        self.submit(Direction::Write, offset, block, priority, Reply::Done(promise));
        ticket
    }

    /// Reserves room for the space's first `bytes` bytes in every lane's file and makes the files that long.
    ///
    /// # Errors
    ///
    /// [`IoError::NoSpace`] and [`IoError::File`], naming the lane's file; what the lanes before it have reserved
    /// stays with their files.
    pub fn allocate(&self, bytes: u64) -> Result<(), IoError> {
        let shares = (0..).map(|lane| self.stripes.lane_bytes(lane, bytes));
        self.lanes.iter().zip(shares).try_for_each(|(lane, share)| lane.file.allocate(share))
    }

    /// Waits until the devices of all lanes have everything that was written, and what is needed to find it again.
    ///
    /// # Errors
    ///
    /// The first lane's [`IoError::File`], after all others were flushed too; it means what it means for
    /// [`File::sync`].
    pub fn sync(&self) -> Result<(), IoError> {
        let flushed: Vec<_> = self.lanes.iter().map(|lane| lane.file.sync()).collect();
        flushed.into_iter().collect()
    }

    /// Why transfers go through the page cache, if they do; of several lanes, each that does, by its path.
    #[must_use]
    pub fn note(&self) -> Option<String> {
        if let [lane] = &*self.lanes {
            return lane.file.note().map(str::to_owned);
        }
        let noted = |lane: &Lane| Some(format!("{}: {}", lane.file.path().display(), lane.file.note()?));
        let notes: Vec<String> = self.lanes.iter().filter_map(noted).collect();
        (!notes.is_empty()).then(|| notes.join("; "))
    }

    /// What was moved so far: by the operations on the space, each counted once however many lanes it had. A single
    /// lane's are those of its engine.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        match &*self.lanes {
            [lane] => lane.engine.stats(),
            _ => self.stats.totals(),
        }
    }

    fn promise<T>(&self) -> (Promise<T>, Ticket<T>) {
        match &*self.lanes {
            [lane] => lane.engine.promise(),
            _ => Promise::new(Arc::clone(&self.stats)),
        }
    }

    fn submit(&self, direction: Direction, offset: u64, mut block: Block, priority: Priority, reply: Reply) {
        let length = block.len();
        if !offset.is_multiple_of(BLOCK_ALIGNMENT as u64) {
            let error = IoError::SpaceOffset { direction, offset, length };
            return reply.send(Err(Failed { error, block: Some(block) }));
        }
        // What no file can hold no lane holds either; the first one says so, as it does for itself.
        let is_countable = offset.checked_add(length as u64).is_some_and(|end| i64::try_from(end).is_ok());
        if self.lanes.len() == 1 || length == 0 || !is_countable {
            let Lane { engine, file, .. } = &self.lanes[0];
            return engine.submit(Request { direction, file, offset, block, priority }, reply);
        }
        let pieces: Vec<Piece> = self.stripes.pieces(offset, length).collect();
        let files = pieces.iter().map(|piece| self.lanes[piece.lane].file.clone());
        let parts = Assembly::begin(reply, direction, files, &self.stats);
        for (piece, part) in pieces.into_iter().zip(parts) {
            let rest = if piece.length < block.len() { Some(block.split_off(piece.length)) } else { None };
            let Lane { engine, file, .. } = &self.lanes[piece.lane];
            let request = Request { direction, file, offset: piece.offset, block, priority };
            engine.submit(request, Reply::Part(part));
            let Some(rest) = rest else { break };
            block = rest;
        }
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Space { lanes, stripes, .. } = self;
        f.debug_struct("Space").field("lanes", lanes).field("stripes", stripes).finish_non_exhaustive()
    }
}
