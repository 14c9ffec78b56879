//! Folders written and read back, and every way in which one can be wrong.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use overspill_train::checkpoint::{Checkpoint, CheckpointError, CheckpointWriter, SHARD_BYTES_MAX};
use overspill_train::config::{ModelConfig, Rope};
use overspill_train::data::Tokenizer;
use overspill_train::layout::{ModelLayout, UnitLayout};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use tempfile::TempDir;

fn config() -> ModelConfig {
    ModelConfig {
        vocab: 37,
        hidden: 24,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        ffn: 40,
        norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: None },
        tied: false,
        max_positions: 64,
        initializer_range: 0.02,
    }
}

/// Weights that differ everywhere, with zero padding.
fn weights(unit: &UnitLayout) -> Vec<f32> {
    let mut weights = vec![0.0; unit.padded];
    for parameter in &unit.parameters {
        for index in parameter.range.clone() {
            weights[index] = (index as f32 + parameter.name.len() as f32).sin();
        }
    }
    weights
}

fn begin(
    target: &Path,
    config: &ModelConfig,
    shard_bytes_max: u64,
) -> Result<CheckpointWriter, CheckpointError> {
    CheckpointWriter::create_sharded(
        target,
        config,
        &ModelLayout::new(config),
        &Tokenizer::Bytes,
        shard_bytes_max,
    )
}

fn write(target: &Path, config: &ModelConfig, shard_bytes_max: u64) {
    let mut writer = begin(target, config, shard_bytes_max).unwrap();
    for unit in ModelLayout::new(config).units() {
        writer.write_unit(unit, &weights(unit)).unwrap();
    }
    writer.finish().unwrap();
}

fn assert_reads_back(folder: &Path, config: &ModelConfig) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    assert_eq!(checkpoint.config(), config);
    for unit in ModelLayout::new(config).units() {
        let mut found = vec![f32::NAN; unit.padded];
        checkpoint.read_unit(unit, &mut found).unwrap();
        assert!(found == weights(unit), "{}", unit.unit);
    }
}

/// A sound folder in one file, to be spoiled.
fn sound() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("m");
    write(&folder, &config(), SHARD_BYTES_MAX);
    (root, folder)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Writes the tensors of `model.safetensors` again after `change`.
fn rewrite(folder: &Path, change: impl FnOnce(&mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>)) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut tensors: Vec<_> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn refusal(folder: &Path) -> CheckpointError {
    Checkpoint::open(folder).unwrap_err()
}

#[test]
fn a_folder_written_in_one_file_reads_back_equal() {
    for tied in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("m");
        let config = ModelConfig { tied, ..config() };
        write(&folder, &config, SHARD_BYTES_MAX);
        assert_reads_back(&folder, &config);
        assert_eq!(
            names(&folder),
            ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        );
        assert_eq!(names(root.path()), ["m"]);
    }
}

#[test]
fn a_folder_written_in_shards_reads_back_equal() {
    for limit in [1, 4000, 10_000, 20_000] {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("m");
        write(&folder, &config(), limit);
        assert_reads_back(&folder, &config());
        let shards: Vec<_> = names(&folder).into_iter().filter(|n| n.ends_with(".safetensors")).collect();
        assert!(shards.len() > 1);
        assert!(shards[0].starts_with("model-00001-of-0"), "{shards:?}");
        for shard in shards {
            let data = fs::metadata(folder.join(shard)).unwrap().len() - 4096;
            assert!(data <= limit.max(40 * 24 * 4), "{data} > {limit}");
        }
    }
}

#[test]
fn tensors_start_where_they_can_be_read_directly() {
    let (_root, folder) = sound();
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!((8 + header).is_multiple_of(4096));
}

