//! `overspill bench step`: an optimizer step whose state is on storage, beside what the disk and the processor allow.
//!
//! The state is AdamW's, with bf16 weights, exact fp32 masters by 16-bit remainders, and gradients in bf16: 10 bytes per
//! parameter on storage, which every step reads and writes once. Weights and gradients are in memory, as they are when a
//! training loop calls the optimizer. Nothing of the state stays in memory.
//!
//! No step can be faster than the slowest of four things: fio reading what it reads, fio writing what it writes, fio doing
//! both at once, and the update of the same state in memory. They are measured in turns with the steps. After the last
//! step the weights of one parameter are compared with those that the scalar code makes in memory.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use overspill_io::{Engine, EngineConfig, Pool};
use overspill_optim::{
    AdamWConfig, AdamWStep, Gradient, Isa, MomentFormat, Origin, Outcome, Recipe, Rule, Step, Tile,
    WeightFormat, Weights,
};
use overspill_swap::optimizer::{
    OptimizerPlan, OptimizerSwapper, ParameterSpec, PartView, PlanOptions, StateSize,
};
use overspill_swap::{Durability, Store};
use overspill_train::{ByteSize, check_stop};
use serde::Serialize;

use super::cells::Traffic;
use super::fio::{Fio, Job};
use super::pairs::median;
use crate::args::BenchStepArguments;
use crate::interrupt;
use crate::motion::files::{FileSet, Shape};
use crate::motion::mover::Mover;
use crate::output::{self, JsonFile};
use crate::progress::Steps;
use crate::table::{Table, thousands};

/// Parameters of the model, of equal length.
const PARAMETERS: usize = 16;

/// Most bytes of fio's file, and of the state that is updated in memory.
const FIO_BYTES: usize = 1 << 30;
const COMPUTE_ELEMENTS: usize = 32 << 20;

/// Bytes that are moved at a time.
const BLOCK_BYTES: usize = 1 << 20;

/// Elements of the first parameter that are compared with the scalar code's.
const CHECKED: usize = 1 << 16;

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
    step_seconds: f64,
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

pub(crate) fn run(arguments: &BenchStepArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
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
    model: Model,
    swapper: OptimizerSwapper,
    engine: Engine,
    fio: Fio,
    mover: Mover,
    files: FileSet,
    in_memory: InMemory,
    stop: Arc<AtomicBool>,
}

/// What a training loop has in memory.
struct Model {
    recipe: Recipe,
    isa: Isa,
    weights: Vec<Vec<u16>>,
    gradients: Vec<Vec<u16>>,
    steps: u64,
}

/// A part of the state in memory, to see how fast the update alone is.
struct InMemory {
    record: Vec<u8>,
    weights: Vec<u16>,
    gradients: Vec<u16>,
}

impl Bench {
    fn new(arguments: &BenchStepArguments) -> anyhow::Result<Self> {
        ensure!(arguments.dir.is_dir(), "{} is not a directory", arguments.dir.display());
        let stop = interrupt::stop_flag()?;
        let fio = Fio::find().context(Fio::INSTALL)?;
        let rule = Rule::AdamW { amsgrad: false };
        let recipe = Recipe::new(rule, WeightFormat::Bf16WithRemainder, MomentFormat::F32)?;
        let numel = arguments.parameters.div_ceil(PARAMETERS);
        let bytes = move |elements| recipe.record_bytes(elements).unwrap_or(usize::MAX);
        let state = StateSize::Cut { elements: recipe.cut_elements(), bytes: Arc::new(bytes) };
        let spec = |index| ParameterSpec {
            name: format!("p{index}"),
            numel,
            state: state.clone(),
            begins_tile: false,
        };
        let specs: Vec<ParameterSpec> = (0..PARAMETERS).map(spec).collect();
        let options = PlanOptions {
            memory_bytes: usize::try_from(arguments.memory.0).unwrap_or(usize::MAX),
            kept_bytes_max: Some(0),
            depth: arguments.depth,
            tile_bytes: arguments.tile.map(|size| usize::try_from(size.0).unwrap_or(usize::MAX)),
            gradient_bytes: None,
        };
        let plan = OptimizerPlan::new(&specs, &options)?;
        let pool = Pool::new(&plan.classes())?;
        let config = EngineConfig { backend: arguments.backend, ..EngineConfig::default() };
        let engine = Engine::start(config.clone(), &pool)?;
        if let Some(reason) = engine.report().degraded {
            bail!("the engine is degraded, and its figures would mislead: {reason}");
        }
        let directory = arguments.dir.join(format!("overspill-bench-step-{}", std::process::id()));
        let durability = Durability::None;
        let store = Store::create(&directory, durability, plan.storage_bytes(durability), &engine)?;
        let swapper = OptimizerSwapper::create(&specs, plan, &store, &pool)?;

        let mover = Mover::start(config, &[BLOCK_BYTES], stop.clone())?;
        let blocks_per_file = swapper.plan().state_bytes().min(FIO_BYTES).div_ceil(BLOCK_BYTES);
        let shape = Shape { files: 1, blocks_per_file, block_bytes: BLOCK_BYTES };
        let stem = format!("overspill-bench-{}", std::process::id());
        let files = FileSet::create(mover.engine(), &arguments.dir, stem, shape)?;
        let model = Model::new(recipe, numel);
        let in_memory = InMemory::new(&model, arguments.parameters.min(COMPUTE_ELEMENTS))?;
        Ok(Self { model, swapper, engine, fio, mover, files, in_memory, stop })
    }

