//! The state of elements that are updated by themselves, in memory, whatever the recipe makes of it: filled, updated,
//! widened, read.
//!
//! A tile is a piece of a unit: its weights as they are stored, and its record. It may have parts of several parameters,
//! and padding between them, which no step touches. Random rounding depends on the parameter, the element and the step,
//! so any tiles give the same bits.

use overspill_optim::{
    Gradient, Isa, LengthMismatch, Origin, Outcome, Recipe, Tile, WeightFormat, Weights, widen_bf16,
    widen_f16,
};

use super::Update;
use super::buffer::floats_mut;
use crate::layout::{Parameter, UnitLayout};

/// The stored state of some elements of a unit.
#[derive(Debug)]
pub(crate) struct TileState<'a> {
    pub(crate) recipe: &'a Recipe,
    /// Of the elements, as they are stored.
    pub(crate) weights: &'a mut [u8],
    /// Of the elements, padded as the recipe and the disk like.
    pub(crate) record: &'a mut [u8],
}

impl<'a> TileState<'a> {
    fn elements(&self) -> usize {
        self.weights.len() / self.recipe.weights().weight_bytes()
    }

    /// The elements from `start` to `end` of the tile, for a call.
    fn part(&mut self, start: usize, end: usize) -> Tile<'_> {
        let elements = self.elements();
        let bytes = self.recipe.record_bytes(elements).expect("a tile fits in memory");
        let weights = &mut *self.weights;
        let weights = stored(self.recipe.weights(), weights, start, end);
        Tile { record: &mut self.record[..bytes], elements, range: start..end, weights }
    }

    /// Fills the tile, which begins at `start` of its unit, with first weights and with moments to begin with; padding is
    /// left as it is.
    pub(crate) fn initialize(&mut self, unit: &UnitLayout, start: usize, values: &[f32]) {
        let recipe = self.recipe;
        for (range, parameter) in unit.parameters_within(start..start + self.elements()) {
            let (first, end) = (range.start - start, range.end - start);
            let values = Gradient::F32(&values[first..end]);
            // The same in every run: it is the values that differ.
            let origin = origin(0, parameter, 0, range.start);
            // Weights that are no numbers show in the first loss, and end the run there.
            let (Outcome::Updated | Outcome::NonFinite) = recipe
                .initialize(Isa::detect(), self.part(first, end), values, origin)
                .expect("all slices are cut to the same range");
        }
    }

    /// Takes a step on the tile, which begins at `start` of its unit.
    ///
    /// # Panics
    /// When a gradient is not finite: the trainer has found their norm to be.
    pub(crate) fn update(&mut self, unit: &UnitLayout, start: usize, gradient: &[f32], update: &Update<'_>) {
        let step = |decay| {
            let step =
                update.optimizer.step(update.learning_rate, decay, update.update, update.gradient_scale);
            step.expect("the recipe is one of the optimizer's")
        };
        let (plain, decaying) = (step(0.0), step(update.weight_decay));
        let recipe = self.recipe;
        let mut outcome = Outcome::Updated;
        for (range, parameter) in unit.parameters_within(start..start + self.elements()) {
            let (first, end) = (range.start - start, range.end - start);
            let step = if parameter.role.decays() { &decaying } else { &plain };
            let gradient = Gradient::F32(&gradient[first..end]);
            let origin = origin(update.seed, parameter, update.update, range.start);
            let found = recipe
                .apply(update.isa, step, self.part(first, end), gradient, origin)
                .expect("all slices are cut to the same range, and the step is one of the layout's recipe");
            outcome = outcome.and(found);
        }
        assert_eq!(outcome, Outcome::Updated, "a gradient whose norm is finite, at {start} of {}", unit.unit);
    }

    /// Writes the exact weights of all elements, padding included, to `out`.
    pub(crate) fn masters(&mut self, out: &mut [f32]) {
        let recipe = self.recipe;
        let tile = self.part(0, self.elements());
        recipe.read_masters(tile, out).expect("all slices are of one length");
    }
}

/// What tells the roundings of a parameter's elements, from `first` of its unit on, in this step from all others.
pub(super) fn origin(seed: u64, parameter: &Parameter, step: u64, first: usize) -> Origin {
    let element = (first - parameter.range.start) as u64;
    Origin { seed, parameter: parameter.number, step, element }
}

/// Weights as they are stored, in single precision.
pub(crate) fn widen(format: WeightFormat, stored: &[u8], out: &mut [f32]) {
    let widened = match format {
        WeightFormat::F32 => {
            bytemuck::cast_slice_mut(out).copy_from_slice(stored);
            Ok::<(), LengthMismatch>(())
        }
        WeightFormat::F16WithMaster => widen_f16(stored, out),
        WeightFormat::Bf16WithRemainder | WeightFormat::Bf16Stochastic => widen_bf16(stored, out),
    };
    widened.expect("there is room for all of them");
}

/// Weights from `start` to `end` as they are stored, for a call.
pub(super) fn stored(format: WeightFormat, weights: &mut [u8], start: usize, end: usize) -> Weights<'_> {
    match format {
        WeightFormat::F32 => Weights::F32(&mut floats_mut(weights)[start..end]),
        WeightFormat::F16WithMaster => Weights::F16(&mut halves_mut(weights)[start..end]),
        WeightFormat::Bf16WithRemainder | WeightFormat::Bf16Stochastic => {
            Weights::Bf16(&mut halves_mut(weights)[start..end])
        }
    }
}

/// Whether exact weights take more than the stored ones say.
pub(crate) fn has_masters(format: WeightFormat) -> bool {
    match format {
        WeightFormat::F32 | WeightFormat::Bf16Stochastic => false,
        WeightFormat::Bf16WithRemainder | WeightFormat::F16WithMaster => true,
    }
}

// Blocks start at a disk block's alignment, so the cast can't fail.
fn halves_mut(bytes: &mut [u8]) -> &mut [u16] {
    bytemuck::cast_slice_mut(bytes)
}
