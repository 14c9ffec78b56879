//! States of made-up bytes: what is written is read again, and what was changed in between is found.

use safetensors::Dtype;
use serde_json::json;

use super::*;
use crate::layout::ModelLayout;

const CONFIG_JSON: &str = r#"{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24}"#;

/// Some arrays of each parameter, of every dtype that there is, and one that is shorter than the parameter.
fn arrays(parameter: &str, shape: &[usize], naming: Naming) -> Vec<TensorPlan> {
    let plan = |array, shape: &[usize], dtype| TensorPlan {
        name: naming.name(parameter, array),
        shape: shape.to_vec(),
        dtype,
    };
    vec![
        plan(None, shape, Dtype::BF16),
        plan(Some("master"), shape, Dtype::F32),
        plan(Some("exp_avg"), shape, Dtype::U8),
        plan(Some("exp_avg_scale"), &[shape.iter().product::<usize>().div_ceil(256)], Dtype::F32),
    ]
}

fn plans(config: &ModelConfig, naming: Naming) -> Vec<TensorPlan> {
    let layout = ModelLayout::new(config);
    let parameters = layout.units().iter().flat_map(|unit| &unit.parameters);
    parameters.flat_map(|parameter| arrays(&parameter.name, &parameter.shape, naming)).collect()
}

/// The bytes of a tensor.
fn contents(tensor: &TensorPlan) -> Vec<u8> {
    let seed = tensor.name.bytes().fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    (0..tensor.bytes()).map(|index| (index.wrapping_mul(0x9e37_79b9) >> 7).wrapping_add(seed) as u8).collect()
}

fn write(target: &Path, step: u64, shard_bytes_max: u64) -> Vec<TensorPlan> {
    write_as(target, step, shard_bytes_max, Naming::ParameterFirst)
}

/// Writes a state piece by piece, the tensors in turns.
fn write_as(target: &Path, step: u64, shard_bytes_max: u64, naming: Naming) -> Vec<TensorPlan> {
    let fields = config::fields(CONFIG_JSON, Path::new("c")).unwrap();
    let plans = plans(&ModelConfig::from_json(CONFIG_JSON, Path::new("c")).unwrap(), naming);
    let meta = json!({ "step": step, "config": fields });
    let config = (&fields, "bfloat16");
    let mut writer =
        StateWriter::create_sharded(target, &meta, config, plans.clone(), None, shard_bytes_max).unwrap();
    let contents: Vec<_> = plans.iter().map(contents).collect();
    for start in (0..contents.iter().map(Vec::len).max().unwrap()).step_by(1000) {
        for (plan, contents) in plans.iter().zip(&contents).filter(|(_, contents)| start < contents.len()) {
            writer.write(&plan.name, &contents[start..contents.len().min(start + 1000)]).unwrap();
        }
    }
    writer.finish().unwrap();
    plans
}

fn open(folder: &Path) -> Result<StateFolder, CheckpointError> {
    StateFolder::open(folder, |_, config, naming| Ok(plans(config, naming)))
}

/// Reads everything, in pieces.
fn read(state: &mut StateFolder, plans: &[TensorPlan]) -> Result<Vec<Vec<u8>>, CheckpointError> {
    let mut read_one = |plan: &TensorPlan| {
        let mut found = vec![7; plan.bytes() as usize];
        for (start, piece) in (0..).step_by(768).zip(found.chunks_mut(768)) {
            state.read(&plan.name, start, piece)?;
        }
        Ok(found)
    };
    plans.iter().map(&mut read_one).collect()
}

/// What [`read`] finds when nothing was changed.
fn written(plans: &[TensorPlan]) -> Vec<Vec<u8>> {
    plans.iter().map(contents).collect()
}

#[test]
fn a_state_reads_back_equal_whatever_the_pieces_and_the_files() {
    for limit in [SHARD_BYTES_MAX, 8000, 1] {
        let root = tempfile::tempdir().unwrap();
        let plans = write(&root.path().join("s"), 7, limit);
        let mut state = open(&root.path().join("s")).unwrap();
        assert_eq!((&state.meta()["step"], &state.meta()["version"]), (&json!(7), &json!(VERSION)));
        assert!(read(&mut state, &plans).unwrap() == written(&plans), "shards of {limit}");
    }
}

