//! `overspill bench step`: an optimizer step whose state is on storage, beside what the disk and the processor allow.
//!
//! The state is AdamW's, with bf16 weights, exact fp32 masters by 16-bit remainders, and gradients in bf16: 10 bytes per
//! parameter on storage, which every step reads and writes once. Weights and gradients are in memory, as they are when a
//! training loop calls the optimizer. Nothing of the state stays in memory.
//!
//! With `--durability step` a second model commits every step, in turns with the first, which never does. With
//! `--resident` shares of the state stay in memory, and nothing else is measured ([`resident`]).
//!
//! No step can be faster than the slowest of four things: fio reading what it reads, fio writing what it writes, fio doing
//! both at once, and the update of the same state in memory. They are measured in turns with the steps. After the last
//! step the weights of one parameter are compared with those that the scalar code makes in memory.

mod model;
mod resident;
mod subject;

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, ensure};
use overspill_io::EngineConfig;
use overspill_swap::Durability;
use overspill_swap::optimizer::OptimizerPlan;
use overspill_train::{ByteSize, check_stop};
use serde::Serialize;

use self::model::{InMemory, Model};
use self::subject::{Subject, name, options};
use super::cells::Traffic;
use super::fio::{Fio, Job};
use super::pairs::median;
use crate::args::{BenchStepArguments, DurabilityChoice};
use crate::interrupt;
use crate::motion::files::{FileSet, Shape};
use crate::motion::mover::Mover;
use crate::output::{self, JsonFile};
use crate::progress::Steps;
use crate::table::{Table, thousands};

/// Most bytes of fio's file, and of the state that is updated in memory.
const FIO_BYTES: usize = 1 << 30;
const COMPUTE_ELEMENTS: usize = 32 << 20;

/// Bytes that are moved at a time.
const BLOCK_BYTES: usize = 1 << 20;

/// What was found. Rates are 10⁹ bytes per second; medians over the pairs.
#[derive(Debug, Serialize)]
struct Report {
    parameters: usize,
    state_bytes: usize,
    /// What the plan spends.
    memory_planned_bytes: usize,
    resident_bytes: usize,
    tile_bytes: usize,
    depth: usize,
    bytes_read_per_parameter_step: f64,
    bytes_written_per_parameter_step: f64,
    /// Both, as the system counted them for the process.
    bytes_per_parameter_step: f64,
    /// Of steps that are not committed.
    step_seconds: f64,
    by_durability: Vec<Promise>,
    /// The longest of the four below.
    bound_seconds: f64,
    /// Median of the ratios of neighbors.
    step_over_bound: f64,
    read_seconds: f64,
    write_seconds: f64,
    mixed_seconds: f64,
    compute_seconds: f64,
    fio_read_gbps: f64,
    fio_write_gbps: f64,
    fio_mixed_gbps: f64,
    pairs: usize,
    backend: String,
    isa: String,
    /// Where the time of the calling thread went, per step.
    swap_in_seconds: f64,
    update_seconds: f64,
    swap_out_seconds: f64,
}

/// What a step takes that promises this.
#[derive(Debug, Serialize)]
struct Promise {
    durability: &'static str,
    step_seconds: f64,
    bytes_per_parameter_step: f64,
}

pub(crate) fn run(arguments: &BenchStepArguments) -> anyhow::Result<()> {
    ensure!(arguments.dir.is_dir(), "{} is not a directory", arguments.dir.display());
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    if !arguments.resident.is_empty() {
        let report = resident::run(arguments)?;
        if let Some(json) = json {
            json.write(&report)?;
        }
        return output::show(&report.table());
    }
    let mut bench = Bench::new(arguments)?;
    let report = bench.run(arguments.pairs)?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&report.table())
}

/// Seconds that each of the bounds takes for one step's bytes.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    read: f64,
    write: f64,
    mixed: f64,
    compute: f64,
}

impl Bounds {
    fn longest(self) -> f64 {
        self.read.max(self.write).max(self.mixed).max(self.compute)
    }
}

