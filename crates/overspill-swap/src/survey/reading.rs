//! Extents read through a few blocks, for their checksums.
//!
//! ```text
//! extents ─► parts of a block each ─► as many with the kernel at a time as there are blocks ─► checksum, in order
//! ```
//!
//! Parts are waited for in the order in which they are asked for, so one checksum is under way at a time.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use overspill_io::{IoError, Pool, Priority, Space, Ticket};
use xxhash_rust::xxh3::Xxh3;

use crate::error::StoreError;
use crate::extent::EXTENT_ALIGNMENT;

/// The memory to read into.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    /// Has the blocks.
    pub pool: &'a Pool,
    /// Bytes of one; a multiple of [`EXTENT_ALIGNMENT`].
    pub block_bytes: usize,
    /// How many are used at a time.
    pub count: usize,
}

/// Part of an extent was read.
pub(crate) struct Read<T> {
    /// Bytes of the tensor in it.
    pub(crate) bytes: usize,
    /// With an extent's last part: whose it is, and its checksum.
    pub(crate) whole: Option<(T, Result<u64, IoError>)>,
}

/// A part of an extent, on its way in.
struct Reading<T> {
    ticket: Ticket,
    /// Bytes of the tensor in it; the rest pads it.
    bytes: usize,
    /// Whose extent it is, if this is its last part.
    last_of: Option<T>,
}

/// Reads extents, `(owner, offset, length)`, as many blocks at a time as there are. `read` is told of every part, in their
/// order, and may break it off.
///
/// # Errors
/// [`StoreError::Pool`]. What cannot be read is told to `read`.
///
/// # Panics
/// When the length of a block is no multiple of [`EXTENT_ALIGNMENT`].
pub(crate) fn read_extents<T: Copy>(
    space: &Space,
    blocks: Blocks<'_>,
    extents: impl Iterator<Item = (T, u64, u64)>,
    mut read: impl FnMut(Read<T>) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, StoreError> {
    let Blocks { pool, block_bytes, count } = blocks;
    assert!(block_bytes > 0 && (block_bytes as u64).is_multiple_of(EXTENT_ALIGNMENT), "{block_bytes}");
    let mut parts = extents.flat_map(|(owner, offset, length)| {
        // Of no bytes one part is none of them.
        (0..length.max(1)).step_by(block_bytes).map(move |at| {
            let left = length - at;
            let last_of = (left <= block_bytes as u64).then_some(owner);
            (offset + at, left.min(block_bytes as u64) as usize, last_of)
        })
    });
    let mut under_way = VecDeque::<Reading<T>>::new();
    let (mut hasher, mut failure) = (Xxh3::new(), None);
    loop {
        while under_way.len() < count.max(1)
            && let Some((offset, bytes, last_of)) = parts.next()
        {
            let padded = bytes.max(1).next_multiple_of(EXTENT_ALIGNMENT as usize);
            let block = pool.lease(padded)?;
            let ticket = space.read(offset, block, Priority::Background);
            under_way.push_back(Reading { ticket, bytes, last_of });
        }
        let Some(Reading { ticket, bytes, last_of }) = under_way.pop_front() else { break };
        match ticket.wait() {
            Ok(block) => hasher.update(&block[..bytes]),
            Err(failed) => {
                failure.get_or_insert(failed.error);
            }
        }
        let whole = last_of.map(|owner| {
            let found = failure.take().map_or_else(|| Ok(hasher.digest()), Err);
            hasher.reset();
            (owner, found)
        });
        if read(Read { bytes, whole }).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
