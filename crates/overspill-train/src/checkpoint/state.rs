//! A whole training state in a folder: `state.json`, `config.json`, the tokenizer's files, and `state.safetensors`, or
//! shards of it.
//!
//! Every parameter has three tensors of its shape in `f32`: `weight.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`, where
//! NAME is what Hugging Face calls it. `state.json` says after which step the state is, and of which run:
//!
//! ```text
//! {"version": 1, "step": 7, "tile_bytes": 262144, "run": {"--seed": "0", …}, "config": {…}, "tokenizer": null}
//! ```
//!
//! The same text is in the header of every file of tensors, under the name `overspill`, so that files of two states are
//! not taken for one.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::folder::{Contents, FolderWriter};
use super::plan::{Precision, Stem, TensorPlan};
use super::reader::{self, no_strangers};
use super::tensors::{Tensors, is_there, read_text};
use super::{CONFIG, CheckpointError, SHARD_BYTES_MAX};
use crate::config::{self, ModelConfig};
use crate::layout::{ModelLayout, UnitLayout};

/// What the state is of.
pub(super) const STATE: &str = "state.json";
/// The name under which files of tensors say it.
const NOTE: &str = "overspill";
pub(super) const STEM: Stem = Stem("state");
/// The format of `state.json` that is written and read.
const VERSION: u64 = 1;

/// An array of the state, as long as the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StateArray {
    Weight,
    ExpAvg,
    ExpAvgSq,
}

impl StateArray {
    const ALL: [Self; 3] = [Self::Weight, Self::ExpAvg, Self::ExpAvgSq];

    fn prefix(self) -> &'static str {
        match self {
            Self::Weight => "weight.",
            Self::ExpAvg => "exp_avg.",
            Self::ExpAvgSq => "exp_avg_sq.",
        }
    }
}

/// A training state on its way into a folder.
#[derive(Debug)]
pub(crate) struct StateWriter(FolderWriter);

impl StateWriter {
    /// Begins the folder `target`, which must not be there or be empty, for the state that `meta` was committed with;
    /// its full size is taken.
    pub(crate) fn create(
        target: &Path,
        meta: &Value,
        config: &Map<String, Value>,
        layout: &ModelLayout,
        tokenizer: Option<&Path>,
    ) -> Result<Self, CheckpointError> {
        Self::create_sharded(target, meta, config, layout, tokenizer, SHARD_BYTES_MAX)
    }

    fn create_sharded(
        target: &Path,
        meta: &Value,
        config: &Map<String, Value>,
        layout: &ModelLayout,
        tokenizer: Option<&Path>,
        shard_bytes_max: u64,
    ) -> Result<Self, CheckpointError> {
        let mut said = meta.as_object().cloned().unwrap_or_default();
        said.insert("version".to_owned(), VERSION.into());
        let said = Value::Object(said);
        let parameters = layout.units().iter().flat_map(|unit| &unit.parameters);
        let tensors = parameters.flat_map(|parameter| {
            StateArray::ALL.map(|array| TensorPlan::of(parameter, array.prefix(), Precision::F32))
        });
        let contents = Contents {
            texts: vec![
                (CONFIG, config::with_dtype(config.clone(), Precision::F32.name())),
                (STATE, format!("{said:#}\n")),
            ],
            tokenizer,
            stem: STEM,
            tensors: tensors.collect(),
            note: Some((NOTE, said.to_string())),
            shard_bytes_max,
        };
        FolderWriter::begin(target, contents).map(Self)
    }

    /// Appends the elements of a unit from `start` on to an array; those of one array come in their order.
    pub(crate) fn write_part(
        &mut self,
        array: StateArray,
        unit: &UnitLayout,
        start: usize,
        values: &[f32],
    ) -> Result<(), CheckpointError> {
        for (range, parameter) in unit.parameters_within(start..start + values.len()) {
            let name = format!("{}{}", array.prefix(), parameter.name);
            self.0.append(&name, &values[range.start - start..range.end - start])?;
        }
        Ok(())
    }

    /// Makes the folder safe on storage and gives it its name.
    pub(crate) fn finish(self) -> Result<(), CheckpointError> {
        self.0.finish()
    }
}

/// A training state in a folder, open for reading.
#[derive(Debug)]
pub(crate) struct StateFolder {
    meta: Value,
    config: ModelConfig,
    tensors: Tensors,
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

