//! Shares of the state that stay in memory, and what a step moves and takes with each.
//!
//! The shares are measured one after the other, up and down again, so that what changes meanwhile changes both ends of
//! the scale. Tiles and depth are the same for all: those of the plan in which nothing stays. What moves must be what does
//! not stay, and nothing when all does; if it is not, there is no result.

use std::io::IsTerminal;

use anyhow::ensure;
use overspill_swap::Durability;
use overspill_swap::optimizer::{OptimizerPlan, ParameterSpec, PlanOptions};
use overspill_train::{ByteSize, check_stop};
use serde::Serialize;

use super::model::Model;
use super::subject::{Subject, name, options};
use crate::args::{BenchStepArguments, DurabilityChoice};
use crate::bench::pairs::median;
use crate::interrupt;
use crate::progress::Steps;
use crate::table::{Table, thousands};

/// What moves may differ from what should by this share.
const TOLERANCE: f64 = 0.02;

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    parameters: usize,
    state_bytes: usize,
    tile_bytes: usize,
    depth: usize,
    durability: &'static str,
    /// Of each share.
    steps: usize,
    backend: String,
    shares: Vec<Share>,
}

#[derive(Clone, Debug, Serialize)]
struct Share {
    /// Of the bytes of all tiles, those of the tiles that stay: as many as fit the share that was asked for.
    resident_fraction: f64,
    resident_bytes: usize,
    /// What the plan spends.
    memory_planned_bytes: usize,
    /// Read and written, as the system counted them for the process; the median of the steps.
    bytes_per_parameter_step: f64,
    step_seconds_median: f64,
    #[serde(skip)]
    seconds: Vec<f64>,
}

/// Measures every share that is asked for.
pub(super) fn run(arguments: &BenchStepArguments) -> anyhow::Result<Report> {
    let stop = interrupt::stop_flag()?;
    let durability = match arguments.durability {
        DurabilityChoice::None => Durability::None,
        DurabilityChoice::Step => Durability::Step,
    };
    let model = Model::new(arguments.parameters)?;
    let specs = model.specs();
    let moving = OptimizerPlan::new(&specs, &options(arguments))?;
    let percents = &arguments.resident;
    let progress = Steps::new(2 * percents.len(), std::io::stderr().is_terminal());
    let (mut shares, mut backend) = (vec![None; percents.len()], String::new());
    for index in (0..percents.len()).chain((0..percents.len()).rev()) {
        progress.say(&format!("{} % in memory", percents[index]));
        let plan = keeping(&specs, &moving, percents[index])?;
        let mut subject = Subject::new(arguments, model.clone(), plan, durability)?;
        subject.prepare()?;
        for _ in 0..arguments.pairs {
            check_stop(&stop)?;
            subject.step()?;
        }
        subject.model.check()?;
        backend = subject.engine.report().backend.to_string();
        let seconds = shares[index].take().map(|share: Share| share.seconds).unwrap_or_default();
        shares[index] = Some(Share::of(&subject, durability, seconds)?);
        progress.advance();
    }
    progress.finish();
    Ok(Report {
        parameters: model.parameters(),
        state_bytes: moving.state_bytes(),
        tile_bytes: moving.tile_bytes(),
        depth: moving.depth(),
        durability: name(durability),
        steps: 2 * arguments.pairs,
        backend,
        shares: shares.into_iter().flatten().collect(),
    })
}

/// The plan that keeps so many hundredths of the state, in tiles and with a pipeline like those of `moving`.
fn keeping(specs: &[ParameterSpec], moving: &OptimizerPlan, percent: u8) -> anyhow::Result<OptimizerPlan> {
    let share = moving.state_bytes() / 100 * usize::from(percent);
    let kept_bytes_max = (percent < 100).then_some(share);
    let options = PlanOptions {
        memory_bytes: usize::MAX,
        kept_bytes_max,
        depth: Some(moving.depth()),
        tile_bytes: Some(moving.tile_bytes()),
        gradient_bytes: None,
    };
    Ok(OptimizerPlan::new(specs, &options)?)
}

impl Share {
    /// What the subject has found, and what it found `before`.
    fn of(subject: &Subject, durability: Durability, before: Vec<f64>) -> anyhow::Result<Self> {
        let plan = subject.swapper.plan();
        let (state, kept) = (plan.state_bytes() as f64, plan.kept_bytes() as f64);
        // A commit writes what stays, too.
        let expected = match durability {
            Durability::None => 2.0 * (state - kept),
            Durability::Step => 2.0 * state - kept,
        };
        let (read, written) = subject.bytes_per_parameter();
        let (moved, expected) = (read + written, expected / subject.model.parameters() as f64);
        ensure!(
            (moved - expected).abs() <= TOLERANCE * expected,
            "{moved:.3} bytes per parameter and step were moved with {:.1} % of the state in memory, and not {expected:.3}",
            100.0 * kept / state
        );
        let seconds = [before, subject.seconds.clone()].concat();
        Ok(Self {
            resident_fraction: kept / state,
            resident_bytes: plan.kept_bytes(),
            memory_planned_bytes: plan.total_bytes(),
            bytes_per_parameter_step: moved,
            step_seconds_median: median(seconds.clone()),
            seconds,
        })
    }
}

impl Report {
    pub(super) fn table(&self) -> Table {
        let mut table = Table::default();
        table.line("parameters", thousands(self.parameters as u64));
        table.line("state", ByteSize(self.state_bytes as u64));
        table.line("tiles", format!("{}, depth {}", ByteSize(self.tile_bytes as u64), self.depth));
        table.line("steps of each share", format!("{}, --durability {}", self.steps, self.durability));
        table.row(["in memory", "memory", "bytes per parameter and step", "step"].map(str::to_owned));
        for share in &self.shares {
            table.row([
                format!("{:.1} %", 100.0 * share.resident_fraction),
                ByteSize(share.memory_planned_bytes as u64).to_string(),
                format!("{:.2}", share.bytes_per_parameter_step),
                format!("{:.3} s", share.step_seconds_median),
            ]);
        }
        table
    }
}
