//! Writing a model's folder.
//!
//! [`CheckpointWriter::create`] knows every header before the first weight: it makes all files, takes their space
//! on the file system and writes the headers. Units then come in the layout's order and are appended, and
//! [`CheckpointWriter::finish`] gives the folder its name. Dropped before that, the writer removes what it made.

use std::collections::VecDeque;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use rustix::fs::Access;
use serde_json::{Map, Value};

use super::folder::{Contents, FolderWriter};
use super::plan::{Precision, TensorPlan};
use super::{Action, CONFIG, Checkpoint, CheckpointError, MODEL, staging};
use crate::config::{self, ModelConfig};
use crate::data::Tokenizer;
use crate::layout::{ModelLayout, UnitLayout};

/// The usual limit for a file of tensors, in bytes.
pub const SHARD_BYTES_MAX: u64 = 4 << 30;

/// Numbers that are rounded at a time.
const PIECE_ELEMENTS: usize = 1 << 16;

/// A model on its way into a Hugging Face folder.
#[derive(Debug)]
pub struct CheckpointWriter {
    /// Parameters that have not come yet, in order.
    awaited: VecDeque<String>,
    folder: FolderWriter,
    precision: Precision,
    /// Numbers that were rounded.
    rounded: Vec<half::bf16>,
}

impl CheckpointWriter {
    /// Checks that a folder could be begun at `target`, and makes nothing.
    ///
    /// # Errors
    /// [`CheckpointError::NotEmpty`], [`CheckpointError::NoParent`], [`CheckpointError::MountPoint`],
    /// [`CheckpointError::Io`].
    pub fn check_destination(target: &Path) -> Result<(), CheckpointError> {
        let resolved = staging::resolve(target)?;
        let parent = staging::parent(&resolved);
        rustix::fs::access(parent, Access::WRITE_OK | Access::EXEC_OK)
            .map_err(|errno| Action::Write.failed(parent)(errno.into()))
    }

    /// Begins the folder `target`, which must not be there or be empty, for weights as `f32` in files of at most
    /// [`SHARD_BYTES_MAX`].
    ///
    /// The tokenizer's files are copied from where it was read, or made for [`Tokenizer::Bytes`]. Until
    /// [`CheckpointWriter::finish`] everything is in a hidden folder beside `target`, and its full size is taken.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::check_destination`], and [`CheckpointError::NoSpace`]; nothing is left behind.
    pub fn create(
        target: &Path,
        config: &ModelConfig,
        layout: &ModelLayout,
        tokenizer: &Tokenizer,
    ) -> Result<Self, CheckpointError> {
        Self::create_sharded(target, config, layout, tokenizer, SHARD_BYTES_MAX)
    }

    /// As [`CheckpointWriter::create`], for a model that was read from a folder: its `config.json` goes along with
    /// every field, and only the dtype of the weights becomes `float32`.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::create`].
    pub fn create_from(
        target: &Path,
        checkpoint: &Checkpoint,
        layout: &ModelLayout,
        tokenizer: &Tokenizer,
    ) -> Result<Self, CheckpointError> {
        let config_json = config::with_dtype(checkpoint.config_fields().clone(), Precision::F32.name());
        Self::begin(target, config_json, layout, tokenizer.folder(), Precision::F32, SHARD_BYTES_MAX)
    }

    /// As [`CheckpointWriter::create`], with another limit for a file's tensors, in bytes.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::create`].
    pub fn create_sharded(
        target: &Path,
        config: &ModelConfig,
        layout: &ModelLayout,
        tokenizer: &Tokenizer,
        shard_bytes_max: u64,
    ) -> Result<Self, CheckpointError> {
        Self::begin(target, config.to_json(), layout, tokenizer.folder(), Precision::F32, shard_bytes_max)
    }

    /// As [`CheckpointWriter::create`], for a model that is known by the fields of its `config.json` and the folder of its
    /// tokenizer, with weights of this precision.
    pub(crate) fn create_as(
        target: &Path,
        config: &Map<String, Value>,
        layout: &ModelLayout,
        tokenizer: Option<&Path>,
        precision: Precision,
    ) -> Result<Self, CheckpointError> {
        let config_json = config::with_dtype(config.clone(), precision.name());
        Self::begin(target, config_json, layout, tokenizer, precision, SHARD_BYTES_MAX)
    }

    fn begin(
        target: &Path,
        config_json: String,
        layout: &ModelLayout,
        tokenizer: Option<&Path>,
        precision: Precision,
        shard_bytes_max: u64,
    ) -> Result<Self, CheckpointError> {
        let parameters = || layout.units().iter().flat_map(|unit| &unit.parameters);
        let contents = Contents {
            texts: vec![(CONFIG, config_json)],
            tokenizer,
            stem: MODEL,
            tensors: parameters().map(|parameter| TensorPlan::of(parameter, precision)).collect(),
            note: None,
            shard_bytes_max,
        };
        let folder = FolderWriter::begin(target, contents)?;
        let awaited = parameters().map(|parameter| parameter.name.clone()).collect();
        Ok(Self { awaited, folder, precision, rounded: Vec::new() })
    }

    /// Appends the weights of the next unit; padding is left out.
    ///
    /// # Errors
    /// [`CheckpointError::NoSpace`], [`CheckpointError::Io`].
    ///
    /// # Panics
    /// When the unit is not the next one of the layout, or `weights` is not as long as the unit with its padding.
    pub fn write_unit(&mut self, unit: &UnitLayout, weights: &[f32]) -> Result<(), CheckpointError> {
        assert_eq!(weights.len(), unit.padded, "length of {}", unit.unit);
        for parameter in &unit.parameters {
            let next = self.awaited.pop_front();
            assert!(
                next.as_ref() == Some(&parameter.name),
                "units are written once each, in the layout's order"
            );
            self.append(&parameter.name, &weights[parameter.range.clone()])?;
        }
        Ok(())
    }

    /// Appends the elements of a unit from `start` on, which may begin and end anywhere; padding is left out.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::write_unit`].
    pub(crate) fn write_part(
        &mut self,
        unit: &UnitLayout,
        start: usize,
        weights: &[f32],
    ) -> Result<(), CheckpointError> {
        for (range, parameter) in unit.parameters_within(start..start + weights.len()) {
            self.awaited.pop_front_if(|name| *name == parameter.name);
            self.append(&parameter.name, &weights[range.start - start..range.end - start])?;
        }
        Ok(())
    }

    fn append(&mut self, tensor: &str, values: &[f32]) -> Result<(), CheckpointError> {
        match self.precision {
            Precision::F32 => {
                self.folder.append(tensor, bytemuck::cast_slice(values))?;
            }
            Precision::Bf16 => {
                for values in values.chunks(PIECE_ELEMENTS) {
                    self.rounded.resize(values.len(), half::bf16::ZERO);
                    self.rounded.convert_from_f32_slice(values);
                    self.folder.append(tensor, bytemuck::cast_slice(&self.rounded))?;
                }
            }
        }
        Ok(())
    }

    /// Makes the folder safe on storage and gives it its name.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; nothing is left behind. [`CheckpointError::NameNotSynced`]; the folder is there and
    /// whole, but a loss of power may still take its name away.
    ///
    /// # Panics
    /// When not every unit was written.
    pub fn finish(self) -> Result<(), CheckpointError> {
        assert!(self.awaited.is_empty(), "{} parameters were not written", self.awaited.len());
        self.folder.finish()
    }
}
