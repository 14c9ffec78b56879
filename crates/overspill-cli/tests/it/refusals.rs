//! Whatever is wrong is said in one line, with an exit status, and nothing is left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::command::{Place, SMALL};

/// Runs the small model and checks that it is refused and that the folder is as it was.
#[track_caller]
fn refused(place: &Place, arguments: &[&str], says: &[&str]) {
    let before = place.names();
    place.train(arguments).refused(says);
    assert_eq!(place.names(), before);
}

#[test]
fn a_budget_below_the_least_is_refused_and_the_least_suffices() {
    let place = Place::new();
    let model = ["--layers", "2", "--hidden", "512", "--ffn", "2048"];
    let ended = place.train(&[model.as_slice(), &["--memory", "8MiB"]].concat());
    ended.refused(&["--memory 8 MiB is too small", "the least that would do is", "layer 0"]);
    let least = ended.stderr.split("would do is ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let numbers = place.trained(&[model.as_slice(), &["--memory", &least]].concat());
    assert_eq!(numbers["steps"], 3);
    assert_eq!(numbers["depth"], 0);
}

#[test]
fn a_swap_directory_that_does_not_exist_is_refused() {
    refused(&Place::new(), &["--swap-dir", "nowhere"], &["nowhere", "No such file or directory"]);
}

#[test]
fn a_swap_directory_that_is_a_file_is_refused() {
    let place = Place::new();
    place.file("file", "");
    refused(&place, &["--swap-dir", "file"], &["file", "Not a directory"]);
}

#[test]
fn a_swap_directory_that_cannot_be_written_is_refused() {
    // To root every folder can be written, but the kernel's own, which has no room.
    let place = Place::new();
    let sealed = place.path("sealed");
    fs::create_dir(&sealed).unwrap();
    fs::set_permissions(&sealed, fs::Permissions::from_mode(0o500)).unwrap();
    let writable = fs::create_dir(sealed.join("probe")).is_ok();
    let directory = if writable { "/proc/self" } else { "sealed" };
    place.train(&["--swap-dir", directory]).refused(&[directory]);
}

#[test]
fn a_second_swap_directory_that_cannot_be_used_is_named_and_the_first_is_left_as_it_was() {
    let place = Place::new();
    let sealed = place.path("sealed");
    fs::create_dir(&sealed).unwrap();
    fs::set_permissions(&sealed, fs::Permissions::from_mode(0o500)).unwrap();
    let writable = fs::create_dir(sealed.join("probe")).is_ok();
    let unwritable = if writable { "/proc/self" } else { "sealed" };
    place.file("file", "");
    fs::create_dir(place.path("swap")).unwrap();
    let profile = r#"{"version": 1, "chunk_bytes": 4096, "queue_depth": 1, "rings": 1,
        "read_gbps": 1, "write_gbps": 1}"#;
    place.file("swap/overspill-tune.json", profile);
    for second in [unwritable, "nowhere", "file"] {
        refused(&place, &["--swap-dir", &format!("swap,{second}")], &[second]);
        let left: Vec<_> =
            fs::read_dir(place.path("swap")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["overspill-tune.json"], "{second}");
    }
    refused(&place, &["--swap-dir", "swap,swap/."], &["--swap-dir swap/. is given twice"]);
}

