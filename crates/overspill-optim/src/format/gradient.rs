//! Gradients as the backward pass leaves them: `f32`, bf16 or IEEE halves.

use crate::format::half::{Bf16, F16, Half};

/// The gradient of a range of elements. Halves are given as their bits.
#[derive(Clone, Copy, Debug)]
pub enum Gradient<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// The upper halves of single precision.
    Bf16(&'a [u16]),
    /// IEEE half precision.
    F16(&'a [u16]),
}

impl Gradient<'_> {
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
}

/// One of the formats; its numbers are all `f32`.
pub(crate) trait GradientFormat: Send + Sync {
    type Cell: Copy + Send + Sync;

    fn widen(cell: Self::Cell) -> f32;
}

/// Single precision.
pub(crate) struct Single;

impl GradientFormat for Single {
    type Cell = f32;

    #[inline(always)]
    fn widen(cell: f32) -> f32 {
        cell
    }
}

impl GradientFormat for Bf16 {
    type Cell = u16;

    #[inline(always)]
    fn widen(cell: u16) -> f32 {
        <Self as Half>::widen(cell)
    }
}

impl GradientFormat for F16 {
    type Cell = u16;

    #[inline(always)]
    fn widen(cell: u16) -> f32 {
        <Self as Half>::widen(cell)
    }
}
