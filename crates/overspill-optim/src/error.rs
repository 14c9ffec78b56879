//! What can be wrong with slices, recipes and steps.

use crate::format::moment::{BLOCK_ELEMENTS, MomentFormat};

/// A slice whose length does not fit the others of the same call. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operand} has length {length}, expected {expected}")]
pub struct LengthMismatch {
    /// The parameter of the call that does not fit.
    pub operand: &'static str,
    /// The length it has, in its own elements (bytes for a byte slice).
    pub length: usize,
    /// The length that the other slices ask for.
    pub expected: usize,
}

impl LengthMismatch {
    /// Succeeds when `length` is what is `expected`.
    pub(crate) fn check(operand: &'static str, length: usize, expected: usize) -> Result<(), Self> {
        if length == expected { Ok(()) } else { Err(Self { operand, length, expected }) }
    }
}

/// A recipe that has no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecipeError {
    /// A running maximum only rises with the noise of its rounding.
    #[error("amsgrad keeps a running maximum, which {} moments would drive upwards", .moments.name())]
    NarrowMaximum {
        /// The format that was asked for.
        moments: MomentFormat,
    },
    /// A parameter without elements, or with more than can be counted.
    #[error("a parameter of {matrices} × {rows} × {columns} elements cannot be updated")]
    Shape {
        /// Number of matrices.
        matrices: usize,
        /// Rows of each.
        rows: usize,
        /// Columns of each.
        columns: usize,
    },
}

/// Why a record was not touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// Slices whose lengths do not belong together.
    #[error(transparent)]
    Length(#[from] LengthMismatch),
    /// A range that is not in the tile.
    #[error("elements {start}..{end} of a tile of {elements}")]
    Range {
        /// First element.
        start: usize,
        /// Behind the last element.
        end: usize,
        /// Elements of the tile.
        elements: usize,
    },
    /// Blocks that share a scale would be cut.
    #[error("{operand} {index} is not a multiple of {BLOCK_ELEMENTS}, the elements of a block")]
    CutBlock {
        /// What is not a multiple: the range's start, or the element's index in its parameter.
        operand: &'static str,
        /// Its value.
        index: u64,
    },
    /// A record in memory that numbers cannot lie in.
    #[error("the field {field} of the record is not aligned in memory")]
    Misaligned {
        /// The first field that is not.
        field: &'static str,
    },
    /// A step of another rule.
    #[error("a step of {step} for a recipe of {rule}")]
    WrongStep {
        /// The step's rule.
        step: &'static str,
        /// The recipe's rule.
        rule: &'static str,
    },
    /// Weights in another format.
    #[error("weights in {weights} for a recipe of {expected}")]
    WrongWeights {
        /// The format that was given.
        weights: &'static str,
        /// The format of the recipe.
        expected: &'static str,
    },
    /// A name that is no moment of the rule.
    #[error("the rule has no moment of that name")]
    NoField,
    /// More bytes than can be counted.
    #[error("the record of {elements} elements is too large")]
    TooLarge {
        /// Elements of the tile.
        elements: usize,
    },
}

impl ApplyError {
    /// Succeeds when `length` is what is `expected`.
    pub(crate) fn check(operand: &'static str, length: usize, expected: usize) -> Result<(), Self> {
        Ok(LengthMismatch::check(operand, length, expected)?)
    }
}
