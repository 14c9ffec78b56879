//! Several buffers, filled one after the other and moved together.

use std::path::{Path, PathBuf};

use overspill_io::{Block, Direction, Engine};

use super::alignment::Alignment;
use super::buffer::{SwapBuffer, check_dtype};
use super::dtype::{Dtype, TensorBytes};
use super::dump::{Describe, Field};
use super::error::SwapError;
use super::flight::{BufferFailed, BufferInFlight, Part, Remains, launch};
use super::transfer::{Refused, Targets};
use super::view::{View, ViewMut};

/// Buffers of one dtype. Tensors go to the current one; when it is full, the next one that has room is the current one.
#[derive(Debug)]
pub struct SwapBufferPool {
    dtype: Dtype,
    buffers: Vec<SwapBuffer>,
    /// Buffers before this one get no more tensors until a reset.
    current: usize,
}

/// A pool whose tensors are on their way to or from their files.
#[derive(Debug)]
#[must_use = "the pool and the outcome come back by waiting"]
pub struct PoolInFlight {
    dtype: Dtype,
    buffers: Vec<BufferInFlight>,
    current: usize,
}

/// A pool that did not move, or not all of whose tensors did.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct PoolFailed {
    /// The first failure, in the order of the tensors; it names the file.
    pub error: SwapError,
    /// All buffers that are whole, with their tensors: after a write with the data, after a read with unspecified
    /// bytes in what failed.
    pub pool: SwapBufferPool,
    /// The tensors of buffers that are not whole, because the kernel never gave some of their memory back.
    pub parts: Vec<Part>,
}

impl SwapBufferPool {
    /// Empty buffers over `blocks`.
    ///
    /// # Errors
    ///
    /// [`Refused`] with the blocks: [`SwapError::NoBuffers`] if there are none, [`SwapError::TinyBuffer`] if one of
    /// them could not hold the smallest tensor.
    pub fn new(blocks: Vec<Block>, dtype: Dtype, alignment: Alignment) -> Result<SwapBufferPool, Refused> {
        let buffers = buffers_over(blocks, dtype, alignment)?;
        Ok(SwapBufferPool { dtype, buffers, current: 0 })
    }

    /// What the tensors' elements are.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The buffers, in the order in which they are filled.
    #[must_use]
    pub fn buffers(&self) -> &[SwapBuffer] {
        &self.buffers
    }

    /// Sum of all tensors' elements, without what is swapped along.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.buffers.iter().map(SwapBuffer::numel).sum()
    }

    /// Whether there is room for one more tensor, of `numel` elements.
    #[must_use]
    pub fn has_space(&self, numel: usize) -> bool {
        self.with_space(numel).is_some()
    }

    /// Makes room for a tensor of `numel` elements, whose file is `path`. Its elements are whatever was there.
    ///
    /// # Errors
    ///
    /// [`SwapError::TooLarge`] if no buffer could hold it when empty, [`SwapError::NoRoom`] if none does now,
    /// [`SwapError::Held`] if a tensor for `path` is here. Nothing has changed then.
    pub fn allocate(&mut self, numel: usize, path: &Path) -> Result<ViewMut<'_>, SwapError> {
        if self.buffers.iter().any(|buffer| buffer.holds(path)) {
            return Err(SwapError::Held { path: path.to_owned() });
        }
        let index = self.with_space(numel).ok_or_else(|| self.no_space(numel, path))?;
        self.current = index;
        self.buffers[index].allocate(numel, path)
    }

    /// Copies `tensor`, whose file is `path`, into the pool.
    ///
    /// # Errors
    ///
    /// As [`SwapBufferPool::allocate`], and [`SwapError::WrongDtype`] if its elements are not the pool's. Nothing has
    /// changed then.
    pub fn insert(&mut self, tensor: TensorBytes<'_>, path: &Path) -> Result<ViewMut<'_>, SwapError> {
        check_dtype(self.dtype, tensor, path)?;
        let mut view = self.allocate(tensor.numel(), path)?;
        view.compute().copy_from_slice(tensor.bytes());
        Ok(view)
    }

    /// All tensors, in the order in which they came.
    pub fn views(&self) -> impl Iterator<Item = View<'_>> {
        self.buffers.iter().flat_map(SwapBuffer::views)
    }

    /// All tensors, to change them.
    pub fn views_mut(&mut self) -> impl Iterator<Item = ViewMut<'_>> {
        self.buffers.iter_mut().flat_map(SwapBuffer::views_mut)
    }

    /// The tensors' files, in the order in which the tensors came.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.buffers.iter().flat_map(SwapBuffer::paths)
    }

    /// Forgets every tensor; the first buffer is the current one.
    pub fn reset(&mut self) {
        self.buffers.iter_mut().for_each(SwapBuffer::reset);
        self.current = 0;
    }

    /// The memory, without the tensors.
    #[must_use]
    pub fn into_blocks(self) -> Vec<Block> {
        self.buffers.into_iter().map(SwapBuffer::into_block).collect()
    }

    /// Starts writing every tensor to its file, as [`swap_out_tensors`](super::swap_out_tensors) does.
    ///
    /// # Errors
    ///
    /// [`PoolFailed`] with the whole pool, and nothing was started: [`SwapError::Io`], [`SwapError::SameFile`].
    pub fn swap_out(self, engine: &Engine) -> Result<PoolInFlight, PoolFailed> {
        self.swap(engine, Direction::Write)
    }

    /// Starts reading every tensor from its file, which [`SwapBufferPool::swap_out`] has written.
    ///
    /// # Errors
    ///
    /// [`PoolFailed`] with the whole pool, and nothing was started: [`SwapError::Io`], [`SwapError::ShortFile`],
    /// [`SwapError::SameFile`].
    pub fn swap_in(self, engine: &Engine) -> Result<PoolInFlight, PoolFailed> {
        self.swap(engine, Direction::Read)
    }

    /// Writes every tensor to its file and waits.
    ///
    /// # Errors
    ///
    /// As [`SwapBufferPool::swap_out`] and [`PoolInFlight::wait`].
    pub fn swap_out_and_wait(self, engine: &Engine) -> Result<SwapBufferPool, PoolFailed> {
        self.swap_out(engine)?.wait()
    }

    /// Reads every tensor from its file and waits.
    ///
    /// # Errors
    ///
    /// As [`SwapBufferPool::swap_in`] and [`PoolInFlight::wait`].
    pub fn swap_in_and_wait(self, engine: &Engine) -> Result<SwapBufferPool, PoolFailed> {
        self.swap_in(engine)?.wait()
    }

    fn swap(self, engine: &Engine, direction: Direction) -> Result<PoolInFlight, PoolFailed> {
        let SwapBufferPool { dtype, buffers, current } = self;
        let requests = buffers.iter().flat_map(SwapBuffer::requests);
        let launched = match Targets::open(engine, direction, requests) {
            Ok(targets) => launch(engine, targets, buffers),
            Err(error) => Err((error, buffers)),
        };
        match launched {
            Ok(buffers) => Ok(PoolInFlight { dtype, buffers, current }),
            Err((error, buffers)) => {
                let pool = SwapBufferPool { dtype, buffers, current };
                Err(PoolFailed { error, pool, parts: Vec::new() })
            }
        }
    }

    fn with_space(&self, numel: usize) -> Option<usize> {
        (self.current..self.buffers.len()).find(|&index| self.buffers[index].has_space(numel))
    }

    fn no_space(&self, numel: usize, path: &Path) -> SwapError {
        let (path, dtype) = (PathBuf::from(path), self.dtype);
        let numel_max = self.buffers.iter().map(SwapBuffer::numel_max).max().unwrap_or(0);
        if numel > numel_max {
            return SwapError::TooLarge { path, numel, dtype, numel_max };
        }
        let open = self.buffers.iter().skip(self.current);
        let bytes_free = open.map(SwapBuffer::bytes_free).max().unwrap_or(0);
        SwapError::NoRoom { path, numel, dtype, bytes_free }
    }
}

