//! How a weight and its fp32 master are stored: one part beside the record, where the model reads it, and what only the
//! optimizer needs in the record.
//!
//! **Remainder.** A bf16 weight is its master rounded half up in magnitude, `(bits + 0x8000) >> 16`, and the record
//! keeps the lower 16 bits `r` of the master. The rounding carried into the upper half exactly when `r >= 0x8000`, so
//! the upper half is `weight - (r >> 15)`. Both directions are integer arithmetic modulo 2¹⁶: together they are a
//! bijection, and *every one of the 2³² patterns* comes back, zeros, subnormals, infinities and NaNs included.
//!
//! What the weight looks like needs a word: a finite master above the largest bf16 by half a place or more rounds to an
//! infinite weight, as it should, and a NaN whose payload is in the lower half alone shows as an infinity. The NaNs with an
//! upper half `0x7fff` or `0xffff` and a lower one from `0x8000` on wrap around to a zero of the other sign. That is not
//! carelessness but counting: there are 2²³ - 1 NaNs of a sign, and a NaN or infinite weight that also serves the
//! 32,769 masters that do round to it leaves room for 2²³ - 32,769. The optimizer never stores these patterns:
//! [`Remainder::store`] makes every NaN the quiet one, whose weight is a NaN.
//!
//! **IEEE halves** have no such remainder. An f16 in its normal range has about 2¹³ masters, its zero about 2³⁰; sixteen
//! bits more distinguish 2¹⁶ of each, so the record holds the master itself.
//!
//! **Stochastic.** A bf16 weight without a master takes `(bits + noise) >> 16` with 16 random bits: up with exactly the
//! probability of the part that is cut off, so that the mean is right and small updates count. A finite value never
//! becomes infinite.

use crate::format::half::{Bf16, F16, Half};

/// How weights are stored; what the model reads lies beside the record, the rest in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// Single precision; nothing in the record.
    F32,
    /// bf16, and the lower 16 bits of the fp32 master in the record: the master is exact.
    Bf16WithRemainder,
    /// IEEE half precision, and the fp32 master in the record.
    F16WithMaster,
    /// bf16 alone, rounded at random so that the mean is right.
    Bf16Stochastic,
}

/// The weights of a range of elements, as the model reads them. Halves are given as their bits.
#[derive(Debug)]
pub enum Weights<'a> {
    /// For [`WeightFormat::F32`].
    F32(&'a mut [f32]),
    /// For [`WeightFormat::Bf16WithRemainder`] and [`WeightFormat::Bf16Stochastic`].
    Bf16(&'a mut [u16]),
    /// For [`WeightFormat::F16WithMaster`].
    F16(&'a mut [u16]),
}

impl Weights<'_> {
    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) | Self::F16(x) => x.len(),
        }
    }

    /// Whether there is no element.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same weights for a shorter while.
    pub fn reborrow(&mut self) -> Weights<'_> {
        match self {
            Self::F32(x) => Weights::F32(x),
            Self::Bf16(x) => Weights::Bf16(x),
            Self::F16(x) => Weights::F16(x),
        }
    }

    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::Bf16(_) => "bf16",
            Self::F16(_) => "f16",
        }
    }
}

impl WeightFormat {
    /// Bytes of an element beside the record.
    #[must_use]
    pub const fn weight_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16WithRemainder | Self::F16WithMaster | Self::Bf16Stochastic => 2,
        }
    }

    /// What the record holds of an element: a name and its bytes.
    pub(crate) const fn column(self) -> Option<(&'static str, usize)> {
        match self {
            Self::F32 | Self::Bf16Stochastic => None,
            Self::Bf16WithRemainder => Some(("remainder", 2)),
            Self::F16WithMaster => Some(("master", 4)),
        }
    }

    pub(crate) const fn weights_name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16WithRemainder | Self::Bf16Stochastic => "bf16",
            Self::F16WithMaster => "f16",
        }
    }
}

/// One of the formats, as the loops use it.
pub(crate) trait WeightCells: Send + Sync {
    /// An element beside the record.
    type Weight: bytemuck::Pod + Send + Sync;
    /// An element in the record; of no size where the record has none.
    type Extra: bytemuck::Pod + Send + Sync;

    /// The master.
    fn load(weight: Self::Weight, extra: Self::Extra) -> f32;

    /// Stores the master; `noise` gives 32 random bits where the format rounds at random.
    fn store(master: f32, noise: impl FnOnce() -> u32) -> (Self::Weight, Self::Extra);
}

/// [`WeightFormat::F32`].
pub(crate) struct Whole;

impl WeightCells for Whole {
    type Weight = f32;
    type Extra = ();

    #[inline(always)]
    fn load(weight: f32, (): ()) -> f32 {
        weight
    }

    #[inline(always)]
    fn store(master: f32, _: impl FnOnce() -> u32) -> (f32, ()) {
        (master, ())
    }
}

/// [`WeightFormat::Bf16WithRemainder`].
pub(crate) struct Remainder;

impl Remainder {
    /// The weight and the remainder of a master: a bijection of all patterns.
    #[inline(always)]
    pub(crate) fn split(master: u32) -> (u16, u16) {
        ((master.wrapping_add(0x8000) >> 16) as u16, master as u16)
    }

