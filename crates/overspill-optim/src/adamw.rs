//! AdamW as one pass over four slices: each element is read once, and the three that change are written once.
//!
//! The update is that of [`rule::adam`](crate::rule::adam), with the scale of the gradient folded in. An infinite or NaN
//! gradient makes its element's state non-finite, so the caller looks at the norm first (see
//! [`sum_of_squares`](crate::sum_of_squares)). State in other formats is updated by a [`Recipe`](crate::Recipe).

use rayon::prelude::*;

use crate::CHUNK_ELEMENTS;
use crate::error::LengthMismatch;
use crate::isa::{Isa, Kernel, Load};
use crate::rule::ElementRule;
use crate::rule::adam::AdamWStep;

/// Takes one AdamW step on `param`, `exp_avg` and `exp_avg_sq`, all of the length of `grad`, on all cores.
///
/// The elements are independent: any split of the slices into calls, any number of threads and any `isa` give the same
/// bits.
///
/// # Errors
///
/// [`LengthMismatch`] when the slices are not of one length; none of them was changed.
pub fn adamw(
    isa: Isa,
    step: &AdamWStep,
    param: &mut [f32],
    grad: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) -> Result<(), LengthMismatch> {
    let elements = param.len();
    LengthMismatch::check("grad", grad.len(), elements)?;
    LengthMismatch::check("exp_avg", exp_avg.len(), elements)?;
    LengthMismatch::check("exp_avg_sq", exp_avg_sq.len(), elements)?;
    if elements <= CHUNK_ELEMENTS {
        isa.run(Update { step, param, grad, exp_avg, exp_avg_sq });
    } else {
        param
            .par_chunks_mut(CHUNK_ELEMENTS)
            .zip(grad.par_chunks(CHUNK_ELEMENTS))
            .zip(exp_avg.par_chunks_mut(CHUNK_ELEMENTS))
            .zip(exp_avg_sq.par_chunks_mut(CHUNK_ELEMENTS))
            .for_each(|(((param, grad), exp_avg), exp_avg_sq)| {
                isa.run(Update { step, param, grad, exp_avg, exp_avg_sq });
            });
    }
    Ok(())
}

/// One chunk of the pass; the slices are of one length.
struct Update<'a> {
    step: &'a AdamWStep,
    param: &'a mut [f32],
    grad: &'a [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
}

impl Kernel for Update<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Load>(self) {
        // A copy, because the compiler must know that the stores below do not change the coefficients.
        let step = self.step.rule();
        let scale = step.gradient_scale();
        let moments = self.exp_avg.iter_mut().zip(self.exp_avg_sq);
        for ((param, grad), (exp_avg, exp_avg_sq)) in self.param.iter_mut().zip(self.grad).zip(moments) {
            let grad = L::load(*grad) * scale;
            (*param, [*exp_avg, *exp_avg_sq]) = step.element(*param, grad, [*exp_avg, *exp_avg_sq]);
        }
    }
}