#[test]
fn half_types_widen_exactly() {
    let (_root, folder) = sound();
    let layout = ModelLayout::new(&config());
    let values: Vec<f32> = weights(&layout.units()[0]);
    rewrite(&folder, |tensors| {
        for (name, dtype, _, data) in tensors {
            let narrow = |to: fn(f32) -> u16| {
                let elements = data.as_chunks::<4>().0.iter();
                elements.flat_map(|&e| to(f32::from_le_bytes(e)).to_le_bytes()).collect::<Vec<_>>()
            };
            if name.contains("embed") {
                (*dtype, *data) = (Dtype::BF16, narrow(|x| half::bf16::from_f32(x).to_bits()));
            } else if name.contains("q_proj") {
                (*dtype, *data) = (Dtype::F16, narrow(|x| half::f16::from_f32(x).to_bits()));
            }
        }
    });
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let mut found = vec![f32::NAN; values.len()];
    checkpoint.read_unit(&layout.units()[0], &mut found).unwrap();
    assert!(found.iter().zip(&values).all(|(f, v)| *f == half::bf16::from_f32(*v).to_f32()));

    let layer = &layout.units()[1];
    let query = &layer.parameters[1];
    let mut found = vec![f32::NAN; query.range.len()];
    checkpoint.read_parameter(query, &mut found).unwrap();
    let values = weights(layer);
    let expected = values[query.range.clone()].iter().map(|v| half::f16::from_f32(*v).to_f32());
    assert!(found.into_iter().eq(expected));
}

#[test]
fn half_types_longer_than_a_piece_are_read_whole() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("m");
    let config = ModelConfig { vocab: 50_001, ..config() };
    write(&folder, &config, SHARD_BYTES_MAX);
    rewrite(&folder, |tensors| {
        for (_, dtype, _, data) in tensors {
            let elements = data.as_chunks::<4>().0.iter();
            *data = elements.flat_map(|e| [e[2], e[3]]).collect();
            *dtype = Dtype::BF16;
        }
    });
    let layout = ModelLayout::new(&config);
    let embedding = &layout.units()[0];
    let mut found = vec![f32::NAN; embedding.padded];
    Checkpoint::open(&folder).unwrap().read_unit(embedding, &mut found).unwrap();
    let expected = weights(embedding).into_iter().map(|w| f32::from_bits(w.to_bits() & 0xFFFF_0000));
    assert!(found.into_iter().eq(expected));
}

#[test]
fn a_missing_or_malformed_config_is_an_error() {
    let (_root, folder) = sound();
    let path = folder.join("config.json");
    edit_json(&path, |config| config["hidden_act"] = "gelu".into());
    assert!(matches!(refusal(&folder), CheckpointError::Config(_)));
    fs::write(&path, "{").unwrap();
    assert!(matches!(refusal(&folder), CheckpointError::Config(_)));
    fs::write(&path, [0xFF]).unwrap();
    assert!(matches!(refusal(&folder), CheckpointError::Io { .. }));
    fs::remove_file(&path).unwrap();
    assert!(matches!(refusal(&folder), CheckpointError::Io { path, .. } if path.ends_with("config.json")));
    fs::create_dir(&path).unwrap();
    assert!(matches!(refusal(&folder), CheckpointError::NotAFile { .. }));
}

#[test]
fn a_folder_without_weights_is_an_error() {
    let (_root, folder) = sound();
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    assert!(matches!(refusal(&folder), CheckpointError::NoWeights { .. }));
}

#[test]
fn a_truncated_file_of_weights_is_an_error() {
    let (_root, folder) = sound();
    let path = folder.join("model.safetensors");
    let length = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
    let error = refusal(&folder);
    let told = matches!(error, CheckpointError::Length { expected, found, .. } if (expected, found) == (length, length - 1));
    assert!(told, "{error}");
}

#[test]
fn a_missing_tensor_is_named() {
    let (_root, folder) = sound();
    rewrite(&folder, |tensors| tensors.retain(|(name, ..)| name != "model.norm.weight"));
    let error = refusal(&folder);
    assert!(
        matches!(&error, CheckpointError::MissingTensor { tensor, .. } if tensor == "model.norm.weight"),
        "{error}"
    );
}

