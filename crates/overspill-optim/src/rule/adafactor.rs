//! Adafactor (Shazeer and Stern, 2018), as `torch.optim.Adafactor` has it: the second moment of a matrix is the product of
//! what it is by rows and by columns.
//!
//! ```text
//! g = gradient_scale * grad;  w = t^beta2_decay
//! rho = min(lr, 1 / sqrt(t));  alpha = max(eps2, rms(p)) * rho
//! p = p * (1 - lr * weight_decay)
//! row = row + (mean over columns of g² - row) * w;  column likewise
//! v = row * column / max(mean(row), eps1)      of a vector: v = v + (g² - v) * w
//! u = g / sqrt(max(v, eps1²))
//! p = p - alpha / max(1, rms(u) / d) * u
//! ```
//!
//! The state is `f32`; everything between is `f64`, so that a new parameter is the rounded exact one, whatever order PyTorch
//! adds in. Sums have a fixed order: sixteen lanes in a row, rows from first to last, columns likewise.

use rayon::prelude::*;

use crate::isa::{Isa, Kernel, Load};

/// Lanes of a row's sum.
const LANES: usize = 16;

/// Elements of a vector that are summed like a row of a matrix.
const VECTOR_ROW: usize = 4096;

/// The constants of Adafactor that no schedule changes, in the meaning of `torch.optim.Adafactor`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdafactorConfig {
    /// Exponent of the step in the weight of a new second moment, at most 0.
    pub beta2_decay: f64,
    /// The least second moment is the square of this; PyTorch takes the spacing of the parameter's type at 1.
    pub eps1: f64,
    /// The least size of a parameter that steps are relative to.
    pub eps2: f64,
    /// The largest root-mean-square of an update.
    pub d: f64,
}

impl Default for AdafactorConfig {
    /// PyTorch's values for `f32`: -0.8, 2⁻²³, 1e-3, 1.
    fn default() -> Self {
        Self { beta2_decay: -0.8, eps1: f64::from(f32::EPSILON), eps2: 1e-3, d: 1.0 }
    }
}

/// The coefficients of one step of Adafactor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdafactorStep {
    config: AdafactorConfig,
    gradient_scale: f32,
    decay: f64,
    rho: f64,
    weight: f64,
}

/// The second moments of a parameter.
pub(crate) enum Variance<'a> {
    /// By rows and by columns, of matrices of that many rows and columns.
    Factored { rows: usize, columns: usize, row_var: &'a mut [f32], col_var: &'a mut [f32] },
    /// One for each element.
    Full(&'a mut [f32]),
}

impl AdafactorStep {
    /// The coefficients of step number `step`, counted from 1 (0 is taken as 1); `gradient_scale` multiplies every
    /// gradient.
    #[must_use]
    pub fn new(config: &AdafactorConfig, lr: f64, weight_decay: f64, step: u64, gradient_scale: f32) -> Self {
        let step = step.max(1) as f64;
        Self {
            config: *config,
            gradient_scale,
            decay: 1.0 - lr * weight_decay,
            rho: lr.min(1.0 / step.sqrt()),
            weight: step.powf(config.beta2_decay),
        }
    }

    pub(crate) const fn gradient_scale(&self) -> f32 {
        self.gradient_scale
    }

