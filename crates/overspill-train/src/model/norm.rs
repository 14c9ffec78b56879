//! RMSNorm: every token divided by its root mean square, times a gain per element.
//!
//! `y = x · r · g` with `r = 1 / sqrt(mean(x²) + eps)`.

use rayon::prelude::*;

use super::arithmetic::{dot, dot3};
use super::matrix::{Matrix, MatrixMut, for_each_row, rows_per_task};

/// Normalizes every row of `input`; `gain` has one element per column.
pub(super) fn rms_norm(input: &Matrix, gain: &Matrix, eps: f32) -> MatrixMut {
    let columns = input.columns();
    let mut output = MatrixMut::zeros(input.len() / columns, columns);
    for_each_row(&mut output, columns, |row, y| {
        let x = &input[row * columns..][..columns];
        let r = inverse_rms(x, eps);
        for ((y, x), g) in y.iter_mut().zip(x).zip(gain.iter()) {
            *y = x * r * g;
        }
    });
    output
}

/// Turns the gradient of [`rms_norm`]'s output into that of its input, in place, and returns the gain's gradient.
///
/// `residual`, the gradient that reaches the same input around the norm, is added.
pub(super) fn rms_norm_backward(
    input: &Matrix,
    gain: &Matrix,
    eps: f32,
    gradient: &mut MatrixMut,
    residual: Option<&[f32]>,
) -> Vec<f32> {
    let columns = input.columns();
    let mut scales = vec![0.0; input.len() / columns];
    scales
        .par_iter_mut()
        .zip(input.par_chunks_exact(columns))
        .with_min_len(rows_per_task(columns))
        .for_each(|(r, x)| *r = inverse_rms(x, eps));

    let gain_gradient = gain_gradient(input, gradient, &scales);
    for_each_row(gradient, columns, |row, dy| {
        let x = &input[row * columns..][..columns];
        let r = scales[row];
        let along = dot3(dy, gain, x) * r * r * r / columns as f32;
        for ((dy, x), g) in dy.iter_mut().zip(x).zip(gain.iter()) {
            *dy = *dy * g * r - x * along;
        }
        if let Some(residual) = residual {
            for (dx, more) in dy.iter_mut().zip(&residual[row * columns..]) {
                *dx += more;
            }
        }
    });
    gain_gradient
}

/// `Σ over rows of dy · x · r`: tasks own columns, so that every sum runs over the rows in order.
fn gain_gradient(input: &[f32], gradient: &[f32], scales: &[f32]) -> Vec<f32> {
    const COLUMNS_PER_TASK: usize = 64;
    let columns = input.len() / scales.len();
    let mut sums = vec![0.0; columns];
    sums.par_chunks_mut(COLUMNS_PER_TASK).enumerate().for_each(|(task, sums)| {
        let first = task * COLUMNS_PER_TASK;
        for (row, r) in scales.iter().enumerate() {
            let x = &input[row * columns + first..][..sums.len()];
            let dy = &gradient[row * columns + first..][..sums.len()];
            for ((sum, x), dy) in sums.iter_mut().zip(x).zip(dy) {
                *sum += dy * (x * r);
            }
        }
    });
    sums
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}
