//! What makes a run the same run: everything that its numbers depend on.
//!
//! The state of a run is committed together with its [`Identity`] and the number of the step. A later run goes on from
//! it only if its own identity is the same, so that the losses of both together are those of one that was never
//! interrupted. The random state needs no place of its own: first weights and the order of the data are functions of
//! the seed and the step. The scale of the loss, of weights that have one, is committed beside the step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::ModelConfig;
use crate::error::TrainError;
use crate::optimizer::{Names, recipe_named};
use crate::recipe::StateRecipe;

/// What a run's numbers depend on, by name, each in words that are equal when the values are; and what its model is, so
/// that the state can be taken out without the run's arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    run: BTreeMap<&'static str, String>,
    model: Option<ModelOrigin>,
}

/// How far a run has come: what is committed with its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reached {
    /// Steps that are finished.
    pub step: u64,
    /// The scale of the loss; `None` when there is none, or it is still the first.
    pub loss_scale: Option<LossScale>,
}

/// Where the scale of the loss is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// What the loss of the next step is multiplied with.
    pub scale: f32,
    /// Steps since it last moved.
    pub good_steps: u32,
    /// Steps of the whole run that overflowed, and changed no weights.
    pub steps_skipped: u64,
}

/// What a model is, beside its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelOrigin {
    /// The fields of its `config.json`.
    pub config: Map<String, Value>,
    /// The folder with its tokenizer; `None` when text is read byte by byte.
    pub tokenizer: Option<PathBuf>,
}

/// What a state was committed with, by its name in the JSON.
const STEP: &str = "step";
const TILE_BYTES: &str = "tile_bytes";
const RECIPE: &str = "recipe";
/// Has what an optimizer swapper commits, which a run's state has not.
const OPTIMIZER: &str = "optimizer";
const LOSS_SCALE: &str = "loss_scale";
const RUN: &str = "run";
const CONFIG: &str = "config";
const TOKENIZER: &str = "tokenizer";

