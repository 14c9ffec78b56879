//! Rules that need a whole parameter: a record is a parameter, and there is nothing to cut.
//!
//! Adafactor's second moment is shared by rows and columns, Muon makes a matrix orthogonal; no element can be updated without
//! the others. So there is no range here: a [`WholeRecipe`] knows the parameter's shape, and each call gets the record,
//! all weights and the whole gradient. The masters and the scaled gradient are spread out in `f32` for the time of the update;
//! [`WholeRecipe::workspace_bytes`] tells how much memory that takes. The weights' formats are those of
//! [`Recipe`](crate::Recipe); moments are `f32` (Adafactor's are small already).
//!
//! Unlike a pass over a range, an update with a non-finite gradient changes nothing: the gradient is checked while it is
//! scaled.

use rayon::prelude::*;

use crate::error::{ApplyError, RecipeError};
use crate::format::gradient::Gradient;
use crate::format::half::{Bf16, F16, Half};
use crate::format::moment::MomentFormat;
use crate::format::noise::Origin;
use crate::format::weight::{WeightFormat, Weights};
use crate::isa::Isa;
use crate::job::{Adopt, Job};
use crate::recipe::Outcome;
use crate::record::{Column, Cutter, RecordLayout};
use crate::rule::adafactor::{AdafactorStep, Variance};
use crate::rule::muon::MuonStep;

/// The shape of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// One dimension of that many elements.
    Vector(usize),
    /// The last two of two or more dimensions; `count` is the product of the others.
    Matrices {
        /// Number of matrices.
        count: usize,
        /// Rows of each.
        rows: usize,
        /// Columns of each.
        columns: usize,
    },
}

impl Shape {
    /// One matrix.
    #[must_use]
    pub const fn matrix(rows: usize, columns: usize) -> Self {
        Self::Matrices { count: 1, rows, columns }
    }

    const fn sides(self) -> [usize; 3] {
        match self {
            Self::Vector(elements) => [1, 1, elements],
            Self::Matrices { count, rows, columns } => [count, rows, columns],
        }
    }
}

/// A rule that needs a whole parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WholeRule {
    /// A second moment by rows and columns.
    Adafactor,
    /// An orthogonal update; one matrix only.
    Muon,
}

/// The coefficients of one step of a [`WholeRule`]; each parameter group has its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WholeStep {
    /// For [`WholeRule::Adafactor`].
    Adafactor(AdafactorStep),
    /// For [`WholeRule::Muon`].
    Muon(MuonStep),
}

/// A rule, the format of the weights, and the shape of the parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WholeRecipe {
    rule: WholeRule,
    weights: WeightFormat,
    shape: Shape,
}

impl WholeRecipe {
    /// # Errors
    ///
    /// [`RecipeError::Shape`] for a parameter without elements, for one with more bytes than can be counted, and for Muon
    /// with anything but one matrix.
    pub fn new(rule: WholeRule, weights: WeightFormat, shape: Shape) -> Result<Self, RecipeError> {
        let [matrices, rows, columns] = shape.sides();
        let refused = RecipeError::Shape { matrices, rows, columns };
        let elements = matrices.checked_mul(rows).and_then(|x| x.checked_mul(columns)).ok_or(refused)?;
        let matrix = matches!(shape, Shape::Matrices { count: 1, .. });
        // Eight copies in single precision are more than any record or workspace of an element.
        let countable = elements.checked_mul(8 * size_of::<f32>()).is_some();
        if elements == 0 || !countable || rule == WholeRule::Muon && !matrix {
            return Err(refused);
        }
        Ok(Self { rule, weights, shape })
    }

    /// The rule.
    #[must_use]
    pub const fn rule(&self) -> WholeRule {
        self.rule
    }

    /// How weights are stored.
    #[must_use]
    pub const fn weights(&self) -> WeightFormat {
        self.weights
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.sides().iter().product()
    }

    /// The record of the parameter.
    ///
    /// # Errors
    ///
    /// [`ApplyError::TooLarge`] when its bytes cannot be counted.
    pub fn layout(&self) -> Result<RecordLayout, ApplyError> {
        let elements = self.elements();
        let column = |(name, cells)| Column {
            name,
            cell_bytes: size_of::<f32>(),
            cell_elements: elements / cells,
            cells,
        };
        let weight = self.weights.column().map(|(name, cell_bytes)| Column {
            name,
            cell_bytes,
            cell_elements: 1,
            cells: elements,
        });
        let moments: &[(&str, usize)] = match (self.rule, self.shape) {
            (WholeRule::Muon, _) => &[("momentum_buffer", elements)],
            (WholeRule::Adafactor, Shape::Vector(_)) => &[("variance", elements)],
            (WholeRule::Adafactor, Shape::Matrices { count, rows, columns }) => {
                &[("row_var", count * rows), ("col_var", count * columns)]
            }
        };
        let columns = weight.into_iter().chain(moments.iter().copied().map(column));
        RecordLayout::place(elements, columns).ok_or(ApplyError::TooLarge { elements })
    }

