//! Reading a model's folder.
//!
//! [`Checkpoint::open`] parses the configuration and every header and proves that each parameter is there with its
//! shape and a dtype that widens to `f32` exactly. Afterwards weights are read at their offsets: `f32` straight
//! into the caller's memory, half types through a buffer of [`PIECE_BYTES`].

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Action, CONFIG, CheckpointError, INDEX, SINGLE, header};
use crate::config::{self, ModelConfig};
use crate::layout::{ModelLayout, Parameter, UnitLayout};

/// Half types are read and widened this many bytes at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Longest `config.json` or index that is read, in bytes.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// A model in a Hugging Face folder, open for reading.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: ModelConfig,
    /// All of `config.json`, with what means nothing here.
    config_fields: Map<String, Value>,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Tensor>,
}

/// A file of weights.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

/// A tensor as its header describes it.
#[derive(Debug)]
struct Tensor {
    /// Index of the shard that holds it.
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Of its first byte, from the start of the file.
    offset: u64,
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
        let mut checkpoint = Self {
            folder: folder.to_owned(),
            config: ModelConfig::from_json(&text, &path)?,
            config_fields: config::fields(&text, &path)?,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let single = folder.join(SINGLE);
        let index = folder.join(INDEX);
        if is_there(&single)? {
            checkpoint.add_shard(single)?;
        } else if is_there(&index)? {
            checkpoint.add_indexed(&index)?;
        } else {
            return Err(CheckpointError::NoWeights { folder: folder.to_owned() });
        }
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The text of a `config.json` for this model with weights as `f32`: every other field is as it was read.
    pub(super) fn config_json(&self) -> String {
        config::with_f32_weights(self.config_fields.clone())
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
        let tensor = self.tensor(&parameter.name, &parameter.shape)?;
        let Shard { path, file } = &self.shards[tensor.shard];
        if tensor.dtype == Dtype::F32 {
            let bytes = bytemuck::cast_slice_mut(out);
            return file.read_exact_at(bytes, tensor.offset).map_err(Action::Read.failed(path));
        }
        let mut piece = vec![0; PIECE_BYTES.min(out.len() * HALF_BYTES)];
        let mut offset = tensor.offset;
        for out in out.chunks_mut(PIECE_BYTES / HALF_BYTES) {
            let bytes = &mut piece[..out.len() * HALF_BYTES];
            file.read_exact_at(bytes, offset).map_err(Action::Read.failed(path))?;
            let widened = match tensor.dtype {
                Dtype::BF16 => overspill_optim::widen_bf16(bytes, out),
                _ => overspill_optim::widen_f16(bytes, out),
            };
            widened.expect("the piece was cut to the output's length");
            offset += bytes.len() as u64;
        }
        Ok(())
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
        let mut end = 0;
        for parameter in &unit.parameters {
            out[end..parameter.range.start].fill(0.0);
            self.read_parameter(parameter, &mut out[parameter.range.clone()])?;
            end = parameter.range.end;
        }
        out[end..].fill(0.0);
        Ok(())
    }

    /// Opens the shards that an index lists and checks that each holds what the index says.
    fn add_indexed(&mut self, path: &Path) -> Result<(), CheckpointError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let malformed = |reason: String| CheckpointError::Index { path: path.to_owned(), reason };
        let index: Index = serde_json::from_str(&read_text(path)?).map_err(|e| malformed(e.to_string()))?;
        if index.weight_map.is_empty() {
            return Err(malformed("weight_map is empty".to_owned()));
        }
        for name in index.weight_map.values().collect::<BTreeSet<_>>() {
            if !is_plain_file_name(name) {
                return Err(CheckpointError::ShardName { path: path.to_owned(), name: name.clone() });
            }
            self.add_shard(self.folder.join(name))?;
        }
        for (tensor, name) in index.weight_map {
            let listed = self.folder.join(name);
            if self.tensors.get(&tensor).is_none_or(|found| self.shards[found.shard].path != listed) {
                return Err(CheckpointError::MissingTensor { tensor, path: listed });
            }
        }
        Ok(())
    }

