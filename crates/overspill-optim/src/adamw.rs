//! AdamW as one pass: each element of the four slices is read once and the three that change are written once.
//!
//! The update is that of `torch.optim.AdamW`, with the scale of the gradient folded in:
//!
//! ```text
//! g = gradient_scale * grad
//! p = p * (1 - lr * weight_decay)
//! m = m + (g - m) * (1 - beta1)
//! v = beta2 * v + (1 - beta2) * g * g
//! p = p - (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! The coefficients of a step are computed once in `f64` ([`AdamWStep`]) and rounded to `f32`; the elements are `f32`
//! throughout, each operation rounded on its own. An infinite or NaN gradient makes its element's state non-finite, so
//! the caller looks at the norm first (see [`sum_of_squares`](crate::sum_of_squares)).

use rayon::prelude::*;

use crate::CHUNK_ELEMENTS;
use crate::error::LengthMismatch;
use crate::isa::{Isa, Kernel, Load};

/// The constants of AdamW that no schedule changes, in the meaning of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the running mean of the gradient, in `[0, 1)`.
    pub beta1: f64,
    /// Decay of the running mean of the squared gradient, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the root of the second moment, so that a zero gradient divides by something.
    pub eps: f64,
}

impl Default for AdamWConfig {
    /// The values that language models are trained with: 0.9, 0.95, 1e-8.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8 }
    }
}

/// The coefficients of one optimizer step; every tile of the model uses the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    gradient_scale: f32,
    decay: f32,
    exp_avg_weight: f32,
    beta2: f32,
    exp_avg_sq_weight: f32,
    step_size: f32,
    bias_correction2_sqrt: f32,
    eps: f32,
}

impl AdamWStep {
    /// The coefficients of step number `step`, counted from 1 (0 is taken as 1).
    ///
    /// `lr` is this step's learning rate; `gradient_scale` multiplies every gradient and joins what the caller has to
    /// divide by: accumulated batches, loss scale, clipping to a norm.
    #[must_use]
    pub fn new(config: &AdamWConfig, lr: f64, weight_decay: f64, step: u64, gradient_scale: f32) -> Self {
        let AdamWConfig { beta1, beta2, eps } = *config;
        let step = step.max(1) as f64;
        Self {
            gradient_scale,
            decay: (1.0 - lr * weight_decay) as f32,
            exp_avg_weight: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            exp_avg_sq_weight: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - beta1.powf(step))) as f32,
            bias_correction2_sqrt: (1.0 - beta2.powf(step)).sqrt() as f32,
            eps: eps as f32,
        }
    }

    /// The new parameter, first and second moment of one element.
    #[inline(always)]
    fn element(&self, param: f32, grad: f32, exp_avg: f32, exp_avg_sq: f32) -> (f32, f32, f32) {
        let grad = grad * self.gradient_scale;
        let exp_avg = exp_avg + (grad - exp_avg) * self.exp_avg_weight;
        let exp_avg_sq = exp_avg_sq * self.beta2 + self.exp_avg_sq_weight * grad * grad;
        let denominator = exp_avg_sq.sqrt() / self.bias_correction2_sqrt + self.eps;
        let param = param * self.decay - self.step_size * exp_avg / denominator;
        (param, exp_avg, exp_avg_sq)
    }
}

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
        let step = *self.step;
        let moments = self.exp_avg.iter_mut().zip(self.exp_avg_sq);
        for ((param, grad), (exp_avg, exp_avg_sq)) in self.param.iter_mut().zip(self.grad).zip(moments) {
            (*param, *exp_avg, *exp_avg_sq) = step.element(*param, L::load(*grad), *exp_avg, *exp_avg_sq);
        }
    }
}
