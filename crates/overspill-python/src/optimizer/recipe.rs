//! What an update needs to know of one parameter: its rule, its formats, and its shape.

use std::sync::Arc;

use overspill_optim::{
    Gradient, Isa, MomentFormat, Origin, Recipe, Rule, Shape, Tile, WeightFormat, Weights, WholeRecipe,
    WholeRule,
};
use overspill_swap::optimizer::{ParameterSpec, PartView, StateSize};

use super::coefficients::Coefficients;
use crate::error::Error;
use crate::tensor::Dtype;

/// A parameter as Python describes it: name, shape, dtype, rule.
pub(super) type Described = (String, Vec<usize>, String, String);

/// What all parameters of an optimizer have in common.
#[derive(Clone, Debug)]
pub(super) struct Formats {
    pub(super) moments: MomentFormat,
    /// bf16 parameters have no fp32 master.
    pub(super) stochastic: bool,
    /// What Adagrad's sum begins with.
    pub(super) initial_accumulator: f32,
}

impl Formats {
    pub(super) fn moments(name: &str) -> Result<MomentFormat, Error> {
        match name {
            "float32" => Ok(MomentFormat::F32),
            "bfloat16" => Ok(MomentFormat::Bf16),
            "8bit" => Ok(MomentFormat::Blocks8),
            _ => Err(Error::Argument(format!(
                "moments is {name:?}, but must be 'float32', 'bfloat16' or '8bit'"
            ))),
        }
    }
}

/// A parameter, and how it is updated.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) numel: usize,
    way: Way,
    /// Whether a new tile begins with it: those that were there before it keep theirs.
    pub(super) begins_tile: bool,
}

