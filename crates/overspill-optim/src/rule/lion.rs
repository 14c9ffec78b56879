//! Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023).
//!
//! ```text
//! g = gradient_scale * grad
//! p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
//! m = beta2 * m + (1 - beta2) * g
//! ```

use crate::rule::ElementRule;

/// The constants of Lion that no schedule changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionConfig {
    /// What the update takes of the momentum, in `[0, 1)`; the rest is the gradient.
    pub beta1: f64,
    /// Decay of the momentum, in `[0, 1)`.
    pub beta2: f64,
}

impl Default for LionConfig {
    /// The paper's values: 0.9 and 0.99.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99 }
    }
}

/// The coefficients of one step of Lion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionStep {
    gradient_scale: f32,
    decay: f32,
    lr: f32,
    beta1: f32,
    beta1_rest: f32,
    beta2: f32,
    beta2_rest: f32,
}

impl LionStep {
    /// The coefficients of a step with this learning rate; no step differs from the first. `gradient_scale` multiplies
    /// every gradient.
    #[must_use]
    pub fn new(config: &LionConfig, lr: f64, weight_decay: f64, gradient_scale: f32) -> Self {
        let LionConfig { beta1, beta2 } = *config;
        Self {
            gradient_scale,
            decay: (1.0 - lr * weight_decay) as f32,
            lr: lr as f32,
            beta1: beta1 as f32,
            beta1_rest: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            beta2_rest: (1.0 - beta2) as f32,
        }
    }
}

/// One moment: `exp_avg`.
impl ElementRule<1> for LionStep {
    const NARROW: bool = true;
    const SIGNED: [bool; 1] = [true];

    #[inline(always)]
    fn gradient_scale(&self) -> f32 {
        self.gradient_scale
    }

    #[inline(always)]
    fn element(&self, param: f32, grad: f32, [exp_avg]: [f32; 1]) -> (f32, [f32; 1]) {
        let direction = exp_avg * self.beta1 + grad * self.beta1_rest;
        // Zero has no sign here: f32::signum would give it one.
        let up = if direction > 0.0 { self.lr } else { 0.0 };
        let update = if direction < 0.0 { -self.lr } else { up };
        let exp_avg = exp_avg * self.beta2 + grad * self.beta2_rest;
        (param * self.decay - update, [exp_avg])
    }
}
