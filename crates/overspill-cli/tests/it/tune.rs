//! `overspill tune` finds a profile, leaves it and nothing else behind, and refuses what it cannot tune.

use overspill_swap::Profile;

use crate::command::{Ended, Place, read_json};

#[test]
fn tune_leaves_a_profile_that_can_be_loaded_and_nothing_else() {
    let place = Place::new();
    let ended = place.run(&["tune", "--seconds", "1", "--json", "n.json"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(place.names(), ["n.json", Profile::FILE]);
    let profile = Profile::load(&place.path("a/directory/to/be")).unwrap().unwrap();
    let numbers = read_json(&place.path("n.json"));
    assert_eq!(numbers["profile"]["chunk_bytes"], profile.chunk_bytes);
    assert_eq!(numbers["profile"]["queue_depth"], profile.queue_depth);
    assert!(profile.read_gbps > 0.0 && profile.write_gbps > 0.0);
    let points = numbers["points"].as_array().unwrap();
    assert!(points.len() >= 9, "{points:?}");
    let chosen = |point: &&serde_json::Value| {
        point["chunk_bytes"] == profile.chunk_bytes && point["queue_depth"] == profile.queue_depth
    };
    assert_eq!(points.iter().filter(chosen).count(), 1, "the choice was measured, and once");
    let rings: Vec<_> = numbers["rings"].as_array().unwrap().iter().map(|found| &found["rings"]).collect();
    assert!(rings.len() >= 2 && rings[0] == 1 && rings[1] == 2, "{rings:?}");
}

#[test]
fn tune_says_what_it_chose_and_draws_plainly_where_nobody_sees_colors() {
    let place = Place::new();
    let ended = place.run(&["tune", "--seconds", "1"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    for part in ["read, GB/s", "write, GB/s", "1 MiB", "× 64", "chunks of", "overspill train --swap-dir"] {
        assert!(ended.stdout.contains(part), "{part:?} is not in {}", ended.stdout);
    }
    assert!(!ended.stdout.contains('\x1b'), "{}", ended.stdout);
    assert_eq!(ended.stdout.lines().filter(|line| line.starts_with("wrote ")).count(), 1);
}

#[test]
fn an_interrupted_tune_leaves_nothing_behind() {
    let place = Place::new();
    let mut command = place.command(&["tune", "--seconds", "60"]);
    let child = place.until_there_is("overspill-tune-", &mut command);
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    let ended = Ended::of(&child.wait_with_output().unwrap());
    assert_eq!(ended.status, Some(130), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("overspill: ").count(), 1, "{}", ended.stderr);
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn tune_refuses_a_folder_that_is_none_and_times_that_are_none() {
    let place = Place::new();
    place.file("file", "");
    for folder in ["nowhere", "file"] {
        place.run(&["tune", "--dir", folder]).refused(&[folder, "is not a directory"]);
    }
    place.run(&["tune", "--json", "no/where.json"]).refused(&["no/where.json"]);
    let ended = place.run(&["tune", "--seconds", "0"]);
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert_eq!(place.names(), ["file"]);
}
