//! The commands of stores while a run has one open.

use std::fs;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use overspill_io::{BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{View, Volume};
use serde_json::Value;

use crate::command::{Ended, Place, SMALL, read_json};

const BOUND: Duration = Duration::from_secs(120);

/// A run that does not end by itself, in the directory `swap` of a place.
struct Running {
    place: Place,
    child: Child,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let place = Place::new();
        fs::create_dir(place.path("swap")).unwrap();
        let endless = ["--steps", "1000000", "--swap-dir", "swap", "--keep", "--quiet"];
        let all = [&["train"], &SMALL[..SMALL.len() - 2], &endless, arguments].concat();
        let child = place.command(&all).spawn().unwrap();
        Self { place, child }
    }

    fn has(&self, name: &str) -> bool {
        self.place.path("swap/overspill-store").join(name).exists()
    }

    fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !condition(self) {
            assert!(self.child.try_wait().unwrap().is_none(), "the run ended before {what}");
            assert!(began.elapsed() < BOUND, "not in time: {what}");
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        self.place.run(arguments)
    }

    fn numbers(&self, arguments: &[&str]) -> Value {
        let ended = self.run(&[arguments, &["--json", "-"]].concat());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        serde_json::from_str(&ended.stdout).unwrap()
    }

    /// Lets a process of this run, or another, come to its end.
    fn interrupt(child: &Child) {
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn a_running_job_is_looked_at_and_its_snapshots_come_and_go() {
    let mut running = Running::start(&[]);
    running.until("there is a commit", |run| run.has("manifest.previous"));
    let pid = running.child.id();
    let taken = running.run(&["snapshot", "swap", "best"]);
    assert_eq!(taken.status, Some(0), "{}", taken.stderr);
    assert_eq!(taken.stderr.lines().count(), 1, "{}", taken.stderr);
    assert!(
        taken
            .stderr
            .contains(&format!("note: waiting until process {pid}, which has the store open, commits"))
    );
    assert!(running.has("snapshot.best") && !running.has("wish.best"));
    let shown = running.numbers(&["inspect", "swap"]);
    assert_eq!((&shown["in_use"], &shown["owner_pid"]), (&true.into(), &pid.into()));
    let snapshot = shown["generations"].as_array().unwrap().iter().find(|g| g["name"] == "best").unwrap();
    assert!(snapshot["whole"] == true && snapshot["step"].as_u64() <= shown["step"].as_u64());
    let step = snapshot["step"].clone();

    running.run(&["verify", "swap"]).refused(&[&format!("in use by process {pid}")]);
    running.run(&["restore", "swap", "best"]).refused(&[&format!("in use by process {pid}")]);
    running.run(&["restore", "swap", "best", "--unchecked"]).refused(&[&format!("in use by process {pid}")]);
    running.run(&["snapshot", "swap", "best"]).refused(&["already has a snapshot best"]);
    let listed = running.numbers(&["gc", "swap", "--remove", "--with-committed"]);
    assert_eq!((&listed["directories"][0]["in_use"], &listed["removed_bytes"]), (&true.into(), &0.into()));
    assert!(running.has("data"));

    let other = running.numbers(&["snapshot", "swap", "other"]);
    assert_eq!((&other["owner_pid"], &other["at_next_commit"]), (&pid.into(), &true.into()));
    assert!(other["step"].as_u64() >= step.as_u64() && other["generation"].is_u64(), "{other}");
    let deleted = running.run(&["snapshot", "swap", "other", "--delete", "--json", "n.json"]);
    assert!(
        deleted.status == Some(0) && deleted.stderr.contains("free after its next commit"),
        "{}",
        deleted.stderr
    );
    let deleted = read_json(&running.place.path("n.json"));
    assert_eq!(
        (&deleted["deleted"], &deleted["owner_pid"], &deleted["at_next_commit"], &deleted["step"]),
        (&true.into(), &pid.into(), &true.into(), &other["step"])
    );
    assert!(!running.has("snapshot.other"));

    running.child.kill().unwrap();
    running.child.wait().unwrap();
    let verified = running.numbers(&["verify", "swap"]);
    assert_eq!(verified["whole"], true, "{verified}");
    assert_eq!(running.run(&["restore", "swap", "best"]).status, Some(0));
    assert_eq!(running.numbers(&["inspect", "swap"])["step"], step);
}

#[test]
fn a_wish_is_taken_back_when_time_is_up_or_somebody_asks_to_stop() {
    // It commits at its end, which never comes.
    let mut running = Running::start(&["--durability", "none"]);
    running.until("there is a store", |run| run.has("data"));
    running.run(&["snapshot", "swap", "late", "--wait", "0"]).refused(&[
        "swap/overspill-store",
        "neither committed nor ended within 0 s",
        "--durability none",
    ]);
    assert!(!running.has("wish.late"));
    let waiting = running.place.command(&["snapshot", "swap", "late"]).spawn().unwrap();
    running.until("there is a wish", |run| run.has("wish.late"));
    running.run(&["snapshot", "swap", "late"]).refused(&["another command waits for snapshot late"]);
    Running::interrupt(&waiting);
    let ended = Ended::of(&waiting.wait_with_output().unwrap());
    assert_eq!(ended.status, Some(130), "{}", ended.stderr);
    assert!(!running.has("wish.late"));
}

#[test]
fn who_waits_for_a_job_that_is_killed_takes_the_snapshot_or_says_why_not() {
    let mut running = Running::start(&["--durability", "none"]);
    running.until("there is a store", |run| run.has("data"));
    let waiting = running.place.command(&["snapshot", "swap", "late"]).spawn().unwrap();
    running.until("there is a wish", |run| run.has("wish.late"));
    running.child.kill().unwrap();
    let ended = Ended::of(&waiting.wait_with_output().unwrap());
    ended.refused(&["no committed state"]);
    assert!(!running.has("wish.late"));
    let removed = running.numbers(&["gc", "swap", "--remove"]);
    assert_eq!(removed["directories"][0]["removed"], true, "{removed}");
    assert!(!running.place.path("swap/overspill-store").exists());
}

#[test]
fn who_waits_for_a_process_that_only_reads_has_the_snapshot_when_that_ends() {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    let ended = place.train(&["--swap-dir", "swap", "--keep", "--quiet"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 1 << 16, count: 1 }]).unwrap();
    let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
    let directory = place.path("swap/overspill-store");
    let volume = Volume { directory: directory.clone(), engines: vec![engine], weight: 1 };
    let reader = View::open(&[volume]).unwrap();
    let waiting = place.command(&["snapshot", "swap", "late", "--json", "n.json"]).spawn().unwrap();
    let began = Instant::now();
    while !directory.join("wish.late").exists() {
        assert!(began.elapsed() < BOUND, "no wish in time");
        std::thread::park_timeout(Duration::from_millis(1));
    }
    drop(reader);
    let ended = Ended::of(&waiting.wait_with_output().unwrap());
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("commits or ends"), "{}", ended.stderr);
    assert_eq!(read_json(&place.path("n.json"))["step"], 3);
    assert!(directory.join("snapshot.late").exists());
}

#[test]
fn a_job_that_dies_with_wishes_in_its_directory_leaves_snapshots_that_are_whole() {
    for after_ms in [0, 3, 10, 40] {
        let mut running = Running::start(&[]);
        running.until("there is a commit", |run| run.has("manifest.previous"));
        let commands: Vec<Child> = ["a", "b", "c"]
            .iter()
            .map(|name| running.place.command(&["snapshot", "swap", name]).spawn().unwrap())
            .collect();
        std::thread::park_timeout(Duration::from_millis(after_ms));
        running.child.kill().unwrap();
        for command in commands {
            let ended = Ended::of(&command.wait_with_output().unwrap());
            // One of those that come when nobody has the store finds another at it.
            assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        }
        let verified = running.numbers(&["verify", "swap"]);
        let kinds = |kind: &str| {
            let generations = verified["generations"].as_array().unwrap();
            generations.iter().filter(|g| g["kind"] == kind && g["whole"] == true).count()
        };
        assert_eq!((kinds("committed"), kinds("snapshot")), (1, 3), "{verified}");
        for name in ["wish.a", "wish.b", "wish.c"] {
            assert!(!running.has(name), "{name}");
        }
    }
}
