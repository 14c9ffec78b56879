//! Dynamic loss scaling: what the loss is multiplied with, so that small gradients survive half precision.
//!
//! A state machine without side effects, with the rules of `torch.amp.GradScaler`: a step with a non-finite gradient is
//! skipped and the scale backs off; after enough good steps in a row the scale grows. The scale divides the gradients in the
//! optimizer's pass, as part of the step's gradient scale.

use crate::recipe::Outcome;

/// How the scale moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScalerConfig {
    /// The first scale, positive and finite.
    pub initial_scale: f32,
    /// What the scale is multiplied with after `growth_interval_steps` good steps.
    pub growth_factor: f32,
    /// What the scale is multiplied with after a bad step.
    pub backoff_factor: f32,
    /// Good steps in a row that let the scale grow.
    pub growth_interval_steps: u32,
}

impl Default for LossScalerConfig {
    /// PyTorch's values: 65536, 2, 0.5, 2000.
    fn default() -> Self {
        Self { initial_scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval_steps: 2000 }
    }
}

/// The scale of the loss, from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScaler {
    config: LossScalerConfig,
    scale: f32,
    good_steps: u32,
}

impl LossScaler {
    /// Starts with the initial scale.
    #[must_use]
    pub const fn new(config: LossScalerConfig) -> Self {
        Self { config, scale: config.initial_scale, good_steps: 0 }
    }

    /// Goes on where another one was: its [`scale`](Self::scale) and [`good_steps`](Self::good_steps).
    #[must_use]
    pub const fn resume(config: LossScalerConfig, scale: f32, good_steps: u32) -> Self {
        Self { config, scale, good_steps }
    }

    /// What the loss of the next step is multiplied with.
    #[must_use]
    pub const fn scale(&self) -> f32 {
        self.scale
    }

    /// What the gradients of the next step are multiplied with in turn.
    #[must_use]
    pub const fn unscale(&self) -> f32 {
        1.0 / self.scale
    }

    /// Good steps since the scale last moved.
    #[must_use]
    pub const fn good_steps(&self) -> u32 {
        self.good_steps
    }

    /// Takes note of a step. The scale stays positive and finite.
    pub fn update(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::NonFinite => {
                self.scale = (self.scale * self.config.backoff_factor).max(f32::MIN_POSITIVE);
                self.good_steps = 0;
            }
            Outcome::Updated => {
                self.good_steps = self.good_steps.saturating_add(1);
                if self.good_steps >= self.config.growth_interval_steps {
                    let grown = self.scale * self.config.growth_factor;
                    if grown.is_finite() {
                        self.scale = grown;
                    }
                    self.good_steps = 0;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaler(initial_scale: f32) -> LossScaler {
        LossScaler::new(LossScalerConfig {
            initial_scale,
            growth_interval_steps: 3,
            ..LossScalerConfig::default()
        })
    }

    #[test]
    fn the_scale_grows_after_good_steps_in_a_row_and_backs_off_at_once() {
        use Outcome::{NonFinite, Updated};
        let mut scaler = scaler(8.0);
        let mut scales = Vec::new();
        for outcome in [Updated, Updated, NonFinite, Updated, Updated, Updated, Updated, NonFinite, NonFinite]
        {
            scaler.update(outcome);
            scales.push(scaler.scale());
        }
        assert_eq!(scales, [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 4.0, 2.0]);
        assert_eq!(scaler.scale() * scaler.unscale(), 1.0);
    }

    #[test]
    fn the_scale_stays_positive_and_finite() {
        let (mut up, mut down) = (scaler(1.0), scaler(1.0));
        for _ in 0..1000 {
            up.update(Outcome::Updated);
            down.update(Outcome::NonFinite);
        }
        assert_eq!(up.scale(), 2.0_f32.powi(127));
        assert!(down.scale() > 0.0 && down.unscale().is_finite());
    }

    #[test]
    fn a_resumed_scaler_goes_on() {
        let mut whole = scaler(8.0);
        whole.update(Outcome::Updated);
        whole.update(Outcome::Updated);
        let mut resumed = LossScaler::resume(whole.config, whole.scale(), whole.good_steps());
        resumed.update(Outcome::Updated);
        assert_eq!(resumed.scale(), 16.0);
    }
}
