//! `overspill bench io`: the engine beside fio on the same file, in turns.
//!
//! Both move one file of 1 MiB blocks at depth 32, direct, through io_uring, from memory on huge pages. The file is
//! written once before anything is measured, because the first write of an extent is slower on every file system.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{bail, ensure};
use overspill_io::{Block, BlockClass, Engine, EngineConfig, File, Pool, Priority, Ticket};
use overspill_train::{ByteSize, check_stop};
use serde::Serialize;

use super::fio::{Fio, Workload};
use super::pairs::Pairs;
use crate::args::BenchIoArguments;
use crate::interrupt;
use crate::output::{self, JsonFile};
use crate::table::Table;

/// One kind of traffic. Rates are 10⁹ bytes per second; medians over the pairs.
#[derive(Debug, Serialize)]
struct Cell {
    name: &'static str,
    ours_gbps: f64,
    fio_gbps: Option<f64>,
    ratio_to_fio: Option<f64>,
    pairs: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    cells: Vec<Cell>,
    file_bytes: u64,
    block_bytes: usize,
    queue_depth: usize,
    backend: String,
    degraded_reason: Option<String>,
    direct: bool,
    huge_page_bytes: u64,
    fio_version: Option<String>,
    fio_huge_pages: Option<bool>,
}

const BLOCK_BYTES: usize = 1 << 20;

/// As many as fio circulates: more memory in motion falls out of the cache and slows either side down.
const BLOCKS: usize = 32;

pub(crate) fn run(arguments: &BenchIoArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let mut bench = Bench::new(arguments)?;
    let report = bench.run(arguments.pairs)?;
    match (&report.fio_version, report.fio_huge_pages) {
        (None, _) => output::say(&format!("note: {}", Fio::INSTALL)),
        (_, Some(false)) => output::say(
            "note: fio ran on 4 KiB pages, which makes it slower than it is; run as root, or set vm.nr_hugepages=64",
        ),
        _ => {}
    }
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&report.table())
}

/// The file is removed when this is dropped.
struct Bench {
    file: File,
    path: PathBuf,
    blocks: usize,
    config: EngineConfig,
    engine: Engine,
    pool: Pool,
    fio: Option<Fio>,
    stop: Arc<AtomicBool>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
    }
}

impl Bench {
    fn new(arguments: &BenchIoArguments) -> anyhow::Result<Self> {
        ensure!(arguments.dir.is_dir(), "{} is not a directory", arguments.dir.display());
        let blocks = usize::try_from(arguments.size.0).unwrap_or(usize::MAX) / BLOCK_BYTES;
        ensure!(
            blocks > 0,
            "--size {} is less than one block of {}",
            arguments.size,
            ByteSize(BLOCK_BYTES as u64)
        );
        let stop = interrupt::stop_flag()?;
        let pool = Pool::new(&[BlockClass { name: "bench", block_bytes: BLOCK_BYTES, count: BLOCKS }])?;
        let config =
            EngineConfig { backend: arguments.backend, chunk_bytes: BLOCK_BYTES, ..EngineConfig::default() };
        let engine = Engine::start(config.clone(), &pool)?;
        let report = engine.report();
        if let Some(reason) = report.degraded {
            bail!("the engine is degraded, and its figures would mislead: {reason}");
        }
        for note in report.notes {
            output::say(&format!("note: {note}"));
        }
        let path = arguments.dir.join(format!("overspill-bench-{}", std::process::id()));
        let file = engine.create(&path)?;
        if let Some(reason) = file.note() {
            drop(std::fs::remove_file(&path));
            bail!("{} is not written directly, and the figures would mislead: {reason}", path.display());
        }
        let bench = Self { file, path, blocks, config, engine, pool, fio: Fio::find(), stop };
        bench.file.allocate(bench.bytes())?;
        Ok(bench)
    }

    fn run(&mut self, pairs: usize) -> anyhow::Result<Report> {
        self.write_gbps()?;
        let write = self.cell("overwrite", pairs, Self::write_gbps, Workload::Write)?;
        // fio has written bytes of its own; reads are checked against ours.
        self.write_gbps()?;
        let read = self.cell("read", pairs, Self::read_gbps, Workload::Read)?;
        let report = self.engine.report();
        Ok(Report {
            cells: vec![read, write],
            file_bytes: self.bytes(),
            block_bytes: BLOCK_BYTES,
            queue_depth: self.config.queue_depth,
            backend: report.backend.to_string(),
            degraded_reason: report.degraded,
            direct: self.file.direct(),
            huge_page_bytes: self.pool.report().huge_page_bytes as u64,
            fio_version: self.fio.as_ref().map(|fio| fio.version().to_owned()),
            fio_huge_pages: self.fio.as_ref().map(Fio::has_huge_pages),
        })
    }

