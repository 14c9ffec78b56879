//! Who holds which piece of the arena.
//!
//! The size of a [`Pool`] is the sum of everybody who can hold a block, given as [`BlockClass`]es and fixed at
//! start: there is no growth, so memory cannot run away, and waiting for a block is the back-pressure of the whole
//! engine. A task that needs several blocks leases them together or not at all, because two tasks that each hold
//! half of what they need would wait for each other for good. Waiting, which is the [`Ledger`]'s, ends after the pool's
//! patience with the same typed refusal that [`Pool::try_lease`] gives at once.

use std::fmt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use super::arena::{Arena, MemoryReport};
use super::block::Block;
use super::cuda::{self, CudaError, CudaReport};
use super::ledger::Ledger;
use super::shelves::{Place, Shelves};
use crate::BlockClass;

/// How long [`Pool::lease`] waits before it takes the pool for overcommitted.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why a pool cannot be made, or a lease not be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// No class has blocks of this size; waiting would not help.
    #[error("a lease of {bytes} bytes is larger than the largest block, {largest} bytes")]
    TooLarge {
        /// What was asked for.
        bytes: usize,
        /// The largest block of the pool.
        largest: usize,
    },
    /// The blocks of the class are held by others.
    #[error(
        "no free block of class `{class}` for {bytes} bytes: {wanted} wanted, {leased} of {count} leased"
    )]
    Exhausted {
        /// What was asked for, in bytes; of several requests the first that found no block.
        bytes: usize,
        /// The class that serves requests of this size.
        class: &'static str,
        /// Blocks of the class.
        count: usize,
        /// Blocks of the class that are held now.
        leased: usize,
        /// Blocks of the class that this call wanted together.
        wanted: usize,
    },
    /// The kernel refused the memory.
    #[error("cannot map {bytes} bytes of pool memory: {}", std::io::Error::from_raw_os_error(*errno))]
    Arena {
        /// Sum of all blocks.
        bytes: usize,
        /// The kernel's answer.
        errno: i32,
    },
    /// A class of empty blocks, or no class with a block at all.
    #[error(
        "block class `{name}` has {count} blocks of {block_bytes} bytes: a pool needs blocks of some size"
    )]
    EmptyClass {
        /// The class; empty if none was given.
        name: &'static str,
        /// Its block size.
        block_bytes: usize,
        /// Its number of blocks.
        count: usize,
    },
}

