//! `overspill gc`: what ended processes left, and its removal.
//!
//! Nothing goes without `--remove`, and nothing that a run could go on from without `--with-committed`.

mod folders;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::bail;
use clap::Args;
use overspill_swap::{
    Leftover, Owner, Remains, Removal, Removed, StoreError, Survey, leftovers, remove_leftover,
};
use overspill_train::{ByteSize, path, reading};
use serde::Serialize;

use crate::output::{self, JsonFile};
use crate::table::Table;

#[derive(Debug, Args)]
pub(crate) struct GcArguments {
    /// Stores, or directories that stores are in
    #[arg(value_name = "DIR", default_value = ".")]
    directories: Vec<PathBuf>,

    /// Remove the stores that nothing can be resumed from, and the unfinished folders
    #[arg(long)]
    remove: bool,

    /// Remove those that can be resumed, too
    #[arg(long, requires = "remove")]
    with_committed: bool,

    /// Write the list to this file; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was found and removed. Sizes are bytes; what is not known is null.
#[derive(Debug, Serialize)]
struct Report {
    /// What is gone took so much.
    removed_bytes: u64,
    directories: Vec<DirectoryReport>,
}

/// A directory of a store.
#[derive(Debug, Serialize)]
struct DirectoryReport {
    #[serde(serialize_with = "path::lossy")]
    path: PathBuf,
    /// Whether a running process has it.
    in_use: bool,
    /// That process.
    owner_pid: Option<u32>,
    /// `half_made`, `uncommitted`, `committed`, `volume` for a part of a store whose home is elsewhere, or
    /// `unfinished_folder` for the output of a process that died while it wrote it.
    remains: &'static str,
    /// Whether a state may be lost with it.
    may_hold_state: bool,
    /// The committed step.
    step: Option<u64>,
    snapshots: Vec<String>,
    bytes_on_disk: u64,
    /// Seconds since 1970 when a file in it was written last.
    last_used_unix_seconds: Option<u64>,
    /// Whether the store is gone.
    removed: bool,
    /// Why the directory is still there, if it was to go.
    stays_because: Option<String>,
    /// What a person may want to know of it.
    #[serde(skip)]
    holds: String,
}

pub(crate) fn run(arguments: &GcArguments) -> anyhow::Result<()> {
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let found = leftovers(&arguments.directories)?;
    let mut failures = Vec::new();
    let removal = if arguments.with_committed { Removal::WithCommitted } else { Removal::Worthless };
    let mut report = Report { removed_bytes: 0, directories: Vec::with_capacity(found.len()) };
    // Homes of which a part is still there: without them nobody knows what it is worth.
    let mut needed: Vec<&PathBuf> = Vec::new();
    for leftover in &found {
        let mut entry = DirectoryReport::new(leftover);
        let goes = arguments.remove
            && !entry.in_use
            && (arguments.with_committed || !leftover.remains.may_hold_state());
        if goes && needed.contains(&&leftover.path) {
            entry.stays_because = Some("another directory of the store stays".to_owned());
        } else if goes {
            match remove_leftover(leftover, removal) {
                Ok(Removed { bytes, others }) => {
                    entry.removed = true;
                    report.removed_bytes = report.removed_bytes.saturating_add(bytes);
                    entry.stays_because = (!others.is_empty()).then(|| {
                        format!(
                            "the directory stays, because it holds what no store made: {}",
                            others.join(", ")
                        )
                    });
                }
                Err(error) => {
                    if let Remains::Volume { homes, .. } = &leftover.remains {
                        needed.extend(homes);
                    }
                    failures.push(error.to_string());
                    entry.stays_because = Some(error.to_string());
                }
            }
        }
        report.directories.push(entry);
    }
    for directory in &arguments.directories {
        // A store that may not be looked into is not known to be one but by its name.
        let store = reading::store_in(directory);
        let is_unseen = store != *directory && found.iter().all(|leftover| leftover.path != store);
        if let Some(Err(error @ StoreError::Directory { .. })) =
            is_unseen.then(|| Survey::of(std::slice::from_ref(&store)))
        {
            failures.push(error.to_string());
        }
    }
    folders::sweep(arguments, &mut report, &mut failures)?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::show(&report.text(arguments))?;
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
}

impl DirectoryReport {
    fn new(leftover: &Leftover) -> Self {
        let (in_use, owner_pid) = match leftover.owner {
            Owner::Nobody => (false, None),
            Owner::Process { pid } => (true, pid),
        };
        let (remains, step, snapshots) = match &leftover.remains {
            Remains::HalfMade => ("half_made", None, Vec::new()),
            Remains::Uncommitted => ("uncommitted", None, Vec::new()),
            Remains::Committed { step, snapshots } => ("committed", *step, snapshots.clone()),
            Remains::Volume { .. } => ("volume", None, Vec::new()),
        };
        let holds = match (in_use, owner_pid) {
            (true, Some(pid)) => format!("in use by process {pid}"),
            (true, None) => "in use".to_owned(),
            (false, _) => in_words(&leftover.remains),
        };
        let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
        Self {
            path: leftover.path.clone(),
            in_use,
            owner_pid,
            remains,
            may_hold_state: leftover.remains.may_hold_state(),
            step,
            snapshots,
            bytes_on_disk: leftover.bytes_on_disk,
            last_used_unix_seconds: leftover.last_used.and_then(since_1970).map(|since| since.as_secs()),
            removed: false,
            stays_because: None,
            holds,
        }
    }
}

fn in_words(remains: &Remains) -> String {
    match remains {
        Remains::HalfMade => "half made".to_owned(),
        Remains::Uncommitted => "nothing committed".to_owned(),
        Remains::Volume { committed: true, .. } => "part of a store that may be committed".to_owned(),
        Remains::Volume { committed: false, .. } => "part of a store with nothing committed".to_owned(),
        Remains::Committed { step, snapshots } => {
            let step = step.map_or("a state".to_owned(), |step| format!("step {step}"));
            let names = if snapshots.is_empty() {
                String::new()
            } else {
                format!(", snapshots {}", snapshots.join(", "))
            };
            format!("can be resumed: {step}{names}")
        }
    }
}

impl Report {
    fn text(&self, arguments: &GcArguments) -> String {
        if self.directories.is_empty() {
            return "no stores\n".to_owned();
        }
        let mut table = Table::default();
        table.row(["store", "size", "last used", "holds", ""].map(str::to_owned));
        for entry in &self.directories {
            let standing = match (entry.removed, &entry.stays_because) {
                (true, _) => "removed",
                (false, Some(_)) => "stays",
                (false, None) => "",
            };
            let (path, size) = (entry.path.display().to_string(), ByteSize(entry.bytes_on_disk).to_string());
            table.row([path, size, entry.age(), entry.holds.clone(), standing.to_owned()]);
        }
        let mut text = table.to_string();
        for entry in &self.directories {
            if let Some(reason) = entry.stays_because.as_ref().filter(|_| entry.removed) {
                text += &format!("{}: {reason}\n", entry.path.display());
            }
        }
        let goes = |entry: &&DirectoryReport| !entry.in_use && !entry.may_hold_state;
        let could = self.directories.iter().filter(goes).count();
        match arguments.remove {
            true => text += &format!("removed {}\n", ByteSize(self.removed_bytes)),
            false if could > 0 => text += "--remove removes those that nothing can be resumed from\n",
            false => {}
        }
        text
    }
}

impl DirectoryReport {
    /// How long ago it was used.
    #[expect(clippy::disallowed_methods, reason = "it is shown to people, and nothing depends on it")]
    fn age(&self) -> String {
        let Some(seconds) = self.last_used_unix_seconds else { return "?".to_owned() };
        let used = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let ago = SystemTime::now().duration_since(used).unwrap_or_default().as_secs();
        match ago {
            0..60 => format!("{ago} s ago"),
            60..3600 => format!("{} min ago", ago / 60),
            3600..172_800 => format!("{} h ago", ago / 3600),
            _ => format!("{} days ago", ago / 86_400),
        }
    }
}
