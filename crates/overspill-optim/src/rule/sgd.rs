//! Stochastic gradient descent with momentum, as `torch.optim.SGD` has it.
//!
//! ```text
//! g = gradient_scale * grad + weight_decay * p
//! b = momentum * b + (1 - dampening) * g      in the first step: b = g
//! p = p - lr * b                              with nesterov: p - lr * (g + momentum * b)
//! ```

use crate::rule::ElementRule;

/// The constants of SGD that no schedule changes, in the meaning of `torch.optim.SGD`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SgdConfig {
    /// What is kept of the running sum of gradients, in `[0, 1)`; only for a rule with momentum.
    pub momentum: f64,
    /// What the running sum does not take of a gradient.
    pub dampening: f64,
    /// Looks ahead: the update adds the gradient once more.
    pub nesterov: bool,
}

/// The coefficients of one step of SGD.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdStep {
    gradient_scale: f32,
    weight_decay: f32,
    lr: f32,
    /// What is kept of the buffer, and what it takes of the gradient.
    keep: f32,
    take: f32,
    /// What the update takes of the buffer and of the gradient.
    of_buffer: f32,
    of_gradient: f32,
}

impl SgdStep {
    /// The coefficients of step number `step`, counted from 1 (0 is taken as 1); the first fills the buffer with the
    /// gradient. `gradient_scale` multiplies every gradient.
    #[must_use]
    pub fn new(config: &SgdConfig, lr: f64, weight_decay: f64, step: u64, gradient_scale: f32) -> Self {
        let SgdConfig { momentum, dampening, nesterov } = *config;
        let (keep, take) = if step <= 1 { (0.0, 1.0) } else { (momentum as f32, (1.0 - dampening) as f32) };
        let (of_buffer, of_gradient) = if nesterov { (momentum as f32, 1.0) } else { (1.0, 0.0) };
        Self {
            gradient_scale,
            weight_decay: weight_decay as f32,
            lr: lr as f32,
            keep,
            take,
            of_buffer,
            of_gradient,
        }
    }

    pub(crate) const fn rule(self) -> Plain {
        Plain(self)
    }

    pub(crate) const fn momentum(self) -> Momentum {
        Momentum(self)
    }
}

/// SGD without a moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain(SgdStep);

impl ElementRule<0> for Plain {
    const NARROW: bool = false;
    const SIGNED: [bool; 0] = [];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        self.0.gradient_scale
    }

    #[inline(always)]
    fn element(&self, param: f32, grad: f32, []: [f32; 0]) -> (f32, [f32; 0]) {
        let grad = param.mul_add(self.0.weight_decay, grad);
        (grad.mul_add(-self.0.lr, param), [])
    }
}

/// SGD with its `momentum_buffer`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Momentum(SgdStep);

impl ElementRule<1> for Momentum {
    const NARROW: bool = true;
    const SIGNED: [bool; 1] = [true];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        self.0.gradient_scale
    }

    #[inline(always)]
    fn element(&self, param: f32, grad: f32, [buffer]: [f32; 1]) -> (f32, [f32; 1]) {
        let step = &self.0;
        let grad = param.mul_add(step.weight_decay, grad);
        let buffer = grad.mul_add(step.take, buffer * step.keep);
        let update = buffer.mul_add(step.of_buffer, grad * step.of_gradient);
        (update.mul_add(-step.lr, param), [buffer])
    }
}
