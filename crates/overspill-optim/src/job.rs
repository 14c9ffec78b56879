//! The way from a recipe, which is a value, to the loop that was compiled for its types.
//!
//! A [`Job`] is a pass whose lengths have been checked. It picks the formats' types one after the other, cuts the record into
//! columns of these, and runs the loop of [`pass`](crate::pass). What can still be wrong is found on the way, before
//! anything is written: weights in another format, and a record that is not aligned in memory.

use std::array;
use std::ops::Range;

use bytemuck::Zeroable;

use crate::error::ApplyError;
use crate::format::gradient::{Gradient, Single};
use crate::format::half::{Bf16, F16};
use crate::format::moment::{BLOCK_ELEMENTS, Bf16Moments, MomentCells, MomentFormat, SingleMoments};
use crate::format::noise::Origin;
use crate::format::weight::{Master, Remainder, Stochastic, WeightCells, WeightFormat, Weights, Whole};
use crate::isa::Isa;
use crate::pass::{self, Blocks, Streams};
use crate::record::Cutter;
use crate::rule::ElementRule;

/// A pass on its way to the loop of its types.
pub(crate) struct Job<'a> {
    pub(crate) isa: Isa,
    pub(crate) formats: (WeightFormat, MomentFormat),
    pub(crate) range: Range<usize>,
    pub(crate) record: Cutter<'a>,
    pub(crate) gradient: Gradient<'a>,
    pub(crate) origin: Origin,
}

impl Job<'_> {
    /// Updates the range with this rule; the largest magnitude among the scaled gradients, as bits.
    pub(crate) fn by_weights<const N: usize, R: ElementRule<N>>(
        self,
        rule: R,
        weights: Weights<'_>,
    ) -> Result<u32, ApplyError> {
        match (self.formats.0, weights) {
            (WeightFormat::F32, Weights::F32(weights)) => self.by_moments::<N, R, Whole>(rule, weights),
            (WeightFormat::Bf16WithRemainder, Weights::Bf16(weights)) => {
                self.by_moments::<N, R, Remainder>(rule, weights)
            }
            (WeightFormat::F16WithMaster, Weights::F16(weights)) => {
                self.by_moments::<N, R, Master>(rule, weights)
            }
            (WeightFormat::Bf16Stochastic, Weights::Bf16(weights)) => {
                self.by_moments::<N, R, Stochastic>(rule, weights)
            }
            (format, weights) => Err(wrong_weights(format, &weights)),
        }
    }

    /// The masters of the range; the gradient is not looked at.
    pub(crate) fn masters(self, weights: Weights<'_>, out: &mut [f32]) -> Result<(), ApplyError> {
        match (self.formats.0, weights) {
            (WeightFormat::F32, Weights::F32(weights)) => self.read::<Whole>(weights, out),
            (WeightFormat::Bf16WithRemainder, Weights::Bf16(weights)) => self.read::<Remainder>(weights, out),
            (WeightFormat::F16WithMaster, Weights::F16(weights)) => self.read::<Master>(weights, out),
            (WeightFormat::Bf16Stochastic, Weights::Bf16(weights)) => self.read::<Stochastic>(weights, out),
            (format, weights) => Err(wrong_weights(format, &weights)),
        }
    }

    fn read<W: WeightCells>(mut self, weights: &[W::Weight], out: &mut [f32]) -> Result<(), ApplyError> {
        let mut nothing = nothing::<W>(weights.len());
        let extras = extras::<W>(&mut self.record, &self.range, &mut nothing)?;
        for ((out, weight), extra) in out.iter_mut().zip(weights).zip(&*extras) {
            *out = W::load(*weight, *extra);
        }
        Ok(())
    }

    fn by_moments<const N: usize, R: ElementRule<N>, W: WeightCells>(
        self,
        rule: R,
        weights: &mut [W::Weight],
    ) -> Result<u32, ApplyError> {
        if R::NARROW {
            match self.formats.1 {
                MomentFormat::F32 => self.streams::<N, R, W, SingleMoments>(rule, weights),
                MomentFormat::Bf16 => self.streams::<N, R, W, Bf16Moments>(rule, weights),
                MomentFormat::Blocks8 => self.blocks::<N, R, W>(rule, weights),
            }
        } else {
            self.streams::<N, R, W, SingleMoments>(rule, weights)
        }
    }

    fn streams<const N: usize, R: ElementRule<N>, W: WeightCells, M: MomentCells>(
        mut self,
        rule: R,
        weights: &mut [W::Weight],
    ) -> Result<u32, ApplyError> {
        let mut nothing = nothing::<W>(weights.len());
        let extras = extras::<W>(&mut self.record, &self.range, &mut nothing)?;
        let moments = columns(&mut self.record, &self.range)?;
        let Self { isa, gradient, origin, .. } = self;
        Ok(match gradient {
            Gradient::F32(gradient) => pass::update(
                isa,
                Streams::<N, R, W, M, Single> { rule, origin, weights, extras, moments, gradient },
            ),
            Gradient::Bf16(gradient) => pass::update(
                isa,
                Streams::<N, R, W, M, Bf16> { rule, origin, weights, extras, moments, gradient },
            ),
            Gradient::F16(gradient) => pass::update(
                isa,
                Streams::<N, R, W, M, F16> { rule, origin, weights, extras, moments, gradient },
            ),
        })
    }

    fn blocks<const N: usize, R: ElementRule<N>, W: WeightCells>(
        mut self,
        rule: R,
        weights: &mut [W::Weight],
    ) -> Result<u32, ApplyError> {
        let mut nothing = nothing::<W>(weights.len());
        let extras = extras::<W>(&mut self.record, &self.range, &mut nothing)?;
        let moments = columns(&mut self.record, &self.range)?;
        let scales = columns(&mut self.record, &block_range(&self.range))?;
        let Self { isa, gradient, origin, .. } = self;
        Ok(pass::update(isa, Blocks::<N, R, W> { rule, origin, weights, extras, moments, scales, gradient }))
    }
}

