//! A disk that somebody fills, and a limit that is lowered, while a run trains: it ends with its last step whole, and
//! goes on when there is room.
//!
//! The disk is a small file system in memory, mounted in a name space of its own; where the kernel gives none the test
//! fails, unless `OVERSPILL_SKIP_NAMESPACES=1` says that this is accepted. The limit is the one on the size of files,
//! which stands for a quota.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;

use crate::command::{Ended, Place, SMALL, read_json};

const BOUND: Duration = Duration::from_secs(60);

/// A run of many steps, compared with one that nobody disturbs.
struct Run {
    place: Place,
    reference: Value,
}

impl Run {
    fn new() -> Self {
        let place = Place::new();
        fs::create_dir(place.path("disk")).unwrap();
        let mut run = Self { place, reference: Value::Null };
        run.reference = run.finished(&[])["losses"].clone();
        run
    }

    fn command(&self, steps: &str, more: &[&str]) -> Command {
        let steps = ["--steps", steps, "--seed", "3", "--json", "numbers.json", "--quiet"];
        self.place.command(&[&["train"], &SMALL[..12], &steps, more].concat())
    }

    /// The numbers of a run that succeeds.
    fn finished(&self, more: &[&str]) -> Value {
        let ended = Ended::of(&self.command("200", more).output().unwrap());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        read_json(&self.place.path("numbers.json"))
    }

    /// Starts a run on the disk and waits until it has committed something.
    fn started(&self, steps: &str) -> Child {
        let child = self.command(steps, &["--swap-dir", "disk", "--keep"]).spawn().unwrap();
        let (manifest, began) = (self.place.path("disk/overspill-store/manifest.previous"), Instant::now());
        while !manifest.exists() {
            assert!(began.elapsed() < BOUND, "nothing is committed");
            std::thread::yield_now();
        }
        child
    }

    /// Goes on from what is on the disk, to the losses of the run that was not disturbed.
    fn resumes(&self) {
        let numbers = self.finished(&["--swap-dir", "disk", "--keep", "--resume"]);
        let first = numbers["first_step"].as_u64().unwrap() as usize;
        assert!((2..200).contains(&first), "it was disturbed in the middle: {first}");
        let losses = numbers["losses"].as_array().unwrap();
        let reference = &self.reference.as_array().unwrap()[first - 1..];
        assert_eq!(losses.as_slice(), reference, "from step {first} on");
    }
}

#[test]
fn a_run_whose_disk_gets_full_names_what_is_missing_and_goes_on_when_there_is_room() {
    apart("full::a_run_whose_disk_gets_full_names_what_is_missing_and_goes_on_when_there_is_room_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by the test without _here"]
fn a_run_whose_disk_gets_full_names_what_is_missing_and_goes_on_when_there_is_room_here() {
    let run = Run::new();
    let disk = run.place.path("disk");
    mount(&disk);
    let mut child = run.started("200");
    let taken = fill_until_it_ends(&disk, &mut child);
    let ended = Ended::of(&child.wait_with_output().unwrap());
    ended.refused(&[
        "cannot write disk/overspill-store/manifest.new",
        "bytes are needed",
        "(os error 28)",
        "make room and resume",
    ]);
    fs::remove_file(taken).unwrap();
    run.resumes();
}

/// Takes every byte that the disk has left, now and whenever the run gives one up.
fn fill_until_it_ends(disk: &Path, child: &mut Child) -> std::path::PathBuf {
    let path = disk.join("of somebody else");
    let mut file = File::create(&path).unwrap();
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < BOUND, "the run does not notice");
        for bytes in [vec![1; 64 << 10], vec![1; 4096]] {
            while file.write_all(&bytes).is_ok() {}
        }
    }
    path
}

#[test]
fn a_run_that_meets_a_limit_on_the_size_of_files_names_it_and_goes_on_without() {
    let run = Run::new();
    let child = run.started("200");
    let pid = Pid::from_child(&child);
    let limits = prlimit(Some(pid), Resource::Fsize, Rlimit { current: Some(64), maximum: Some(64) });
    limits.unwrap();
    let ended = Ended::of(&child.wait_with_output().unwrap());
    ended.refused(&["disk/overspill-store/", "os error 27"]);
    run.resumes();
}