#[test]
fn a_state_that_is_older_than_its_names_or_than_checksums_is_read() {
    let name = "model.norm.weight";
    for (naming, weights, moment) in [
        (Naming::ParameterFirst, name, "model.norm.weight.exp_avg"),
        (Naming::ArrayFirst, "weight.model.norm.weight", "exp_avg.model.norm.weight"),
    ] {
        assert_eq!(
            (naming.name(name, None).as_str(), naming.name(name, Some("exp_avg")).as_str()),
            (weights, moment)
        );
    }
    for version in [ARRAYS_FIRST, UNCHECKED] {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("s");
        let plans = write_as(&folder, 3, SHARD_BYTES_MAX, Naming::ArrayFirst);
        // What is called so says a version that does not; calling it older is not enough: its files say what they are.
        assert!(matches!(open(&folder), Err(CheckpointError::MissingTensor { .. })));
        let path = folder.join(STATE);
        let mut said: Value = serde_json::from_str(&read_text(&path).unwrap()).unwrap();
        said["version"] = version.into();
        if version == UNCHECKED {
            said.as_object_mut().unwrap().remove(CHECKSUMS);
        }
        std::fs::write(&path, said.to_string()).unwrap();
        assert!(matches!(open(&folder), Err(CheckpointError::OtherState { .. })));
        let file = folder.join("state.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        let note = br#"\"version\":3"#;
        let at = bytes.windows(note.len()).position(|window| window == note).unwrap() + note.len() - 1;
        bytes[at] = b'0' + version as u8;
        std::fs::write(&file, bytes).unwrap();
        let mut state = open(&folder).unwrap();
        assert_eq!((state.naming(), state.has_checksums()), (Naming::ArrayFirst, version != UNCHECKED));
        assert!(read(&mut state, &plans).unwrap() == written(&plans), "version {version}");
    }
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
    let plans = write(&folder, 3, 8000);
    assert!(read(&mut open(&folder).unwrap(), &plans).unwrap() == written(&plans));
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
                let mut state = open(&folder).unwrap();
                let error = read(&mut state, &plans).unwrap_err();
                let told = format!("{}: tensor {name} is damaged: ", path.display());
                assert!(error.to_string().starts_with(&told), "{error}");
                change(path, at, byte);
            }
        }
    }
}

#[test]
fn every_tensor_has_a_checksum_or_the_state_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("s");
    write(&folder, 3, SHARD_BYTES_MAX);
    let path = folder.join(STATE);
    let sound: Value = serde_json::from_str(&read_text(&path).unwrap()).unwrap();
    for spoil in ["model.norm.weight", "lm_head.weight.exp_avg_scale"] {
        for value in [Value::Null, json!(7), json!("7"), json!("000000000000000G")] {
            let mut spoiled = sound.clone();
            spoiled[CHECKSUMS][spoil] = value;
            std::fs::write(&path, spoiled.to_string()).unwrap();
            let error = open(&folder).unwrap_err().to_string();
            assert!(error.ends_with(&format!("it has no checksum of tensor {spoil}")), "{error}");
        }
    }
    let mut without = sound;
    without.as_object_mut().unwrap().remove(CHECKSUMS);
    std::fs::write(&path, without.to_string()).unwrap();
    assert!(matches!(open(&folder), Err(CheckpointError::State { .. })));
}

#[test]
fn files_of_two_states_are_not_taken_for_one() {
    let root = tempfile::tempdir().unwrap();
    let [early, late] = ["early", "late"].map(|name| root.path().join(name));
    write(&early, 3, SHARD_BYTES_MAX);
    write(&late, 4, SHARD_BYTES_MAX);
    std::fs::copy(early.join("state.safetensors"), late.join("state.safetensors")).unwrap();
    let error = open(&late).unwrap_err();
    assert!(matches!(error, CheckpointError::OtherState { .. }), "{error}");
}

#[test]
fn what_is_no_state_is_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("s");
    write(&folder, 3, SHARD_BYTES_MAX);
    let sound = std::fs::read_to_string(folder.join(STATE)).unwrap();
    for text in ["{", "[]", "{}", "{\"version\": 4}", &sound.replace("\"version\": 3", "\"version\": \"3\"")]
    {
        std::fs::write(folder.join(STATE), text).unwrap();
        let error = open(&folder).unwrap_err();
        assert!(matches!(error, CheckpointError::State { .. }), "{text}: {error}");
    }
    std::fs::write(
        folder.join(STATE),
        sound.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4000"),
    )
    .unwrap();
    assert!(open(&folder).is_err());
    std::fs::write(folder.join(STATE), sound).unwrap();
    open(&folder).unwrap();
    let path = folder.join("state.safetensors");
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
    assert!(matches!(open(&folder), Err(CheckpointError::Length { .. })));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(open(&folder), Err(CheckpointError::NoWeights { .. })));
}
