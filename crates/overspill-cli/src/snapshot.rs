//! `overspill snapshot`: lists the snapshots of a store, keeps the committed state under a name, or gives one up, whoever
//! has the store open.
//!
//! If a run has it open, the run makes the snapshot after its next commit, and the command waits for that. Who only reads
//! the store never commits; when that has ended, the command makes the snapshot itself.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use overspill_swap::{Answer, Asked, Deleted, Generation, Store, Survey, Wish};
use overspill_train::{check_stop, path, reading};
use serde::Serialize;

use crate::inspect::{GenerationReport, generations_table};
use crate::interrupt;
use crate::output::{self, JsonFile};

#[derive(Debug, Args)]
pub(crate) struct SnapshotArguments {
    /// The store, or the directory that a run swaps to; of several disks, the first
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Name of the snapshot, of 1 to 64 letters, digits, dots and the signs - and _ [default: list those that there are]
    #[arg(value_name = "NAME")]
    name: Option<String>,

    /// Give the snapshot up
    #[arg(long, requires = "name")]
    delete: bool,

    /// How long another process that has the store open is waited for, until it commits or ends
    #[arg(long, value_name = "SECONDS", default_value_t = 600, conflicts_with = "delete", requires = "name")]
    wait: u64,

    /// Write what was done, or the list, to this file; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was done. What is not known is null.
#[derive(Debug, Serialize)]
struct Report {
    /// The store's home.
    #[serde(serialize_with = "path::lossy")]
    directory: PathBuf,
    /// Name of the snapshot.
    name: String,
    /// Whether it was given up; if not, it was made.
    deleted: bool,
    /// Number of the commit that it keeps, or kept.
    generation: Option<u64>,
    step: Option<u64>,
    /// The process that had the store open.
    owner_pid: Option<u32>,
    /// Whether it was for that process to do at its next commit: to make the snapshot, or to reuse the space of one that
    /// was given up.
    at_next_commit: bool,
}

/// The snapshots of a store.
#[derive(Debug, Serialize)]
struct ListReport {
    /// The store's home.
    #[serde(serialize_with = "path::lossy")]
    directory: PathBuf,
    snapshots: Vec<GenerationReport>,
}

/// Who has the store open, and what that means for a snapshot.
#[derive(Clone, Copy, Debug, Default)]
struct Owner {
    pid: Option<u32>,
    acts_at_next_commit: bool,
}

/// How often a wish is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(crate) fn run(arguments: &SnapshotArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let directory = reading::store_in(&arguments.directory);
    let Some(name) = &arguments.name else { return list(&directory, json) };
    // Afterwards nobody knows what a snapshot that is gone has kept; one that is damaged does not say.
    let before = if arguments.delete { Store::snapshot_of(&directory, name).ok() } else { None };
    let owner = match arguments.delete {
        true => delete(&directory, name)?,
        false => make(&directory, name, arguments.wait)?,
    };
    let Some(json) = json else { return Ok(()) };
    // One that was made may be given up by somebody else meanwhile.
    let manifest = if arguments.delete { before } else { Store::snapshot_of(&directory, name).ok() };
    let done = if arguments.delete { "given up" } else { "made" };
    let is_done = format!("snapshot {name} of {} is {done}, but that is not told", directory.display());
    let report = Report {
        directory,
        name: name.clone(),
        deleted: arguments.delete,
        generation: manifest.as_ref().map(|manifest| manifest.generation),
        step: manifest.as_ref().and_then(|manifest| manifest.step()),
        owner_pid: owner.pid,
        at_next_commit: owner.acts_at_next_commit,
    };
    json.write(&report).context(is_done)
}

fn list(directory: &Path, json: Option<JsonFile>) -> anyhow::Result<()> {
    let survey = Survey::of(&[directory.to_owned()])?;
    let is_snapshot = |kept: &Generation| matches!(kept, Generation::Snapshot(_));
    let kept = survey.generations.iter().filter(|state| is_snapshot(&state.generation));
    let snapshots = kept.map(GenerationReport::new).collect();
    let report = ListReport { directory: survey.path, snapshots };
    if let Some(json) = json {
        json.write(&report)?;
    }
    match report.snapshots.is_empty() {
        true => output::show(&"no snapshots\n"),
        false => output::show(&generations_table(&report.snapshots)),
    }
}

fn delete(directory: &Path, name: &str) -> anyhow::Result<Owner> {
    let Deleted::AtNextCommit { pid } = Store::delete_snapshot_in(directory, name)? else {
        return Ok(Owner::default());
    };
    let process = process(pid);
    output::say(&format!("note: {process} has the store open; the space is free after its next commit"));
    Ok(Owner { pid, acts_at_next_commit: true })
}

fn make(directory: &Path, name: &str, wait_seconds: u64) -> anyhow::Result<Owner> {
    let stop = interrupt::stop_flag()?;
    let Asked::Wished(wish) = Store::ask_for_snapshot(directory, name)? else {
        return Ok(Owner::default());
    };
    let owner = Owner { pid: wish.pid, acts_at_next_commit: true };
    let process = process(wish.pid);
    output::say(&format!("note: waiting until {process}, which has the store open, commits or ends"));
    wait(wish, wait_seconds, directory, name, &stop)?;
    Ok(owner)
}

/// Waits until the wish is granted, time is up, or somebody asks to stop; a wish that was not granted is taken back.
fn wait(wish: Wish, seconds: u64, directory: &Path, name: &str, stop: &AtomicBool) -> anyhow::Result<()> {
    let began = Instant::now();
    let patience = Duration::from_secs(seconds);
    let process = process(wish.pid);
    while began.elapsed() < patience && check_stop(stop).is_ok() {
        if wish.answer()? == Answer::Granted {
            return Ok(());
        }
        std::thread::park_timeout(LOOK_EVERY.min(patience.saturating_sub(began.elapsed())));
    }
    if wish.take_back()? == Answer::Granted {
        return Ok(());
    }
    check_stop(stop)?;
    bail!(
        "{process}, which has {} open, has neither committed nor ended within {seconds} s, so there is no snapshot \
         {name}; --wait waits longer, but a run with --durability none commits at its end at the earliest, and what \
         only reads the store (verify, export, restore) never does",
        directory.display()
    )
}

fn process(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}
