//! What is done while backward computes: gradients go out as they come, and the first state comes in.
//!
//! A piece of a gradient is dealt to the tiles that its elements are in; each keeps it as its own
//! [gradients](super::gradient) say. Of tiles that move, only so many bytes are gathered in memory as the plan counts: who
//! has been gathered for the longest time goes to storage first. Writes that end badly hand their gradients back, and the
//! next call that needs a block, or the flush, tells of them.

use std::time::Instant;

use overspill_io::PoolError;
use tracing::debug_span;

use super::gradient::{Means, TileGradient};
use super::packing::Tile;
use super::{OptimizerError, OptimizerSwapper};
use crate::error::StoreError;
use crate::pipeline::{items_in_memory, waiting};
use crate::slot::Slot;

impl OptimizerSwapper {
    /// What to call before backward computes: waits for the writes that the last pass left under way, and starts loading
    /// the first tiles of the next one, as [`OptimizerSwapper::prefetch`] does. Before each of several micro-batches it is
    /// as good as before the first: what is being loaded stays under way.
    ///
    /// # Errors
    /// [`OptimizerError::Store`] of the first write that failed; that tile's state is lost.
    pub fn pre_backward(&mut self) -> Result<(), OptimizerError> {
        let _span = debug_span!("pre_backward").entered();
        self.settle_those(|slot| !matches!(slot, Slot::Loading(_)))?;
        self.prefetch()
    }

    /// What to call when backward has handed all gradients over: those that go to storage are there afterwards, as after
    /// [`OptimizerSwapper::flush_gradients`].
    ///
    /// # Errors
    /// [`OptimizerError::Store`] of the first write that failed.
    pub fn post_backward(&mut self) -> Result<(), OptimizerError> {
        let _span = debug_span!("post_backward").entered();
        self.flush_gradients()
    }

    /// Starts loading the first tiles of the next pass, as many as there are blocks for that no write needs any more: what to
    /// do while backward computes. Nothing else uses the blocks of the pipeline between two passes.
    ///
    /// # Errors
    /// [`OptimizerError::Store`] when an earlier write of such a tile failed.
    pub fn prefetch(&mut self) -> Result<(), OptimizerError> {
        let _span = debug_span!("prefetch").entered();
        let block_bytes = self.plan.longest_tile();
        let holds_block = |slot: &&Option<Slot>| {
            slot.as_ref().is_some_and(|slot| matches!(slot, Slot::Storing(_)) && !slot.is_at_rest())
        };
        // A class of blocks may have other holders, who are to find theirs.
        let mut held = self.slots.iter().filter(holds_block).count();
        let own = items_in_memory(self.plan.depth);
        for slot in &mut self.slots {
            if held >= own {
                break;
            }
            *slot = slot.take().map(|slot| slot.prefetch(&self.pool, block_bytes)).transpose()?;
            match slot {
                Some(Slot::Loading(_)) => held += 1,
                Some(Slot::Vacant(_) | Slot::Kept(_) | Slot::Saving(_)) => {}
                // Those behind it would take the blocks that it needs.
                Some(Slot::Swapped(_) | Slot::Storing(_)) | None => break,
            }
        }
        Ok(())
    }

    /// Takes over a piece of a parameter's gradient: what belongs from element `offset` on. The memory is the caller's
    /// again when this returns.
    ///
    /// # Errors
    /// [`OptimizerError::GradientRange`], [`OptimizerError::NoParameter`], [`OptimizerError::GradientsStay`], and
    /// [`OptimizerError::Store`] when an earlier write failed, of this tile or another: its gradients are in memory again,
    /// and the piece can be put again.
    pub fn swap_out_gradient(
        &mut self,
        parameter: usize,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), OptimizerError> {
        let started = Instant::now();
        let _span = debug_span!("gradient_swap_out", parameter, offset, bytes = bytes.len()).entered();
        let element_bytes = self.plan.gradient_bytes.ok_or(OptimizerError::GradientsStay)?;
        let tiles = self.tiles(parameter)?;
        let (elements, rest) = (bytes.len() / element_bytes, bytes.len() % element_bytes);
        let numel = self.numels[parameter];
        if rest != 0 || offset.checked_add(elements).is_none_or(|end| end > numel) {
            return Err(OptimizerError::GradientRange {
                parameter: self.names[parameter].clone(),
                offset,
                length: bytes.len(),
                numel,
                element_bytes,
            });
        }
        if elements == 0 {
            return Ok(());
        }
        let ends_before = |tile: &Tile| tile.part_of(parameter).1.elements.end <= offset;
        let before = self.plan.tiles[tiles.clone()].partition_point(ends_before);
        for index in tiles.skip(before) {
            let (_, part) = self.plan.tiles[index].part_of(parameter);
            let (start, end) = (part.elements.start.max(offset), part.elements.end.min(offset + elements));
            if start >= end {
                break;
            }
            let at = (part.gradient.start + start - part.elements.start) * element_bytes;
            let piece = &bytes[(start - offset) * element_bytes..(end - offset) * element_bytes];
            self.put(index, at, piece)?;
        }
        self.has_gradient[parameter] = true;
        self.phases.gradient_swap_out += started.elapsed();
        Ok(())
    }

