//! `overspill bench store`: what the store's promises cost.
//!
//! A checksum beside the sum of the same words; loading and storing through the store beside the same engine on the same
//! bytes without it; a snapshot beside a copy; and commits by the number of tensors. The two sides of each comparison
//! are measured in turns, and every byte is looked at in the end.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{bail, ensure};
use overspill_io::{BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::Durability;
use overspill_train::{ByteSize, check_stop};
use serde::Serialize;

use self::checksum::Memory;
use self::state::{IN_MOTION, State};
use super::pairs::{Pairs, median};
use crate::args::BenchStoreArguments;
use crate::interrupt;
use crate::motion::files::{FileSet, Shape};
use crate::output::{self, JsonFile};
use crate::progress::Steps;
use crate::table::{Table, thousands};

mod checksum;
mod state;

/// Bytes of a tensor, as long as the longest tile of a run, and of one of many.
const TENSOR_BYTES: usize = 4 << 20;
const SMALL_BYTES: usize = 4096;

/// Numbers of tensors that are committed.
const COMMITTED: [usize; 3] = [100, 1_000, 10_000];

/// Tensors that have changed when a commit is measured.
const TOUCHED: usize = 16;

/// Sides of comparisons and numbers of tensors, each of which is a step of the progress.
const STAGES: usize = 1 + 3 + COMMITTED.len();

/// The store beside the engine alone. Rates are 10⁹ bytes per second; medians over the pairs.
#[derive(Debug, Serialize)]
struct Beside {
    store_gbps: f64,
    engine_gbps: f64,
    /// Share of the time that is the store's, by the median of the ratios of neighbors; below zero is noise.
    store_share: f64,
    /// Share of the time that one thread computes checksums in, whether or not something else goes on meanwhile.
    checksum_share: f64,
}

#[derive(Debug, Serialize)]
struct Snapshot {
    snapshot_seconds: f64,
    copy_seconds: f64,
    /// Median of the ratios of neighbors.
    ratio_to_copy: f64,
}

#[derive(Debug, Serialize)]
struct Commit {
    tensors: usize,
    manifest_bytes: u64,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    checksums: Vec<checksum::Found>,
    load: Beside,
    store: Beside,
    snapshot: Snapshot,
    commits: Vec<Commit>,
    state_bytes: u64,
    tensor_bytes: usize,
    pairs: usize,
    backend: String,
}

pub(crate) fn run(arguments: &BenchStoreArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let report = Bench::new(arguments)?.run(arguments.pairs)?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&report.table())
}

struct Bench<'a> {
    arguments: &'a BenchStoreArguments,
    tensors: usize,
    engine: Engine,
    pool: Pool,
    stop: Arc<AtomicBool>,
}

impl<'a> Bench<'a> {
    fn new(arguments: &'a BenchStoreArguments) -> anyhow::Result<Self> {
        ensure!(arguments.dir.is_dir(), "{} is not a directory", arguments.dir.display());
        let tensors = usize::try_from(arguments.size.0 / TENSOR_BYTES as u64).unwrap_or(usize::MAX);
        let least = ByteSize(TENSOR_BYTES as u64);
        ensure!(tensors > 0, "--size {} is less than one tensor of {least}", arguments.size);
        let stop = interrupt::stop_flag()?;
        let class = |block_bytes| BlockClass { name: "bench", block_bytes, count: IN_MOTION };
        let pool = Pool::new(&[class(SMALL_BYTES), class(TENSOR_BYTES)])?;
        let engine =
            Engine::start(EngineConfig { backend: arguments.backend, ..EngineConfig::default() }, &pool)?;
        let report = engine.report();
        if let Some(reason) = report.degraded {
            bail!("the engine is degraded, and its figures would mislead: {reason}");
        }
        report.notes.iter().for_each(|note| output::say(&format!("note: {note}")));
        Ok(Self { arguments, tensors, engine, pool, stop })
    }

    fn run(&self, pairs: usize) -> anyhow::Result<Report> {
        let progress = Steps::new(STAGES, std::io::stderr().is_terminal());
        let report = self.report(pairs, &progress);
        progress.finish();
        report
    }