    /// Opens a file of weights and takes its tensors in.
    fn add_shard(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let file = open_regular(&path)?;
        let header = header::read(&file, &path)?;
        let shard = self.shards.len();
        self.shards.push(Shard { path, file });
        for (name, info) in header.metadata.tensors() {
            match self.tensors.entry(name) {
                Entry::Occupied(earlier) => {
                    return Err(CheckpointError::DuplicateTensor {
                        tensor: earlier.key().clone(),
                        first: self.shards[earlier.get().shard].path.clone(),
                        second: self.shards[shard].path.clone(),
                    });
                }
                Entry::Vacant(place) => place.insert(Tensor {
                    shard,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    offset: header.data_start + info.data_offsets.0 as u64,
                }),
            };
        }
        Ok(())
    }

    /// Proves that the files hold the model that the configuration describes and nothing else.
    fn check(&self) -> Result<(), CheckpointError> {
        // A layout is as large as the configuration claims. The last layer's widest attention matrix vouches for
        // the claim: it is there, and the product of its sides was found not to overflow.
        let last = format!("model.layers.{}.self_attn.q_proj.weight", self.config.layers - 1);
        let heads = [self.config.heads, self.config.head_dim].map(|size| size as u64).iter().product::<u64>();
        self.tensor(&last, &[heads as usize, self.config.hidden])?;

        let layout = ModelLayout::new(&self.config);
        let mut expected = BTreeSet::new();
        for parameter in layout.units().iter().flat_map(|unit| &unit.parameters) {
            let tensor = self.tensor(&parameter.name, &parameter.shape)?;
            if !matches!(tensor.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                return Err(CheckpointError::WrongDtype {
                    tensor: parameter.name.clone(),
                    path: self.shards[tensor.shard].path.clone(),
                    found: tensor.dtype.to_string(),
                });
            }
            expected.insert(parameter.name.as_str());
        }
        let stranger = self
            .tensors
            .iter()
            .find(|(name, _)| !expected.contains(name.as_str()) && !self.is_harmless(name));
        match stranger {
            None => Ok(()),
            Some((name, tensor)) => Err(CheckpointError::UnexpectedTensor {
                tensor: name.clone(),
                path: self.shards[tensor.shard].path.clone(),
            }),
        }
    }

    /// Whether a tensor says nothing that the configuration and the other tensors do not say.
    fn is_harmless(&self, name: &str) -> bool {
        name.ends_with(".rotary_emb.inv_freq") || (self.config.tied && name == "lm_head.weight")
    }

    /// Finds a tensor by name and checks its shape.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<&Tensor, CheckpointError> {
        let tensor = self.tensors.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            tensor: name.to_owned(),
            path: self.folder.clone(),
        })?;
        if tensor.shape != shape {
            return Err(CheckpointError::WrongShape {
                tensor: name.to_owned(),
                path: self.shards[tensor.shard].path.clone(),
                expected: shape.to_vec(),
                found: tensor.shape.clone(),
            });
        }
        Ok(tensor)
    }
}

/// Bytes of an element of BF16 and F16.
const HALF_BYTES: usize = 2;

/// Whether joining the name to a folder names a file of that folder.
fn is_plain_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0'])
}

fn is_there(path: &Path) -> Result<bool, CheckpointError> {
    path.try_exists().map_err(Action::Open.failed(path))
}

/// Opens a file that has a length and places in it. A pipe would be waited for, so this is asked before.
fn open_regular(path: &Path) -> Result<File, CheckpointError> {
    if !fs::metadata(path).map_err(Action::Open.failed(path))?.is_file() {
        return Err(CheckpointError::NotAFile { path: path.to_owned() });
    }
    File::open(path).map_err(Action::Open.failed(path))
}

fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let file = open_regular(path)?;
    let found = file.metadata().map_err(Action::Open.failed(path))?.len();
    if found > TEXT_BYTES_MAX {
        return Err(CheckpointError::TooLong { path: path.to_owned(), found, limit: TEXT_BYTES_MAX });
    }
    io::read_to_string(file).map_err(Action::Read.failed(path))
}