struct Bench {
    subject: Subject,
    /// The one that commits, if it is asked for.
    promising: Option<Subject>,
    fio: Fio,
    mover: Mover,
    files: FileSet,
    in_memory: InMemory,
    stop: Arc<AtomicBool>,
}

impl Bench {
    fn new(arguments: &BenchStepArguments) -> anyhow::Result<Self> {
        let stop = interrupt::stop_flag()?;
        let fio = Fio::find().context(Fio::INSTALL)?;
        let model = Model::new(arguments.parameters)?;
        let subject = |durability| {
            let plan = OptimizerPlan::new(&model.specs(), &options(arguments))?;
            Subject::new(arguments, model.clone(), plan, durability)
        };
        let in_memory = InMemory::new(&model, arguments.parameters.min(COMPUTE_ELEMENTS))?;
        let is_promised = matches!(arguments.durability, DurabilityChoice::Step);
        let promising = is_promised.then(|| subject(Durability::Step)).transpose()?;
        let subject = subject(Durability::None)?;

        let config = EngineConfig { backend: arguments.backend, ..EngineConfig::default() };
        let mover = Mover::start(config, &[BLOCK_BYTES], stop.clone())?;
        let blocks_per_file = subject.swapper.plan().state_bytes().min(FIO_BYTES).div_ceil(BLOCK_BYTES);
        let shape = Shape { files: 1, blocks_per_file, block_bytes: BLOCK_BYTES };
        let stem = format!("overspill-bench-{}", std::process::id());
        let files = FileSet::create(mover.engine(), &arguments.dir, stem, shape)?;
        Ok(Self { subject, promising, fio, mover, files, in_memory, stop })
    }

    fn run(&mut self, pairs: usize) -> anyhow::Result<Report> {
        let progress = Steps::new(pairs + 2, std::io::stderr().is_terminal());
        progress.say("writing the first state");
        self.mover.fill(&mut self.files)?;
        self.subject.prepare()?;
        self.promising.as_mut().map(Subject::prepare).transpose()?;
        progress.advance();
        let mut bounds = Vec::new();
        let phases_before = self.subject.swapper.phases();
        for pair in 0..pairs {
            progress.say("steps, and what bounds them");
            check_stop(&self.stop)?;
            if pair % 2 == 0 {
                bounds.push(self.bounds()?);
                self.promising.as_mut().map(Subject::step).transpose()?;
            }
            self.subject.step()?;
            if pair % 2 == 1 {
                bounds.push(self.bounds()?);
                self.promising.as_mut().map(Subject::step).transpose()?;
            }
            progress.advance();
        }
        let phases = self.subject.swapper.phases();
        self.subject.model.check()?;
        self.promising.as_ref().map(|subject| subject.model.check()).transpose()?;
        progress.finish();

        let Subject { model, swapper, engine, seconds: steps, .. } = &self.subject;
        let (read, written) = self.subject.bytes_per_parameter();
        let state_bytes = swapper.plan().state_bytes() as f64;
        let rate = |seconds: f64, bytes: f64| bytes / seconds / 1e9;
        let bound = |which: fn(&Bounds) -> f64| median(bounds.iter().map(which).collect());
        let per_step = |time: std::time::Duration| time.as_secs_f64() / pairs.max(1) as f64;
        let ratios = steps.iter().zip(&bounds).map(|(step, bounds)| step / bounds.longest());
        let promise = |subject: &Subject, durability| Promise {
            durability: name(durability),
            step_seconds: median(subject.seconds.clone()),
            bytes_per_parameter_step: subject.bytes_per_parameter().0 + subject.bytes_per_parameter().1,
        };
        let promising = self.promising.iter().map(|subject| promise(subject, Durability::Step));
        let plan = swapper.plan();
        Ok(Report {
            parameters: model.parameters(),
            state_bytes: plan.state_bytes(),
            memory_planned_bytes: plan.total_bytes(),
            resident_bytes: plan.kept_bytes(),
            tile_bytes: plan.tile_bytes(),
            depth: plan.depth(),
            bytes_read_per_parameter_step: read,
            bytes_written_per_parameter_step: written,
            bytes_per_parameter_step: read + written,
            step_seconds: median(steps.clone()),
            by_durability: std::iter::once(promise(&self.subject, Durability::None))
                .chain(promising)
                .collect(),
            bound_seconds: median(bounds.iter().map(|bounds| bounds.longest()).collect()),
            step_over_bound: median(ratios.collect()),
            read_seconds: bound(|bounds| bounds.read),
            write_seconds: bound(|bounds| bounds.write),
            mixed_seconds: bound(|bounds| bounds.mixed),
            compute_seconds: bound(|bounds| bounds.compute),
            fio_read_gbps: rate(bound(|bounds| bounds.read), state_bytes),
            fio_write_gbps: rate(bound(|bounds| bounds.write), state_bytes),
            fio_mixed_gbps: rate(bound(|bounds| bounds.mixed), 2.0 * state_bytes),
            pairs,
            backend: engine.report().backend.to_string(),
            isa: model.isa.to_string(),
            swap_in_seconds: per_step(phases.swap_in - phases_before.swap_in),
            update_seconds: per_step(phases.compute - phases_before.compute),
            swap_out_seconds: per_step(phases.swap_out - phases_before.swap_out),
        })
    }

