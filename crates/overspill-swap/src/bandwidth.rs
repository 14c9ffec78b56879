//! How fast a directory's disk is: a short look, for want of a profile.
//!
//! A few MiB are written to nameless files and read back by the engines that will serve the directory. The files lose
//! their names the moment they have been opened, so nothing is left behind, however the process ends.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use overspill_io::{
    BLOCK_ALIGNMENT, Block, Engine, IoError, Lane, Pool, PoolError, Priority, Space, Stripes, Ticket,
};
use rustix::fs::{Mode, OFlags};

use crate::error::StoreError;

/// What was measured, in 10⁹ bytes per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Speed of reads.
    pub read_gbps: f64,
    /// Speed of writes.
    pub write_gbps: f64,
}

/// No more is written.
const BYTES_MAX: u64 = 64 << 20;
/// Each way ends after this long.
const TIME_MAX: Duration = Duration::from_millis(500);
/// What is moved at a time, and how many of these may be under way.
const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS_MAX: usize = 16;

impl Bandwidth {
    /// Bytes that are written and read back, over the time that this takes.
    #[must_use]
    pub fn mean_gbps(self) -> f64 {
        2.0 / (1.0 / self.read_gbps + 1.0 / self.write_gbps)
    }
}

/// Writes and reads back at most 64 MiB, and at most a quarter of what is free, in `directory`, which must exist, by
/// all `engines` together; it takes a second at most. Blocks are leased from `pool`, as many as are free, up to 16.
///
/// # Errors
/// [`StoreError::Io`] and [`StoreError::Directory`], naming the directory or a file in it, [`StoreError::Pool`] when no
/// block is free. Nothing is left behind.
pub fn measure(directory: &Path, engines: &[Engine], pool: &Pool) -> Result<Bandwidth, StoreError> {
    let mut blocks = lease(pool)?;
    let block_bytes = blocks[0].len() as u64;
    let bytes = (free_bytes(directory)? / 4).clamp(block_bytes, BYTES_MAX.max(block_bytes));
    let lanes = engines.iter().enumerate().map(|(ring, engine)| nameless(directory, ring, engine));
    let space = Space::new(lanes.collect::<Result<_, _>>()?, Stripes::BYTES_DEFAULT)?;

    let started = Instant::now();
    let written = pass(&mut blocks, bytes, |offset, block| space.write(offset, block, Priority::Urgent))?;
    if space.note().is_some() {
        // It is in the page cache so far.
        space.sync()?;
    }
    let write_gbps = rate(written, started);
    let started = Instant::now();
    let read = pass(&mut blocks, written, |offset, block| space.read(offset, block, Priority::Urgent))?;
    Ok(Bandwidth { read_gbps: rate(read, started), write_gbps })
}

/// Moves block after block, up to `bytes`, for as long as there is time; returns how many bytes were moved.
fn pass(blocks: &mut Vec<Block>, bytes: u64, start: impl Fn(u64, Block) -> Ticket) -> Result<u64, IoError> {
    let began = Instant::now();
    let mut in_flight: VecDeque<Ticket> = VecDeque::with_capacity(blocks.len());
    let mut offset = 0;
    loop {
        let has_more = |block: &mut Block| {
            let is_first = offset == 0;
            offset + block.len() as u64 <= bytes && (is_first || began.elapsed() < TIME_MAX)
        };
        if let Some(block) = blocks.pop_if(has_more) {
            let length = block.len() as u64;
            in_flight.push_back(start(offset, block));
            offset += length;
        } else if let Some(oldest) = in_flight.pop_front() {
            blocks.push(oldest.wait().map_err(|failed| failed.error)?);
        } else {
            return Ok(offset);
        }
    }
}

/// Blocks of one length, each with bytes that no disk can make less of.
fn lease(pool: &Pool) -> Result<Vec<Block>, PoolError> {
    let bytes = match pool.try_lease(BLOCK_BYTES) {
        Err(PoolError::TooLarge { largest, .. }) if largest >= BLOCK_ALIGNMENT => {
            largest - largest % BLOCK_ALIGNMENT
        }
        _ => BLOCK_BYTES,
    };
    let mut blocks = vec![pool.try_lease(bytes)?];
    blocks.extend((1..BLOCKS_MAX).map_while(|_| pool.try_lease(bytes).ok()));
    for (seed, block) in (1_u64..).zip(&mut blocks) {
        for (index, word) in (0_u64..).zip(block.chunks_exact_mut(8)) {
            let mixed = (seed << 32 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&(mixed ^ mixed >> 29).to_le_bytes());
        }
    }
    Ok(blocks)
}

fn nameless(directory: &Path, ring: usize, engine: &Engine) -> Result<Lane, StoreError> {
    let path = directory.join(format!(".overspill-measure-{}-{ring}", std::process::id()));
    let file = engine.create(&path)?;
    std::fs::remove_file(&path).map_err(|source| StoreError::Directory { action: "remove", path, source })?;
    Ok(Lane { engine: engine.clone(), file, weight: 1 })
}

fn free_bytes(directory: &Path) -> Result<u64, StoreError> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
    let space = rustix::fs::open(directory, flags, Mode::empty()).and_then(rustix::fs::fstatvfs);
    let space = space.map_err(|errno| StoreError::Directory {
        action: "measure",
        path: directory.to_owned(),
        source: errno.into(),
    })?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

fn rate(bytes: u64, started: Instant) -> f64 {
    // A clock that stood still must not make a disk infinitely fast.
    bytes as f64 / started.elapsed().as_secs_f64().max(1e-9) / 1e9
}
