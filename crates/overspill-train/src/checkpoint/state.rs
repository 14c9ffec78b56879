//! A whole training state in a folder: `state.json`, `config.json`, the tokenizer's files, and `state.safetensors`, or
//! shards of it.
//!
//! Every parameter NAME, as Hugging Face calls it, has a tensor `NAME` with its weights as they are stored, and one for
//! each array that the optimizer keeps beside them: `NAME.exp_avg`, `NAME.master`. Which they are, and of which dtypes, is
//! for whoever writes and reads: here they are bytes. `state.json` says after which step the state is, and of which run:
//!
//! ```text
//! {"version": 3, "step": 7, "tile_bytes": 262144, "recipe": {…}, "run": {"--seed": "0", …}, "config": {…},
//!  "tokenizer": null, "checksums": {"NAME": "00a1…", …}}
//! ```
//!
//! The same, but for the checksums, is in the header of every file of tensors, under the name `overspill`, so that files
//! of two states are not taken for one.
//!
//! Checksums are XXH3-64 of each tensor's bytes. They are known when the last byte is written: `state.json` is made
//! first, as long as it will be, and gets them at the end. Whoever reads the tensors compares each one when its last
//! part was read. In version 2 tensors are called `weight.NAME` and `exp_avg.NAME`; version 1 is the same without
//! checksums. Both are read, and of version 1 nothing is compared.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::checksum::{self, Checksums};
use super::folder::{Contents, FolderWriter};
use super::plan::{Stem, TensorPlan};
use super::reader::{self, no_strangers};
use super::tensors::{Tensors, is_there, read_text};
use super::{CONFIG, CheckpointError, SHARD_BYTES_MAX};
use crate::config::{self, ModelConfig};

/// What the state is of.
pub(super) const STATE: &str = "state.json";
/// The name under which files of tensors say it.
const NOTE: &str = "overspill";
pub(super) const STEM: Stem = Stem("state");
/// The format of `state.json` that is written.
const VERSION: u64 = 3;
/// Formats that are read as well: one with other names, and one that has no checksums either.
const ARRAYS_FIRST: u64 = 2;
const UNCHECKED: u64 = 1;
/// Where `state.json` has the checksums.
const CHECKSUMS: &str = "checksums";

/// What the tensors of a folder are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// `NAME` and `NAME.exp_avg`.
    ParameterFirst,
    /// `weight.NAME` and `exp_avg.NAME`: before version 3.
    ArrayFirst,
}

impl Naming {
    /// The name of a parameter's array; of its weights if `array` is `None`.
    pub(crate) fn name(self, parameter: &str, array: Option<&str>) -> String {
        match (self, array) {
            (Self::ParameterFirst, None) => parameter.to_owned(),
            (Self::ParameterFirst, Some(array)) => format!("{parameter}.{array}"),
            (Self::ArrayFirst, array) => format!("{}.{parameter}", array.unwrap_or("weight")),
        }
    }
}

/// A training state on its way into a folder.
#[derive(Debug)]
pub(crate) struct StateWriter {
    folder: FolderWriter,
    /// What the state is of.
    said: Map<String, Value>,
    under_way: Checksums,
    /// Of the tensors that are whole, as they are written down; a stand-in for the others.
    checksums: BTreeMap<String, String>,
}

impl StateWriter {
    /// Begins the folder `target`, which must not be there or be empty, for the state that `meta` was committed with, of a
    /// model with the fields `config` and weights of `dtype`; the full size of all `tensors` is taken.
    pub(crate) fn create(
        target: &Path,
        meta: &Value,
        (config, dtype): (&Map<String, Value>, &str),
        tensors: Vec<TensorPlan>,
        tokenizer: Option<&Path>,
    ) -> Result<Self, CheckpointError> {
        Self::create_sharded(target, meta, (config, dtype), tensors, tokenizer, SHARD_BYTES_MAX)
    }

    fn create_sharded(
        target: &Path,
        meta: &Value,
        (config, dtype): (&Map<String, Value>, &str),
        tensors: Vec<TensorPlan>,
        tokenizer: Option<&Path>,
        shard_bytes_max: u64,
    ) -> Result<Self, CheckpointError> {
        let mut said = meta.as_object().cloned().unwrap_or_default();
        said.insert("version".to_owned(), VERSION.into());
        let unknown = |tensor: &TensorPlan| (tensor.name.clone(), checksum::text(0));
        let checksums = tensors.iter().map(unknown).collect();
        let contents = Contents {
            texts: vec![
                (CONFIG, config::with_dtype(config.clone(), dtype)),
                (STATE, description(&said, &checksums)),
            ],
            tokenizer,
            stem: STEM,
            tensors,
            note: Some((NOTE, Value::Object(said.clone()).to_string())),
            shard_bytes_max,
        };
        let folder = FolderWriter::begin(target, contents)?;
        Ok(Self { folder, said, under_way: Checksums::default(), checksums })
    }

    /// Appends bytes to a tensor.
    pub(crate) fn write(&mut self, tensor: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let place = self.folder.append(tensor, bytes)?;
        if let Some(checksum) = self.under_way.add(tensor, place.start, bytes, place.length) {
            self.checksums.insert(tensor.to_owned(), checksum::text(checksum));
        }
        Ok(())
    }

    /// Writes the checksums, makes the folder safe on storage and gives it its name.
    pub(crate) fn finish(self) -> Result<(), CheckpointError> {
        self.folder.rewrite(STATE, &description(&self.said, &self.checksums))?;
        self.folder.finish()
    }
}