/// A fixed set of blocks in one arena. Clones share it.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// Maps the memory of all `classes` and touches it.
    ///
    /// Classes of the same block size are one class, under the first one's name.
    ///
    /// # Errors
    ///
    /// [`PoolError::EmptyClass`] for a class of empty blocks or a pool without blocks, [`PoolError::Arena`] if the
    /// memory cannot be mapped.
    pub fn new(classes: &[BlockClass]) -> Result<Pool, PoolError> {
        Pool::with_patience(classes, PATIENCE)
    }

    /// Like [`Pool::new`]; `patience` bounds how long a lease waits for a block.
    ///
    /// # Errors
    ///
    /// As [`Pool::new`].
    pub fn with_patience(classes: &[BlockClass], patience: Duration) -> Result<Pool, PoolError> {
        let shelves = Shelves::lay_out(classes)?;
        let arena = Arena::map(shelves.bytes())?;
        Ok(Pool { shared: Arc::new(Shared { ledger: Ledger::new(shelves), patience, arena }) })
    }

    /// Leases a block of `bytes` bytes from the smallest class that serves it, waiting until one is free.
    ///
    /// # Errors
    ///
    /// [`PoolError::TooLarge`] at once, [`PoolError::Exhausted`] after the pool's patience.
    pub fn lease(&self, bytes: usize) -> Result<Block, PoolError> {
        self.lease_all(&[bytes]).map(only)
    }

    /// Leases one block for each entry of `bytes`, all or none, waiting until all of them are free together.
    ///
    /// # Errors
    ///
    /// [`PoolError::TooLarge`] at once; [`PoolError::Exhausted`] after the pool's patience, or at once if the
    /// classes do not have that many blocks.
    pub fn lease_all(&self, bytes: &[usize]) -> Result<Vec<Block>, PoolError> {
        self.acquire(bytes, self.shared.patience)
    }

    /// Leases a block of `bytes` bytes now.
    ///
    /// # Errors
    ///
    /// [`PoolError::TooLarge`], or [`PoolError::Exhausted`] if no block of the class is free.
    pub fn try_lease(&self, bytes: usize) -> Result<Block, PoolError> {
        self.try_lease_all(&[bytes]).map(only)
    }

    /// Leases one block for each entry of `bytes` now, all or none.
    ///
    /// # Errors
    ///
    /// [`PoolError::TooLarge`], or [`PoolError::Exhausted`] if too few blocks are free.
    pub fn try_lease_all(&self, bytes: &[usize]) -> Result<Vec<Block>, PoolError> {
        self.acquire(bytes, Duration::ZERO)
    }

    /// What the memory really is: its size, its pages, whether it is locked, and what CUDA knows of it.
    #[must_use]
    pub fn report(&self) -> MemoryReport {
        self.shared.arena.report()
    }

    /// Pins the memory for the GPUs of this machine too, by the CUDA driver that is installed here; it stays so until
    /// the pool and its last block are gone. The driver is loaded by this call, which costs time and, for its context,
    /// memory beyond the pool. Once is enough; more calls change nothing.
    ///
    /// # Errors
    ///
    /// [`CudaError`], and nothing has changed.
    pub fn register_with_cuda(&self) -> Result<CudaReport, CudaError> {
        self.shared.arena.register_with_cuda(Path::new(cuda::DRIVER))
    }

    /// Number of leases that have not returned.
    #[must_use]
    pub fn leased_blocks(&self) -> usize {
        self.shared.ledger.leased()
    }

    /// Total time that callers spent waiting for blocks.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.shared.ledger.waited()
    }

    /// First byte and length of the memory that all blocks lie in.
    pub(crate) fn span(&self) -> (NonNull<u8>, usize) {
        self.shared.arena.span()
    }

    fn acquire(&self, bytes: &[usize], patience: Duration) -> Result<Vec<Block>, PoolError> {
        let places = self.shared.ledger.take(bytes, patience)?;
        let lease = |place| Lease { pool: Arc::clone(&self.shared), place };
        Ok(places.into_iter().zip(bytes).map(|(place, &bytes)| Block::whole(lease(place), bytes)).collect())
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut pool = f.debug_struct("Pool");
        pool.field("classes", self.shared.ledger.shelves())
            .field("leased_blocks", &self.leased_blocks())
            .finish()
    }
}

/// The right to one block's memory, held by exactly one lease; dropping it gives the block back.
pub(super) struct Lease {
    pool: Arc<Shared>,
    place: Place,
}

impl Lease {
    /// Where the leased memory begins, of which the holder uses `bytes` bytes.
    pub(super) fn memory(&self, bytes: usize) -> NonNull<u8> {
        self.pool.arena.address(self.pool.ledger.shelves().offset(self.place, bytes), bytes)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.ledger.put_back(self.place);
    }
}

struct Shared {
    ledger: Ledger,
    patience: Duration,
    arena: Arena,
}

