//! A recipe: which rule, with weights and moments in which formats. It declares the record that a swapper moves, fills it,
//! and updates it in one pass.
//!
//! A parameter's elements are cut into tiles as the swapper likes; a tile may hold parts of several parameters. The recipe
//! tells the bytes of a tile's record ([`Recipe::layout`]). A call updates a *range* of a tile, which belongs to one
//! parameter: it gets the whole record, the range's weights (these lie beside the record, because the model reads them) and
//! the range's gradient. Which parameter group the range belongs to is in the [`Step`].
//!
//! Any ranges give the same bits, with one condition for [`MomentFormat::Blocks8`]: a range starts at a multiple of
//! [`BLOCK_ELEMENTS`], in the tile and in its parameter, and ends at one or with its parameter. In other words, a
//! parameter's first element is padded to a block, and cuts are multiples of a block ([`Recipe::cut_elements`]); then no
//! block is ever stored in two goes, and none has elements of two parameters.
//!
//! A pass changes the record in place. When the gradient was not finite the state is spoiled, and the outcome says so: the
//! caller drops the record and the weights instead of storing them. Errors are found before anything is written.

use std::ops::Range;

use crate::error::{ApplyError, RecipeError};
use crate::format::blocks::Code;
use crate::format::gradient::Gradient;
use crate::format::moment::{BLOCK_ELEMENTS, Bf16Moments, MomentCells, MomentFormat};
use crate::format::noise::Origin;
use crate::format::weight::{WeightFormat, Weights};
use crate::isa::Isa;
use crate::job::{Adopt, Job, block_range};
use crate::record::{Column, Cutter, RecordLayout};
use crate::rule::{Rule, Step};

/// A rule and the formats of its state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recipe {
    rule: Rule,
    weights: WeightFormat,
    moments: MomentFormat,
}

/// A range of a tile, and where its state is.
#[derive(Debug)]
pub struct Tile<'a> {
    /// The record of the whole tile, aligned to four bytes at least.
    pub record: &'a mut [u8],
    /// Elements of the whole tile.
    pub elements: usize,
    /// The elements that are meant.
    pub range: Range<usize>,
    /// The weights of these elements.
    pub weights: Weights<'a>,
}

/// What a pass over a range found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Every scaled gradient was finite.
    Updated,
    /// A scaled gradient was infinite or NaN: the state is spoiled, and must not be stored.
    NonFinite,
}

impl Outcome {
    /// That of both.
    pub const fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Updated, Self::Updated) => Self::Updated,
            _ => Self::NonFinite,
        }
    }

    /// From the bits of the largest magnitude.
    pub(crate) const fn of(largest: u32) -> Self {
        if largest < f32::INFINITY.to_bits() { Self::Updated } else { Self::NonFinite }
    }
}

impl Recipe {
    /// # Errors
    ///
    /// [`RecipeError::NarrowMaximum`] for AMSGrad with moments that are rounded at random.
    pub const fn new(rule: Rule, weights: WeightFormat, moments: MomentFormat) -> Result<Self, RecipeError> {
        let amsgrad = matches!(rule, Rule::AdamW { amsgrad: true } | Rule::Adam { amsgrad: true });
        if amsgrad && !matches!(moments, MomentFormat::F32) {
            return Err(RecipeError::NarrowMaximum { moments });
        }
        Ok(Self { rule, weights, moments })
    }

    /// The rule.
    #[must_use]
    pub const fn rule(&self) -> Rule {
        self.rule
    }

    /// How weights are stored.
    #[must_use]
    pub const fn weights(&self) -> WeightFormat {
        self.weights
    }

    /// How moments are stored.
    #[must_use]
    pub const fn moments(&self) -> MomentFormat {
        self.moments
    }

    /// Cuts of a parameter are multiples of this.
    #[must_use]
    pub const fn cut_elements(&self) -> usize {
        match self.moments {
            MomentFormat::Blocks8 => BLOCK_ELEMENTS,
            MomentFormat::F32 | MomentFormat::Bf16 => 1,
        }
    }

    /// The record of a tile.
    ///
    /// # Errors
    ///
    /// [`ApplyError::TooLarge`] when its bytes cannot be counted.
    pub fn layout(&self, elements: usize) -> Result<RecordLayout, ApplyError> {
        let column = |(name, cell_bytes)| Column { name, cell_bytes, cell_elements: 1, cells: elements };
        let weight = self.weights.column().map(column);
        let names = self.rule.moments();
        let moments = names.iter().map(|(name, _)| column((*name, self.moments.cell_bytes())));
        let scaled = if self.moments == MomentFormat::Blocks8 { names } else { &[] };
        let scales = scaled.iter().map(|(_, name)| Column {
            name,
            cell_bytes: size_of::<f32>(),
            cell_elements: BLOCK_ELEMENTS,
            cells: elements.div_ceil(BLOCK_ELEMENTS),
        });
        let columns = weight.into_iter().chain(moments).chain(scales);
        RecordLayout::place(elements, columns).ok_or(ApplyError::TooLarge { elements })
    }

    /// Bytes of the record of a tile.
    ///
    /// # Errors
    ///
    /// [`ApplyError::TooLarge`] when they cannot be counted.
    pub fn record_bytes(&self, elements: usize) -> Result<usize, ApplyError> {
        Ok(self.layout(elements)?.bytes())
    }

