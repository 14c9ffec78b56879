//! `overspill bench adam`: the fused AdamW pass beside a STREAM triad on the same memory.
//!
//! AdamW reads four arrays and writes three: 28 bytes per parameter. The triad `a = b + s·c` reads two and writes
//! one, and the line that is written is read first: 16 bytes per element really move.

use std::time::Instant;

use anyhow::{Context, ensure};
use overspill_io::{Block, BlockClass, Pool};
use overspill_optim::{AdamWConfig, AdamWStep, Isa, adamw, triad};
use serde::Serialize;

use super::pairs::Pairs;
use crate::args::BenchAdamArguments;
use crate::output::{self, JsonFile};
use crate::table::{Table, thousands};

/// What the bench found. Rates are 10⁹ bytes per second.
#[derive(Debug, Serialize)]
struct Report {
    parameters: usize,
    isa: String,
    threads: usize,
    gbps: f64,
    triad_gbps: f64,
    ratio_to_triad: f64,
    pairs: usize,
}

/// Bytes that move per parameter and per element of the triad.
const ADAMW_BYTES: f64 = 28.0;
const TRIAD_BYTES: f64 = 16.0;

/// Elements whose update is checked against the scalar reference.
const CHECKED: usize = 4096;

/// `param`, `grad`, `exp_avg`, `exp_avg_sq`.
struct Arrays {
    blocks: [Block; 4],
    isa: Isa,
    step: u64,
}

pub(crate) fn run(arguments: &BenchAdamArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let mut arrays = Arrays::new(arguments.parameters)?;
    arrays.check()?;
    let pairs = Pairs::measure(arguments.pairs, &mut arrays, Arrays::adamw_gbps, Arrays::triad_gbps)?;
    let report = Report {
        parameters: arguments.parameters,
        isa: arrays.isa.to_string(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        gbps: pairs.ours(),
        triad_gbps: pairs.theirs(),
        ratio_to_triad: pairs.ratio(),
        pairs: pairs.count(),
    };
    let mut table = Table::default();
    table.line("parameters", thousands(report.parameters as u64));
    table.line("instructions", format!("{}, {} threads", report.isa, report.threads));
    table.line("AdamW (28 B per parameter)", format!("{:.1} GB/s", report.gbps));
    table.line("triad (16 B per element)", format!("{:.1} GB/s", report.triad_gbps));
    table.line("ratio", format!("{:.2} (median of {} pairs)", report.ratio_to_triad, report.pairs));
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&table)
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
        Ok(Self { blocks: [param?, grad?, exp_avg?, exp_avg_sq?], isa: Isa::detect(), step: 0 })
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
        Ok(elements as f64 * ADAMW_BYTES / seconds / 1e9)
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

fn floats(block: &mut Block) -> &mut [f32] {
    bytemuck::cast_slice_mut(block)
}
