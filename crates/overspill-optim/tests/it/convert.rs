//! Widening half precision: well-known numbers, round trips, and bytes that do not fit. (All patterns on every
//! instruction set are compared inside the crate.)

use half::{bf16, f16};
use overspill_optim::{LengthMismatch, widen_bf16, widen_f16};
use proptest::prelude::*;

#[test]
fn well_known_f16_numbers_widen_exactly() {
    let cases: [(u16, f32); 10] = [
        (0x0000, 0.0),
        (0x8000, -0.0),
        (0x3c00, 1.0),
        (0xc000, -2.0),
        (0x7bff, 65504.0),
        (0x0400, 2.0_f32.powi(-14)),
        (0x03ff, 1023.0 * 2.0_f32.powi(-24)),
        (0x0001, 2.0_f32.powi(-24)),
        (0x7c00, f32::INFINITY),
        (0xfc00, f32::NEG_INFINITY),
    ];
    for (bits, expected) in cases {
        let mut out = [f32::NAN];
        widen_f16(&bits.to_le_bytes(), &mut out).unwrap();
        assert_eq!(out[0].to_bits(), expected.to_bits(), "{bits:#06x}");
    }
}

#[test]
fn a_nan_stays_a_nan() {
    let mut out = [0.0; 2];
    widen_f16(&[0x00, 0x7e, 0x01, 0xfc], &mut out).unwrap();
    assert!(out.iter().all(|x| x.is_nan()));
    widen_bf16(&[0xc0, 0x7f, 0x81, 0xff], &mut out).unwrap();
    assert!(out.iter().all(|x| x.is_nan()));
}

#[test]
fn bytes_that_do_not_fit_the_output_are_refused() {
    let expected = |length| Err(LengthMismatch { operand: "bytes", length, expected: 8 });
    for length in [0, 6, 7, 9, 10] {
        let mut out = [5.0; 4];
        assert_eq!(widen_bf16(&vec![0; length], &mut out), expected(length));
        assert_eq!(widen_f16(&vec![0; length], &mut out), expected(length));
        assert_eq!(out, [5.0; 4]);
    }
}

proptest! {
    #[test]
    fn widening_undoes_nothing_at_any_length_and_alignment(
        patterns in prop::collection::vec(any::<u16>(), 0..200),
        skip in 0..4_usize,
    ) {
        let mut bytes = vec![0; skip];
        bytes.extend(patterns.iter().flat_map(|bits| bits.to_le_bytes()));
        let mut out = vec![0.0; patterns.len()];

        widen_f16(&bytes[skip..], &mut out).unwrap();
        for (bits, x) in patterns.iter().zip(&out) {
            let half = f16::from_bits(*bits);
            prop_assert!(half.is_nan() && x.is_nan() || f16::from_f32(*x).to_bits() == *bits);
        }
        widen_bf16(&bytes[skip..], &mut out).unwrap();
        for (bits, x) in patterns.iter().zip(&out) {
            let half = bf16::from_bits(*bits);
            prop_assert!(half.is_nan() && x.is_nan() || bf16::from_f32(*x).to_bits() == *bits);
        }
    }
}
