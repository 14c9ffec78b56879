//! How the state of a model is updated and stored: which parameter by which rule.
//!
//! Most rules change every element by itself, so their state is cut into tiles as the disk likes. Adafactor and Muon need
//! a whole parameter at a time: it is stored as one [piece](crate::piece), however long. Muon is for the matrices of the
//! decoder layers; the embedding, the projection onto the vocabulary and the gains of norms go by AdamW beside it, as is
//! the practice of those who train with it.

use overspill_optim::{MomentFormat, Recipe, Rule, Shape, WeightFormat, WholeRecipe, WholeRule};

use crate::layout::Unit;

/// The rules of a model's parameters, and the formats of their state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StateRecipe {
    /// Every element by itself.
    Elements(Recipe),
    /// Every parameter as a whole, by Adafactor.
    Adafactor(WeightFormat),
    /// Matrices of the decoder layers as wholes, by Muon; everything else by AdamW with moments in single precision.
    Muon(WeightFormat),
}

/// Rules that need a whole parameter keep their moments in single precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--moments {moments} is not for --optimizer {optimizer}, which keeps them in f32")]
pub struct SingleMoments {
    /// Name of the rule.
    pub optimizer: &'static str,
    /// Name of the format that was asked for.
    pub moments: &'static str,
}

impl StateRecipe {
    /// How weights are stored.
    pub fn weights(&self) -> WeightFormat {
        match self {
            Self::Elements(recipe) => recipe.weights(),
            Self::Adafactor(weights) | Self::Muon(weights) => *weights,
        }
    }

    /// How moments are stored.
    pub fn moments(&self) -> MomentFormat {
        match self {
            Self::Elements(recipe) => recipe.moments(),
            Self::Adafactor(_) | Self::Muon(_) => MomentFormat::F32,
        }
    }

    /// The recipe of what is updated element by element; `None` when nothing is.
    pub fn elements(&self) -> Option<Recipe> {
        match self {
            Self::Elements(recipe) => Some(*recipe),
            Self::Adafactor(_) => None,
            Self::Muon(weights) => {
                let adamw = Rule::AdamW { amsgrad: false };
                Some(Recipe::new(adamw, *weights, MomentFormat::F32).expect("it keeps no maximum"))
            }
        }
    }

    /// The recipe of a parameter of `unit` of this shape, outermost dimension first, if it is updated as a whole.
    pub fn whole(&self, unit: Unit, shape: &[usize]) -> Option<WholeRecipe> {
        let shape = match *shape {
            [rows, columns] => Shape::matrix(rows, columns),
            _ => Shape::Vector(shape.iter().product()),
        };
        let (rule, weights) = match (self, unit, shape) {
            (Self::Adafactor(weights), _, _) => (WholeRule::Adafactor, weights),
            (Self::Muon(weights), Unit::Layer(_), Shape::Matrices { .. }) => (WholeRule::Muon, weights),
            (Self::Elements(_) | Self::Muon(_), _, _) => return None,
        };
        Some(WholeRecipe::new(rule, *weights, shape).expect("a parameter of a model has elements"))
    }
}

impl From<Recipe> for StateRecipe {
    fn from(recipe: Recipe) -> Self {
        Self::Elements(recipe)
    }
}

impl From<&Recipe> for StateRecipe {
    fn from(recipe: &Recipe) -> Self {
        Self::Elements(*recipe)
    }
}

impl From<&Self> for StateRecipe {
    fn from(recipe: &Self) -> Self {
        *recipe
    }
}
