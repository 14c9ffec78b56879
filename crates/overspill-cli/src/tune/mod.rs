//! `overspill tune`: finds how an engine gets the most out of a directory, and leaves a profile there for `train`.
//!
//! Chunk lengths and queue depths form a grid. A coarse part of it is measured first, then what lies around its best
//! point, then that best point with several engines side by side. Every point is measured in short slices with others
//! between them, and counts with its median, so that a disturbance hits many points a little and none much. The budget
//! of time is divided over the slices, and once a part of it is used up, no further round of that part begins.

mod grid;
mod heat;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use overspill_io::{Direction, EngineConfig};
use overspill_swap::Profile;
use overspill_train::{ByteSize, check_stop, path};
use serde::Serialize;

use self::grid::{Measured, Point, Speed};
use self::heat::{HeatMap, Paint};
use crate::args::TuneArguments;
use crate::interrupt;
use crate::motion::files::{FileSet, Shape};
use crate::motion::mover::{Look, Moved, Mover, Step};
use crate::output::{self, JsonFile};
use crate::progress::Steps;

/// What was found. Rates are 10⁹ bytes per second; medians over the slices.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(serialize_with = "path::lossy")]
    directory: PathBuf,
    backend: String,
    points: Vec<PointReport>,
    rings: Vec<RingsReport>,
    profile: Profile,
    #[serde(serialize_with = "path::lossy")]
    profile_path: PathBuf,
    elapsed_seconds: f64,
}

#[derive(Debug, Serialize)]
struct PointReport {
    chunk_bytes: usize,
    queue_depth: usize,
    #[serde(flatten)]
    speed: Speed,
}

#[derive(Debug, Serialize)]
struct RingsReport {
    rings: usize,
    #[serde(flatten)]
    speed: Speed,
}

/// Every ring has a file of this many bytes: several times what is ever in motion.
const FILE_BYTES: usize = 256 << 20;

/// Every point is measured as often.
const ROUNDS: usize = 3;

/// Parts of the budget after which no further round of a stage begins.
const COARSE_UNTIL: f64 = 0.45;
const NEIGHBORS_UNTIL: f64 = 0.85;

/// Part of the budget that goes into slices; the rest starts engines and makes files.
const SLICED: f64 = 0.8;

pub(crate) fn run(arguments: &TuneArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let mut tuner = Tuner::new(arguments)?;
    let tuned = tuner.tune();
    tuner.progress.finish();
    let Tuned { points, rings } = tuned?;
    let report = tuner.report(&points, &rings)?;
    // The files are gone before the profile says where they were.
    drop(tuner);
    let paint = Paint::of_terminal(std::io::stdout().is_terminal());
    let speeds: Vec<_> = points.iter().map(|point| (point.what, point.speed)).collect();
    output::show(&HeatMap { title: "read", points: &speeds, rate: |speed| speed.read_gbps, paint })?;
    output::show(&HeatMap { title: "write", points: &speeds, rate: |speed| speed.write_gbps, paint })?;
    report.profile.save(&arguments.dir)?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&report.verdict(&points))
}

/// Everything that was measured.
struct Tuned {
    points: Vec<Measured<Point>>,
    rings: Vec<Measured<usize>>,
}

struct Tuner<'a> {
    arguments: &'a TuneArguments,
    stop: Arc<AtomicBool>,
    started: Instant,
    slice: Duration,
    /// The files, one for each ring.
    sets: Vec<FileSet>,
    backend: String,
    progress: Steps,
}

impl<'a> Tuner<'a> {
    fn new(arguments: &'a TuneArguments) -> anyhow::Result<Self> {
        ensure!(arguments.dir.is_dir(), "{} is not a directory", arguments.dir.display());
        let stop = interrupt::stop_flag()?;
        let points = grid::coarse().len() + grid::NEIGHBORS_MAX + rings_to_try().len();
        let slices = (2 * ROUNDS * points) as f64;
        let slice = Duration::from_secs(arguments.seconds).mul_f64(SLICED / slices);
        let progress = Steps::new(ROUNDS * points, std::io::stderr().is_terminal());
        let (sets, backend, started) = (Vec::new(), String::new(), Instant::now());
        Ok(Self { arguments, stop, started, slice, sets, backend, progress })
    }

