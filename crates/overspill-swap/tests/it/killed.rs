//! A process that is killed at any moment leaves its last commit.
//!
//! A child writes tensors and commits, over and over, and reports every commit before it begins and after it is over.
//! Every byte of a generation is known from its number and its tensor, so what a killed child leaves can be compared
//! with what it must be: the last generation that was reported as over, or the one that was under way.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use overspill_io::{BackendChoice, Block, BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{Durability, Store, StoreError, Swapped, Worth};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::json;

/// How many children die.
const ROUNDS: u64 = 200;
/// Tells a child where to work.
const DIRECTORY: &str = "OVERSPILL_TEST_DIRECTORY";
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
    let mut out = std::io::stdout().lock();
    let mut report = |what: &str, generation: u64| {
        writeln!(out, "\n{what} {generation}").unwrap();
        out.flush().unwrap();
    };
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
        report("begins", generation);
        store.commit(json!({ "generation": generation })).unwrap();
        report("over", generation);
        // A snapshot now and then makes the data file grow.
        match generation % 16 {
            5 => store.snapshot("pinned").unwrap(),
            11 => store.delete_snapshot("pinned").unwrap(),
            _ => {}
        }
    }
}

struct Writing {
    child: Child,
    reports: Receiver<String>,
}

impl Writing {
    fn start(directory: &Path, backend: BackendChoice) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
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

    /// Lets it make its first commit, and `further` microseconds; kills it; returns the generations that may be found.
    fn kill(mut self, further: u64) -> (u64, u64) {
        let (mut over, mut begun) = (0, 0);
        let mut note = |line: &str| {
            let number = |text: &str| text.parse::<u64>().unwrap();
            match line.split_once(' ') {
                Some(("over", generation)) => over = number(generation),
                Some(("begins", generation)) => begun = number(generation),
                _ => {}
            }
            line.starts_with("over")
        };
        while !note(&self.reports.recv_timeout(BOUND).expect("the child commits")) {}
        thread::park_timeout(Duration::from_micros(further));
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
        for round in 0..ROUNDS / 2 {
            let (least, most) = Writing::start(&directory, backend).kill(random.next_u64() % 20_000);
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
        }
    }
}
