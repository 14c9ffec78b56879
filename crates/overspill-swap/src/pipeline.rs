//! The pipeline: load, compute, store, item after item, with the transfers behind the computation.
//!
//! ```text
//! items ──load──► ahead (at most `depth`) ──► compute(item) ──store──► behind (at most `depth`) ──► items
//! ```
//!
//! The computation always sees the items in their order and one at a time, so every depth gives the same bits;
//! depth 0 is the synchronous form, in which nothing overlaps. The pool paces it: an item is loaded ahead only if
//! its blocks are free, and the item that is due waits for the oldest write when they are not. Whatever happens,
//! nothing is in flight any more when [`run`] returns.

use std::collections::VecDeque;

use overspill_io::{Block, Pool, PoolError};

use crate::error::StoreError;
use crate::tensor::{Dirty, Loading, Resident, Storing, Swapped};

/// The tensors that one call of the computation works on.
#[derive(Debug)]
pub struct Item {
    /// Loaded, changed and stored.
    pub edited: Vec<Swapped>,
    /// Loaded only.
    pub read: Vec<Swapped>,
}

/// Why a pipeline stopped.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError<E> {
    /// A tensor could not be moved.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The computation refused.
    #[error("{0}")]
    Compute(E),
}

impl<E> From<PoolError> for PipelineError<E> {
    fn from(error: PoolError) -> Self {
        Self::Store(error.into())
    }
}

/// Blocks that the pipeline holds at most at a time, as a multiple of what one item needs.
pub fn items_in_memory(depth: usize) -> usize {
    2 * depth + 1
}

/// What a pipeline may hold.
#[derive(Clone, Copy, Debug)]
pub struct Lanes<'a> {
    /// Where the blocks come from.
    pub pool: &'a Pool,
    /// Items that load ahead, and items that store behind.
    pub depth: usize,
    /// Bytes of the block for each tensor of an item, edited ones first: the longest tensor in this position.
    pub block_bytes: &'a [usize],
}

/// Runs `compute(index, edited, read)` over all items, `depth` of them loading ahead and as many storing behind.
///
/// # Errors
/// The first error of a transfer or of the computation. All items are given up then, data that could not be written
/// included, and every block is home: half an update is worth nothing, and what was committed before is whole.
pub fn run<E>(
    lanes: Lanes<'_>,
    items: Vec<Item>,
    mut compute: impl FnMut(usize, &mut [&mut [u8]], &[&[u8]]) -> Result<(), E>,
) -> Result<Vec<Item>, PipelineError<E>> {
    let mut flight = Flight { lanes, ahead: VecDeque::new(), behind: VecDeque::new(), done: Vec::new() };
    let result = flight.fly(items, &mut compute);
    let landed = flight.land();
    result?;
    landed?;
    Ok(flight.done)
}

/// Everything that is in motion.
struct Flight<'a> {
    lanes: Lanes<'a>,
    ahead: VecDeque<LoadingItem>,
    behind: VecDeque<StoringItem>,
    done: Vec<Item>,
}

