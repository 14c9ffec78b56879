//! Tiles and tensors have the same bytes, whatever the recipe.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use overspill_io::BackendChoice;
use overspill_optim::{
    AdafactorConfig, AdamWConfig, MomentFormat, MuonConfig, SgdConfig, WeightFormat, split_remainders,
};
use overspill_swap::Durability;
use safetensors::Dtype;
use serde_json::json;

use super::pieces::{Array, pieces, tensors, weight_dtype};
use super::{BOTH_KINDS, ExportOptions, Form, ImportOptions, export, import, tiles};
use crate::checkpoint::{Naming, Precision, StateWriter, TensorPlan};
use crate::config::{self, ModelConfig};
use crate::error::TrainError;
use crate::layout::ModelLayout;
use crate::optimizer::{Names, Optimizer};

const WEIGHTS: [WeightFormat; 4] = [
    WeightFormat::F32,
    WeightFormat::Bf16WithRemainder,
    WeightFormat::F16WithMaster,
    WeightFormat::Bf16Stochastic,
];
/// No side is a multiple of a block of moments, and units are longer than the shortest tile.
const CONFIG: &str = r#"{"vocab_size": 301, "hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 100}"#;

const MOMENTS: [MomentFormat; 3] = [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::Blocks8];

fn layout(optimizer: Optimizer, weights: WeightFormat, moments: MomentFormat) -> ModelLayout {
    let config = ModelConfig::from_json(CONFIG, Path::new("config.json")).unwrap();
    ModelLayout::of(&config, optimizer.recipe(weights, moments).unwrap())
}

/// Those that keep their moments in single precision only.
fn wholes() -> [Optimizer; 2] {
    let muon = Optimizer::Muon { muon: MuonConfig::default(), adamw: AdamWConfig::default() };
    [Optimizer::Adafactor(AdafactorConfig::default()), muon]
}

#[test]
fn the_pieces_of_all_tiles_are_the_tensors_from_their_first_byte_to_their_last() {
    let sgd = |momentum| Optimizer::Sgd(SgdConfig { momentum, ..SgdConfig::default() });
    let [adafactor, muon] = wholes();
    for optimizer in [Optimizer::default(), sgd(0.0), sgd(0.9), adafactor, muon] {
        for weights in WEIGHTS {
            let moments = MOMENTS.into_iter().filter(|moments| optimizer.recipe(weights, *moments).is_ok());
            for (moments, tile_bytes) in moments.flat_map(|m| [1 << 14, 1 << 16, 1 << 22].map(|b| (m, b))) {
                let layout = layout(optimizer, weights, moments);
                let mut found = BTreeMap::new();
                for tile in tiles(&layout, tile_bytes, BOTH_KINDS) {
                    let mut taken = vec![false; tile.bytes];
                    for piece in pieces(&layout, tile) {
                        let places = &mut taken[piece.bytes.clone()];
                        assert!(!places.contains(&true), "{:?} overlaps", piece.array);
                        places.fill(true);
                        assert!(piece.elements.end <= tile.elements);
                        let bytes = match piece.array {
                            // As many masters as remainders.
                            Array::Joined => 2 * piece.bytes.len(),
                            Array::Weights | Array::Column(_) => piece.bytes.len(),
                        };
                        let end: &mut u64 = found.entry(piece.tensor(Naming::ParameterFirst)).or_default();
                        assert_eq!(*end, piece.start, "{}", piece.tensor(Naming::ParameterFirst));
                        *end += bytes as u64;
                    }
                }
                let expected: BTreeMap<String, u64> = tensors(&layout, Naming::ParameterFirst)
                    .into_iter()
                    .map(|tensor| {
                        let elements: usize = tensor.shape.iter().product();
                        (tensor.name, (elements * tensor.dtype.bitsize() / 8) as u64)
                    })
                    .collect();
                assert_eq!(found, expected, "{weights:?} {moments:?} in tiles of {tile_bytes}");
            }
        }
    }
}

