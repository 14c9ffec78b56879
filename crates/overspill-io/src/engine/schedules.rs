//! Random programs of operations on a simulated kernel, each the same for ever by its seed.
//!
//! A [`Program`] is carried out round by round: everything in a round is in flight together, and the next one begins
//! when every operation has its answer. Most programs drive a [`Driver`] on one thread from a closed channel, so that
//! a seed is one schedule, whatever else the machine does; some go through an [`Engine`] and its thread. What comes
//! back is held against a [`Model`] of each file, which knows every byte or knows that it may be anything.
//!
//! A seed that fails says in one line how to run it alone: `OVERSPILL_SEED=7 cargo test …`.

mod answer;
mod model;
mod program;

use std::ops::Range;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use rustix::io::Errno;

use self::answer::Outcome;
use self::model::Model;
use self::program::{Ending, Kind, Place, Program, Step, Way};
use super::Engine;
use super::config::EngineConfig;
use super::driver::Driver;
use super::op::{Op, Request};
use super::queue::Queue;
use super::stats::{EngineStats, Stats};
use super::ticket::{Promise, Reply, Ticket};
use crate::backend::doorbell::Doorbell;
use crate::backend::sim::Sim;
use crate::backend::{Arrival, Backend, BackendChoice, BackendKind, Transfer};
use crate::error::{Direction, Failed, IoError};
use crate::file::File;
use crate::sync::{Mutex, lock};
use crate::{BlockClass, Pool, SimConfig};

/// How many schedules the whole set has.
const SEEDS: u64 = 1200;
/// Longer than any round takes on a slow machine.
const BOUND: Duration = Duration::from_secs(60);

#[test]
fn every_schedule_keeps_the_laws() {
    let binary = std::env::current_exe().unwrap();
    let name = "engine::schedules::every_schedule_keeps_the_laws_here";
    let run = Command::new(binary).args(["--ignored", "--nocapture", "--exact", name]).output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success() && said.contains("1 passed"), "{said}\n{complained}");
}

#[test]
#[ignore = "counts what the whole process has; run by every_schedule_keeps_the_laws"]
fn every_schedule_keeps_the_laws_here() {
    let count = |folder| std::fs::read_dir(folder).unwrap().count();
    let own = || (count("/proc/self/fd"), count("/proc/self/task"));
    let before = own();
    match std::env::var("OVERSPILL_SEED") {
        Ok(seed) => drop(run(seed.parse().expect("OVERSPILL_SEED is a number"))),
        Err(_) => {
            let mut seen: Vec<Outcome> = (0..SEEDS).flat_map(run).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, Outcome::ALL, "a storm that spares something proves nothing about it");
        }
    }
    let deadline = Instant::now() + BOUND;
    // A thread that was joined stays visible for a moment.
    while own() != before {
        assert!(Instant::now() < deadline, "descriptors and threads before: {before:?}, after: {:?}", own());
        thread::park_timeout(Duration::from_micros(200));
    }
}

#[test]
fn a_seed_is_the_same_schedule_every_time() {
    let seeds = (0..200).filter(|&seed| Program::of(seed).is_deterministic());
    let (mut programs, mut outcomes) = (0, 0);
    for seed in seeds {
        let first = run(seed);
        assert_eq!(first, run(seed), "seed {seed}");
        programs += 1;
        outcomes += first.len();
    }
    assert!(programs > 100 && outcomes > 2000, "{outcomes} outcomes of {programs} programs");
}

/// Says on a panic how to see it again.
struct Reproduce(u64);

impl Drop for Reproduce {
    fn drop(&mut self) {
        if thread::panicking() {
            let seed = self.0;
            eprintln!(
                "to see it again: OVERSPILL_SEED={seed} cargo test --release -p overspill-io --lib every_schedule"
            );
        }
    }
}

