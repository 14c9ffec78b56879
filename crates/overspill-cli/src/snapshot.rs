//! `overspill snapshot`: keeps the committed state under a name, or gives one up, whoever has the store open.
//!
//! If a run has it open, the run makes the snapshot after its next commit, and the command waits for that.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use overspill_swap::{Answer, Asked, Deleted, Store, Wish};
use overspill_train::check_stop;

use crate::{interrupt, output, store};

#[derive(Debug, Args)]
pub(crate) struct SnapshotArguments {
    /// The store, or the directory that a run swaps to; of several disks, the first
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Name of the snapshot: 1 to 64 letters, digits, -, _ or .
    #[arg(value_name = "NAME")]
    name: String,

    /// Give the snapshot up
    #[arg(long)]
    delete: bool,

    /// How long a running job is waited for
    #[arg(long, value_name = "SECONDS", default_value_t = 600, conflicts_with = "delete")]
    wait: u64,
}

/// How often a wish is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(crate) fn run(arguments: &SnapshotArguments) -> anyhow::Result<()> {
    let (directory, name) = (store::resolve(&arguments.directory), &arguments.name);
    if arguments.delete {
        if let Deleted::AtNextCommit { pid } = Store::delete_snapshot_in(&directory, name)? {
            let process = process(pid);
            output::say(&format!(
                "note: {process} has the store open; the space is free after its next commit"
            ));
        }
        return Ok(());
    }
    let stop = interrupt::stop_flag()?;
    match Store::ask_for_snapshot(&directory, name)? {
        Asked::Made => Ok(()),
        Asked::Wished(wish) => {
            let process = process(wish.pid);
            output::say(&format!("note: waiting for the next commit of {process}, which has the store open"));
            wait(wish, arguments.wait, &directory, name, &stop)
        }
    }
}

/// Waits until the wish is granted, time is up, or somebody asks to stop; a wish that was not granted is taken back.
fn wait(wish: Wish, seconds: u64, directory: &Path, name: &str, stop: &AtomicBool) -> anyhow::Result<()> {
    let began = Instant::now();
    let patience = Duration::from_secs(seconds);
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
    let directory = directory.display();
    bail!("no commit of {directory} within {seconds} s, so there is no snapshot {name}; --wait waits longer")
}

fn process(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}
