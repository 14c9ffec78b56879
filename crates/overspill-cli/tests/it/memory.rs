//! The budget is kept, however large the model.

use serde_json::Value;

use crate::command::{Place, read_json};

/// Trains with a budget and returns the numbers.
fn run(place: &Place, layers: &str, memory: &str, steps: &str) -> Value {
    run_with(place, layers, memory, steps, &[])
}

fn run_with(place: &Place, layers: &str, memory: &str, steps: &str, more: &[&str]) -> Value {
    let arguments = [
        "train", "--layers", layers, "--hidden", "256", "--heads", "4", "--ffn", "768", "--batch", "2",
        "--seq", "64", "--steps", steps, "--memory", memory, "--json", "n.json", "--quiet",
    ];
    let ended = place.run(&[&arguments, more].concat());
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    read_json(&place.path("n.json"))
}

#[test]
fn peak_memory_stays_within_the_budget_while_the_model_grows_four_fold() {
    let place = Place::new();
    let narrow = ["--weights", "bf16", "--moments", "8bit"];
    for (layers, recipe) in [("8", &[][..]), ("32", &[]), ("8", &narrow), ("32", &narrow)] {
        let numbers = run_with(&place, layers, "48MiB", "3", recipe);
        let number = |name: &str| numbers[name].as_u64().unwrap();
        // What the process takes before it does anything, as `overspill --help` does.
        let allowed = number("memory_budget_bytes") + number("baseline_rss_bytes");
        assert!(number("baseline_rss_bytes") < 16 << 20, "{numbers}");
        assert!(number("peak_rss_bytes") <= allowed, "{layers} layers {recipe:?}: {numbers}");
        assert!(number("memory_planned_bytes") <= number("memory_budget_bytes"));
        if layers == "32" {
            let times = if recipe.is_empty() { 8 } else { 5 };
            assert!(number("state_bytes") > times * number("memory_budget_bytes"), "{numbers}");
        }
    }
}

#[test]
fn peak_memory_does_not_grow_with_the_number_of_steps() {
    let place = Place::new();
    let numbers = run(&place, "4", "48MiB", "200");
    let number = |name: &str| numbers[name].as_u64().unwrap();
    assert!(
        number("peak_rss_bytes") <= number("memory_budget_bytes") + number("baseline_rss_bytes"),
        "{numbers}"
    );
}

#[test]
fn more_engines_are_planned_for() {
    let place = Place::new();
    let profile = r#"{"version": 1, "chunk_bytes": 1048576, "queue_depth": 1024, "rings": 3,
        "read_gbps": 1, "write_gbps": 1}"#;
    for disk in ["one", "two"] {
        std::fs::create_dir(place.path(disk)).unwrap();
        place.file(&format!("{disk}/overspill-tune.json"), profile);
    }
    let planned = |numbers: &Value| {
        numbers["memory_planned_bytes"].as_u64().unwrap() - numbers["resident_bytes"].as_u64().unwrap()
    };
    for backend in ["io_uring", "threads"] {
        let one = run(&place, "4", "64MiB", "3");
        let more = ["--swap-dir", "one,two", "--backend", backend];
        let six = run_with(&place, "4", "64MiB", "3", &more);
        assert!(planned(&six) > planned(&one) + (2 << 20), "{six}");
        let number = |name: &str| six[name].as_u64().unwrap();
        let allowed = number("memory_budget_bytes") + number("baseline_rss_bytes");
        assert!(number("peak_rss_bytes") <= allowed, "{backend}: {six}");
    }
}
