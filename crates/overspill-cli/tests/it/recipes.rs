//! Optimizers and formats of the state: what a run says of them, what they save, and whom they let in.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use overspill_train::checkpoint::Checkpoint;
use overspill_train::layout::ModelLayout;
use serde_json::Value;

use crate::command::{Ended, Place, SMALL, read_json};

/// A folder with a kept run by these arguments in `swap`, and what it has written as `model`.
fn kept(arguments: &[&str]) -> Place {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let ended = place.train(&[&["--swap-dir", "swap", "--keep", "--out", "model"], arguments].concat());
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    place
}

fn exported(place: &Place, folder: &str, dtype: &str) -> Vec<u32> {
    let ended = place.run(&["export", "swap", folder, "--dtype", dtype]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    weights(&place.path(folder))
}

/// All weights of a folder, as bits.
fn weights(folder: &Path) -> Vec<u32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut bits = Vec::new();
    for unit in ModelLayout::new(checkpoint.config()).units() {
        let mut weights = vec![f32::NAN; unit.padded];
        checkpoint.read_unit(unit, &mut weights).unwrap();
        bits.extend(weights.into_iter().map(f32::to_bits));
    }
    bits
}

#[test]
fn a_run_says_its_recipe_and_moves_the_bytes_that_it_makes() {
    let place = Place::new();
    // Of an element: weights twice for the model, weights and record both ways, the gradient both ways.
    let cases: [(&[&str], [&str; 3], f64); 6] = [
        (&[], ["adamw", "f32", "f32"], 40.0),
        (&["--weights", "bf16"], ["adamw", "bf16", "f32"], 36.0),
        (&["--weights", "bf16", "--moments", "8bit"], ["adamw", "bf16", "8bit"], 24.0),
        (&["--weights", "bf16-stochastic", "--moments", "bf16"], ["adamw", "bf16-stochastic", "bf16"], 24.0),
        (&["--optimizer", "lion"], ["lion", "f32", "f32"], 32.0),
        (&["--optimizer", "sgd"], ["sgd", "f32", "f32"], 24.0),
    ];
    let mut losses = Vec::new();
    for (arguments, names, bytes) in cases {
        let shape = ["--hidden", "128", "--ffn", "384", "--seq", "8"];
        let numbers = place.trained(&[&shape, arguments].concat());
        assert_eq!(["optimizer", "weights", "moments"].map(|name| numbers[name].as_str().unwrap()), names);
        assert_eq!(numbers["bytes_written_per_step"], numbers["bytes_written_per_step_planned"]);
        // Inputs of layers and padding come on top; the embedding is not needed on the way back.
        let moved = numbers["bytes_per_parameter_step"].as_f64().unwrap();
        assert!((moved / bytes - 1.0).abs() < 0.05, "{names:?}: {moved}");
        losses.push(numbers["losses"].to_string());
    }
    losses.sort();
    losses.dedup();
    assert_eq!(losses.len(), cases.len(), "each recipe has losses of its own");
    let ended = place.train(&["--weights", "bf16", "--moments", "8bit"]);
    assert!(ended.stdout.contains("adamw, weights bf16, moments 8bit"), "{}", ended.stdout);
}

#[test]
fn the_same_seed_gives_the_same_losses_in_memory_and_on_storage_by_any_recipe() {
    let place = Place::new();
    for weights in ["f32", "bf16", "bf16-stochastic"] {
        for moments in ["f32", "bf16", "8bit"] {
            let recipe = ["--weights", weights, "--moments", moments, "--seed", "5"];
            let losses = |more: &[&str]| place.trained(&[&recipe, more].concat())["losses"].clone();
            let reference = losses(&["--in-memory"]);
            assert_eq!(losses(&["--depth", "2"]), reference, "{weights} {moments}");
            assert_eq!(losses(&["--depth", "0", "--resident", "1GiB"]), reference, "{weights} {moments}");
        }
    }
}

