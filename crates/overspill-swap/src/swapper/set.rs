//! The buffers of a swapper, each in the place that says what is happening to it, and how they move on.

use std::collections::{HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Instant;

use overspill_io::{Direction, Engine};

use super::stats::{BufferStates, SwapStats};
use crate::buffers::{
    BufferFailed, BufferInFlight, Dtype, Remains, SwapBuffer, SwapError, Targets, TensorBytes, check_dtype,
};

/// All buffers of one swapper. Together with the functions here, which move each of them by value, the places are the
/// states; a buffer can't be in two of them.
#[derive(Debug)]
pub(super) struct BufferSet {
    pub(super) dtype: Dtype,
    /// Empty.
    pub(super) free: Vec<SwapBuffer>,
    /// The current one.
    filling: Option<SwapBuffer>,
    /// With the engine, the oldest first.
    writing: VecDeque<BufferInFlight>,
    /// Not written, or not all of them.
    pub(super) failed: Vec<BufferFailed>,
    pub(super) stats: SwapStats,
}

impl BufferSet {
    pub(super) fn none(dtype: Dtype) -> BufferSet {
        let (free, filling, writing) = (Vec::new(), None, VecDeque::new());
        BufferSet { dtype, free, filling, writing, failed: Vec::new(), stats: SwapStats::default() }
    }

    pub(super) fn states(&self) -> BufferStates {
        BufferStates {
            free: self.free.len(),
            filling: usize::from(self.filling.is_some()),
            writing: self.writing.len(),
            failed: self.failed.len(),
        }
    }

    /// Whether a call can be carried out, as far as that can be known.
    pub(super) fn check<P: AsRef<Path>>(
        &self,
        tensors: &[TensorBytes<'_>],
        paths: &[P],
    ) -> Result<(), SwapError> {
        self.check_failed()?;
        if tensors.len() != paths.len() {
            return Err(SwapError::Lists { tensors: tensors.len(), paths: paths.len() });
        }
        let in_memory = self.free.iter().chain(&self.filling).map(SwapBuffer::numel_max);
        let numels = in_memory.chain(self.writing.iter().map(BufferInFlight::numel_max));
        let numel_max = numels.max().ok_or(SwapError::NoBuffers)?;
        let mut seen = HashSet::new();
        for (&tensor, path) in tensors.iter().zip(paths) {
            let (path, numel) = (path.as_ref(), tensor.numel());
            check_dtype(self.dtype, tensor, path)?;
            if numel > numel_max {
                let path = path.to_owned();
                return Err(SwapError::TooLarge { path, numel, dtype: self.dtype, numel_max });
            }
            if !seen.insert(path) {
                return Err(SwapError::SameFile { path: path.to_owned(), other: path.to_owned() });
            }
        }
        Ok(())
    }

    fn check_failed(&self) -> Result<(), SwapError> {
        let Some(BufferFailed { error, remains }) = self.failed.first() else { return Ok(()) };
        let path = error.path().map(Path::to_owned).or_else(|| remains.paths().into_iter().next());
        Err(SwapError::Unwritten { path: path.unwrap_or_default(), buffers: self.failed.len() })
    }

    /// Copies one tensor into the current buffer, after changing buffers if need be.
    pub(super) fn copy(
        &mut self,
        engine: &Engine,
        tensor: TensorBytes<'_>,
        path: &Path,
    ) -> Result<(), SwapError> {
        let fits = |buffer: &SwapBuffer| buffer.has_space(tensor.numel()) && !buffer.holds(path);
        if !self.filling.as_ref().is_some_and(fits) {
            self.submit(engine)?;
            self.land_finished()?;
            self.take_free(tensor.numel())?;
        }
        let filling = self.filling.as_mut().ok_or(SwapError::NoBuffers)?;
        filling.insert(tensor, path).map(drop)
    }

    /// Makes a free buffer with room for `numel` elements the current one; waits for the oldest write if there is none.
    fn take_free(&mut self, numel: usize) -> Result<(), SwapError> {
        loop {
            if let Some(index) = self.free.iter().position(|buffer| buffer.has_space(numel)) {
                self.filling = Some(self.free.swap_remove(index));
                return Ok(());
            }
            let oldest = self.writing.pop_front().ok_or(SwapError::NoBuffers)?;
            self.land(oldest)?;
        }
    }

    /// Hands the current buffer to the engine.
    pub(super) fn submit(&mut self, engine: &Engine) -> Result<(), SwapError> {
        let Some(buffer) = self.filling.take() else { return Ok(()) };
        if buffer.is_empty() {
            self.free.push(buffer);
            return Ok(());
        }
        let targets = match Targets::open(engine, Direction::Write, buffer.requests()) {
            Ok(targets) => targets,
            Err(error) => return self.give_up(BufferFailed { error, remains: Remains::Whole(buffer) }),
        };
        // Two writes to one file would race; the earlier one ends first.
        while let Some(index) = self.writing.iter().position(|flight| flight.meets(&targets)) {
            let landed = self.writing.remove(index).map_or(Ok(()), |earlier| self.land(earlier));
            if let Err(error) = landed {
                self.filling = Some(buffer);
                return Err(error);
            }
        }
        match buffer.launch(engine, targets) {
            Ok(flight) => {
                self.writing.push_back(flight);
                Ok(())
            }
            Err(failed) => self.give_up(failed),
        }
    }

    /// Keeps a buffer that could not be submitted, behind all older ones that fail: in this order they are tried again.
    fn give_up(&mut self, failed: BufferFailed) -> Result<(), SwapError> {
        let earlier = self.land_all();
        let error = self.keep(failed);
        earlier.and(Err(error))
    }

    /// Waits for every write, the oldest first, whether or not one has failed.
    fn land_all(&mut self) -> Result<(), SwapError> {
        let mut first_error = Ok(());
        while let Some(oldest) = self.writing.pop_front() {
            first_error = first_error.and(self.land(oldest));
        }
        first_error
    }

    /// Takes back every buffer that is written by now.
    fn land_finished(&mut self) -> Result<(), SwapError> {
        let mut first_error = Ok(());
        while let Some(index) = self.writing.iter().position(BufferInFlight::is_done) {
            let landed = self.writing.remove(index).map_or(Ok(()), |finished| self.land(finished));
            first_error = first_error.and(landed);
        }
        first_error
    }

    /// Waits for one buffer; it is free then, or failed.
    fn land(&mut self, flight: BufferInFlight) -> Result<(), SwapError> {
        let began = (!flight.is_done()).then(Instant::now);
        let landed = flight.wait();
        if let Some(began) = began {
            self.stats.waits += 1;
            self.stats.waited += began.elapsed();
        }
        match landed {
            Ok(buffer) => {
                self.written(buffer);
                Ok(())
            }
            Err(failed) => Err(self.keep(failed)),
        }
    }

    /// Counts what a buffer held, and makes it free.
    fn written(&mut self, mut buffer: SwapBuffer) {
        let numel = buffer.numel() as u64;
        self.stats.tensors += buffer.len() as u64;
        self.stats.numel += numel;
        self.stats.bytes += numel * self.dtype.bytes() as u64;
        self.stats.bytes_written += buffer.bytes_used() as u64;
        buffer.reset();
        self.free.push(buffer);
    }

    /// Keeps a buffer that was not written, and tells why.
    fn keep(&mut self, failed: BufferFailed) -> SwapError {
        let error = failed.error.clone();
        self.failed.push(failed);
        error
    }

    pub(super) fn flush(&mut self, engine: &Engine) -> Result<(), SwapError> {
        let submitted = self.check_failed().and_then(|()| self.submit(engine));
        submitted.and(self.land_all())
    }

    pub(super) fn retry(&mut self, engine: &Engine) -> Result<(), SwapError> {
        let mut again = std::mem::take(&mut self.failed).into_iter();
        while let Some(BufferFailed { error, remains }) = again.next() {
            let written = match remains {
                Remains::Whole(buffer) => buffer.swap_out(engine).and_then(BufferInFlight::wait),
                // The engine that has the rest of the memory has stopped.
                Remains::Parts(parts) => Err(BufferFailed { error, remains: Remains::Parts(parts) }),
            };
            match written {
                Ok(buffer) => self.written(buffer),
                Err(failed) => {
                    let error = self.keep(failed);
                    // They may hold later tensors for the same files.
                    self.failed.extend(again);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    pub(super) fn discard(&mut self) -> Vec<PathBuf> {
        let mut lost = Vec::new();
        for BufferFailed { remains, .. } in std::mem::take(&mut self.failed) {
            lost.extend(remains.paths());
            if let Remains::Whole(mut buffer) = remains {
                buffer.reset();
                self.free.push(buffer);
            }
        }
        lost
    }
}