    fn tune(&mut self) -> anyhow::Result<Tuned> {
        self.progress.say("making a file");
        self.add_ring()?;
        self.progress.say("chunk length × queue depth");
        let mut points =
            self.measure(&grid::coarse(), COARSE_UNTIL, |tuner, point| tuner.slices(point, 1))?;
        let best = grid::fastest(&points).context("nothing was measured")?.what;
        self.progress.say("around the best");
        let around: Vec<_> = best.neighbors().filter(|near| points.iter().all(|p| p.what != *near)).collect();
        points.extend(self.measure(&around, NEIGHBORS_UNTIL, |tuner, point| tuner.slices(point, 1))?);
        let best = grid::choose(&points).context("nothing was measured")?.what;
        self.progress.say("rings");
        let rings = rings_to_try();
        while self.sets.len() < rings.iter().copied().max().unwrap_or(1) {
            self.add_ring()?;
        }
        let rings = self.measure(&rings, 1.0, |tuner, rings| tuner.slices(best, rings))?;
        Ok(Tuned { points, rings })
    }

    /// Measures everything in turns, and once at least; begins no further round after a part of the budget.
    fn measure<T: grid::Setting>(
        &mut self,
        settings: &[T],
        until: f64,
        slices: impl Fn(&mut Self, T) -> anyhow::Result<Speed>,
    ) -> anyhow::Result<Vec<Measured<T>>> {
        let mut found = vec![Vec::new(); settings.len()];
        let budget = Duration::from_secs(self.arguments.seconds).mul_f64(until);
        for round in 0..ROUNDS {
            for (setting, speeds) in settings.iter().zip(&mut found) {
                if round == 0 || self.started.elapsed() < budget {
                    speeds.push(slices(self, *setting)?);
                }
                self.progress.advance();
            }
        }
        Ok(settings.iter().zip(found).map(|(&setting, speeds)| Measured::new(setting, &speeds)).collect())
    }

    /// One slice of writes, then one of reads of what was written, with so many engines.
    fn slices(&mut self, point: Point, rings: usize) -> anyhow::Result<Speed> {
        let movers = (0..rings).map(|_| self.start(point)).collect::<anyhow::Result<Vec<_>>>()?;
        for (mover, set) in movers.iter().zip(&mut self.sets) {
            set.reshape(point.chunk_bytes());
            set.reopen(mover.engine())?;
        }
        let write = self.slice(&movers, Direction::Write)?;
        let read = self.slice(&movers, Direction::Read)?;
        Ok(Speed { read_gbps: read.gbps(), write_gbps: write.gbps() })
    }

    /// All engines at the same time, each round its own file until the slice is over.
    fn slice(&mut self, movers: &[Mover], direction: Direction) -> anyhow::Result<Moved> {
        let deadline = Instant::now() + self.slice;
        let each = |mover: &Mover, set: &mut FileSet| {
            let blocks = match direction {
                Direction::Write => set.shape().blocks(),
                Direction::Read => set.blocks_written(),
            };
            let steps = (0..blocks).cycle().map(|block| Step { block, direction }).enumerate();
            // A slice that is too short for anything else still fills the queue once.
            let steps = steps.take_while(|&(taken, _)| taken < mover.blocks() || Instant::now() < deadline);
            mover.run(set, steps.map(|(_, step)| step), Look::Ends)
        };
        let moved = std::thread::scope(|scope| {
            let spawned =
                movers.iter().zip(&mut self.sets).map(|(mover, set)| scope.spawn(|| each(mover, set)));
            let spawned: Vec<_> = spawned.collect();
            spawned
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect::<anyhow::Result<Vec<Moved>>>()
        })?;
        let bytes = moved.iter().map(|moved| moved.bytes).sum();
        let elapsed = moved.iter().map(|moved| moved.elapsed).max().unwrap_or_default();
        Ok(Moved { bytes, elapsed })
    }

