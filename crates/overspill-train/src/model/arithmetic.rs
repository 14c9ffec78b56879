//! Sums, maxima and the exponential over slices, written so that the compiler vectorizes them.
//!
//! A reduction keeps [`LANES`] partial results and folds them in a fixed order: the result depends on the slice
//! alone, never on the machine or the number of threads.

/// Independent partial results of a reduction.
const LANES: usize = 16;

/// `Σ x`
pub(super) fn sum(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    fold(lanes) + rest.iter().sum::<f32>()
}

/// `Σ x · y`
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let (y_chunks, y_rest) = y.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    fold(lanes) + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f32>()
}

/// `Σ x · y · z`
pub(super) fn dot3(x: &[f32], y: &[f32], z: &[f32]) -> f32 {
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let (y_chunks, y_rest) = y.as_chunks::<LANES>();
    let (z_chunks, z_rest) = z.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for ((x, y), z) in x_chunks.iter().zip(y_chunks).zip(z_chunks) {
        for (lane, ((x, y), z)) in lanes.iter_mut().zip(x.iter().zip(y).zip(z)) {
            *lane += x * y * z;
        }
    }
    fold(lanes) + x_rest.iter().zip(y_rest).zip(z_rest).map(|((x, y), z)| x * y * z).sum::<f32>()
}

/// The largest element.
pub(super) fn max(x: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, *value);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, greater)
}

/// Replaces every element by `exp(x - max)` and returns their sum; `max` is not exceeded by any element.
pub(super) fn exponentials(x: &mut [f32], max: f32) -> f32 {
    for value in x.iter_mut() {
        *value = exp_nonpositive(*value - max);
    }
    sum(x)
}

/// `1 / (1 + exp(-x))`
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    let e = exp_nonpositive(-x.abs());
    let numerator = if x < 0.0 { e } else { 1.0 };
    numerator / (1.0 + e)
}

/// `exp(x)` for `x <= 0`, within 2 units in the last place; below -87 it stays at `exp(-87)`. NaN stays NaN.
///
/// With `x = n ln 2 + r` and `|r| <= ln 2 / 2`, a polynomial gives `exp(r)` and the exponent bits give `2^n`.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    /// Adding this rounds to an integer, which then sits in the lowest bits.
    const ROUNDER: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let power = f32::from_bits(rounded.to_bits().wrapping_sub(ROUNDER.to_bits()).wrapping_add(127) << 23);
    (p * r * r + r + 1.0) * power
}

fn fold(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_exponential_is_within_two_units_in_the_last_place(x in -87.0f32..=0.0) {
            let exact = f64::from(x).exp();
            prop_assert!((f64::from(exp_nonpositive(x)) - exact).abs() <= 2.0 * exact * f64::from(f32::EPSILON));
        }

        #[test]
        fn the_sigmoid_is_exact_to_a_few_units(x in -80.0f32..80.0) {
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            prop_assert!((f64::from(sigmoid(x)) - exact).abs() <= 4.0 * exact * f64::from(f32::EPSILON));
        }

        #[test]
        fn reductions_agree_with_double_precision(x in prop::collection::vec(-1.0f32..1.0, 0..200)) {
            let exact: f64 = x.iter().map(|v| f64::from(*v)).sum();
            let squares: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
            let cubes: f64 = x.iter().map(|v| f64::from(*v).powi(3)).sum();
            prop_assert!((f64::from(sum(&x)) - exact).abs() < 1e-4);
            prop_assert!((f64::from(dot(&x, &x)) - squares).abs() < 1e-4);
            prop_assert!((f64::from(dot3(&x, &x, &x)) - cubes).abs() < 1e-4);
            prop_assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }

    #[test]
    fn the_ends_of_the_range_are_exact_and_nan_is_not_hidden() {
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert!(exp_nonpositive(f32::NEG_INFINITY) < 2e-38);
        assert!(exp_nonpositive(f32::NAN).is_nan());
        assert!(sigmoid(f32::NAN).is_nan());
        assert_eq!(sigmoid(f32::INFINITY), 1.0);
    }
}
