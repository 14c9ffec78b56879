//! Which bytes of a tile belong to which tensor of a folder.
//!
//! A folder has a tensor of each parameter's weights, as they are stored, and one of each column of its record, whatever
//! the recipe calls them: with a cell for each element it has the parameter's shape, and with fewer it is a row of cells.
//! Only the remainders of bf16 weights mean nothing to anybody else: they are joined with the weights, and the tensor
//! holds the exact masters.
//!
//! A tile has parts of parameters, in its weights and in each column of its records; each part is a [`Piece`], and the
//! pieces of all tiles, in their order, are the tensors from their first byte to the last.

use std::ops::Range;

use overspill_optim::{Field, RecordLayout, WeightFormat};
use safetensors::Dtype;

use super::{Tile, TileKind};
use crate::checkpoint::{Naming, TensorPlan};
use crate::layout::{ModelLayout, Parameter, UnitLayout};
use crate::piece;

/// What a record calls the lower halves of the masters, and what the folder and other records call the masters.
const REMAINDER: &str = "remainder";
const MASTER: &str = "master";

/// What a tensor has of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Array {
    /// Its weights, as they are stored.
    Weights,
    /// Its exact weights, of which the record has what the stored ones lack.
    Joined,
    /// A column of its record, as it is.
    Column(&'static str),
}

impl Array {
    fn of(field: &Field) -> Self {
        match field.name {
            REMAINDER => Self::Joined,
            name => Self::Column(name),
        }
    }

    /// Whether these are exact weights.
    pub(super) fn has_masters(self) -> bool {
        matches!(self, Self::Joined | Self::Column(MASTER))
    }

    /// What its tensors are called after their parameter.
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Weights => None,
            Self::Joined => Some(MASTER),
            Self::Column(name) => Some(name),
        }
    }

    /// Bytes that the tensor has of a cell that takes so many in the record.
    fn tensor_bytes(self, cell_bytes: usize) -> usize {
        match self {
            Self::Joined => size_of::<f32>(),
            Self::Weights | Self::Column(_) => cell_bytes,
        }
    }
}

/// Consecutive bytes of a tile that are consecutive in a tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece<'a> {
    parameter: &'a Parameter,
    pub(super) array: Array,
    /// Its elements within the tile.
    pub(super) elements: Range<usize>,
    /// Its bytes within the tile's weights, or within its records.
    pub(super) bytes: Range<usize>,
    /// Its first byte within the tensor.
    pub(super) start: u64,
}

impl Piece<'_> {
    /// The tensor that it belongs to.
    pub(super) fn tensor(&self, naming: Naming) -> String {
        naming.name(&self.parameter.name, self.array.name())
    }

    /// The tensor of the weights of the same parameter.
    pub(super) fn weights_tensor(&self, naming: Naming) -> String {
        naming.name(&self.parameter.name, Array::Weights.name())
    }
}

/// All tensors of a state.
pub(super) fn tensors(layout: &ModelLayout, naming: Naming) -> Vec<TensorPlan> {
    let weights = weight_dtype(layout.weight_format()).0;
    let of_unit = |unit: &'_ UnitLayout| {
        let of = |p| tensors_of(p, weights, &record_of(unit, p), naming);
        unit.parameters.iter().flat_map(of).collect::<Vec<_>>()
    };
    layout.units().iter().flat_map(of_unit).collect()
}

/// Those of a parameter, whose weights are of this dtype, by the record that it would have alone.
fn tensors_of(
    parameter: &Parameter,
    weights: Dtype,
    record: &RecordLayout,
    naming: Naming,
) -> Vec<TensorPlan> {
    let tensor = |array: Array, shape, dtype| TensorPlan {
        name: naming.name(&parameter.name, array.name()),
        shape,
        dtype,
    };
    let column = |field: &Field| {
        let array = Array::of(field);
        let shape = if field.cell_elements == 1 { parameter.shape.clone() } else { vec![field.cells] };
        tensor(array, shape, dtype(array.tensor_bytes(field.cell_bytes)))
    };
    let weights = tensor(Array::Weights, parameter.shape.clone(), weights);
    std::iter::once(weights).chain(record.fields().iter().map(column)).collect()
}

/// The record of a parameter that is alone in its tile.
fn record_of(unit: &UnitLayout, parameter: &Parameter) -> RecordLayout {
    piece::Piece { range: parameter.range.clone(), rule: unit.rule_of(parameter) }.record()
}

/// Of stored weights, also in torch's words.
pub(super) fn weight_dtype(format: WeightFormat) -> (Dtype, &'static str) {
    match format {
        WeightFormat::F32 => (Dtype::F32, "float32"),
        WeightFormat::F16WithMaster => (Dtype::F16, "float16"),
        WeightFormat::Bf16WithRemainder | WeightFormat::Bf16Stochastic => (Dtype::BF16, "bfloat16"),
    }
}

/// Of cells of so many bytes: the numbers of a record are of three kinds.
fn dtype(cell_bytes: usize) -> Dtype {
    match cell_bytes {
        4 => Dtype::F32,
        2 => Dtype::BF16,
        1 => Dtype::U8,
        other => unreachable!("a record has no cells of {other} bytes"),
    }
}

/// A record of a tile.
struct Record {
    layout: RecordLayout,
    /// Its elements within the unit.
    elements: Range<usize>,
    /// Its first byte within the tile's records.
    at: usize,
}

/// The records of a tile: one of all its elements.
fn records(tile: Tile<'_>) -> impl Iterator<Item = Record> {
    let elements = tile.start..tile.start + tile.elements;
    std::iter::once(Record { layout: tile.record(), elements, at: 0 })
}

/// The pieces of a tile; padding belongs to none.
pub(super) fn pieces<'a>(layout: &ModelLayout, tile: Tile<'a>) -> Vec<Piece<'a>> {
    match tile.kind {
        TileKind::Weights => {
            let cell_bytes = layout.weight_bytes();
            let elements = tile.start..tile.start + tile.elements;
            cut(tile, Array::Weights, &elements, 0, (cell_bytes, 1)).collect()
        }
        TileKind::Moments => records(tile)
            .flat_map(|record| {
                let column = |field: &Field| {
                    let (at, cell) = (record.at + field.start, (field.cell_bytes, field.cell_elements));
                    cut(tile, Array::of(field), &record.elements, at, cell)
                };
                record.layout.fields().iter().flat_map(column).collect::<Vec<_>>()
            })
            .collect(),
    }
}

/// The pieces of an array that begins at byte `at` of the tile, and has a cell of so many bytes for so many elements of
/// `within` its unit.
fn cut<'a>(
    tile: Tile<'a>,
    array: Array,
    within: &Range<usize>,
    at: usize,
    (cell_bytes, cell_elements): (usize, usize),
) -> impl Iterator<Item = Piece<'a>> {
    let first = within.start;
    tile.unit.parameters_within(within.clone()).map(move |(range, parameter)| {
        // Parameters begin with a cell of their own, and so do tiles.
        let cells = (range.start - first) / cell_elements..(range.end - first).div_ceil(cell_elements);
        let start = (range.start - parameter.range.start) / cell_elements * array.tensor_bytes(cell_bytes);
        Piece {
            parameter,
            array,
            elements: range.start - tile.start..range.end - tile.start,
            bytes: at + cells.start * cell_bytes..at + cells.end * cell_bytes,
            start: start as u64,
        }
    })
}
