//! Where every parameter lives: the model as a sequence of units, each one flat array of `f32`.
//!
//! A *unit* is what is loaded, used and released together: the embedding, each decoder layer, the head. Inside a
//! unit the parameters follow each other at aligned offsets, and the unit ends padded to whole disk blocks; the
//! padding is zero, gets no gradient, and so stays zero. Weights, gradients and moments of a unit share this one
//! layout, so an element has the same index in all of them.
//!
//! The optimizer's [`StateRecipe`] decides how many bytes an element has where, and through them what is aligned: weights
//! of two bytes need twice the elements to fill a disk block, moments that share a scale need parameters that begin
//! with a block of their own, and a parameter that is updated as a whole begins with a disk block, because it is stored
//! by itself.

use std::ops::Range;

use overspill_io::BLOCK_ALIGNMENT;
use overspill_optim::{Recipe, WeightFormat};

use crate::config::ModelConfig;
use crate::optimizer::single_precision_adamw;
use crate::piece::{Piece, PieceRule};
use crate::recipe::StateRecipe;

/// A part of the model that is in memory as a whole or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unit {
    /// The token embedding.
    Embedding,
    /// The decoder layer of this index.
    Layer(usize),
    /// The last norm and, unless it is tied to the embedding, the projection onto the vocabulary.
    Head,
}

impl std::fmt::Display for Unit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedding => write!(f, "embedding"),
            Self::Layer(index) => write!(f, "layer {index}"),
            Self::Head => write!(f, "head"),
        }
    }
}

/// One parameter inside its unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its place among all parameters of the model.
    pub number: u64,
    /// Its name in a Hugging Face checkpoint.
    pub name: String,
    /// Its shape, outermost dimension first; matrices are `[out, in]`.
    pub shape: Vec<usize>,
    /// Its elements inside the unit.
    pub range: Range<usize>,
    /// What it is for, which decides its first value and whether it decays.
    pub role: Role,
}

/// What a parameter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A matrix that reads from the residual stream, or the embedding.
    Matrix,
    /// A matrix that writes to the residual stream.
    Output,
    /// The gain of a norm: starts at one and does not decay.
    Gain,
}

impl Role {
    /// Whether weight decay applies.
    pub fn decays(self) -> bool {
        !matches!(self, Self::Gain)
    }
}

/// The flat layout of one unit.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitLayout {
    /// Which unit this is.
    pub unit: Unit,
    /// Its parameters, by offset.
    pub parameters: Vec<Parameter>,
    /// Its length with padding, in elements: whole disk blocks of weights.
    pub padded: usize,
    /// What it is cut into, before anything is cut.
    runs: Vec<Piece>,
}

/// Parameters start at a multiple of this many elements at least: one cache line.
const PARAMETER_ALIGNMENT: usize = 16;

impl UnitLayout {
    /// Lays out `parameters`, the first of which is number `first` of the model.
    fn new(
        unit: Unit,
        first: u64,
        parameters: Vec<(String, Vec<usize>, Role)>,
        recipe: &StateRecipe,
    ) -> Self {
        let block_elements = BLOCK_ALIGNMENT / recipe.weights().weight_bytes();
        let wholes: Vec<_> = parameters.iter().map(|(_, shape, _)| recipe.whole(unit, shape)).collect();
        let elements = recipe.elements();
        let alignment = match wholes.iter().any(Option::is_some) {
            true => block_elements,
            false => elements.map_or(1, |recipe| recipe.cut_elements()).max(PARAMETER_ALIGNMENT),
        };
        let mut next = 0;
        let parameters: Vec<_> = (first..)
            .zip(parameters)
            .map(|(number, (name, shape, role))| {
                let range = next..next + shape.iter().product::<usize>();
                next = range.end.next_multiple_of(alignment);
                Parameter { number, name, shape, range, role }
            })
            .collect();
        let padded = next.next_multiple_of(block_elements);
        let mut runs: Vec<Piece> = Vec::new();
        for (parameter, whole) in wholes.into_iter().enumerate() {
            let end = parameters.get(parameter + 1).map_or(padded, |next| next.range.start);
            let rule = match (whole, elements) {
                (Some(recipe), _) => PieceRule::Whole { recipe, parameter },
                (None, Some(recipe)) => PieceRule::Elements(recipe),
                (None, None) => unreachable!("what is no whole has a recipe for its elements"),
            };
            match runs.last_mut() {
                Some(run) if run.rule == rule => run.range.end = end,
                _ => runs.push(Piece { range: parameters[parameter].range.start..end, rule }),
            }
        }
        Self { unit, parameters, padded, runs }
    }

