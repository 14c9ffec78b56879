//! `overspill verify`: every byte that a store's generations name, compared with what was stored.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::bail;
use clap::Args;
use overspill_io::BackendChoice;
use overspill_swap::{Damage, Damaged, Examination, Findings, Generation, Scope, Verdict};
use overspill_train::{ByteSize, TrainError, path, reading};
use serde::Serialize;

use crate::inspect::kind_and_name;
use crate::interrupt;
use crate::output::{self, JsonFile};
use crate::progress::Moved;
use crate::store::{self, Reader};
use crate::table::{Table, thousands};

#[derive(Debug, Args)]
pub(crate) struct VerifyArguments {
    /// The store, or the directory that a run swaps to; of several disks, all in the order in which the run was told them
    #[arg(value_name = "DIR", required = true, num_args = 1..)]
    directories: Vec<PathBuf>,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    backend: BackendChoice,

    /// Write what was found to this file; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was found. Sizes are bytes; checksums are XXH3-64, in hexadecimal; what is not known is null.
#[derive(Debug, Serialize)]
struct Report {
    /// The store's home.
    #[serde(serialize_with = "path::lossy")]
    directory: PathBuf,
    /// All its directories that were read, the home first.
    #[serde(serialize_with = "path::lossy_each")]
    directories: Vec<PathBuf>,
    /// Whether the committed generation and all snapshots are what was stored.
    whole: bool,
    generations: Vec<VerdictReport>,
    damaged: Vec<DamagedReport>,
    /// Distinct ranges that were read.
    extent_count: usize,
    bytes_read: u64,
    elapsed_seconds: f64,
    /// What puts a whole generation in the place of the committed one, if that is damaged.
    remedy: Option<String>,
}

/// One generation. That the previous one is not whole any more is usual: nobody keeps what it names.
#[derive(Debug, Serialize)]
struct VerdictReport {
    /// `committed`, `previous` or `snapshot`.
    kind: &'static str,
    /// Name of the snapshot.
    name: Option<String>,
    /// Number of its commit.
    generation: Option<u64>,
    step: Option<u64>,
    whole: bool,
    tensor_count: usize,
    damaged_count: usize,
    /// What is wrong with it apart from its tensors.
    reason: Option<String>,
}

/// A version of a tensor that is not what was stored.
#[derive(Debug, Serialize)]
struct DamagedReport {
    tensor: String,
    /// The generations that name it, in words.
    generations: Vec<String>,
    /// The data file that it begins in.
    #[serde(serialize_with = "path::lossy")]
    file: PathBuf,
    /// Where in that file.
    offset: u64,
    length_bytes: u64,
    checksum_expected: Option<String>,
    checksum_found: Option<String>,
    /// Why it could not be read.
    error: Option<String>,
}

pub(crate) fn run(arguments: &VerifyArguments) -> anyhow::Result<()> {
    let stop = interrupt::stop_flag()?;
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let reader = Reader::start(&reading::stores_in(&arguments.directories), arguments.backend)?;
    let directories = reader.directories();
    let began = Instant::now();
    let examination = store::alone(Examination::begin(&reader.volumes))?;
    let findings = read(&examination, &reader, Scope::Everything, &stop)?;
    let report = Report::new(directories.clone(), &findings, began.elapsed().as_secs_f64());
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&report.table(&findings))?;
    if report.whole {
        return Ok(());
    }
    let is_promised = |verdict: &&Verdict| verdict.generation != Generation::Previous && !verdict.is_whole();
    let mut lost: Vec<String> = findings.verdicts.iter().filter(is_promised).map(in_words).collect();
    if !findings.verdicts.iter().any(|verdict| verdict.generation == Generation::Committed) {
        lost.push("it has no committed generation".to_owned());
    }
    let remedy = report.remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
    bail!("{} is damaged: {}{remedy}", directories[0].display(), lost.join("; "))
}