    /// Undoes [`Self::split`].
    #[inline(always)]
    pub(crate) fn join(weight: u16, remainder: u16) -> u32 {
        // The carry is taken from the 32 bits of both halves, because vectors have no borrow between lanes of 16.
        let rounded = u32::from(weight) << 16;
        let carry = u32::from(remainder & 0x8000) << 1;
        rounded.wrapping_sub(carry) | u32::from(remainder)
    }
}

impl WeightCells for Remainder {
    type Weight = u16;
    type Extra = u16;

    #[inline(always)]
    fn load(weight: u16, remainder: u16) -> f32 {
        f32::from_bits(Self::join(weight, remainder))
    }

    #[inline(always)]
    fn store(master: f32, _: impl FnOnce() -> u32) -> (u16, u16) {
        Self::split(quiet(master).to_bits())
    }
}

/// [`WeightFormat::F16WithMaster`].
pub(crate) struct Master;

impl WeightCells for Master {
    type Weight = u16;
    type Extra = f32;

    #[inline(always)]
    fn load(_: u16, master: f32) -> f32 {
        master
    }

    #[inline(always)]
    fn store(master: f32, _: impl FnOnce() -> u32) -> (u16, f32) {
        (F16::narrow(master), master)
    }
}

/// [`WeightFormat::Bf16Stochastic`].
pub(crate) struct Stochastic;

impl WeightCells for Stochastic {
    type Weight = u16;
    type Extra = ();

    #[inline(always)]
    fn load(weight: u16, (): ()) -> f32 {
        <Bf16 as Half>::widen(weight)
    }

    #[inline(always)]
    fn store(master: f32, noise: impl FnOnce() -> u32) -> (u16, ()) {
        (round_at_random(master, noise()), ())
    }
}

/// The bf16 above or below `x` in magnitude, by the upper 16 bits of `noise`; what is representable stays, a finite
/// number stays finite, a NaN becomes the quiet one.
#[inline(always)]
pub(crate) fn round_at_random(x: f32, noise: u32) -> u16 {
    let x = quiet(x);
    let bits = x.to_bits();
    let down = bits >> 16;
    let rounded = bits.wrapping_add(noise >> 16) >> 16;
    // Only a finite number can reach infinity by the carry: an infinity and the quiet NaN have no lower half.
    let overflowed = rounded & 0x7fff == 0x7f80;
    (if overflowed { down } else { rounded }) as u16
}

/// `x`, with one pattern for every NaN.
#[inline(always)]
fn quiet(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(0x7fc0_0000) } else { x }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn every_one_of_the_masters_comes_back_from_its_weight_and_remainder() {
        let wrong: u64 = (0..=u16::MAX)
            .into_par_iter()
            .map(|upper| {
                let differing = |lower: u32| {
                    let master = u32::from(upper) << 16 | lower;
                    let (weight, remainder) = Remainder::split(master);
                    u32::from(Remainder::join(weight, remainder) != master)
                };
                u64::from((0..=0xffff).map(differing).sum::<u32>())
            })
            .sum();
        assert_eq!(wrong, 0);
    }

    #[test]
    fn every_master_that_is_a_number_rounds_half_up_in_magnitude_and_no_stored_nan_shows_as_a_number() {
        let wrong: u64 = (0..=u16::MAX)
            .into_par_iter()
            .map(|upper| {
                let differing = |lower: u32| {
                    let bits = u32::from(upper) << 16 | lower;
                    let master = f32::from_bits(bits);
                    let (weight, _) = Remainder::store(master, || 0);
                    let (sign, magnitude) = (bits & 1 << 31, bits & !(1 << 31));
                    let rounded = (sign | ((magnitude + 0x8000) & !0xffff)) >> 16;
                    let right = if master.is_nan() {
                        f32::from_bits(u32::from(weight) << 16).is_nan()
                    } else {
                        u32::from(weight) == rounded
                    };
                    u32::from(!right)
                };
                u64::from((0..=0xffff).map(differing).sum::<u32>())
            })
            .sum();
        assert_eq!(wrong, 0);
    }

    #[test]
    fn rounding_at_random_goes_up_as_often_as_the_lower_half_says() {
        for lower in [0_u32, 1, 0x1234, 0x8000, 0xffff] {
            for sign in [0, 1 << 31] {
                let x = f32::from_bits(sign | 0x3fab_0000 | lower);
                let ups = (0..=0xffff_u32).filter(|r| round_at_random(x, r << 16) & 0x7fff == 0x3fac).count();
                let downs =
                    (0..=0xffff_u32).filter(|r| round_at_random(x, r << 16) & 0x7fff == 0x3fab).count();
                assert_eq!((ups, downs), (lower as usize, 0x1_0000 - lower as usize));
            }
        }
    }

    #[test]
    fn rounding_at_random_keeps_what_is_finite_finite_and_what_is_not_as_it_is() {
        for noise in [0, 1 << 16, 0x8000_0000, u32::MAX] {
            assert_eq!(round_at_random(f32::MAX, noise), 0x7f7f);
            assert_eq!(round_at_random(-f32::MAX, noise), 0xff7f);
            assert_eq!(round_at_random(f32::INFINITY, noise), 0x7f80);
            assert_eq!(round_at_random(f32::NEG_INFINITY, noise), 0xff80);
            assert_eq!(round_at_random(f32::from_bits(0x7f80_0001), noise), 0x7fc0);
            assert_eq!(round_at_random(-0.0, noise), 0x8000);
        }
    }
}
