//! Tensors written behind the caller's back: copied into pinned buffers, and from there to files of their own.
//!
//! ```text
//!                  ┌────────────────────────── written ─────────────────────────────┐
//!                  ▼                                                                │
//!   add ──► free ──the current one is full──► filling ──full, or a flush──► writing ┤
//!                  ▲                                                                │
//!                  └────────────── written by retry, or discarded ──────── failed ◄─┘
//! ```
//!
//! A buffer is in one of four places, and moves from one to the next by value. [`AsyncTensorSwapper::swap_out_tensors`]
//! copies, so the caller may reuse its memory at once; it waits only when no buffer is free, and then for the oldest, or
//! when a file is still being written that is to be written again.
//!
//! # Order
//!
//! The last tensor that was given for a file is what the file holds in the end: a buffer with a tensor for a file is
//! submitted before another one for that file is copied, and a buffer is submitted only when no earlier write to one of
//! its files is under way, by whatever name.
//!
//! # Failures
//!
//! A buffer that could not be written keeps its tensors, and the error names the file. Until somebody decides by
//! [`AsyncTensorSwapper::retry`] or [`AsyncTensorSwapper::discard_failed`], nothing more is taken and nothing more is
//! submitted: a later tensor must not be overwritten by an earlier one that is tried again. What is being written
//! meanwhile comes to its end.

mod set;
mod stats;

use std::path::{Path, PathBuf};

use overspill_io::{Block, Engine};

use self::set::BufferSet;
pub use self::stats::{BufferStates, SwapStats, WAIT_TIMER};
use crate::buffers::{
    Alignment, BufferFailed, Describe, Dtype, Field, Refused, SwapBuffer, SwapError, TensorBytes,
    buffers_over,
};

/// Writes tensors to files behind the caller's back. A binding holds one per stream of tensors; it needs `&mut`.
///
/// Dropping it submits what was not submitted yet and does not wait: the engine still carries it out, but failures are
/// not told. After a failure nothing is submitted any more. Call [`AsyncTensorSwapper::flush`] first.
#[derive(Debug)]
pub struct AsyncTensorSwapper {
    engine: Engine,
    alignment: Alignment,
    /// `None` until there are buffers.
    buffers: Option<BufferSet>,
}

/// What [`AsyncTensorSwapper::release_buffers`] gives back.
#[derive(Debug)]
pub struct Released {
    /// The memory of every buffer, in no particular order.
    pub blocks: Vec<Block>,
    /// What was swapped out.
    pub stats: SwapStats,
}

/// A call that took some of its tensors, or none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct SwapOutFailed {
    /// What stopped it. If it is about the call itself, nothing has changed; if it is the failure of a write, that may
    /// be one of an earlier call.
    pub error: SwapError,
    /// The first so many tensors were taken: the swapper holds or has written them. The others it has not touched.
    pub taken: usize,
}

impl AsyncTensorSwapper {
    /// A swapper without buffers. `alignment` is what was probed for the file system of the tensors' files.
    #[must_use]
    pub fn new(engine: &Engine, alignment: Alignment) -> AsyncTensorSwapper {
        AsyncTensorSwapper { engine: engine.clone(), alignment, buffers: None }
    }

    /// Gives the swapper `blocks` to hold tensors of `dtype`; blocks are pinned by nature. More may be added later.
    ///
    /// # Errors
    ///
    /// [`Refused`] with the blocks: [`SwapError::NoBuffers`] if there are none, [`SwapError::TinyBuffer`] if one could
    /// not hold the smallest tensor, [`SwapError::MixedDtypes`] if it has buffers of another dtype.
    pub fn add_buffers(&mut self, blocks: Vec<Block>, dtype: Dtype) -> Result<(), Refused> {
        if let Some(&BufferSet { dtype: held, .. }) = self.buffers.as_ref().filter(|held| held.dtype != dtype)
        {
            return Err(Refused { error: SwapError::MixedDtypes { held, given: dtype }, blocks });
        }
        let added = buffers_over(blocks, dtype, self.alignment)?;
        self.buffers.get_or_insert_with(|| BufferSet::none(dtype)).free.extend(added);
        Ok(())
    }

    /// Whether it has buffers.
    #[must_use]
    pub fn has_buffers(&self) -> bool {
        self.buffers.is_some()
    }

    /// What the buffers hold, if there are any.
    #[must_use]
    pub fn dtype(&self) -> Option<Dtype> {
        self.buffers.as_ref().map(|buffers| buffers.dtype)
    }

    /// How many buffers are in which state.
    #[must_use]
    pub fn states(&self) -> BufferStates {
        self.buffers.as_ref().map_or_else(BufferStates::default, BufferSet::states)
    }

    /// What was swapped out since the first buffers were added.
    #[must_use]
    pub fn stats(&self) -> SwapStats {
        self.buffers.as_ref().map_or_else(SwapStats::default, |buffers| buffers.stats)
    }