/// The block of an order for one.
fn only(blocks: Vec<Block>) -> Block {
    blocks.into_iter().next().expect("an order for one block is served with one block")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const SMALL: BlockClass = BlockClass { name: "small", block_bytes: 4096, count: 2 };
    const LARGE: BlockClass = BlockClass { name: "large", block_bytes: 10_000, count: 1 };
    const BOUND: Duration = Duration::from_secs(20);

    #[test]
    fn a_request_is_served_by_the_smallest_class_and_never_by_a_larger_one() {
        let pool = Pool::new(&[LARGE, SMALL]).unwrap();
        let held = [pool.try_lease(1).unwrap(), pool.try_lease(4096).unwrap()];
        let refusal = pool.try_lease(100).unwrap_err();
        let exhausted = PoolError::Exhausted { bytes: 100, class: "small", count: 2, leased: 2, wanted: 1 };
        assert_eq!(refusal, exhausted);
        assert_eq!(pool.try_lease(4097).unwrap().len(), 4097);
        assert_eq!(
            pool.try_lease(10_001).unwrap_err(),
            PoolError::TooLarge { bytes: 10_001, largest: 10_000 }
        );
        drop(held);
        assert_eq!(pool.leased_blocks(), 0);
    }

    #[test]
    fn leases_come_together_or_not_at_all() {
        let pool = Pool::new(&[SMALL, LARGE]).unwrap();
        let held = pool.try_lease(5000).unwrap();
        let refusal = pool.try_lease_all(&[1, 2, 5000]).unwrap_err();
        assert!(matches!(refusal, PoolError::Exhausted { bytes: 5000, class: "large", .. }), "{refusal}");
        assert_eq!(pool.leased_blocks(), 1);
        drop(held);
        assert_eq!(pool.try_lease_all(&[1, 2, 5000]).unwrap().len(), 3);
        assert!(pool.try_lease_all(&[]).unwrap().is_empty());
    }

    #[test]
    fn an_order_that_can_never_be_served_is_refused_at_once() {
        let pool = Pool::new(&[SMALL]).unwrap();
        let refusal = pool.lease_all(&[1, 1, 1]).unwrap_err();
        let exhausted = PoolError::Exhausted { bytes: 1, class: "small", count: 2, leased: 0, wanted: 3 };
        assert_eq!(refusal, exhausted);
        assert_eq!(pool.waited(), Duration::ZERO);
    }

    #[test]
    fn waiting_ends_with_the_patience_and_is_counted() {
        let pool = Pool::with_patience(&[LARGE], Duration::from_millis(30)).unwrap();
        let held = pool.lease(1).unwrap();
        let refusal = pool.lease(9000).unwrap_err();
        let exhausted = PoolError::Exhausted { bytes: 9000, class: "large", count: 1, leased: 1, wanted: 1 };
        assert_eq!(refusal, exhausted);
        assert!(pool.waited() >= Duration::from_millis(30));
        drop(held);
        pool.lease(9000).unwrap();
    }

    #[test]
    fn a_waiter_for_several_blocks_is_woken_when_the_last_of_them_returns() {
        let pool = Pool::with_patience(&[SMALL, LARGE], BOUND).unwrap();
        let (first, second) = (pool.lease(1).unwrap(), pool.lease(1).unwrap());
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            for order in [vec![1, 1], vec![1]] {
                let (pool, sender) = (&pool, sender.clone());
                scope.spawn(move || sender.send(pool.lease_all(&order).map(|blocks| blocks.len())));
            }
            drop(first);
            drop(second);
            let mut served: Vec<usize> =
                (0..2).map(|_| receiver.recv_timeout(BOUND).unwrap().unwrap()).collect();
            served.sort_unstable();
            assert_eq!(served, [1, 2]);
        });
        assert_eq!(pool.leased_blocks(), 0);
    }

    proptest! {
        #[test]
        fn blocks_held_together_never_overlap(sizes in prop::collection::vec(1_usize..12_000, 1..12)) {
            let classes = [
                BlockClass { count: 6, ..SMALL },
                BlockClass { count: 4, ..LARGE },
                BlockClass { name: "odd", block_bytes: 5_000, count: 3 },
            ];
            let pool = Pool::new(&classes).unwrap();
            let mut held: Vec<Block> = sizes.iter().filter_map(|&bytes| pool.try_lease(bytes).ok()).collect();
            prop_assert_eq!(pool.leased_blocks(), held.len());
            for (tag, block) in (1_u8..).zip(&mut held) {
                block.fill(tag);
            }
            for (tag, block) in (1_u8..).zip(&held) {
                prop_assert!(block.iter().all(|&byte| byte == tag));
            }
        }
    }
}