    fn run(&mut self, pairs: usize) -> anyhow::Result<Report> {
        let progress = Steps::new(pairs + 2, std::io::stderr().is_terminal());
        progress.say("writing the first state");
        self.mover.fill(&mut self.files)?;
        self.model.initialize(&mut self.swapper)?;
        // The first step is the first to read, and nobody counts it.
        self.step()?;
        progress.advance();
        let (mut steps, mut bounds, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        let phases_before = self.swapper.phases();
        for pair in 0..pairs {
            progress.say("steps, and what bounds them");
            check_stop(&self.stop)?;
            if pair % 2 == 0 {
                bounds.push(self.bounds()?);
            }
            let before = moved_by_process()?;
            steps.push(self.step()?);
            let after = moved_by_process()?;
            moved.push((after.0 - before.0, after.1 - before.1));
            if pair % 2 == 1 {
                bounds.push(self.bounds()?);
            }
            progress.advance();
        }
        let phases = self.swapper.phases();
        self.model.check()?;
        progress.finish();

        let parameters = self.model.parameters();
        let middle = |values: &mut dyn Iterator<Item = f64>| median(values.collect());
        let per_parameter = |bytes: f64| bytes / parameters as f64;
        let read = middle(&mut moved.iter().map(|moved| moved.0 as f64));
        let written = middle(&mut moved.iter().map(|moved| moved.1 as f64));
        let state_bytes = self.swapper.plan().state_bytes() as f64;
        let rate = |seconds: f64, bytes: f64| bytes / seconds / 1e9;
        let bound = |which: fn(&Bounds) -> f64| median(bounds.iter().map(which).collect());
        let per_step = |time: std::time::Duration| time.as_secs_f64() / pairs.max(1) as f64;
        let ratios = steps.iter().zip(&bounds).map(|(step, bounds)| step / bounds.longest());
        let plan = self.swapper.plan();
        Ok(Report {
            parameters,
            state_bytes: plan.state_bytes(),
            memory_planned_bytes: plan.total_bytes(),
            resident_bytes: plan.kept_bytes(),
            tile_bytes: plan.tile_bytes(),
            depth: plan.depth(),
            bytes_read_per_parameter_step: per_parameter(read),
            bytes_written_per_parameter_step: per_parameter(written),
            bytes_per_parameter_step: per_parameter(read + written),
            step_seconds: median(steps.clone()),
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
            backend: self.engine.report().backend.to_string(),
            isa: self.model.isa.to_string(),
            swap_in_seconds: per_step(phases.swap_in - phases_before.swap_in),
            update_seconds: per_step(phases.compute - phases_before.compute),
            swap_out_seconds: per_step(phases.swap_out - phases_before.swap_out),
        })
    }

    /// One step until everything is on storage, in seconds.
    fn step(&mut self) -> anyhow::Result<f64> {
        let started = Instant::now();
        self.model.step(&mut self.swapper)?;
        self.swapper.settle()?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn bounds(&mut self) -> anyhow::Result<Bounds> {
        let state_bytes = self.swapper.plan().state_bytes() as f64;
        let seconds = |traffic, bytes: f64| -> anyhow::Result<f64> {
            let gbps = self.fio.gbps(&Job { files: &self.files, traffic, rounds: 1 });
            // Ctrl-C ends fio too; that is not fio's fault.
            check_stop(&self.stop)?;
            Ok(bytes / gbps? / 1e9)
        };
        let read = seconds(Traffic::Read, state_bytes)?;
        let write = seconds(Traffic::Write, state_bytes)?;
        let mixed = seconds(Traffic::Mixed, 2.0 * state_bytes)?;
        let elements = self.in_memory.weights.len() as f64;
        let compute = self.in_memory.update(&self.model)? * self.model.parameters() as f64 / elements;
        Ok(Bounds { read, write, mixed, compute })
    }
}

impl Model {
    fn new(recipe: Recipe, numel: usize) -> Self {
        let gradient = |parameter: usize| -> Vec<u16> {
            (0..numel).map(|element| half::bf16::from_f32(gradient(parameter, element)).to_bits()).collect()
        };
        Self {
            recipe,
            isa: Isa::detect(),
            weights: vec![vec![0; numel]; PARAMETERS],
            gradients: (0..PARAMETERS).map(gradient).collect(),
            steps: 0,
        }
    }

    fn parameters(&self) -> usize {
        self.weights.iter().map(Vec::len).sum()
    }

    /// The first weights, with masters and moments.
    fn initialize(&mut self, swapper: &mut OptimizerSwapper) -> anyhow::Result<()> {
        let Self { recipe, isa, weights, .. } = self;
        let mut values = Vec::new();
        swapper.edit(
            |_| true,
            |part: PartView<'_>| -> anyhow::Result<()> {
                values.clear();
                values.extend(part.elements.clone().map(|element| first(part.parameter, element)));
                let elements = part.elements.len();
                let weights = Weights::Bf16(&mut weights[part.parameter][part.elements]);
                let tile = Tile { record: part.state, elements, range: 0..elements, weights };
                let outcome = recipe.initialize(*isa, tile, Gradient::F32(&values), Origin::default())?;
                ensure!(outcome == Outcome::Updated, "the first weights are finite");
                Ok(())
            },
        )?;
        Ok(())
    }

    fn step(&mut self, swapper: &mut OptimizerSwapper) -> anyhow::Result<()> {
        self.steps += 1;
        let step = adamw_step(self.steps);
        let Self { recipe, isa, weights, gradients, .. } = self;
        swapper.step(
            |_| true,
            |part: PartView<'_>| -> anyhow::Result<()> {
                let elements = part.elements.len();
                let gradient = Gradient::Bf16(&gradients[part.parameter][part.elements.clone()]);
                let weights = Weights::Bf16(&mut weights[part.parameter][part.elements]);
                let tile = Tile { record: part.state, elements, range: 0..elements, weights };
                let outcome = recipe.apply(*isa, &step, tile, gradient, Origin::default())?;
                ensure!(outcome == Outcome::Updated, "the update diverged");
                Ok(())
            },
        )?;
        Ok(())
    }