    /// Fills the range: weights and masters from `values`, moments with what the rule begins with.
    ///
    /// The record's bytes between its fields, and behind the last one, are left as they are.
    ///
    /// # Errors
    ///
    /// Any [`ApplyError`] but of steps; nothing was written.
    pub fn initialize(
        &self,
        isa: Isa,
        tile: Tile<'_>,
        values: Gradient<'_>,
        origin: Origin,
    ) -> Result<Outcome, ApplyError> {
        self.check(&tile, values.len(), origin)?;
        let layout = self.layout(tile.elements)?;
        let Tile { record, range, weights, .. } = tile;
        let masters = Cutter::new(&layout, record)?;
        let formats = (self.weights, self.moments);
        let job = Job { isa, formats, range: range.clone(), record: masters, gradient: values, origin };
        let largest = job.by_weights(Adopt, weights)?;
        // Nothing fails from here on: the fields that follow are in a record whose length was checked.
        let start = self.rule.initial_moment();
        for (moment, (name, scale_name)) in self.rule.moments().iter().enumerate() {
            match self.moments {
                MomentFormat::F32 => fill(&layout, record, name, &range, &start.to_ne_bytes()),
                MomentFormat::Bf16 => {
                    // The nearest, because no sum of roundings follows.
                    let cell = Bf16Moments::store(start, || 1 << 31);
                    fill(&layout, record, name, &range, &cell.to_ne_bytes());
                }
                MomentFormat::Blocks8 => {
                    let code = Code::of(self.rule.signed(moment)).encode(start, start, 0);
                    fill(&layout, record, name, &range, &[code]);
                    fill(&layout, record, scale_name, &block_range(&range), &start.to_ne_bytes());
                }
            }
        }
        Ok(Outcome::of(largest))
    }

    /// Takes one step on the range: unscale, clip, check, decay, update, and store, in one pass on all cores.
    ///
    /// The same bits for any `isa`, any number of threads and any ranges.
    ///
    /// # Errors
    ///
    /// Any [`ApplyError`]; nothing was written.
    pub fn apply(
        &self,
        isa: Isa,
        step: &Step,
        tile: Tile<'_>,
        gradient: Gradient<'_>,
        origin: Origin,
    ) -> Result<Outcome, ApplyError> {
        self.check(&tile, gradient.len(), origin)?;
        let layout = self.layout(tile.elements)?;
        let Tile { record, range, weights, .. } = tile;
        let record = Cutter::new(&layout, record)?;
        let formats = (self.weights, self.moments);
        let job = Job { isa, formats, range, record, gradient, origin };
        let largest = match (self.rule, *step) {
            (Rule::AdamW { amsgrad: false }, Step::AdamW(step)) => job.by_weights(step.rule(), weights),
            (Rule::AdamW { amsgrad: true }, Step::AdamW(step)) => job.by_weights(step.amsgrad(), weights),
            (Rule::Adam { amsgrad: false }, Step::Adam(step)) => job.by_weights(step.rule(), weights),
            (Rule::Adam { amsgrad: true }, Step::Adam(step)) => job.by_weights(step.amsgrad(), weights),
            (Rule::Sgd { momentum: false }, Step::Sgd(step)) => job.by_weights(step.rule(), weights),
            (Rule::Sgd { momentum: true }, Step::Sgd(step)) => job.by_weights(step.momentum(), weights),
            (Rule::Adagrad { .. }, Step::Adagrad(step)) => job.by_weights(step, weights),
            (Rule::Lion, Step::Lion(step)) => job.by_weights(step, weights),
            (rule, step) => Err(ApplyError::WrongStep { step: step.name(), rule: rule.name() }),
        }?;
        Ok(Outcome::of(largest))
    }

    /// Writes the fp32 masters of the range to `out`.
    ///
    /// # Errors
    ///
    /// Any [`ApplyError`] but of steps; nothing was written.
    pub fn read_masters(&self, tile: Tile<'_>, out: &mut [f32]) -> Result<(), ApplyError> {
        let (gradient, origin) = (Gradient::F32(&*out), Origin::default());
        self.check(&tile, gradient.len(), origin)?;
        let layout = self.layout(tile.elements)?;
        let record = Cutter::new(&layout, tile.record)?;
        let formats = (self.weights, self.moments);
        let job = Job {
            isa: Isa::Scalar,
            formats,
            range: tile.range,
            record,
            gradient: Gradient::F32(&[]),
            origin,
        };
        job.masters(tile.weights, out)
    }

    /// What does not depend on the formats' types.
    fn check(&self, tile: &Tile<'_>, elements: usize, origin: Origin) -> Result<(), ApplyError> {
        let Range { start, end } = tile.range;
        if start > end || end > tile.elements {
            return Err(ApplyError::Range { start, end, elements: tile.elements });
        }
        ApplyError::check("gradient", elements, end - start)?;
        ApplyError::check("weights", tile.weights.len(), end - start)?;
        let block = BLOCK_ELEMENTS as u64;
        if self.moments == MomentFormat::Blocks8 {
            for (operand, index) in [("range", start as u64), ("element", origin.element)] {
                if !index.is_multiple_of(block) {
                    return Err(ApplyError::CutBlock { operand, index });
                }
            }
        }
        Ok(())
    }
}

/// Fills the cells `range` of the field `name`.
fn fill(layout: &RecordLayout, record: &mut [u8], name: &str, range: &Range<usize>, cell: &[u8]) {
    let field = layout.field(name).expect("the layout has the rule's moments");
    let bytes = field.start + range.start * cell.len()..field.start + range.end * cell.len();
    for place in record[bytes].chunks_exact_mut(cell.len()) {
        place.copy_from_slice(cell);
    }
}
