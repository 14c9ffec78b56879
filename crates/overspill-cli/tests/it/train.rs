//! `overspill train` when all is well, and when it is told to stop.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command::{Ended, Place, SMALL, read_json};

/// The names that other programs rely on.
const NAMES: [&str; 23] = [
    "optimizer",
    "weights",
    "moments",
    "parameters",
    "state_bytes",
    "memory_budget_bytes",
    "peak_rss_bytes",
    "baseline_rss_bytes",
    "bytes_read",
    "bytes_written",
    "bytes_per_parameter_step",
    "io_read_gbps",
    "io_write_gbps",
    "io_hidden_fraction",
    "steps",
    "tokens_per_second",
    "step_seconds_median",
    "loss_first",
    "loss_last",
    "losses",
    "backend",
    "degraded_reason",
    "volumes",
];

#[test]
fn the_numbers_of_a_run_have_stable_names_and_make_sense() {
    let place = Place::new();
    let numbers = place.trained(&[]);
    for name in NAMES {
        assert!(numbers.get(name).is_some(), "{name}");
    }
    // Embedding, head, two layers, the last norm.
    let layer = 2 * 32 + 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48;
    let parameters = 2 * 256 * 32 + 32 + 2 * layer;
    assert_eq!(numbers["parameters"], parameters);
    assert_eq!(numbers["steps"], 3);
    assert_eq!(numbers["losses"].as_array().unwrap().len(), 3);
    let number = |name: &str| numbers[name].as_f64().unwrap();
    let moved = number("bytes_read") + number("bytes_written");
    assert_eq!(number("bytes_per_parameter_step"), moved / (parameters * 3) as f64);
    // Weights three times in and once out, gradients and both moments in and out; padding and inputs come on top.
    assert!((40.0..60.0).contains(&number("bytes_per_parameter_step")), "{numbers}");
    assert!((0.0..=1.0).contains(&number("io_hidden_fraction")));
    assert!(number("peak_rss_bytes") > number("baseline_rss_bytes"));
}

#[test]
fn what_a_run_will_write_is_said_before_and_measured_after() {
    for (more, layers) in [(&[][..], 2), (&["--tied"], 2), (&["--accumulate", "3", "--layers", "3"], 3)] {
        let place = Place::new();
        let ended = place.train(&[more, &["--json", "n.json"]].concat());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let numbers = read_json(&place.path("n.json"));
        let number = |name: &str| numbers[name].as_u64().unwrap();
        assert_eq!(
            number("bytes_written_per_step"),
            number("bytes_written_per_step_planned"),
            "{layers}: {more:?}"
        );
        assert_eq!(number("bytes_written"), 3 * number("bytes_written_per_step"));
        let run = number("bytes_written_initially") + number("bytes_written");
        assert_eq!(number("bytes_written_lifetime"), run);
        let megabytes = format!("will write about {:.1} MB in 3 steps", run as f64 / 1e6);
        assert!(ended.stderr.contains(&megabytes), "{megabytes}: {}", ended.stderr);
        for name in ["endurance_bytes", "endurance_directory", "life_used_fraction", "days_to_wear_out"] {
            assert!(numbers[name].is_null(), "{name}");
        }
    }
}

#[test]
fn the_space_that_a_durability_takes_is_said_before_the_run() {
    let place = Place::new();
    let taken = |durability: &str| {
        let ended = place.train(&["--durability", durability]);
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let (taken, rest) =
            ended.stderr.split("taking ").nth(1).unwrap().split_once(" of storage (").unwrap();
        let other = rest.split_once(" would take ").unwrap().1.split(')').next().unwrap();
        (taken.to_owned(), other.to_owned())
    };
    let (step, none) = (taken("step"), taken("none"));
    // Weights and both moments twice; the gradient and two inputs once.
    let bytes = |size: &str| size.parse::<overspill_train::ByteSize>().unwrap().0 as f64;
    let ratio = bytes(&step.0) / bytes(&none.0);
    assert!((1.6..1.8).contains(&ratio), "{ratio}");
    assert_eq!(step, (none.1, none.0), "each says what the other would take");
}