/// Carries the program of `seed` out and checks everything that comes of it.
fn run(seed: u64) -> Vec<Outcome> {
    let _reproduce = Reproduce(seed);
    let program = Program::of(seed);
    let folder = program.places.contains(&Place::Disk).then(|| tempfile::tempdir().unwrap());
    let doorbell = Arc::clone(Sim::start(SimConfig::calm(0)).doorbell());
    let open = |(number, place): (usize, &Place)| match *place {
        Place::Memory { alignment } => {
            File::in_memory_as(&format!("file {number}"), alignment, &doorbell).unwrap()
        }
        Place::Disk => {
            let folder = folder.as_ref().expect("it was made for this").path();
            File::create(&folder.join(number.to_string()), &doorbell).unwrap()
        }
    };
    let files: Vec<File> = program.places.iter().enumerate().map(open).collect();
    let mut models: Vec<Model> = files.iter().map(|file| Model::of_empty(file.alignment())).collect();
    let class = BlockClass { name: "test", block_bytes: program::LENGTH_MAX, count: program.blocks() };
    let pool = Pool::new(&[class]).unwrap();
    let (mut outcomes, mut leaked) = (Vec::new(), 0);
    for (round, steps) in (0..).zip(&program.rounds) {
        let sim = program.sim(round);
        let done = match program.way {
            Way::Driver => by_driver(&program, sim, steps, &files, &pool),
            Way::Engine(ending) => by_engine(&program, sim, ending, steps, &files, &pool),
        };
        leaked += done.stats.leaked_blocks;
        outcomes.extend(done.check(&program, sim, &mut models));
        assert_eq!(pool.leased_blocks() as u64, leaked, "blocks that are not home");
    }
    for (file, model) in files.iter().zip(&models) {
        model.check_contents(file);
    }
    outcomes
}

/// An operation on its way.
struct Sent<'a> {
    step: &'a Step,
    file: &'a File,
    /// Addresses of its block.
    span: Range<usize>,
    claim: Claim,
}

enum Claim {
    Block(Ticket),
    News(Ticket<()>),
    Dropped,
}

impl Claim {
    fn is_done(&self) -> bool {
        match self {
            Claim::Block(ticket) => ticket.is_done(),
            Claim::News(ticket) => ticket.is_done(),
            Claim::Dropped => true,
        }
    }
}

/// A round that is over.
struct Done<'a> {
    sent: Vec<Sent<'a>>,
    stats: EngineStats,
    ended: Result<(), IoError>,
    /// Where each answered byte lay in memory, as far as anybody looked.
    moved: Option<Vec<Range<usize>>>,
}

/// Leases and fills the block of a step, and sends it on its way by `send`.
fn begin<'a>(
    step: &'a Step,
    files: &'a [File],
    pool: &Pool,
    stats: &Arc<Stats>,
    send: impl FnOnce(Request<'_>, Reply),
) -> Sent<'a> {
    let file = &files[step.file];
    let mut block = pool.try_lease(step.length).unwrap();
    program::fill(&mut block, step.tag);
    let start = block.as_ptr().addr();
    let direction = if step.kind == Kind::Read { Direction::Read } else { Direction::Write };
    let request = Request { direction, file, offset: step.offset, block, priority: step.priority };
    let claim = if step.kind == Kind::WriteBehind {
        let (promise, ticket) = Promise::new(Arc::clone(stats));
        send(request, Reply::Done(promise));
        Claim::News(ticket)
    } else {
        let (promise, ticket) = Promise::new(Arc::clone(stats));
        send(request, Reply::Block(promise));
        Claim::Block(ticket)
    };
    let claim = if step.dropped { Claim::Dropped } else { claim };
    Sent { step, file, span: start..start + step.length, claim }
}

/// A round on a driver that finds all of it waiting and the door closed.
fn by_driver<'a>(
    program: &Program,
    sim: SimConfig,
    steps: &'a [Step],
    files: &'a [File],
    pool: &Pool,
) -> Done<'a> {
    let stats = Arc::new(Stats::default());
    let (requests, intake) = bounded(steps.len());
    let send = |request: Request<'_>, reply| {
        if let Some(op) = Op::new(request, reply) {
            assert!(requests.try_send(op).is_ok(), "the channel is as long as the round");
        }
    };
    let sent: Vec<Sent<'_>> = steps.iter().map(|step| begin(step, files, pool, &stats, send)).collect();
    drop(requests);
    let moved = Arc::new(Mutex::new(Vec::new()));
    let (farewell, ended) = bounded(1);
    let drive = {
        let (moved, stats, patience) = (Arc::clone(&moved), Arc::clone(&stats), program.patience());
        let queue = Queue::new(program.chunk_bytes, program.limits());
        move || {
            let backend = Box::new(Watched { sim: Sim::start(sim), moved });
            drop(farewell.send(Driver::new(backend, intake, queue, stats, patience).run()));
        }
    };
    let driver = thread::spawn(drive);
    let ended = ended.recv_timeout(BOUND).expect("the driver ends");
    driver.join().unwrap();
    let moved = Some(std::mem::take(&mut *lock(&moved)));
    Done { sent, stats: stats.totals(), ended, moved }
}