    /// What the unit is cut into when elements that are updated by themselves come in tiles of this length.
    pub fn pieces(&self, tile_elements: usize) -> impl Iterator<Item = Piece> {
        self.runs.iter().flat_map(move |run| run.cut(tile_elements))
    }

    /// How a parameter of the unit is updated and stored.
    ///
    /// # Panics
    /// When it is another unit's.
    pub(crate) fn rule_of(&self, parameter: &Parameter) -> PieceRule {
        let run = self.runs.iter().find(|run| run.range.contains(&parameter.range.start));
        run.expect("every element of a unit is in one of its runs").rule
    }

    /// Number of pieces.
    pub(crate) fn piece_count(&self, tile_elements: usize) -> usize {
        self.runs.iter().map(|run| run.cuts(tile_elements)).sum()
    }

    /// Number of parameters (elements), padding not counted.
    pub fn numel(&self) -> usize {
        self.parameters.iter().map(|p| p.range.len()).sum()
    }

    /// Length of one array of `f32` of this layout, in bytes.
    pub fn padded_bytes(&self) -> usize {
        self.padded * size_of::<f32>()
    }

    /// The parts of `within` that belong to a parameter, each with the parameter it belongs to.
    pub fn parameters_within(
        &self,
        within: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, &Parameter)> {
        self.parameters.iter().filter_map(move |parameter| {
            let start = parameter.range.start.max(within.start);
            let end = parameter.range.end.min(within.end);
            (start < end).then_some((start..end, parameter))
        })
    }
}

/// The layout of a whole model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelLayout {
    recipe: StateRecipe,
    units: Vec<UnitLayout>,
}

impl ModelLayout {
    /// Lays out a model whose state is that of AdamW in single precision.
    pub fn new(config: &ModelConfig) -> Self {
        Self::of(config, single_precision_adamw())
    }

