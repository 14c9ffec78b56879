//! Adam and AdamW, with or without the running maximum of AMSGrad.
//!
//! ```text
//! g = gradient_scale * grad
//! g = g + weight_decay * p                   Adam
//! p = p * (1 - lr * weight_decay)            AdamW
//! m = m + (g - m) * (1 - beta1)
//! v = beta2 * v + (1 - beta2) * g * g
//! d = sqrt(v), of AMSGrad: sqrt(max(v, largest v so far))
//! p = p - (lr / (1 - beta1^t)) * m / (d / sqrt(1 - beta2^t) + eps)
//! ```

use crate::rule::ElementRule;

/// The constants of Adam and AdamW that no schedule changes, in the meaning of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the running mean of the gradient, in `[0, 1)`.
    pub beta1: f64,
    /// Decay of the running mean of the squared gradient, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the root of the second moment, so that a zero gradient divides by something.
    pub eps: f64,
}

impl Default for AdamWConfig {
    /// The values that language models are trained with: 0.9, 0.95, 1e-8.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8 }
    }
}

/// The coefficients of one step of AdamW; every tile of a parameter group uses the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep(Coefficients);

/// The coefficients of one step of Adam, whose weight decay is part of the gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep(Coefficients);

impl AdamWStep {
    /// The coefficients of step number `step`, counted from 1 (0 is taken as 1).
    ///
    /// `lr` is this step's learning rate; `gradient_scale` multiplies every gradient and joins what the caller has to
    /// divide by: accumulated batches, loss scale, clipping to a norm.
    #[must_use]
    pub fn new(config: &AdamWConfig, lr: f64, weight_decay: f64, step: u64, gradient_scale: f32) -> Self {
        Self(Coefficients::new(config, lr, 1.0 - lr * weight_decay, step, gradient_scale))
    }

    pub(crate) const fn rule(self) -> Decoupled {
        Decoupled(self.0)
    }

    pub(crate) const fn amsgrad(self) -> DecoupledAmsgrad {
        DecoupledAmsgrad(self.0)
    }
}

impl AdamStep {
    /// As [`AdamWStep::new`], but with `weight_decay` times the parameter added to the gradient.
    #[must_use]
    pub fn new(config: &AdamWConfig, lr: f64, weight_decay: f64, step: u64, gradient_scale: f32) -> Self {
        Self(Coefficients::new(config, lr, weight_decay, step, gradient_scale))
    }

    pub(crate) const fn rule(self) -> Coupled {
        Coupled(self.0)
    }

    pub(crate) const fn amsgrad(self) -> CoupledAmsgrad {
        CoupledAmsgrad(self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Coefficients {
    gradient_scale: f32,
    /// What multiplies the parameter (AdamW), or what the gradient gets of it (Adam).
    decay: f32,
    /// The weight of the gradient in the running mean; less one when that is computed from the gradient's end, as it is
    /// from the nearer one.
    exp_avg_weight: f32,
    from_gradient: bool,
    beta2: f32,
    exp_avg_sq_weight: f32,
    step_size: f32,
    bias_correction2_sqrt: f32,
    eps: f32,
}

impl Coefficients {
    fn new(config: &AdamWConfig, lr: f64, decay: f64, step: u64, gradient_scale: f32) -> Self {
        let AdamWConfig { beta1, beta2, eps } = *config;
        let step = step.max(1) as f64;
        let weight = (1.0 - beta1) as f32;
        Self {
            gradient_scale,
            decay: decay as f32,
            exp_avg_weight: if weight < 0.5 { weight } else { weight - 1.0 },
            from_gradient: weight >= 0.5,
            beta2: beta2 as f32,
            exp_avg_sq_weight: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - beta1.powf(step))) as f32,
            bias_correction2_sqrt: (1.0 - beta2.powf(step)).sqrt() as f32,
            eps: eps as f32,
        }
    }

    #[inline(always)]
    fn moments(&self, grad: f32, exp_avg: f32, exp_avg_sq: f32) -> (f32, f32) {
        let nearer = if self.from_gradient { grad } else { exp_avg };
        let exp_avg = (grad - exp_avg).mul_add(self.exp_avg_weight, nearer);
        let exp_avg_sq = (self.exp_avg_sq_weight * grad).mul_add(grad, exp_avg_sq * self.beta2);
        (exp_avg, exp_avg_sq)
    }

    #[inline(always)]
    fn moved(&self, param: f32, exp_avg: f32, exp_avg_sq: f32) -> f32 {
        let denominator = exp_avg_sq.sqrt() / self.bias_correction2_sqrt + self.eps;
        param - self.step_size * exp_avg / denominator
    }
}

/// AdamW: `exp_avg`, `exp_avg_sq`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decoupled(Coefficients);

impl ElementRule<2> for Decoupled {
    const NARROW: bool = true;
    const SIGNED: [bool; 2] = [true, false];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        self.0.gradient_scale
    }

    #[inline(always)]
    fn element(&self, param: f32, grad: f32, [exp_avg, exp_avg_sq]: [f32; 2]) -> (f32, [f32; 2]) {
        let (exp_avg, exp_avg_sq) = self.0.moments(grad, exp_avg, exp_avg_sq);
        (self.0.moved(param * self.0.decay, exp_avg, exp_avg_sq), [exp_avg, exp_avg_sq])
    }
}

/// AdamW with AMSGrad: `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecoupledAmsgrad(Coefficients);

impl ElementRule<3> for DecoupledAmsgrad {
    const NARROW: bool = false;
    const SIGNED: [bool; 3] = [true, false, false];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        self.0.gradient_scale
    }

    #[inline(always)]
    fn element(&self, param: f32, grad: f32, [exp_avg, exp_avg_sq, largest]: [f32; 3]) -> (f32, [f32; 3]) {
        let (exp_avg, exp_avg_sq) = self.0.moments(grad, exp_avg, exp_avg_sq);
        let largest = if exp_avg_sq > largest { exp_avg_sq } else { largest };
        (self.0.moved(param * self.0.decay, exp_avg, largest), [exp_avg, exp_avg_sq, largest])
    }
}

/// Adam: `exp_avg`, `exp_avg_sq`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Coupled(Coefficients);

impl ElementRule<2> for Coupled {
    const NARROW: bool = true;
    const SIGNED: [bool; 2] = [true, false];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        self.0.gradient_scale
    }

    #[inline(always)]
    fn element(&self, param: f32, grad: f32, [exp_avg, exp_avg_sq]: [f32; 2]) -> (f32, [f32; 2]) {
        let (exp_avg, exp_avg_sq) = self.0.moments(param.mul_add(self.0.decay, grad), exp_avg, exp_avg_sq);
        (self.0.moved(param, exp_avg, exp_avg_sq), [exp_avg, exp_avg_sq])
    }
}

/// Adam with AMSGrad: `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CoupledAmsgrad(Coefficients);

impl ElementRule<3> for CoupledAmsgrad {
    const NARROW: bool = false;
    const SIGNED: [bool; 3] = [true, false, false];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        self.0.gradient_scale
    }

    #[inline(always)]
    fn element(&self, param: f32, grad: f32, [exp_avg, exp_avg_sq, largest]: [f32; 3]) -> (f32, [f32; 3]) {
        let (exp_avg, exp_avg_sq) = self.0.moments(param.mul_add(self.0.decay, grad), exp_avg, exp_avg_sq);
        let largest = if exp_avg_sq > largest { exp_avg_sq } else { largest };
        (self.0.moved(param, exp_avg, largest), [exp_avg, exp_avg_sq, largest])
    }
}