impl Identity {
    /// Adds something that the numbers depend on.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: &dyn ToString) -> Self {
        self.run.insert(name, value.to_string());
        self
    }

    /// Adds what the model is.
    #[must_use]
    pub fn of_model(self, model: ModelOrigin) -> Self {
        Self { model: Some(model), ..self }
    }

    /// What is committed with the state of a run that has reached this; it is cut into tiles of `tile_bytes` and stored by
    /// `recipe`.
    pub(crate) fn meta(&self, reached: &Reached, tile_bytes: usize, recipe: impl Into<StateRecipe>) -> Value {
        let recipe = Names::of(recipe).to_json();
        let mut meta = json!({ STEP: reached.step, TILE_BYTES: tile_bytes, RECIPE: recipe, RUN: self.run });
        if let Some(scale) = &reached.loss_scale {
            meta[LOSS_SCALE] = json!(scale);
        }
        if let Some(model) = &self.model {
            model.add_to(&mut meta);
        }
        meta
    }

    /// The tiles of the state that was committed with `meta`; `None` if it does not say.
    pub(crate) fn tile_bytes(meta: &Value) -> Option<usize> {
        usize::try_from(meta[TILE_BYTES].as_u64()?).ok()
    }

    /// The recipe of the state that was committed with `meta`; `None` if it is not known here.
    pub(crate) fn state_recipe(meta: &Value) -> Option<StateRecipe> {
        recipe_named(meta.get(RECIPE))
    }

    /// The same, of a state that is cut into other tiles.
    pub(crate) fn with_tile_bytes(mut meta: Value, tile_bytes: usize) -> Value {
        meta[TILE_BYTES] = tile_bytes.into();
        meta
    }

    /// The step after which the state is that was committed with `meta`; `None` if it does not say.
    pub(crate) fn step(meta: &Value) -> Option<u64> {
        meta[STEP].as_u64()
    }

    /// How far the run has come whose state was committed with `meta`. Weights that no run has touched are those of
    /// every run of a model of their shape that stores them by the same `recipe`.
    ///
    /// # Errors
    /// [`TrainError::OtherRun`] when it is another run's, naming the first difference; [`TrainError::OtherModel`];
    /// [`TrainError::NotAState`] when its scale of the loss is none.
    pub(crate) fn check(
        &self,
        path: &Path,
        meta: &Value,
        recipe: impl Into<StateRecipe>,
    ) -> Result<Reached, TrainError> {
        let recipe = recipe.into();
        let step = self.check_run(path, meta, recipe)?;
        let loss_scale = match meta.get(LOSS_SCALE) {
            None => None,
            Some(said) => Some(LossScale::read(said).ok_or_else(|| TrainError::NotAState {
                path: path.to_owned(),
                reason: format!("its loss scale is {said}"),
            })?),
        };
        Ok(Reached { step, loss_scale })
    }

    /// The step after which the state is, if it is this run's.
    fn check_run(&self, path: &Path, meta: &Value, recipe: StateRecipe) -> Result<u64, TrainError> {
        let other = |what: &str, then: String, now: String| {
            let (path, what) = (path.to_owned(), what.to_owned());
            Err(TrainError::OtherRun { path, what, then, now })
        };
        let check_recipe = || {
            let Some(then) = Self::state_recipe(meta) else {
                let then = meta[RECIPE].to_string();
                return other("the optimizer and its formats", then, format!("{:?}", Names::of(recipe)));
            };
            let pairs = Names::of(then).options().into_iter().zip(Names::of(recipe).options());
            match pairs.into_iter().find(|(then, now)| then != now) {
                Some(((option, then), (_, now))) => other(option, then.to_owned(), now.to_owned()),
                None => Ok(0),
            }
        };
        if let (Some(0), Some(Value::Null), Some(model)) = (Self::step(meta), meta.get(RUN), &self.model) {
            check_recipe()?;
            return self.check_weights(path, meta, model);
        }
        let (Some(step), Some(run)) = (Self::step(meta), meta[RUN].as_object()) else {
            return other("contents", "not a training state".to_owned(), "one".to_owned());
        };
        check_recipe()?;
        for (&name, now) in &self.run {
            let then = run.get(name).and_then(Value::as_str).unwrap_or("not known");
            if then != now {
                return other(name, then.to_owned(), now.clone());
            }
        }
        if let Some(name) = run.keys().find(|name| !self.run.contains_key(name.as_str())) {
            return other(name, "known".to_owned(), "not".to_owned());
        }
        Ok(step)
    }

    fn check_weights(&self, path: &Path, meta: &Value, model: &ModelOrigin) -> Result<u64, TrainError> {
        let then = ModelOrigin::of(path, meta)?.shape(path)?;
        let now = model.shape(path)?;
        if then.computes_as(&now) {
            return Ok(0);
        }
        Err(TrainError::OtherModel {
            path: path.to_owned(),
            then: format!("{then:?}"),
            now: format!("{now:?}"),
        })
    }
}

impl LossScale {
    /// As it was committed; `None` of what no run commits.
    fn read(said: &Value) -> Option<Self> {
        let read = Self::deserialize(said).ok()?;
        (read.scale.is_finite() && read.scale > 0.0).then_some(read)
    }
}

