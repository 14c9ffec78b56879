//! The benches say what they measured, on files of a size that a test can afford.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::command::{Ended, Place, read_json};

/// Every cell, by the name it is chosen by and the name it is reported by.
const CELLS: [(&str, &str); 11] = [
    ("read", "read"),
    ("overwrite", "overwrite"),
    ("mixed", "mixed"),
    ("first-write", "first write"),
    ("read-16-files", "read, 16 files"),
    ("overwrite-16-files", "overwrite, 16 files"),
    ("mixed-16-files", "mixed, 16 files"),
    ("read-small-files", "read, 256 KiB files"),
    ("overwrite-small-files", "overwrite, 256 KiB files"),
    ("read-tiles", "read, random 256 KiB tiles"),
    ("overwrite-tiles", "overwrite, random 256 KiB tiles"),
];

/// Held by tests that run fio as root does: it reserves huge pages, of which the machine has one number.
static HUGE_PAGES: Mutex<()> = Mutex::new(());

fn huge_pages() -> MutexGuard<'static, ()> {
    HUGE_PAGES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn names(numbers: &Value) -> Vec<&str> {
    numbers["cells"].as_array().unwrap().iter().map(|cell| cell["name"].as_str().unwrap()).collect()
}

#[test]
fn bench_adam_compares_the_update_with_a_triad() {
    let place = Place::new();
    let ended = place.run(&["bench", "adam", "--parameters", "1000000", "--pairs", "2", "--json", "n.json"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("triad"), "{}", ended.stdout);
    let numbers = read_json(&place.path("n.json"));
    for name in ["gbps", "triad_gbps", "ratio_to_triad"] {
        assert!(numbers[name].as_f64().unwrap() > 0.0, "{name}");
    }
    assert_eq!(numbers["pairs"], 2);
    assert_eq!(names(&numbers), ["fp32", "bf16_with_remainder"]);
    for cell in numbers["cells"].as_array().unwrap() {
        for name in ["bytes_per_parameter", "gbps", "triad_gbps", "ratio_to_triad"] {
            assert!(cell[name].as_f64().unwrap() > 0.0, "{name}");
        }
    }
}

#[test]
fn bench_io_measures_every_cell_with_or_without_fio_and_leaves_nothing_behind() {
    let _alone = huge_pages();
    let place = Place::new();
    for path in [None, Some("")] {
        let mut command =
            place.command(&["bench", "io", "--size", "64MiB", "--pairs", "2", "--json", "n.json"]);
        if let Some(path) = path {
            command.env("PATH", path);
        }
        let ended = Ended::of(&command.output().unwrap());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let numbers = read_json(&place.path("n.json"));
        assert_eq!(names(&numbers), CELLS.map(|(_, name)| name));
        for cell in numbers["cells"].as_array().unwrap() {
            assert!(cell["ours_gbps"].as_f64().unwrap() > 0.0, "{cell}");
            assert_eq!(cell["fio_gbps"].is_null(), numbers["fio_version"].is_null(), "{cell}");
            assert_eq!(cell["ratio_to_fio"].is_null(), numbers["fio_version"].is_null(), "{cell}");
            for name in ["driver_user_cpu_percent_per_gbps", "driver_system_cpu_percent_per_gbps"] {
                assert!(cell[name].as_f64().unwrap() >= 0.0, "{cell}");
            }
            assert_eq!(cell["pairs"], 2);
        }
        if path.is_some() {
            assert!(numbers["fio_version"].is_null());
            assert!(ended.stderr.contains("apt-get install fio"), "{}", ended.stderr);
        }
        assert_eq!(place.names(), ["n.json"]);
    }
}

#[test]
fn bench_io_measures_the_chosen_cells_in_their_order_also_on_files_of_one_block() {
    let _alone = huge_pages();
    let place = Place::new();
    let chosen = CELLS.map(|(choice, _)| choice).into_iter().rev().collect::<Vec<_>>().join(",");
    let arguments = ["bench", "io", "--size", "1MiB", "--pairs", "1", "--cells", &chosen, "--json", "n.json"];
    let ended = place.run(&arguments);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let numbers = read_json(&place.path("n.json"));
    assert_eq!(names(&numbers), CELLS.map(|(_, name)| name).into_iter().rev().collect::<Vec<_>>());
    assert_eq!(place.names(), ["n.json"]);
}

#[test]
fn an_interrupted_bench_leaves_nothing_behind() {
    let _alone = huge_pages();
    let place = Place::new();
    for cell in ["mixed", "first-write", "read-small-files"] {
        let mut command =
            place.command(&["bench", "io", "--size", "128MiB", "--pairs", "100000", "--cells", cell]);
        let child = place.until_there_is("overspill-bench-", &mut command);
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
        let ended = Ended::of(&child.wait_with_output().unwrap());
        assert_eq!(ended.status, Some(130), "{}", ended.stderr);
        assert_eq!(ended.stderr.matches("overspill: ").count(), 1, "{}", ended.stderr);
        assert!(place.names().is_empty(), "{:?}", place.names());
    }
}

#[test]
fn bench_store_says_what_promises_cost_and_leaves_nothing_behind() {
    let place = Place::new();
    let ended = place.run(&["bench", "store", "--size", "32MiB", "--pairs", "2", "--json", "n.json"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    for name in ["checksum", "load", "snapshot", "commit of 10 000 tensors"] {
        assert!(ended.stdout.contains(name), "{}", ended.stdout);
    }
    let numbers = read_json(&place.path("n.json"));
    let positive = |numbers: &Value, names: &[&str]| {
        for name in names {
            assert!(numbers[name].as_f64().is_some_and(|number| number > 0.0), "{name} of {numbers}");
        }
    };
    let checksums = numbers["checksums"].as_array().unwrap();
    let places: Vec<_> = checksums.iter().map(|found| found["memory"].as_str().unwrap()).collect();
    assert_eq!(places, ["warm", "warm", "cold", "cold"]);
    for found in checksums {
        positive(found, &["threads", "checksum_gbps", "sum_gbps", "ratio_to_sum", "checksum_ms_per_gb"]);
    }
    for side in ["load", "store"] {
        positive(&numbers[side], &["store_gbps", "engine_gbps", "checksum_share"]);
        assert!(numbers[side]["store_share"].as_f64().is_some_and(|share| share < 1.0), "{numbers}");
    }
    positive(&numbers["snapshot"], &["snapshot_seconds", "copy_seconds", "ratio_to_copy"]);
    let commits = numbers["commits"].as_array().unwrap();
    let counts: Vec<_> = commits.iter().map(|commit| commit["tensors"].as_u64().unwrap()).collect();
    assert_eq!(counts, [100, 1_000, 10_000]);
    commits.iter().for_each(|commit| positive(commit, &["seconds", "manifest_bytes"]));
    assert_eq!((&numbers["pairs"], &numbers["state_bytes"]), (&2.into(), &(32 << 20).into()));
    assert_eq!(place.names(), ["n.json"]);
}

#[test]
fn an_interrupted_bench_of_the_store_leaves_nothing_behind() {
    let place = Place::new();
    let mut command = place.command(&["bench", "store", "--size", "32MiB", "--pairs", "100000"]);
    let child = place.until_there_is("overspill-bench-", &mut command);
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    let ended = Ended::of(&child.wait_with_output().unwrap());
    assert_eq!(ended.status, Some(130), "{}", ended.stderr);
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn bench_store_refuses_what_it_cannot_measure() {
    let place = Place::new();
    place.run(&["bench", "store", "--dir", "nowhere"]).refused(&["nowhere"]);
    place.run(&["bench", "store", "--size", "1MiB"]).refused(&["--size", "less than one tensor"]);
    assert!(place.names().is_empty());
}

#[test]
fn bench_io_refuses_what_it_cannot_measure() {
    let place = Place::new();
    place.run(&["bench", "io", "--dir", "nowhere"]).refused(&["nowhere"]);
    place.run(&["bench", "io", "--size", "1000KiB"]).refused(&["--size", "less than one block"]);
    let ended = place.run(&["bench", "io", "--cells", "read,wrong"]);
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("wrong") && ended.stderr.contains("read-16-files"), "{}", ended.stderr);
}

#[test]
fn bench_turns_answers_line_by_line_and_finds_what_another_program_changed() {
    let place = Place::new();
    let mut command = place.command(&["bench", "turns", "--size", "4MiB", "--files", "2"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let (mut requests, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut answers =
        BufReader::new(answers).lines().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let paths = answers.next().unwrap()["paths"].as_array().unwrap().clone();
    assert_eq!(paths.len(), 2);
    for request in ["read", "write", "read", "check"] {
        writeln!(requests, "{request}").unwrap();
        assert_eq!(answers.next().unwrap()["gbps"].is_null(), request == "check");
    }
    let changed = place.path(paths[1].as_str().unwrap());
    std::fs::write(&changed, vec![7; 2 << 20]).unwrap();
    writeln!(requests, "read").unwrap();
    assert!(answers.next().is_none());
    Ended::of(&child.wait_with_output().unwrap()).refused(&[".1 is not what was written"]);
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn bench_step_moves_twenty_bytes_and_leaves_nothing_behind() {
    let _alone = huge_pages();
    let place = Place::new();
    // Two tiles of ten bytes for each of 16 parameters, whose ends are padded to disk blocks.
    let arguments =
        ["bench", "step", "--parameters", "6500000", "--tile", "2MiB", "--pairs", "2", "--json", "n.json"];
    let ended = place.run(&[&arguments[..], &["--durability", "step"]].concat());
    if ended.status != Some(0) {
        assert!(ended.stderr.contains("apt-get install fio"), "{}", ended.stderr);
        assert!(place.names().is_empty(), "{:?}", place.names());
        return;
    }
    let numbers = read_json(&place.path("n.json"));
    let number = |name: &str| numbers[name].as_f64().unwrap();
    for name in ["step_seconds", "bound_seconds", "step_over_bound"] {
        assert!(number(name) > 0.0, "{name}");
    }
    let promises = numbers["by_durability"].as_array().unwrap();
    let named: Vec<_> = promises.iter().map(|promise| promise["durability"].as_str().unwrap()).collect();
    assert_eq!(named, ["none", "step"]);
    assert!(promises.iter().all(|promise| promise["step_seconds"].as_f64().unwrap() > 0.0));
    assert_eq!(promises[0]["step_seconds"], numbers["step_seconds"]);
    assert!(ended.stdout.contains("step, --durability step"), "{}", ended.stdout);
    assert_eq!(number("resident_bytes"), 0.0);
    assert!((number("bytes_per_parameter_step") / 20.0 - 1.0).abs() < 0.01, "{numbers}");
    assert_eq!(place.names(), ["n.json"]);
}

#[test]
fn what_a_step_moves_is_what_does_not_stay_in_memory() {
    let _alone = huge_pages();
    let place = Place::new();
    // 64 tiles, so that every share is near to what is asked for.
    let run = |more: &[&str]| {
        let arguments = [
            "bench",
            "step",
            "--parameters",
            "6500000",
            "--tile",
            "1MiB",
            "--pairs",
            "2",
            "--json",
            "n.json",
        ];
        let ended = place.run(&[&arguments, more].concat());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        (ended.stdout, read_json(&place.path("n.json")))
    };
    let (table, numbers) = run(&["--resident", "0,25,50,75,100"]);
    let shares = numbers["shares"].as_array().unwrap();
    let number = |share: &Value, name: &str| share[name].as_f64().unwrap();
    let asked = [0.0, 0.25, 0.5, 0.75, 1.0];
    assert_eq!(shares.len(), asked.len());
    let all = number(&shares[0], "bytes_per_parameter_step");
    assert!((all / 20.0 - 1.0).abs() < 0.02, "{numbers}");
    for (share, asked) in shares.iter().zip(asked) {
        let fraction = number(share, "resident_fraction");
        // Not more, and not less by two tiles.
        assert!((-0.03..=0.0).contains(&(fraction - asked)), "{fraction} of {asked}");
        let moved = number(share, "bytes_per_parameter_step");
        assert!((moved - all * (1.0 - fraction)).abs() <= 0.02 * all * (1.0 - fraction), "{share}");
        assert!(number(share, "step_seconds_median") > 0.0);
    }
    assert_eq!(number(&shares[4], "bytes_per_parameter_step"), 0.0);
    assert!(table.contains("100.0 %") && table.contains("--durability none"), "{table}");

    // What is committed is written, wherever it stays.
    let (_, numbers) = run(&["--resident", "100", "--durability", "step"]);
    let moved = number(&numbers["shares"][0], "bytes_per_parameter_step");
    assert!((moved / 10.0 - 1.0).abs() < 0.02, "{numbers}");
    assert_eq!(place.names(), ["n.json"]);
    assert_eq!(place.run(&["bench", "step", "--resident", "101"]).status, Some(2));
}
