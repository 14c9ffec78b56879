//! `overspill inspect`, `verify`, `snapshot`, `restore` and `gc` on stores that no run has open.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command::{Ended, Place, SMALL, read_json};

/// A folder with the state of a run of three steps.
fn kept() -> Place {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let ended = place.train(&["--swap-dir", "swap", "--keep", "--quiet"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    place
}

fn well(ended: Ended) -> Ended {
    assert_eq!(ended.status, Some(0), "{}\n{}", ended.stdout, ended.stderr);
    ended
}

/// What a command says with `--json -`: the numbers, and nothing else on standard output.
fn numbers(place: &Place, arguments: &[&str]) -> Value {
    let ended = well(place.run(&[arguments, &["--json", "-"]].concat()));
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {}", ended.stdout))
}

fn store(place: &Place, name: &str) -> PathBuf {
    place.path("swap/overspill-store").join(name)
}

fn flip(path: PathBuf, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[track_caller]
fn has_names(numbers: &Value, names: &[&str]) {
    for name in names {
        assert!(numbers.get(name).is_some(), "{name} is not in {numbers}");
    }
    let wanted = names.len();
    assert_eq!(numbers.as_object().unwrap().len(), wanted, "{numbers}");
}

#[test]
fn what_a_store_holds_is_shown_and_has_stable_names() {
    let place = kept();
    well(place.run(&["snapshot", "swap", "best"]));
    let shown = numbers(&place, &["inspect", "swap"]);
    has_names(
        &shown,
        &[
            "directory",
            "directories",
            "in_use",
            "owner_pid",
            "generation",
            "step",
            "capacity_bytes",
            "bytes_written",
            "bytes_written_per_step",
            "bytes_on_disk",
            "generations",
            "files",
            "foreign_files",
            "fragmentation",
        ],
    );
    assert_eq!(
        (&shown["step"], &shown["in_use"], &shown["owner_pid"]),
        (&3.into(), &false.into(), &Value::Null)
    );
    let per_step = shown["bytes_written"].as_f64().unwrap() / 3.0;
    assert_eq!(shown["bytes_written_per_step"], per_step);
    let generations = shown["generations"].as_array().unwrap();
    let kinds: Vec<_> = generations.iter().map(|generation| generation["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["committed", "previous", "snapshot"]);
    for (generation, step) in generations.iter().zip([3, 2, 3]) {
        has_names(
            generation,
            &["kind", "name", "generation", "step", "tensor_count", "tensor_bytes", "whole", "reason"],
        );
        assert_eq!((&generation["step"], &generation["whole"]), (&step.into(), &true.into()));
    }
    assert_eq!(generations[2]["name"], "best");
    has_names(&shown["files"][0], &["path", "length_bytes", "allocated_bytes"]);
    let free = &shown["fragmentation"];
    has_names(
        free,
        &["capacity_bytes", "free_bytes", "longest_free_bytes", "free_ranges", "scattered_share"],
    );
    assert!(free["free_bytes"].as_u64() >= free["longest_free_bytes"].as_u64());
    assert!((0.0..1.0).contains(&free["scattered_share"].as_f64().unwrap()));

    let tensors = &numbers(&place, &["inspect", "swap/overspill-store", "--tensors"])["tensors"];
    assert_eq!(tensors.as_array().unwrap().len(), generations[0]["tensor_count"].as_u64().unwrap() as usize);
    has_names(&tensors[0], &["name", "bytes", "offset"]);
    let table = well(place.run(&["inspect", "swap", "--tensors", "--json", "n.json"])).stdout;
    for part in
        ["by nobody", "snapshot best", "fragmentation", "per step", tensors[0]["name"].as_str().unwrap()]
    {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert_eq!(read_json(&place.path("n.json"))["tensors"], *tensors);
    place.run(&["inspect", "."]).refused(&["not a directory of a store"]);
    place.run(&["inspect", "nowhere"]).refused(&["nowhere", "not a directory of a store"]);
}

#[test]
fn the_numbers_of_a_run_can_go_to_standard_output_alone() {
    let place = Place::new();
    let ended = well(place.train(&["--json", "-"]));
    let numbers: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(numbers["steps"], 3);
    assert!(place.names().is_empty(), "no file of that name: {:?}", place.names());
}

#[test]
fn damage_is_shown_by_inspect_and_is_no_error_of_it() {
    let place = kept();
    well(place.run(&["snapshot", "swap", "best"]));
    flip(store(&place, "snapshot.best"), 70);
    fs::write(store(&place, "snapshot.txt"), "notes").unwrap();
    // The snapshot and the manifest are one file.
    let shown = numbers(&place, &["inspect", "swap"]);
    assert_eq!(shown["foreign_files"], Value::from(vec!["snapshot.txt"]));
    let whole: Vec<_> = shown["generations"].as_array().unwrap().iter().map(|g| g["whole"] == true).collect();
    assert_eq!(whole, [false, true, false]);
    assert_eq!((&shown["step"], &shown["generation"]), (&Value::Null, &Value::Null));
    let table = well(place.run(&["inspect", "swap"])).stdout;
    assert!(table.contains("--previous") && table.contains("snapshot.txt"), "{table}");
}

#[test]
fn a_flipped_bit_is_named_and_the_way_back_is_said_and_works() {
    let place = kept();
    let whole = numbers(&place, &["verify", "swap"]);
    has_names(
        &whole,
        &[
            "directory",
            "directories",
            "whole",
            "generations",
            "damaged",
            "extent_count",
            "bytes_read",
            "elapsed_seconds",
            "remedy",
        ],
    );
    assert_eq!((&whole["whole"], &whole["damaged"]), (&true.into(), &Value::Array(Vec::new())));
    let shown = numbers(&place, &["inspect", "swap", "--tensors"]);
    let tensor = &shown["tensors"][1];
    flip(store(&place, "data"), tensor["offset"].as_u64().unwrap() + 3);

    let ended = place.run(&["verify", "swap", "--json", "n.json"]);
    ended.refused(&[
        "swap/overspill-store is damaged: the committed generation (1 of ",
        "--previous` goes back",
    ]);
    let name = tensor["name"].as_str().unwrap();
    assert!(ended.stdout.contains(&format!("tensor {name}: ")), "{}", ended.stdout);
    let found = read_json(&place.path("n.json"));
    let [damaged] = &found["damaged"].as_array().unwrap()[..] else { panic!("{found}") };
    has_names(
        damaged,
        &[
            "tensor",
            "generations",
            "file",
            "offset",
            "length_bytes",
            "checksum_expected",
            "checksum_found",
            "error",
        ],
    );
    assert_eq!((&damaged["tensor"], &damaged["offset"]), (&tensor["name"], &tensor["offset"]));
    assert_eq!(damaged["generations"], Value::from(vec!["the committed generation"]));
    has_names(
        &found["generations"][0],
        &["kind", "name", "generation", "step", "whole", "tensor_count", "damaged_count", "reason"],
    );
    let ended = well(place.run(&["restore", "swap", "--previous"]));
    assert!(
        ended.stderr.contains("the previous generation is the committed generation now, step 2"),
        "{}",
        ended.stderr
    );
    assert_eq!(numbers(&place, &["inspect", "swap"])["step"], 2);
    // What was damaged is the previous generation now, of which nobody promises anything.
    assert_eq!(numbers(&place, &["verify", "swap"])["whole"], true);
    place.run(&["restore", "swap", "--previous"]).refused(&["the previous generation is not whole", name]);
    well(place.train(&["--swap-dir", "swap", "--keep", "--resume", "--quiet"]));
    assert_eq!(numbers(&place, &["inspect", "swap"])["step"], 3);
}

#[test]
fn a_damaged_manifest_is_said_by_verify_and_by_a_run_with_the_way_back() {
    let place = kept();
    flip(store(&place, "manifest"), 70);
    let way_back = "`overspill restore swap/overspill-store --previous`";
    place.run(&["verify", "swap"]).refused(&["the committed generation", "checksum", way_back]);
    place.train(&["--swap-dir", "swap", "--keep", "--resume"]).refused(&["manifest", way_back]);
    well(place.run(&["restore", "swap", "--previous"]));
    well(place.run(&["verify", "swap"]));
    well(place.run(&["snapshot", "swap", "good"]));
    fs::remove_file(store(&place, "manifest")).unwrap();
    place.run(&["verify", "swap"]).refused(&["it has no committed generation", "snapshot good is whole"]);
    // What was damaged is the previous generation now.
    let to_good = "`overspill restore swap/overspill-store good`";
    place.train(&["--swap-dir", "swap", "--keep", "--resume"]).refused(&["manifest is gone", to_good]);
    place.train(&["--swap-dir", "swap"]).refused(&["already exists", "manifest is gone", to_good]);
    fs::remove_file(store(&place, "volume")).unwrap();
    well(place.run(&["restore", "swap", "good"]));
    well(place.run(&["verify", "swap"]));
    well(place.train(&["--swap-dir", "swap", "--keep", "--resume", "--quiet"]));
    fs::remove_file(store(&place, "lock")).unwrap();
    place.run(&["verify", "swap"]).refused(&["swap/overspill-store/lock", "an empty file in its place"]);
    assert!(well(place.run(&["gc", "swap"])).stdout.contains("swap/overspill-store"));
}

#[test]
fn a_damaged_snapshot_is_not_restored_unless_unchecked_and_can_be_given_up() {
    let place = kept();
    well(place.run(&["snapshot", "swap", "good"]));
    place.run(&["snapshot", "swap", "good"]).refused(&["already has a snapshot good"]);
    for name in ["a b", ".", "..", ".hidden"] {
        place.run(&["snapshot", "swap", name]).refused(&["no name for a snapshot"]);
    }
    place.run(&["snapshot", "swap", "--", "-x"]).refused(&["no name for a snapshot"]);
    place.run(&["snapshot", "swap", "gone", "--delete"]).refused(&["no snapshot gone; it has good"]);
    place.run(&["restore", "swap", "gone"]).refused(&["no snapshot gone; it has good"]);
    let shown = numbers(&place, &["inspect", "swap", "--tensors"]);
    flip(store(&place, "data"), shown["tensors"][0]["offset"].as_u64().unwrap());
    let name = shown["tensors"][0]["name"].as_str().unwrap();
    place.run(&["restore", "swap", "good"]).refused(&["snapshot good is not whole", name]);
    assert_eq!(
        numbers(&place, &["inspect", "swap"])["generation"],
        shown["generation"],
        "nothing has changed"
    );
    place.run(&["verify", "swap"]).refused(&["the committed generation", "snapshot good (1 of"]);
    well(place.run(&["restore", "swap", "good", "--unchecked"]));
    well(place.run(&["snapshot", "swap", "good", "--delete"]));
    assert!(!store(&place, "snapshot.good").exists());
    assert_eq!(place.run(&["restore", "swap"]).status, Some(2), "what to restore has to be said");
    assert_eq!(place.run(&["restore", "swap", "good", "--previous"]).status, Some(2));
}

#[test]
fn a_data_file_that_was_cut_short_is_damage() {
    let place = kept();
    let file = File::options().write(true).open(store(&place, "data")).unwrap();
    file.set_len(4096).unwrap();
    place.run(&["verify", "swap"]).refused(&["the committed generation (", "cut short"]);
    fs::remove_file(store(&place, "data")).unwrap();
    place.run(&["verify", "swap"]).refused(&["data"]);
    assert_eq!(numbers(&place, &["inspect", "swap"])["generations"][0]["whole"], false);
}

#[test]
fn a_store_over_several_disks_is_found_from_its_home_or_by_all_its_directories() {
    let place = Place::new();
    for name in ["one", "two"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    well(place.train(&["--swap-dir", "one,two", "--keep", "--quiet"]));
    for directories in [&["one"][..], &["one", "two"]] {
        let shown = numbers(&place, &[&["inspect"], directories].concat());
        // What was found in the manifest is said as it is there, what was named as it was named.
        let two = if directories.len() == 1 { place.path("two") } else { "two".into() };
        let two = Value::from(two.join("overspill-store").to_str().unwrap());
        assert_eq!((&shown["directories"][1], shown["files"].as_array().unwrap().len()), (&two, 2));
        let verified = numbers(&place, &[&["verify"], directories].concat());
        assert_eq!(
            (&verified["whole"], &verified["directories"]),
            (&true.into(), &Value::from(vec!["one/overspill-store".into(), two]))
        );
    }
    for lost in [&["verify", "two"][..], &["verify", "two", "one"], &["restore", "two", "--previous"]] {
        place.run(lost).refused(&["two/overspill-store is the directory number 2 of its store"]);
    }
    let resumed = place.train(&["--swap-dir", "two,one", "--resume"]);
    resumed.refused(&["two/overspill-store is the directory number 2", "in the order"]);
    let shown = well(place.run(&["inspect", "two"])).stdout;
    assert!(shown.contains("number 2 of its store") && !shown.contains("nothing was committed"), "{shown}");
    place.run(&["verify", "one", "one"]).refused(&["one/overspill-store was given twice"]);
    place.run(&["snapshot", "two", "s"]).refused(&["not the first directory of its store"]);
    fs::rename(place.path("two"), place.path("moved")).unwrap();
    place.run(&["verify", "one"]).refused(&["give all directories"]);
    well(place.run(&["verify", "one", "moved"]));
    well(place.run(&["restore", "one", "--previous", "--volume", "moved"]));
}

#[test]
fn a_store_over_several_disks_is_found_from_any_working_directory_and_a_copy_says_what_it_read() {
    let place = Place::new();
    for name in ["one", "two", "copy", "copy/one", "copy/two", "elsewhere"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    well(place.train(&["--swap-dir", "one,two", "--keep", "--quiet"]));
    let from_elsewhere = |arguments: &[&str]| {
        let output = place.command(arguments).current_dir(place.path("elsewhere")).output().unwrap();
        well(Ended::of(&output))
    };
    from_elsewhere(&["verify", "../one"]);
    from_elsewhere(&["export", "../one", "out"]);
    for disk in ["one", "two"] {
        let to = place.path("copy").join(disk).join("overspill-store");
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(place.path(disk).join("overspill-store")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    // Of the second disk of a copy nobody knows but who made it.
    let original = place.path("two/overspill-store");
    let verified = well(place.run(&["verify", "copy/one"])).stdout;
    let read = format!("from copy/one/overspill-store and {}\n", original.display());
    assert!(verified.ends_with(&read), "{verified}");
    let exported = numbers(&place, &["export", "copy/one", "out"]);
    assert_eq!(
        exported["directories"],
        Value::from(vec!["copy/one/overspill-store", original.to_str().unwrap()])
    );
    assert!(well(place.run(&["inspect", "copy/one"])).stdout.contains(original.to_str().unwrap()));
    let exported = well(place.run(&["export", "copy/one,copy/two", "own"])).stdout;
    assert!(exported.contains("copy/two/overspill-store"), "{exported}");
    let verified = numbers(&place, &["verify", "copy/one", "copy/two"]);
    assert_eq!(
        verified["directories"],
        Value::from(vec!["copy/one/overspill-store", "copy/two/overspill-store"])
    );
}

#[test]
fn the_store_of_a_run_is_meant_whatever_else_lies_in_its_swap_directory() {
    let place = kept();
    for name in ["lock", "manifest"] {
        place.file(&format!("swap/{name}"), "somebody else's");
    }
    for command in ["inspect", "verify"] {
        assert_eq!(numbers(&place, &[command, "swap"])["directory"], "swap/overspill-store");
    }
    assert_eq!(numbers(&place, &["export", "swap", "out"])["store"], "swap/overspill-store");
    well(place.run(&["snapshot", "swap", "best"]));
    well(place.run(&["restore", "swap", "best"]));
}

#[test]
fn what_snapshot_and_restore_did_has_stable_names() {
    let place = kept();
    assert_eq!(well(place.run(&["snapshot", "swap"])).stdout, "no snapshots\n");
    assert_eq!(numbers(&place, &["snapshot", "swap"])["snapshots"], Value::Array(Vec::new()));
    let made = numbers(&place, &["snapshot", "swap", "best"]);
    let names = ["directory", "name", "deleted", "generation", "step", "owner_pid", "at_next_commit"];
    has_names(&made, &names);
    assert_eq!(
        (&made["directory"], &made["name"], &made["deleted"], &made["step"]),
        (&"swap/overspill-store".into(), &"best".into(), &false.into(), &3.into())
    );
    assert_eq!((&made["owner_pid"], &made["at_next_commit"]), (&Value::Null, &false.into()));

    let listed = numbers(&place, &["snapshot", "swap"]);
    has_names(&listed, &["directory", "snapshots"]);
    let [best] = &listed["snapshots"].as_array().unwrap()[..] else { panic!("{listed}") };
    // As `inspect` shows it.
    assert_eq!(*best, numbers(&place, &["inspect", "swap"])["generations"][2]);
    let table = well(place.run(&["snapshot", "swap"])).stdout;
    assert!(table.contains("snapshot best") && !table.contains("committed"), "{table}");

    let names = ["directory", "kind", "name", "generation", "step", "checked"];
    let restored = numbers(&place, &["restore", "swap", "--previous"]);
    has_names(&restored, &names);
    assert_eq!(
        (&restored["kind"], &restored["name"], &restored["step"], &restored["checked"]),
        (&"previous".into(), &Value::Null, &2.into(), &true.into())
    );
    let restored = numbers(&place, &["restore", "swap", "best", "--unchecked"]);
    assert_eq!(
        (&restored["kind"], &restored["name"], &restored["step"], &restored["checked"]),
        (&"snapshot".into(), &"best".into(), &3.into(), &false.into())
    );
    assert_eq!(restored["generation"], numbers(&place, &["inspect", "swap"])["generation"]);

    let deleted = numbers(&place, &["snapshot", "swap", "best", "--delete"]);
    assert_eq!(
        (&deleted["deleted"], &deleted["generation"], &deleted["step"]),
        (&true.into(), &made["generation"], &3.into())
    );
    for incomplete in [&["snapshot", "swap", "--delete"][..], &["snapshot", "swap", "--wait", "1"]] {
        assert_eq!(place.run(incomplete).status, Some(2), "the name is missing");
    }
    place.run(&["snapshot", "swap", "gone", "--delete", "--json", "n.json"]).refused(&["no snapshot gone"]);
    assert!(!place.path("n.json").exists());
    place.run(&["snapshot", "."]).refused(&["not a directory of a store"]);
}

#[test]
fn gc_finds_the_folder_that_a_killed_process_was_writing_and_leaves_those_of_the_living() {
    let place = Place::new();
    let begin = |out: &str| {
        let run = [&["train"], &SMALL[..SMALL.len() - 2], &["--steps", "1000000", "--quiet"]].concat();
        let name = format!(".{out}.partial-");
        let mut command = place.command(&[&run[..], &["--out", out]].concat());
        let child = place.until_there_is(&name, &mut command);
        // The folder takes its full size before the first step.
        let model = place.path(&format!("{name}{}/model.safetensors", child.id()));
        let began = Instant::now();
        while fs::metadata(&model).map_or(0, |found| found.len()) < 100_000 {
            assert!(began.elapsed() < Duration::from_secs(60), "no model in time");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        child
    };
    let (mut dead, mut living) = (begin("dead"), begin("living"));
    dead.kill().unwrap();
    dead.wait().unwrap();
    let hidden = place.path(&format!(".living.partial-{}", living.id()));
    let listed = numbers(&place, &["gc"]);
    let folders = |listed: &Value| -> Vec<Value> {
        let entries = listed["directories"].as_array().unwrap().iter();
        entries.filter(|entry| entry["remains"] == "unfinished_folder").cloned().collect()
    };
    let [left, written] = &folders(&listed)[..] else { panic!("{listed}") };
    assert_eq!(left["path"], format!("./.dead.partial-{}", dead.id()));
    assert_eq!((&left["in_use"], &left["may_hold_state"]), (&false.into(), &false.into()));
    assert!(left["bytes_on_disk"].as_u64() > Some(100_000), "{left}");
    assert_eq!((&written["in_use"], &written["owner_pid"]), (&true.into(), &living.id().into()));
    let table = well(place.run(&["gc"])).stdout;
    assert!(table.contains("a folder that was not finished"), "{table}");
    assert!(place.names().iter().any(|name| name.starts_with(".dead.partial-")), "nothing goes unasked");

    let removed = numbers(&place, &["gc", "--remove"]);
    let [left, written] = &folders(&removed)[..] else { panic!("{removed}") };
    assert_eq!((&left["removed"], &written["removed"]), (&true.into(), &false.into()));
    assert!(!place.names().iter().any(|name| name.starts_with(".dead.partial-")));
    assert!(hidden.join("model.safetensors").exists());
    living.kill().unwrap();
    living.wait().unwrap();
    well(place.run(&["gc", "--remove"]));
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn gc_lists_what_is_left_and_removes_only_what_it_is_told_to() {
    let place = kept();
    well(place.run(&["snapshot", "swap", "best"]));
    // As a run leaves it that is killed before its first commit.
    fs::create_dir(place.path("other")).unwrap();
    well(place.train(&["--swap-dir", "other", "--keep", "--quiet"]));
    for manifest in ["manifest", "manifest.previous"] {
        fs::remove_file(place.path("other/overspill-store").join(manifest)).unwrap();
    }
    place.file("other/overspill-store/thesis.txt", "dear to somebody");
    fs::rename(place.path("other/overspill-store"), place.path("swap/dead")).unwrap();
    fs::create_dir(place.path("swap/foreign")).unwrap();
    for name in ["lock", "data"] {
        place.file(&format!("swap/foreign/{name}"), "1");
    }
    symlink(place.path("swap/dead"), place.path("swap/link")).unwrap();

    let listed = numbers(&place, &["gc", "swap"]);
    has_names(&listed, &["removed_bytes", "directories"]);
    let [dead, store_entry] = &listed["directories"].as_array().unwrap()[..] else { panic!("{listed}") };
    has_names(
        dead,
        &[
            "path",
            "in_use",
            "owner_pid",
            "remains",
            "may_hold_state",
            "step",
            "snapshots",
            "bytes_on_disk",
            "last_used_unix_seconds",
            "removed",
            "stays_because",
        ],
    );
    assert_eq!((&dead["path"], &dead["remains"]), (&"swap/dead".into(), &"uncommitted".into()));
    assert_eq!((&store_entry["remains"], &store_entry["step"]), (&"committed".into(), &3.into()));
    assert_eq!(store_entry["snapshots"], Value::from(vec!["best"]));
    assert!(place.path("swap/dead/data").exists(), "nothing goes without --remove");

    let table = well(place.run(&["gc", "swap", "--remove"])).stdout;
    for part in ["removed", "can be resumed: step 3, snapshots best", "the directory stays", "thesis.txt"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert!(place.path("swap/dead/thesis.txt").exists() && !place.path("swap/dead/data").exists());
    assert!(store(&place, "manifest").exists());
    assert_eq!(
        place.run(&["gc", "swap", "--with-committed"]).status,
        Some(2),
        "--remove says that something goes"
    );
    let removed = numbers(&place, &["gc", "swap", "--remove", "--with-committed"]);
    assert_eq!(removed["directories"][0]["removed"], true);
    assert!(removed["removed_bytes"].as_u64() > Some(0));
    let mut names: Vec<_> =
        fs::read_dir(place.path("swap")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["dead", "foreign", "link"]);
    assert!(place.path("swap/foreign/data").exists());
    assert_eq!(well(place.run(&["gc"])).stdout, "no stores\n");
    place.run(&["gc", "nowhere"]).refused(&["cannot list nowhere"]);
}

#[test]
fn gc_removes_all_parts_of_a_store_over_several_disks() {
    let place = Place::new();
    for disk in ["one", "two"] {
        fs::create_dir(place.path(disk)).unwrap();
    }
    well(place.train(&["--swap-dir", "one,two", "--keep", "--quiet"]));
    for manifest in ["manifest", "manifest.previous"] {
        fs::remove_file(place.path("one/overspill-store").join(manifest)).unwrap();
    }
    let removed = numbers(&place, &["gc", "one", "two", "--remove"]);
    let entries = removed["directories"].as_array().unwrap();
    assert_eq!(entries.len(), 2, "{removed}");
    assert!(entries.iter().all(|entry| entry["removed"] == true), "{removed}");
    for disk in ["one", "two"] {
        assert!(!place.path(disk).join("overspill-store").exists());
    }
}