#[test]
fn a_directory_that_another_run_has_locked_is_refused() {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let endless = [
        &["train"],
        &SMALL[..SMALL.len() - 2],
        &["--steps", "1000000", "--swap-dir", "swap", "--json", "n.json"],
    ]
    .concat();
    let mut other = place.command(&endless).spawn().unwrap();
    let manifested = place.path("swap/overspill-store/lock");
    let began = std::time::Instant::now();
    // The lock is taken before the owner's number is written.
    while fs::read_to_string(&manifested).unwrap_or_default().is_empty() {
        assert!(began.elapsed().as_secs() < 60, "the other run does not start");
        std::thread::yield_now();
    }
    let ended = place.train(&["--swap-dir", "swap"]);
    let pid = other.id().to_string();
    assert!(std::process::Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    assert_eq!(other.wait().unwrap().code(), Some(130));
    ended.refused(&["swap/overspill-store is in use by process", &pid]);
    assert!(fs::read_dir(place.path("swap")).unwrap().next().is_none());
}

#[test]
fn a_disk_that_is_too_full_is_found_before_the_run_starts() {
    // A model whose state no disk holds, though its layers are small; or the run would take hours.
    let place = Place::new();
    let huge = ["--layers", "4000", "--hidden", "4096", "--ffn", "16384", "--memory", "64GiB"];
    refused(&place, &huge, &["bytes free", "are needed"]);
}

#[test]
fn an_output_folder_in_the_way_is_refused() {
    let place = Place::new();
    fs::create_dir(place.path("out")).unwrap();
    fs::write(place.path("out/thesis"), "").unwrap();
    refused(&place, &["--out", "out"], &["out", "not an empty folder"]);
    refused(&place, &["--out", "no/where"], &["no: no such folder"]);
}

#[test]
fn a_json_file_that_cannot_be_written_is_refused_before_the_run() {
    refused(&Place::new(), &["--json", "no/where.json"], &["no/where.json"]);
}

#[test]
fn an_empty_corpus_is_refused() {
    let place = Place::new();
    place.file("empty.txt", "");
    refused(&place, &["--data", "empty.txt"], &["empty.txt", "the corpus is empty"]);
}

#[test]
fn a_corpus_shorter_than_a_sequence_is_refused() {
    let place = Place::new();
    place.file("short.txt", "sixteen letters.");
    refused(&place, &["--data", "short.txt"], &["short.txt", "16 tokens", "17"]);
}

#[test]
fn invalid_utf8_is_refused_with_its_place() {
    let place = Place::new();
    place.file("bad.txt", b"good \xff bad");
    refused(&place, &["--data", "bad.txt"], &["bad.txt", "invalid UTF-8 at byte 5"]);
}

#[test]
fn malformed_jsonl_is_refused_with_its_line() {
    let place = Place::new();
    place.file("bad.jsonl", "{\"text\": \"fine\"}\n{\"text\": 7}\n");
    refused(&place, &["--data", "bad.jsonl"], &["bad.jsonl", "line 2"]);
    place.file("worse.jsonl", "{\"text\": \"fine\"}\n{\"text\": \n");
    refused(&place, &["--data", "worse.jsonl"], &["worse.jsonl", "line 2"]);
}

#[test]
fn a_missing_data_file_is_refused() {
    refused(&Place::new(), &["--data", "missing.txt"], &["missing.txt", "no such file"]);
}

#[test]
fn heads_that_do_not_divide_hidden_are_refused() {
    refused(&Place::new(), &["--heads", "5"], &["heads = 5", "must divide hidden = 32"]);
}

#[test]
fn key_value_heads_that_do_not_divide_heads_are_refused() {
    refused(&Place::new(), &["--kv-heads", "3"], &["kv-heads = 3", "must divide heads = 4"]);
}

#[test]
fn a_vocabulary_too_small_for_bytes_is_refused() {
    refused(&Place::new(), &["--vocab", "100"], &["vocab = 100", "at least 256"]);
}

#[test]
fn absurd_sizes_are_refused_and_do_not_overflow() {
    let place = Place::new();
    for (name, value) in
        [("--hidden", "0"), ("--layers", "0"), ("--ffn", "99999999999"), ("--hidden", "9223372036854775808")]
    {
        refused(&place, &[name, value, "--heads", "1"], &["must be between 1 and"]);
    }
    for (name, value) in
        [("--seq", "9223372036854775807"), ("--batch", "99999999999"), ("--accumulate", "1073741824")]
    {
        refused(&place, &[name, value], &["a step must have between 1 and"]);
    }
    refused(&place, &["--hidden", "16777216", "--ffn", "16777216", "--layers", "4096"], &["is too small"]);
    refused(&place, &["--seq", "100000000"], &["is too small"]);
}

/// `overspill train --model model`.
#[track_caller]
fn model_refused(place: &Place, says: &[&str]) {
    let before = place.names();
    place.run(&["train", "--model", "model", "--seq", "16", "--steps", "1"]).refused(says);
    assert_eq!(place.names(), before);
}

/// A folder as a run writes it.
fn with_model() -> Place {
    let place = Place::new();
    let ended = place.train(&["--out", "model"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    place
}

fn change_config(place: &Place, field: &str, value: Value) {
    let path = place.path("model/config.json");
    let mut config: Value = crate::command::read_json(&path);
    config[field] = value;
    fs::write(path, config.to_string()).unwrap();
}

/// Takes the header of the weights apart, and puts it together again changed.
fn change_header(file: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let mut text = header.to_string();
    while text.len() < length {
        text.push(' ');
    }
    let mut changed = (text.len() as u64).to_le_bytes().to_vec();
    changed.extend(text.as_bytes());
    changed.extend(&bytes[8 + length..]);
    fs::write(file, changed).unwrap();
}

const WEIGHTS: &str = "model/model.safetensors";
const NORM: &str = "model.norm.weight";

#[test]
fn a_model_folder_that_does_not_exist_is_refused() {
    model_refused(&Place::new(), &["model/config.json"]);
}

#[test]
fn a_malformed_config_is_refused() {
    let place = with_model();
    change_config(&place, "hidden_size", json!("wide"));
    model_refused(&place, &["model/config.json", "not a model configuration"]);
    fs::write(place.path("model/config.json"), "{").unwrap();
    model_refused(&place, &["model/config.json", "not a model configuration"]);
}

#[test]
fn a_model_of_another_kind_is_refused() {
    let place = with_model();
    change_config(&place, "model_type", json!("mamba"));
    model_refused(&place, &["model/config.json", "mamba", "not supported"]);
}

#[test]
fn a_missing_tensor_is_refused() {
    let place = with_model();
    change_header(&place.path(WEIGHTS), |header| {
        let norm = header.as_object_mut().unwrap().remove(NORM).unwrap();
        header["model.rotary_emb.inv_freq"] = norm;
    });
    model_refused(&place, &[NORM]);
}

#[test]
fn a_tensor_of_the_wrong_shape_is_refused() {
    let place = with_model();
    change_header(&place.path(WEIGHTS), |header| header[NORM]["shape"] = json!([4, 8]));
    model_refused(&place, &[NORM, "model.safetensors", "[4, 8]"]);
}

#[test]
fn a_tensor_of_the_wrong_dtype_is_refused() {
    let place = with_model();
    change_header(&place.path(WEIGHTS), |header| header[NORM]["dtype"] = json!("I32"));
    model_refused(&place, &[NORM, "model.safetensors", "I32"]);
}

#[test]
fn a_truncated_weight_file_is_refused() {
    let place = with_model();
    let file = fs::File::options().write(true).open(place.path(WEIGHTS)).unwrap();
    let length = file.metadata().unwrap().len();
    for cut in [length - 1, 100, 7, 0] {
        file.set_len(cut).unwrap();
        model_refused(&place, &["model.safetensors"]);
    }
}

#[test]
fn a_missing_tokenizer_is_refused() {
    let place = with_model();
    fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    model_refused(&place, &["model/tokenizer.json"]);
}

#[test]
fn a_tokenizer_with_more_ids_than_the_model_is_refused() {
    let place = with_model();
    change_config(&place, "vocab_size", json!(128));
    model_refused(&place, &["model"]);
}

#[test]
fn a_command_line_that_cannot_be_understood_is_explained() {
    let place = Place::new();
    for arguments in [
        ["train", "--memory", "12 parsecs"],
        ["train", "--steps", "0"],
        ["train", "--lr", "nan"],
        ["train", "--backend", "carrier-pigeon"],
        ["train", "--batch", "0"],
        ["train", "--endurance", "600TiB"],
    ] {
        let ended = place.run(&arguments);
        assert_eq!(ended.status, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains(arguments[2]), "{}", ended.stderr);
    }
}
