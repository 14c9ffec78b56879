//! Eight bits per moment, relative to the largest magnitude of a block of 256.
//!
//! The idea and the evidence that training converges with it are Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers
//! via Block-wise Quantization" (2021): outliers stay inside their block, and a code with a wide range of exponents
//! keeps the small elements. Their code is a table of decimal exponents; ours is a small floating-point number, because
//! that takes a shift and an addition in each direction instead of a table and a search:
//!
//! - a code is the upper 12 bits of an `f32` in `(0, 1]` less a constant: exponent and three bits of mantissa;
//! - the largest code is 1.0, the block's largest magnitude exactly; code 0 is zero;
//! - with a sign, 127 codes reach down to 1.25 · 2⁻¹⁶; without, 255 codes reach down to 1.25 · 2⁻³².
//!
//! Rounding is at random between the neighbors. A magnitude below the least code becomes zero or the least code by the
//! same law if it has a sign. Without a sign it becomes the least code: a second moment that became zero beside a
//! first moment that did not would divide by `eps` alone. The two ends fit together: the least first moment over the root of
//! the least second one is 1.12 times the ratio of the largest ones, so no rounding makes an update out of proportion.

use crate::format::moment::BLOCK_ELEMENTS;

/// Bits of an `f32` below a code's mantissa.
const SHIFT: u32 = 20;
/// The upper bits of 1.0, which is the largest code.
const ONE: u32 = 1.0_f32.to_bits() >> SHIFT;
const MAGNITUDE: u32 = !(1 << 31);

/// One of the two codes. Its constants are fields, so that a loop over elements is the same for both and has no branch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Code {
    /// The bit of an `f32` that is kept as the code's upper bit.
    sign: u32,
    /// What is subtracted from the upper bits to get a code.
    base: u32,
    /// The number of code 1.
    least: f32,
    /// A 2⁻²⁴th of the numbers below which a magnitude may vanish.
    vanishing_unit: f32,
}

impl Code {
    /// With a sign: 127 magnitudes.
    const SIGNED: Self = Self::new(1 << 31, ONE - 0x7f, 1.0);
    /// Without: 255 magnitudes.
    const UNSIGNED: Self = Self::new(0, ONE - 0xff, 0.0);

    const fn new(sign: u32, base: u32, vanishing: f32) -> Self {
        let least = f32::from_bits((base + 1) << SHIFT);
        Self { sign, base, least, vanishing_unit: vanishing * least / 16_777_216.0 }
    }

    #[inline(always)]
    pub(crate) const fn of(signed: bool) -> Self {
        if signed { Self::SIGNED } else { Self::UNSIGNED }
    }

    /// The code of `x` in a block of that `scale`, rounded by 32 random bits.
    #[inline(always)]
    pub(crate) fn encode(self, x: f32, scale: f32, noise: u32) -> u8 {
        let bits = x.to_bits();
        let magnitude = bits & MAGNITUDE;
        let part = f32::from_bits(magnitude) / scale;
        // Of an empty or an overflown block, too.
        let part = if part < 1.0 { part } else { 1.0 };
        let rounded = part.to_bits().wrapping_add(noise >> (32 - SHIFT)) >> SHIFT;
        let code = if part < self.least { 1 } else { rounded.wrapping_sub(self.base) };
        let code = if part < (noise >> 8) as i32 as f32 * self.vanishing_unit { 0 } else { code };
        let code = if magnitude == 0 { 0 } else { code };
        let sign = if code == 0 { 0 } else { (bits & self.sign) >> 24 };
        (code | sign) as u8
    }

    /// The number of a code.
    #[inline(always)]
    pub(crate) fn decode(self, code: u8, scale: f32) -> f32 {
        let code = u32::from(code);
        let sign = (code << 24) & self.sign;
        let magnitude = code & !(self.sign >> 24);
        let part = f32::from_bits(magnitude.wrapping_add(self.base) << SHIFT) * scale;
        f32::from_bits(if magnitude == 0 { 0 } else { part.to_bits() } | sign)
    }
}

/// The scale of a block: the largest magnitude, at most the largest finite number.
#[inline(always)]
pub(crate) fn scale(block: &[f32; BLOCK_ELEMENTS]) -> f32 {
    let largest = block.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & MAGNITUDE));
    f32::from_bits(largest.min(f32::MAX.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_way_up_and_down_whatever_the_noise() {
        for signed in [false, true] {
            for code in (0..=u8::MAX).filter(|code| !signed || *code != 0x80) {
                for scale in [1.0, 0.3, 1e-20, 3e30] {
                    let x = Code::of(signed).decode(code, scale);
                    if Code::of(signed).decode(code, scale) / scale != Code::of(signed).decode(code, 1.0) {
                        // The product was rounded; its neighbors have codes of their own.
                        continue;
                    }
                    for noise in [0, 0x8000_0000, u32::MAX] {
                        assert_eq!(Code::of(signed).encode(x, scale, noise), code, "{signed} {code} {scale}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_of_a_block_is_exact_and_an_empty_block_is_zero() {
        let mut block = [0.0; BLOCK_ELEMENTS];
        assert_eq!(scale(&block), 0.0);
        assert_eq!(Code::of(true).decode(Code::of(true).encode(0.0, 0.0, u32::MAX), 0.0), 0.0);
        block[17] = -0.123;
        let scale = scale(&block);
        assert_eq!(scale, 0.123);
        for noise in [0, u32::MAX] {
            assert_eq!(Code::of(true).decode(Code::of(true).encode(-0.123, scale, noise), scale), -0.123);
            assert_eq!(Code::of(false).decode(Code::of(false).encode(0.123, scale, noise), scale), 0.123);
        }
    }

    #[test]
    fn the_mean_of_the_roundings_is_the_number() {
        for (signed, x) in [(true, -0.7), (true, 0.01), (true, 3e-6), (false, 0.9), (false, 3e-8)] {
            let mut noise = 0_u32;
            let roundings = 1 << 16;
            let sum: f64 = (0..roundings)
                .map(|_| {
                    noise = noise.wrapping_add(0x9e37_79b1);
                    f64::from(Code::of(signed).decode(Code::of(signed).encode(x, 1.0, noise), 1.0))
                })
                .sum();
            let mean = sum / f64::from(roundings);
            assert!((mean / f64::from(x) - 1.0).abs() < 1e-3, "{x}: {mean}");
        }
    }

    #[test]
    fn a_second_moment_never_vanishes_and_infinities_saturate() {
        for noise in [0, 0x7fff_ffff, u32::MAX] {
            assert_eq!(Code::of(false).encode(1e-30, 1.0, noise), 1);
            assert_eq!(
                Code::of(false).decode(Code::of(false).encode(f32::INFINITY, f32::MAX, noise), f32::MAX),
                f32::MAX
            );
        }
        let mut block = [1.0; BLOCK_ELEMENTS];
        block[0] = f32::INFINITY;
        assert_eq!(scale(&block), f32::MAX);
    }
}
