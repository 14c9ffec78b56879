//! `overspill bench io`: the engine beside fio on the same files, in turns.
//!
//! Both keep 32 blocks in motion, direct, through io_uring, from memory on huge pages. Files are written once before
//! anything is measured, because the first write of an extent is slower on every file system; only the cell of first
//! writes has fresh files, for either side. Opening files and making memory is in neither side's time. What else the
//! one side does before it is measured, such as writing what its reads will be compared with, the other does too.
//!
//! Our side looks at both ends of every block that it reads, in its time. After the last pair, which our side ends, all
//! files are read once more and every byte is looked at.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::ensure;
use clap::ValueEnum;
use overspill_io::EngineConfig;
use overspill_train::{ByteSize, check_stop};
use serde::Serialize;

use super::cells::{BLOCK_BYTES, Cell, TILE_BYTES, Traffic};
use super::fio::{Fio, Job};
use super::pairs::Pairs;
use crate::args::BenchIoArguments;
use crate::interrupt;
use crate::motion::driver::{Drivers, ProcessorTime};
use crate::motion::files::FileSet;
use crate::motion::mover::{Look, Moved, Mover};
use crate::output::{self, JsonFile};
use crate::progress::Steps;
use crate::table::Table;

/// What was found for one cell. Rates are 10⁹ bytes per second; medians over the pairs.
#[derive(Debug, Serialize)]
struct Found {
    name: &'static str,
    files: usize,
    file_bytes: u64,
    block_bytes: usize,
    ours_gbps: f64,
    fio_gbps: Option<f64>,
    /// Median of the ratios of neighbors.
    ratio_to_fio: Option<f64>,
    pairs: usize,
    /// Processor time of the engine's driver thread in user mode, in percent of one core per 10⁹ bytes per second.
    driver_user_cpu_percent_per_gbps: f64,
    /// The same in the kernel.
    driver_system_cpu_percent_per_gbps: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    cells: Vec<Found>,
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

pub(crate) fn run(arguments: &BenchIoArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let bench = Bench::new(arguments)?;
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

struct Bench<'a> {
    arguments: &'a BenchIoArguments,
    cells: &'a [Cell],
    config: EngineConfig,
    mover: Mover,
    drivers: Drivers,
    fio: Option<Fio>,
    stop: Arc<AtomicBool>,
}

impl<'a> Bench<'a> {
    fn new(arguments: &'a BenchIoArguments) -> anyhow::Result<Self> {
        ensure!(arguments.dir.is_dir(), "{} is not a directory", arguments.dir.display());
        ensure!(
            arguments.size.0 >= BLOCK_BYTES as u64,
            "--size {} is less than one block of {}",
            arguments.size,
            ByteSize(BLOCK_BYTES as u64)
        );
        let stop = interrupt::stop_flag()?;
        let config =
            EngineConfig { backend: arguments.backend, chunk_bytes: BLOCK_BYTES, ..EngineConfig::default() };
        let mover = Mover::start(config.clone(), &[BLOCK_BYTES, TILE_BYTES], stop.clone())?;
        mover.say_notes();
        let drivers = Drivers::find()?;
        let cells = if arguments.cells.is_empty() { Cell::value_variants() } else { &arguments.cells };
        Ok(Self { arguments, cells, config, mover, drivers, fio: Fio::find(), stop })
    }

    fn run(&self, pairs: usize) -> anyhow::Result<Report> {
        let progress = Steps::new(self.cells.len() * pairs, std::io::stderr().is_terminal());
        let cells =
            self.cells.iter().map(|&cell| self.cell(cell, pairs, &progress)).collect::<Result<_, _>>();
        progress.finish();
        let report = self.mover.engine().report();
        Ok(Report {
            cells: cells?,
            file_bytes: self.arguments.size.0,
            block_bytes: BLOCK_BYTES,
            queue_depth: self.config.queue_depth,
            backend: report.backend.to_string(),
            degraded_reason: report.degraded,
            direct: true,
            huge_page_bytes: self.mover.pool().report().huge_page_bytes as u64,
            fio_version: self.fio.as_ref().map(|fio| fio.version().to_owned()),
            fio_huge_pages: self.fio.as_ref().map(Fio::has_huge_pages),
        })
    }

