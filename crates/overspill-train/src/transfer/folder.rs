//! The folder that an export makes, tile by tile.
//!
//! A whole state gets the bytes as they are stored, but for remainders. Weights get the numbers that they stand for, in
//! single precision; where the stored ones are less than exact, a tile of weights waits for its record.

use std::ops::Range;
use std::path::PathBuf;

use overspill_io::Block;
use overspill_optim::{WeightFormat, join_remainders};

use super::export::{ExportOptions, Form};
use super::pieces::{self, Array, pieces};
use super::{BOTH_KINDS, Tile, TileKind};
use crate::checkpoint::{CheckpointError, CheckpointWriter, Naming, Precision, StateWriter, TOKENIZER};
use crate::error::TrainError;
use crate::home::{floats, widen};
use crate::identity::ModelOrigin;
use crate::layout::ModelLayout;

/// The folder in the making.
pub(super) struct Folder<'a> {
    layout: &'a ModelLayout,
    writer: Writer,
    /// Whether weights wait for their record.
    joins: bool,
    /// Weights that do.
    waiting: Option<Block>,
    /// Weights as single precision.
    values: Vec<f32>,
}

enum Writer {
    Weights(CheckpointWriter),
    State(StateWriter),
}

impl Form {
    /// The tiles that it takes.
    pub(super) fn kinds(self, format: WeightFormat) -> &'static [TileKind] {
        if self == Self::State || self.needs_masters(format) { BOTH_KINDS } else { &[TileKind::Weights] }
    }

    /// Whether stored weights are not yet what is to be written. In half of the bits a model has those that it computed
    /// with, if these are of the same kind.
    fn needs_masters(self, format: WeightFormat) -> bool {
        match (self, format) {
            (_, WeightFormat::F32 | WeightFormat::Bf16Stochastic) => false,
            (Self::Weights(precision), WeightFormat::Bf16WithRemainder) => precision == Precision::F32,
            (Self::Weights(_), WeightFormat::F16WithMaster) => true,
            (Self::State, format) => format == WeightFormat::Bf16WithRemainder,
        }
    }

    /// The dtype of the weights, in torch's words.
    pub(super) fn dtype(self, format: WeightFormat) -> &'static str {
        match self {
            Self::Weights(precision) => precision.name(),
            Self::State => pieces::weight_dtype(format).1,
        }
    }
}

impl<'a> Folder<'a> {
    /// Begins the folder; its full size is taken.
    pub(super) fn begin(
        options: &ExportOptions,
        origin: &ModelOrigin,
        meta: &serde_json::Value,
        layout: &'a ModelLayout,
    ) -> Result<Self, TrainError> {
        let tokenizer = options.tokenizer.as_ref().or(origin.tokenizer.as_ref()).map(PathBuf::as_path);
        if let Some(folder) = tokenizer
            && !folder.join(TOKENIZER).is_file()
        {
            return Err(TrainError::TokenizerGone { folder: folder.to_owned() });
        }
        let (out, config, format) = (&options.out, &origin.config, layout.weight_format());
        let writer = match options.form {
            Form::Weights(precision) => {
                Writer::Weights(CheckpointWriter::create_as(out, config, layout, tokenizer, precision)?)
            }
            Form::State => {
                let tensors = pieces::tensors(layout, Naming::ParameterFirst);
                let dtype = options.form.dtype(format);
                Writer::State(StateWriter::create(out, meta, (config, dtype), tensors, tokenizer)?)
            }
        };
        let joins = options.form.needs_masters(format);
        Ok(Self { layout, writer, joins, waiting: None, values: Vec::new() })
    }

    /// Writes what is complete with this tile; the record of weights comes right after them.
    pub(super) fn take(&mut self, tile: Tile<'_>, block: Block) -> Result<(), CheckpointError> {
        match &mut self.writer {
            Writer::State(writer) => {
                for piece in pieces(self.layout, tile) {
                    let tensor = piece.tensor(Naming::ParameterFirst);
                    let bytes = &block[piece.bytes];
                    if piece.array == Array::Joined {
                        self.values.resize(piece.elements.len(), 0.0);
                        join(self.waiting.as_ref(), piece.elements, bytes, &mut self.values);
                        writer.write(&tensor, bytemuck::cast_slice(&self.values))?;
                    } else {
                        writer.write(&tensor, bytes)?;
                    }
                }
            }
            Writer::Weights(writer) => match (tile.kind, self.layout.weight_format()) {
                (TileKind::Weights, _) if self.joins => {}
                (TileKind::Weights, WeightFormat::F32) => {
                    writer.write_part(tile.unit, tile.start, floats(&block))?;
                }
                (TileKind::Weights, format) => {
                    self.values.resize(tile.elements, 0.0);
                    widen(format, &block, &mut self.values);
                    writer.write_part(tile.unit, tile.start, &self.values)?;
                }
                (TileKind::Moments, _) => {
                    // No parameter lacks masters, so what is not overwritten is padding.
                    self.values.resize(tile.elements, 0.0);
                    for piece in pieces(self.layout, tile).into_iter().filter(|p| p.array.has_masters()) {
                        let (values, bytes) = (&mut self.values[piece.elements.clone()], &block[piece.bytes]);
                        if piece.array == Array::Joined {
                            join(self.waiting.as_ref(), piece.elements, bytes, values);
                        } else {
                            values.copy_from_slice(bytemuck::cast_slice(bytes));
                        }
                    }
                    writer.write_part(tile.unit, tile.start, &self.values)?;
                }
            },
        }
        self.waiting = (self.joins && tile.kind == TileKind::Weights).then_some(block);
        Ok(())
    }

    /// Gives the folder its name.
    pub(super) fn finish(self) -> Result<(), CheckpointError> {
        match self.writer {
            Writer::Weights(writer) => writer.finish(),
            Writer::State(writer) => writer.finish(),
        }
    }
}

/// The exact weights of some elements of a tile, whose weights have waited for these remainders.
fn join(weights: Option<&Block>, elements: Range<usize>, remainders: &[u8], masters: &mut [f32]) {
    let weights = weights.expect("weights come before their record");
    // Both are aligned to more than a cell.
    let (weights, remainders) = (&bytemuck::cast_slice(weights)[elements], bytemuck::cast_slice(remainders));
    join_remainders(weights, remainders, masters).expect("a piece has a remainder for each weight");
}