/// The text of `state.json`. Its length does not depend on the values of the checksums.
fn description(said: &Map<String, Value>, checksums: &BTreeMap<String, String>) -> String {
    let checksums = checksums.iter().map(|(name, checksum)| (name.clone(), checksum.clone().into()));
    let mut said = said.clone();
    said.insert(CHECKSUMS.to_owned(), Value::Object(checksums.collect()));
    format!("{:#}\n", Value::Object(said))
}

/// A training state in a folder, open for reading.
#[derive(Debug)]
pub(crate) struct StateFolder {
    meta: Value,
    naming: Naming,
    tensors: Tensors,
    under_way: Checksums,
    /// Of all tensors; `None` for a state that was exported before there were checksums.
    checksums: Option<BTreeMap<String, u64>>,
}

impl StateFolder {
    /// Whether a folder has a training state rather than a model.
    pub(crate) fn is_one(folder: &Path) -> Result<bool, CheckpointError> {
        is_there(&folder.join(STATE))
    }

    /// The file that says what the state is of.
    pub(crate) fn path(folder: &Path) -> PathBuf {
        folder.join(STATE)
    }

    /// Opens a folder and checks everything but the values of the numbers. `expect` tells which tensors there must be, from
    /// what was committed with the state and the model's shape, or why there can be none.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file and the tensor, when something is missing, malformed, or of another state.
    pub(crate) fn open(
        folder: &Path,
        expect: impl FnOnce(&Value, &ModelConfig, Naming) -> Result<Vec<TensorPlan>, String>,
    ) -> Result<Self, CheckpointError> {
        let path = Self::path(folder);
        let malformed = |reason: String| CheckpointError::State { path: path.clone(), reason };
        let mut meta: Value =
            serde_json::from_str(&read_text(&path)?).map_err(|e| malformed(e.to_string()))?;
        let (naming, is_checked) = match meta["version"].as_u64() {
            Some(VERSION) => (Naming::ParameterFirst, true),
            Some(ARRAYS_FIRST) => (Naming::ArrayFirst, true),
            Some(UNCHECKED) => (Naming::ArrayFirst, false),
            Some(other) => return Err(malformed(format!("version {other} is not known here"))),
            None => return Err(malformed("it does not say its version".to_owned())),
        };
        let written = match meta.as_object_mut() {
            Some(meta) if is_checked => meta.remove(CHECKSUMS).unwrap_or_default(),
            _ => Value::Null,
        };
        let config = ModelConfig::from_json(&meta["config"].to_string(), &path)?;
        let tensors = Tensors::open(folder, STEM, NOTE)?;
        if let Some((path, _)) = tensors.notes().find(|(_, note)| !says(*note, &meta)) {
            let (path, of) = (path.to_owned(), Self::path(folder));
            return Err(CheckpointError::OtherState { path, of });
        }
        reader::vouch(&tensors, &config, |parameter| naming.name(parameter, None))?;
        let mut expected = BTreeSet::new();
        for tensor in expect(&meta, &config, naming).map_err(malformed)? {
            reader::check(&tensors, &tensor.name, &tensor.shape, &[tensor.dtype])?;
            expected.insert(tensor.name);
        }
        no_strangers(&tensors, |name| expected.contains(name))?;
        let checksum = |name: String| {
            let checksum = written[&name].as_str().and_then(checksum::parse);
            let missing = || malformed(format!("it has no checksum of tensor {name}"));
            checksum.ok_or_else(missing).map(|checksum| (name.clone(), checksum))
        };
        let checksums = is_checked.then(|| expected.into_iter().map(checksum).collect()).transpose()?;
        Ok(Self { meta, naming, tensors, under_way: Checksums::default(), checksums })
    }

    /// Whether there are checksums that the numbers are compared with.
    pub(crate) fn has_checksums(&self) -> bool {
        self.checksums.is_some()
    }

    /// What was committed with the state, and the version.
    pub(crate) fn meta(&self) -> &Value {
        &self.meta
    }

    /// What its tensors are called.
    pub(crate) fn naming(&self) -> Naming {
        self.naming
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`].
    pub(crate) fn file_of(&self, tensor: &str) -> Result<&Path, CheckpointError> {
        Ok(self.tensors.path(self.tensors.get(tensor)?))
    }

    /// Reads bytes of a tensor, from `start` on; those of one tensor are read in their order.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Damaged`] with the last part of a tensor that is not what was exported.
    pub(crate) fn read(&mut self, tensor: &str, start: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let found = self.tensors.get(tensor)?;
        self.tensors.read_bytes(found, start, out)?;
        let Some(checksums) = &self.checksums else { return Ok(()) };
        let Some(sum) = self.under_way.add(tensor, start, out, found.bytes()) else { return Ok(()) };
        match checksums.get(tensor) {
            Some(&expected) if expected != sum => {
                let (tensor, path) = (tensor.to_owned(), self.tensors.path(found).to_owned());
                Err(CheckpointError::Damaged { tensor, path, expected, found: sum })
            }
            _ => Ok(()),
        }
    }
}

/// Whether a file's header names this state.
fn says(note: Option<&str>, meta: &Value) -> bool {
    note.and_then(|note| serde_json::from_str::<Value>(note).ok()).is_some_and(|said| said == *meta)
}

#[cfg(test)]
mod tests;
