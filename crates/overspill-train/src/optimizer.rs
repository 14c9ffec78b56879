//! The optimizer of a run: the rule with its constants, and what it and the formats of its state are called.
//!
//! A [`StateRecipe`] says what the state looks like and goes with the [layout](crate::layout::ModelLayout); an [`Optimizer`]
//! says with which numbers a step changes it. The names are those of the command line, and are committed with the state,
//! so that whoever finds it can read it. A state without them is older than they are: AdamW in single precision.

use overspill_optim::{
    AdafactorConfig, AdafactorStep, AdagradConfig, AdagradStep, AdamStep, AdamWConfig, AdamWStep, LionConfig,
    LionStep, MomentFormat, MuonConfig, MuonStep, Recipe, Rule, SgdConfig, SgdStep, Step, WeightFormat,
    WholeStep,
};
use serde_json::{Value, json};

use crate::recipe::{SingleMoments, StateRecipe};

/// A rule, or two that share a model, with the constants that no schedule changes.
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
    /// Adafactor, with decoupled weight decay; it needs whole parameters.
    Adafactor(AdafactorConfig),
    /// Muon for the matrices of the decoder layers, which it needs whole, and AdamW for everything else.
    Muon {
        /// For the matrices.
        muon: MuonConfig,
        /// For everything else.
        adamw: AdamWConfig,
    },
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW(AdamWConfig::default())
    }
}

impl Optimizer {
    /// The recipe that keeps its state in these formats.
    ///
    /// # Errors
    /// [`SingleMoments`] when it keeps its moments in single precision only.
    pub fn recipe(&self, weights: WeightFormat, moments: MomentFormat) -> Result<StateRecipe, SingleMoments> {
        let rule = match self {
            Self::AdamW(_) => Rule::AdamW { amsgrad: false },
            Self::Adam(_) => Rule::Adam { amsgrad: false },
            Self::Sgd(config) => Rule::Sgd { momentum: config.momentum != 0.0 },
            Self::Adagrad(_) => Rule::Adagrad { initial_accumulator: 0.0 },
            Self::Lion(_) => Rule::Lion,
            Self::Adafactor(_) => return in_single(StateRecipe::Adafactor(weights), moments),
            Self::Muon { .. } => return in_single(StateRecipe::Muon(weights), moments),
        };
        let recipe = Recipe::new(rule, weights, moments).expect("no rule here keeps a maximum");
        Ok(StateRecipe::Elements(recipe))
    }

    /// The coefficients of update number `update`, from 1, for what is updated element by element, if anything is;
    /// `gradient_scale` multiplies every gradient.
    pub fn step(
        &self,
        learning_rate: f64,
        weight_decay: f64,
        update: u64,
        gradient_scale: f32,
    ) -> Option<Step> {
        let (lr, scale) = (learning_rate, gradient_scale);
        Some(match self {
            Self::AdamW(config) | Self::Muon { adamw: config, .. } => {
                Step::AdamW(AdamWStep::new(config, lr, weight_decay, update, scale))
            }
            Self::Adam(config) => Step::Adam(AdamStep::new(config, lr, weight_decay, update, scale)),
            Self::Sgd(config) => Step::Sgd(SgdStep::new(config, lr, weight_decay, update, scale)),
            Self::Adagrad(config) => Step::Adagrad(AdagradStep::new(config, lr, weight_decay, update, scale)),
            Self::Lion(config) => Step::Lion(LionStep::new(config, lr, weight_decay, scale)),
            Self::Adafactor(_) => return None,
        })
    }

    /// The same for whole parameters.
    pub fn whole_step(
        &self,
        learning_rate: f64,
        weight_decay: f64,
        update: u64,
        gradient_scale: f32,
    ) -> Option<WholeStep> {
        let (lr, scale) = (learning_rate, gradient_scale);
        match self {
            Self::Adafactor(config) => {
                let step = AdafactorStep::new(config, lr, weight_decay, update, scale);
                Some(WholeStep::Adafactor(step))
            }
            Self::Muon { muon, .. } => Some(WholeStep::Muon(MuonStep::new(muon, lr, weight_decay, scale))),
            Self::AdamW(_) | Self::Adam(_) | Self::Sgd(_) | Self::Adagrad(_) | Self::Lion(_) => None,
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
            Self::Adafactor(config) => ("Adafactor", format!("{config:?}")),
            Self::Muon { muon, adamw } => ("Muon", format!("{muon:?} beside {adamw:?}")),
        }
    }
}

/// The recipe, unless moments are asked for in anything but single precision.
fn in_single(recipe: StateRecipe, moments: MomentFormat) -> Result<StateRecipe, SingleMoments> {
    if moments == MomentFormat::F32 {
        return Ok(recipe);
    }
    let Names { optimizer, .. } = Names::of(recipe);
    Err(SingleMoments { optimizer, moments: name(&MOMENTS, &moments) })
}

/// Every rule of elements that a state may be of.
const RULES: [(&str, Rule); 6] = [
    ("adamw", Rule::AdamW { amsgrad: false }),
    ("adam", Rule::Adam { amsgrad: false }),
    ("sgd", Rule::Sgd { momentum: false }),
    ("sgd with momentum", Rule::Sgd { momentum: true }),
    ("adagrad", Rule::Adagrad { initial_accumulator: 0.0 }),
    ("lion", Rule::Lion),
];

