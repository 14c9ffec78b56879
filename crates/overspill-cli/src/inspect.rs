//! `overspill inspect`: what a store holds, whoever has it open.

use std::path::PathBuf;

use clap::Args;
use overspill_swap::{Fragmentation, Generation, GenerationState, Owner, Store, StoreError, Survey};
use overspill_train::{ByteSize, path, reading};
use serde::Serialize;

use crate::output::{self, JsonFile};
use crate::table::{Table, thousands};

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// The store, or the directory that a run swaps to; further ones if it lies on several disks that were moved
    #[arg(value_name = "DIR", required = true, num_args = 1..)]
    directories: Vec<PathBuf>,

    /// List every tensor of the committed generation
    #[arg(long)]
    tensors: bool,

    /// Write the numbers to this file; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What there is of a store. Sizes are bytes; what is not known is null.
#[derive(Debug, Serialize)]
struct Report {
    /// The store's home.
    #[serde(serialize_with = "path::lossy")]
    directory: PathBuf,
    /// All its directories that were looked at, the home first.
    #[serde(serialize_with = "path::lossy_each")]
    directories: Vec<PathBuf>,
    /// Whether a running process has it open.
    in_use: bool,
    /// That process.
    owner_pid: Option<u32>,
    /// Number of the last commit.
    generation: Option<u64>,
    /// The step that was committed last.
    step: Option<u64>,
    /// Room for tensors in the data files.
    capacity_bytes: Option<u64>,
    /// Bytes written for tensors since the store was made, up to the last commit.
    bytes_written: Option<u64>,
    /// The same, by the number of steps.
    bytes_written_per_step: Option<f64>,
    /// What all files take.
    bytes_on_disk: u64,
    /// The committed generation, the previous one, and snapshots.
    generations: Vec<GenerationReport>,
    files: Vec<FileReport>,
    /// Files that are named like snapshots and are none of this store.
    foreign_files: Vec<String>,
    fragmentation: FragmentationReport,
    /// The committed tensors, if `--tensors` asks for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorReport>>,
}

/// One generation.
#[derive(Debug, Serialize)]
pub(crate) struct GenerationReport {
    /// `committed`, `previous` or `snapshot`.
    kind: &'static str,
    /// Name of the snapshot.
    name: Option<String>,
    /// Number of its commit.
    generation: Option<u64>,
    step: Option<u64>,
    /// How many tensors it has.
    tensor_count: Option<usize>,
    tensor_bytes: Option<u64>,
    /// Whether its manifest can be read and its data files are long enough. `overspill verify` reads the tensors too.
    whole: bool,
    /// Why not.
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct FileReport {
    #[serde(serialize_with = "path::lossy")]
    path: PathBuf,
    length_bytes: u64,
    allocated_bytes: u64,
}

/// The free space, as of the last commit.
#[derive(Debug, Serialize)]
struct FragmentationReport {
    capacity_bytes: u64,
    free_bytes: u64,
    longest_free_bytes: u64,
    free_ranges: usize,
    /// Part of the free bytes outside of the longest range.
    scattered_share: f64,
}

#[derive(Debug, Serialize)]
struct TensorReport {
    name: String,
    bytes: u64,
    /// First byte in the space of the data files.
    offset: u64,
}

pub(crate) fn run(arguments: &InspectArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let survey = Survey::of(&reading::stores_in(&arguments.directories))?;
    let report = Report::new(survey, arguments.tensors);
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&report.table())?;
    match report.generations.is_empty() {
        true => match Store::committed(&report.directory) {
            Err(error @ (StoreError::ManifestLost { .. } | StoreError::Misplaced { .. })) => {
                output::show(&format!("\n{error}\n"))?;
            }
            _ => output::show(&"\nnothing was committed\n")?,
        },
        false => output::show(&format!("\n{}", generations_table(&report.generations)))?,
    }
    match &report.tensors {
        Some(tensors) => output::show(&format!("\n{}", tensors_table(tensors))),
        None => Ok(()),
    }
}

