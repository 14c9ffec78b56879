//! Addition and the triad against a plain loop.

use overspill_optim::{Isa, LengthMismatch, add_assign, triad};
use proptest::prelude::*;

use crate::{CHUNK_ELEMENTS, bits, edge_lengths, noise};

#[test]
fn every_instruction_set_adds_like_a_plain_loop_at_every_length() {
    for length in edge_lengths() {
        let (y, x) = (noise(length, 1), noise(length, 2));
        let expected: Vec<f32> = y.iter().zip(&x).map(|(y, x)| y + x).collect();
        for isa in Isa::available() {
            let mut sum = y.clone();
            add_assign(isa, &mut sum, &x).unwrap();
            assert!(bits(&sum) == bits(&expected), "{isa}, length {length}");
        }
    }
}

#[test]
fn a_sum_of_two_lengths_is_refused() {
    let mut y = [1.0; 4];
    let refused = Err(LengthMismatch { operand: "x", length: 5, expected: 4 });
    assert_eq!(add_assign(Isa::detect(), &mut y, &[1.0; 5]), refused);
    assert_eq!(y, [1.0; 4]);
}

#[test]
fn the_triad_ends_with_the_shortest_slice() {
    let mut a = [9.0; 4];
    triad(&mut a, &[1.0, 2.0, 3.0], &[10.0; 4], 0.5);
    assert_eq!(a, [6.0, 7.0, 8.0, 9.0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_triad_equals_a_plain_loop(length in 0..3 * CHUNK_ELEMENTS, s in -8.0..8.0_f32) {
        let (b, c) = (noise(length, 3), noise(length, 4));
        let mut a = vec![f32::NAN; length];
        triad(&mut a, &b, &c, s);
        let expected: Vec<f32> = b.iter().zip(&c).map(|(b, c)| b + s * c).collect();
        prop_assert!(bits(&a) == bits(&expected));
    }
}
