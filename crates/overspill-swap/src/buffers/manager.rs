//! A fixed set of pinned blocks of one size, for buffers.
//!
//! Blocks are leases of a pool that nobody else uses: dropping one is what gives it back, so none can be given back
//! twice, and none that is not the manager's.

use overspill_io::{Block, BlockClass, Pool, PoolError};

use super::dtype::Dtype;
use super::dump::{Describe, Field};
use super::error::SwapError;

/// What refusals call the blocks.
const CLASS: &str = "swap buffers";

/// Blocks of `numel` elements each. Clones share them.
#[derive(Clone, Debug)]
pub struct SwapBufferManager {
    pool: Pool,
    numel: usize,
    count: usize,
    dtype: Dtype,
}

impl SwapBufferManager {
    /// Maps `count` blocks of `numel` elements each.
    ///
    /// # Errors
    ///
    /// [`SwapError::Pool`] if that is nothing, or more memory than there is.
    pub fn new(count: usize, numel: usize, dtype: Dtype) -> Result<SwapBufferManager, SwapError> {
        let beyond = SwapError::TooManyBytes { count, numel, dtype };
        let block_bytes = numel.checked_mul(dtype.bytes()).ok_or(beyond)?;
        let pool = Pool::new(&[BlockClass { name: CLASS, block_bytes, count }])?;
        Ok(SwapBufferManager { pool, numel, count, dtype })
    }

    /// The pool of the blocks, to start an engine that has their memory registered.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// What the elements are.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Elements of each block.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Number of blocks.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Number of blocks that nobody holds.
    #[must_use]
    pub fn free(&self) -> usize {
        self.count.saturating_sub(self.pool.leased_blocks())
    }

    /// Memory of all blocks: the sum of their sizes, each rounded up to a multiple of
    /// [`BLOCK_ALIGNMENT`](overspill_io::BLOCK_ALIGNMENT).
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.pool.report().total_bytes
    }

    /// Hands out `count` blocks of exactly `numel` elements each, or none. It does not wait.
    ///
    /// # Errors
    ///
    /// [`SwapError::LongView`] if blocks are shorter, [`SwapError::Pool`] with [`PoolError::Exhausted`] if too few are
    /// free.
    pub fn allocate(&self, count: usize, numel: usize) -> Result<Vec<Block>, SwapError> {
        let bytes = self.block_bytes(numel)?;
        if count > self.count {
            // As the pool would say it, without a list of as many sizes as somebody happened to ask for.
            let leased = self.pool.leased_blocks();
            return Err(PoolError::Exhausted {
                bytes,
                class: CLASS,
                count: self.count,
                leased,
                wanted: count,
            }
            .into());
        }
        Ok(self.pool.try_lease_all(&vec![bytes; count])?)
    }

    /// Hands out every block that is free, of exactly `numel` elements each.
    ///
    /// # Errors
    ///
    /// [`SwapError::LongView`] if blocks are shorter, [`SwapError::Pool`] with [`PoolError::Exhausted`] if none is free.
    pub fn allocate_all(&self, numel: usize) -> Result<Vec<Block>, SwapError> {
        let bytes = self.block_bytes(numel)?;
        let mut blocks = vec![self.pool.try_lease(bytes)?];
        blocks.extend((1..self.count).map_while(|_| self.pool.try_lease(bytes).ok()));
        Ok(blocks)
    }

    fn block_bytes(&self, numel: usize) -> Result<usize, SwapError> {
        let dtype = self.dtype;
        let bytes = numel.checked_mul(dtype.bytes()).filter(|_| numel <= self.numel);
        bytes.ok_or(SwapError::LongView { numel, dtype, bytes: self.numel * dtype.bytes() })
    }
}

impl Describe for SwapBufferManager {
    fn title(&self) -> &'static str {
        "SwapBufferManager"
    }

    fn describe(&self, show: &mut dyn FnMut(Field<'_>)) {
        show(("dtype", &format_args!("{}", self.dtype)));
        show(("numel", &self.numel));
        show(("count", &self.count));
        show(("free", &self.free()));
        show(("total_bytes", &self.total_bytes()));
    }
}
