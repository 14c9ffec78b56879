//! Optimizers that need whole parameters, and weights whose loss is scaled, from the command line.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command::{Ended, Place, SMALL, read_json};

/// What this file is about: each learns, is resumed, and has one result wherever its state lives.
const RECIPES: [&[&str]; 5] = [
    &["--optimizer", "adafactor"],
    &["--optimizer", "muon"],
    &["--optimizer", "muon", "--weights", "bf16-stochastic", "--momentum", "0.9"],
    &["--weights", "fp16", "--moments", "8bit"],
    // So large that it overflows, and grows again.
    &[
        "--optimizer",
        "adafactor",
        "--weights",
        "fp16",
        "--loss-scale-init",
        "3e38",
        "--loss-scale-growth",
        "2",
    ],
];

#[test]
fn the_same_seed_gives_the_same_losses_in_memory_and_on_storage_by_whole_parameters_and_scaled_losses() {
    let place = Place::new();
    for recipe in RECIPES {
        let losses = |more: &[&str]| {
            let numbers = place.trained(&[&["--seed", "5"], recipe, more].concat());
            (numbers["losses"].clone(), numbers["steps_skipped"].clone(), numbers["loss_scale"].clone())
        };
        let reference = losses(&["--in-memory"]);
        for more in [
            &["--depth", "0"][..],
            &["--depth", "2"],
            &["--depth", "2", "--resident", "100KiB"],
            &["--depth", "0", "--resident", "1GiB"],
        ] {
            assert_eq!(losses(more), reference, "{recipe:?} {more:?}");
        }
    }
}

#[test]
fn a_pattern_is_learned_by_whole_parameters_and_scaled_losses() {
    let place = Place::new();
    place.file("a.txt", "abcabcabc".repeat(50));
    for recipe in RECIPES {
        let more = ["--data", "a.txt", "--steps", "40", "--in-memory", "--warmup", "4"];
        let numbers = place.trained(&[recipe, &more].concat());
        let loss = |name: &str| numbers[name].as_f64().unwrap();
        assert!(loss("loss_last") < 0.7 * loss("loss_first"), "{recipe:?}: {numbers}");
    }
}

#[test]
fn steps_that_overflow_are_counted_in_the_table_and_in_the_numbers() {
    let place = Place::new();
    let numbers = place.trained(&["--weights", "fp16", "--loss-scale-init", "3e38"]);
    let skipped = numbers["steps_skipped"].as_u64().unwrap();
    assert!(skipped > 0, "{numbers}");
    let scale = f64::from(3e38_f32) / 2.0_f64.powi(skipped as i32);
    assert_eq!((&numbers["loss_scale"], &numbers["steps"]), (&scale.into(), &3.into()));
    let ended = place.train(&["--weights", "fp16", "--loss-scale-growth", "2"]);
    assert!(ended.stdout.contains("131072 at the end, 0 of 3 steps skipped"), "{}", ended.stdout);
    let numbers = place.trained(&["--weights", "bf16"]);
    assert_eq!((&numbers["loss_scale"], &numbers["steps_skipped"]), (&Value::Null, &0.into()));
}

#[test]
fn a_killed_run_of_whole_parameters_or_of_scaled_losses_is_resumed_with_the_losses_of_one_that_was_not() {
    for recipe in [RECIPES[0], RECIPES[1], RECIPES[4]] {
        let place = Place::new();
        fs::create_dir(place.path("swap")).unwrap();
        let steps = ["--steps", "16", "--seed", "3", "--json", "numbers.json", "--quiet"];
        let arguments = [&["train"], &SMALL[..12], &steps, recipe].concat();
        let run = |more: &[&str]| place.command(&[arguments.as_slice(), more].concat());
        let reference = Ended::of(&run(&[]).output().unwrap());
        assert_eq!(reference.status, Some(0), "{}", reference.stderr);
        let reference = read_json(&place.path("numbers.json"));

        let resume = ["--swap-dir", "swap", "--keep", "--resume"];
        let mut child = run(&resume[..3]).spawn().unwrap();
        let began = Instant::now();
        // The first commit is that of step 0.
        while !place.path("swap/overspill-store/manifest.previous").exists() {
            assert!(began.elapsed() < Duration::from_secs(60), "no step is committed");
            std::thread::yield_now();
        }
        for after_ms in [5, 40, 20] {
            std::thread::park_timeout(Duration::from_millis(after_ms));
            child.kill().unwrap();
            child.wait().unwrap();
            child = run(&resume).spawn().unwrap();
        }
        let ended = Ended::of(&child.wait_with_output().unwrap());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let resumed = read_json(&place.path("numbers.json"));
        let first = resumed["first_step"].as_u64().unwrap() as usize;
        assert!(first > 1, "something was committed");
        let losses = resumed["losses"].as_array().unwrap();
        let expected = &reference["losses"].as_array().unwrap()[first - 1..];
        assert_eq!(losses.as_slice(), expected, "{recipe:?}, from step {first} on");
        assert_eq!(resumed["loss_scale"], reference["loss_scale"], "{recipe:?}");
    }
}