    /// Puts what belongs at byte `at` of a tile's gradients there. Who has been gathered for the longest time makes room.
    fn put(&mut self, index: usize, at: usize, piece: &[u8]) -> Result<(), OptimizerError> {
        self.with_gradient(index, |gradient, means| gradient.put(at, piece, means))?;
        let gathered = |swapper: &Self| -> usize {
            swapper.gathering.iter().map(|&index| swapper.gradients[index].memory_bytes()).sum()
        };
        while gathered(self) > self.gathering_bytes
            && let Some(oldest) = self.gathering.pop_front()
        {
            self.with_gradient(oldest, TileGradient::spill)?;
        }
        Ok(())
    }

    /// Does something with the gradients of a tile for which a block of the pool is free.
    fn with_gradient(
        &mut self,
        index: usize,
        act: impl FnOnce(&mut TileGradient, Means<'_>) -> Result<(), StoreError>,
    ) -> Result<(), OptimizerError> {
        let block_bytes = self.gradient_block_bytes;
        let moves = self.gradients[index].moves();
        // A write that failed keeps its block until somebody asks how it ended.
        while moves && matches!(self.pool.try_lease(block_bytes), Err(PoolError::Exhausted { .. })) {
            let Some(oldest) = self.writing.pop_front() else { break };
            let settled = self.gradients[oldest].settle();
            self.note(oldest);
            settled?;
        }
        let means = Means { store: &self.store, pool: &self.pool, block_bytes };
        let done = act(&mut self.gradients[index], means);
        self.note(index);
        Ok(done?)
    }

    /// Takes note of where the gradients of a tile have come to.
    fn note(&mut self, index: usize) {
        let gradient = &self.gradients[index];
        if gradient.is_writing() {
            self.writing.push_back(index);
        }
        let is_gathered = gradient.moves() && gradient.memory_bytes() > 0;
        match self.gathering.iter().position(|&known| known == index) {
            Some(place) if !is_gathered => drop(self.gathering.remove(place)),
            None if is_gathered => self.gathering.push_back(index),
            Some(_) | None => {}
        }
    }

    /// Waits until every gradient that goes to storage is there; what was only gathered stays in memory.
    ///
    /// # Errors
    /// [`OptimizerError::Store`] of the first write that failed; its gradients are in memory again.
    pub fn flush_gradients(&mut self) -> Result<(), OptimizerError> {
        let started = Instant::now();
        let _span = debug_span!("gradient_flush").entered();
        self.writing.clear();
        let settle = || self.gradients.iter_mut().map(TileGradient::settle).collect();
        let settled: Vec<_> = waiting(&mut self.phases.wait, settle);
        let mut first_error = Ok(());
        for (index, result) in settled.into_iter().enumerate() {
            if let Err(error) = result {
                self.note(index);
                first_error = first_error.and(Err(error));
            }
        }
        self.phases.gradient_swap_out += started.elapsed();
        Ok(first_error?)
    }

    /// Forgets all gradients.
    pub fn clear_gradients(&mut self) {
        self.gradients.iter_mut().for_each(TileGradient::clear);
        self.has_gradient.fill(false);
        self.gathering.clear();
    }

    /// Bytes of gradients that are in memory.
    pub fn gradient_memory_bytes(&self) -> usize {
        self.gradients.iter().map(TileGradient::memory_bytes).sum()
    }
}
