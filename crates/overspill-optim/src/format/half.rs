//! The two formats of sixteen bits: widening, which is exact, and narrowing of IEEE halves to the nearest.
//!
//! All cases of a conversion are computed and one is selected, which keeps the loops free of branches.

/// A format of two bytes whose numbers are all `f32`.
pub(crate) trait Half {
    fn widen(bits: u16) -> f32;
}

/// The upper half of an `f32`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16;

impl Half for Bf16 {
    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }
}

/// IEEE 754 binary16: five bits of exponent, ten of mantissa.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F16;

impl F16 {
    const SIGN: u16 = 0x8000;
    const MANTISSA: u16 = 0x03ff;
    /// The least magnitude with a full mantissa; below it are zero and the subnormals.
    const LEAST_NORMAL: u16 = 0x0400;
    const INFINITY: u16 = 0x7c00;
    const NAN: u16 = 0x7e00;
    /// The value of the last place of a subnormal, 2⁻²⁴.
    const SUBNORMAL_UNIT: f32 = 1.0 / 16_777_216.0;
    /// Mantissa bits that `f32` has more.
    const MANTISSA_SHIFT: u32 = 13;
    /// How much larger the bias of `f32` is, at the place of its exponent.
    const BIAS_DIFFERENCE: u32 = (127 - 15) << 23;
    const F32_INFINITY: u32 = f32::INFINITY.to_bits();
    const F32_QUIET: u32 = 1 << 22;
    /// 2¹⁶, the least power of two that has no half of its own, as `f32`.
    const F32_TOO_LARGE: u32 = 65536.0_f32.to_bits();
    /// The least normal half as `f32`.
    const F32_LEAST_NORMAL: u32 = Self::BIAS_DIFFERENCE + (1 << 23);

    /// The nearest half to `x`, ties to even; too large a magnitude becomes infinite, every NaN the quiet one.
    #[inline(always)]
    pub(crate) fn narrow(x: f32) -> u16 {
        let bits = x.to_bits();
        let sign = (bits >> 16) as u16 & Self::SIGN;
        let magnitude = bits & !(1 << 31);

        // The sum's last place is 2⁻²⁴, so the addition rounds to the subnormals' grid.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let odd = (magnitude >> Self::MANTISSA_SHIFT) & 1;
        let half_less = (1 << (Self::MANTISSA_SHIFT - 1)) - 1;
        let normal = magnitude.wrapping_sub(Self::BIAS_DIFFERENCE).wrapping_add(half_less + odd)
            >> Self::MANTISSA_SHIFT;
        let special = if magnitude > Self::F32_INFINITY { Self::NAN } else { Self::INFINITY };

        let finite = if magnitude < Self::F32_LEAST_NORMAL { subnormal as u16 } else { normal as u16 };
        sign | if magnitude < Self::F32_TOO_LARGE { finite } else { special }
    }
}

impl Half for F16 {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrowing_rounds_to_the_nearest_half_around_every_half_and_every_tie() {
        for bits in 0..=u16::MAX {
            let x = F16::widen(bits);
            let next = F16::widen(bits.wrapping_add(1));
            let tie = x + (next - x) / 2.0;
            for near in [x, tie] {
                for offset in [-2, -1, 0, 1, 2] {
                    let near = f32::from_bits(near.to_bits().wrapping_add_signed(offset));
                    let (ours, reference) = (F16::narrow(near), half::f16::from_f32_const(near));
                    assert!(
                        ours == reference.to_bits()
                            || near.is_nan() && reference.is_nan() && ours & 0x7fff == F16::NAN,
                        "{near:e}: {ours:#06x} {reference:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_half_survives_the_way_up_and_down() {
        for bits in 0..=u16::MAX {
            let x = F16::widen(bits);
            assert!(F16::narrow(x) == bits || x.is_nan() && F16::narrow(x) & !F16::SIGN == F16::NAN);
        }
    }
}
