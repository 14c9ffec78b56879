//! From half precision on disk to single precision in memory, exactly.
//!
//! Weights arrive as the little-endian bytes of a file, at any alignment. Every bf16 and every f16 is also an `f32`, so
//! nothing is rounded: the bits are moved to their places, infinities and NaNs stay what they are (a signaling NaN of
//! f16 becomes quiet, as the hardware conversion makes it), and subnormal f16 become normal `f32`.

use std::marker::PhantomData;

use rayon::prelude::*;

use crate::CHUNK_ELEMENTS;
use crate::error::LengthMismatch;
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

/// A format of two bytes whose numbers are all `f32`.
trait Half {
    fn widen(bits: u16) -> f32;
}

/// The upper half of an `f32`.
struct Bf16;

impl Half for Bf16 {
    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }
}

/// IEEE 754 binary16: five bits of exponent, ten of mantissa.
struct F16;

impl F16 {
    const SIGN: u16 = 0x8000;
    const MANTISSA: u16 = 0x03ff;
    /// The least magnitude with a full mantissa; below it are zero and the subnormals.
    const LEAST_NORMAL: u16 = 0x0400;
    const INFINITY: u16 = 0x7c00;
    /// The value of the last place of a subnormal, 2⁻²⁴.
    const SUBNORMAL_UNIT: f32 = 1.0 / 16_777_216.0;
    /// Mantissa bits that `f32` has more.
    const MANTISSA_SHIFT: u32 = 13;
    /// How much larger the bias of `f32` is, at the place of its exponent.
    const BIAS_DIFFERENCE: u32 = (127 - 15) << 23;
    const F32_INFINITY: u32 = f32::INFINITY.to_bits();
    const F32_QUIET: u32 = 1 << 22;
}

impl Half for F16 {
    /// All cases are computed and one is selected, which keeps the loop free of branches.
    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        let sign = u32::from(bits & Self::SIGN) << 16;
        let magnitude = bits & !Self::SIGN;
        let moved = u32::from(magnitude) << Self::MANTISSA_SHIFT;

        let subnormal = (f32::from(magnitude & Self::MANTISSA) * Self::SUBNORMAL_UNIT).to_bits();
        let normal = moved + Self::BIAS_DIFFERENCE;
        let quiet = if magnitude > Self::INFINITY { Self::F32_QUIET } else { 0 };
        let special = moved | Self::F32_INFINITY | quiet;

        let finite = if magnitude < Self::LEAST_NORMAL { subnormal } else { normal };
        f32::from_bits(sign | if magnitude < Self::INFINITY { finite } else { special })
    }
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