impl ModelOrigin {
    /// What is committed with weights that no run has touched.
    pub(crate) fn untouched<'a, R>(&self, tile_bytes: usize, recipe: &'a R) -> Value
    where
        StateRecipe: From<&'a R>,
    {
        let recipe = Names::of(recipe).to_json();
        let mut meta = json!({ STEP: 0, TILE_BYTES: tile_bytes, RECIPE: recipe, RUN: null });
        self.add_to(&mut meta);
        meta
    }

    /// The model of the state that was committed with `meta` to the store in `path`.
    ///
    /// # Errors
    /// [`TrainError::NoOrigin`] if it does not say, [`TrainError::NotAState`] for the state of an optimizer alone.
    pub(crate) fn of(path: &Path, meta: &Value) -> Result<Self, TrainError> {
        let Some(config) = meta[CONFIG].as_object() else {
            if meta[OPTIMIZER].is_object() {
                let reason = "it is the state of an optimizer, whose model is elsewhere: resume it in Python"
                    .to_owned();
                return Err(TrainError::NotAState { path: path.to_owned(), reason });
            }
            return Err(TrainError::NoOrigin { path: path.to_owned() });
        };
        Ok(Self { config: config.clone(), tokenizer: meta[TOKENIZER].as_str().map(PathBuf::from) })
    }

    /// The model's shape; `path` is named in errors.
    pub(crate) fn shape(&self, path: &Path) -> Result<ModelConfig, TrainError> {
        Ok(ModelConfig::from_json(&Value::Object(self.config.clone()).to_string(), path)?)
    }

    fn add_to(&self, meta: &mut Value) {
        meta[CONFIG] = self.config.clone().into();
        meta[TOKENIZER] = match &self.tokenizer {
            // Bytes that are no UTF-8 are replaced: the folder can still be named when it is asked for.
            Some(folder) => folder.to_string_lossy().into(),
            None => Value::Null,
        };
    }
}

#[cfg(test)]
mod tests {
    use overspill_optim::{MomentFormat, SgdConfig, WeightFormat};

    use super::*;
    use crate::optimizer::{Optimizer, single_precision_adamw};

    fn after(step: u64) -> Reached {
        Reached { step, loss_scale: None }
    }

    #[test]
    fn the_scale_of_the_loss_comes_back_to_the_bit_or_not_at_all() {
        let (identity, recipe, path) = (Identity::default(), single_precision_adamw(), Path::new("store"));
        for scale in [65536.0, f32::MAX, f32::MIN_POSITIVE, 1.0 / 3.0] {
            let loss_scale = Some(LossScale { scale, good_steps: u32::MAX, steps_skipped: u64::MAX });
            let reached = Reached { step: 7, loss_scale };
            let text = identity.meta(&reached, 4096, recipe).to_string();
            let meta = serde_json::from_str(&text).unwrap();
            assert_eq!(identity.check(path, &meta, recipe).unwrap(), reached, "{text}");
        }
        let mut meta = identity.meta(&after(7), 4096, recipe);
        let scale = |scale: Value| json!({ "scale": scale, "good_steps": 0, "steps_skipped": 0 });
        for odd in [json!(null), json!(3), scale(json!(0)), scale(json!(-1)), scale(json!(1e40)), json!({})] {
            meta[LOSS_SCALE] = odd;
            let refused = identity.check(path, &meta, recipe);
            assert!(matches!(refused, Err(TrainError::NotAState { .. })), "{meta}: {refused:?}");
        }
    }

    #[test]
    fn the_same_run_finds_its_step_and_another_one_what_is_different() {
        let identity = Identity::default().with("--seed", &7).with("--lr", &0.1);
        let meta: Value =
            serde_json::from_str(&identity.meta(&after(41), 4096, single_precision_adamw()).to_string())
                .unwrap();
        let path = Path::new("store");
        assert_eq!(identity.check(path, &meta, single_precision_adamw()).unwrap(), after(41));
        assert_eq!((Identity::tile_bytes(&meta), Identity::tile_bytes(&json!(3))), (Some(4096), None));
        assert!(matches!(
            Identity::default().check(path, &meta, single_precision_adamw()),
            Err(TrainError::OtherRun { .. })
        ));
        let other = identity.clone().with("--seed", &8);
        let refused = other.check(path, &meta, single_precision_adamw()).unwrap_err();
        assert_eq!(refused.to_string(), "store is the state of another run: --seed was 7, and is 8 now");
        let more = identity.clone().with("--clip", &1);
        assert!(
            matches!(more.check(path, &meta, single_precision_adamw()), Err(TrainError::OtherRun { what, .. }) if what == "--clip")
        );
        for odd in [json!(null), json!({ "step": 1 }), json!({ "step": -1, "run": {} }), json!([1])] {
            assert!(
                matches!(
                    identity.check(path, &odd, single_precision_adamw()),
                    Err(TrainError::OtherRun { .. })
                ),
                "{odd}"
            );
        }
    }