#[test]
fn tensors_have_the_names_of_torch_and_the_dtypes_of_the_record() {
    let found = |weights, moments| -> Vec<(String, Vec<usize>, Dtype)> {
        let tensors = tensors(&layout(Optimizer::default(), weights, moments), Naming::ParameterFirst);
        let of_one = |name: &str| name.strip_prefix("lm_head.weight").map(str::to_owned);
        tensors.into_iter().filter_map(|t| Some((of_one(&t.name)?, t.shape, t.dtype))).collect()
    };
    let named = |name: &str, dtype| (name.to_owned(), vec![301, 72], dtype);
    let scales = |name: &str| (name.to_owned(), vec![(301 * 72_usize).div_ceil(256)], Dtype::F32);
    assert_eq!(
        found(WeightFormat::F32, MomentFormat::Bf16),
        [named("", Dtype::F32), named(".exp_avg", Dtype::BF16), named(".exp_avg_sq", Dtype::BF16)]
    );
    assert_eq!(
        found(WeightFormat::Bf16WithRemainder, MomentFormat::Blocks8),
        [
            named("", Dtype::BF16),
            named(".master", Dtype::F32),
            named(".exp_avg", Dtype::U8),
            named(".exp_avg_sq", Dtype::U8),
            scales(".exp_avg_scale"),
            scales(".exp_avg_sq_scale"),
        ]
    );
    assert_eq!(
        found(WeightFormat::F16WithMaster, MomentFormat::F32)[..2],
        [named("", Dtype::F16), named(".master", Dtype::F32)]
    );
}

#[test]
fn weights_are_joined_only_for_what_the_stored_ones_do_not_say() {
    let records = |form: Form, weights| form.kinds(weights).len() == 2;
    for weights in WEIGHTS {
        assert!(records(Form::State, weights));
        let is_stored = matches!(weights, WeightFormat::F32 | WeightFormat::Bf16Stochastic);
        assert_eq!(records(Form::Weights(Precision::F32), weights), !is_stored);
        // A bf16 out of an f16 would be rounded twice, and lack the range.
        let is_other = weights == WeightFormat::F16WithMaster;
        assert_eq!(records(Form::Weights(Precision::Bf16), weights), is_other);
    }
}

/// The bytes of a tensor: all patterns, numbers or not.
fn noise(tensor: &TensorPlan, dtype: Dtype) -> Vec<u8> {
    let seed = tensor.name.bytes().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let bytes = tensor.shape.iter().product::<usize>() * dtype.bitsize() / 8;
    (0..bytes as u64).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 41) as u8).collect()
}

/// A folder of a state of made-up bytes, in which stored weights are what exact ones round to; `spoil` may change them.
fn made_up(out: &Path, layout: &ModelLayout, tile_bytes: usize, spoil: impl Fn(&str, &mut Vec<u16>)) {
    let fields = config::fields(CONFIG, Path::new("config.json")).unwrap();
    let recipe = layout.state_recipe();
    let meta = json!({ "step": 0, "tile_bytes": tile_bytes, "recipe": Names::of(recipe).to_json(), "run": null,
        "config": fields, "tokenizer": null });
    let plans = tensors(layout, Naming::ParameterFirst);
    let dtype = weight_dtype(recipe.weights()).1;
    let mut writer = StateWriter::create(out, &meta, (&fields, dtype), plans.clone(), None).unwrap();
    for plan in &plans {
        let mut bytes = noise(plan, plan.dtype);
        if plan.name.ends_with(".weight") && recipe.weights() == WeightFormat::Bf16WithRemainder {
            let master = TensorPlan { name: format!("{}.master", plan.name), ..plan.clone() };
            let masters: Vec<f32> = bytemuck::pod_collect_to_vec(&noise(&master, Dtype::F32));
            let (mut weights, mut rest) = (vec![0; masters.len()], vec![0; masters.len()]);
            split_remainders(&masters, &mut weights, &mut rest).unwrap();
            spoil(&plan.name, &mut weights);
            bytes = bytemuck::cast_slice(&weights).to_vec();
        }
        bytes.chunks(5000).for_each(|piece| writer.write(&plan.name, piece).unwrap());
    }
    writer.finish().unwrap();
}

