//! A process that is killed at any moment leaves its last commit.
//!
//! A child writes tensors and commits, over and over, and reports every commit before it begins and after it is over.
//! Every byte of a generation is known from its number and its tensor, so what a killed child leaves can be compared
//! with what it must be: the last generation that was reported as over, or the one that was under way.
//!
//! Most children die at a moment that nobody chose. The others are told before which step of what they have to stop,
//! and die there, so that every step of a commit, of a snapshot's beginning and end and of growth is one at which some
//! child has died.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use overspill_io::{BackendChoice, Block, BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{Durability, Manifest, Step, Store, StoreError, Swapped, Worth, watch_steps};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::json;

/// How many children die.
const ROUNDS: u64 = 200;
/// Tells a child where to work.
const DIRECTORY: &str = "OVERSPILL_TEST_DIRECTORY";
/// Tells a child before which step it stops, if it does: [`Stop::told`].
const STOP: &str = "OVERSPILL_TEST_STOP";
/// Tells a child with which backend.
const BACKEND: &str = "OVERSPILL_TEST_BACKEND";
const LENGTHS: [usize; 5] = [4096, 70_000, 64 << 10, 1, 200_000];
const BOUND: Duration = Duration::from_secs(60);

/// The bytes of a tensor in a generation.
fn fill(block: &mut [u8], tensor: usize, generation: u64) {
    for (index, byte) in block.iter_mut().enumerate() {
        *byte = (index as u64).wrapping_mul(31).wrapping_add(generation * 7 + tensor as u64 * 13) as u8;
    }
}

/// Whether a generation writes a tensor; others keep what they have.
fn is_written(tensor: usize, generation: u64) -> bool {
    generation == 1 || (generation + tensor as u64).is_multiple_of(2)
}

/// The generation that wrote what a tensor has in `generation`.
fn writer(tensor: usize, generation: u64) -> u64 {
    (1..=generation).rev().find(|&at| is_written(tensor, at)).unwrap_or(1)
}

fn engine(backend: BackendChoice) -> (Pool, Engine) {
    let classes = LENGTHS.map(|block_bytes| BlockClass { name: "test", block_bytes, count: 2 });
    let pool = Pool::new(&classes).unwrap();
    let engine = Engine::start(EngineConfig { backend, ..EngineConfig::default() }, &pool).unwrap();
    (pool, engine)
}

fn lease(pool: &Pool, tensor: usize) -> Block {
    pool.lease(LENGTHS[tensor]).unwrap()
}

/// What a child does besides writing, and the steps of it.
const WORK: [(&str, &[Step]); 4] = [
    (
        "commit",
        &[
            Step::FlushData,
            Step::Remove,
            Step::Remove,
            Step::Create,
            Step::Write,
            Step::Flush,
            Step::Link,
            Step::Rename,
            Step::Rename,
            Step::FlushNames,
        ],
    ),
    ("snapshot", &[Step::Link, Step::FlushNames]),
    ("deletion", &[Step::Remove, Step::FlushNames]),
    ("growth", &[Step::Grow, Step::Grown]),
];

/// Where a child stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stop {
    /// Index in [`WORK`].
    work: usize,
    /// Index in its steps.
    step: usize,
}

impl Stop {
    fn all() -> impl Iterator<Item = Self> {
        (0..WORK.len()).flat_map(|work| (0..WORK[work].1.len()).map(move |step| Self { work, step }))
    }

    fn tell(self) -> String {
        format!("{} {}", self.work, self.step)
    }

    fn told() -> Option<Self> {
        let told = std::env::var(STOP).ok()?;
        let (work, step) = told.split_once(' ').unwrap();
        Some(Self { work: work.parse().unwrap(), step: step.parse().unwrap() })
    }
}

/// What a child that is to stop is at: the work, and the steps of it so far.
#[derive(Debug)]
struct Course {
    work: AtomicUsize,
    steps: AtomicUsize,
}

impl Course {
    /// Nothing that anybody stops in.
    const IDLE: usize = WORK.len();

    /// Lets the process stop for good where it was told to.
    fn watched(stop: Option<Stop>) -> Arc<Self> {
        let course = Arc::new(Self { work: AtomicUsize::new(Self::IDLE), steps: AtomicUsize::new(0) });
        let Some(stop) = stop else { return course };
        let watched = Arc::clone(&course);
        watch_steps(move |step| {
            let at = watched.steps.fetch_add(1, Ordering::Relaxed);
            if watched.work.load(Ordering::Relaxed) == stop.work && at == stop.step {
                assert_eq!(WORK[stop.work].1[at], step);
                report(&format!("stops {}", stop.tell()));
                loop {
                    thread::park();
                }
            }
        });
        course
    }

    fn during<T>(&self, work: &str, act: impl FnOnce() -> T) -> T {
        let index = WORK.iter().position(|&(name, _)| name == work).unwrap();
        self.steps.store(0, Ordering::Relaxed);
        self.work.store(index, Ordering::Relaxed);
        let done = act();
        self.work.store(Self::IDLE, Ordering::Relaxed);
        done
    }
}

/// Tells the parent.
fn report(what: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{what}").unwrap();
    out.flush().unwrap();
}

