//! Where the training state lives between its uses.
//!
//! The trainer asks a [`Home`] for what it needs, unit by unit, and gives back what it made; whether that means
//! storage ([`SwappedHome`]) or memory ([`MemoryHome`]) is all the trainer does not know. Both run the same
//! arithmetic on the same numbers, so both give the same bits; the memory form is the reference for the other.

mod buffer;
mod io;
mod memory;
mod piece;
mod place;
mod swapped;
mod tile;
mod whole;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use overspill_optim::Isa;

pub use self::buffer::Buffer;
pub(crate) use self::buffer::{floats, floats_mut};
pub use self::io::IoReport;
pub use self::memory::MemoryHome;
pub(crate) use self::piece::PieceState;
pub(crate) use self::place::{Array, moments_name, weights_name};
pub use self::swapped::{Site, SwappedHome};
pub(crate) use self::tile::{TileState, has_masters, widen};
use crate::error::TrainError;
use crate::identity::Reached;
use crate::layout::{Unit, UnitLayout};
use crate::optimizer::Optimizer;

/// Something that a step will ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visit {
    /// The weights of a unit.
    Weights(Unit),
    /// The saved input of a layer.
    Input(SavedInput),
}

/// The input of one layer in one micro-batch, kept for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedInput {
    /// Index of the layer.
    pub layer: usize,
    /// Index of the micro-batch.
    pub micro: usize,
}

/// What a gradient buffer starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GradientStart {
    /// Zeros: the first contribution of the step.
    Zero,
    /// What was put away earlier in this step.
    Resume,
}

/// A state that stays on storage when its run ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// The store's home.
    pub path: PathBuf,
    /// The step after which it is.
    pub step: u64,
}

/// Fills a unit's weights before the first step.
pub type Source<'a> = dyn FnMut(&UnitLayout, &mut [f32]) -> Result<(), TrainError> + 'a;

/// Hears exact weights: the first element of a piece, and its values.
pub type Masters<'a> = dyn FnMut(usize, &[f32]) -> Result<(), TrainError> + 'a;

/// Owner of weights, gradients, optimizer state and saved inputs.
pub trait Home {
    /// Says what will be asked for from now on, in order, so that it can be fetched ahead. What was announced before
    /// and not asked for is forgotten.
    ///
    /// # Errors
    /// [`TrainError`] when something that was being fetched can't be put back.
    fn announce(&mut self, visits: Vec<Visit>) -> Result<(), TrainError>;

    /// The weights of a unit that the model computes with, `UnitLayout::padded` little-endian `f32`, valid as long as the
    /// bytes are held.
    ///
    /// # Errors
    /// [`TrainError`] when they can't be loaded or are damaged.
    fn weights(&mut self, unit: Unit) -> Result<Bytes, TrainError>;

    /// A buffer for the gradient of a unit.
    ///
    /// # Errors
    /// [`TrainError`] when no memory is left or an earlier gradient can't be loaded.
    fn gradient(&mut self, unit: Unit, start: GradientStart) -> Result<Buffer, TrainError>;

    /// Puts a gradient away until [`Home::update`].
    ///
    /// # Errors
    /// [`TrainError`] when it can't be stored.
    fn put_gradient(&mut self, unit: Unit, gradient: Buffer) -> Result<(), TrainError>;

    /// Puts a layer's input away until [`Home::saved_input`].
    ///
    /// # Errors
    /// [`TrainError`] when it can't be stored.
    fn save_input(&mut self, which: SavedInput, input: &[f32]) -> Result<(), TrainError>;

    /// The input that was put away.
    ///
    /// # Errors
    /// [`TrainError`] when it can't be loaded or is damaged.
    fn saved_input(&mut self, which: SavedInput) -> Result<Bytes, TrainError>;

    /// Updates all weights from the gradients that were put away. The last writes may still be under way afterwards,
    /// behind the next forward pass.
    ///
    /// # Errors
    /// [`TrainError::Interrupted`] between two pieces, or what a transfer failed with.
    fn update(&mut self, update: &Update<'_>) -> Result<(), TrainError>;

    /// Hands the exact weights of a unit to `each`, with the first element of each piece, in order. They are those that the
    /// optimizer changes: the model may compute with rounded ones.
    ///
    /// # Errors
    /// [`TrainError`] when they can't be loaded or are damaged, or what `each` failed with.
    fn masters(&mut self, unit: Unit, each: &mut Masters<'_>) -> Result<(), TrainError>;

    /// Waits for what the last update left under way.
    ///
    /// # Errors
    /// [`TrainError`] of a write that failed; there is no state to go on from then.
    fn settle(&mut self) -> Result<(), TrainError>;

    /// Makes the state the one that a later run finds, with what it has reached.
    ///
    /// # Errors
    /// [`TrainError`] when it can't be made durable.
    fn commit(&mut self, reached: &Reached) -> Result<(), TrainError>;

    /// What is left for a later run if this one ends now; `None` when nothing is.
    fn left(&self) -> Option<Left>;

    /// What the transfers did so far; `None` when there are none.
    fn io(&self) -> Option<IoReport>;
}

/// One optimizer step.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// The arithmetic and its constants.
    pub optimizer: Optimizer,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Weight decay of the parameters that decay.
    pub weight_decay: f64,
    /// Number of this update, from 1: that of the step, if none was skipped.
    pub update: u64,
    /// Every gradient is multiplied by this: clipping, and what undoes the scale of the loss.
    pub gradient_scale: f32,
    /// Seed of what is rounded at random.
    pub seed: u64,
    /// Which instructions to use.
    pub isa: Isa,
    /// Set when the run should stop.
    pub stop: &'a AtomicBool,
}
