//! The optimizer of a run: the rule with its constants, and what it and the formats of its state are called.
//!
//! A [`Recipe`] says what the state looks like and goes with the [layout](crate::layout::ModelLayout); an [`Optimizer`]
//! says with which numbers a step changes it. The names are those of the command line, and are committed with the state,
//! so that whoever finds it can read it. A state without them is older than they are: AdamW in single precision.

use overspill_optim::{
    AdagradConfig, AdagradStep, AdamStep, AdamWConfig, AdamWStep, LionConfig, LionStep, MomentFormat, Recipe,
    Rule, SgdConfig, SgdStep, Step, WeightFormat,
};
use serde_json::{Value, json};

/// A rule that works element by element, with the constants that no schedule changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamWConfig),
    /// Adam with the weight decay in the gradient.
    Adam(AdamWConfig),
    /// Stochastic gradient descent; without momentum it keeps no state.
    Sgd(SgdConfig),
    /// Adagrad, with the weight decay in the gradient.
    Adagrad(AdagradConfig),
    /// Lion, with decoupled weight decay.
    Lion(LionConfig),
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW(AdamWConfig::default())
    }
}

impl Optimizer {
    /// Its rule.
    pub fn rule(&self) -> Rule {
        match self {
            Self::AdamW(_) => Rule::AdamW { amsgrad: false },
            Self::Adam(_) => Rule::Adam { amsgrad: false },
            Self::Sgd(config) => Rule::Sgd { momentum: config.momentum != 0.0 },
            Self::Adagrad(_) => Rule::Adagrad { initial_accumulator: 0.0 },
            Self::Lion(_) => Rule::Lion,
        }
    }

    /// The recipe that keeps its state in these formats.
    pub fn recipe(&self, weights: WeightFormat, moments: MomentFormat) -> Recipe {
        Recipe::new(self.rule(), weights, moments).expect("no rule here keeps a maximum")
    }

    /// The coefficients of step number `step`, from 1; `gradient_scale` multiplies every gradient.
    pub fn step(&self, learning_rate: f64, weight_decay: f64, step: u64, gradient_scale: f32) -> Step {
        let (lr, scale) = (learning_rate, gradient_scale);
        match self {
            Self::AdamW(config) => Step::AdamW(AdamWStep::new(config, lr, weight_decay, step, scale)),
            Self::Adam(config) => Step::Adam(AdamStep::new(config, lr, weight_decay, step, scale)),
            Self::Sgd(config) => Step::Sgd(SgdStep::new(config, lr, weight_decay, step, scale)),
            Self::Adagrad(config) => Step::Adagrad(AdagradStep::new(config, lr, weight_decay, step, scale)),
            Self::Lion(config) => Step::Lion(LionStep::new(config, lr, weight_decay, scale)),
        }
    }

    /// Its constants: what they are called in the identity of a run, and their values.
    pub(crate) fn constants(&self) -> (&'static str, String) {
        match self {
            Self::AdamW(config) => ("AdamW", format!("{config:?}")),
            Self::Adam(config) => ("Adam", format!("{config:?}")),
            Self::Sgd(config) => ("SGD", format!("{config:?}")),
            Self::Adagrad(config) => ("Adagrad", format!("{config:?}")),
            Self::Lion(config) => ("Lion", format!("{config:?}")),
        }
    }
}

/// Every rule that a state may be of.
const RULES: [(&str, Rule); 6] = [
    ("adamw", Rule::AdamW { amsgrad: false }),
    ("adam", Rule::Adam { amsgrad: false }),
    ("sgd", Rule::Sgd { momentum: false }),
    ("sgd with momentum", Rule::Sgd { momentum: true }),
    ("adagrad", Rule::Adagrad { initial_accumulator: 0.0 }),
    ("lion", Rule::Lion),
];

const WEIGHTS: [(&str, WeightFormat); 4] = [
    ("f32", WeightFormat::F32),
    ("bf16", WeightFormat::Bf16WithRemainder),
    ("f16", WeightFormat::F16WithMaster),
    ("bf16-stochastic", WeightFormat::Bf16Stochastic),
];

const MOMENTS: [(&str, MomentFormat); 3] =
    [("f32", MomentFormat::F32), ("bf16", MomentFormat::Bf16), ("8bit", MomentFormat::Blocks8)];