/// The child: goes on from the last commit, or begins, and does not end by itself before a thousand generations.
#[test]
#[ignore = "runs until it is killed; run by a_killed_process_leaves_its_last_commit"]
fn writes_and_commits_here() {
    let directory = std::env::var_os(DIRECTORY).unwrap();
    let directory = Path::new(&directory);
    let backend = std::env::var(BACKEND).unwrap().parse().unwrap();
    let (pool, engine) = engine(backend);
    let store = match Store::open(directory, Durability::Step, &engine) {
        Ok(store) => store,
        Err(StoreError::Directory { .. }) => {
            let capacity = Store::capacity_for(Durability::Step, Worth::State, LENGTHS);
            Store::create(directory, Durability::Step, capacity, &engine).unwrap()
        }
        Err(error) => panic!("{error}"),
    };
    store.keep();
    let stop = Stop::told();
    let course = Course::watched(stop);
    let first = store.generation() + 1;
    for generation in first..first + 1000 {
        for (tensor, length) in LENGTHS.into_iter().enumerate() {
            if !is_written(tensor, generation) {
                continue;
            }
            let mut block = lease(&pool, tensor);
            fill(&mut block, tensor, generation);
            let name = format!("tensor {tensor}");
            let dirty = match store.adopt(&name, length) {
                Ok(tensor) => tensor.overwrite(block).unwrap(),
                Err(_) => store.reserve(name, length, Worth::State).unwrap().fill(block).unwrap(),
            };
            drop(dirty.store().wait().unwrap());
        }
        report(&format!("begins {generation}"));
        // The first commit has no manifest to replace, and nobody would wait for what it leaves.
        match generation - first {
            0 => store.commit(json!({ "generation": generation })).unwrap(),
            _ => course.during("commit", || store.commit(json!({ "generation": generation })).unwrap()),
        }
        report(&format!("over {generation}"));
        // A snapshot now and then makes the data file grow. The one before may have died in the middle.
        match generation % 16 {
            5 => match course.during("snapshot", || store.snapshot("pinned")) {
                Err(StoreError::SnapshotExists { .. }) => {}
                made => made.unwrap(),
            },
            9 if stop.is_some_and(|stop| WORK[stop.work].0 == "growth") => {
                let more = store.usage().capacity_bytes + 4096;
                course.during("growth", || store.provide(more)).unwrap();
            }
            11 => match course.during("deletion", || store.delete_snapshot("pinned")) {
                Err(StoreError::NoSnapshot { .. }) => {}
                deleted => deleted.unwrap(),
            },
            _ => {}
        }
    }
}

struct Writing {
    child: Child,
    reports: Receiver<String>,
}

impl Writing {
    fn start(directory: &Path, backend: BackendChoice, stop: Option<Stop>) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .envs(stop.map(|stop| (STOP, stop.tell())))
            .args(["--ignored", "--exact", "--nocapture", "killed::writes_and_commits_here"])
            .env(DIRECTORY, directory)
            .env(BACKEND, backend.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, reports) = mpsc::channel();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, reports }
    }

    /// Lets it make its first commit, and go on for `further` microseconds or to where it stops; kills it; returns the
    /// generations that may be found.
    fn kill(mut self, stop: Option<Stop>, further: u64) -> (u64, u64) {
        let (mut over, mut begun) = (0, 0);
        let mut note = |line: &str| {
            let number = |text: &str| text.parse::<u64>().unwrap();
            match line.split_once(' ') {
                Some(("over", generation)) => over = number(generation),
                Some(("begins", generation)) => begun = number(generation),
                _ => {}
            }
            let awaited = stop.map_or("over".to_owned(), |stop| format!("stops {}", stop.tell()));
            line.starts_with(&awaited)
        };
        while !note(&self.reports.recv_timeout(BOUND).expect("the child gets there")) {}
        if stop.is_none() {
            thread::park_timeout(Duration::from_micros(further));
        }
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.code().is_none(), "the child ended by itself: {status}");
        self.reports.into_iter().for_each(|line| {
            note(&line);
        });
        (over, begun.max(over))
    }
}

#[test]
fn a_killed_process_leaves_its_last_commit() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        let directory = folder.path().join(backend.to_string());
        let (pool, engine) = engine(backend);
        // Each step three times; all other rounds end at moments that nobody chose.
        let stops = (0..3).flat_map(|_| Stop::all()).map(Some).chain(std::iter::repeat(None));
        for (round, stop) in (0..ROUNDS / 2).zip(stops) {
            let writing = Writing::start(&directory, backend, stop);
            let (least, most) = writing.kill(stop, random.next_u64() % 20_000);
            let store = Store::open(&directory, Durability::Step, &engine).unwrap();
            let found = store.generation();
            assert!(
                (least..=most).contains(&found),
                "round {round}: generation {found} of {least} to {most} was found"
            );
            assert_eq!(store.meta(), json!({ "generation": found }));
            for (tensor, length) in LENGTHS.into_iter().enumerate() {
                let swapped: Swapped = store.adopt(&format!("tensor {tensor}"), length).unwrap();
                let resident = swapped.load(lease(&pool, tensor)).unwrap().wait().unwrap();
                let mut expected = vec![0; length];
                fill(&mut expected, tensor, writer(tensor, found));
                assert!(resident.bytes() == expected, "round {round}: tensor {tensor} of generation {found}");
            }
            assert!(store.snapshots().len() <= 1);
            check_snapshots(&directory, &store.snapshots());
        }
    }
}

/// Compares what snapshots name in the data file.
fn check_snapshots(directory: &Path, snapshots: &[String]) {
    for snapshot in snapshots {
        let manifest = std::fs::read(directory.join(format!("snapshot.{snapshot}"))).unwrap();
        let Manifest { generation, tensors, .. } = Manifest::decode(&manifest).unwrap();
        let data = File::open(directory.join("data")).unwrap();
        assert_eq!(tensors.len(), LENGTHS.len());
        for (tensor, record) in tensors.iter().enumerate() {
            let (mut found, mut expected) = (vec![0; LENGTHS[tensor]], vec![0; LENGTHS[tensor]]);
            data.read_exact_at(&mut found, record.offset).unwrap();
            fill(&mut expected, tensor, writer(tensor, generation));
            assert!(found == expected, "tensor {tensor} of snapshot {snapshot}, generation {generation}");
        }
    }
}
