//! What is measured: a model whose state is on storage, and its step until everything is there.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use overspill_io::{Engine, EngineConfig, Pool};
use overspill_swap::optimizer::{OptimizerPlan, OptimizerSwapper, PlanOptions};
use overspill_swap::{Durability, Store};

use super::model::Model;
use crate::args::BenchStepArguments;
use crate::bench::pairs::median;

/// A model with its state in a store of its own, which goes away with it.
pub(super) struct Subject {
    pub(super) model: Model,
    pub(super) swapper: OptimizerSwapper,
    pub(super) engine: Engine,
    durability: Durability,
    /// Of each step so far.
    pub(super) seconds: Vec<f64>,
    moved: Vec<Moved>,
}

/// Bytes that a process has moved from storage and to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) read: u64,
    pub(super) written: u64,
}

/// Options of the plan in which nothing stays in memory.
pub(super) fn options(arguments: &BenchStepArguments) -> PlanOptions {
    PlanOptions {
        memory_bytes: usize::try_from(arguments.memory.0).unwrap_or(usize::MAX),
        kept_bytes_max: Some(0),
        depth: arguments.depth,
        tile_bytes: arguments.tile.map(|size| usize::try_from(size.0).unwrap_or(usize::MAX)),
        gradient_bytes: None,
    }
}

impl Subject {
    /// Makes the store, and nothing in it; [`Subject::prepare`] does.
    pub(super) fn new(
        arguments: &BenchStepArguments,
        model: Model,
        plan: OptimizerPlan,
        durability: Durability,
    ) -> anyhow::Result<Self> {
        let pool = Pool::new(&plan.classes())?;
        let engine =
            Engine::start(EngineConfig { backend: arguments.backend, ..EngineConfig::default() }, &pool)?;
        if let Some(reason) = engine.report().degraded {
            bail!("the engine is degraded, and its figures would mislead: {reason}");
        }
        let name = format!("overspill-bench-step-{}-{}", name(durability), std::process::id());
        let directory = arguments.dir.join(name);
        let store = Store::create(&directory, durability, plan.storage_bytes(durability), &engine)?;
        let swapper = OptimizerSwapper::create(&model.specs(), plan, &store, &pool)?;
        Ok(Self { model, swapper, engine, durability, seconds: Vec::new(), moved: Vec::new() })
    }

    /// Writes the first state, and takes the step that is the first to read and that nobody counts.
    pub(super) fn prepare(&mut self) -> anyhow::Result<()> {
        self.model.initialize(&mut self.swapper)?;
        self.step()?;
        self.seconds.clear();
        self.moved.clear();
        Ok(())
    }

    /// One step until everything is on storage, and committed if that is what is promised; in seconds.
    pub(super) fn step(&mut self) -> anyhow::Result<f64> {
        let before = moved_by_process()?;
        let started = Instant::now();
        self.model.step(&mut self.swapper)?;
        match self.durability {
            Durability::None => self.swapper.settle()?,
            Durability::Step => self.swapper.commit(&serde_json::Value::Null)?,
        }
        let seconds = started.elapsed().as_secs_f64();
        let after = moved_by_process()?;
        self.seconds.push(seconds);
        self.moved.push(Moved { read: after.read - before.read, written: after.written - before.written });
        Ok(seconds)
    }

    /// Bytes per parameter that the system counted for the process while it stepped, read and written; medians.
    pub(super) fn bytes_per_parameter(&self) -> (f64, f64) {
        let middle = |bytes: fn(&Moved) -> u64| {
            median(self.moved.iter().map(|moved| bytes(moved) as f64).collect())
                / self.model.parameters() as f64
        };
        (middle(|moved| moved.read), middle(|moved| moved.written))
    }
}

/// What the promise is called on the command line.
pub(super) fn name(durability: Durability) -> &'static str {
    match durability {
        Durability::None => "none",
        Durability::Step => "step",
    }
}

/// Bytes that the process has read from storage and written to it, as the system counts.
fn moved_by_process() -> anyhow::Result<Moved> {
    let path = PathBuf::from("/proc/self/io");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|number| number.trim().parse().ok()).with_context(|| format!("no {name} there"))
    };
    Ok(Moved { read: number("read_bytes:")?, written: number("write_bytes:")? })
}
