//! The state of a piece in memory, however it is updated: the one door to what is in weights and records.

use super::whole::WholeState;
use super::{TileState, Update};
use crate::layout::UnitLayout;
use crate::piece::{Piece, PieceRule};

/// The stored state of a piece of a unit.
#[derive(Debug)]
pub(crate) struct PieceState<'a> {
    pub(crate) unit: &'a UnitLayout,
    pub(crate) piece: &'a Piece,
    /// Of the elements, as they are stored.
    pub(crate) weights: &'a mut [u8],
    /// Of the elements, padded as the recipe and the disk like.
    pub(crate) record: &'a mut [u8],
}

/// By which rule a piece goes.
enum Ruled<'a> {
    Elements(TileState<'a>),
    Whole(WholeState<'a>),
}

impl PieceState<'_> {
    /// Fills the piece with first weights, given those of all its elements, and with moments to begin with; padding is left
    /// as it is.
    pub(crate) fn initialize(&mut self, values: &[f32]) {
        let (unit, start) = (self.unit, self.piece.range.start);
        match self.ruled() {
            Ruled::Elements(mut tile) => tile.initialize(unit, start, values),
            Ruled::Whole(mut whole) => whole.initialize(values),
        }
    }

    /// Takes a step with the gradient of the piece's elements.
    ///
    /// # Panics
    /// When a gradient is not finite: the trainer has found their norm to be.
    pub(crate) fn update(&mut self, gradient: &[f32], update: &Update<'_>) {
        let (unit, start) = (self.unit, self.piece.range.start);
        match self.ruled() {
            Ruled::Elements(mut tile) => tile.update(unit, start, gradient, update),
            Ruled::Whole(mut whole) => whole.update(gradient, update),
        }
    }

    /// Writes the exact weights of all elements, padding included, to `out`.
    pub(crate) fn masters(&mut self, out: &mut [f32]) {
        match self.ruled() {
            Ruled::Elements(mut tile) => tile.masters(out),
            Ruled::Whole(mut whole) => whole.masters(out),
        }
    }

    fn ruled(&mut self) -> Ruled<'_> {
        let Self { unit, piece, weights, record } = self;
        match &piece.rule {
            PieceRule::Elements(recipe) => Ruled::Elements(TileState { recipe, weights, record }),
            PieceRule::Whole { recipe, parameter } => {
                let parameter = &unit.parameters[*parameter];
                Ruled::Whole(WholeState { recipe: *recipe, parameter, weights, record })
            }
        }
    }
}
