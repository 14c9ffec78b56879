//! Reading a model's folder.
//!
//! [`Checkpoint::open`] parses the configuration and every header and proves that each parameter is there with its
//! shape and a dtype that widens to `f32` exactly. Afterwards weights are read at their offsets.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::tensors::{Tensors, read_text};
use super::{CONFIG, CheckpointError, MODEL};
use crate::config::{self, ModelConfig};
use crate::layout::{ModelLayout, Parameter, UnitLayout};

/// A model in a Hugging Face folder, open for reading.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: ModelConfig,
    /// All of `config.json`, with what means nothing here.
    config_fields: Map<String, Value>,
    tensors: Tensors,
}

impl Checkpoint {
    /// Opens a folder and checks everything but the weights' values.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file and the tensor, when something is missing, malformed, or another model
    /// than `config.json` describes.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join(CONFIG);
        let text = read_text(&path)?;
        let checkpoint = Self {
            folder: folder.to_owned(),
            config: ModelConfig::from_json(&text, &path)?,
            config_fields: config::fields(&text, &path)?,
            tensors: Tensors::open(folder, MODEL, "format")?,
        };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The fields of `config.json`, as they were read.
    pub(crate) fn config_fields(&self) -> &Map<String, Value> {
        &self.config_fields
    }

    /// The folder, as it was given.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads a parameter's weights, row by row.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], and [`CheckpointError::MissingTensor`] or [`CheckpointError::WrongShape`] for a
    /// parameter that belongs to another model.
    ///
    /// # Panics
    /// When `out` is not as long as the parameter.
    pub fn read_parameter(&self, parameter: &Parameter, out: &mut [f32]) -> Result<(), CheckpointError> {
        assert_eq!(out.len(), parameter.range.len(), "length of {}", parameter.name);
        self.tensors.read(self.tensors.find(&parameter.name, &parameter.shape)?, 0, out)
    }

    /// Reads all weights of a unit; the padding between and behind them becomes zero.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read_parameter`].
    ///
    /// # Panics
    /// When `out` is not as long as the unit with its padding.
    pub fn read_unit(&self, unit: &UnitLayout, out: &mut [f32]) -> Result<(), CheckpointError> {
        assert_eq!(out.len(), unit.padded, "length of {}", unit.unit);
        self.read_part(unit, 0, out)
    }

    /// Reads the elements of a unit from `start` on; padding becomes zero.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read_parameter`].
    pub(crate) fn read_part(
        &self,
        unit: &UnitLayout,
        start: usize,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let mut end = start;
        for (range, parameter) in unit.parameters_within(start..start + out.len()) {
            out[end - start..range.start - start].fill(0.0);
            let tensor = self.tensors.find(&parameter.name, &parameter.shape)?;
            let first = range.start - parameter.range.start;
            self.tensors.read(tensor, first, &mut out[range.start - start..range.end - start])?;
            end = range.end;
        }
        out[end - start..].fill(0.0);
        Ok(())
    }

    /// Proves that the files hold the model that the configuration describes and nothing else.
    fn check(&self) -> Result<(), CheckpointError> {
        vouch(&self.tensors, &self.config, |name| name.to_owned())?;
        let mut expected = BTreeSet::new();
        for parameter in ModelLayout::new(&self.config).units().iter().flat_map(|unit| &unit.parameters) {
            let dtypes = [Dtype::F32, Dtype::BF16, Dtype::F16];
            check(&self.tensors, &parameter.name, &parameter.shape, &dtypes)?;
            expected.insert(parameter.name.clone());
        }
        no_strangers(&self.tensors, |name| expected.contains(name) || self.is_harmless(name))
    }

    /// Whether a tensor says nothing that the configuration and the other tensors do not say.
    fn is_harmless(&self, name: &str) -> bool {
        name.ends_with(".rotary_emb.inv_freq") || (self.config.tied && name == "lm_head.weight")
    }
}

/// Proves that a layout of the model, which is as large as the configuration claims, is no larger than the files. The last
/// layer's widest attention matrix vouches for the claim: it is there, by its name as `called`, and the product of its
/// sides was found not to overflow.
pub(super) fn vouch(
    tensors: &Tensors,
    config: &ModelConfig,
    called: impl Fn(&str) -> String,
) -> Result<(), CheckpointError> {
    let last = format!("model.layers.{}.self_attn.q_proj.weight", config.layers - 1);
    let heads = [config.heads, config.head_dim].map(|size| size as u64).iter().product::<u64>();
    tensors.find(&called(&last), &[heads as usize, config.hidden]).map(drop)
}

/// Proves that a tensor is there, with this shape and one of these dtypes.
pub(super) fn check(
    tensors: &Tensors,
    name: &str,
    shape: &[usize],
    dtypes: &[Dtype],
) -> Result<(), CheckpointError> {
    let tensor = tensors.find(name, shape)?;
    if dtypes.contains(&tensor.dtype) {
        return Ok(());
    }
    let (path, found) = (tensors.path(tensor).to_owned(), tensor.dtype.to_string());
    let expected = dtypes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
    Err(CheckpointError::WrongDtype { tensor: name.to_owned(), path, expected, found })
}

/// Proves that there are no tensors but those that are known.
pub(super) fn no_strangers(
    tensors: &Tensors,
    is_known: impl Fn(&str) -> bool,
) -> Result<(), CheckpointError> {
    match tensors.iter().find(|(name, _)| !is_known(name)) {
        None => Ok(()),
        Some((name, tensor)) => Err(CheckpointError::UnexpectedTensor {
            tensor: name.to_owned(),
            path: tensors.path(tensor).to_owned(),
        }),
    }
}