impl Flight<'_> {
    fn fly<E>(
        &mut self,
        items: Vec<Item>,
        compute: &mut impl FnMut(usize, &mut [&mut [u8]], &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), PipelineError<E>> {
        let count = items.len();
        let mut items = items.into_iter().peekable();
        for index in 0..count {
            while self.ahead.len() <= self.lanes.depth && items.peek().is_some() {
                let Some(blocks) = self.lease()? else { break };
                if let Some(item) = items.next() {
                    self.ahead.push_back(item.load(blocks)?);
                }
            }
            let due = self.ahead.pop_front().expect("the item that is due was loaded before it");
            let mut ready = due.wait()?;
            ready.compute(|edited, read| compute(index, edited, read)).map_err(PipelineError::Compute)?;
            self.behind.push_back(ready.store());
            while self.behind.len() > self.lanes.depth {
                self.finish_oldest()?;
            }
        }
        Ok(())
    }

    /// Blocks for one more item. `None`: there are none to be had now, and the item is not due yet.
    fn lease(&mut self) -> Result<Option<Vec<Block>>, StoreError> {
        let Lanes { pool, block_bytes, .. } = self.lanes;
        loop {
            match pool.try_lease_all(block_bytes) {
                Ok(blocks) => return Ok(Some(blocks)),
                Err(PoolError::Exhausted { .. }) if !self.ahead.is_empty() => return Ok(None),
                Err(PoolError::Exhausted { .. }) if !self.behind.is_empty() => self.finish_oldest()?,
                // Somebody else holds the blocks: wait for them, within the pool's patience.
                Err(PoolError::Exhausted { .. }) => return Ok(Some(pool.lease_all(block_bytes)?)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn finish_oldest(&mut self) -> Result<(), StoreError> {
        if let Some(oldest) = self.behind.pop_front() {
            self.done.push(oldest.wait()?);
        }
        Ok(())
    }

    /// Waits for everything in flight; the first error of a write counts, loads were for nothing anyway.
    fn land(&mut self) -> Result<(), StoreError> {
        for loading in self.ahead.drain(..) {
            drop(loading.wait());
        }
        let mut first_error = None;
        for storing in self.behind.drain(..) {
            match storing.wait() {
                Ok(item) => self.done.push(item),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

struct LoadingItem {
    edited: Vec<Loading>,
    read: Vec<Loading>,
}

struct ReadyItem {
    edited: Vec<Dirty>,
    read: Vec<Resident>,
}

struct StoringItem {
    edited: Vec<Storing>,
    read: Vec<Swapped>,
}

impl Item {
    /// Starts loading all tensors, or none if a block does not fit.
    fn load(self, blocks: Vec<Block>) -> Result<LoadingItem, StoreError> {
        assert_eq!(
            blocks.len(),
            self.edited.len() + self.read.len(),
            "one block for each tensor of the item"
        );
        let tensors = self.edited.iter().chain(&self.read);
        let fitted = tensors.zip(blocks).map(|(tensor, block)| tensor.fit(block));
        let mut blocks = fitted.collect::<Result<Vec<_>, _>>()?.into_iter();
        let mut load = |tensors: Vec<Swapped>| {
            let pairs = tensors.into_iter().zip(blocks.by_ref());
            pairs.map(|(tensor, block)| tensor.load(block).map_err(|refused| refused.error)).collect()
        };
        let edited: Result<Vec<_>, StoreError> = load(self.edited);
        Ok(LoadingItem { edited: edited?, read: load(self.read)? })
    }
}

impl LoadingItem {
    /// Waits for every tensor, so that nothing is in flight when one of them has failed.
    fn wait(self) -> Result<ReadyItem, StoreError> {
        let count = self.edited.len();
        let mut edited = Loading::wait_all(self.edited.into_iter().chain(self.read).collect());
        let read = edited.split_off(count);
        let edited: Result<_, _> = edited.into_iter().map(|r| r.map(Resident::edit)).collect();
        let read: Result<_, _> = read.into_iter().collect();
        match (edited, read) {
            (Ok(edited), Ok(read)) => Ok(ReadyItem { edited, read }),
            (Err(failed), _) | (_, Err(failed)) => Err(failed.error),
        }
    }
}

impl ReadyItem {
    fn compute<E>(
        &mut self,
        compute: impl FnOnce(&mut [&mut [u8]], &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut edited: Vec<_> = self.edited.iter_mut().map(Dirty::bytes_mut).collect();
        let read: Vec<_> = self.read.iter().map(Resident::bytes).collect();
        compute(&mut edited, &read)
    }

    fn store(self) -> StoringItem {
        StoringItem {
            edited: Dirty::store_all(self.edited),
            read: self.read.into_iter().map(Resident::release).collect(),
        }
    }
}

impl StoringItem {
    /// Waits for every tensor, so that nothing is in flight when one of them has failed.
    fn wait(self) -> Result<Item, StoreError> {
        let results: Vec<_> = self.edited.into_iter().map(Storing::wait).collect();
        let edited: Result<_, _> = results.into_iter().collect();
        edited.map(|edited| Item { edited, read: self.read }).map_err(|failed| failed.error)
    }
}
