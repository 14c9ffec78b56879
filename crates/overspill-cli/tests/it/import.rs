//! `overspill import`: what was exported goes on as if nothing had happened, and nothing half-made is ever resumed.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command::{Ended, Place, SMALL, read_json};

/// A folder with an empty one for each of these disks.
fn with_disks(names: &[&str]) -> Place {
    let place = Place::new();
    names.iter().for_each(|name| fs::create_dir(place.path(name)).unwrap());
    place
}

fn succeeds(place: &Place, arguments: &[&str]) {
    let ended = place.run(arguments);
    assert_eq!(ended.status, Some(0), "{arguments:?}: {}", ended.stderr);
}

/// Names in a disk's folder, but for its profile.
fn names_in(place: &Place, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(place.path(folder)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "overspill-tune.json").collect()
}

#[test]
fn an_imported_state_is_resumed_with_the_losses_of_the_run_that_was_not_interrupted() {
    let place = with_disks(&["swap", "a", "b", "c"]);
    let steps = ["--steps", "24", "--seed", "3", "--json", "numbers.json", "--quiet"];
    let arguments = [&["train"], &SMALL[..12], &steps].concat();
    let run = |more: &[&str]| place.command(&[arguments.as_slice(), more].concat());
    let numbers = || read_json(&place.path("numbers.json"));
    let reference = Ended::of(&run(&[]).output().unwrap());
    assert_eq!(reference.status, Some(0), "{}", reference.stderr);
    let reference = numbers()["losses"].clone();

    let mut child = run(&["--swap-dir", "swap", "--keep"]).spawn().unwrap();
    let began = Instant::now();
    // The second commit is the first step's.
    while !place.path("swap/overspill-store/manifest.previous").exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing is committed");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    succeeds(&place, &["export", "swap", "state", "--form", "state"]);
    succeeds(&place, &["import", "state", "--swap-dir", "a,b"]);
    // Once more, and through the threads backend.
    succeeds(&place, &["export", "a", "again", "--form", "state"]);
    for name in ["state.json", "state.safetensors"] {
        let [first, second] =
            ["state", "again"].map(|folder| fs::read(place.path(folder).join(name)).unwrap());
        assert!(first == second, "{name}");
    }
    succeeds(&place, &["import", "again", "--swap-dir", "c", "--durability", "none", "--backend", "threads"]);
    let other =
        [&["train"], &SMALL[..12], &["--steps", "24", "--seed", "4", "--swap-dir", "c", "--resume"]].concat();
    let refused = place.run(&other);
    refused.refused(&["the state of another run", "--seed was 3, and is 4 now"]);
    assert!(!refused.stderr.contains("training "), "before anything was started: {}", refused.stderr);
    for disks in ["a,b", "c"] {
        let ended = Ended::of(&run(&["--swap-dir", disks, "--resume"]).output().unwrap());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let first = numbers()["first_step"].as_u64().unwrap() as usize;
        assert!(first > 1);
        let losses = numbers()["losses"].as_array().unwrap().clone();
        assert_eq!(losses.as_slice(), &reference.as_array().unwrap()[first - 1..], "from step {first} on");
    }
}

#[test]
fn imported_weights_are_the_start_that_train_would_have_made_of_their_folder() {
    let place = with_disks(&["disk", "other"]);
    place.trained(&["--out", "model", "--seed", "8"]);
    let run = ["train", "--model", "model", "--batch", "2", "--seq", "16", "--steps", "5", "--lr", "0.01"];
    let losses = |more: &[&str]| {
        succeeds(&place, &[&run[..], &["--json", "numbers.json", "--quiet"], more].concat());
        read_json(&place.path("numbers.json"))["losses"].clone()
    };
    let reference = losses(&[]);
    succeeds(&place, &["import", "model", "--swap-dir", "disk"]);
    succeeds(&place, &["export", "disk", "back", "--dtype", "fp32"]);
    let [there, back] =
        ["model", "back"].map(|folder| fs::read(place.path(folder).join("model.safetensors")).unwrap());
    assert!(there == back);
    place
        .train(&["--swap-dir", "disk", "--resume", "--layers", "3"])
        .refused(&["the weights of another model", "--model"]);
    assert_eq!(losses(&["--swap-dir", "disk", "--resume"]), reference);
    // From its first step on it is the state of that run.
    place.train(&["--swap-dir", "disk", "--resume"]).refused(&["the state of another run"]);
    // A run of the same shape that names no folder takes them, too.
    succeeds(&place, &["import", "model", "--swap-dir", "other"]);
    assert_eq!(place.trained(&["--swap-dir", "other", "--resume"])["steps"], 3);
}