#[test]
fn a_kept_state_is_gone_on_with_by_its_own_recipe_only() {
    let recipe = ["--optimizer", "sgd", "--momentum", "0.9", "--weights", "bf16", "--moments", "8bit"];
    let place = kept(&recipe);
    let resumed =
        |more: &[&str]| place.train(&[&["--swap-dir", "swap", "--resume"], &recipe[..], more].concat());
    let ended = resumed(&[]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("nothing left to do"), "{}", ended.stdout);
    for (more, says) in [
        (
            &["--optimizer", "adamw", "--momentum", "0"][..],
            "--optimizer was sgd with momentum, and is adamw now",
        ),
        (&["--momentum", "0", "--moments", "f32"], "--optimizer was sgd with momentum, and is sgd now"),
        (&["--momentum", "0.8"], "SGD was SgdConfig { momentum: 0.9"),
        (&["--weights", "bf16-stochastic"], "--weights was bf16, and is bf16-stochastic now"),
        (&["--moments", "f32"], "--moments was 8bit, and is f32 now"),
    ] {
        resumed(more).refused(&["the state of another run", says]);
    }
    place.train(&["--momentum", "0.5"]).refused(&["--momentum is for --optimizer sgd and muon only"]);

    // Weights that no run has touched are stored as those of AdamW in single precision.
    fs::create_dir(place.path("other")).unwrap();
    assert_eq!(place.run(&["import", "model", "--swap-dir", "other"]).status, Some(0));
    let untouched = ["--swap-dir", "other", "--resume"];
    place
        .train(&[&untouched[..], &["--weights", "bf16"]].concat())
        .refused(&["--weights was f32, and is bf16 now"]);
    assert_eq!(place.train(&untouched).status, Some(0));
}

