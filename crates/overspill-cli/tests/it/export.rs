//! `overspill export`: what comes out is what was committed, and nothing comes out of what is damaged.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use overspill_io::{BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{Durability, Store};
use overspill_train::checkpoint::Checkpoint;
use overspill_train::layout::ModelLayout;
use serde_json::Value;

use crate::command::{Ended, Place, read_json};

/// A folder with a kept run in `swap`, and what it has written as `model`.
fn kept() -> Place {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let ended = place.train(&["--swap-dir", "swap", "--keep", "--out", "model"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("is kept in swap/overspill-store"), "{}", ended.stderr);
    place
}

fn exported(place: &Place, arguments: &[&str]) -> Value {
    let ended = place.run(&[&["export"], arguments, &["--json", "numbers.json"]].concat());
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    read_json(&place.path("numbers.json"))
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
fn exported_weights_are_those_that_train_writes_whole_or_rounded_to_the_nearest() {
    let place = kept();
    let numbers = exported(&place, &["swap", "whole", "--dtype", "fp32"]);
    assert_eq!((&numbers["step"], &numbers["dtype"]), (&Value::from(3), &Value::from("float32")));
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        let [ours, theirs] =
            ["whole", "model"].map(|folder| fs::read(place.path(folder).join(name)).unwrap());
        assert!(ours == theirs, "{name}");
    }
    // The store itself may be named, too.
    exported(&place, &["swap/overspill-store", "half"]);
    assert_eq!(read_json(&place.path("half/config.json"))["torch_dtype"], "bfloat16");
    let rounded = weights(&place.path("model")).into_iter().map(|bits| {
        let to_even = 0x7fff + (bits >> 16 & 1);
        (bits + to_even) & 0xffff_0000
    });
    assert!(weights(&place.path("half")).into_iter().eq(rounded));
    let length = |folder: &str| fs::metadata(place.path(folder).join("model.safetensors")).unwrap().len();
    assert!(length("half") < length("whole"));
}

#[test]
fn a_store_in_use_is_refused_and_its_snapshot_is_exported_while_the_owner_writes_on() {
    let place = kept();
    let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 1 << 20, count: 2 }]).unwrap();
    let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
    let store = Store::open(&place.path("swap/overspill-store"), Durability::Step, &engine).unwrap();
    place.run(&["export", "swap", "out"]).refused(&["in use by process", "overspill snapshot", "--snapshot"]);
    place.run(&["export", "swap", "out", "--snapshot", "s"]).refused(&["no snapshot s; it has none"]);
    store.snapshot("s").unwrap();

    let manifest = Store::committed(store.path()).unwrap();
    let record = manifest.tensors.iter().find(|tensor| tensor.name == "weights/layer 0/0").unwrap();
    let bytes = usize::try_from(record.length).unwrap();
    let mut child =
        place.command(&["export", "swap", "out", "--snapshot", "s", "--dtype", "fp32"]).spawn().unwrap();
    let mut tensor = store.adopt(&record.name, bytes).unwrap();
    let mut commits = 0;
    while child.try_wait().unwrap().is_none() || commits < 5 {
        let mut block = pool.lease(bytes).unwrap();
        drop(block.split_off(bytes));
        block.fill(commits);
        tensor = tensor.overwrite(block).unwrap().store().wait().unwrap();
        store.commit(store.meta()).unwrap();
        commits = commits.wrapping_add(1);
    }
    let ended = Ended::of(&child.wait_with_output().unwrap());
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(weights(&place.path("out")) == weights(&place.path("model")));
    drop((tensor, store));
    exported(&place, &["swap", "now", "--dtype", "fp32"]);
    assert!(weights(&place.path("now")) != weights(&place.path("model")), "the owner did write on");
}

