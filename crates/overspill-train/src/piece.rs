//! The pieces that a unit's state is cut into: what is loaded, updated and stored at a time, each with a record of its own.
//!
//! A unit is a row of *runs*, one behind the other and without gaps. A run of elements that are updated by themselves is
//! cut into pieces of one length, which may have parts of several parameters, and padding; a parameter that is updated as a
//! whole is a run and a piece, with the padding behind it. Weights, gradients and records of a unit are cut at the same
//! borders, so the pieces tell everything that is stored of it.

use std::ops::Range;

use overspill_io::BLOCK_ALIGNMENT;
use overspill_optim::{ApplyError, Recipe, RecordLayout, WholeRecipe};

/// Some elements of a unit, and by which recipe they are updated and stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The elements inside the unit.
    pub range: Range<usize>,
    /// How they are updated and stored.
    pub rule: PieceRule,
}

/// How the elements of a piece are updated and stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PieceRule {
    /// Each by itself.
    Elements(Recipe),
    /// As one parameter.
    Whole {
        /// Its recipe.
        recipe: WholeRecipe,
        /// Its place among the parameters of the unit.
        parameter: usize,
    },
}

/// What the tables of a record's columns take while a whole parameter is updated.
const TABLES_BYTES: usize = 4 << 10;

impl Piece {
    /// Number of elements, with padding.
    pub fn elements(&self) -> usize {
        self.range.len()
    }

    /// What is recorded of the elements: names, cells and places of the columns. Of a whole parameter, padding has no place
    /// in them.
    pub fn record(&self) -> RecordLayout {
        self.rule.record(self.elements()).expect("a piece fits in memory")
    }

    /// Length of the record as it is stored, in whole disk blocks, in bytes; 0 when there is nothing to record.
    pub fn record_bytes(&self) -> usize {
        self.rule.record_bytes(self.elements())
    }

    /// The most memory that an update takes besides the state and the gradient, in bytes.
    pub fn workspace_bytes(&self) -> usize {
        match self.rule {
            PieceRule::Elements(_) => 0,
            PieceRule::Whole { recipe, .. } => recipe.workspace_bytes() + TABLES_BYTES,
        }
    }

    /// The pieces of this run.
    pub(crate) fn cut(&self, tile_elements: usize) -> impl Iterator<Item = Self> + use<> {
        let Self { range, rule } = self.clone();
        let length = self.cut_elements(tile_elements);
        range.clone().step_by(length).map(move |start| {
            let end = start.saturating_add(length).min(range.end);
            Self { range: start..end, rule }
        })
    }

    /// Number of pieces of this run.
    pub(crate) fn cuts(&self, tile_elements: usize) -> usize {
        self.elements().div_ceil(self.cut_elements(tile_elements))
    }

    /// Elements of the longest piece of this run.
    pub(crate) fn cut_elements(&self, tile_elements: usize) -> usize {
        match self.rule {
            PieceRule::Elements(_) => tile_elements.min(self.elements()),
            PieceRule::Whole { .. } => self.elements(),
        }
    }

    /// Length of the records of all pieces of this run, in bytes.
    pub(crate) fn records_bytes(&self, tile_elements: usize) -> usize {
        let length = self.cut_elements(tile_elements);
        let (whole, rest) = (self.elements() / length, self.elements() % length);
        whole * self.rule.record_bytes(length) + self.rule.record_bytes(rest)
    }
}

impl PieceRule {
    fn record(&self, elements: usize) -> Result<RecordLayout, ApplyError> {
        match self {
            Self::Elements(recipe) => recipe.layout(elements),
            Self::Whole { recipe, .. } => recipe.layout(),
        }
    }

    fn record_bytes(&self, elements: usize) -> usize {
        if elements == 0 {
            return 0;
        }
        let bytes = self.record(elements).expect("a piece fits in memory").bytes();
        bytes.next_multiple_of(BLOCK_ALIGNMENT)
    }
}