    fn cell(
        &mut self,
        name: &'static str,
        pairs: usize,
        ours: fn(&mut Self) -> anyhow::Result<f64>,
        workload: Workload,
    ) -> anyhow::Result<Cell> {
        let has_fio = self.fio.is_some();
        let measured = Pairs::measure(pairs, self, ours, |bench| match &bench.fio {
            Some(fio) => {
                let gbps = fio.gbps(&bench.path, bench.bytes(), workload);
                // Ctrl-C ends fio too; that is not fio's fault.
                check_stop(&bench.stop)?;
                gbps
            }
            None => Ok(f64::NAN),
        })?;
        Ok(Cell {
            name,
            ours_gbps: measured.ours(),
            fio_gbps: has_fio.then(|| measured.theirs()),
            ratio_to_fio: has_fio.then(|| measured.ratio()),
            pairs: measured.count(),
        })
    }

    fn bytes(&self) -> u64 {
        (self.blocks * BLOCK_BYTES) as u64
    }

    /// Writes the whole file once, each block with a pattern of its own; returns the rate. The pool paces it: a block
    /// is free again the moment it is written.
    fn write_gbps(&mut self) -> anyhow::Result<f64> {
        let mut tickets = Vec::with_capacity(self.blocks);
        let started = Instant::now();
        for index in 0..self.blocks {
            check_stop(&self.stop)?;
            let mut block = self.pool.lease(BLOCK_BYTES)?;
            stamp(&mut block, index);
            tickets.push(self.engine.write_behind(&self.file, offset(index), block, Priority::Urgent));
        }
        for ticket in tickets {
            ticket.wait().map_err(|failed| failed.error)?;
        }
        Ok(self.rate(started))
    }

    /// Reads the whole file once and looks at every block; returns the rate.
    fn read_gbps(&mut self) -> anyhow::Result<f64> {
        let mut in_flight: VecDeque<(usize, Ticket)> = VecDeque::with_capacity(BLOCKS);
        let land = |(index, ticket): (usize, Ticket)| -> anyhow::Result<Block> {
            let block = ticket.wait().map_err(|failed| failed.error)?;
            check(&self.path, index, &block)?;
            Ok(block)
        };
        let started = Instant::now();
        for index in 0..self.blocks {
            check_stop(&self.stop)?;
            let block = match in_flight.pop_front_if(|_| index >= BLOCKS) {
                Some(oldest) => land(oldest)?,
                None => self.pool.lease(BLOCK_BYTES)?,
            };
            in_flight
                .push_back((index, self.engine.read(&self.file, offset(index), block, Priority::Urgent)));
        }
        for last in in_flight {
            land(last)?;
        }
        Ok(self.rate(started))
    }

    fn rate(&self, started: Instant) -> f64 {
        self.bytes() as f64 / started.elapsed().as_secs_f64() / 1e9
    }
}

fn offset(index: usize) -> u64 {
    (index * BLOCK_BYTES) as u64
}

/// Marks both ends of a block with its index.
fn stamp(block: &mut Block, index: usize) {
    let mark = mark(index);
    let end = block.len() - mark.len();
    block[..mark.len()].copy_from_slice(&mark);
    block[end..].copy_from_slice(&mark);
}

fn check(path: &Path, index: usize, block: &Block) -> anyhow::Result<()> {
    let mark = mark(index);
    let whole = block.starts_with(&mark) && block.ends_with(&mark);
    ensure!(whole, "block {index} of {} is not what was written", path.display());
    Ok(())
}

fn mark(index: usize) -> [u8; 8] {
    (index as u64 ^ 0x6f76_6572_7370_696c).to_le_bytes()
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::default();
        let gbps = |rate: f64| format!("{rate:.2} GB/s");
        table.row(["", "overspill", "fio", "ratio"].map(str::to_owned));
        for cell in &self.cells {
            table.row([
                cell.name.to_owned(),
                gbps(cell.ours_gbps),
                cell.fio_gbps.map_or_else(|| "–".to_owned(), gbps),
                cell.ratio_to_fio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}")),
            ]);
        }
        table
    }
}