    /// Takes a copy of each of `tensors`, to be written to the file at the same place of `paths`; files are made or
    /// overwritten as by [`swap_out_tensors`](crate::buffers::swap_out_tensors). The caller may reuse the tensors'
    /// memory as soon as this returns. What is in the files is known only after a flush.
    ///
    /// # Errors
    ///
    /// [`SwapOutFailed`]. The whole call is checked before anything is copied, and nothing has changed after
    /// [`SwapError::NoBuffers`], [`SwapError::Unwritten`], [`SwapError::Lists`], [`SwapError::WrongDtype`],
    /// [`SwapError::TooLarge`], or [`SwapError::SameFile`] if a path comes twice. A buffer that can't be written
    /// stops the call: [`SwapError::Io`] or, of files with several names, [`SwapError::SameFile`].
    pub fn swap_out_tensors<P: AsRef<Path>>(
        &mut self,
        tensors: &[TensorBytes<'_>],
        paths: &[P],
    ) -> Result<(), SwapOutFailed> {
        let refused = |error| SwapOutFailed { error, taken: 0 };
        let buffers = self.buffers.as_mut().ok_or_else(|| refused(SwapError::NoBuffers))?;
        buffers.check(tensors, paths).map_err(refused)?;
        for (taken, (&tensor, path)) in tensors.iter().zip(paths).enumerate() {
            let copied = buffers.copy(&self.engine, tensor, path.as_ref());
            copied.map_err(|error| SwapOutFailed { error, taken })?;
        }
        Ok(())
    }

    /// Submits what was not submitted yet and waits until everything is written; then every buffer is free.
    ///
    /// # Errors
    ///
    /// The first failure: [`SwapError::Io`], [`SwapError::SameFile`]; or [`SwapError::Unwritten`] if an earlier one
    /// was not dealt with. Nothing is being written then, and what was not submitted is kept.
    pub fn flush(&mut self) -> Result<(), SwapError> {
        let Some(buffers) = &mut self.buffers else { return Ok(()) };
        buffers.flush(&self.engine)
    }

    /// The buffers that could not be written, with their tensors and why.
    pub fn failed(&self) -> impl ExactSizeIterator<Item = &BufferFailed> {
        self.buffers.as_ref().map_or(&[][..], |buffers| &buffers.failed).iter()
    }

    /// Writes the buffers that could not be written again, the oldest first, and waits for each.
    ///
    /// # Errors
    ///
    /// The first failure, which ends it. That buffer and those behind it keep their tensors, and can be tried again.
    pub fn retry(&mut self) -> Result<(), SwapError> {
        let Some(buffers) = &mut self.buffers else { return Ok(()) };
        buffers.retry(&self.engine)
    }

    /// Gives up the tensors that could not be written, and names their files, which hold something unknown. Their
    /// buffers are free again, but for memory that the kernel never gave back.
    pub fn discard_failed(&mut self) -> Vec<PathBuf> {
        self.buffers.as_mut().map_or_else(Vec::new, BufferSet::discard)
    }

    /// Flushes, gives every buffer back, and is as new.
    ///
    /// # Errors
    ///
    /// As [`AsyncTensorSwapper::flush`]. The swapper keeps all buffers then, so that nothing is lost.
    pub fn release_buffers(&mut self) -> Result<Released, SwapError> {
        self.flush()?;
        let Some(BufferSet { free, stats, .. }) = self.buffers.take() else {
            return Ok(Released { blocks: Vec::new(), stats: SwapStats::default() });
        };
        Ok(Released { blocks: free.into_iter().map(SwapBuffer::into_block).collect(), stats })
    }
}

impl Drop for AsyncTensorSwapper {
    fn drop(&mut self) {
        if let Some(buffers) = self.buffers.as_mut().filter(|buffers| buffers.failed.is_empty()) {
            // Nobody is left to hear of a failure.
            drop(buffers.submit(&self.engine));
        }
    }
}

impl Describe for AsyncTensorSwapper {
    fn title(&self) -> &'static str {
        "AsyncTensorSwapper"
    }

    fn describe(&self, show: &mut dyn FnMut(Field<'_>)) {
        let SwapStats { tensors, numel, bytes, bytes_written, waits, waited } = self.stats();
        let BufferStates { free, filling, writing, failed } = self.states();
        match self.dtype() {
            Some(dtype) => show(("dtype", &format_args!("{dtype}"))),
            None => show(("dtype", &format_args!("none"))),
        }
        show(("alignment", &self.alignment.bytes()));
        show(("buffers_free", &free));
        show(("buffers_filling", &filling));
        show(("buffers_writing", &writing));
        show(("buffers_failed", &failed));
        show(("tensors", &tensors));
        show(("numel", &numel));
        show(("bytes", &bytes));
        show(("bytes_written", &bytes_written));
        show(("waits", &waits));
        show((WAIT_TIMER, &waited));
    }
}