#[test]
fn wear_is_told_in_numbers_and_a_drive_that_does_not_last_is_warned_of() {
    let place = Place::new();
    let ended = place.train(&["--endurance", "1GBW", "--steps", "8", "--json", "n.json"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let warnings =
        ended.stderr.lines().filter(|line| line.contains("the drive, rated for 1GBW, is worn out in "));
    assert_eq!(warnings.count(), 2, "once when the rate is known, and at the end: {}", ended.stderr);
    assert!(ended.stdout.contains("of 1GBW used"), "{}", ended.stdout);
    let numbers = read_json(&place.path("n.json"));
    let number = |name: &str| numbers[name].as_f64().unwrap();
    assert_eq!(numbers["endurance_bytes"], 1_000_000_000);
    let run = number("bytes_written_initially") + number("bytes_written");
    assert!((number("life_used_fraction") / (run / 1e9) - 1.0).abs() < 1e-9, "{numbers}");
    assert!(number("days_to_wear_out") > 0.0 && number("days_to_wear_out") < 1.0, "{numbers}");
    // As good as for ever: a rating that no test writes in a month.
    let ended = place.train(&["--endurance", "18000PBW"]);
    assert!(!ended.stderr.contains("worn out"), "{}", ended.stderr);
}

#[test]
fn what_earlier_runs_of_a_state_wrote_is_counted() {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let kept = ["--swap-dir", "swap", "--keep", "--endurance", "600TBW"];
    let first = place.trained(&kept);
    let written = |numbers: &Value, name: &str| numbers[name].as_u64().unwrap();
    let resumed = place.trained(&[&kept[..], &["--resume"]].concat());
    assert_eq!(written(&resumed, "bytes_written"), 0);
    assert_eq!(written(&resumed, "bytes_written_lifetime"), written(&first, "bytes_written_lifetime"));
    assert_eq!((&resumed["life_used_fraction"], &resumed["days_to_wear_out"]), (&0.0.into(), &Value::Null));
}

#[test]
fn of_several_disks_the_one_that_takes_the_most_is_worn_out_first() {
    let place = two_disks();
    // Two directories of one file system, which are one disk.
    for (disk, gbps) in [("one", 1.0), ("two", 3.0)] {
        place.file(&format!("{disk}/overspill-tune.json"), profile(1, gbps));
    }
    let numbers = place.trained(&["--swap-dir", "one,two", "--endurance", "600TBW"]);
    let run = numbers["bytes_written_lifetime"].as_f64().unwrap();
    let used = numbers["life_used_fraction"].as_f64().unwrap();
    assert!((used * 600e12 / run - 1.0).abs() < 1e-9, "{numbers}");
    assert!(numbers["endurance_directory"].is_null());
}

#[test]
fn a_run_leaves_nothing_behind() {
    let place = Place::new();
    let ended = place.train(&[]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("parameters") && ended.stdout.contains("loss"), "{}", ended.stdout);
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn the_same_seed_gives_the_same_losses_in_memory_and_on_storage_with_any_backend() {
    let place = Place::new();
    let reference = &place.trained(&["--in-memory", "--seed", "5"])["losses"];
    for arguments in
        [["--backend", "io_uring"], ["--backend", "threads"], ["--depth", "0"], ["--memory", "1GiB"]]
    {
        let numbers = place.trained(&[&["--seed", "5"], arguments.as_slice()].concat());
        assert_eq!(&numbers["losses"], reference, "{arguments:?}");
    }
    assert_ne!(&place.trained(&["--seed", "6"])["losses"], reference);
}

#[test]
fn a_forced_backend_is_the_one_that_is_used() {
    let place = Place::new();
    assert_eq!(place.trained(&["--backend", "threads"])["backend"], "threads");
    assert_eq!(place.trained(&["--backend", "io_uring"])["backend"], "io_uring");
    let mut command = place.command(&[&["train"], SMALL.as_slice(), &["--json", "n.json"]].concat());
    let ended = Ended::of(&command.env("OVERSPILL_BACKEND", "threads").output().unwrap());
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("threads"), "{}", ended.stdout);
}

#[test]
fn text_and_jsonl_files_are_what_is_learned() {
    let place = Place::new();
    place.file("a.txt", "abcabcabc".repeat(50));
    place.file("b.jsonl", "{\"text\": \"abcabcabcabc\"}\n".repeat(40));
    let numbers = place.trained(&["--data", "a.txt", "b.jsonl", "--lr", "0.01", "--steps", "30"]);
    let losses: Vec<f64> = numbers["losses"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
    assert!(losses[29] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn a_written_model_is_where_the_next_run_starts() {
    let place = Place::new();
    let first = place.trained(&["--out", "model", "--lr", "0.01", "--steps", "20"]);
    let mut names: Vec<_> = fs::read_dir(place.path("model"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);

    let ended = place.run(&[
        "train", "--model", "model", "--batch", "2", "--seq", "16", "--steps", "1", "--json", "n.json",
        "--out", "second",
    ]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let second = read_json(&place.path("n.json"));
    assert_eq!(second["parameters"], first["parameters"]);
    assert!(second["loss_first"].as_f64() < first["loss_first"].as_f64(), "it starts from what was learned");
    assert!(place.path("second/model.safetensors").exists());
}

#[test]
fn a_model_can_be_written_to_the_folder_that_the_run_swaps_in() {
    let place = Place::new();
    fs::create_dir(place.path("here")).unwrap();
    let mut command = place.command(&[&["train"], SMALL.as_slice(), &["--out", "."]].concat());
    let ended = Ended::of(&command.current_dir(place.path("here")).output().unwrap());
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(place.path("here/model.safetensors").exists());
    assert_eq!(place.names(), ["here"]);
}

#[test]
fn a_table_that_nobody_can_read_costs_no_numbers() {
    let place = Place::new();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = place.command(&[&["train"], SMALL.as_slice(), &["--json", "n.json"]].concat());
    let ended = Ended::of(&command.stdout(full).output().unwrap());
    ended.refused(&["standard output"]);
    assert_eq!(read_json(&place.path("n.json"))["steps"], 3);
}

#[test]
fn a_limit_on_file_sizes_is_an_error_and_leaves_nothing() {
    let place = Place::new();
    let limited =
        format!("ulimit -f 100; exec {} train {}", env!("CARGO_BIN_EXE_overspill"), SMALL.join(" "));
    let mut command = std::process::Command::new("sh");
    let output = command.args(["-c", &limited]).current_dir(place.path(".")).output().unwrap();
    let ended = Ended::of(&output);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("File too large"), "{}", ended.stderr);
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn the_state_stays_on_storage_when_it_is_kept() {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let ended = place.train(&["--swap-dir", "swap", "--keep"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    for name in ["data", "manifest", "lock"] {
        assert!(place.path("swap/overspill-store").join(name).exists(), "{name}");
    }
    place.train(&["--swap-dir", "swap"]).refused(&["overspill-store already exists", "remove it"]);
    assert!(place.path("swap/overspill-store/data").exists(), "nothing was taken over");
}

#[test]
fn a_killed_run_is_resumed_with_the_losses_of_one_that_was_not() {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let steps = ["--steps", "24", "--seed", "3", "--json", "numbers.json", "--quiet"];
    let arguments = [&["train"], &SMALL[..12], &steps].concat();
    let run = |more: &[&str]| place.command(&[arguments.as_slice(), more].concat());
    let numbers = || read_json(&place.path("numbers.json"));
    let reference = Ended::of(&run(&[]).output().unwrap());
    assert_eq!(reference.status, Some(0), "{}", reference.stderr);
    let reference = numbers()["losses"].clone();

    let swap = ["--swap-dir", "swap", "--keep"];
    let resume = ["--swap-dir", "swap", "--keep", "--resume"];
    let manifest = place.path("swap/overspill-store/manifest");
    let mut child = run(&swap).spawn().unwrap();
    let began = Instant::now();
    while !manifest.exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing is committed");
        std::thread::yield_now();
    }
    for after_ms in [5, 40, 90, 20] {
        std::thread::park_timeout(Duration::from_millis(after_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        child = run(&resume).spawn().unwrap();
    }
    let ended = Ended::of(&child.wait_with_output().unwrap());
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let resumed = numbers();
    let first = resumed["first_step"].as_u64().unwrap() as usize;
    let losses = resumed["losses"].as_array().unwrap();
    assert_eq!(losses.as_slice(), &reference.as_array().unwrap()[first - 1..], "from step {first} on");

    let other = [&["train"], &SMALL[..12], &["--steps", "24", "--seed", "4"], &resume[..]].concat();
    place.run(&other).refused(&["the state of another run", "--seed was 3, and is 4 now"]);
    place.train(&["--swap-dir", ".", "--resume"]).refused(&["overspill-store", "no committed state"]);
    assert!(manifest.exists());
}

#[test]
fn a_kept_state_is_resumed_whatever_was_found_out_about_the_disk_since() {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let run = |more: &[&str]| {
        let steps = ["--steps", "4", "--swap-dir", "swap", "--keep", "--json", "numbers.json", "--quiet"];
        let mut command = place.command(&[&["train"], &SMALL[..12], &steps, more].concat());
        let ended = Ended::of(&command.env("RAYON_NUM_THREADS", "3").output().unwrap());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        read_json(&place.path("numbers.json"))
    };
    // Made for one state, without a commit on the way.
    assert_eq!(run(&["--durability", "none"])["steps"], 4);
    place.file("swap/overspill-tune.json", profile(2, 1.0));
    let resumed = run(&["--resume", "--memory", "100MiB"]);
    assert_eq!((&resumed["steps"], &resumed["first_step"]), (&Value::from(0), &Value::from(5)));
    assert_eq!(run(&["--resume", "--durability", "none"])["steps"], 0);
    assert!(place.path("swap/overspill-store/manifest").exists());
}

/// A folder with two that stand for disks.
fn two_disks() -> Place {
    let place = Place::new();
    for name in ["one", "two"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    place
}

fn names_in(place: &Place, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(place.path(folder)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// What `overspill tune` writes.
fn profile(rings: usize, gbps: f64) -> String {
    format!(
        r#"{{"version": 1, "chunk_bytes": 65536, "queue_depth": 8, "rings": {rings},
            "read_gbps": {gbps}, "write_gbps": {gbps}}}"#
    )
}

#[test]
fn two_directories_give_the_same_losses_as_one_and_are_left_as_they_were() {
    let place = two_disks();
    let reference = place.trained(&["--swap-dir", "one", "--seed", "5"]);
    assert_eq!(reference["volumes"].as_array().unwrap().len(), 1);
    assert!(names_in(&place, "one").is_empty(), "one directory is not measured");
    for (second, first_weight, second_weight) in [(profile(1, 3.0), 1, 3), (profile(2, 0.5), 2, 1)] {
        place.file("one/overspill-tune.json", profile(1, 1.0));
        place.file("two/overspill-tune.json", second);
        for directories in [&["--swap-dir", "one,two"][..], &["--swap-dir", "one", "--swap-dir", "two"]] {
            let numbers = place.trained(&[directories, &["--seed", "5"]].concat());
            assert_eq!(numbers["losses"], reference["losses"], "{directories:?}");
            assert_eq!(numbers["bytes_written"], reference["bytes_written"]);
            let volumes = numbers["volumes"].as_array().unwrap();
            let shares: Vec<_> =
                volumes.iter().map(|volume| (&volume["directory"], &volume["weight"])).collect();
            let expected =
                [(&Value::from("one"), &first_weight.into()), (&"two".into(), &second_weight.into())];
            assert_eq!(shares, expected);
            assert_eq!(volumes[0]["read_gbps"], 1.0);
            assert_eq!(volumes[1]["queue_depth"], 8);
        }
        for disk in ["one", "two"] {
            assert_eq!(names_in(&place, disk), ["overspill-tune.json"]);
        }
    }
}

#[test]
fn a_directory_that_nobody_knows_is_measured_once_and_remembered() {
    let place = two_disks();
    let weights = |numbers: &Value| -> Vec<Value> {
        numbers["volumes"].as_array().unwrap().iter().map(|volume| volume["weight"].clone()).collect()
    };
    let first = place.trained(&["--swap-dir", "one,two"]);
    for disk in ["one", "two"] {
        assert_eq!(names_in(&place, disk), ["overspill-tune.json"]);
    }
    let ended = place.train(&["--swap-dir", "one,two", "--json", "n.json"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("note: volume two: weight "), "{}", ended.stderr);
    assert!(ended.stdout.contains("by weights "), "{}", ended.stdout);
    let second = read_json(&place.path("n.json"));
    assert_eq!(weights(&second), weights(&first), "the same figures, the same shares");
}

#[test]
fn a_profile_that_is_damaged_is_a_note_and_stops_no_command() {
    let place = two_disks();
    let sound = place.trained(&["--swap-dir", "one"]);
    place.file("one/overspill-tune.json", "{");
    let ended = place.train(&["--swap-dir", "one", "--keep", "--json", "n.json"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let told: Vec<_> = ended.stderr.lines().filter(|line| line.contains("is not a profile")).collect();
    assert_eq!(told.len(), 1, "{}", ended.stderr);
    assert!(told[0].starts_with("note: ") && told[0].contains("overspill-tune.json"), "{told:?}");
    assert_eq!(read_json(&place.path("n.json"))["losses"], sound["losses"]);
    let verified = Ended::of(&place.command(&["verify", "one"]).output().unwrap());
    assert_eq!(verified.status, Some(0), "{}", verified.stderr);
}

#[test]
fn volumes_that_are_kept_stay_where_they_are() {
    let place = two_disks();
    let ended = place.train(&["--swap-dir", "one,two", "--keep"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    for name in ["one/overspill-store/manifest", "one/overspill-store/data", "two/overspill-store/data"] {
        assert!(place.path(name).exists(), "{name}");
    }
    place.train(&["--swap-dir", "two"]).refused(&["two/overspill-store already exists"]);
}

#[test]
fn an_interrupted_run_over_two_directories_cleans_both() {
    let place = two_disks();
    for disk in ["one", "two"] {
        place.file(&format!("{disk}/overspill-tune.json"), profile(2, 1.0));
    }
    let endless =
        [&["train"], &SMALL[..SMALL.len() - 2], &["--steps", "1000000", "--swap-dir", "one,two"]].concat();
    let mut child = place.command(&endless).spawn().unwrap();
    let began = Instant::now();
    while !place.path("two/overspill-store/data.1").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it began");
        assert!(began.elapsed().as_secs() < 300, "no store in time");
        std::thread::yield_now();
    }
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    let ended = Ended::of(&child.wait_with_output().unwrap());
    assert_eq!(ended.status, Some(130), "{}", ended.stderr);
    for disk in ["one", "two"] {
        assert_eq!(names_in(&place, disk), ["overspill-tune.json"]);
    }
}

#[test]
fn an_interrupted_run_cleans_up_and_says_so_by_its_exit_status() {
    for (signal, exit_status) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let place = Place::new();
        let endless =
            [&["train"], &SMALL[..SMALL.len() - 2], &["--steps", "1000000", "--out", "model"]].concat();
        let mut command = place.command(&endless);
        let child = place.until_there_is("overspill-store", &mut command);
        let status =
            std::process::Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
        assert!(status.unwrap().success());
        let ended = Ended::of(&child.wait_with_output().unwrap());
        assert_eq!(ended.status, Some(exit_status), "{}", ended.stderr);
        assert!(ended.stderr.contains("overspill: interrupted"), "{}", ended.stderr);
        assert!(place.names().is_empty(), "{:?}", place.names());
    }
}

#[test]
fn an_interrupted_run_says_where_its_state_is_kept_and_how_to_go_on_even_if_it_is_quiet() {
    for quiet in [&[][..], &["--quiet"]] {
        let place = Place::new();
        fs::create_dir(place.path("swap")).unwrap();
        let keep = ["--steps", "1000000", "--swap-dir", "swap", "--keep"];
        let endless = [&["train"], &SMALL[..SMALL.len() - 2], &keep, quiet].concat();
        let child = place.command(&endless).spawn().unwrap();
        let began = Instant::now();
        while !place.path("swap/overspill-store/manifest.previous").exists() {
            assert!(began.elapsed().as_secs() < 60, "nothing is committed");
            std::thread::yield_now();
        }
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
        let ended = Ended::of(&child.wait_with_output().unwrap());
        assert_eq!(ended.status, Some(143), "{}", ended.stderr);
        let lines: Vec<_> = ended.stderr.lines().collect();
        let [.., kept, "overspill: interrupted"] = lines[..] else { panic!("{}", ended.stderr) };
        assert!(kept.contains("is kept in swap/overspill-store; go on with"), "{kept}");
        assert!(kept.ends_with("--resume"), "{kept}");
    }
}