    /// Opens a folder and checks everything but the values of the numbers.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file and the tensor, when something is missing, malformed, or of another state.
    pub(crate) fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let path = Self::path(folder);
        let malformed = |reason: String| CheckpointError::State { path: path.clone(), reason };
        let meta: Value = serde_json::from_str(&read_text(&path)?).map_err(|e| malformed(e.to_string()))?;
        match meta["version"].as_u64() {
            Some(VERSION) => {}
            Some(other) => return Err(malformed(format!("version {other} is not known here"))),
            None => return Err(malformed("it does not say its version".to_owned())),
        }
        let config = ModelConfig::from_json(&meta["config"].to_string(), &path)?;
        let tensors = Tensors::open(folder, STEM, NOTE)?;
        if let Some((path, _)) = tensors.notes().find(|(_, note)| !says(*note, &meta)) {
            let (path, of) = (path.to_owned(), Self::path(folder));
            return Err(CheckpointError::OtherState { path, of });
        }
        let prefixes = StateArray::ALL.map(StateArray::prefix);
        let expected = reader::check(&tensors, &config, &prefixes, &[Dtype::F32])?;
        no_strangers(&tensors, |name| expected.contains(name))?;
        Ok(Self { meta, config, tensors })
    }

    /// What was committed with the state.
    pub(crate) fn meta(&self) -> &Value {
        &self.meta
    }

    /// The model's shape.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Reads the elements of a unit from `start` on; padding becomes zero.
    pub(crate) fn read_part(
        &self,
        array: StateArray,
        unit: &UnitLayout,
        start: usize,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        reader::read_part(&self.tensors, array.prefix(), unit, start, out)
    }
}

/// Whether a file's header names this state.
fn says(note: Option<&str>, meta: &Value) -> bool {
    note.and_then(|note| serde_json::from_str::<Value>(note).ok()).is_some_and(|said| said == *meta)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CONFIG_JSON: &str = r#"{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 24}"#;

    fn value(array: StateArray, index: usize) -> f32 {
        (index as f32 + array as u8 as f32 / 4.0).sin()
    }

    /// Writes a state tile by tile, the arrays in turns.
    fn write(target: &Path, step: u64, shard_bytes_max: u64) -> (Value, ModelLayout) {
        let fields = config::fields(CONFIG_JSON, Path::new("c")).unwrap();
        let layout = ModelLayout::new(&ModelConfig::from_json(CONFIG_JSON, Path::new("c")).unwrap());
        let meta = json!({ "step": step, "config": fields });
        let mut writer =
            StateWriter::create_sharded(target, &meta, &fields, &layout, None, shard_bytes_max).unwrap();
        for unit in layout.units() {
            for start in (0..unit.padded).step_by(1000) {
                let end = unit.padded.min(start + 1000);
                for array in StateArray::ALL {
                    let values: Vec<f32> = (start..end).map(|index| value(array, index)).collect();
                    writer.write_part(array, unit, start, &values).unwrap();
                }
            }
        }
        writer.finish().unwrap();
        (meta, layout)
    }

    #[test]
    fn a_state_reads_back_equal_whatever_the_pieces_and_the_files() {
        for limit in [SHARD_BYTES_MAX, 8000, 1] {
            let root = tempfile::tempdir().unwrap();
            let (meta, layout) = write(&root.path().join("s"), 7, limit);
            let state = StateFolder::open(&root.path().join("s")).unwrap();
            assert_eq!((&state.meta()["step"], &state.meta()["config"]), (&json!(7), &meta["config"]));
            for unit in layout.units() {
                for array in StateArray::ALL {
                    for start in (0..unit.padded).step_by(768) {
                        let mut found = vec![f32::NAN; 768.min(unit.padded - start)];
                        state.read_part(array, unit, start, &mut found).unwrap();
                        let mut expected = vec![0.0; found.len()];
                        for (range, _) in unit.parameters_within(start..start + found.len()) {
                            range.for_each(|index| expected[index - start] = value(array, index));
                        }
                        assert!(found == expected, "{array:?} of {} from {start}", unit.unit);
                    }
                }
            }
        }
    }

    #[test]
    fn files_of_two_states_are_not_taken_for_one() {
        let root = tempfile::tempdir().unwrap();
        let [early, late] = ["early", "late"].map(|name| root.path().join(name));
        write(&early, 3, SHARD_BYTES_MAX);
        write(&late, 4, SHARD_BYTES_MAX);
        std::fs::copy(early.join("state.safetensors"), late.join("state.safetensors")).unwrap();
        let error = StateFolder::open(&late).unwrap_err();
        assert!(matches!(error, CheckpointError::OtherState { .. }), "{error}");
    }

    #[test]
    fn what_is_no_state_is_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("s");
        write(&folder, 3, SHARD_BYTES_MAX);
        let sound = std::fs::read_to_string(folder.join(STATE)).unwrap();
        for text in
            ["{", "[]", "{}", "{\"version\": 2}", &sound.replace("\"version\": 1", "\"version\": \"1\"")]
        {
            std::fs::write(folder.join(STATE), text).unwrap();
            let error = StateFolder::open(&folder).unwrap_err();
            assert!(matches!(error, CheckpointError::State { .. }), "{text}: {error}");
        }
        std::fs::write(
            folder.join(STATE),
            sound.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4000"),
        )
        .unwrap();
        assert!(StateFolder::open(&folder).is_err());
        std::fs::write(folder.join(STATE), sound).unwrap();
        StateFolder::open(&folder).unwrap();
        let path = folder.join("state.safetensors");
        let length = std::fs::metadata(&path).unwrap().len();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
        assert!(matches!(StateFolder::open(&folder), Err(CheckpointError::Length { .. })));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(StateFolder::open(&folder), Err(CheckpointError::NoWeights { .. })));
    }
}
