//! The gradients of one tile, until the step that uses them.
//!
//! They may come in any order and in any pieces. A piece that is all of a tile goes straight to storage; others are
//! gathered in memory until they are, or until the memory is wanted for others: then the tile goes to storage as far as it
//! has come, and a later piece brings it back. What belongs to a tile that stays is used from memory. A later piece
//! replaces what an earlier one put in its place. What nothing was put into is zero.
//!
//! A write that fails hands its gradients back: they are in memory again when [`TileGradient::settle`] has told of it.

use overspill_io::Pool;

use crate::Worth;
use crate::error::StoreError;
use crate::slot::Slot;
use crate::store::Store;
use crate::tensor::StoreFailed;

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
    /// On their way to the room when the kernel kept their memory.
    Lost,
}

/// Where gradients go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Means<'a> {
    pub(crate) store: &'a Store,
    pub(crate) pool: &'a Pool,
    /// Length of a block for the longest tile.
    pub(crate) block_bytes: usize,
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
            let room = store.vacant(&room_name(self.index), bytes, Worth::Scratch)?;
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
            Contents::Nothing | Contents::Stored | Contents::Lost => 0,
        }
    }

    /// Whether they may go to storage.
    pub(crate) fn moves(&self) -> bool {
        self.room_bytes.is_some()
    }

    /// Whether a write is under way.
    pub(crate) fn is_writing(&self) -> bool {
        matches!(self.room, Some(Slot::Storing(_)))
    }

    pub(crate) fn clear(&mut self) {
        self.contents = Contents::Nothing;
    }

    /// Takes over what belongs at `at`.
    pub(crate) fn put(&mut self, at: usize, piece: &[u8], means: Means<'_>) -> Result<(), StoreError> {
        if piece.len() == self.bytes && self.moves() {
            return self.store(piece, means);
        }
        self.settle()?;
        let (mut bytes, mut covered) = match std::mem::replace(&mut self.contents, Contents::Nothing) {
            Contents::Gathered { bytes, covered } => (bytes, covered),
            Contents::Nothing => (vec![0; self.bytes], Vec::new()),
            stored @ (Contents::Stored | Contents::Lost) => {
                self.contents = stored;
                (self.fetch(means)?, vec![(0, self.bytes)])
            }
        };
        bytes[at..at + piece.len()].copy_from_slice(piece);
        cover(&mut covered, (at, at + piece.len()));
        let is_whole = covered == [(0, self.bytes)];
        self.contents = Contents::Gathered { bytes, covered };
        if is_whole { self.spill(means) } else { Ok(()) }
    }

    /// Gives the memory back: what was gathered goes to storage, if it may.
    pub(crate) fn spill(&mut self, means: Means<'_>) -> Result<(), StoreError> {
        match std::mem::replace(&mut self.contents, Contents::Nothing) {
            Contents::Gathered { bytes, covered } if self.moves() => {
                let stored = self.store(&bytes, means);
                if stored.is_err() {
                    self.contents = Contents::Gathered { bytes, covered };
                }
                stored
            }
            others => {
                self.contents = others;
                Ok(())
            }
        }
    }

    /// Hands the gradients to a pass.
    pub(crate) fn take(&mut self) -> Gradients {
        match std::mem::replace(&mut self.contents, Contents::Nothing) {
            Contents::Nothing => Gradients::Nothing,
            Contents::Gathered { bytes, .. } => Gradients::Memory(bytes),
            Contents::Stored => Gradients::Storage(self.room.take().expect("what is stored has a room")),
            Contents::Lost => unreachable!("whoever takes them has settled them"),
        }
    }

    /// The pass is over; the gradients were used up.
    pub(crate) fn give_back(&mut self, room: Slot) {
        self.room = Some(room);
    }

    /// Waits for a write that is under way. When it has failed, what it was to write is in memory again.
    pub(crate) fn settle(&mut self) -> Result<(), StoreError> {
        let writing = match (self.room.take(), &self.contents) {
            (Some(Slot::Storing(writing)), _) => writing,
            (_, Contents::Lost) => return Err(StoreError::Unfinished { tensor: room_name(self.index) }),
            (at_rest, _) => {
                self.room = at_rest;
                return Ok(());
            }
        };
        match (writing.wait(), &self.contents) {
            (Ok(tensor), _) => {
                self.room = Some(Slot::Swapped(tensor));
                Ok(())
            }
            // The room is made anew when it is needed.
            (Err(StoreFailed { error, tensor }), Contents::Stored) => {
                let gathered = |bytes: &[u8]| Contents::Gathered {
                    bytes: bytes[..self.bytes].to_vec(),
                    covered: vec![(0, self.bytes)],
                };
                self.contents = tensor.map_or(Contents::Lost, |tensor| gathered(tensor.bytes()));
                Err(error)
            }
            // What was forgotten meanwhile is nobody's loss.
            (Err(_), _) => Ok(()),
        }
    }

    fn store(&mut self, bytes: &[u8], means: Means<'_>) -> Result<(), StoreError> {
        // What is replaced does not matter any more, however its write ended.
        drop(self.settle());
        self.renew(means.store)?;
        let mut block = means.pool.lease(means.block_bytes)?;
        let (body, padding) = block.split_at_mut(bytes.len());
        body.copy_from_slice(bytes);
        padding.fill(0);
        let dirty = match self.room.take() {
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

    /// The gradients that are in the room, which no write is under way to.
    fn fetch(&mut self, means: Means<'_>) -> Result<Vec<u8>, StoreError> {
        let block = means.pool.lease(means.block_bytes)?;
        let Some(Slot::Swapped(tensor)) = self.room.take() else {
            unreachable!("what is stored is in its room")
        };
        let block = tensor.fit(block)?;
        let loading = tensor.load(block).map_err(|refused| refused.error)?;
        match loading.wait() {
            Ok(tensor) => {
                let bytes = tensor.bytes()[..self.bytes].to_vec();
                self.room = Some(Slot::Swapped(tensor.release()));
                Ok(bytes)
            }
            Err(failed) => {
                self.room = Some(Slot::Swapped(failed.tensor));
                Err(failed.error)
            }
        }
    }
}

fn room_name(tile: usize) -> String {
    format!("gradient/{tile}")
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