    fn bounds(&mut self) -> anyhow::Result<Bounds> {
        let state_bytes = self.subject.swapper.plan().state_bytes() as f64;
        let seconds = |traffic, bytes: f64| -> anyhow::Result<f64> {
            let gbps = self.fio.gbps(&Job { files: &self.files, traffic, rounds: 1 });
            // Ctrl-C ends fio too; that is not fio's fault.
            check_stop(&self.stop)?;
            Ok(bytes / gbps? / 1e9)
        };
        let read = seconds(Traffic::Read, state_bytes)?;
        let write = seconds(Traffic::Write, state_bytes)?;
        let mixed = seconds(Traffic::Mixed, 2.0 * state_bytes)?;
        let elements = self.in_memory.elements() as f64;
        let model = &self.subject.model;
        let compute = self.in_memory.update(model)? * model.parameters() as f64 / elements;
        Ok(Bounds { read, write, mixed, compute })
    }
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::default();
        let seconds = |seconds: f64| format!("{seconds:.3} s");
        let size = |bytes: usize| ByteSize(bytes as u64).to_string();
        table.line("parameters", thousands(self.parameters as u64));
        table.line("state on storage", size(self.state_bytes));
        table.line(
            "memory",
            format!(
                "{} (tiles of {}, depth {})",
                size(self.memory_planned_bytes),
                size(self.tile_bytes),
                self.depth
            ),
        );
        table.line(
            "moved per parameter and step",
            format!(
                "{:.2} bytes ({:.2} read, {:.2} written)",
                self.bytes_per_parameter_step,
                self.bytes_read_per_parameter_step,
                self.bytes_written_per_parameter_step
            ),
        );
        for promise in &self.by_durability {
            let name = format!("step, --durability {}", promise.durability);
            table.line(&name, seconds(promise.step_seconds));
        }
        table.line("bound", seconds(self.bound_seconds));
        table.line("ratio", format!("{:.2} (median of {} pairs)", self.step_over_bound, self.pairs));
        let fio = |name: &str, time: f64, gbps: f64| {
            (format!("fio, {name}"), format!("{time:.3} s ({gbps:.2} GB/s)"))
        };
        for (name, found) in [
            fio("reading", self.read_seconds, self.fio_read_gbps),
            fio("writing", self.write_seconds, self.fio_write_gbps),
            fio("both", self.mixed_seconds, self.fio_mixed_gbps),
        ] {
            table.line(&name, found);
        }
        table.line("update in memory", seconds(self.compute_seconds));
        table.line(
            "caller",
            format!(
                "in {}, update {}, out {}",
                seconds(self.swap_in_seconds),
                seconds(self.update_seconds),
                seconds(self.swap_out_seconds)
            ),
        );
        table
    }
}
