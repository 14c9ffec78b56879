//! The scale of the loss in a run: where it is, and whether a step is worth taking.
//!
//! The loss is multiplied with the scale before anything is derived from it, so all gradients are, and the update divides
//! them again, in the pass that reads them anyway. A gradient that overflowed is found by the norm, before the update has
//! touched anything: the step is skipped, and the scale backs off. At a scale of 1 or less it is not the scale that made
//! the gradient too long, and the run ends as any other does.
//!
//! Gradients are computed and kept in single precision here, whatever the weights. Their range is that of bf16 and far
//! wider than that of fp16, so the scale saves nothing that would be lost without it: a power of two, as all its moves are,
//! changes no bit of a run that does not overflow. It is what a state needs to go on where gradients are fp16.

use overspill_optim::{LossScaler, LossScalerConfig, Outcome};

use crate::identity::LossScale;

/// Multiplies the loss, and moves from step to step; without a scaler it is 1 for good.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scaling {
    scaler: Option<LossScaler>,
    config: Option<LossScalerConfig>,
    steps_skipped: u64,
}

/// Norms up to this leave room for what rounding adds, so that every element is finite when it has been divided.
const NORM_MAX: f64 = f32::MAX as f64 / 2.0;

impl Scaling {
    pub(crate) fn new(config: Option<LossScalerConfig>) -> Self {
        Self { scaler: config.map(LossScaler::new), config, steps_skipped: 0 }
    }

    /// Goes on where an earlier run was; from the first scale if it had not said.
    pub(crate) fn resume(self, from: Option<LossScale>) -> Self {
        match (self.config, from) {
            (Some(config), Some(LossScale { scale, good_steps, steps_skipped })) => {
                Self { scaler: Some(LossScaler::resume(config, scale, good_steps)), steps_skipped, ..self }
            }
            _ => self,
        }
    }

    /// What is committed of it.
    pub(crate) fn reached(&self) -> Option<LossScale> {
        let scaler = self.scaler?;
        let (scale, good_steps) = (scaler.scale(), scaler.good_steps());
        Some(LossScale { scale, good_steps, steps_skipped: self.steps_skipped })
    }

    /// What the loss is multiplied with.
    pub(crate) fn scale(&self) -> f32 {
        self.scaler.map_or(1.0, |scaler| scaler.scale())
    }

    /// What gradients are multiplied with in turn.
    pub(crate) fn unscale(&self) -> f32 {
        self.scaler.map_or(1.0, |scaler| scaler.unscale())
    }

    /// Steps that were skipped in the whole run.
    pub(crate) fn steps_skipped(&self) -> u64 {
        self.steps_skipped
    }

    /// What a gradient of this norm, without the scale, is good for; `None` when it is good for nothing, and no smaller scale
    /// would change that.
    pub(crate) fn judge(&self, norm: f64) -> Option<Outcome> {
        match self.scaler {
            None => norm.is_finite().then_some(Outcome::Updated),
            Some(_) if norm <= NORM_MAX => Some(Outcome::Updated),
            Some(scaler) => (scaler.scale() > 1.0).then_some(Outcome::NonFinite),
        }
    }

    /// Takes note of a step.
    pub(crate) fn update(&mut self, outcome: Outcome) {
        if let Some(scaler) = &mut self.scaler {
            scaler.update(outcome);
        }
        self.steps_skipped += u64::from(outcome == Outcome::NonFinite);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(initial_scale: f32) -> Scaling {
        Scaling::new(Some(LossScalerConfig { initial_scale, ..LossScalerConfig::default() }))
    }

    #[test]
    fn only_a_scale_above_one_is_to_blame_for_a_gradient_that_overflowed() {
        for norm in [f64::INFINITY, f64::NAN, f64::from(f32::MAX)] {
            assert_eq!(of(2.0).judge(norm), Some(Outcome::NonFinite), "{norm}");
            assert_eq!(of(1.0).judge(norm), None, "{norm}");
        }
        for scaling in [of(2.0), of(1.0), Scaling::new(None)] {
            assert_eq!(scaling.judge(1e30), Some(Outcome::Updated));
        }
        assert_eq!(Scaling::new(None).judge(f64::INFINITY), None);
    }

    #[test]
    fn a_scale_that_was_committed_goes_on_and_one_that_was_not_begins() {
        let mut scaling = of(8.0);
        scaling.update(Outcome::NonFinite);
        scaling.update(Outcome::Updated);
        let reached = scaling.reached();
        assert_eq!(reached, Some(LossScale { scale: 4.0, good_steps: 1, steps_skipped: 1 }));
        assert_eq!(of(8.0).resume(reached).reached(), reached);
        assert_eq!(of(8.0).resume(None).scale(), 8.0);
        let none = Scaling::new(None).resume(reached);
        assert_eq!((none.reached(), none.scale(), none.unscale(), none.steps_skipped()), (None, 1.0, 1.0, 0));
    }
}
