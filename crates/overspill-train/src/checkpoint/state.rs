//! A whole training state in a folder: `state.json`, `config.json`, the tokenizer's files, and `state.safetensors`, or
//! shards of it.
//!
//! Every parameter has three tensors of its shape in `f32`: `weight.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`, where
//! NAME is what Hugging Face calls it. `state.json` says after which step the state is, and of which run:
//!
//! ```text
//! {"version": 2, "step": 7, "tile_bytes": 262144, "run": {"--seed": "0", …}, "config": {…}, "tokenizer": null,
//!  "checksums": {"weight.NAME": "00a1…", …}}
//! ```
//!
//! The same, but for the checksums, is in the header of every file of tensors, under the name `overspill`, so that files
//! of two states are not taken for one.
//!
//! Checksums are XXH3-64 of each tensor's bytes. They are known when the last number is written: `state.json` is made
//! first, as long as it will be, and gets them at the end. Whoever reads the tensors compares each one when its last
//! part was read. Version 1 is the same without checksums; it is read, and nothing is compared.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::checksum::{self, Checksums};
use super::folder::{Contents, FolderWriter};
use super::plan::{Precision, Stem, TensorPlan};
use super::reader::{self, no_strangers};
use super::tensors::{Tensors, is_there, read_text};
use super::{CONFIG, CheckpointError, SHARD_BYTES_MAX};
use crate::config::{self, ModelConfig};
use crate::layout::{ModelLayout, Parameter, UnitLayout};