#[test]
fn a_wrong_shape_is_told_with_the_expected_one() {
    let (_root, folder) = sound();
    rewrite(&folder, |tensors| {
        let (_, _, shape, _) = tensors.iter_mut().find(|(name, ..)| name == "lm_head.weight").unwrap();
        shape.swap(0, 1);
    });
    match refusal(&folder) {
        CheckpointError::WrongShape { tensor, path, expected, found } => {
            assert_eq!(tensor, "lm_head.weight");
            assert!(path.ends_with("model.safetensors"));
            assert_eq!((expected, found), (vec![37, 24], vec![24, 37]));
        }
        error => panic!("{error}"),
    }
}

#[test]
fn a_wrong_dtype_is_told() {
    let (_root, folder) = sound();
    rewrite(&folder, |tensors| {
        tensors.iter_mut().find(|(name, ..)| name == "model.norm.weight").unwrap().1 = Dtype::I32;
    });
    let error = refusal(&folder);
    assert!(matches!(&error, CheckpointError::WrongDtype { found, .. } if found == "I32"), "{error}");
}

#[test]
fn only_harmless_tensors_may_be_extra() {
    let extra = |name: &str| (name.to_owned(), Dtype::F32, vec![1], vec![0; 4]);
    let (_root, folder) = sound();
    rewrite(&folder, |tensors| tensors.push(extra("model.layers.0.self_attn.rotary_emb.inv_freq")));
    assert!(Checkpoint::open(&folder).is_ok());
    rewrite(&folder, |tensors| tensors.push(extra("model.layers.0.self_attn.q_proj.bias")));
    let error = refusal(&folder);
    let named =
        matches!(&error, CheckpointError::UnexpectedTensor { tensor, .. } if tensor.ends_with("q_proj.bias"));
    assert!(named, "{error}");

    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("tied");
    write(&folder, &ModelConfig { tied: true, ..config() }, SHARD_BYTES_MAX);
    rewrite(&folder, |tensors| tensors.push(extra("lm_head.weight")));
    assert!(Checkpoint::open(&folder).is_ok());
}

#[test]
fn a_config_of_a_monstrous_model_is_an_error_not_an_allocation() {
    for (field, value) in [
        ("num_hidden_layers", 1 << 12),
        ("head_dim", 1 << 22),
        ("intermediate_size", 1 << 24),
        ("vocab_size", 1 << 24),
    ] {
        let (_root, folder) = sound();
        edit_json(&folder.join("config.json"), |config| config[field] = value.into());
        let error = refusal(&folder);
        let told =
            matches!(error, CheckpointError::MissingTensor { .. } | CheckpointError::WrongShape { .. });
        assert!(told, "{field}: {error}");
    }
}

fn sharded() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("m");
    write(&folder, &config(), 10_000);
    (root, folder)
}

#[test]
fn a_shard_outside_of_the_folder_is_refused() {
    for name in ["../m/model-00001-of-00004.safetensors", "/etc/passwd", "..", "a/b", ""] {
        let (_root, folder) = sharded();
        edit_json(&folder.join("model.safetensors.index.json"), |index| {
            index["weight_map"]["model.norm.weight"] = name.into();
        });
        let error = refusal(&folder);
        assert!(matches!(error, CheckpointError::ShardName { .. }), "{error}");
    }
}

#[test]
fn a_malformed_index_is_an_error() {
    let (_root, folder) = sharded();
    for text in ["{", "{}", "{\"weight_map\": {}}", "{\"weight_map\": {\"a\": 3}}"] {
        fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
        let error = refusal(&folder);
        assert!(matches!(error, CheckpointError::Index { .. }), "{error}");
    }
}

#[test]
fn a_missing_shard_is_named() {
    let (_root, folder) = sharded();
    let shard = names(&folder).into_iter().find(|name| name.starts_with("model-00002")).unwrap();
    fs::remove_file(folder.join(&shard)).unwrap();
    let error = refusal(&folder);
    assert!(matches!(&error, CheckpointError::Io { path, .. } if path.ends_with(&shard)), "{error}");
}