#[test]
fn a_kept_state_of_whole_parameters_or_of_scaled_losses_is_gone_on_with_by_its_own_recipe_only() {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let recipe = ["--optimizer", "muon", "--weights", "fp16"];
    let run = |more: &[&str]| place.train(&[&["--swap-dir", "swap"], &recipe[..], more].concat());
    assert_eq!(run(&["--keep"]).status, Some(0));
    for (more, says) in [
        (&["--optimizer", "adamw"][..], "--optimizer was muon, and is adamw now"),
        (&["--weights", "f32"], "--weights was fp16, and is f32 now"),
        (&["--momentum", "0.5"], "Muon was MuonConfig { momentum: 0.95"),
        (&["--loss-scale-growth", "3"], "the loss scale (--loss-scale-init, --loss-scale-growth) was"),
    ] {
        run(&[&["--resume"], more].concat()).refused(&["the state of another run", says]);
    }
    let ended = run(&["--resume"]);
    assert!(ended.stdout.contains("nothing left to do"), "{}", ended.stdout);
}

#[test]
fn what_a_recipe_has_no_use_for_is_refused_in_one_line() {
    let place = Place::new();
    for (arguments, says) in [
        (
            &["--optimizer", "muon", "--moments", "8bit"][..],
            "--moments 8bit is not for --optimizer muon, which keeps them in f32",
        ),
        (
            &["--optimizer", "adafactor", "--moments", "bf16"],
            "--moments bf16 is not for --optimizer adafactor",
        ),
        (
            &["--optimizer", "adafactor", "--momentum", "0.5"],
            "--momentum is for --optimizer sgd and muon only",
        ),
        (
            &["--optimizer", "sgd", "--beta1", "0.9"],
            "--beta1 is for --optimizer adamw, adam, lion and muon only",
        ),
        (&["--optimizer", "adagrad", "--beta2", "0.9"], "--beta2 is for --optimizer adamw"),
        (&["--optimizer", "adafactor", "--beta2", "0.9"], "--beta2 is for --optimizer adamw"),
        (
            &["--optimizer", "sgd", "--moments", "8bit"],
            "--moments is not for --optimizer sgd without --momentum, which has none",
        ),
        (
            &["--optimizer", "sgd", "--momentum", "0", "--moments", "bf16"],
            "--moments is not for --optimizer sgd without --momentum",
        ),
        (&["--loss-scale-init", "8"], "--loss-scale-init is for --weights fp16 only"),
        (
            &["--weights", "bf16", "--loss-scale-growth", "8"],
            "--loss-scale-growth is for --weights fp16 only",
        ),
    ] {
        place.train(arguments).refused(&[says]);
    }
    for scale in ["0", "-1", "inf", "nan", "1e39", "1e-40"] {
        let ended = place.train(&["--weights", "fp16", &format!("--loss-scale-init={scale}")]);
        assert_eq!(ended.status, Some(2), "{scale}: {}", ended.stderr);
        assert!(ended.stderr.contains("must be a number from 1.1754944e-38 to 3.4028235e38"), "{scale}");
    }
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn whole_parameters_are_in_the_budget_and_the_least_that_would_do_does() {
    let place = Place::new();
    for optimizer in ["adafactor", "muon"] {
        // What the update of one matrix takes is more than the process is given without it.
        let shape = ["--layers", "1", "--hidden", "256", "--heads", "4", "--ffn", "8192", "--vocab", "32768"];
        let run = |memory: &str| {
            let run = ["--batch", "1", "--seq", "16", "--steps", "2", "--json", "n.json", "--memory", memory];
            place.run(&[&["train", "--optimizer", optimizer], &shape[..], &run].concat())
        };
        let refused = run("1MiB");
        refused.refused(&["--memory 1 MiB is too small: the least that would do is "]);
        let least = refused.stderr.split("would do is ").nth(1).unwrap().split("MiB").next().unwrap();
        let least: u64 = least.parse().unwrap();
        run(&format!("{}MiB", least - 1)).refused(&["is too small", &format!("{least}MiB")]);
        let ended = run(&format!("{least}MiB"));
        assert_eq!(ended.status, Some(0), "{optimizer}: {}", ended.stderr);
        let numbers = read_json(&place.path("n.json"));
        let number = |name: &str| numbers[name].as_u64().unwrap();
        let allowed = number("memory_budget_bytes") + number("baseline_rss_bytes");
        assert!(number("peak_rss_bytes") <= allowed, "{optimizer}: {numbers}");
        assert_eq!(numbers["bytes_written_per_step"], numbers["bytes_written_per_step_planned"]);
    }
}
