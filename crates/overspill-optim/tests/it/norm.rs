//! The squared norm: its value, its order of additions, and what infinities do to it.

use overspill_optim::{Isa, sum_of_squares};
use proptest::prelude::*;

use crate::{CHUNK_ELEMENTS, edge_lengths, noise, on_threads};

/// The documented order of additions, one number at a time.
fn in_the_documented_order(x: &[f32]) -> f64 {
    let block_sum = |block: &[f32]| {
        let mut lanes = [0.0_f64; 16];
        for (i, x) in block.iter().enumerate() {
            lanes[i % 16] += f64::from(*x) * f64::from(*x);
        }
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    };
    x.chunks(CHUNK_ELEMENTS).fold(0.0, |sum, block| sum + block_sum(block))
}

#[test]
fn small_sums_are_exact() {
    for isa in Isa::available() {
        assert_eq!(sum_of_squares(isa, &[]), 0.0);
        assert_eq!(sum_of_squares(isa, &[3.0, -4.0]), 25.0);
        let count_up: Vec<f32> = (1..=100_u8).map(f32::from).collect();
        assert_eq!(sum_of_squares(isa, &count_up), 338_350.0);
    }
}

#[test]
fn the_order_of_additions_is_the_documented_one_at_every_length() {
    for length in edge_lengths() {
        let x = noise(length, length as u64 + 1);
        let expected = in_the_documented_order(&x).to_bits();
        for isa in Isa::available() {
            assert_eq!(sum_of_squares(isa, &x).to_bits(), expected, "{isa}, length {length}");
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_the_sum() {
    let x = noise(7 * CHUNK_ELEMENTS + 5, 3);
    for isa in Isa::available() {
        let alone = on_threads(1, || sum_of_squares(isa, &x));
        let shared = on_threads(5, || sum_of_squares(isa, &x));
        assert_eq!(alone.to_bits(), shared.to_bits(), "{isa}");
    }
}

#[test]
fn the_largest_finite_numbers_have_a_finite_sum() {
    for isa in Isa::available() {
        let sum = sum_of_squares(isa, &[f32::MAX; 1000]);
        let square = f64::from(f32::MAX) * f64::from(f32::MAX);
        assert!((sum / square - 1000.0).abs() < 1e-9, "{isa}: {sum}");
    }
}

#[test]
fn a_number_too_small_to_square_in_single_precision_still_counts() {
    let least = f64::from(f32::from_bits(1));
    for isa in Isa::available() {
        assert_eq!(sum_of_squares(isa, &[f32::from_bits(1)]), least * least, "{isa}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn one_non_finite_element_anywhere_makes_the_sum_non_finite(
        length in 1..CHUNK_ELEMENTS * 2 + 9,
        at in 0.0..1.0_f64,
        bad in prop::sample::select(vec![f32::INFINITY, f32::NEG_INFINITY, f32::NAN]),
    ) {
        let mut x = noise(length, 1);
        for isa in Isa::available() {
            prop_assert!(sum_of_squares(isa, &x).is_finite());
        }
        x[(length as f64 * at) as usize] = bad;
        for isa in Isa::available() {
            prop_assert!(!sum_of_squares(isa, &x).is_finite(), "{}", isa);
        }
    }
}
