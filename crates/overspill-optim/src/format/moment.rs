//! How the running moments are stored: single precision, bf16, or eight bits with a scale per block.
//!
//! The smaller forms round at random (see [`Origin`](crate::Origin)). Rounding to the nearest would stall them: with
//! `beta2 = 0.999` a second moment changes by a thousandth of itself in a step, less than half the spacing of bf16 (1/256 to
//! 1/128) or of eight bits (1/16 to 1/8), and so would never decay. At random it moves rarely, but by the right mean.

use crate::format::half::{Bf16, Half};
use crate::format::weight::round_at_random;

/// Elements that share a scale in [`MomentFormat::Blocks8`]; parameters begin with a block of their own.
pub const BLOCK_ELEMENTS: usize = 256;

/// How moments are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MomentFormat {
    /// Single precision.
    F32,
    /// bf16, rounded at random.
    Bf16,
    /// Eight bits in a floating-point code of their own, rounded at random, and one `f32` for each
    /// [`BLOCK_ELEMENTS`]: the largest magnitude of the block.
    Blocks8,
}

impl MomentFormat {
    /// Bytes of an element, scales not counted.
    pub(crate) const fn cell_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Blocks8 => 1,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Blocks8 => "8-bit",
        }
    }
}

/// One of the formats that store each element on its own.
pub(crate) trait MomentCells: Send + Sync {
    type Cell: bytemuck::Pod + Send + Sync;

    fn load(cell: Self::Cell) -> f32;

    /// Stores `x`; `noise` gives 32 random bits where the format rounds at random.
    fn store(x: f32, noise: impl FnOnce() -> u32) -> Self::Cell;
}

/// [`MomentFormat::F32`].
pub(crate) struct SingleMoments;

impl MomentCells for SingleMoments {
    type Cell = f32;

    #[inline(always)]
    fn load(cell: f32) -> f32 {
        cell
    }

    #[inline(always)]
    fn store(x: f32, _: impl FnOnce() -> u32) -> f32 {
        x
    }
}

/// [`MomentFormat::Bf16`].
pub(crate) struct Bf16Moments;

impl MomentCells for Bf16Moments {
    type Cell = u16;

    #[inline(always)]
    fn load(cell: u16) -> f32 {
        <Bf16 as Half>::widen(cell)
    }

    #[inline(always)]
    fn store(x: f32, noise: impl FnOnce() -> u32) -> u16 {
        round_at_random(x, noise())
    }
}