    fn origin(hidden: usize, initializer_range: f64) -> ModelOrigin {
        let config = json!({ "vocab_size": 8, "hidden_size": hidden, "num_hidden_layers": 1,
            "num_attention_heads": 1, "intermediate_size": 8, "initializer_range": initializer_range });
        let Value::Object(config) = config else { unreachable!("it is an object") };
        ModelOrigin { config, tokenizer: Some("model".into()) }
    }

    #[test]
    fn untouched_weights_are_the_start_of_any_run_of_their_shape() {
        let path = Path::new("store");
        let meta = origin(8, 0.02).untouched(4096, &single_precision_adamw());
        assert_eq!(ModelOrigin::of(path, &meta).unwrap(), origin(8, 0.02));
        for seed in [1, 2] {
            let run = Identity::default().with("--seed", &seed).of_model(origin(8, 0.5));
            assert_eq!(run.check(path, &meta, single_precision_adamw()).unwrap(), after(0));
        }
        let other =
            Identity::default().of_model(origin(16, 0.02)).check(path, &meta, single_precision_adamw());
        assert!(matches!(other, Err(TrainError::OtherModel { .. })), "{other:?}");
        // A state of a later step is somebody's.
        let mut later = meta;
        later[STEP] = 1.into();
        let run = Identity::default().of_model(origin(8, 0.02));
        assert!(matches!(
            run.check(path, &later, single_precision_adamw()),
            Err(TrainError::OtherRun { .. })
        ));
        let old = Identity::default().with("--seed", &1).meta(&after(3), 4096, single_precision_adamw());
        assert!(matches!(ModelOrigin::of(path, &old), Err(TrainError::NoOrigin { .. })));
        let optimizer = json!({ "optimizer": { "digest": "0" }, "meta": null });
        assert!(matches!(ModelOrigin::of(path, &optimizer), Err(TrainError::NotAState { .. })));
    }

    #[test]
    fn a_state_of_another_recipe_is_refused_by_the_option_and_one_that_says_none_is_the_oldest() {
        let path = Path::new("store");
        let of = |optimizer: Optimizer, weights, moments| optimizer.recipe(weights, moments).unwrap();
        let (adamw, oldest) = (Optimizer::default(), single_precision_adamw());
        let sgd = |momentum| Optimizer::Sgd(SgdConfig { momentum, ..SgdConfig::default() });
        let others = [
            (
                of(sgd(0.9), WeightFormat::F32, MomentFormat::F32),
                "--optimizer was adamw, and is sgd with momentum now",
            ),
            (
                of(adamw, WeightFormat::Bf16Stochastic, MomentFormat::F32),
                "--weights was f32, and is bf16-stochastic now",
            ),
            (of(adamw, WeightFormat::F32, MomentFormat::Blocks8), "--moments was f32, and is 8bit now"),
        ];
        let identity = Identity::default().of_model(origin(8, 0.02));
        let mut meta = identity.meta(&after(3), 4096, oldest);
        let mut untouched = origin(8, 0.02).untouched(4096, &oldest);
        for _ in 0..2 {
            assert_eq!(identity.check(path, &meta, oldest).unwrap(), after(3));
            assert_eq!(identity.check(path, &untouched, oldest).unwrap(), after(0));
            for (recipe, expected) in &others {
                for meta in [&meta, &untouched] {
                    let refused = identity.check(path, meta, recipe).unwrap_err().to_string();
                    assert_eq!(refused, format!("store is the state of another run: {expected}"));
                }
            }
            for meta in [&mut meta, &mut untouched] {
                meta.as_object_mut().unwrap().remove(RECIPE);
            }
        }
        meta[RECIPE] = json!({ "optimizer": "adamw", "weights": "f4", "moments": "f32" });
        let refused = identity.check(path, &meta, oldest);
        assert!(matches!(refused, Err(TrainError::OtherRun { .. })), "{refused:?}");
    }
}