#[test]
fn a_tensor_in_another_shard_than_listed_is_an_error() {
    let (_root, folder) = sharded();
    edit_json(&folder.join("model.safetensors.index.json"), |index| {
        index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"].clone();
    });
    let error = refusal(&folder);
    assert!(
        matches!(&error, CheckpointError::MissingTensor { tensor, .. } if tensor == "model.norm.weight"),
        "{error}"
    );
}

#[test]
fn a_tensor_in_two_shards_is_an_error() {
    let (_root, folder) = sharded();
    let shard = names(&folder).into_iter().find(|name| name.starts_with("model-00001")).unwrap();
    fs::copy(folder.join(shard), folder.join("again.safetensors")).unwrap();
    edit_json(&folder.join("model.safetensors.index.json"), |index| {
        index["weight_map"]["other"] = "again.safetensors".into();
    });
    let error = refusal(&folder);
    assert!(matches!(error, CheckpointError::DuplicateTensor { .. }), "{error}");
}

#[test]
fn a_parameter_of_another_model_is_an_error() {
    let (_root, folder) = sound();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let other = ModelLayout::new(&ModelConfig { layers: 3, ffn: 41, ..config() });
    let read = |parameter: &overspill_train::layout::Parameter| {
        checkpoint.read_parameter(parameter, &mut vec![0.0; parameter.range.len()]).unwrap_err()
    };
    assert!(matches!(read(&other.units()[3].parameters[0]), CheckpointError::MissingTensor { .. }));
    assert!(matches!(read(&other.units()[1].parameters[8]), CheckpointError::WrongShape { .. }));
}

#[test]
fn an_unfinished_writer_leaves_nothing_behind() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("m");
    let mut writer = begin(&target, &config(), 10_000).unwrap();
    let layout = ModelLayout::new(&config());
    writer.write_unit(&layout.units()[0], &weights(&layout.units()[0])).unwrap();
    assert!(!target.exists());
    assert!(names(root.path())[0].starts_with(".m.partial-"));
    drop(writer);
    assert!(names(root.path()).is_empty());
}

#[test]
fn a_folder_that_holds_something_is_refused_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("m");
    fs::create_dir(&target).unwrap();
    write(&target, &config(), SHARD_BYTES_MAX);
    let before = names(&target);
    assert!(matches!(begin(&target, &config(), 1), Err(CheckpointError::NotEmpty { .. })));
    let file = root.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(matches!(begin(&file, &config(), 1), Err(CheckpointError::NotEmpty { .. })));
    let dangling = root.path().join("dangling");
    symlink("nowhere", &dangling).unwrap();
    assert!(matches!(begin(&dangling, &config(), 1), Err(CheckpointError::NotEmpty { .. })));
    assert_eq!(names(&target), before);
    assert_eq!(names(root.path()), ["dangling", "file", "m"]);
}

#[test]
fn a_folder_filled_meanwhile_is_not_overwritten() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("m");
    let mut writer = begin(&target, &config(), SHARD_BYTES_MAX).unwrap();
    for unit in ModelLayout::new(&config()).units() {
        writer.write_unit(unit, &weights(unit)).unwrap();
    }
    fs::create_dir(&target).unwrap();
    fs::write(target.join("theirs"), "x").unwrap();
    assert!(matches!(writer.finish(), Err(CheckpointError::Io { .. })));
    assert_eq!(names(root.path()), ["m"]);
    assert_eq!(names(&target), ["theirs"]);
}

#[test]
fn a_link_to_an_empty_folder_is_followed() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("real")).unwrap();
    symlink("real", root.path().join("link")).unwrap();
    write(&root.path().join("link"), &config(), SHARD_BYTES_MAX);
    assert_reads_back(&root.path().join("real"), &config());
}

