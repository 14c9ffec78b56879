//! Random bits for stochastic rounding that depend on nothing but where they are used.
//!
//! The bits of an element are a function of the run's seed, the parameter, the step, the column of the record and the
//! element's index in its parameter. No generator has a state, so any cut into tiles, any order of the tiles and any
//! number of threads round alike, and a resumed run rounds as the uninterrupted one would have.
//!
//! A [`Noise`] is two keys of 32 bits, derived once per chunk in 64-bit arithmetic; an element costs two rounds of
//! multiplications and shifts in 32 bits, which every vector unit has.

/// What tells one rounding from all others, besides the column and the element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The seed of the run.
    pub seed: u64,
    /// Number of the parameter, the same in every step and on every rank.
    pub parameter: u64,
    /// Number of the step.
    pub step: u64,
    /// Index in the parameter of the first element that is given.
    pub element: u64,
}

impl Origin {
    /// The origin of what follows `elements` later in the same parameter.
    #[must_use]
    pub const fn advance(self, elements: u64) -> Self {
        Self { element: self.element.wrapping_add(elements), ..self }
    }

    /// The elements from this one on whose index has the same upper 32 bits: one [`Noise`] is good for these.
    pub(crate) fn run_length(self) -> u64 {
        (1 << 32) - (self.element & u64::from(u32::MAX))
    }
}

/// The random bits of one column, for the indices that share their upper 32 bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Noise {
    keys: [u32; 2],
    first: u32,
}

impl Noise {
    /// The bits of column number `column` from the origin's element on.
    pub(crate) fn new(origin: Origin, column: u64) -> Self {
        let Origin { seed, parameter, step, element } = origin;
        let key =
            [parameter, step, column, element >> 32].into_iter().fold(seed, |key, part| mix(key ^ mix(part)));
        Self { keys: [key as u32, (key >> 32) as u32], first: element as u32 }
    }

    /// 32 random bits of the element `offset` after the first.
    #[inline(always)]
    pub(crate) fn bits(&self, offset: u32) -> u32 {
        let [first_key, second_key] = self.keys;
        scramble(scramble(self.first.wrapping_add(offset) ^ first_key) ^ second_key)
    }
}

/// A bijection of 64 bits in which every bit of the input moves every bit of the output (the finalizer of
/// `SplitMix64` behind its increment).
const fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The same for 32 bits: two multiplications, with the constants of least measured bias (Wellons, "hash prospector").
#[inline(always)]
const fn scramble(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin = Origin { seed: 7, parameter: 3, step: 11, element: 0 };

    #[test]
    fn the_bits_of_an_element_do_not_depend_on_where_a_run_begins() {
        let whole = Noise::new(ORIGIN, 1);
        for start in [1, 5, 4096, u32::MAX] {
            let part = Noise::new(ORIGIN.advance(u64::from(start)), 1);
            let left = u32::try_from(ORIGIN.advance(u64::from(start)).run_length()).unwrap();
            for offset in 0..left.min(100) {
                assert_eq!(part.bits(offset), whole.bits(start + offset));
            }
        }
    }

    #[test]
    fn every_part_of_an_origin_changes_the_bits() {
        let bits = |origin, column| -> Vec<u32> {
            let noise = Noise::new(origin, column);
            (0..8).map(|i| noise.bits(i)).collect()
        };
        let others = [
            bits(Origin { seed: 8, ..ORIGIN }, 0),
            bits(Origin { parameter: 4, ..ORIGIN }, 0),
            bits(Origin { step: 12, ..ORIGIN }, 0),
            bits(Origin { element: 1 << 32, ..ORIGIN }, 0),
            bits(Origin { seed: 3, parameter: 7, ..ORIGIN }, 0),
            bits(ORIGIN, 1),
        ];
        for (i, other) in others.iter().enumerate() {
            assert!(bits(ORIGIN, 0).iter().zip(other).all(|(a, b)| a != b), "{i}");
        }
    }

    #[test]
    fn every_bit_is_set_half_of_the_time_and_independent_of_the_next_step() {
        const ELEMENTS: u32 = 1 << 16;
        let (now, next) = (Noise::new(ORIGIN, 0), Noise::new(Origin { step: 12, ..ORIGIN }, 0));
        for bit in 0..32 {
            let set = (0..ELEMENTS).filter(|i| now.bits(*i) >> bit & 1 == 1).count() as f64;
            let equal =
                (0..ELEMENTS).filter(|i| (now.bits(*i) ^ next.bits(*i)) >> bit & 1 == 0).count() as f64;
            // Five standard deviations of a fair coin.
            let bound = 5.0 * (f64::from(ELEMENTS) / 4.0).sqrt();
            for count in [set, equal] {
                assert!((count - f64::from(ELEMENTS) / 2.0).abs() < bound, "bit {bit}: {count}");
            }
        }
    }
}