/// Rules that need whole parameters.
const ADAFACTOR: &str = "adafactor";
const MUON: &str = "muon";

const WEIGHTS: [(&str, WeightFormat); 4] = [
    ("f32", WeightFormat::F32),
    ("bf16", WeightFormat::Bf16WithRemainder),
    ("fp16", WeightFormat::F16WithMaster),
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
    pub fn of(recipe: impl Into<StateRecipe>) -> Self {
        let recipe = recipe.into();
        let optimizer = match &recipe {
            StateRecipe::Elements(recipe) => name(&RULES, &recipe.rule()),
            StateRecipe::Adafactor(_) => ADAFACTOR,
            StateRecipe::Muon(_) => MUON,
        };
        Self {
            optimizer,
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

/// What a value is called; all that optimizers are made of are known.
fn name<T: PartialEq>(known: &[(&'static str, T)], sought: &T) -> &'static str {
    let found = known.iter().find(|(_, value)| value == sought);
    found.expect("recipes are made of optimizers").0
}

/// The recipe of what was committed with its names as `names`; `None` if they are not known here.
pub(crate) fn recipe_named(names: Option<&Value>) -> Option<StateRecipe> {
    fn find<T: Copy>(known: &[(&str, T)], name: &Value) -> Option<T> {
        let name = name.as_str()?;
        known.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }
    let Some(names) = names else { return Some(single_precision_adamw().into()) };
    let (weights, moments) = (find(&WEIGHTS, &names["weights"])?, find(&MOMENTS, &names["moments"])?);
    match names["optimizer"].as_str()? {
        ADAFACTOR => in_single(StateRecipe::Adafactor(weights), moments).ok(),
        MUON => in_single(StateRecipe::Muon(weights), moments).ok(),
        _ => {
            let rule = find(&RULES, &names["optimizer"])?;
            Some(Recipe::new(rule, weights, moments).ok()?.into())
        }
    }
}

/// What all states are of that do not say.
pub fn single_precision_adamw() -> Recipe {
    let adamw = Rule::AdamW { amsgrad: false };
    Recipe::new(adamw, WeightFormat::F32, MomentFormat::F32).expect("it keeps no maximum")
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
                    let names = Names::of(recipe).to_json();
                    assert_eq!(recipe_named(Some(&names)), Some(recipe.into()), "{names}");
                }
            }
        }
        for (_, weights) in WEIGHTS {
            for recipe in [StateRecipe::Adafactor(weights), StateRecipe::Muon(weights)] {
                assert_eq!(recipe_named(Some(&Names::of(recipe).to_json())), Some(recipe));
            }
        }
        assert_eq!(recipe_named(None), Some(single_precision_adamw().into()));
        let odd = [json!(null), json!({}), json!({ "optimizer": "sgd", "weights": "f32", "moments": 8 })];
        let narrow = json!({ "optimizer": "muon", "weights": "f32", "moments": "8bit" });
        for names in odd.into_iter().chain([json!("adamw"), json!([1]), narrow]) {
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
                let recipe = optimizer.recipe(WeightFormat::F32, MomentFormat::F32).unwrap();
                let recipe = recipe.elements().unwrap();
                let mut record = vec![0_u32; recipe.record_bytes(1).unwrap() / 4];
                let record = bytemuck::cast_slice_mut(&mut record);
                let weights = overspill_optim::Weights::F32(&mut [1.0]);
                let tile = overspill_optim::Tile { record, elements: 1, range: 0..1, weights };
                let gradient = overspill_optim::Gradient::F32(&[0.5]);
                let isa = overspill_optim::Isa::Scalar;
                let step = optimizer.step(0.1, 0.1, 1, 1.0).unwrap();
                let outcome = recipe.apply(isa, &step, tile, gradient, Default::default());
                assert_eq!(outcome, Ok(overspill_optim::Outcome::Updated));
                assert_eq!(optimizer.whole_step(0.1, 0.1, 1, 1.0), None);
                Names::of(recipe).optimizer
            })
            .collect();
        assert_eq!(found, RULES.map(|(name, _)| name));
    }

    #[test]
    fn rules_of_whole_parameters_have_their_moments_in_single_precision_only() {
        let (muon, adamw) = (MuonConfig::default(), AdamWConfig::default());
        for optimizer in [Optimizer::Adafactor(AdafactorConfig::default()), Optimizer::Muon { muon, adamw }] {
            let recipe = optimizer.recipe(WeightFormat::F32, MomentFormat::F32).unwrap();
            // Something is updated element by element exactly when there is a step for it.
            let step = optimizer.step(0.1, 0.1, 1, 1.0);
            assert_eq!(step.is_some(), recipe.elements().is_some());
            assert!(optimizer.whole_step(0.1, 0.1, 1, 1.0).is_some());
            for moments in [MomentFormat::Bf16, MomentFormat::Blocks8] {
                let refused = optimizer.recipe(WeightFormat::F32, moments).unwrap_err();
                assert_eq!(refused.optimizer, Names::of(recipe).optimizer);
            }
        }
    }
}