#[test]
fn a_destination_is_checked_without_making_anything() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("m");
    CheckpointWriter::check_destination(&target).unwrap();
    assert!(names(root.path()).is_empty());
    let error = CheckpointWriter::check_destination(&target.join("below")).unwrap_err();
    assert!(matches!(error, CheckpointError::NoParent { .. }), "{error}");
    fs::create_dir(&target).unwrap();
    CheckpointWriter::check_destination(&target).unwrap();
    fs::write(target.join("theirs"), "x").unwrap();
    let error = CheckpointWriter::check_destination(&target).unwrap_err();
    assert!(matches!(error, CheckpointError::NotEmpty { .. }), "{error}");
}

#[test]
fn a_missing_parent_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let error = begin(&root.path().join("none/m"), &config(), SHARD_BYTES_MAX).unwrap_err();
    assert!(matches!(&error, CheckpointError::NoParent { parent } if parent.ends_with("none")), "{error}");
}

#[test]
fn a_model_larger_than_the_file_system_is_refused_at_once() {
    let root = tempfile::tempdir().unwrap();
    let config = ModelConfig { vocab: 1 << 24, hidden: 1 << 16, ..config() };
    let error = begin(&root.path().join("m"), &config, SHARD_BYTES_MAX).unwrap_err();
    assert!(matches!(error, CheckpointError::NoSpace { .. }), "{error}");
    assert!(names(root.path()).is_empty());
}

#[test]
fn the_tokenizer_of_the_source_goes_along_unchanged() {
    let (root, folder) = sound();
    fs::write(folder.join("generation_config.json"), "{\"eos_token_id\": 3}").unwrap();
    let tokenizer = Tokenizer::open(&folder).unwrap();
    let target = root.path().join("copy");
    let layout = ModelLayout::new(&config());
    let mut writer = CheckpointWriter::create(&target, &config(), &layout, &tokenizer).unwrap();
    for unit in layout.units() {
        writer.write_unit(unit, &weights(unit)).unwrap();
    }
    writer.finish().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(fs::read(folder.join(name)).unwrap(), fs::read(target.join(name)).unwrap());
    }
}

#[test]
fn a_model_that_is_trained_on_keeps_every_field_of_its_config() {
    let (root, folder) = sound();
    let path = folder.join("config.json");
    edit_json(&path, |config| {
        config["bos_token_id"] = 1.into();
        config["eos_token_id"] = serde_json::json!([2, 3]);
        config["pad_token_id"] = 0.into();
        config["attention_dropout"] = 0.0.into();
        config["nobody_knows"] = serde_json::json!({"this": [1.5, null]});
        config["dtype"] = "bfloat16".into();
        config["torch_dtype"] = "bfloat16".into();
    });
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let target = root.path().join("trained");
    let layout = ModelLayout::new(checkpoint.config());
    let tokenizer = Tokenizer::open(&folder).unwrap();
    let mut writer = CheckpointWriter::create_from(&target, &checkpoint, &layout, &tokenizer).unwrap();
    for unit in layout.units() {
        writer.write_unit(unit, &weights(unit)).unwrap();
    }
    writer.finish().unwrap();
    assert_reads_back(&target, &config());
    let fields = |folder: &Path| -> Value {
        serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap()
    };
    let mut expected = fields(&folder);
    expected["dtype"] = "float32".into();
    expected["torch_dtype"] = "float32".into();
    assert_eq!(fields(&target), expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_mutated_folder_never_panics(
        changes in prop::collection::vec((0usize..2000, any::<u8>()), 1..6),
        in_config: bool,
    ) {
        let (_root, folder) = sound();
        let path = folder.join(if in_config { "config.json" } else { "model.safetensors" });
        let mut bytes = fs::read(&path).unwrap();
        for (at, value) in changes {
            let length = bytes.len();
            bytes[at % length] = value;
        }
        fs::write(path, bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&folder) {
            let layout = ModelLayout::new(checkpoint.config());
            for unit in layout.units() {
                checkpoint.read_unit(unit, &mut vec![0.0; unit.padded]).unwrap();
            }
        }
    }
}