/// Cells of no size, for a weight that has nothing in the record.
fn nothing<W: WeightCells>(elements: usize) -> Vec<W::Extra> {
    if size_of::<W::Extra>() == 0 { vec![W::Extra::zeroed(); elements] } else { Vec::new() }
}

/// The weight's column of the record, or `nothing`.
fn extras<'b, 'a: 'b, W: WeightCells>(
    record: &mut Cutter<'a>,
    range: &Range<usize>,
    nothing: &'b mut [W::Extra],
) -> Result<&'b mut [W::Extra], ApplyError> {
    if size_of::<W::Extra>() == 0 { Ok(nothing) } else { record.next(range.clone()) }
}

/// The next `N` columns.
fn columns<'a, const N: usize, T: bytemuck::Pod>(
    record: &mut Cutter<'a>,
    range: &Range<usize>,
) -> Result<[&'a mut [T]; N], ApplyError> {
    let mut columns = array::from_fn(|_| [].as_mut_slice());
    for column in &mut columns {
        *column = record.next(range.clone())?;
    }
    Ok(columns)
}

/// The blocks of a range that starts with one.
pub(crate) fn block_range(range: &Range<usize>) -> Range<usize> {
    range.start / BLOCK_ELEMENTS..range.end.div_ceil(BLOCK_ELEMENTS)
}

fn wrong_weights(format: WeightFormat, weights: &Weights<'_>) -> ApplyError {
    ApplyError::WrongWeights { weights: weights.name(), expected: format.weights_name() }
}

/// Makes the gradient the parameter: what a state begins with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adopt;

impl ElementRule<0> for Adopt {
    const NARROW: bool = false;
    const SIGNED: [bool; 0] = [];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        1.0
    }

    #[inline(always)]
    fn element(&self, _: f32, grad: f32, []: [f32; 0]) -> (f32, [f32; 0]) {
        (grad, [])
    }
}