impl Report {
    fn new(survey: Survey, with_tensors: bool) -> Self {
        let committed = survey.committed();
        let step = committed.and_then(|manifest| manifest.step());
        let bytes_written = committed.map(|manifest| manifest.bytes_written);
        let per_step = |(bytes, step): (u64, u64)| bytes as f64 / step as f64;
        let tensors = committed.filter(|_| with_tensors).map(|manifest| {
            let tensor = |record: &overspill_swap::TensorRecord| TensorReport {
                name: record.name.clone(),
                bytes: record.length,
                offset: record.offset,
            };
            manifest.tensors.iter().map(tensor).collect()
        });
        let (in_use, owner_pid) = match survey.owner {
            Owner::Nobody => (false, None),
            Owner::Process { pid } => (true, pid),
        };
        let Fragmentation { capacity_bytes, free_bytes, longest_free_bytes, free_ranges } =
            survey.fragmentation;
        let scattered_share = survey.fragmentation.scattered_share();
        let file = |file: &overspill_swap::DataFile| FileReport {
            path: file.path.clone(),
            length_bytes: file.length,
            allocated_bytes: file.allocated_bytes,
        };
        Self {
            in_use,
            owner_pid,
            generation: committed.map(|manifest| manifest.generation),
            step,
            capacity_bytes: committed.map(|manifest| manifest.capacity_bytes),
            bytes_written,
            bytes_written_per_step: bytes_written.zip(step.filter(|&step| step > 0)).map(per_step),
            bytes_on_disk: survey.bytes_on_disk,
            generations: survey.generations.iter().map(GenerationReport::new).collect(),
            files: survey.files.iter().map(file).collect(),
            fragmentation: FragmentationReport {
                capacity_bytes,
                free_bytes,
                longest_free_bytes,
                free_ranges,
                scattered_share,
            },
            tensors,
            directory: survey.path,
            directories: survey.directories,
            foreign_files: survey.foreign,
        }
    }

    fn table(&self) -> Table {
        let size = |bytes: u64| ByteSize(bytes).to_string();
        let mut table = Table::default();
        table.line("store", self.directory.display());
        for directory in self.directories.iter().skip(1) {
            table.line("  and", directory.display());
        }
        match (self.in_use, self.owner_pid) {
            (true, Some(pid)) => table.line("in use by process", pid),
            (true, None) => table.line("in use", "by somebody"),
            (false, _) => table.line("in use", "by nobody"),
        }
        table.line("size on disk", size(self.bytes_on_disk));
        for file in &self.files {
            let (length, allocated) = (size(file.length_bytes), size(file.allocated_bytes));
            table.line(&format!("  {}", file.path.display()), format!("{length}, {allocated} allocated"));
        }
        let free = &self.fragmentation;
        table.line("free for tensors", format!("{} of {}", size(free.free_bytes), size(free.capacity_bytes)));
        let scattered = format!(
            "{} in {} free ranges, the longest of {}; {:.0} % outside of it",
            size(free.free_bytes),
            thousands(free.free_ranges as u64),
            size(free.longest_free_bytes),
            100.0 * free.scattered_share
        );
        table.line("fragmentation", scattered);
        if let Some(bytes) = self.bytes_written {
            let per_step =
                self.bytes_written_per_step.map(|bytes| format!(", {} per step", size(bytes as u64)));
            table.line("written so far", size(bytes) + &per_step.unwrap_or_default());
        }
        for file in &self.foreign_files {
            table.line("not of this store", file);
        }
        table
    }
}

impl GenerationReport {
    pub(crate) fn new(state: &GenerationState) -> Self {
        let (kind, name) = kind_and_name(&state.generation);
        let manifest = state.manifest.as_ref();
        Self {
            kind,
            name,
            generation: manifest.map(|manifest| manifest.generation),
            step: manifest.and_then(|manifest| manifest.step()),
            tensor_count: manifest.map(|manifest| manifest.tensors.len()),
            tensor_bytes: manifest.map(|manifest| manifest.tensor_bytes()),
            whole: state.is_whole(),
            reason: state.flaw.as_ref().map(ToString::to_string),
        }
    }
}

/// Generations, one per row.
pub(crate) fn generations_table(generations: &[GenerationReport]) -> Table {
    let mut table = Table::default();
    let head = ["generation", "number", "step", "tensors", "size", "manifest"];
    table.row(head.map(str::to_owned));
    let number = |number: Option<u64>| number.map_or("?".to_owned(), thousands);
    for state in generations {
        let name = state.name.as_ref().map_or(state.kind.to_owned(), |name| format!("snapshot {name}"));
        let size = state.tensor_bytes.map_or("?".to_owned(), |bytes| ByteSize(bytes).to_string());
        let tensors = number(state.tensor_count.map(|count| count as u64));
        let whole = state.reason.clone().unwrap_or_else(|| "whole".to_owned());
        table.row([name, number(state.generation), number(state.step), tensors, size, whole]);
    }
    table
}

/// What a generation is called in files of numbers.
pub(crate) fn kind_and_name(generation: &Generation) -> (&'static str, Option<String>) {
    match generation {
        Generation::Committed => ("committed", None),
        Generation::Previous => ("previous", None),
        Generation::Snapshot(name) => ("snapshot", Some(name.clone())),
    }
}

fn tensors_table(tensors: &[TensorReport]) -> Table {
    let mut table = Table::default();
    table.row(["tensor", "bytes", "offset"].map(str::to_owned));
    for tensor in tensors {
        // A name is any text, and a terminal obeys some.
        let name = tensor.name.escape_debug().to_string();
        table.row([name, thousands(tensor.bytes), thousands(tensor.offset)]);
    }
    table
}