    fn start(&self, point: Point) -> anyhow::Result<Mover> {
        let config = EngineConfig {
            backend: self.arguments.backend,
            chunk_bytes: point.chunk_bytes(),
            queue_depth: point.queue_depth(),
            ..EngineConfig::default()
        };
        Mover::start(config, &[point.chunk_bytes()], self.stop.clone())
    }

    /// Makes one more file and writes it once: what was never written before is slower to write.
    fn add_ring(&mut self) -> anyhow::Result<()> {
        let mover = self.start(Point::DEFAULT)?;
        if self.sets.is_empty() {
            mover.say_notes();
            self.backend = mover.engine().report().backend.to_string();
        }
        let block_bytes = Point::DEFAULT.chunk_bytes();
        let shape = Shape { files: 1, blocks_per_file: FILE_BYTES / block_bytes, block_bytes };
        let stem = format!("overspill-tune-{}-{}", std::process::id(), self.sets.len());
        let mut set = FileSet::create(mover.engine(), &self.arguments.dir, stem, shape)?;
        mover.fill(&mut set)?;
        self.sets.push(set);
        Ok(())
    }

    fn report(&self, points: &[Measured<Point>], rings: &[Measured<usize>]) -> anyhow::Result<Report> {
        check_stop(&self.stop)?;
        let point = grid::choose(points).context("nothing was measured")?.what;
        let chosen = grid::choose(rings).context("nothing was measured")?;
        let point_report = |measured: &Measured<Point>| PointReport {
            chunk_bytes: measured.what.chunk_bytes(),
            queue_depth: measured.what.queue_depth(),
            speed: measured.speed,
        };
        Ok(Report {
            directory: self.arguments.dir.clone(),
            backend: self.backend.clone(),
            points: points.iter().map(point_report).collect(),
            rings: rings.iter().map(|found| RingsReport { rings: found.what, speed: found.speed }).collect(),
            profile: Profile {
                chunk_bytes: point.chunk_bytes(),
                queue_depth: point.queue_depth(),
                rings: chosen.what,
                read_gbps: chosen.speed.read_gbps,
                write_gbps: chosen.speed.write_gbps,
            },
            profile_path: self.arguments.dir.join(Profile::FILE),
            elapsed_seconds: self.started.elapsed().as_secs_f64(),
        })
    }
}

impl Report {
    /// What was chosen, why, and where it is.
    fn verdict(&self, points: &[Measured<Point>]) -> String {
        let Profile { chunk_bytes, queue_depth, rings, read_gbps, write_gbps } = self.profile;
        let size = |bytes: usize| ByteSize(bytes as u64).to_string();
        let plural = if rings == 1 { "" } else { "s" };
        let why = match grid::fastest(points) {
            Some(fastest) if fastest.what.memory_bytes() > chunk_bytes * queue_depth => format!(
                "within 3 % of the fastest ({} × {}) with less memory",
                size(fastest.what.chunk_bytes()),
                fastest.what.queue_depth()
            ),
            _ => "the fastest".to_owned(),
        };
        let rings_why = if rings == 1 { "more rings are no faster" } else { "fewer rings are slower" };
        format!(
            "chunks of {}, {queue_depth} at a time, {rings} ring{plural}: {read_gbps:.2} GB/s read, \
             {write_gbps:.2} GB/s written; {why}, {rings_why}\nwrote {}: `overspill train --swap-dir {}` will use it\n",
            size(chunk_bytes),
            self.profile_path.display(),
            self.directory.display(),
        )
    }
}

/// Numbers of engines side by side.
fn rings_to_try() -> Vec<usize> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores >= 4 { vec![1, 2, 4] } else { vec![1, 2] }
}
