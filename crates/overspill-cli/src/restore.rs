//! `overspill restore`: makes a snapshot, or the generation before the last commit, the current one.
//!
//! What is gone back to is read before: a generation that is not whole would replace one that may be.

use std::path::PathBuf;

use clap::Args;
use overspill_io::BackendChoice;
use overspill_swap::{Examination, Generation, Scope, Store, StoreError, Verdict};
use overspill_train::{path, reading};
use serde::Serialize;

use crate::inspect::kind_and_name;
use crate::output::{self, JsonFile};
use crate::store::{self, Reader};
use crate::{interrupt, verify};

#[derive(Debug, Args)]
pub(crate) struct RestoreArguments {
    /// The store, or the directory that a run swaps to; of several disks, the first
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// The snapshot
    #[arg(value_name = "NAME", required_unless_present = "previous", conflicts_with = "previous")]
    name: Option<String>,

    /// The generation before the last commit
    #[arg(long)]
    previous: bool,

    /// Do not read it before
    #[arg(long)]
    unchecked: bool,

    /// A further directory of the store, if it lies on several disks that were moved
    #[arg(long, value_name = "DIR")]
    volume: Vec<PathBuf>,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    backend: BackendChoice,

    /// Write what was done to this file; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was done. What is not known is null.
#[derive(Debug, Serialize)]
struct Report {
    /// The store's home.
    #[serde(serialize_with = "path::lossy")]
    directory: PathBuf,
    /// What was gone back to: `snapshot` or `previous`.
    kind: &'static str,
    /// Name of the snapshot.
    name: Option<String>,
    /// Number of the committed generation, as it is now.
    generation: u64,
    /// Its step.
    step: Option<u64>,
    /// Whether every byte of it was read before.
    checked: bool,
}

pub(crate) fn run(arguments: &RestoreArguments) -> anyhow::Result<()> {
    let stop = interrupt::stop_flag()?;
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let mut directories = vec![reading::store_in(&arguments.directory)];
    directories.extend(reading::stores_in(&arguments.volume));
    let target = arguments.name.clone().map_or(Generation::Previous, Generation::Snapshot);
    if arguments.unchecked {
        store::alone(match &target {
            Generation::Snapshot(name) => Store::restore(&directories[0], name),
            Generation::Previous | Generation::Committed => Store::restore_previous(&directories[0]),
        })?;
    } else {
        let reader = Reader::start(&directories, arguments.backend)?;
        let examination = store::alone(Examination::begin(&reader.volumes))?;
        let findings = verify::read(&examination, &reader, Scope::Only(&target), &stop)?;
        if !findings.is_whole(&target) {
            let flaws = findings.verdicts.iter().filter_map(|Verdict { flaw, .. }| flaw.clone());
            let damaged = flaws.chain(findings.damaged.iter().map(ToString::to_string)).collect();
            let path = directories.swap_remove(0);
            return Err(StoreError::NotWhole { path, what: target.to_string(), damaged }.into());
        }
        examination.restore(&target)?;
    }
    let committed = Store::committed(&directories[0])?;
    let step = committed.step().map(|step| format!(", step {step}"));
    output::say(&format!("{target} is the committed generation now{}", step.unwrap_or_default()));
    let Some(json) = json else { return Ok(()) };
    let (kind, name) = kind_and_name(&target);
    json.write(&Report {
        directory: directories.swap_remove(0),
        kind,
        name,
        generation: committed.generation,
        step: committed.step(),
        checked: !arguments.unchecked,
    })
}
