//! Where every parameter lives: the model as a sequence of units, each one flat array of `f32`.
//!
//! A *unit* is what is loaded, used and released together: the embedding, each decoder layer, the head. Inside a
//! unit the parameters follow each other at aligned offsets, and the unit ends padded to whole disk blocks; the
//! padding is zero, gets no gradient, and so stays zero. Weights, gradients and both moments of a unit share this
//! one layout, so an element has the same index in all of them.

use std::ops::Range;

use crate::config::ModelConfig;

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
    /// Its length with padding, in elements: a multiple of [`UNIT_ALIGNMENT`].
    pub padded: usize,
}

/// Units are padded to a multiple of this many elements: one disk block of `f32`.
pub const UNIT_ALIGNMENT: usize = overspill_io::BLOCK_ALIGNMENT / size_of::<f32>();

/// Parameters start at a multiple of this many elements: one cache line.
const PARAMETER_ALIGNMENT: usize = 16;

impl UnitLayout {
    fn new(unit: Unit, parameters: Vec<(String, Vec<usize>, Role)>) -> Self {
        let mut next = 0;
        let parameters = parameters
            .into_iter()
            .map(|(name, shape, role)| {
                let range = next..next + shape.iter().product::<usize>();
                next = range.end.next_multiple_of(PARAMETER_ALIGNMENT);
                Parameter { name, shape, range, role }
            })
            .collect();
        Self { unit, parameters, padded: next.next_multiple_of(UNIT_ALIGNMENT) }
    }

    /// Number of parameters (elements), padding not counted.
    pub fn numel(&self) -> usize {
        self.parameters.iter().map(|p| p.range.len()).sum()
    }

    /// Length of one array of this layout, in bytes.
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
    units: Vec<UnitLayout>,
}

impl ModelLayout {
    /// Lays out a model: embedding, layers, head.
    pub fn new(config: &ModelConfig) -> Self {
        let embedding =
            vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab, config.hidden], Role::Matrix)];
        let mut head = vec![("model.norm.weight".to_owned(), vec![config.hidden], Role::Gain)];
        if !config.tied {
            head.push(("lm_head.weight".to_owned(), vec![config.vocab, config.hidden], Role::Matrix));
        }
        let mut units = vec![UnitLayout::new(Unit::Embedding, embedding)];
        units
            .extend((0..config.layers).map(|l| UnitLayout::new(Unit::Layer(l), layer_parameters(config, l))));
        units.push(UnitLayout::new(Unit::Head, head));
        Self { units }
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

    /// Length of one array over all units with padding, in bytes.
    pub fn padded_bytes(&self) -> usize {
        self.units.iter().map(UnitLayout::padded_bytes).sum()
    }

    /// Length of the longest unit, in bytes.
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