impl PoolInFlight {
    /// Whether [`PoolInFlight::wait`] would return at once.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.buffers.iter().all(BufferInFlight::is_done)
    }

    /// Waits until every transfer is over, whether or not one has failed.
    ///
    /// # Errors
    ///
    /// [`PoolFailed`] with [`SwapError::Io`] and what came home.
    pub fn wait(self) -> Result<SwapBufferPool, PoolFailed> {
        let PoolInFlight { dtype, buffers, current } = self;
        let mut pool = SwapBufferPool { dtype, buffers: Vec::new(), current };
        let mut parts = Vec::new();
        let mut first_error = None;
        for flight in buffers {
            match flight.wait() {
                Ok(buffer) => pool.buffers.push(buffer),
                Err(BufferFailed { error, remains }) => {
                    first_error.get_or_insert(error);
                    match remains {
                        Remains::Whole(buffer) => pool.buffers.push(buffer),
                        Remains::Parts(mut rest) => parts.append(&mut rest),
                    }
                }
            }
        }
        match first_error {
            None => Ok(pool),
            Some(error) => Err(PoolFailed { error, pool, parts }),
        }
    }
}

/// Empty buffers over `blocks`, all of one dtype.
pub(crate) fn buffers_over(
    blocks: Vec<Block>,
    dtype: Dtype,
    alignment: Alignment,
) -> Result<Vec<SwapBuffer>, Refused> {
    if blocks.is_empty() {
        return Err(Refused { error: SwapError::NoBuffers, blocks });
    }
    if let Some(tiny) = blocks.iter().find(|block| block.len() < overspill_io::BLOCK_ALIGNMENT) {
        return Err(Refused { error: SwapError::TinyBuffer { bytes: tiny.len() }, blocks });
    }
    Ok(blocks.into_iter().map(|block| SwapBuffer::new(block, dtype, alignment)).collect())
}

impl Describe for SwapBufferPool {
    fn title(&self) -> &'static str {
        "SwapBufferPool"
    }

    fn describe(&self, show: &mut dyn FnMut(Field<'_>)) {
        let bytes_used: Vec<usize> = self.buffers.iter().map(SwapBuffer::bytes_used).collect();
        show(("dtype", &format_args!("{}", self.dtype)));
        show(("buffers", &self.buffers.len()));
        show(("current", &self.current));
        show(("bytes_used", &bytes_used));
        show(("numel", &self.numel()));
        show(("paths", &self.paths().collect::<Vec<_>>()));
    }
}