#[test]
fn a_last_commit_that_fails_costs_neither_the_trained_model_nor_the_store() {
    let run = Run::new();
    let more = ["--swap-dir", "disk", "--keep", "--durability", "none", "--out", "trained"];
    let child = run.command("200", &more).spawn().unwrap();
    let (store, began) = (run.place.path("disk/overspill-store"), Instant::now());
    while !store.exists() {
        assert!(began.elapsed() < BOUND, "there is no store");
        std::thread::yield_now();
    }
    // No file can take its place.
    fs::create_dir(store.join("manifest.new")).unwrap();
    let ended = Ended::of(&child.wait_with_output().unwrap());
    ended.refused(&["cannot write disk/overspill-store/manifest.new"]);
    assert!(run.place.path("trained/config.json").exists(), "what was trained is written");
    assert!(store.join("data").exists(), "and the store stays");
}

#[test]
fn a_snapshot_that_the_disk_has_no_room_for_is_refused_and_the_run_goes_on() {
    apart("full::a_snapshot_that_the_disk_has_no_room_for_is_refused_and_the_run_goes_on_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by the test without _here"]
fn a_snapshot_that_the_disk_has_no_room_for_is_refused_and_the_run_goes_on_here() {
    let run = Run::new();
    let disk = run.place.path("disk");
    mount(&disk);
    let mut child = run.started("1000000");
    // What the manifests need is left, and not as much as the state takes.
    let space = rustix::fs::statvfs(&disk).unwrap();
    let taken = disk.join("of somebody else");
    fs::write(&taken, vec![1; (space.f_bavail * space.f_frsize) as usize - (192 << 10)]).unwrap();
    run.place
        .run(&["snapshot", "disk", "best"])
        .refused(&["no room for snapshot best of disk/overspill-store"]);
    let committed = || fs::read(disk.join("overspill-store/manifest")).unwrap();
    let (before, began) = (committed(), Instant::now());
    while committed() == before {
        assert!(child.try_wait().unwrap().is_none() && began.elapsed() < BOUND, "the run does not go on");
        std::thread::yield_now();
    }
    // The same snapshot is made where there is room, and then the disk may get as full as it was.
    fs::remove_file(&taken).unwrap();
    let made = run.place.run(&["snapshot", "disk", "best"]);
    assert_eq!(made.status, Some(0), "{}", made.stderr);
    let space = rustix::fs::statvfs(&disk).unwrap();
    fs::write(&taken, vec![1; (space.f_bavail * space.f_frsize) as usize - (192 << 10)]).unwrap();
    let mut before = committed();
    for _ in 0..5 {
        while committed() == before {
            assert!(child.try_wait().unwrap().is_none() && began.elapsed() < BOUND, "the run does not go on");
            std::thread::yield_now();
        }
        before = committed();
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Runs the ignored test `name` of this binary in a name space of its own, where it may mount.
fn apart(name: &str) {
    let unshare = ["--user", "--map-root-user", "--mount", "--"];
    let binary = std::env::current_exe().unwrap();
    let run = Command::new("unshare").args(unshare).arg(binary).args(["--ignored", "--exact", name]).output();
    let because = match run {
        Ok(run) => {
            let [said, complained] = [&run.stdout, &run.stderr].map(|said| String::from_utf8_lossy(said));
            if said.contains("running 1 test") {
                assert!(run.status.success() && said.contains("1 passed"), "{said}\n{complained}");
                return;
            }
            complained.into_owned()
        }
        Err(error) => error.to_string(),
    };
    let accepted = std::env::var_os("OVERSPILL_SKIP_NAMESPACES").is_some_and(|value| value == "1");
    assert!(accepted, "{name} needs a name space; OVERSPILL_SKIP_NAMESPACES=1 does without: {because}");
    eprintln!("not tested: {name}: {because}");
}

/// Mounts a small file system in memory over `folder`.
fn mount(folder: &Path) {
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"]).arg(folder).output();
    let mounted = mounted.unwrap();
    assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
}