#[test]
fn damage_is_named_and_nothing_is_left() {
    let place = kept();
    let manifest = Store::committed(&place.path("swap/overspill-store")).unwrap();
    let record = manifest.tensors.iter().find(|tensor| tensor.name == "moments/head/0").unwrap();
    let data =
        fs::File::options().read(true).write(true).open(place.path("swap/overspill-store/data")).unwrap();
    let mut byte = [0];
    data.read_exact_at(&mut byte, record.offset + 99).unwrap();
    data.write_all_at(&[byte[0] ^ 1], record.offset + 99).unwrap();
    place
        .run(&["export", "swap", "state", "--form", "state"])
        .refused(&["tensor moments/head/0", "overspill-store/data are damaged"]);
    exported(&place, &["swap", "weights"]);
    data.set_len(4096).unwrap();
    place.run(&["export", "swap", "again"]).refused(&["cut short"]);
    fs::remove_file(place.path("swap/overspill-store/manifest")).unwrap();
    place.run(&["export", "swap", "again"]).refused(&["overspill-store/manifest is gone", "--previous"]);
    place.run(&["export", "nowhere", "again"]).refused(&["nowhere"]);
    place.run(&["export", "swap", "model"]).refused(&["model: exists and is not an empty folder"]);
    let bf16 = ["export", "swap", "x", "--form", "state", "--dtype", "bf16"];
    place.run(&bf16).refused(&["--dtype is for weights: a state goes as it is stored"]);
    assert_eq!(place.names(), ["model", "numbers.json", "swap", "weights"]);
}

#[test]
fn a_state_over_several_volumes_is_found_by_its_first_one() {
    let place = Place::new();
    for disk in ["one", "two"] {
        fs::create_dir(place.path(disk)).unwrap();
        let profile = r#"{"version": 1, "chunk_bytes": 65536, "queue_depth": 8, "rings": 2,
            "read_gbps": 1, "write_gbps": 1}"#;
        place.file(&format!("{disk}/overspill-tune.json"), profile);
    }
    place.trained(&["--swap-dir", "one,two", "--keep", "--out", "model"]);
    for (dir, out) in [("one", "a"), ("one,two", "b"), ("one/overspill-store,two/overspill-store", "c")] {
        exported(&place, &[dir, out, "--dtype", "fp32"]);
        assert!(weights(&place.path(out)) == weights(&place.path("model")), "{dir}");
    }
    place.run(&["export", "two,one", "d"]).refused(&["is the directory number 2 of its store"]);
    fs::rename(place.path("two"), place.path("three")).unwrap();
    place.run(&["export", "one", "d"]).refused(&["give all directories"]);
    exported(&place, &["one,three", "d", "--dtype", "fp32"]);
}

#[test]
fn memory_does_not_grow_with_the_model() {
    // As many bytes of an element in both, and of the second one none goes out as it is stored, but for moments.
    for recipe in [&[][..], &["--weights", "bf16"]] {
        let place = Place::new();
        fs::create_dir(place.path("swap")).unwrap();
        let shape = ["train", "--layers", "32", "--hidden", "256", "--heads", "4", "--ffn", "768"];
        let run = ["--batch", "1", "--seq", "16", "--steps", "1", "--swap-dir", "swap", "--keep", "--quiet"];
        let ended = place.run(&[&shape[..], &run, recipe].concat());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        for out in [&["state", "--form", "state"][..], &["weights", "--dtype", "fp32"]] {
            let numbers = exported(&place, &[&["swap"], out].concat());
            let number = |name: &str| numbers[name].as_u64().unwrap();
            assert!(number("bytes_read") > 80 << 20, "{numbers}");
            assert!(number("peak_rss_bytes") < 80 << 20, "{numbers}");
        }
        fs::create_dir(place.path("other")).unwrap();
        let ended = place.run(&["import", "state", "--swap-dir", "other", "--json", "numbers.json"]);
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let numbers = read_json(&place.path("numbers.json"));
        assert!(numbers["bytes_written"].as_u64().unwrap() > 250 << 20, "{numbers}");
        assert!(numbers["peak_rss_bytes"].as_u64().unwrap() < 80 << 20, "{numbers}");
    }
}