    /// The first weights of the first parameter are those that the scalar code makes in memory.
    fn check(&self) -> anyhow::Result<()> {
        let elements = self.weights[0].len().min(CHECKED);
        let values: Vec<f32> = (0..elements).map(|element| first(0, element)).collect();
        let mut weights = vec![0; elements];
        let mut record = vec![0; self.recipe.record_bytes(elements)?];
        let range = 0..elements;
        let tile = Tile {
            record: &mut record,
            elements,
            range: range.clone(),
            weights: Weights::Bf16(&mut weights),
        };
        let outcome = self.recipe.initialize(Isa::Scalar, tile, Gradient::F32(&values), Origin::default())?;
        ensure!(outcome == Outcome::Updated, "the first weights are finite");
        for number in 1..=self.steps {
            let tile = Tile {
                record: &mut record,
                elements,
                range: range.clone(),
                weights: Weights::Bf16(&mut weights),
            };
            let gradient = Gradient::Bf16(&self.gradients[0][..elements]);
            let step = adamw_step(number);
            let outcome = self.recipe.apply(Isa::Scalar, &step, tile, gradient, Origin::default())?;
            ensure!(outcome == Outcome::Updated, "the update diverged");
        }
        ensure!(weights == self.weights[0][..elements], "steps on storage and in memory differ");
        Ok(())
    }
}

impl InMemory {
    fn new(model: &Model, elements: usize) -> anyhow::Result<Self> {
        let record = vec![0; model.recipe.record_bytes(elements)?];
        let gradients: Vec<u16> = model.gradients.iter().flatten().copied().take(elements).collect();
        Ok(Self { record, weights: vec![0; gradients.len()], gradients })
    }

    /// One update, in seconds.
    fn update(&mut self, model: &Model) -> anyhow::Result<f64> {
        let Self { record, weights, gradients } = self;
        let elements = weights.len();
        let started = Instant::now();
        let tile = Tile { record, elements, range: 0..elements, weights: Weights::Bf16(weights) };
        let gradients = Gradient::Bf16(gradients);
        let outcome = model.recipe.apply(model.isa, &adamw_step(1), tile, gradients, Origin::default())?;
        ensure!(outcome == Outcome::Updated, "the update diverged");
        Ok(started.elapsed().as_secs_f64())
    }
}

fn adamw_step(number: u64) -> Step {
    Step::AdamW(AdamWStep::new(&AdamWConfig::default(), 1e-3, 0.1, number, 1.0))
}

/// Numbers that differ from element to element, of the sizes that weights and gradients have.
fn first(parameter: usize, element: usize) -> f32 {
    scattered(element.wrapping_mul(0x9e37_79b1).wrapping_add(parameter)) * 0.05
}

fn gradient(parameter: usize, element: usize) -> f32 {
    scattered(element.wrapping_mul(0x85eb_ca6b).wrapping_add(7 * parameter)) * 1e-3
}

/// From -1 up to 1.
fn scattered(number: usize) -> f32 {
    let mixed = (number as u32 ^ (number as u32 >> 15)).wrapping_mul(0x2c1b_3c6d);
    (mixed >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Bytes that the process has read from storage and written to it, as the system counts.
fn moved_by_process() -> anyhow::Result<(u64, u64)> {
    let path = PathBuf::from("/proc/self/io");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|number| number.trim().parse().ok()).with_context(|| format!("no {name} there"))
    };
    Ok((number("read_bytes:")?, number("write_bytes:")?))
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
        table.line("step", seconds(self.step_seconds));
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