    /// Updates a parameter; `grad` is scaled already.
    pub(crate) fn update(&self, isa: Isa, master: &mut [f32], variance: Variance<'_>, grad: &[f32]) {
        let size = root_mean_square(&row_sums(isa, master, VECTOR_ROW), master.len());
        let alpha = self.config.eps2.max(size) * self.rho;
        let least = self.config.eps1 * self.config.eps1;
        match variance {
            Variance::Full(variance) => {
                variance.par_iter_mut().zip(grad).for_each(|(v, grad)| {
                    *v = self.moved(*v, f64::from(*grad) * f64::from(*grad));
                });
                let variance = &*variance;
                let row = |index: usize, grad: &'_ [f32]| {
                    let start = index * VECTOR_ROW;
                    (1.0, &variance[start..start + grad.len()])
                };
                self.subtract(isa, VECTOR_ROW, least, alpha, master, grad, row);
            }
            Variance::Factored { rows, columns, row_var, col_var } => {
                self.observe(isa, rows, columns, row_var, col_var, grad);
                let mut factors = Vec::with_capacity(row_var.len());
                for row_var in row_var.chunks(rows) {
                    let mean = row_var.iter().map(|x| f64::from(*x)).sum::<f64>() / rows as f64;
                    let mean = mean.max(self.config.eps1);
                    factors.extend(row_var.iter().map(|x| f64::from(*x) / mean));
                }
                let col_var = &*col_var;
                let row = |index: usize, _: &'_ [f32]| {
                    (factors[index], &col_var[index / rows * columns..][..columns])
                };
                self.subtract(isa, columns, least, alpha, master, grad, row);
            }
        }
    }

    fn moved(&self, variance: f32, observed: f64) -> f32 {
        let variance = f64::from(variance);
        (variance + (observed - variance) * self.weight) as f32
    }

    /// Moves the factors towards the means of the squared gradient.
    fn observe(
        &self,
        isa: Isa,
        rows: usize,
        columns: usize,
        row_var: &mut [f32],
        col_var: &mut [f32],
        grad: &[f32],
    ) {
        for (row_var, sum) in row_var.iter_mut().zip(row_sums(isa, grad, columns)) {
            *row_var = self.moved(*row_var, sum / columns as f64);
        }
        for (col_var, grad) in col_var.chunks_mut(columns).zip(grad.chunks(rows * columns)) {
            col_var.par_chunks_mut(LANES).enumerate().for_each(|(group, col_var)| {
                let mut sums = [0.0_f64; LANES];
                for row in grad.chunks(columns) {
                    for (sum, x) in sums.iter_mut().zip(&row[group * LANES..][..col_var.len()]) {
                        *sum += f64::from(*x) * f64::from(*x);
                    }
                }
                for (col_var, sum) in col_var.iter_mut().zip(sums) {
                    *col_var = self.moved(*col_var, sum / rows as f64);
                }
            });
        }
    }

    /// Measures the update and subtracts it, row by row; `row` gives a row's factor and its elements' variances.
    #[expect(
        clippy::too_many_arguments,
        reason = "the two variances differ in these, and a struct would name them once more"
    )]
    fn subtract<'v>(
        &self,
        isa: Isa,
        columns: usize,
        least: f64,
        alpha: f64,
        master: &mut [f32],
        grad: &[f32],
        row: impl Fn(usize, &[f32]) -> (f64, &'v [f32]) + Sync,
    ) {
        let update = |index: usize, grad| {
            let (factor, variance) = row(index, grad);
            RowUpdate { grad, variance, factor, least }
        };
        let sums: Vec<f64> = grad
            .par_chunks(columns)
            .enumerate()
            .map(|(index, grad)| isa.run(SquaredUpdate(update(index, grad))))
            .collect();
        let rate = alpha / (root_mean_square(&sums, grad.len()) / self.config.d).max(1.0);
        master.par_chunks_mut(columns).zip(grad.par_chunks(columns)).enumerate().for_each(
            |(index, (master, grad))| {
                isa.run(Subtract { update: update(index, grad), master, decay: self.decay, rate });
            },
        );
    }
}

fn root_mean_square(sums: &[f64], elements: usize) -> f64 {
    (sums.iter().sum::<f64>() / elements as f64).sqrt()
}

/// The sum of squares of every row of `columns` elements.
fn row_sums(isa: Isa, x: &[f32], columns: usize) -> Vec<f64> {
    x.par_chunks(columns).map(|row| isa.run(SquaredRow(row))).collect()
}

struct SquaredRow<'a>(&'a [f32]);

impl Kernel for SquaredRow<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<L: Load>(self) -> f64 {
        in_lanes::<L>(self.0, self.0, |x, _| f64::from(x))
    }
}

/// What a row of the update is made of.
struct RowUpdate<'a> {
    grad: &'a [f32],
    variance: &'a [f32],
    factor: f64,
    least: f64,
}

impl RowUpdate<'_> {
    #[inline(always)]
    fn element(&self, grad: f32, variance: f32) -> f64 {
        let variance = f64::from(variance) * self.factor;
        f64::from(grad) / (if variance > self.least { variance } else { self.least }).sqrt()
    }
}

struct SquaredUpdate<'a>(RowUpdate<'a>);

impl Kernel for SquaredUpdate<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<L: Load>(self) -> f64 {
        let update = self.0;
        in_lanes::<L>(update.grad, update.variance, |grad, variance| update.element(grad, variance))
    }
}

struct Subtract<'a> {
    update: RowUpdate<'a>,
    master: &'a mut [f32],
    decay: f64,
    rate: f64,
}

impl Kernel for Subtract<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Load>(self) {
        let Self { update, master, decay, rate } = self;
        for ((param, grad), variance) in master.iter_mut().zip(update.grad).zip(update.variance) {
            let update = update.element(L::load(*grad), *variance);
            *param = (f64::from(*param) * decay - rate * update) as f32;
        }
    }
}

/// The sum of the squares of what `value` makes of two elements, in lanes that are added from first to last.
#[inline(always)]
fn in_lanes<L: Load>(x: &[f32], y: &[f32], value: impl Fn(f32, f32) -> f64) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let ((x_rows, x_rest), (y_rows, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x_rows.iter().zip(y_rows) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            let value = value(*x, *y);
            *lane = L::load(*lane + value * value);
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        let value = value(*x, *y);
        *lane = L::load(*lane + value * value);
    }
    lanes.iter().sum()
}
