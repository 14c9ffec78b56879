//! The weights of a commit: the parameters are the caller's, in memory; what a commit needs of them goes to the store
//! as one long row of bytes, cut into blocks of one length whatever the parameters are.

use std::collections::VecDeque;
use std::ops::Range;

use overspill_io::{BlockClass, Pool};
use overspill_swap::tiles::{self, LoadingTiles};
use overspill_swap::{Blocks, Durability, Slot, Store, Worth};

use crate::error::Error;
use crate::tensor::Tensor;

/// Bytes of a block on its way, and how many are at once.
const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS: usize = 4;

/// What the names of blocks of weights begin with.
pub(super) const PREFIX: &str = "weights/";

/// The memory that moving weights takes.
pub(super) const CLASS: BlockClass =
    BlockClass { name: "weights on their way", block_bytes: BLOCK_BYTES, count: BLOCKS };

/// Bytes of that memory.
pub(super) const MEMORY_BYTES: usize = BLOCK_BYTES * BLOCKS;

/// That memory, to read a whole store with.
pub(super) fn blocks(pool: &Pool) -> Blocks<'_> {
    Blocks { pool, block_bytes: BLOCK_BYTES, count: BLOCKS }
}

/// What weights of `bytes` bytes take on storage.
pub(super) fn storage_bytes(durability: Durability, bytes: usize) -> u64 {
    let blocks = std::iter::repeat_n(BLOCK_BYTES, bytes.div_ceil(BLOCK_BYTES));
    Store::capacity_for(durability, Worth::State, blocks)
}

/// Stores the weights; the next commit of the store makes them count.
pub(super) fn store(store: &Store, pool: &Pool, weights: &[Tensor]) -> Result<(), Error> {
    let row = Row::of(weights.iter().map(Tensor::len));
    let mut under_way = VecDeque::with_capacity(BLOCKS);
    for index in 0..row.blocks() {
        if under_way.len() == BLOCKS {
            settle(under_way.pop_front())?;
        }
        let mut block = pool.lease(BLOCK_BYTES)?;
        let mut filled = 0;
        for (tensor, piece) in row.pieces(index) {
            block[filled..filled + piece.len()].copy_from_slice(&weights[tensor].bytes()[piece.clone()]);
            filled += piece.len();
        }
        block[filled..].fill(0);
        let slot = Slot::Vacant(store.vacant(&name(index), BLOCK_BYTES, Worth::State)?);
        under_way.push_back(tiles::store(vec![slot], block)?);
    }
    under_way.into_iter().try_for_each(|slots| settle(Some(slots)))
}

fn settle(slots: Option<Vec<Slot>>) -> Result<(), Error> {
    for slot in slots.into_iter().flatten() {
        // The handle is had again by name.
        drop(slot.settle()?);
    }
    Ok(())
}

/// Fills the weights with those of the store.
pub(super) fn load(store: &Store, pool: &Pool, weights: &mut [Tensor]) -> Result<(), Error> {
    let row = Row::of(weights.iter().map(Tensor::len));
    let mut under_way = VecDeque::with_capacity(BLOCKS);
    for index in 0..row.blocks() + BLOCKS {
        if index >= BLOCKS.min(row.blocks())
            && let Some((index, loading)) = under_way.pop_front()
        {
            let (slots, block) = LoadingTiles::wait(loading)?;
            drop(slots);
            let mut taken = 0;
            for (tensor, piece) in row.pieces(index) {
                let length = piece.len();
                weights[tensor].bytes_mut()[piece].copy_from_slice(&block[taken..taken + length]);
                taken += length;
            }
        }
        if index < row.blocks() {
            let slot = Slot::Swapped(store.adopt(&name(index), BLOCK_BYTES)?);
            under_way.push_back((index, LoadingTiles::start(vec![slot], pool.lease(BLOCK_BYTES)?)?));
        }
    }
    Ok(())
}

fn name(index: usize) -> String {
    format!("{PREFIX}{index}")
}

/// Tensors, one behind the other.
struct Row {
    /// Where each begins, and where the last one ends.
    borders: Vec<usize>,
}

impl Row {
    fn of(lengths: impl Iterator<Item = usize>) -> Self {
        let mut borders = vec![0];
        for length in lengths {
            borders.push(borders[borders.len() - 1] + length);
        }
        Self { borders }
    }

    fn blocks(&self) -> usize {
        self.borders[self.borders.len() - 1].div_ceil(BLOCK_BYTES)
    }

    /// The tensors in a block, each with the bytes of its own that are there.
    fn pieces(&self, block: usize) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let (start, end) = (block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
        let first = self.borders.partition_point(|border| *border <= start).saturating_sub(1);
        let tensors = first..self.borders.len() - 1;
        let here = tensors.take_while(move |tensor| self.borders[*tensor] < end);
        here.filter_map(move |tensor| {
            let (from, to) = (self.borders[tensor], self.borders[tensor + 1]);
            let piece = start.max(from) - from..end.min(to) - from;
            (!piece.is_empty()).then_some((tensor, piece))
        })
    }
}