    fn cell(&self, cell: Cell, pairs: usize, progress: &Steps) -> anyhow::Result<Found> {
        let shape = cell.shape(self.arguments.size.0);
        let stem = format!("overspill-bench-{}", std::process::id());
        let set = FileSet::create(self.mover.engine(), &self.arguments.dir, stem, shape)?;
        let mut scene = Scene {
            bench: self,
            cell,
            set,
            pass: 0,
            moved: Moved::default(),
            used: ProcessorTime::default(),
        };
        self.mover.fill(&mut scene.set)?;
        progress.say(cell.name());
        let measured = Pairs::measure(
            pairs,
            &mut scene,
            |scene| {
                let ours = scene.ours();
                progress.advance();
                ours
            },
            Scene::theirs,
        )?;
        self.mover.check(&mut scene.set)?;
        let per_gigabyte = |seconds: f64| 100.0 * seconds / (scene.moved.bytes as f64 / 1e9);
        let has_fio = self.fio.is_some();
        Ok(Found {
            name: cell.name(),
            files: shape.files,
            file_bytes: shape.file_bytes(),
            block_bytes: shape.block_bytes,
            ours_gbps: measured.ours(),
            fio_gbps: has_fio.then(|| measured.theirs()),
            ratio_to_fio: has_fio.then(|| measured.ratio()),
            pairs: measured.count(),
            driver_user_cpu_percent_per_gbps: per_gigabyte(scene.used.user),
            driver_system_cpu_percent_per_gbps: per_gigabyte(scene.used.system),
        })
    }
}

/// One cell while it is measured.
struct Scene<'a> {
    bench: &'a Bench<'a>,
    cell: Cell,
    set: FileSet,
    /// How often our side has moved everything.
    pass: u64,
    /// Everything our side has moved.
    moved: Moved,
    /// What the driver thread has used for that.
    used: ProcessorTime,
}

impl Scene<'_> {
    /// Makes both sides find the same: fresh files for first writes, blocks that we know for mixed traffic.
    fn prepare(&mut self) -> anyhow::Result<()> {
        match (self.cell, self.cell.traffic()) {
            (Cell::FirstWrite, _) => self.set.renew(self.bench.mover.engine()),
            (_, Traffic::Mixed) => self.bench.mover.fill(&mut self.set),
            _ => Ok(()),
        }
    }

    fn ours(&mut self) -> anyhow::Result<f64> {
        self.prepare()?;
        let mut moved = Moved::default();
        for _ in 0..self.cell.rounds() {
            self.pass += 1;
            let steps = self.cell.traffic().steps(self.set.shape().blocks(), self.pass);
            let before = self.bench.drivers.used()?;
            moved += self.bench.mover.run(&mut self.set, steps.into_iter(), Look::Ends)?;
            self.used.add(before, self.bench.drivers.used()?);
        }
        self.moved += moved;
        Ok(moved.gbps())
    }

    fn theirs(&mut self) -> anyhow::Result<f64> {
        let Some(fio) = &self.bench.fio else { return Ok(f64::NAN) };
        self.prepare()?;
        let job = Job { files: &self.set, traffic: self.cell.traffic(), rounds: self.cell.rounds() };
        let gbps = fio.gbps(&job);
        // Ctrl-C ends fio too; that is not fio's fault.
        check_stop(&self.bench.stop)?;
        gbps
    }
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::default();
        let gbps = |rate: f64| format!("{rate:.2} GB/s");
        let percent = |percent: f64| format!("{percent:.1} %");
        table.row(["", "overspill", "fio", "ratio", "driver: user", "system"].map(str::to_owned));
        for cell in &self.cells {
            table.row([
                cell.name.to_owned(),
                gbps(cell.ours_gbps),
                cell.fio_gbps.map_or_else(|| "–".to_owned(), gbps),
                cell.ratio_to_fio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}")),
                percent(cell.driver_user_cpu_percent_per_gbps),
                percent(cell.driver_system_cpu_percent_per_gbps),
            ]);
        }
        table
    }
}