/// What a recipe is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// Of the rule: `adamw`.
    pub optimizer: &'static str,
    /// Of the format of the weights: `f32`.
    pub weights: &'static str,
    /// Of the format of the moments: `f32`.
    pub moments: &'static str,
}

impl Names {
    /// The names of a recipe.
    ///
    /// # Panics
    /// When no [`Optimizer`] has its rule.
    pub fn of(recipe: &Recipe) -> Self {
        fn name<T: PartialEq>(known: &[(&'static str, T)], sought: &T) -> &'static str {
            let found = known.iter().find(|(_, value)| value == sought);
            found.expect("recipes are made of optimizers").0
        }
        Self {
            optimizer: name(&RULES, &recipe.rule()),
            weights: name(&WEIGHTS, &recipe.weights()),
            moments: name(&MOMENTS, &recipe.moments()),
        }
    }

    /// What they are on the command line, each with the option that sets it.
    pub(crate) fn options(self) -> [(&'static str, &'static str); 3] {
        [("--optimizer", self.optimizer), ("--weights", self.weights), ("--moments", self.moments)]
    }

    /// As it is committed.
    pub(crate) fn to_json(self) -> Value {
        json!({ "optimizer": self.optimizer, "weights": self.weights, "moments": self.moments })
    }
}

/// The recipe of what was committed with its names as `names`; `None` if they are not known here.
pub(crate) fn recipe_named(names: Option<&Value>) -> Option<Recipe> {
    fn find<T: Copy>(known: &[(&str, T)], name: &Value) -> Option<T> {
        let name = name.as_str()?;
        known.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }
    let Some(names) = names else { return Some(single_precision_adamw()) };
    let rule = find(&RULES, &names["optimizer"])?;
    let (weights, moments) = (find(&WEIGHTS, &names["weights"])?, find(&MOMENTS, &names["moments"])?);
    Recipe::new(rule, weights, moments).ok()
}

/// What all states are of that do not say.
pub fn single_precision_adamw() -> Recipe {
    Optimizer::default().recipe(WeightFormat::F32, MomentFormat::F32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_found_again_by_its_names_and_no_names_are_those_of_the_oldest() {
        for (_, rule) in RULES {
            for (_, weights) in WEIGHTS {
                for (_, moments) in MOMENTS {
                    let recipe = Recipe::new(rule, weights, moments).unwrap();
                    let names = Names::of(&recipe).to_json();
                    assert_eq!(recipe_named(Some(&names)), Some(recipe), "{names}");
                }
            }
        }
        assert_eq!(recipe_named(None), Some(single_precision_adamw()));
        let odd = [json!(null), json!({}), json!({ "optimizer": "sgd", "weights": "f32", "moments": 8 })];
        for names in odd.into_iter().chain([json!("adamw"), json!([1])]) {
            assert_eq!(recipe_named(Some(&names)), None, "{names}");
        }
    }

    #[test]
    fn a_step_is_one_of_the_rule() {
        let mut optimizers = vec![Optimizer::default(), Optimizer::Adam(AdamWConfig::default())];
        optimizers.extend(
            [0.0, 0.9].map(|momentum| Optimizer::Sgd(SgdConfig { momentum, ..SgdConfig::default() })),
        );
        optimizers.push(Optimizer::Adagrad(AdagradConfig::default()));
        optimizers.push(Optimizer::Lion(LionConfig::default()));
        let found: Vec<&str> = optimizers
            .iter()
            .map(|optimizer| {
                let recipe = optimizer.recipe(WeightFormat::F32, MomentFormat::F32);
                let mut record = vec![0_u32; recipe.record_bytes(1).unwrap() / 4];
                let record = bytemuck::cast_slice_mut(&mut record);
                let weights = overspill_optim::Weights::F32(&mut [1.0]);
                let tile = overspill_optim::Tile { record, elements: 1, range: 0..1, weights };
                let gradient = overspill_optim::Gradient::F32(&[0.5]);
                let isa = overspill_optim::Isa::Scalar;
                let outcome =
                    recipe.apply(isa, &optimizer.step(0.1, 0.1, 1, 1.0), tile, gradient, Default::default());
                assert_eq!(outcome, Ok(overspill_optim::Outcome::Updated));
                Names::of(&recipe).optimizer
            })
            .collect();
        assert_eq!(found, RULES.map(|(name, _)| name));
    }
}
