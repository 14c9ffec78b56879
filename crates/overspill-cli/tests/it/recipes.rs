//! Optimizers and formats of the state: what a run says of them, what they save, and whom they let in.

use std::fs;
use std::path::Path;

use overspill_train::checkpoint::Checkpoint;
use overspill_train::layout::ModelLayout;
use serde_json::Value;

use crate::command::{Place, read_json};

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
        (&["--momentum", "0"], "--optimizer was sgd with momentum, and is sgd now"),
        (&["--momentum", "0.8"], "SGD was SgdConfig { momentum: 0.9"),
        (&["--weights", "bf16-stochastic"], "--weights was bf16, and is bf16-stochastic now"),
        (&["--moments", "f32"], "--moments was 8bit, and is f32 now"),
    ] {
        resumed(more).refused(&["the state of another run", says]);
    }
    place.train(&["--momentum", "0.5"]).refused(&["--momentum is for --optimizer sgd only"]);

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
    let place = kept(&["--optimizer", "sgd"]);
    assert!(exported(&place, "whole", "fp32") == weights(&place.path("model")));
}

#[test]
fn a_whole_state_is_exported_of_adamw_in_single_precision_only() {
    for (recipe, names) in [
        (&["--weights", "bf16"][..], "adamw with bf16 weights and f32 moments"),
        (&["--moments", "8bit"], "adamw with f32 weights and 8bit moments"),
        (&["--optimizer", "adam"], "adam with f32 weights and f32 moments"),
        (&["--optimizer", "sgd"], "sgd with f32 weights and f32 moments"),
    ] {
        let place = kept(recipe);
        place.run(&["export", "swap", "state", "--form", "state"]).refused(&[
            "is a state of",
            names,
            "--form weights",
        ]);
        assert!(!place.path("state").exists());
    }
    let place = kept(&[]);
    assert_eq!(place.run(&["export", "swap", "state", "--form", "state"]).status, Some(0));
    let said = read_json(&place.path("state/state.json"));
    let adamw = serde_json::json!({ "optimizer": "adamw", "weights": "f32", "moments": "f32" });
    assert_eq!(said["recipe"], adamw);

    // A folder that says that it is another's is not taken in, whatever its files are.
    let path = place.path("state/state.safetensors");
    let text = fs::read(&path).unwrap();
    let (length, rest) = text.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap());
    let mut header: Value = serde_json::from_slice(header).unwrap();
    let mut said = said;
    said["recipe"]["optimizer"] = "lion".into();
    // The files repeat everything but the checksums.
    let mut note = said.clone();
    note.as_object_mut().unwrap().remove("checksums");
    header["__metadata__"]["overspill"] = note.to_string().into();
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    fs::write(&path, [&length[..], &header, data].concat()).unwrap();
    fs::write(place.path("state/state.json"), said.to_string()).unwrap();
    fs::create_dir(place.path("other")).unwrap();
    let import = ["import", "state", "--swap-dir", "other"];
    place.run(&import).refused(&["is a state of lion with f32 weights and f32 moments"]);
    assert_eq!(fs::read_dir(place.path("other")).unwrap().count(), 0);
}