fn imported(from: &Path, disk: &Path) -> Result<(), TrainError> {
    let options = ImportOptions {
        from: from.to_owned(),
        directories: vec![disk.to_owned()],
        durability: Durability::Step,
        backend: BackendChoice::Threads,
    };
    import(&options, &AtomicBool::new(false), &mut |_| {}, &mut |_, _| {}).map(drop)
}

#[test]
fn a_state_of_any_recipe_comes_back_bit_by_bit() {
    for (number, weights) in WEIGHTS.into_iter().enumerate() {
        for (moments, tile_bytes) in MOMENTS.into_iter().zip([1 << 16, 1 << 17, 1 << 16]) {
            let dtype = ["float32", "bfloat16", "float16", "bfloat16"][number];
            goes_and_comes_back(&layout(Optimizer::default(), weights, moments), tile_bytes, dtype);
        }
        for optimizer in wholes() {
            let dtype = ["float32", "bfloat16", "float16", "bfloat16"][number];
            goes_and_comes_back(&layout(optimizer, weights, MomentFormat::F32), 1 << 16, dtype);
        }
    }
}

fn goes_and_comes_back(layout: &ModelLayout, tile_bytes: usize, dtype: &str) {
    let root = tempfile::tempdir().unwrap();
    let [state, disk, back] = ["state", "disk", "back"].map(|name| root.path().join(name));
    std::fs::create_dir(&disk).unwrap();
    made_up(&state, layout, tile_bytes, |_, _| {});
    imported(&state, &disk).unwrap();
    let options = ExportOptions {
        form: Form::State,
        backend: BackendChoice::Threads,
        ..ExportOptions::new(disk, back.clone())
    };
    let exported = export(&options, &AtomicBool::new(false), &mut |_, _| {}).unwrap();
    assert_eq!(exported.dtype, dtype);
    for name in ["state.json", "state.safetensors", "config.json"] {
        let [there, back] = [&state, &back].map(|folder| std::fs::read(folder.join(name)).unwrap());
        assert!(there == back, "{name} of {:?}", layout.state_recipe());
    }
}

#[test]
fn a_record_of_a_whole_parameter_has_its_rows_and_columns_as_tensors() {
    let [adafactor, _] = wholes();
    let layout = layout(adafactor, WeightFormat::Bf16WithRemainder, MomentFormat::F32);
    let found: Vec<_> = tensors(&layout, Naming::ParameterFirst)
        .into_iter()
        .filter_map(|t| Some((t.name.strip_prefix("lm_head.weight")?.to_owned(), t.shape, t.dtype)))
        .collect();
    let expected = [
        ("", vec![301, 72], Dtype::BF16),
        (".master", vec![301, 72], Dtype::F32),
        (".row_var", vec![301], Dtype::F32),
        (".col_var", vec![72], Dtype::F32),
    ];
    assert_eq!(found, expected.map(|(name, shape, dtype)| (name.to_owned(), shape, dtype)));
}

#[test]
fn stored_weights_that_are_not_what_exact_ones_round_to_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let [state, disk]: [PathBuf; 2] = ["state", "disk"].map(|name| root.path().join(name));
    std::fs::create_dir(&disk).unwrap();
    let layout = layout(Optimizer::default(), WeightFormat::Bf16WithRemainder, MomentFormat::F32);
    // The last number of the second tile of its unit.
    made_up(&state, &layout, 1 << 16, |tensor, weights| {
        if tensor == "lm_head.weight" {
            *weights.last_mut().unwrap() ^= 1;
        }
    });
    let refused = imported(&state, &disk).unwrap_err().to_string();
    let expected = "state/state.safetensors: the numbers of tensor lm_head.weight are not those that its exact ones, \
                    lm_head.weight.master, round to";
    assert!(refused.ends_with(expected), "{refused}");
    assert_eq!(std::fs::read_dir(&disk).unwrap().count(), 0);
}
