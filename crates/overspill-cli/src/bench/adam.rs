//! `overspill bench adam`: the fused AdamW pass in its two forms, each beside a STREAM triad on the same memory.
//!
//! With fp32 weights the pass reads four arrays of `f32` and writes three: 28 bytes per parameter. With bf16 weights and
//! remainders it reads a bf16 gradient, a bf16 weight and a record of 10 bytes, and writes all but the gradient: 26 bytes.
//! The triad `a = b + s·c` reads two arrays and writes one, and the line that is written is read first: 16 bytes per element
//! really move.

use std::time::Instant;

use anyhow::{Context, ensure};
use overspill_io::{Block, BlockClass, Pool};
use overspill_optim::{
    AdamWConfig, AdamWStep, Gradient, Isa, MomentFormat, Origin, Outcome, Recipe, Rule, Step, Tile,
    WeightFormat, Weights, adamw, triad,
};
use serde::Serialize;

use super::pairs::Pairs;
use crate::args::BenchAdamArguments;
use crate::output::{self, JsonFile};
use crate::table::{Table, thousands};

/// What the bench found. Rates are 10⁹ bytes per second; those outside of the cells are of the fp32 form.
#[derive(Debug, Serialize)]
struct Report {
    parameters: usize,
    isa: String,
    threads: usize,
    gbps: f64,
    triad_gbps: f64,
    ratio_to_triad: f64,
    pairs: usize,
    cells: [Cell; 2],
}

/// One form of the pass beside the triad.
#[derive(Debug, Serialize)]
struct Cell {
    name: &'static str,
    bytes_per_parameter: f64,
    gbps: f64,
    triad_gbps: f64,
    ratio_to_triad: f64,
    pairs: usize,
}

/// Bytes that move per parameter and per element of the triad.
const FP32_BYTES: f64 = 28.0;
const REMAINDER_BYTES: f64 = 26.0;
const TRIAD_BYTES: f64 = 16.0;

/// Elements whose update is checked against the scalar reference.
const CHECKED: usize = 4096;

/// The arrays of both forms, and which instructions update them.
struct Arrays {
    /// `param`, `grad`, `exp_avg`, `exp_avg_sq`.
    blocks: [Block; 4],
    remainder: Remainder,
    isa: Isa,
    step: u64,
}

/// The state of the form with bf16 weights and remainders.
struct Remainder {
    elements: usize,
    record: Block,
    weights: Block,
    gradient: Block,
}

pub(crate) fn run(arguments: &BenchAdamArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let mut arrays = Arrays::new(arguments.parameters)?;
    arrays.check()?;
    let pairs = Pairs::measure(arguments.pairs, &mut arrays, Arrays::adamw_gbps, Arrays::triad_gbps)?;
    let fp32 = Cell::new("fp32", FP32_BYTES, &pairs);
    let pairs = Pairs::measure(arguments.pairs, &mut arrays, Arrays::remainder_gbps, Arrays::triad_gbps)?;
    let remainder = Cell::new("bf16_with_remainder", REMAINDER_BYTES, &pairs);
    let report = Report {
        parameters: arguments.parameters,
        isa: arrays.isa.to_string(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        gbps: fp32.gbps,
        triad_gbps: fp32.triad_gbps,
        ratio_to_triad: fp32.ratio_to_triad,
        pairs: fp32.pairs,
        cells: [fp32, remainder],
    };
    let mut table = Table::default();
    table.line("parameters", thousands(report.parameters as u64));
    table.line("instructions", format!("{}, {} threads", report.isa, report.threads));
    for cell in &report.cells {
        let form = match cell.name {
            "fp32" => "AdamW, fp32 (28 B per parameter)",
            _ => "AdamW, bf16 and remainder (26 B)",
        };
        table.line(form, format!("{:.1} GB/s", cell.gbps));
        table.line("triad beside it (16 B per element)", format!("{:.1} GB/s", cell.triad_gbps));
        table.line("ratio", format!("{:.2} (median of {} pairs)", cell.ratio_to_triad, cell.pairs));
    }
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&table)
}

impl Cell {
    fn new(name: &'static str, bytes_per_parameter: f64, pairs: &Pairs) -> Self {
        Self {
            name,
            bytes_per_parameter,
            gbps: pairs.ours(),
            triad_gbps: pairs.theirs(),
            ratio_to_triad: pairs.ratio(),
            pairs: pairs.count(),
        }
    }
}

impl Arrays {
    fn new(parameters: usize) -> anyhow::Result<Self> {
        let bytes = parameters.checked_mul(size_of::<f32>()).context("too many parameters")?;
        let pool =
            Pool::new(&[BlockClass { name: "array", block_bytes: bytes.next_multiple_of(4096), count: 4 }])?;
        let mut arrays = [0, 1, 2, 3].map(|_| pool.lease(bytes));
        for (value, array) in [0.5_f32, 0.1, 0.01, 0.02].into_iter().zip(&mut arrays) {
            if let Ok(block) = array {
                bytemuck::cast_slice_mut(block).fill(value);
            }
        }
        let [param, grad, exp_avg, exp_avg_sq] = arrays;
        let remainder = Remainder::new(parameters)?;
        Ok(Self { blocks: [param?, grad?, exp_avg?, exp_avg_sq?], remainder, isa: Isa::detect(), step: 0 })
    }