    fn report(&self, pairs: usize, progress: &Steps) -> anyhow::Result<Report> {
        let shape = (self.tensors, TENSOR_BYTES);
        // Overwritten in place, so that both sides move the same bytes of the disk.
        let mut state = self.state("moves", Durability::None, shape)?;
        progress.say("loads");
        let loads = Pairs::measure(pairs, &mut state, State::load, State::load_past)?;
        progress.advance();
        progress.say("stores");
        let stores = Pairs::measure(pairs, &mut state, State::save, State::save_past)?;
        state.check()?;
        progress.advance();
        progress.say("snapshots");
        state.commit()?;
        let snapshot = self.snapshot(pairs, &mut state)?;
        state.check()?;
        drop(state);
        progress.advance();
        let commit = |&tensors: &usize| {
            progress.say("commits");
            let commit = self.commit(pairs, tensors);
            progress.advance();
            commit
        };
        let commits = COMMITTED.iter().map(commit).collect::<Result<_, _>>()?;
        progress.say("checksums");
        let checksums = self.checksums(pairs)?;
        progress.advance();
        let cold = checksums.iter().find(|found| found.memory == Memory::Cold && found.threads == 1);
        let checksum_gbps = cold.map_or(f64::NAN, |found| found.checksum_gbps);
        let beside = |measured: &Pairs| Beside {
            store_gbps: measured.ours(),
            engine_gbps: measured.theirs(),
            store_share: 1.0 - measured.ratio(),
            checksum_share: measured.ours() / checksum_gbps,
        };
        Ok(Report {
            load: beside(&loads),
            store: beside(&stores),
            checksums,
            snapshot,
            commits,
            state_bytes: (self.tensors * TENSOR_BYTES) as u64,
            tensor_bytes: TENSOR_BYTES,
            pairs,
            backend: self.engine.report().backend.to_string(),
        })
    }

    /// On as much memory as the state has.
    fn checksums(&self, pairs: usize) -> anyhow::Result<Vec<checksum::Found>> {
        let bytes = self.tensors * TENSOR_BYTES;
        let pool = Pool::new(&[BlockClass { name: "checksums", block_bytes: bytes, count: 1 }])?;
        checksum::measure(&pool, bytes, pairs, &|| Ok(check_stop(&self.stop)?))
    }

    fn state(&self, name: &str, durability: Durability, shape: (usize, usize)) -> anyhow::Result<State<'_>> {
        State::create(&self.path(name), durability, shape, (&self.engine, &self.pool), &self.stop)
    }

    fn snapshot(&self, pairs: usize, state: &mut State<'_>) -> anyhow::Result<Snapshot> {
        let shape = Shape { files: 1, blocks_per_file: self.tensors, block_bytes: TENSOR_BYTES };
        let copy = FileSet::create(&self.engine, &self.arguments.dir, self.stem("copy"), shape)?;
        // The first write of a file is slower than all that follow.
        state.copy(&copy)?;
        let measured = Pairs::measure(pairs, state, |state| state.snapshot(), |state| state.copy(&copy))?;
        state.check_copy(&copy)?;
        let seconds = |gbps: f64| shape.bytes() as f64 / 1e9 / gbps;
        Ok(Snapshot {
            snapshot_seconds: seconds(measured.ours()),
            copy_seconds: seconds(measured.theirs()),
            ratio_to_copy: 1.0 / measured.ratio(),
        })
    }

    fn commit(&self, pairs: usize, tensors: usize) -> anyhow::Result<Commit> {
        let mut state = self.state("commits", Durability::Step, (tensors, SMALL_BYTES))?;
        let mut seconds = Vec::with_capacity(pairs);
        for _ in 0..pairs {
            check_stop(&self.stop)?;
            state.touch(TOUCHED)?;
            seconds.push(state.commit()?);
        }
        state.check()?;
        Ok(Commit { tensors, manifest_bytes: state.manifest_bytes()?, seconds: median(seconds) })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.arguments.dir.join(self.stem(name))
    }

    fn stem(&self, name: &str) -> String {
        format!("overspill-bench-{}-{name}", std::process::id())
    }
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::default();
        let gbps = |rate: f64| format!("{rate:.2} GB/s");
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
        table.row(["checksum (XXH3-64)", "", "sum of words", "ratio", "per GB"].map(str::to_owned));
        for found in &self.checksums {
            let memory = match found.memory {
                Memory::Warm => "in cache",
                Memory::Cold => "in memory",
            };
            let threads = if found.threads == 1 { "thread" } else { "threads" };
            table.row([
                format!("{memory}, {} {threads}", found.threads),
                gbps(found.checksum_gbps),
                gbps(found.sum_gbps),
                format!("{:.2}", found.ratio_to_sum),
                format!("{:.0} ms", found.checksum_ms_per_gb),
            ]);
        }
        let title =
            format!("{} in tensors of {}", ByteSize(self.state_bytes), ByteSize(self.tensor_bytes as u64));
        table.row([title.as_str(), "store", "engine alone", "store's", "checksums'"].map(str::to_owned));
        for (name, beside) in [("load", &self.load), ("store", &self.store)] {
            table.row([
                name.to_owned(),
                gbps(beside.store_gbps),
                gbps(beside.engine_gbps),
                percent(beside.store_share),
                percent(beside.checksum_share),
            ]);
        }
        table.row(["", "snapshot", "copy", "ratio"].map(str::to_owned));
        let Snapshot { snapshot_seconds, copy_seconds, ratio_to_copy } = self.snapshot;
        table.row(["snapshot".to_owned(), ms(snapshot_seconds), ms(copy_seconds), percent(ratio_to_copy)]);
        for commit in &self.commits {
            let name = format!("commit of {} tensors", thousands(commit.tensors as u64));
            table.row([name, ms(commit.seconds), format!("{} of manifest", ByteSize(commit.manifest_bytes))]);
        }
        table
    }
}
