//! The state of a parameter that is updated as a whole, in memory: filled, updated, read.
//!
//! The weights and the gradient end with padding, which no step touches; the record is padded as the disk likes. What the
//! update needs beside them is taken from the heap, and counted by the plan.

use overspill_optim::{Gradient, Isa, Outcome, Weights, WholeRecipe};

use super::Update;
use super::tile::{origin, stored};
use crate::layout::Parameter;

/// The stored state of a parameter.
#[derive(Debug)]
pub(crate) struct WholeState<'a> {
    pub(crate) recipe: WholeRecipe,
    pub(crate) parameter: &'a Parameter,
    /// Of the elements and the padding behind them, as they are stored.
    pub(crate) weights: &'a mut [u8],
    /// Of the elements, padded.
    pub(crate) record: &'a mut [u8],
}

impl WholeState<'_> {
    /// The record without its padding, and the weights without theirs, for a call.
    fn parts(&mut self) -> (&mut [u8], Weights<'_>) {
        let layout = self.recipe.layout().expect("a parameter fits in memory");
        let weights = stored(self.recipe.weights(), self.weights, 0, self.recipe.elements());
        (&mut self.record[..layout.bytes()], weights)
    }

    /// Fills the state with first weights and with moments to begin with.
    pub(crate) fn initialize(&mut self, values: &[f32]) {
        let (recipe, elements) = (self.recipe, self.recipe.elements());
        let origin = origin(0, self.parameter, 0, self.parameter.range.start);
        let values = Gradient::F32(&values[..elements]);
        let (record, weights) = self.parts();
        // Weights that are no numbers show in the first loss, and end the run there.
        let (Outcome::Updated | Outcome::NonFinite) = recipe
            .initialize(Isa::detect(), record, weights, values, origin)
            .expect("all slices are cut to the parameter");
    }

    /// Takes a step.
    ///
    /// # Panics
    /// When a gradient is not finite: the trainer has found their norm to be.
    pub(crate) fn update(&mut self, gradient: &[f32], update: &Update<'_>) {
        let (recipe, elements, parameter) = (self.recipe, self.recipe.elements(), self.parameter);
        let decay = if parameter.role.decays() { update.weight_decay } else { 0.0 };
        let Update { optimizer, learning_rate, gradient_scale, .. } = *update;
        let step = optimizer.whole_step(learning_rate, decay, update.update, gradient_scale);
        let step = step.expect("the recipe is one of the optimizer's");
        let origin = origin(update.seed, parameter, update.update, parameter.range.start);
        let gradient = Gradient::F32(&gradient[..elements]);
        let (record, weights) = self.parts();
        let outcome = recipe
            .apply(update.isa, &step, record, weights, gradient, origin)
            .expect("all slices are cut to the parameter, and the step is one of its rule");
        assert_eq!(outcome, Outcome::Updated, "a gradient whose norm is finite, of {}", parameter.name);
    }

    /// Writes the exact weights of all elements to `out`, and zeros for the padding.
    pub(crate) fn masters(&mut self, out: &mut [f32]) {
        let (recipe, elements) = (self.recipe, self.recipe.elements());
        let (out, padding) = out.split_at_mut(elements);
        padding.fill(0.0);
        let (record, weights) = self.parts();
        let read = recipe.read_masters(record, weights, out);
        read.expect("all slices are cut to the parameter");
    }
}
