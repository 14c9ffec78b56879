//! fp32 masters out of bf16 weights and their remainders, and back: for whoever takes a state apart or puts one together.
//!
//! Both directions move bits and nothing else, so together they are the identity for every pattern, NaNs included; what
//! weights and remainders are is told in `format/weight.rs`.

use crate::error::LengthMismatch;
use crate::format::weight::Remainder;

/// Joins each weight with its remainder, given as their bits, to the exact master.
///
/// # Errors
///
/// [`LengthMismatch`] when the slices are not of one length; nothing was written.
pub fn join_remainders(
    weights: &[u16],
    remainders: &[u16],
    masters: &mut [f32],
) -> Result<(), LengthMismatch> {
    check(masters.len(), weights.len(), remainders.len())?;
    for ((master, &weight), &remainder) in masters.iter_mut().zip(weights).zip(remainders) {
        *master = f32::from_bits(Remainder::join(weight, remainder));
    }
    Ok(())
}

/// Splits each master into the weight that it rounds to and the remainder, as their bits.
///
/// # Errors
///
/// [`LengthMismatch`] when the slices are not of one length; nothing was written.
pub fn split_remainders(
    masters: &[f32],
    weights: &mut [u16],
    remainders: &mut [u16],
) -> Result<(), LengthMismatch> {
    check(masters.len(), weights.len(), remainders.len())?;
    for ((master, weight), remainder) in masters.iter().zip(weights).zip(remainders) {
        (*weight, *remainder) = Remainder::split(master.to_bits());
    }
    Ok(())
}

fn check(expected: usize, weights: usize, remainders: usize) -> Result<(), LengthMismatch> {
    let operands = [("weights", weights), ("remainders", remainders)];
    match operands.into_iter().find(|&(_, length)| length != expected) {
        Some((operand, length)) => Err(LengthMismatch { operand, length, expected }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_joined_is_split_again_to_the_same_bits() {
        // Every weight with remainders on both sides of the carry, and at its edges.
        let remainders = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        for remainder in remainders {
            let weights: Vec<u16> = (0..=u16::MAX).collect();
            let remainders = vec![remainder; weights.len()];
            let mut masters = vec![0.0; weights.len()];
            join_remainders(&weights, &remainders, &mut masters).unwrap();
            let (mut back, mut rest) = (vec![0; weights.len()], vec![0; weights.len()]);
            split_remainders(&masters, &mut back, &mut rest).unwrap();
            assert!(back == weights && rest == remainders, "{remainder:#06x}");
        }
    }

    #[test]
    fn slices_of_different_lengths_are_refused() {
        let mut masters = [7.0; 2];
        let refused = join_remainders(&[0; 3], &[0; 2], &mut masters);
        assert_eq!(refused, Err(LengthMismatch { operand: "weights", length: 3, expected: 2 }));
        let (mut weights, mut remainders) = ([5; 2], [5; 1]);
        let refused = split_remainders(&masters, &mut weights, &mut remainders);
        assert_eq!(refused, Err(LengthMismatch { operand: "remainders", length: 1, expected: 2 }));
        assert_eq!((masters, weights, remainders), ([7.0; 2], [5; 2], [5; 1]));
    }
}
