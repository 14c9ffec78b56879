//! Muon: momentum, made orthogonal by Newton–Schulz (Jordan et al., 2024), as `torch.optim.Muon` has it.
//!
//! ```text
//! g = gradient_scale * grad
//! b = b + (g - b) * (1 - momentum)
//! u = b                                        with nesterov: g + (b - g) * momentum
//! X = u / max(|u|, eps), lying (rows <= columns)
//! five times: A = X X',  B = b A + c A A,  X = a X + B X
//! p = p * (1 - lr * weight_decay) - lr * adjustment(rows, columns) * X
//! ```
//!
//! PyTorch iterates in bf16; this iterates in `f32`, so that an update is the exact iteration up to the rounding of sums,
//! and differs from PyTorch's by the latter's rounding. The products take `5 * 2 * (2 r² c + r³)` multiplications and
//! additions for the shorter side `r` and the longer one `c`.

use rayon::prelude::*;

use crate::CHUNK_ELEMENTS;
use crate::isa::Isa;
use crate::norm::sum_of_squares;
use crate::rule::matmul::Matrix;

/// How the learning rate follows from the shape of a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LearningRateAdjustment {
    /// `sqrt(max(1, rows / columns))`, of the first publication.
    #[default]
    Original,
    /// `0.2 * sqrt(max(rows, columns))`: updates as large as AdamW's.
    MatchRmsAdamW,
    /// `sqrt(rows / columns)`.
    SpectralUnclamped,
}

/// The constants of Muon that no schedule changes, in the meaning of `torch.optim.Muon`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonConfig {
    /// Decay of the running mean of the gradient, in `[0, 1)`.
    pub momentum: f64,
    /// Looks ahead: the update takes the gradient once more.
    pub nesterov: bool,
    /// `a`, `b` and `c` of the iteration.
    pub coefficients: [f64; 3],
    /// The least norm that is divided by.
    pub eps: f64,
    /// Number of iterations.
    pub iterations: u32,
    /// What the learning rate is multiplied with.
    pub adjustment: LearningRateAdjustment,
}

impl Default for MuonConfig {
    /// PyTorch's values.
    fn default() -> Self {
        Self {
            momentum: 0.95,
            nesterov: true,
            coefficients: [3.4445, -4.7750, 2.0315],
            eps: 1e-7,
            iterations: 5,
            adjustment: LearningRateAdjustment::Original,
        }
    }
}

/// The coefficients of one step of Muon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonStep {
    config: MuonConfig,
    lr: f64,
    weight_decay: f64,
    gradient_scale: f32,
}

impl MuonStep {
    /// The coefficients of a step with this learning rate; no step differs from the first. `gradient_scale` multiplies
    /// every gradient.
    #[must_use]
    pub const fn new(config: &MuonConfig, lr: f64, weight_decay: f64, gradient_scale: f32) -> Self {
        Self { config: *config, lr, weight_decay, gradient_scale }
    }

    pub(crate) const fn gradient_scale(&self) -> f32 {
        self.gradient_scale
    }

    /// Updates a matrix of that many `columns`; `grad` is scaled already.
    pub(crate) fn update(
        &self,
        isa: Isa,
        columns: usize,
        master: &mut [f32],
        momentum: &mut [f32],
        grad: &[f32],
    ) {
        let rows = master.len() / columns;
        let weight = (1.0 - self.config.momentum) as f32;
        let mut values = vec![0.0; master.len()];
        values.par_iter_mut().zip(&mut *momentum).zip(grad).with_min_len(CHUNK_ELEMENTS).for_each(
            |((value, momentum), grad)| {
                *momentum = lerp(*momentum, *grad, weight);
                *value = if self.config.nesterov {
                    lerp(*grad, *momentum, self.config.momentum as f32)
                } else {
                    *momentum
                };
            },
        );
        let update = self.orthogonal(isa, Matrix { rows, columns, values });
        let decay = (1.0 - self.lr * self.weight_decay) as f32;
        let lr = (self.lr * self.adjustment(rows as f64, columns as f64)) as f32;
        master.par_iter_mut().zip(&update.values).with_min_len(CHUNK_ELEMENTS).for_each(|(param, update)| {
            *param = *param * decay - lr * *update;
        });
    }

    fn adjustment(&self, rows: f64, columns: f64) -> f64 {
        match self.config.adjustment {
            LearningRateAdjustment::Original => (rows / columns).max(1.0).sqrt(),
            LearningRateAdjustment::MatchRmsAdamW => 0.2 * rows.max(columns).sqrt(),
            LearningRateAdjustment::SpectralUnclamped => (rows / columns).sqrt(),
        }
    }

    /// The iteration; the matrices of a step are dropped as soon as the next has been computed.
    fn orthogonal(&self, isa: Isa, update: Matrix) -> Matrix {
        let standing = update.rows > update.columns;
        let mut x = if standing { update.transposed() } else { update };
        let norm = sum_of_squares(isa, &x.values).sqrt().max(self.config.eps) as f32;
        x.values.par_iter_mut().with_min_len(CHUNK_ELEMENTS).for_each(|x| *x /= norm);
        let [a, b, c] = self.config.coefficients.map(|x| x as f32);
        for _ in 0..self.config.iterations {
            let gram = x.product(isa, &x.transposed());
            let polynomial = gram.multiplied(isa, &gram, c, &gram, b);
            x = polynomial.multiplied(isa, &x, 1.0, &x, a);
        }
        if standing { x.transposed() } else { x }
    }
}

/// Between `from` and `to`, computed from the nearer end.
#[inline(always)]
fn lerp(from: f32, to: f32, weight: f32) -> f32 {
    if weight < 0.5 { weight.mul_add(to - from, from) } else { (weight - 1.0).mul_add(to - from, to) }
}