/// A round through an engine of its own.
fn by_engine<'a>(
    program: &Program,
    sim: SimConfig,
    ending: Ending,
    steps: &'a [Step],
    files: &'a [File],
    pool: &Pool,
) -> Done<'a> {
    let config = EngineConfig {
        backend: BackendChoice::Sim(sim),
        chunk_bytes: program.chunk_bytes,
        queue_depth: program.depth,
        drain_patience: program.patience(),
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, pool).unwrap();
    let send = |request: Request<'_>, reply| engine.submit(request, reply);
    let stats = &engine.inner.stats;
    let sent: Vec<Sent<'_>> = steps.iter().map(|step| begin(step, files, pool, stats, send)).collect();
    // What is stuck comes back by the end of the engine only.
    if ending == Ending::AfterAnswers && sim.stuck_per_mille == 0 {
        let deadline = Instant::now() + BOUND;
        while !sent.iter().all(|sent| sent.claim.is_done()) {
            assert!(Instant::now() < deadline, "an operation has no answer");
            thread::park_timeout(Duration::from_micros(200));
        }
    }
    let ended = engine.shutdown();
    let stats = engine.stats();
    Done { sent, stats, ended, moved: None }
}

impl Done<'_> {
    /// Holds every answer against the models, and tells the models what was written.
    fn check(self, program: &Program, sim: SimConfig, models: &mut [Model]) -> Vec<Outcome> {
        let Done { sent, stats, ended, moved } = self;
        for sent in &sent {
            assert!(sent.claim.is_done(), "never answered: {:?}", sent.step);
        }
        let accepted = sent.iter().filter(|sent| sent.step.length > 0).count() as u64;
        assert_eq!(stats.read_ops + stats.write_ops, accepted, "operations that ended");
        for sent in sent.iter().filter(|sent| sent.step.kind != Kind::Read) {
            models[sent.step.file].announce(sent.step);
        }
        let mut outcomes = Vec::new();
        let mut written = Vec::new();
        let mut held = 0;
        for Sent { step, file, span, claim } in sent {
            let answer = match claim {
                Claim::Block(ticket) => ticket.wait().map(Some),
                Claim::News(ticket) => ticket.wait().map(|()| None),
                Claim::Dropped => {
                    outcomes.push(Outcome::Dropped);
                    continue;
                }
            };
            let outcome = match answer {
                Ok(block) => {
                    answer::check_success(step, &models[step.file], &span, block.as_ref());
                    written.push(step);
                    Outcome::Moved
                }
                Err(Failed { error, block }) => {
                    assert!(block.is_some() || error == IoError::EngineStopped, "{error} without its block");
                    block.iter().for_each(|block| answer::check_block(step, &span, block));
                    held += u64::from(block.is_none());
                    let moved = moved.as_ref().map(|moved| answer::within(moved, &span));
                    answer::check_failure(step, file, &models[step.file], sim, &error, moved);
                    answer::outcome_of(&error, block.as_ref())
                }
            };
            outcomes.push(outcome);
        }
        models.iter_mut().for_each(|model| model.settle(&written));
        let stuck = program.stuck();
        match ended {
            Ok(()) => assert_eq!(stats.leaked_blocks, 0),
            Err(IoError::DrainTimeout { leaked_blocks, .. }) if stuck => {
                assert_eq!(leaked_blocks as u64, stats.leaked_blocks);
            }
            Err(error) => panic!("the driver ended with: {error}"),
        }
        // The blocks of dropped tickets may be among them.
        assert!(held <= stats.leaked_blocks, "{held} answers without a block");
        outcomes
    }
}

/// A simulation whose answers are written down.
struct Watched {
    sim: Sim,
    moved: Arc<Mutex<Vec<Range<usize>>>>,
}

impl Backend for Watched {
    fn kind(&self) -> BackendKind {
        self.sim.kind()
    }

    fn doorbell(&self) -> &Arc<Doorbell> {
        self.sim.doorbell()
    }

    fn submit(&mut self, transfer: Transfer) {
        self.sim.submit(transfer);
    }

    fn park(&mut self, deadline: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        self.sim.park(deadline, arrivals)?;
        for Arrival { transfer, result } in &*arrivals {
            let start = transfer.block[transfer.chunk.done..].as_ptr().addr();
            lock(&self.moved).extend(usize::try_from(*result).ok().map(|moved| start..start + moved));
        }
        Ok(())
    }

    fn tidy(&mut self) {
        self.sim.tidy();
    }
}