#[test]
fn exact_weights_come_out_of_remainders_and_stored_ones_as_they_are() {
    for moments in ["f32", "8bit"] {
        let place = kept(&["--weights", "bf16", "--moments", moments]);
        let whole = exported(&place, "whole", "fp32");
        assert!(whole == weights(&place.path("model")), "{moments}");
        assert!(whole.iter().any(|bits| bits & 0xffff != 0), "{moments}: masters are exact");
        // As the recipe rounds: half up in magnitude.
        let stored = whole.iter().map(|bits| (bits + 0x8000) & 0xffff_0000);
        assert!(exported(&place, "half", "bf16").into_iter().eq(stored), "{moments}");
    }
    let place = kept(&["--weights", "bf16-stochastic"]);
    let whole = exported(&place, "whole", "fp32");
    assert!(whole == weights(&place.path("model")));
    assert!(whole == exported(&place, "half", "bf16"));
    for recipe in [&["--optimizer", "sgd"][..], &["--optimizer", "adagrad", "--moments", "8bit"]] {
        let place = kept(recipe);
        let whole = exported(&place, "whole", "fp32");
        assert!(whole == weights(&place.path("model")));
        // To the nearest, and to the even one of two.
        let rounded = whole.iter().map(|bits| (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
        assert!(exported(&place, "half", "bf16").into_iter().eq(rounded), "{recipe:?}");
    }
}

/// Recipes that a state may be of: every optimizer, and every pair of formats.
const RECIPES: [&[&str]; 19] = [
    &[],
    &["--moments", "bf16"],
    &["--moments", "8bit"],
    &["--weights", "bf16"],
    &["--weights", "bf16", "--moments", "bf16"],
    &["--weights", "bf16", "--moments", "8bit"],
    &["--weights", "bf16-stochastic"],
    &["--weights", "bf16-stochastic", "--moments", "bf16"],
    &["--weights", "bf16-stochastic", "--moments", "8bit"],
    &["--optimizer", "adam", "--weights", "bf16"],
    &["--optimizer", "sgd"],
    &["--optimizer", "sgd", "--weights", "bf16"],
    &["--optimizer", "sgd", "--momentum", "0.9", "--moments", "8bit"],
    &["--optimizer", "adagrad", "--weights", "bf16-stochastic", "--moments", "bf16"],
    &["--optimizer", "lion", "--weights", "bf16", "--moments", "8bit"],
    &["--weights", "fp16", "--moments", "bf16"],
    &["--optimizer", "adafactor"],
    &["--optimizer", "adafactor", "--weights", "bf16"],
    &["--optimizer", "muon", "--weights", "fp16"],
];

#[test]
fn a_state_of_any_recipe_is_gone_on_with_after_export_and_import_as_if_nothing_had_happened() {
    for recipe in RECIPES {
        let place = Place::new();
        ["swap", "other"].iter().for_each(|disk| fs::create_dir(place.path(disk)).unwrap());
        let steps = ["--steps", "24", "--seed", "3", "--quiet", "--json", "numbers.json"];
        let arguments = [&["train"], &SMALL[..14], &steps, recipe].concat();
        let train = |more: &[&str]| place.command(&[arguments.as_slice(), more].concat());
        let finished = |more: &[&str]| {
            let ended = Ended::of(&train(more).output().unwrap());
            assert_eq!(ended.status, Some(0), "{recipe:?}: {}", ended.stderr);
            read_json(&place.path("numbers.json"))
        };
        let reference = finished(&["--out", "reference"])["losses"].as_array().unwrap().clone();

        let mut child = train(&["--swap-dir", "swap", "--keep"]).spawn().unwrap();
        let began = Instant::now();
        // The second commit is the first step's.
        while !place.path("swap/overspill-store/manifest.previous").exists() {
            assert!(began.elapsed() < Duration::from_secs(60), "nothing is committed");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let succeeds = |arguments: &[&str]| {
            let ended = place.run(arguments);
            assert_eq!(ended.status, Some(0), "{recipe:?} {arguments:?}: {}", ended.stderr);
        };
        succeeds(&["export", "swap", "state", "--form", "state"]);
        succeeds(&["import", "state", "--swap-dir", "other"]);
        succeeds(&["export", "other", "again", "--form", "state"]);
        for name in ["state.json", "state.safetensors"] {
            let [first, second] =
                ["state", "again"].map(|folder| fs::read(place.path(folder).join(name)).unwrap());
            assert!(first == second, "{recipe:?}: {name}");
        }
        for (disk, out) in [("swap", "straight"), ("other", "detour")] {
            let numbers = finished(&["--swap-dir", disk, "--resume", "--out", out]);
            let first = numbers["first_step"].as_u64().unwrap() as usize;
            assert!(first > 1);
            assert_eq!(numbers["losses"].as_array().unwrap(), &reference[first - 1..], "{recipe:?} {disk}");
            assert!(weights(&place.path(out)) == weights(&place.path("reference")), "{recipe:?} {disk}");
        }
    }
}

/// Changes what a folder of a state says of itself, in its description and in the header of its one file.
fn retold(place: &Place, change: impl Fn(&mut Value, &mut Value)) {
    let (path, description) = (place.path("state/state.safetensors"), place.path("state/state.json"));
    let text = fs::read(&path).unwrap();
    let (length, rest) = text.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap());
    let mut header: Value = serde_json::from_slice(header).unwrap();
    let mut said = read_json(&description);
    change(&mut said, &mut header);
    // The files repeat everything but the checksums.
    let mut note = said.clone();
    note.as_object_mut().unwrap().remove("checksums");
    header["__metadata__"]["overspill"] = note.to_string().into();
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    fs::write(&path, [&length[..], &header, data].concat()).unwrap();
    fs::write(description, said.to_string()).unwrap();
}

#[test]
fn a_folder_that_says_that_it_is_of_another_recipe_is_not_taken_in_whatever_its_files_are() {
    let place = kept(&["--weights", "bf16"]);
    fs::create_dir(place.path("other")).unwrap();
    assert_eq!(place.run(&["export", "swap", "state", "--form", "state"]).status, Some(0));
    let said = read_json(&place.path("state/state.json"));
    let recipe = serde_json::json!({ "optimizer": "adamw", "weights": "bf16", "moments": "f32" });
    assert_eq!((&said["recipe"], &said["version"]), (&recipe, &Value::from(3)));
    assert_eq!(read_json(&place.path("state/config.json"))["torch_dtype"], "bfloat16");
    for (field, value, says) in [
        ("optimizer", "lion", "exp_avg_sq does not belong to the model"),
        ("optimizer", "adagrad", ".sum is missing"),
        ("weights", "f32", "has dtype BF16, expected F32"),
        ("weights", "bf16-stochastic", ".master does not belong to the model"),
        ("moments", "8bit", "has dtype F32, expected U8"),
        ("moments", "4bit", "its recipe is not known here"),
    ] {
        retold(&place, |said, _| {
            said["recipe"] = recipe.clone();
            said["recipe"][field] = value.into();
        });
        place.run(&["import", "state", "--swap-dir", "other"]).refused(&["state", says]);
        assert_eq!(fs::read_dir(place.path("other")).unwrap().count(), 0);
    }
    retold(&place, |said, _| said["recipe"] = recipe.clone());
    assert_eq!(place.run(&["import", "state", "--swap-dir", "other"]).status, Some(0));
    let resumed = ["--swap-dir", "other", "--resume"];
    place.train(&resumed).refused(&["--weights was bf16, and is f32 now"]);
    assert_eq!(place.train(&[&resumed[..], &["--weights", "bf16"]].concat()).status, Some(0));
}

#[test]
fn a_state_that_was_exported_before_its_tensors_got_their_names_is_imported() {
    let place = kept(&[]);
    ["second", "first"].iter().for_each(|disk| fs::create_dir(place.path(disk)).unwrap());
    assert_eq!(place.run(&["export", "swap", "state", "--form", "state"]).status, Some(0));
    let exported = fs::read(place.path("state/state.json")).unwrap();
    let older = |name: &str| match name.rsplit_once('.') {
        Some((parameter, array @ ("exp_avg" | "exp_avg_sq"))) => format!("{array}.{parameter}"),
        _ if name == "__metadata__" => name.to_owned(),
        _ => format!("weight.{name}"),
    };
    let renamed = |names: &Value| -> Value {
        let names = names.as_object().unwrap().iter();
        Value::Object(names.map(|(name, value)| (older(name), value.clone())).collect())
    };
    retold(&place, |said, header| {
        said["version"] = 2.into();
        // Older than recipes, too.
        said.as_object_mut().unwrap().remove("recipe");
        said["checksums"] = renamed(&said["checksums"]);
        *header = renamed(header);
    });
    assert_eq!(place.run(&["import", "state", "--swap-dir", "second"]).status, Some(0));
    assert_eq!(place.run(&["export", "second", "back", "--form", "state"]).status, Some(0));
    let back = read_json(&place.path("back/state.json"));
    let exported: Value = serde_json::from_slice(&exported).unwrap();
    assert_eq!(back["checksums"], exported["checksums"]);
    retold(&place, |said, _| {
        said["version"] = 1.into();
        said.as_object_mut().unwrap().remove("checksums");
    });
    let ended = place.run(&["import", "state", "--swap-dir", "first"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("nothing was compared"), "{}", ended.stderr);
    // None of these was of another recipe.
    retold(&place, |said, _| {
        said["recipe"] = serde_json::json!({ "optimizer": "lion", "weights": "f32", "moments": "f32" });
    });
    let refused = place.run(&["import", "state", "--swap-dir", "first"]);
    refused.refused(&["before version 3 there were states of adamw in single precision only"]);
}
