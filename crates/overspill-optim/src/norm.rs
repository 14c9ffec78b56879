//! The squared length of a vector, the same on every machine: the order of the additions is fixed by the length.
//!
//! A slice is cut into blocks of one chunk; a block is summed in sixteen `f64` lanes, element `i` into lane `i % 16`;
//! the lanes of a block are added pairwise and the blocks from first to last. Threads take whole blocks, so their
//! number does not matter. The square of an `f32` is exact in `f64` and cannot overflow: the sum of squares is finite
//! exactly when every element is, and the global norm doubles as the check for infinite and NaN gradients.

use std::marker::PhantomData;

use rayon::prelude::*;

use crate::CHUNK_ELEMENTS;
use crate::format::gradient::{Gradient, GradientFormat, Single};
use crate::format::half::{Bf16, F16};
use crate::isa::{Isa, Kernel, Load};

/// Lanes of a block's sum: two registers of AVX-512, enough to hide the latency of an addition behind the reads.
const LANES: usize = 16;

const _: () = assert!(LANES.is_power_of_two(), "the lanes are added pairwise");

/// The sum of the squares of `x`, accumulated in `f64`, on all cores; zero for an empty slice.
///
/// The result is non-finite exactly when an element of `x` is. The same slice gives the same bits for any number of
/// threads and any `isa`; the sums of its parts need not add up to them.
#[must_use]
pub fn sum_of_squares(isa: Isa, x: &[f32]) -> f64 {
    summed::<Single>(isa, x)
}

impl Gradient<'_> {
    /// The sum of squares of what the gradient is in single precision: [`sum_of_squares`] without a copy.
    #[must_use]
    pub fn sum_of_squares(&self, isa: Isa) -> f64 {
        match self {
            Self::F32(x) => summed::<Single>(isa, x),
            Self::Bf16(x) => summed::<Bf16>(isa, x),
            Self::F16(x) => summed::<F16>(isa, x),
        }
    }
}

fn summed<G: GradientFormat>(isa: Isa, x: &[G::Cell]) -> f64 {
    let block_sum = |block| isa.run(BlockSum::<G> { block, format: PhantomData });
    if x.len() <= CHUNK_ELEMENTS {
        return block_sum(x);
    }
    let blocks: Vec<f64> = x.par_chunks(CHUNK_ELEMENTS).map(block_sum).collect();
    blocks.iter().sum()
}

/// The sum of squares of one block.
struct BlockSum<'a, G: GradientFormat> {
    block: &'a [G::Cell],
    format: PhantomData<G>,
}

impl<G: GradientFormat> Kernel for BlockSum<'_, G> {
    type Output = f64;

    #[inline(always)]
    fn run<L: Load>(self) -> f64 {
        let mut lanes = [0.0_f64; LANES];
        let (rows, rest) = self.block.as_chunks::<LANES>();
        for row in rows {
            for (lane, element) in lanes.iter_mut().zip(row) {
                *lane = L::load(*lane + square(G::widen(*element)));
            }
        }
        for (lane, element) in lanes.iter_mut().zip(rest) {
            *lane = L::load(*lane + square(G::widen(*element)));
        }
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }
}

/// The square of `x`, without rounding.
#[inline(always)]
fn square(x: f32) -> f64 {
    let x = f64::from(x);
    x * x
}
