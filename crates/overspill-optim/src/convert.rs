//! From half precision on disk to single precision in memory, exactly.
//!
//! Weights arrive as the little-endian bytes of a file, at any alignment. Every bf16 and every f16 is also an `f32`, so
//! nothing is rounded: the bits are moved to their places, infinities and NaNs stay what they are (a signaling NaN of
//! f16 becomes quiet, as the hardware conversion makes it), and subnormal f16 become normal `f32`.

use std::marker::PhantomData;

use rayon::prelude::*;

use crate::CHUNK_ELEMENTS;
use crate::error::LengthMismatch;
use crate::format::half::{Bf16, F16, Half};
use crate::isa::{Isa, Kernel, Load};

/// Widens the bf16 numbers in `bytes` (little-endian, two bytes each) into `out`, on all cores.
///
/// # Errors
///
/// [`LengthMismatch`] when `bytes` is not twice as long as `out`; nothing was written.
pub fn widen_bf16(bytes: &[u8], out: &mut [f32]) -> Result<(), LengthMismatch> {
    widen::<Bf16>(Isa::detect(), bytes, out)
}

/// Widens the IEEE half-precision numbers in `bytes` (little-endian, two bytes each) into `out`, on all cores.
///
/// # Errors
///
/// [`LengthMismatch`] when `bytes` is not twice as long as `out`; nothing was written.
pub fn widen_f16(bytes: &[u8], out: &mut [f32]) -> Result<(), LengthMismatch> {
    widen::<F16>(Isa::detect(), bytes, out)
}

/// Bytes of one number in half precision.
const HALF_BYTES: usize = 2;

fn widen<H: Half>(isa: Isa, bytes: &[u8], out: &mut [f32]) -> Result<(), LengthMismatch> {
    let (halves, rest) = bytes.as_chunks::<HALF_BYTES>();
    if halves.len() != out.len() || !rest.is_empty() {
        let expected = out.len().saturating_mul(HALF_BYTES);
        return Err(LengthMismatch { operand: "bytes", length: bytes.len(), expected });
    }
    if out.len() <= CHUNK_ELEMENTS {
        isa.run(Widen::<H> { halves, out, half: PhantomData });
    } else {
        out.par_chunks_mut(CHUNK_ELEMENTS)
            .zip(halves.par_chunks(CHUNK_ELEMENTS))
            .for_each(|(out, halves)| isa.run(Widen::<H> { halves, out, half: PhantomData }));
    }
    Ok(())
}

/// One chunk; the slices are of one length.
struct Widen<'a, H> {
    halves: &'a [[u8; HALF_BYTES]],
    out: &'a mut [f32],
    half: PhantomData<H>,
}

impl<H: Half> Kernel for Widen<'_, H> {
    type Output = ();

    #[inline(always)]
    fn run<L: Load>(self) {
        for (out, half) in self.out.iter_mut().zip(self.halves) {
            *out = H::widen(u16::from_le_bytes(L::load(*half)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pattern of sixteen bits, several times, so that chunk edges and vector tails are met too.
    fn all_patterns() -> (Vec<u16>, Vec<u8>) {
        let patterns: Vec<u16> = (0..=u16::MAX).cycle().take(3 * CHUNK_ELEMENTS + 7).collect();
        let bytes = patterns.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        (patterns, bytes)
    }

    fn widened<H: Half>(isa: Isa, bytes: &[u8]) -> Vec<u32> {
        let mut out = vec![0.0; bytes.len() / HALF_BYTES];
        widen::<H>(isa, bytes, &mut out).unwrap();
        out.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn every_f16_widens_to_the_bits_of_the_half_crate() {
        let (patterns, bytes) = all_patterns();
        let expected: Vec<u32> =
            patterns.iter().map(|bits| half::f16::from_bits(*bits).to_f32_const().to_bits()).collect();
        for isa in Isa::available() {
            assert_eq!(widened::<F16>(isa, &bytes), expected, "{isa}");
        }
    }

    #[test]
    fn every_bf16_is_the_upper_half_of_its_f32() {
        let (patterns, bytes) = all_patterns();
        let expected: Vec<u32> = patterns.iter().map(|bits| u32::from(*bits) << 16).collect();
        for isa in Isa::available() {
            assert_eq!(widened::<Bf16>(isa, &bytes), expected, "{isa}");
        }
    }
}