/// What the state is of.
pub(super) const STATE: &str = "state.json";
/// The name under which files of tensors say it.
const NOTE: &str = "overspill";
pub(super) const STEM: Stem = Stem("state");
/// The format of `state.json` that is written, and that is read.
const VERSION: u64 = 2;
/// The format that has no checksums, and that is read as well.
const UNCHECKED: u64 = 1;
/// Where `state.json` has them.
const CHECKSUMS: &str = "checksums";

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
pub(crate) struct StateWriter {
    folder: FolderWriter,
    /// What the state is of.
    said: Map<String, Value>,
    under_way: Checksums,
    /// Of the tensors that are whole, as they are written down; a stand-in for the others.
    checksums: BTreeMap<String, String>,
}

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
        let parameters = layout.units().iter().flat_map(|unit| &unit.parameters);
        let tensors = parameters.flat_map(|parameter| {
            StateArray::ALL.map(|array| TensorPlan::of(parameter, array.prefix(), Precision::F32))
        });
        let tensors: Vec<TensorPlan> = tensors.collect();
        let unknown = |tensor: &TensorPlan| (tensor.name.clone(), checksum::text(0));
        let checksums = tensors.iter().map(unknown).collect();
        let contents = Contents {
            texts: vec![
                (CONFIG, config::with_dtype(config.clone(), Precision::F32.name())),
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
            let values = &values[range.start - start..range.end - start];
            self.folder.append(&name, values)?;
            let (first, length) = place(&range, parameter);
            let whole = self.under_way.add(&name, first, bytemuck::cast_slice(values), length);
            if let Some(checksum) = whole {
                self.checksums.insert(name, checksum::text(checksum));
            }
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

/// Where in its tensor a part of a parameter begins, and how long the tensor is, in bytes.
fn place(range: &Range<usize>, parameter: &Parameter) -> (u64, u64) {
    let bytes = |elements: usize| (elements * Precision::F32.bytes()) as u64;
    (bytes(range.start - parameter.range.start), bytes(parameter.range.len()))
}

/// A training state in a folder, open for reading.
#[derive(Debug)]
pub(crate) struct StateFolder {
    meta: Value,
    config: ModelConfig,
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

    /// Opens a folder and checks everything but the values of the numbers.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file and the tensor, when something is missing, malformed, or of another state.
    pub(crate) fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let path = Self::path(folder);
        let malformed = |reason: String| CheckpointError::State { path: path.clone(), reason };
        let mut meta: Value =
            serde_json::from_str(&read_text(&path)?).map_err(|e| malformed(e.to_string()))?;
        let written = match meta["version"].as_u64() {
            Some(VERSION) => meta.as_object_mut().and_then(|meta| meta.remove(CHECKSUMS)).unwrap_or_default(),
            Some(UNCHECKED) => Value::Null,
            Some(other) => return Err(malformed(format!("version {other} is not known here"))),
            None => return Err(malformed("it does not say its version".to_owned())),
        };
        let config = ModelConfig::from_json(&meta["config"].to_string(), &path)?;
        let tensors = Tensors::open(folder, STEM, NOTE)?;
        if let Some((path, _)) = tensors.notes().find(|(_, note)| !says(*note, &meta)) {
            let (path, of) = (path.to_owned(), Self::path(folder));
            return Err(CheckpointError::OtherState { path, of });
        }
        let prefixes = StateArray::ALL.map(StateArray::prefix);
        let expected = reader::check(&tensors, &config, &prefixes, &[Dtype::F32])?;
        no_strangers(&tensors, |name| expected.contains(name))?;
        let checksum = |name: String| {
            let checksum = written[&name].as_str().and_then(checksum::parse);
            let missing = || malformed(format!("it has no checksum of tensor {name}"));
            checksum.ok_or_else(missing).map(|checksum| (name.clone(), checksum))
        };
        let is_checked = meta["version"] != UNCHECKED;
        let checksums = is_checked.then(|| expected.into_iter().map(checksum).collect()).transpose()?;
        Ok(Self { meta, config, tensors, under_way: Checksums::default(), checksums })
    }

    /// Whether there are checksums that the numbers are compared with.
    pub(crate) fn has_checksums(&self) -> bool {
        self.checksums.is_some()
    }

    /// What was committed with the state, and the version.
    pub(crate) fn meta(&self) -> &Value {
        &self.meta
    }

    /// The model's shape.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Reads the elements of a unit from `start` on; those of one array are read in their order. Padding becomes zero.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Damaged`] with the last part of a tensor that is not what was exported.
    pub(crate) fn read_part(
        &mut self,
        array: StateArray,
        unit: &UnitLayout,
        start: usize,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        reader::read_part(&self.tensors, array.prefix(), unit, start, out)?;
        let Some(checksums) = &self.checksums else { return Ok(()) };
        for (range, parameter) in unit.parameters_within(start..start + out.len()) {
            let tensor = format!("{}{}", array.prefix(), parameter.name);
            let bytes = bytemuck::cast_slice(&out[range.start - start..range.end - start]);
            let (first, length) = place(&range, parameter);
            let Some(found) = self.under_way.add(&tensor, first, bytes, length) else { continue };
            if let Some(&expected) = checksums.get(&tensor).filter(|&&expected| expected != found) {
                let path = self.tensors.path(self.tensors.find(&tensor, &parameter.shape)?).to_owned();
                return Err(CheckpointError::Damaged { tensor, path, expected, found });
            }
        }
        Ok(())
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
            let mut state = StateFolder::open(&root.path().join("s")).unwrap();
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

    /// Reads everything, in pieces.
    fn read(state: &mut StateFolder, layout: &ModelLayout) -> Result<(), CheckpointError> {
        for unit in layout.units() {
            for start in (0..unit.padded).step_by(768) {
                for array in StateArray::ALL {
                    let mut found = vec![0.0; 768.min(unit.padded - start)];
                    state.read_part(array, unit, start, &mut found)?;
                }
            }
        }
        Ok(())
    }

    fn change(path: &Path, at: usize, byte: u8) {
        let mut bytes = std::fs::read(path).unwrap();
        assert_ne!(bytes[at], byte);
        bytes[at] = byte;
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_changed_byte_anywhere_is_damage_of_its_tensor_in_its_file() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("s");
        let (_, layout) = write(&folder, 3, 8000);
        read(&mut StateFolder::open(&folder).unwrap(), &layout).unwrap();
        let sound = Tensors::open(&folder, STEM, NOTE).unwrap();
        for (name, tensor) in sound.iter() {
            let path = sound.path(tensor);
            let bytes = std::fs::read(path).unwrap();
            let (begin, end) = sound.place_in_file(tensor);
            for at in [begin, (begin + end) / 2, end - 1] {
                let byte = bytes[at];
                // A flipped bit, and what a lost block has, if that is something else.
                for changed in [byte ^ 0x40, 0].into_iter().filter(|&changed| changed != byte) {
                    change(path, at, changed);
                    let mut state = StateFolder::open(&folder).unwrap();
                    let error = read(&mut state, &layout).unwrap_err();
                    let told = format!("{}: tensor {name} is damaged: ", path.display());
                    assert!(error.to_string().starts_with(&told), "{error}");
                    change(path, at, byte);
                }
            }
        }
    }

    #[test]
    fn every_tensor_has_a_checksum_or_the_state_is_refused_unless_it_is_older_than_those() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("s");
        let (_, layout) = write(&folder, 3, SHARD_BYTES_MAX);
        let path = folder.join(STATE);
        let sound: Value = serde_json::from_str(&read_text(&path).unwrap()).unwrap();
        for spoil in ["weight.model.norm.weight", "exp_avg_sq.lm_head.weight"] {
            for value in [Value::Null, json!(7), json!("7"), json!("000000000000000G")] {
                let mut spoiled = sound.clone();
                spoiled[CHECKSUMS][spoil] = value;
                std::fs::write(&path, spoiled.to_string()).unwrap();
                let error = StateFolder::open(&folder).unwrap_err().to_string();
                assert!(error.ends_with(&format!("it has no checksum of tensor {spoil}")), "{error}");
            }
        }
        let mut without = sound;
        without.as_object_mut().unwrap().remove(CHECKSUMS);
        std::fs::write(&path, without.to_string()).unwrap();
        assert!(matches!(StateFolder::open(&folder), Err(CheckpointError::State { .. })));
        without["version"] = UNCHECKED.into();
        std::fs::write(&path, without.to_string()).unwrap();
        // Calling it older is not enough: its files say what they are.
        assert!(matches!(StateFolder::open(&folder), Err(CheckpointError::OtherState { .. })));
        let file = folder.join("state.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        let said = br#"\"version\":2"#;
        let at = bytes.windows(said.len()).position(|window| window == said).unwrap() + said.len() - 1;
        bytes[at] = b'1';
        std::fs::write(&file, bytes).unwrap();
        let mut state = StateFolder::open(&folder).unwrap();
        assert!(!state.has_checksums());
        read(&mut state, &layout).unwrap();
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
            ["{", "[]", "{}", "{\"version\": 3}", &sound.replace("\"version\": 2", "\"version\": \"2\"")]
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