/// Reads what is in scope, with a bar.
pub(crate) fn read(
    examination: &Examination,
    reader: &Reader,
    scope: Scope<'_>,
    stop: &AtomicBool,
) -> anyhow::Result<Findings> {
    let bar = Moved::new("reading", std::io::stderr().is_terminal());
    let progress = |done, total| {
        bar.show(done, total);
        if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let findings = examination.verify(scope, reader.blocks(), progress);
    bar.finish();
    Ok(findings?.ok_or(TrainError::Interrupted)?)
}

/// What is wrong with a generation.
fn in_words(verdict: &Verdict) -> String {
    let Verdict { generation, damaged, tensors, flaw, .. } = verdict;
    match flaw {
        Some(flaw) => format!("{generation} ({flaw})"),
        None => format!("{generation} ({damaged} of {tensors} tensors)"),
    }
}

impl Report {
    fn new(directories: Vec<PathBuf>, findings: &Findings, elapsed_seconds: f64) -> Self {
        let directory = directories.first().cloned().unwrap_or_default();
        let promised = findings.verdicts.iter().filter(|verdict| verdict.generation != Generation::Previous);
        let whole = promised.clone().count() > 0
            && promised.clone().any(|verdict| verdict.generation == Generation::Committed)
            && promised.clone().all(Verdict::is_whole);
        let is_lost = !findings.is_whole(&Generation::Committed);
        let remedy = findings.restorable().filter(|_| is_lost).map(|generation| {
            let target = match generation {
                Generation::Snapshot(name) => name.as_str(),
                Generation::Previous | Generation::Committed => "--previous",
            };
            let directory = directory.display();
            format!("{generation} is whole, and `overspill restore {directory} {target}` goes back to it")
        });
        let verdict = |verdict: &Verdict| {
            let (kind, name) = kind_and_name(&verdict.generation);
            VerdictReport {
                kind,
                name,
                generation: verdict.number,
                step: verdict.step,
                whole: verdict.is_whole(),
                tensor_count: verdict.tensors,
                damaged_count: verdict.damaged,
                reason: verdict.flaw.clone(),
            }
        };
        Self {
            directory,
            directories,
            whole,
            generations: findings.verdicts.iter().map(verdict).collect(),
            damaged: findings.damaged.iter().map(DamagedReport::new).collect(),
            extent_count: findings.extents,
            bytes_read: findings.bytes,
            elapsed_seconds,
            remedy,
        }
    }

    fn table(&self, findings: &Findings) -> String {
        let mut table = Table::default();
        table.row(["generation", "number", "step", "tensors", "is"].map(str::to_owned));
        let number = |number: Option<u64>| number.map_or("?".to_owned(), thousands);
        for verdict in &findings.verdicts {
            let standing = match (&verdict.flaw, &verdict.generation) {
                (Some(flaw), _) => flaw.clone(),
                (None, _) if verdict.is_whole() => "whole".to_owned(),
                (None, Generation::Previous) => {
                    format!("not whole any more: {} tensors were overwritten since", verdict.damaged)
                }
                (None, _) => format!("damaged: {} tensors", verdict.damaged),
            };
            let name = match &verdict.generation {
                Generation::Snapshot(name) => format!("snapshot {name}"),
                other => kind_and_name(other).0.to_owned(),
            };
            let tensors = thousands(verdict.tensors as u64);
            table.row([name, number(verdict.number), number(verdict.step), tensors, standing]);
        }
        let mut text = table.to_string();
        // What only the previous generation names may be anything.
        let is_promised = |damaged: &&Damaged| damaged.generations.iter().any(|g| *g != Generation::Previous);
        for damaged in findings.damaged.iter().filter(is_promised) {
            text += &format!("{damaged}\n");
        }
        let gbps = self.bytes_read as f64 / 1e9 / self.elapsed_seconds.max(1e-9);
        let directories: Vec<String> =
            self.directories.iter().map(|path| path.display().to_string()).collect();
        let read = ByteSize(self.bytes_read);
        text += &format!("read {read} at {gbps:.2} GB/s from {}\n", directories.join(" and "));
        text
    }
}

impl DamagedReport {
    fn new(damaged: &Damaged) -> Self {
        let (expected, found, error) = match &damaged.damage {
            Damage::Checksum { expected, found } => (Some(*expected), Some(*found), None),
            Damage::Unreadable(error) => (None, None, Some(error.to_string())),
        };
        let hexadecimal = |checksum: u64| format!("{checksum:016x}");
        Self {
            tensor: damaged.tensor.clone(),
            generations: damaged.generations.iter().map(ToString::to_string).collect(),
            file: damaged.path.clone(),
            offset: damaged.offset,
            length_bytes: damaged.length,
            checksum_expected: expected.map(hexadecimal),
            checksum_found: found.map(hexadecimal),
            error,
        }
    }
}