    /// The most memory that an update takes besides its arguments, in bytes.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let [_, rows, columns] = self.shape.sides();
        let elements = self.elements();
        let floats = match self.rule {
            // Masters, gradient, and the factors of rows as `f64`.
            WholeRule::Adafactor => 2 * elements + 4 * (elements / columns),
            // Masters, gradient, the iterate, the next one, its transpose or panels, and three squares of the shorter side.
            WholeRule::Muon => {
                6 * elements + 4 * rows.min(columns) * rows.min(columns) + 64 * (rows + columns)
            }
        };
        floats * size_of::<f32>()
    }

    /// Fills the record: weights and masters from `values`, moments with zeros.
    ///
    /// # Errors
    ///
    /// Any [`ApplyError`] but of steps; nothing was written.
    pub fn initialize(
        &self,
        isa: Isa,
        record: &mut [u8],
        weights: Weights<'_>,
        values: Gradient<'_>,
        origin: Origin,
    ) -> Result<Outcome, ApplyError> {
        let layout = self.layout()?;
        self.check(values.len(), weights.len())?;
        let job = self.job(isa, Cutter::new(&layout, record)?, values, origin);
        let largest = job.by_weights(Adopt, weights)?;
        for field in &layout.fields()[self.weight_fields()..] {
            record[field.bytes()].fill(0);
        }
        Ok(Outcome::of(largest))
    }

    /// Takes one step on the parameter, on all cores; a gradient that is not finite changes nothing.
    ///
    /// The same bits for any `isa` and any number of threads.
    ///
    /// # Errors
    ///
    /// Any [`ApplyError`]; nothing was written.
    pub fn apply(
        &self,
        isa: Isa,
        step: &WholeStep,
        record: &mut [u8],
        mut weights: Weights<'_>,
        gradient: Gradient<'_>,
        origin: Origin,
    ) -> Result<Outcome, ApplyError> {
        let layout = self.layout()?;
        let elements = self.elements();
        self.check(gradient.len(), weights.len())?;
        let scale = match (self.rule, step) {
            (WholeRule::Adafactor, WholeStep::Adafactor(step)) => step.gradient_scale(),
            (WholeRule::Muon, WholeStep::Muon(step)) => step.gradient_scale(),
            (WholeRule::Adafactor, WholeStep::Muon(_)) => {
                return Err(ApplyError::WrongStep { step: "Muon", rule: "Adafactor" });
            }
            (WholeRule::Muon, WholeStep::Adafactor(_)) => {
                return Err(ApplyError::WrongStep { step: "Adafactor", rule: "Muon" });
            }
        };
        let mut master = vec![0.0; elements];
        let job = self.job(isa, Cutter::new(&layout, record)?, Gradient::F32(&[]), origin);
        job.masters(weights.reborrow(), &mut master)?;
        let grad = scaled(gradient, scale);
        if grad.par_iter().any(|x| !x.is_finite()) {
            return Ok(Outcome::NonFinite);
        }
        let mut cutter = Cutter::new(&layout, record)?;
        match self.weights {
            WeightFormat::F32 | WeightFormat::Bf16Stochastic => {}
            WeightFormat::Bf16WithRemainder => drop(cutter.next::<u16>(0..elements)?),
            WeightFormat::F16WithMaster => drop(cutter.next::<f32>(0..elements)?),
        }
        match (step, self.shape) {
            (WholeStep::Muon(step), shape) => {
                let [_, _, columns] = shape.sides();
                step.update(isa, columns, &mut master, cutter.next(0..elements)?, &grad);
            }
            (WholeStep::Adafactor(step), Shape::Vector(_)) => {
                step.update(isa, &mut master, Variance::Full(cutter.next(0..elements)?), &grad);
            }
            (WholeStep::Adafactor(step), Shape::Matrices { count, rows, columns }) => {
                let row_var = cutter.next(0..count * rows)?;
                let col_var = cutter.next(0..count * columns)?;
                step.update(isa, &mut master, Variance::Factored { rows, columns, row_var, col_var }, &grad);
            }
        }
        let job = self.job(isa, Cutter::new(&layout, record)?, Gradient::F32(&master), origin);
        job.by_weights(Adopt, weights)?;
        Ok(Outcome::Updated)
    }

    /// Writes the fp32 masters to `out`.
    ///
    /// # Errors
    ///
    /// Any [`ApplyError`] but of steps; nothing was written.
    pub fn read_masters(
        &self,
        record: &mut [u8],
        weights: Weights<'_>,
        out: &mut [f32],
    ) -> Result<(), ApplyError> {
        self.check(out.len(), weights.len())?;
        let layout = self.layout()?;
        let job = self.job(Isa::Scalar, Cutter::new(&layout, record)?, Gradient::F32(&[]), Origin::default());
        job.masters(weights, out)
    }

    /// How many of the record's fields belong to the weight; they come first.
    pub(crate) fn weight_fields(&self) -> usize {
        usize::from(self.weights.column().is_some())
    }

    fn check(&self, gradient: usize, weights: usize) -> Result<(), ApplyError> {
        ApplyError::check("gradient", gradient, self.elements())?;
        ApplyError::check("weights", weights, self.elements())
    }

    fn job<'a>(&self, isa: Isa, record: Cutter<'a>, gradient: Gradient<'a>, origin: Origin) -> Job<'a> {
        let formats = (self.weights, MomentFormat::F32);
        Job { isa, formats, range: 0..self.elements(), record, gradient, origin }
    }
}

/// The gradient in single precision, times `scale`.
fn scaled(gradient: Gradient<'_>, scale: f32) -> Vec<f32> {
    match gradient {
        Gradient::F32(x) => x.par_iter().map(|x| x * scale).collect(),
        Gradient::Bf16(x) => x.par_iter().map(|x| Bf16::widen(*x) * scale).collect(),
        Gradient::F16(x) => x.par_iter().map(|x| F16::widen(*x) * scale).collect(),
    }
}