/// A moment, and its shape.
pub(super) type Moment = (&'static str, Vec<usize>);

#[derive(Clone, Debug)]
enum Way {
    /// Elements do not see each other.
    Cut(Recipe),
    /// The record is the parameter's.
    Whole { recipe: WholeRecipe, moments: Vec<Moment> },
}

impl Parameter {
    /// # Errors
    /// [`Error::Argument`] and [`Error::Recipe`] for what cannot be updated so.
    pub(super) fn new(described: &Described, formats: &Formats) -> Result<Self, Error> {
        let (name, shape, dtype, rule) = described;
        let numel = shape.iter().try_fold(1_usize, |product, side| product.checked_mul(*side));
        let numel = numel.ok_or_else(|| Error::Argument(format!("{name} has too many elements")))?;
        let (dtype, weights) = match dtype.as_str() {
            "float32" => (Dtype::F32, WeightFormat::F32),
            "bfloat16" if formats.stochastic => (Dtype::Bf16, WeightFormat::Bf16Stochastic),
            "bfloat16" => (Dtype::Bf16, WeightFormat::Bf16WithRemainder),
            "float16" => (Dtype::F16, WeightFormat::F16WithMaster),
            _ => {
                return Err(Error::Unsupported(format!(
                    "{name} is {dtype}: fp32, bf16 and fp16 are updated"
                )));
            }
        };
        let cut = |rule| Recipe::new(rule, weights, formats.moments).map(Way::Cut);
        let way = match rule.as_str() {
            "adamw" => cut(Rule::AdamW { amsgrad: false })?,
            "adamw_amsgrad" => cut(Rule::AdamW { amsgrad: true })?,
            "adam" => cut(Rule::Adam { amsgrad: false })?,
            "adam_amsgrad" => cut(Rule::Adam { amsgrad: true })?,
            "sgd" => cut(Rule::Sgd { momentum: false })?,
            "sgd_momentum" => cut(Rule::Sgd { momentum: true })?,
            "adagrad" => cut(Rule::Adagrad { initial_accumulator: formats.initial_accumulator })?,
            "lion" => cut(Rule::Lion)?,
            "adafactor" => Self::whole(WholeRule::Adafactor, weights, name, shape, formats)?,
            "muon" => Self::whole(WholeRule::Muon, weights, name, shape, formats)?,
            _ => return Err(Error::Argument(format!("there is no rule {rule:?}"))),
        };
        Ok(Self { name: name.clone(), dtype, numel, way, begins_tile: false })
    }

    fn whole(
        rule: WholeRule,
        weights: WeightFormat,
        name: &str,
        shape: &[usize],
        formats: &Formats,
    ) -> Result<Way, Error> {
        if formats.moments != MomentFormat::F32 {
            return Err(Error::Unsupported(format!("{name}: the moments of this optimizer are fp32 only")));
        }
        let described = match *shape {
            [.., rows, columns] => {
                Shape::Matrices { count: shape[..shape.len() - 2].iter().product(), rows, columns }
            }
            _ => Shape::Vector(shape.iter().product()),
        };
        let recipe = WholeRecipe::new(rule, weights, described)?;
        let shape_of = |moment: &'static str| match (moment, shape) {
            ("row_var", [front @ .., _]) => [front, &[1]].concat(),
            ("col_var", [front @ .., _, columns]) => [front, &[1, *columns]].concat(),
            _ => shape.to_vec(),
        };
        let moments = recipe.moment_names()?.into_iter().map(|(name, _)| (name, shape_of(name))).collect();
        Ok(Way::Whole { recipe, moments })
    }

    /// What the swapper is told.
    pub(super) fn spec(&self) -> Result<ParameterSpec, Error> {
        let state = match &self.way {
            Way::Cut(recipe) => {
                // The longest record can be counted, so every shorter one can.
                recipe.record_bytes(self.numel)?;
                let recipe = *recipe;
                let bytes = move |elements| recipe.record_bytes(elements).unwrap_or(usize::MAX);
                StateSize::Cut { elements: recipe.cut_elements(), bytes: Arc::new(bytes) }
            }
            Way::Whole { recipe, .. } => StateSize::Whole(recipe.layout()?.bytes()),
        };
        Ok(ParameterSpec { name: self.name.clone(), numel: self.numel, state, begins_tile: self.begins_tile })
    }

    /// Memory that an update takes besides weights, gradient and state, in bytes.
    pub(super) fn workspace_bytes(&self) -> usize {
        match &self.way {
            Way::Cut(_) => 0,
            Way::Whole { recipe, .. } => recipe.workspace_bytes(),
        }
    }

    /// The names and shapes of the moments.
    pub(super) fn moments(&self, shape: &[usize]) -> Vec<Moment> {
        match &self.way {
            Way::Cut(recipe) => recipe.moment_names().map(|name| (name, shape.to_vec())).collect(),
            Way::Whole { moments, .. } => moments.clone(),
        }
    }

    /// Whether the fp32 master is another number than the weight.
    pub(super) fn has_master(&self) -> bool {
        let weights = match &self.way {
            Way::Cut(recipe) => recipe.weights(),
            Way::Whole { recipe, .. } => recipe.weights(),
        };
        matches!(weights, WeightFormat::Bf16WithRemainder | WeightFormat::F16WithMaster)
    }

    fn origin(part: &PartView<'_>, step: u64) -> Origin {
        let (parameter, element) = (part.parameter as u64, part.elements.start as u64);
        Origin { seed: 0, parameter, step, element }
    }

    /// Begins the state of a part: masters from `values`, moments as the rule begins.
    pub(super) fn initialize(
        &self,
        isa: Isa,
        part: &mut PartView<'_>,
        weights: Weights<'_>,
        values: Gradient<'_>,
    ) -> Result<(), Error> {
        let origin = Self::origin(part, 0);
        // What is not finite in a weight stays so, as it does in torch.
        let _outcome = match &self.way {
            Way::Cut(recipe) => {
                let elements = part.elements.len();
                let tile = Tile { record: &mut *part.state, elements, range: 0..elements, weights };
                recipe.initialize(isa, tile, values, origin)?
            }
            Way::Whole { recipe, .. } => recipe.initialize(isa, &mut *part.state, weights, values, origin)?,
        };
        Ok(())
    }

    /// Takes a step on a part.
    pub(super) fn apply(
        &self,
        isa: Isa,
        coefficients: &Coefficients<'_>,
        part: &mut PartView<'_>,
        weights: Weights<'_>,
        gradient: Gradient<'_>,
    ) -> Result<(), Error> {
        let origin = Self::origin(part, coefficients.step());
        // What is not finite goes into the parameter, as it does in torch: who wants to skip such a step looks first.
        let _outcome = match &self.way {
            Way::Cut(recipe) => {
                let elements = part.elements.len();
                let step = coefficients.of(recipe.rule(), part.is_new);
                let tile = Tile { record: &mut *part.state, elements, range: 0..elements, weights };
                recipe.apply(isa, &step, tile, gradient, origin)?
            }
            Way::Whole { recipe, .. } => {
                let step = coefficients.of_whole(recipe.rule());
                recipe.apply(isa, &step, &mut *part.state, weights, gradient, origin)?
            }
        };
        Ok(())
    }

    /// Writes the masters of a part to `out`.
    pub(super) fn read_masters(
        &self,
        state: &mut [u8],
        weights: Weights<'_>,
        out: &mut [f32],
    ) -> Result<(), Error> {
        let elements = out.len();
        match &self.way {
            Way::Cut(recipe) => {
                recipe.read_masters(Tile { record: state, elements, range: 0..elements, weights }, out)?;
            }
            Way::Whole { recipe, .. } => recipe.read_masters(state, weights, out)?,
        }
        Ok(())
    }

    /// Writes a moment of a part, which has `elements` elements, to its place in `whole`: the moment of the parameter.
    pub(super) fn read_moment(
        &self,
        state: &[u8],
        elements: std::ops::Range<usize>,
        name: &str,
        whole: &mut [f32],
    ) -> Result<(), Error> {
        match &self.way {
            Way::Cut(recipe) => {
                let out = piece(name, whole.get_mut(elements.clone()))?;
                recipe.read_moment(state, elements.len(), name, out)?;
            }
            Way::Whole { recipe, .. } => recipe.read_moment(state, name, whole)?,
        }
        Ok(())
    }

    /// Sets a moment of a part from the moment of the parameter.
    pub(super) fn write_moment(
        &self,
        state: &mut [u8],
        elements: std::ops::Range<usize>,
        name: &str,
        whole: &[f32],
    ) -> Result<(), Error> {
        match &self.way {
            Way::Cut(recipe) => recipe.write_moment(state, name, piece(name, whole.get(elements))?)?,
            Way::Whole { recipe, .. } => recipe.write_moment(state, name, whole)?,
        }
        Ok(())
    }
}

/// # Errors
/// [`Error::Argument`] when there was no such piece.
fn piece<T>(name: &str, piece: Option<T>) -> Result<T, Error> {
    piece.ok_or_else(|| Error::Argument(format!("{name} has fewer elements than the parameter")))
}
