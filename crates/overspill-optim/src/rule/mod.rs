//! The update rules: what a step makes of one element, or of a whole parameter.
//!
//! A step's hyper-parameters are plain values: the coefficients are computed once in `f64`, rounded to `f32`, and given
//! with each call, so that every parameter group has its own. The elements are `f32`; the operations, their order, and which
//! multiplication is fused with the addition behind it are those of PyTorch's single-tensor implementations on a CPU with
//! fused operations (`lerp`, `addcmul` and `add` with a factor fuse; `addcdiv` does not). They are written out, so the
//! compiler has nothing to decide: a CPU without fused operations takes longer for the same bits.

pub(crate) mod adafactor;
pub(crate) mod adagrad;
pub(crate) mod adam;
pub(crate) mod lion;
pub(crate) mod matmul;
pub(crate) mod muon;
pub(crate) mod sgd;

use adagrad::AdagradStep;
use adam::{AdamStep, AdamWStep};
use lion::LionStep;
use sgd::SgdStep;

/// A rule whose elements do not see each other: any cut of a parameter gives the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay.
    AdamW {
        /// Divides by the largest second moment so far.
        amsgrad: bool,
    },
    /// Adam with the weight decay in the gradient.
    Adam {
        /// Divides by the largest second moment so far.
        amsgrad: bool,
    },
    /// Stochastic gradient descent.
    Sgd {
        /// Keeps a running sum of gradients.
        momentum: bool,
    },
    /// The root of the sum of all squared gradients.
    Adagrad {
        /// What that sum begins with.
        initial_accumulator: f32,
    },
    /// The sign of the interpolated momentum.
    Lion,
}

impl Rule {
    /// The names of the moments and of their scales, as PyTorch calls the moments.
    pub(crate) const fn moments(&self) -> &'static [(&'static str, &'static str)] {
        const EXP_AVG: (&str, &str) = ("exp_avg", "exp_avg_scale");
        const EXP_AVG_SQ: (&str, &str) = ("exp_avg_sq", "exp_avg_sq_scale");
        match self {
            Self::AdamW { amsgrad: true } | Self::Adam { amsgrad: true } => {
                &[EXP_AVG, EXP_AVG_SQ, ("max_exp_avg_sq", "max_exp_avg_sq_scale")]
            }
            Self::AdamW { .. } | Self::Adam { .. } => &[EXP_AVG, EXP_AVG_SQ],
            Self::Sgd { momentum: true } => &[("momentum_buffer", "momentum_buffer_scale")],
            Self::Sgd { .. } => &[],
            Self::Adagrad { .. } => &[("sum", "sum_scale")],
            Self::Lion => &[EXP_AVG],
        }
    }

    /// Whether a moment may be negative.
    pub(crate) const fn signed(&self, moment: usize) -> bool {
        match self {
            Self::AdamW { .. } | Self::Adam { .. } => moment == 0,
            Self::Sgd { .. } | Self::Lion => true,
            Self::Adagrad { .. } => false,
        }
    }

    /// What every moment begins with.
    pub(crate) const fn initial_moment(&self) -> f32 {
        match self {
            Self::Adagrad { initial_accumulator } => *initial_accumulator,
            Self::AdamW { .. } | Self::Adam { .. } | Self::Sgd { .. } | Self::Lion => 0.0,
        }
    }

    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::AdamW { .. } => "AdamW",
            Self::Adam { .. } => "Adam",
            Self::Sgd { .. } => "SGD",
            Self::Adagrad { .. } => "Adagrad",
            Self::Lion => "Lion",
        }
    }
}

/// The coefficients of one step of a [`Rule`]; each parameter group has its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// For [`Rule::AdamW`].
    AdamW(AdamWStep),
    /// For [`Rule::Adam`].
    Adam(AdamStep),
    /// For [`Rule::Sgd`].
    Sgd(SgdStep),
    /// For [`Rule::Adagrad`].
    Adagrad(AdagradStep),
    /// For [`Rule::Lion`].
    Lion(LionStep),
}

impl Step {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "AdamW",
            Self::Adam(_) => "Adam",
            Self::Sgd(_) => "SGD",
            Self::Adagrad(_) => "Adagrad",
            Self::Lion(_) => "Lion",
        }
    }
}

/// One element of a rule with `N` moments, with the coefficients in `self`.
pub(crate) trait ElementRule<const N: usize>: Copy + Send + Sync {
    /// Whether the moments may be stored in fewer than 32 bits.
    const NARROW: bool;
    /// Which moments may be negative.
    const SIGNED: [bool; N];

    /// What multiplies every gradient before [`element`](Self::element) sees it.
    fn gradient_scale(&self) -> f32;

    /// The new parameter and moments.
    fn element(&self, param: f32, grad: f32, moments: [f32; N]) -> (f32, [f32; N]);
}