    /// One update of a part with the chosen instructions equals one with scalar code.
    fn check(&mut self) -> anyhow::Result<()> {
        let values = |i: usize| -> Vec<f32> {
            (0..CHECKED).map(|n| ((n * 37 + i * 101) % 1000) as f32 * 1e-3).collect()
        };
        let step = AdamWStep::new(&AdamWConfig::default(), 1e-3, 0.1, 3, 0.5);
        let update = |isa| -> anyhow::Result<[Vec<f32>; 3]> {
            let (mut param, mut exp_avg, mut exp_avg_sq) = (values(0), values(2), values(3));
            adamw(isa, &step, &mut param, &values(1), &mut exp_avg, &mut exp_avg_sq)?;
            Ok([param, exp_avg, exp_avg_sq])
        };
        ensure!(update(self.isa)? == update(Isa::Scalar)?, "{} and scalar updates differ", self.isa);
        Ok(())
    }

    fn adamw_gbps(&mut self) -> anyhow::Result<f64> {
        self.step += 1;
        let step = AdamWStep::new(&AdamWConfig::default(), 1e-4, 0.1, self.step, 1.0);
        let [param, grad, exp_avg, exp_avg_sq] = self.blocks.each_mut().map(floats);
        let elements = param.len();
        let started = Instant::now();
        adamw(self.isa, &step, param, grad, exp_avg, exp_avg_sq)?;
        let seconds = started.elapsed().as_secs_f64();
        ensure!(
            param.iter().step_by(elements.div_ceil(CHECKED)).all(|p| p.is_finite()),
            "the update diverged"
        );
        Ok(elements as f64 * FP32_BYTES / seconds / 1e9)
    }

    fn remainder_gbps(&mut self) -> anyhow::Result<f64> {
        self.step += 1;
        let step = Step::AdamW(AdamWStep::new(&AdamWConfig::default(), 1e-4, 0.1, self.step, 1.0));
        let recipe = remainder_recipe()?;
        let elements = self.remainder.elements;
        let Remainder { record, weights, gradient, .. } = &mut self.remainder;
        let weights: &mut [u16] = bytemuck::cast_slice_mut(weights);
        let gradient: &[u16] = bytemuck::cast_slice(gradient);
        let tile = Tile { record, elements, range: 0..elements, weights: Weights::Bf16(weights) };
        let gradient = Gradient::Bf16(gradient);
        let started = Instant::now();
        let outcome = recipe.apply(self.isa, &step, tile, gradient, Origin::default())?;
        let seconds = started.elapsed().as_secs_f64();
        ensure!(outcome == Outcome::Updated, "the update diverged");
        Ok(elements as f64 * REMAINDER_BYTES / seconds / 1e9)
    }

    fn triad_gbps(&mut self) -> anyhow::Result<f64> {
        let [a, b, c, _] = self.blocks.each_mut().map(floats);
        let started = Instant::now();
        triad(a, b, c, 0.5);
        let seconds = started.elapsed().as_secs_f64();
        ensure!(
            a.first() == b.first().zip(c.first()).map(|(b, c)| b + 0.5 * c).as_ref(),
            "the triad is wrong"
        );
        Ok(a.len() as f64 * TRIAD_BYTES / seconds / 1e9)
    }
}

impl Remainder {
    fn new(elements: usize) -> anyhow::Result<Self> {
        let recipe = remainder_recipe()?;
        let record_bytes = recipe.record_bytes(elements)?;
        let half_bytes = elements.checked_mul(size_of::<u16>()).context("too many parameters")?;
        let class =
            |name, bytes: usize, count| BlockClass { name, block_bytes: bytes.next_multiple_of(4096), count };
        let pool = Pool::new(&[class("record", record_bytes, 1), class("half", half_bytes, 2)])?;
        let mut state = Self {
            elements,
            record: pool.lease(record_bytes)?,
            weights: pool.lease(half_bytes)?,
            gradient: pool.lease(half_bytes)?,
        };
        let gradient: &mut [u16] = bytemuck::cast_slice_mut(&mut state.gradient);
        // 0.1, and the parameters 0.5 that the record and the weights begin with.
        gradient.fill(0x3dcd);
        let values: Vec<u16> = vec![0x3f00; elements];
        let weights = Weights::Bf16(bytemuck::cast_slice_mut(&mut state.weights));
        let tile = Tile { record: &mut state.record, elements, range: 0..elements, weights };
        let outcome = recipe.initialize(Isa::detect(), tile, Gradient::Bf16(&values), Origin::default())?;
        ensure!(outcome == Outcome::Updated, "the first parameters are not finite");
        Ok(state)
    }
}

fn remainder_recipe() -> anyhow::Result<Recipe> {
    let rule = Rule::AdamW { amsgrad: false };
    Ok(Recipe::new(rule, WeightFormat::Bf16WithRemainder, MomentFormat::F32)?)
}

fn floats(block: &mut Block) -> &mut [f32] {
    bytemuck::cast_slice_mut(block)
}
