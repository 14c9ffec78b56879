//! The pipeline: load, compute, store, item after item, with the transfers behind the computation.
//!
//! ```text
//! items ──load──► ahead (at most `depth`) ──► compute(item) ──store──► behind (at most `depth`) ──► items
//! ```
//!
//! When nothing is left to load, the blocks that loaded ahead store behind: at most twice `depth` items then.
//!
//! The computation always sees the items in their order and one at a time, so every depth gives the same bits;
//! depth 0 is the synchronous form, in which nothing overlaps. The pool paces it: an item is loaded ahead only if
//! its blocks are free, and the item that is due waits for the oldest write when they are not. Tensors that are in
//! memory for good cost no block and no transfer; tensors that were prefetched are waited for.
//!
//! Whoever subscribes to [`tracing`] at the debug level sees where the time goes: a span `pipeline`, in it for each item
//! `swap_in`, `compute` and `swap_out`, and within these a `wait` wherever the thread waits for transfers or blocks.
//!
//! When [`run`] has succeeded, the writes of those last items may still be under way, behind whatever is computed
//! next; their [slots](Slot) say so, and whoever uses or settles them learns how they ended. When it has failed,
//! nothing is in flight any more.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use overspill_io::{Block, Pool, PoolError};
use tracing::debug_span;

use crate::error::StoreError;
use crate::slot::{Coming, Present, Slot};
use crate::tensor::Dirty;

/// The tensors that one call of the computation works on.
#[derive(Debug)]
pub struct Item {
    /// Loaded, changed and stored. A vacant one begins as zeros.
    pub edited: Vec<Slot>,
    /// Loaded only.
    pub read: Vec<Slot>,
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
    depth.saturating_mul(2).saturating_add(1)
}

/// What a pipeline may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Where the blocks come from.
    pub pool: &'a Pool,
    /// Items that load ahead, and items that store behind.
    pub depth: usize,
    /// Bytes of the block for each tensor of an item, edited ones first: the longest tensor in this position.
    pub block_bytes: &'a [usize],
}

/// Where the time of the calling thread went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Waiting for tensors, and for blocks to load them into.
    pub load: Duration,
    /// Computing.
    pub compute: Duration,
    /// Taking checksums, starting writes, and waiting for earlier ones.
    pub store: Duration,
    /// Of loading and storing: waiting for transfers, comparing checksums of what has arrived, and waiting for blocks.
    pub wait: Duration,
}

/// What a pipeline leaves.
#[derive(Debug)]
pub struct Done {
    /// The items, in their order.
    pub items: Vec<Item>,
    /// Where the time went.
    pub timings: Timings,
}

/// Runs `compute(index, edited, read)` over all items, `depth` of them loading ahead and as many storing behind; twice as
/// many when nothing is left to load.
///
/// # Errors
/// The first error of a transfer or of the computation. All items are given up then, data that could not be written
/// included, and every block is home: half an update is worth nothing, and what was committed before is whole.
pub fn run<E>(
    limits: Limits<'_>,
    items: Vec<Item>,
    mut compute: impl FnMut(usize, &mut [&mut [u8]], &[&[u8]]) -> Result<(), E>,
) -> Result<Done, PipelineError<E>> {
    let _span = debug_span!("pipeline", items = items.len(), depth = limits.depth).entered();
    let mut flight = Flight {
        limits,
        ahead: VecDeque::new(),
        behind: VecDeque::new(),
        done: Vec::with_capacity(items.len()),
        timings: Timings::default(),
    };
    match flight.fly(items, &mut compute) {
        Ok(()) => {
            flight.done.extend(flight.behind);
            Ok(Done { items: flight.done, timings: flight.timings })
        }
        Err(error) => {
            flight.give_up();
            Err(error)
        }
    }
}

/// Everything that is in motion.
struct Flight<'a> {
    limits: Limits<'a>,
    ahead: VecDeque<ComingItem>,
    behind: VecDeque<Item>,
    done: Vec<Item>,
    timings: Timings,
}

