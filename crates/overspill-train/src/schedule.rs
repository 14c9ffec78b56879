//! The learning rate over a run: a linear rise, then half a cosine down to a tenth.

use std::f64::consts::PI;

/// Learning rate by step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The highest rate.
    pub peak: f64,
    /// Steps of the rise.
    pub warmup: u64,
    /// Steps of the whole run.
    pub steps: u64,
}

/// The last rate, as a share of the highest.
const FLOOR: f64 = 0.1;

impl Schedule {
    /// The rate of a step, counted from 1.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step <= self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let fall = self.steps.saturating_sub(self.warmup).max(1);
        let progress = ((step - self.warmup) as f64 / fall as f64).min(1.0);
        self.peak * (FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + (PI * progress).cos()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_rate_rises_to_the_peak_and_ends_at_the_floor() {
        let schedule = Schedule { peak: 1.0, warmup: 10, steps: 110 };
        assert_eq!(schedule.learning_rate(1), 0.1);
        assert_eq!(schedule.learning_rate(10), 1.0);
        assert!((schedule.learning_rate(60) - 0.55).abs() < 1e-12);
        assert!((schedule.learning_rate(110) - FLOOR).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn the_rate_is_always_positive_and_never_above_the_peak(warmup in 0u64..50, steps in 1u64..50, step in 1u64..200) {
            let rate = Schedule { peak: 3e-4, warmup, steps }.learning_rate(step);
            prop_assert!(rate > 0.0 && rate <= 3e-4);
        }
    }
}
