//! The benches say what they measured, on files of a size that a test can afford.

use crate::command::{Place, read_json};

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
}

#[test]
fn bench_io_measures_the_engine_with_or_without_fio_and_leaves_nothing_behind() {
    let place = Place::new();
    for path in [None, Some("")] {
        let mut command =
            place.command(&["bench", "io", "--size", "64MiB", "--pairs", "2", "--json", "n.json"]);
        if let Some(path) = path {
            command.env("PATH", path);
        }
        let ended = crate::command::Ended::of(&command.output().unwrap());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let numbers = read_json(&place.path("n.json"));
        let names: Vec<_> = numbers["cells"].as_array().unwrap().iter().map(|cell| &cell["name"]).collect();
        assert_eq!(names, ["read", "overwrite"]);
        for cell in numbers["cells"].as_array().unwrap() {
            assert!(cell["ours_gbps"].as_f64().unwrap() > 0.0, "{cell}");
            assert_eq!(cell["fio_gbps"].is_null(), numbers["fio_version"].is_null(), "{cell}");
        }
        if path.is_some() {
            assert!(numbers["fio_version"].is_null());
            assert!(ended.stderr.contains("apt-get install fio"), "{}", ended.stderr);
        }
        assert_eq!(place.names(), ["n.json"]);
    }
}

#[test]
fn bench_io_refuses_a_folder_that_is_none() {
    let place = Place::new();
    place.run(&["bench", "io", "--dir", "nowhere"]).refused(&["nowhere"]);
}
