//! Adagrad, as `torch.optim.Adagrad` has it.
//!
//! ```text
//! g = gradient_scale * grad + weight_decay * p
//! s = s + g * g
//! p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
//! ```

use crate::rule::ElementRule;

/// The constants of Adagrad that no schedule changes, in the meaning of `torch.optim.Adagrad`. (What the sum begins with
/// belongs to [`Rule::Adagrad`](crate::Rule::Adagrad).)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdagradConfig {
    /// How much the learning rate falls with each step.
    pub lr_decay: f64,
    /// Added to the root of the sum, so that a zero gradient divides by something.
    pub eps: f64,
}

impl Default for AdagradConfig {
    /// PyTorch's values: 0 and 1e-10.
    fn default() -> Self {
        Self { lr_decay: 0.0, eps: 1e-10 }
    }
}

/// The coefficients of one step of Adagrad.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdagradStep {
    gradient_scale: f32,
    weight_decay: f32,
    lr: f32,
    eps: f32,
}

impl AdagradStep {
    /// The coefficients of step number `step`, counted from 1 (0 is taken as 1); `gradient_scale` multiplies every
    /// gradient.
    #[must_use]
    pub fn new(config: &AdagradConfig, lr: f64, weight_decay: f64, step: u64, gradient_scale: f32) -> Self {
        let lr = lr / (1.0 + (step.max(1) - 1) as f64 * config.lr_decay);
        Self { gradient_scale, weight_decay: weight_decay as f32, lr: lr as f32, eps: config.eps as f32 }
    }
}

/// One moment: `sum`.
impl ElementRule<1> for AdagradStep {
    const NARROW: bool = true;
    const SIGNED: [bool; 1] = [false];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        self.gradient_scale
    }

    #[inline(always)]
    fn element(&self, param: f32, grad: f32, [sum]: [f32; 1]) -> (f32, [f32; 1]) {
        let grad = param.mul_add(self.weight_decay, grad);
        let sum = grad.mul_add(grad, sum);
        (param - self.lr * grad / (sum.sqrt() + self.eps), [sum])
    }
}
