//! A parameter group's hyper-parameters, as torch names them, and what they are in the step of a rule.

use std::collections::HashMap;

use overspill_optim::{
    AdafactorConfig, AdafactorStep, AdagradConfig, AdagradStep, AdamStep, AdamWConfig, AdamWStep,
    LearningRateAdjustment, LionConfig, LionStep, MuonConfig, MuonStep, Rule, SgdConfig, SgdStep, Step,
    WholeRule, WholeStep,
};

/// Hyper-parameters by name; one that is missing has torch's default.
pub(super) type Group = HashMap<String, f64>;

/// A step of one parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Coefficients<'a> {
    group: &'a Group,
    /// Counted from 1.
    step: u64,
    /// What multiplies every gradient.
    scale: f32,
}

impl<'a> Coefficients<'a> {
    pub(super) fn new(group: &'a Group, step: u64, scale: f32) -> Self {
        let mut coefficients = Self { group, step, scale };
        if coefficients.flag("maximize", false) {
            coefficients.scale = -scale;
        }
        coefficients
    }

    pub(super) fn step(&self) -> u64 {
        self.step
    }

    fn number(&self, name: &str, default: f64) -> f64 {
        self.group.get(name).copied().unwrap_or(default)
    }

    fn flag(&self, name: &str, default: bool) -> bool {
        self.group.get(name).map_or(default, |value| *value != 0.0)
    }

    fn lr(&self) -> f64 {
        self.number("lr", 1e-3)
    }

    fn weight_decay(&self) -> f64 {
        self.number("weight_decay", 0.0)
    }

    /// The step of a rule; `is_new` when the state has just begun.
    pub(super) fn of(&self, rule: Rule, is_new: bool) -> Step {
        let (lr, weight_decay, step, scale) = (self.lr(), self.weight_decay(), self.step, self.scale);
        let betas = |beta1, beta2| (self.number("beta1", beta1), self.number("beta2", beta2));
        match rule {
            Rule::AdamW { .. } | Rule::Adam { .. } => {
                let (beta1, beta2) = betas(0.9, 0.999);
                let config = AdamWConfig { beta1, beta2, eps: self.number("eps", 1e-8) };
                match rule {
                    Rule::Adam { .. } => Step::Adam(AdamStep::new(&config, lr, weight_decay, step, scale)),
                    _ => Step::AdamW(AdamWStep::new(&config, lr, weight_decay, step, scale)),
                }
            }
            Rule::Sgd { .. } => {
                let config = SgdConfig {
                    momentum: self.number("momentum", 0.0),
                    dampening: self.number("dampening", 0.0),
                    nesterov: self.flag("nesterov", false),
                };
                // What torch asks is whether there is a buffer, not which step it is.
                let step = if is_new { 1 } else { 2 };
                Step::Sgd(SgdStep::new(&config, lr, weight_decay, step, scale))
            }
            Rule::Adagrad { .. } => {
                let config =
                    AdagradConfig { lr_decay: self.number("lr_decay", 0.0), eps: self.number("eps", 1e-10) };
                Step::Adagrad(AdagradStep::new(&config, lr, weight_decay, step, scale))
            }
            Rule::Lion => {
                let (beta1, beta2) = betas(0.9, 0.99);
                Step::Lion(LionStep::new(&LionConfig { beta1, beta2 }, lr, weight_decay, scale))
            }
        }
    }

    /// The step of a rule for whole parameters.
    pub(super) fn of_whole(&self, rule: WholeRule) -> WholeStep {
        let (lr, weight_decay, step, scale) = (self.lr(), self.weight_decay(), self.step, self.scale);
        match rule {
            WholeRule::Adafactor => {
                let default = AdafactorConfig::default();
                let config = AdafactorConfig {
                    beta2_decay: self.number("beta2_decay", default.beta2_decay),
                    eps1: self.number("eps1", default.eps1),
                    eps2: self.number("eps2", default.eps2),
                    d: self.number("d", default.d),
                };
                WholeStep::Adafactor(AdafactorStep::new(&config, lr, weight_decay, step, scale))
            }
            WholeRule::Muon => {
                let default = MuonConfig::default();
                let [a, b, c] = default.coefficients;
                let config = MuonConfig {
                    momentum: self.number("momentum", default.momentum),
                    nesterov: self.flag("nesterov", default.nesterov),
                    coefficients: [self.number("ns_a", a), self.number("ns_b", b), self.number("ns_c", c)],
                    eps: self.number("eps", default.eps),
                    iterations: self.number("ns_steps", f64::from(default.iterations)) as u32,
                    adjustment: match self.number("match_rms_adamw", 0.0) {
                        0.0 => LearningRateAdjustment::Original,
                        _ => LearningRateAdjustment::MatchRmsAdamW,
                    },
                };
                WholeStep::Muon(MuonStep::new(&config, lr, weight_decay, scale))
            }
        }
    }
}