#[test]
fn what_cannot_be_imported_is_refused_and_leaves_nothing() {
    let place = with_disks(&["swap", "disk"]);
    place.trained(&["--swap-dir", "swap", "--keep", "--out", "model"]);
    succeeds(&place, &["export", "swap", "state", "--form", "state"]);
    let refused = |from: &str, says: &[&str]| {
        place.run(&["import", from, "--swap-dir", "disk"]).refused(says);
        assert!(names_in(&place, "disk").is_empty(), "{from}: {:?}", names_in(&place, "disk"));
    };
    let sound = fs::read(place.path("state/state.safetensors")).unwrap();
    let spoil = |from: &str, to: &str| {
        // The header stays as long as it was, and so do all offsets.
        assert_eq!(from.len(), to.len());
        let at = sound.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = sound.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        place.file("state/state.safetensors", bytes);
    };
    place.file("state/state.safetensors", &sound[..sound.len() - 1]);
    refused("state", &["state.safetensors", "the header describes a file of"]);
    spoil("model.norm.weight.exp_avg\"", "model.norn.weight.exp_avg\"");
    refused("state", &["tensor model.norm.weight.exp_avg is missing"]);
    spoil(
        "\"lm_head.weight.exp_avg_sq\":{\"dtype\":\"F32\"",
        "\"lm_head.weight.exp_avg_sq\":{\"dtype\":\"I32\"",
    );
    refused("state", &["tensor lm_head.weight.exp_avg_sq has dtype I32, expected F32"]);
    spoil(
        "\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[256,32]",
        "\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[32,256]",
    );
    refused("state", &["tensor lm_head.weight has shape [32, 256], expected [256, 32]"]);
    place.file("state/state.safetensors", &sound);
    for (at, byte) in [(sound.len() - 1, 0x80), (sound.len() / 2, 0x01), (sound.len() - 4097, 0x40)] {
        let mut bytes = sound.clone();
        bytes[at] ^= byte;
        place.file("state/state.safetensors", bytes);
        refused("state", &["state/state.safetensors: tensor ", " is damaged: its checksum is "]);
    }
    // A block that was lost, and a number that is none any more.
    for lost in [[0; 512], [0xff; 512]] {
        let mut bytes = sound.clone();
        let at = sound.len() / 2 / 512 * 512;
        bytes[at..at + 512].copy_from_slice(&lost);
        place.file("state/state.safetensors", bytes);
        refused("state", &["state/state.safetensors: tensor ", " is damaged: its checksum is "]);
    }
    place.file("state/state.safetensors", &sound);
    let text = fs::read_to_string(place.path("state/state.json")).unwrap();
    place.file("state/state.json", text.replace("\"step\": 3", "\"step\": 2"));
    refused("state", &["not of the training state that state/state.json describes"]);
    place.file("state/state.json", "{}");
    refused("state", &["state.json: not the description of a training state"]);
    place.file("state/state.json", text);
    refused("nowhere", &["nowhere"]);
    place.run(&["import", "state", "--swap-dir", "disk/none"]).refused(&["disk/none"]);
    place.run(&["import", "state", "--swap-dir", "swap"]).refused(&["overspill-store already exists"]);
    succeeds(&place, &["import", "state", "--swap-dir", "disk"]);
    let resumed = place.trained(&["--swap-dir", "disk", "--resume"]);
    assert_eq!(
        (&resumed["steps"], &resumed["loss_last"], &resumed["losses"]),
        (&0.into(), &Value::Null, &Value::Array(vec![]))
    );
    let ended = place.train(&["--swap-dir", "disk", "--resume"]);
    assert!(ended.stdout.contains("nothing left to do: all 3 steps were done"), "{}", ended.stdout);
}

#[test]
fn the_space_that_an_import_takes_is_said_before_it_is_taken() {
    let place = with_disks(&["disk", "other"]);
    place.trained(&["--out", "model"]);
    let ended = place.run(&["import", "model", "--swap-dir", "disk", "--json", "numbers.json"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let step =
        overspill_train::ByteSize(read_json(&place.path("numbers.json"))["storage_bytes"].as_u64().unwrap());
    let ended = place.run(&["import", "model", "--swap-dir", "other", "--durability", "none", "--json", "-"]);
    let numbers: Value = serde_json::from_str(&ended.stdout).unwrap();
    let none = overspill_train::ByteSize(numbers["storage_bytes"].as_u64().unwrap());
    let said = format!("taking {none} of storage (--durability step would take {step})");
    assert_eq!(ended.stderr.trim(), said);
    // What cannot be taken is said, too.
    let refused = place.run(&["import", "model", "--swap-dir", "disk"]);
    refused.refused(&["already exists"]);
    let said = format!("taking {step} of storage (--durability none would take {none})");
    assert!(refused.stderr.starts_with(&said), "{}", refused.stderr);
}

#[test]
fn an_import_that_is_killed_leaves_nothing_that_could_be_resumed() {
    let place = with_disks(&["0", "2", "5", "10"]);
    let shape = ["--layers", "8", "--hidden", "256", "--heads", "4", "--ffn", "768"];
    let run = ["--batch", "1", "--seq", "16", "--steps", "1"];
    succeeds(&place, &[&["train"], &shape[..], &run, &["--out", "model", "--quiet"]].concat());
    let mut was_cut = false;
    for after_ms in [0, 2, 5, 10] {
        let disk = after_ms.to_string();
        let store = place.path(&disk).join("overspill-store");
        let mut child = place.command(&["import", "model", "--swap-dir", &disk]).spawn().unwrap();
        let began = Instant::now();
        while !store.exists() {
            assert!(began.elapsed() < Duration::from_secs(60), "no store in time");
            std::thread::yield_now();
        }
        std::thread::park_timeout(Duration::from_millis(after_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        let resumed = place.run(&[&["train"], &shape[..], &run, &["--swap-dir", &disk, "--resume"]].concat());
        match store.join("manifest").exists() {
            true => assert_eq!(resumed.status, Some(0), "{}", resumed.stderr),
            false => {
                was_cut = true;
                resumed.refused(&["no committed state"]);
            }
        }
    }
    assert!(was_cut, "no import was killed before its end");
}
