//! The gradients of one tile, until the step that uses them.
//!
//! They may come in any order and in any pieces. A piece that is all of a tile goes straight to storage; others are
//! gathered in memory until they are, so what never becomes whole, and what belongs to a tile that stays, is used from
//! there. A later piece replaces what an earlier one put in its place. What nothing was put into is zero.

use overspill_io::{Block, Pool};

use crate::error::StoreError;
use crate::slot::Slot;
use crate::store::Store;
use crate::{Kept, Worth};

/// Gradients of one tile.
#[derive(Debug)]
pub(crate) struct TileGradient {
    /// Index of the tile.
    index: usize,
    /// Bytes of all gradients of the tile.
    bytes: usize,
    /// Bytes of their room on storage; `None` for a tile that stays.
    room_bytes: Option<usize>,
    /// Their room; `None` while a pass has it, too.
    room: Option<Slot>,
    contents: Contents,
}

#[derive(Debug)]
enum Contents {
    Nothing,
    /// In memory, as far as the covered bytes go, which are disjoint, apart, and in their order.
    Gathered {
        bytes: Vec<u8>,
        covered: Vec<Span>,
    },
    /// In the room.
    Stored,
}

/// From the first byte to the one after the last.
type Span = (usize, usize);

/// What a pass reads a tile's gradients from.
#[derive(Debug)]
pub(crate) enum Gradients {
    Nothing,
    Memory(Vec<u8>),
    Storage(Slot),
}

impl TileGradient {
    /// The gradients of the tile `index`, `bytes` bytes, with a room on storage of `room_bytes` bytes if there is to be
    /// one; [`TileGradient::renew`] makes it.
    pub(crate) fn new(index: usize, bytes: usize, room_bytes: Option<usize>) -> Self {
        Self { index, bytes, room_bytes, room: None, contents: Contents::Nothing }
    }

    /// Takes the room, if there is to be one and it was never taken or was lost.
    pub(crate) fn renew(&mut self, store: &Store) -> Result<(), StoreError> {
        if let (Some(bytes), None) = (self.room_bytes, &self.room) {
            let room = store.vacant(&format!("gradient/{}", self.index), bytes, Worth::Scratch)?;
            self.room = Some(Slot::Vacant(room));
        }
        Ok(())
    }

    /// Forgets the gradients, however the write of them ends.
    pub(crate) fn give_up(&mut self) {
        self.contents = Contents::Nothing;
        drop(self.room.take().map(Slot::settle));
    }

    /// Bytes that are in memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        match &self.contents {
            Contents::Gathered { bytes, .. } => bytes.len(),
            Contents::Nothing | Contents::Stored => 0,
        }
    }

    pub(crate) fn clear(&mut self) {
        self.contents = Contents::Nothing;
    }

    /// Takes over what belongs at `at`; `block_bytes` is the length of a block for the longest tile.
    pub(crate) fn put(
        &mut self,
        at: usize,
        piece: &[u8],
        pool: &Pool,
        block_bytes: usize,
    ) -> Result<(), StoreError> {
        if piece.len() == self.bytes && self.room_bytes.is_some() {
            return self.store(piece, pool, block_bytes);
        }
        let (mut bytes, mut covered) = match std::mem::replace(&mut self.contents, Contents::Nothing) {
            Contents::Gathered { bytes, covered } => (bytes, covered),
            Contents::Nothing => (vec![0; self.bytes], Vec::new()),
            Contents::Stored => (self.fetch(pool, block_bytes)?, vec![(0, self.bytes)]),
        };
        bytes[at..at + piece.len()].copy_from_slice(piece);
        cover(&mut covered, (at, at + piece.len()));
        if covered == [(0, self.bytes)] && self.room_bytes.is_some() {
            return self.store(&bytes, pool, block_bytes);
        }
        self.contents = Contents::Gathered { bytes, covered };
        Ok(())
    }

    /// Hands the gradients to a pass.
    pub(crate) fn take(&mut self) -> Gradients {
        match std::mem::replace(&mut self.contents, Contents::Nothing) {
            Contents::Nothing => Gradients::Nothing,
            Contents::Gathered { bytes, .. } => Gradients::Memory(bytes),
            Contents::Stored => self.room.take().map_or(Gradients::Nothing, Gradients::Storage),
        }
    }

    /// The pass is over; the gradients were used up.
    pub(crate) fn give_back(&mut self, room: Slot) {
        self.room = Some(room);
    }

    /// Waits for a write that is under way.
    pub(crate) fn settle(&mut self) -> Result<(), StoreError> {
        self.room = self.room.take().map(Slot::settle).transpose()?;
        Ok(())
    }

    fn store(&mut self, bytes: &[u8], pool: &Pool, block_bytes: usize) -> Result<(), StoreError> {
        let mut block = pool.lease(block_bytes)?;
        let (body, padding) = block.split_at_mut(bytes.len());
        body.copy_from_slice(bytes);
        padding.fill(0);
        let dirty = match self.room.take().map(Slot::settle).transpose()? {
            Some(Slot::Vacant(tensor)) => {
                let block = tensor.fit(block)?;
                tensor.fill(block).map_err(|refused| refused.error)?
            }
            Some(Slot::Swapped(tensor)) => {
                let block = tensor.fit(block)?;
                tensor.overwrite(block).map_err(|refused| refused.error)?
            }
            other => unreachable!("a room at rest is empty or on storage: {other:?}"),
        };
        self.room = Some(Slot::Storing(dirty.store()));
        self.contents = Contents::Stored;
        Ok(())
    }

    fn fetch(&mut self, pool: &Pool, block_bytes: usize) -> Result<Vec<u8>, StoreError> {
        let room = self.room.take().expect("what is stored has a room");
        let block: Option<Block> = room.needs_block().then(|| pool.lease(block_bytes)).transpose()?;
        let present = room.begin(block)?.wait()?;
        let bytes = Kept::bytes(&present.tensor)[..self.bytes].to_vec();
        self.room = Some(present.release());
        Ok(bytes)
    }
}

/// Adds a span to spans that are disjoint, apart and in order, and keeps them so.
fn cover(covered: &mut Vec<Span>, (start, end): Span) {
    if start == end {
        return;
    }
    let first = covered.partition_point(|known| known.1 < start);
    let last = covered.partition_point(|known| known.0 <= end);
    let touched = &covered[first..last];
    let start = touched.first().map_or(start, |known| known.0.min(start));
    let end = touched.last().map_or(end, |known| known.1.max(end));
    covered.splice(first..last, [(start, end)]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn covered_bytes_are_those_of_all_ranges(ranges in prop::collection::vec((0usize..60, 0usize..20), 0..20)) {
            let (mut covered, mut model) = (Vec::new(), vec![false; 80]);
            for (start, length) in ranges {
                cover(&mut covered, (start, start + length));
                model[start..start + length].fill(true);
            }
            let mut expected: Vec<Span> = Vec::new();
            for (at, _) in model.iter().enumerate().filter(|(_, covered)| **covered) {
                match expected.last_mut() {
                    Some(span) if span.1 == at => span.1 += 1,
                    _ => expected.push((at, at + 1)),
                }
            }
            prop_assert_eq!(covered, expected);
        }
    }
}