    /// Lays out a model for the state of a recipe: embedding, layers, head.
    pub fn of(config: &ModelConfig, recipe: impl Into<StateRecipe>) -> Self {
        let recipe = recipe.into();
        let embedding =
            vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab, config.hidden], Role::Matrix)];
        let mut head = vec![("model.norm.weight".to_owned(), vec![config.hidden], Role::Gain)];
        if !config.tied {
            head.push(("lm_head.weight".to_owned(), vec![config.vocab, config.hidden], Role::Matrix));
        }
        let layers = (0..config.layers).map(|l| (Unit::Layer(l), layer_parameters(config, l)));
        let all = std::iter::once((Unit::Embedding, embedding)).chain(layers).chain([(Unit::Head, head)]);
        let mut first = 0;
        let units = all.map(|(unit, parameters)| {
            let count = parameters.len() as u64;
            let layout = UnitLayout::new(unit, first, parameters, &recipe);
            first += count;
            layout
        });
        Self { recipe, units: units.collect() }
    }

    /// How the state is updated and stored.
    pub fn state_recipe(&self) -> &StateRecipe {
        &self.recipe
    }

    /// How weights are stored.
    pub fn weight_format(&self) -> WeightFormat {
        self.recipe.weights()
    }

    /// Length of the weights of a unit as they are stored, in bytes.
    pub fn weights_bytes(&self, unit: &UnitLayout) -> usize {
        unit.padded * self.weight_bytes()
    }

    /// Length of a stored weight, in bytes.
    pub fn weight_bytes(&self) -> usize {
        self.recipe.weights().weight_bytes()
    }

    /// Whether the model computes with stored weights as they are; others are widened for it.
    pub fn lends_weights(&self) -> bool {
        self.weight_bytes() == size_of::<f32>()
    }

    /// Length of the record of a tile of so many elements that are updated by themselves, in whole disk blocks, in bytes; 0
    /// when there is nothing to record.
    ///
    /// # Panics
    /// When a tile is longer than memory could be.
    pub fn record_bytes(&self, tile_elements: usize) -> usize {
        let record = |recipe: Recipe| recipe.record_bytes(tile_elements).expect("a tile fits in memory");
        self.recipe.elements().map_or(0, record).next_multiple_of(BLOCK_ALIGNMENT)
    }

    /// Length of the records of all pieces of a unit, in bytes.
    pub fn records_bytes(&self, unit: &UnitLayout, tile_elements: usize) -> usize {
        unit.runs.iter().map(|run| run.records_bytes(tile_elements)).sum()
    }

    /// Elements of the longest piece.
    pub fn longest_piece(&self, tile_elements: usize) -> usize {
        self.runs().map(|run| run.cut_elements(tile_elements)).max().unwrap_or(0)
    }

    /// Length of the longest record of a piece, in bytes.
    pub fn longest_record_bytes(&self, tile_elements: usize) -> usize {
        let longest = self.runs().filter_map(|run| run.cut(tile_elements).next());
        longest.map(|piece| piece.record_bytes()).max().unwrap_or(0)
    }

    /// The most memory that the update of a piece takes besides its state and its gradient, in bytes.
    pub fn update_workspace_bytes(&self) -> usize {
        self.runs().map(Piece::workspace_bytes).max().unwrap_or(0)
    }

    fn runs(&self) -> impl Iterator<Item = &Piece> {
        self.units.iter().flat_map(|unit| &unit.runs)
    }

    /// Length of everything that is kept of the model between steps, and of its gradients, in bytes.
    pub fn state_bytes(&self, tile_elements: usize) -> usize {
        let bytes = |unit: &UnitLayout| {
            self.weights_bytes(unit) + self.records_bytes(unit, tile_elements) + unit.padded_bytes()
        };
        self.units.iter().map(bytes).sum()
    }

    /// All units in forward order.
    pub fn units(&self) -> &[UnitLayout] {
        &self.units
    }

    /// Position of a unit in forward order.
    pub fn index(&self, unit: Unit) -> usize {
        match unit {
            Unit::Embedding => 0,
            Unit::Layer(layer) => 1 + layer,
            Unit::Head => self.units.len() - 1,
        }
    }

    /// The layout of one unit.
    pub fn unit(&self, unit: Unit) -> &UnitLayout {
        &self.units[self.index(unit)]
    }

    /// Number of parameters of the model; shared ones count once.
    pub fn numel(&self) -> usize {
        self.units.iter().map(UnitLayout::numel).sum()
    }

    /// Length of one array of `f32` over all units with padding, in bytes.
    pub fn padded_bytes(&self) -> usize {
        self.units.iter().map(UnitLayout::padded_bytes).sum()
    }

    /// Length of the longest unit as `f32`, in bytes.
    pub fn largest_unit_bytes(&self) -> usize {
        self.units.iter().map(UnitLayout::padded_bytes).max().unwrap_or(0)
    }
}

/// The parameters of a decoder layer, in the order of [`crate::model`]'s use.
fn layer_parameters(config: &ModelConfig, layer: usize) -> Vec<(String, Vec<usize>, Role)> {
    let (hidden, query, kv, ffn) = (config.hidden, config.query_width(), config.kv_width(), config.ffn);
    let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
    vec![
        (name("input_layernorm"), vec![hidden], Role::Gain),
        (name("self_attn.q_proj"), vec![query, hidden], Role::Matrix),
        (name("self_attn.k_proj"), vec![kv, hidden], Role::Matrix),
        (name("self_attn.v_proj"), vec![kv, hidden], Role::Matrix),
        (name("self_attn.o_proj"), vec![hidden, query], Role::Output),
        (name("post_attention_layernorm"), vec![hidden], Role::Gain),
        (name("mlp.gate_proj"), vec![ffn, hidden], Role::Matrix),
        (name("mlp.up_proj"), vec![ffn, hidden], Role::Matrix),
        (name("mlp.down_proj"), vec![hidden, ffn], Role::Output),
    ]
}

#[cfg(test)]
mod tests;