impl Flight<'_> {
    fn fly<E>(
        &mut self,
        items: Vec<Item>,
        compute: &mut impl FnMut(usize, &mut [&mut [u8]], &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), PipelineError<E>> {
        let mut items = VecDeque::from(items);
        for item in 0..items.len() {
            let started = Instant::now();
            let swap_in = debug_span!("swap_in", item).entered();
            while self.ahead.len() <= self.limits.depth
                && let Some(next) = items.front()
            {
                let Some(blocks) = self.lease(&next.needs())? else { break };
                if let Some(item) = items.pop_front() {
                    self.ahead.push_back(item.begin(blocks)?);
                }
            }
            let due = self.ahead.pop_front().expect("the item that is due was loaded before it");
            let mut present = waiting(&mut self.timings.wait, || due.wait())?;
            drop(swap_in);
            let loaded = Instant::now();
            let computing = debug_span!("compute", item).entered();
            present.compute(|edited, read| compute(item, edited, read)).map_err(PipelineError::Compute)?;
            drop(computing);
            let computed = Instant::now();
            let swap_out = debug_span!("swap_out", item).entered();
            self.behind.push_back(present.store());
            let depth = self.limits.depth;
            let behind_max = if items.is_empty() { depth.saturating_mul(2) } else { depth };
            while self.behind.len() > behind_max {
                self.finish_oldest()?;
            }
            drop(swap_out);
            self.timings.load += loaded - started;
            self.timings.compute += computed - loaded;
            self.timings.store += computed.elapsed();
        }
        Ok(())
    }

    /// Blocks for those tensors of the next item that need one. `None`: there are none to be had now, and the item is
    /// not due yet.
    fn lease(&mut self, needs: &[bool]) -> Result<Option<Vec<Option<Block>>>, StoreError> {
        let Limits { pool, block_bytes, .. } = self.limits;
        assert!(needs.len() <= block_bytes.len(), "there is a length for each tensor of the item");
        let wanted: Vec<usize> =
            block_bytes.iter().zip(needs).filter(|(_, needs)| **needs).map(|(&bytes, _)| bytes).collect();
        let blocks = loop {
            match pool.try_lease_all(&wanted) {
                Ok(blocks) => break blocks,
                Err(PoolError::Exhausted { .. }) if !self.ahead.is_empty() => return Ok(None),
                Err(PoolError::Exhausted { .. }) if !self.behind.is_empty() => self.finish_oldest()?,
                // Somebody else holds the blocks: wait for them, within the pool's patience.
                Err(PoolError::Exhausted { .. }) => {
                    break waiting(&mut self.timings.wait, || pool.lease_all(&wanted))?;
                }
                Err(error) => return Err(error.into()),
            }
        };
        let mut blocks = blocks.into_iter();
        Ok(Some(needs.iter().map(|&needs| if needs { blocks.next() } else { None }).collect()))
    }

    fn finish_oldest(&mut self) -> Result<(), StoreError> {
        if let Some(oldest) = self.behind.pop_front() {
            self.done.push(waiting(&mut self.timings.wait, || oldest.settle())?);
        }
        Ok(())
    }

    /// Waits for everything in flight; nobody asks any more how it ended.
    fn give_up(self) {
        for item in self.ahead {
            drop(item.wait());
        }
        for item in self.behind {
            drop(item.settle());
        }
    }
}

/// Waits, shows it, and counts how long it took.
pub(crate) fn waiting<T>(waited: &mut Duration, wait: impl FnOnce() -> T) -> T {
    let _span = debug_span!("wait").entered();
    let started = Instant::now();
    let result = wait();
    *waited += started.elapsed();
    result
}

/// Puts every tensor through `step`: all of them, so that nothing is in flight unseen when one has failed.
fn each<T, U>(tensors: Vec<T>, step: impl FnMut(T) -> Result<U, StoreError>) -> Result<Vec<U>, StoreError> {
    let results: Vec<_> = tensors.into_iter().map(step).collect();
    results.into_iter().collect()
}

impl Item {
    /// Whether each tensor needs a block.
    fn needs(&self) -> Vec<bool> {
        self.edited.iter().chain(&self.read).map(Slot::needs_block).collect()
    }

    /// Starts loading all tensors.
    fn begin(self, blocks: Vec<Option<Block>>) -> Result<ComingItem, StoreError> {
        let mut blocks = blocks.into_iter();
        let mut begin = |slots| each(slots, |slot: Slot| slot.begin(blocks.next().flatten()));
        let (edited, read) = (begin(self.edited), begin(self.read));
        Ok(ComingItem { edited: edited?, read: read? })
    }

    /// Waits for every write.
    fn settle(self) -> Result<Self, StoreError> {
        let (edited, read) = (each(self.edited, Slot::settle), each(self.read, Slot::settle));
        Ok(Self { edited: edited?, read: read? })
    }
}

struct ComingItem {
    edited: Vec<Coming>,
    read: Vec<Coming>,
}

impl ComingItem {
    /// Waits for every tensor.
    fn wait(self) -> Result<PresentItem, StoreError> {
        let count = self.edited.len();
        let mut edited = Coming::wait_all(self.edited.into_iter().chain(self.read).collect())?;
        let read = edited.split_off(count);
        Ok(PresentItem { edited: edited.into_iter().map(Present::edit).collect(), read })
    }
}

struct PresentItem {
    edited: Vec<Present<Dirty>>,
    read: Vec<Present>,
}

impl PresentItem {
    fn compute<E>(
        &mut self,
        compute: impl FnOnce(&mut [&mut [u8]], &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut edited: Vec<_> = self.edited.iter_mut().map(|present| present.tensor.bytes_mut()).collect();
        let read: Vec<_> = self.read.iter().map(|present| present.tensor.bytes()).collect();
        compute(&mut edited, &read)
    }

    fn store(self) -> Item {
        Item {
            edited: Present::store_all(self.edited),
            read: self.read.into_iter().map(Present::release).collect(),
        }
    }
}
