//! What dead processes left: finding their stores, and removing them by name.
//!
//! A store is recognized by what it holds, never by its name: a lock whose text is a process id, and beside it a label
//! or a manifest. One that has lost its lock is listed, and stays until it has one again. A directory whose making was broken off has the name of its making, and holds nothing but the two
//! files that are made first. What is recognized is looked at once more when it is removed, under its lock; then the
//! files that a store makes go by their names, and the directory if nothing else is in it. Links are refused.
//!
//! A volume that is not a store's home does not know whether its bytes are a part of a committed state. Its home, which
//! knows, is looked for among what was found; as long as it is missing, the volume counts as committed. Of copies of a
//! home any one that is committed will do. So volumes are listed, and removed, before homes.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Generation, Survey, bytes_on_disk, is_store};
use crate::directory::{self, Directory, LOCK, MANIFEST, MANIFEST_PREVIOUS, Owner, VOLUME};
use crate::error::StoreError;
use crate::snapshot::{self, Found};
use crate::store::Store;
use crate::wish;

/// The directory of a store, or of what was to become one.
#[derive(Clone, Debug)]
pub struct Leftover {
    /// Where it is.
    pub path: PathBuf,
    /// Who has it.
    pub owner: Owner,
    /// What is in it.
    pub remains: Remains,
    /// What its files take, in bytes.
    pub bytes_on_disk: u64,
    /// When a file in it was written last, if the system says so.
    pub last_used: Option<SystemTime>,
}

/// What is in the directory of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remains {
    /// It was not completely made.
    HalfMade,
    /// Nothing that could be gone on from.
    Uncommitted,
    /// A committed state, or what may be one again: manifests that are damaged count.
    Committed {
        /// The step of the committed generation, if it can be read and says so.
        step: Option<u64>,
        /// Names of the snapshots, damaged ones included.
        snapshots: Vec<String>,
    },
    /// A part of a store over several volumes.
    Volume {
        /// Which one, from 1.
        index: usize,
        /// The store's home, and copies of it, as far as they were found.
        homes: Vec<PathBuf>,
        /// Whether one of them has a committed state, or none is known.
        committed: bool,
    },
}

impl Remains {
    /// Whether a state may be lost with it.
    pub fn may_hold_state(&self) -> bool {
        match self {
            Self::HalfMade | Self::Uncommitted => false,
            Self::Committed { .. } => true,
            Self::Volume { committed, .. } => *committed,
        }
    }
}

/// What may be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// What nothing can be gone on from.
    Worthless,
    /// What may hold a state, too.
    WithCommitted,
}

/// What became of a directory whose store was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// What the store's files took, in bytes.
    pub bytes: u64,
    /// What else is in the directory, which keeps it.
    pub others: Vec<String>,
}

/// The stores among these directories and the directories in them: first further volumes, then homes, each by path; in
/// this order they can be removed. Links are not followed.
///
/// # Errors
/// [`StoreError::Directory`] for a directory that cannot be listed.
pub fn leftovers(directories: &[PathBuf]) -> Result<Vec<Leftover>, StoreError> {
    let mut paths = Vec::new();
    for directory in directories {
        if is_recognized(directory) {
            paths.push(directory.clone());
            continue;
        }
        let failed = |source| StoreError::Directory { action: "list", path: directory.clone(), source };
        if let Some(denied) = directory::denied(directory) {
            return Err(denied);
        }
        for entry in std::fs::read_dir(directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            paths.extend(is_recognized(&path).then_some(path));
        }
    }
    paths.sort_unstable();
    paths.dedup();
    let homes: Vec<PathBuf> = paths.iter().filter(|path| volume_index(path) == Some(0)).cloned().collect();
    let leftover = |path: PathBuf| {
        let (remains, owner) = (remains(&path, &homes), owner(&path));
        let (bytes_on_disk, last_used) = (bytes_on_disk(&path), last_used(&path));
        Leftover { path, owner, remains, bytes_on_disk, last_used }
    };
    let mut found: Vec<Leftover> = paths.into_iter().map(leftover).collect();
    found.sort_by_key(|leftover| !matches!(leftover.remains, Remains::Volume { .. }));
    Ok(found)
}

/// Removes what the store made.
///
/// # Errors
/// [`StoreError::Locked`] when somebody has it by now, [`StoreError::Stays`] when it may hold a state and that is not to
/// go, when there is a link among its files, or when one of them cannot be removed; [`StoreError::Directory`].
pub fn remove_leftover(leftover: &Leftover, removal: Removal) -> Result<Removed, StoreError> {
    let path = &leftover.path;
    let stays = |reason: &str| StoreError::Stays { path: path.clone(), reason: reason.to_owned() };
    let bytes = bytes_on_disk(path);
    if !is_recognized(path) {
        return Err(stays("it is not what it was"));
    }
    if let Owner::Process { pid } = owner(path) {
        return Err(StoreError::Locked { path: path.clone(), pid });
    }
    if std::fs::symlink_metadata(path.join(LOCK)).is_ok() || !is_half_made(path) {
        let directory = Directory::open(path, Store::data_files(path))?;
        // Under the lock, which whoever would go on from it needs.
        let homes = match &leftover.remains {
            Remains::Volume { homes, .. } => &**homes,
            Remains::HalfMade | Remains::Uncommitted | Remains::Committed { .. } => &[],
        };
        if remains(path, homes).may_hold_state() && removal == Removal::Worthless {
            return Err(stays("it may hold a committed state"));
        }
        let store = directory::read_label(path).map(|(store, _)| store);
        let snapshots = snapshot::known(path, store)?;
        let wishes = wish::look(path).unwrap_or_default().wishes;
        directory.forget(snapshots.iter().map(|name| snapshot::file_name(name)));
        directory.forget(wishes.iter().map(|name| wish::file_name(name)));
        for name in directory.files() {
            let metadata = std::fs::symlink_metadata(path.join(&name));
            if metadata.is_ok_and(|metadata| !metadata.is_file()) {
                return Err(stays(&format!("{name} in it is not a plain file")));
            }
        }
        directory.remove().map_err(|error| stays(&error.to_string()))?;
    } else {
        // Empty, or it would not have been recognized; if not, it stays.
        drop(std::fs::remove_dir(path));
    }
    match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Removed { bytes, others: Vec::new() }),
        Err(error) => Err(stays(&format!("it cannot be listed any more: {error}"))),
        Ok(entries) => {
            let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
            let mut others: Vec<String> = names.collect();
            others.sort_unstable();
            if others.is_empty() {
                return Err(stays("the system does not let it go"));
            }
            Ok(Removed { bytes: bytes.saturating_sub(bytes_on_disk(path)), others })
        }
    }
}

/// Whether it is a store's, or was to become one.
fn is_recognized(path: &Path) -> bool {
    is_half_made(path) || (is_store(path) && (directory::has_lock(path) || directory::lacks_lock(path)))
}

/// Whether it has the name of something that is being made, and no more in it than is made first.
fn is_half_made(path: &Path) -> bool {
    maker(path).is_some()
        && std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
        && std::fs::read_dir(path).is_ok_and(|mut entries| {
            entries.all(|entry| {
                let name = entry.map(|entry| entry.file_name());
                name.is_ok_and(|name| [LOCK, VOLUME].iter().any(|made| name.to_str() == Some(made)))
            })
        })
        && (directory::has_lock(path) || std::fs::symlink_metadata(path.join(LOCK)).is_err())
}

/// The process that began to make it.
fn maker(path: &Path) -> Option<u32> {
    directory::maker(path.file_name()?.to_str()?)
}

/// Who has it. Until its lock is taken, it belongs to the process in its name.
fn owner(path: &Path) -> Owner {
    let is_alive = |pid: &u32| Path::new(&format!("/proc/{pid}")).exists();
    match maker(path).filter(|pid| is_half_made(path) && is_alive(pid)) {
        // It does not expect anybody to look at the lock that it is about to take.
        Some(pid) => Owner::Process { pid: Some(pid) },
        None => directory::owner(path).unwrap_or(Owner::Nobody),
    }
}

/// Which volume of its store it is; stores of one volume had no labels once.
fn volume_index(path: &Path) -> Option<usize> {
    if is_half_made(path) {
        return None;
    }
    Some(directory::read_label(path).map_or(0, |(_, index)| index))
}

fn remains(path: &Path, homes: &[PathBuf]) -> Remains {
    let Some(index) = volume_index(path) else { return Remains::HalfMade };
    let label = directory::read_label(path);
    if let Some((store, _)) = label.filter(|_| index > 0) {
        let is_home = |home: &&PathBuf| directory::read_label(home) == Some((store, 0));
        let homes: Vec<PathBuf> = homes.iter().filter(is_home).cloned().collect();
        let committed = homes.is_empty() || homes.iter().any(|home| !committed(home).is_empty());
        return Remains::Volume { index, homes, committed };
    }
    if committed(path).is_empty() {
        return Remains::Uncommitted;
    }
    let survey = Survey::of(&[path.to_owned()]);
    let step = survey.as_ref().ok().and_then(|survey| survey.committed()?.step());
    let generations = survey.map_or_else(|_| Vec::new(), |survey| survey.generations);
    let snapshots = generations.into_iter().filter_map(|state| match state.generation {
        Generation::Snapshot(name) => Some(name),
        Generation::Committed | Generation::Previous => None,
    });
    Remains::Committed { step, snapshots: snapshots.collect() }
}

/// Names of what a state may be gone on from, readable or not.
fn committed(home: &Path) -> Vec<String> {
    let manifests = [MANIFEST, MANIFEST_PREVIOUS].map(str::to_owned).into_iter();
    let is_there = |name: &String| std::fs::symlink_metadata(home.join(name)).is_ok();
    let mut names: Vec<String> = manifests.filter(is_there).collect();
    let store = directory::read_label(home).map(|(store, _)| store);
    let snapshots = snapshot::names(home).unwrap_or_default().into_iter();
    names
        .extend(snapshots.filter(|name| {
            !matches!(snapshot::find(home, name, store), Ok(Found::Foreign | Found::Nothing))
        }));
    names
}

#[expect(clippy::disallowed_methods, reason = "it is shown to people, and nothing depends on it")]
fn last_used(path: &Path) -> Option<SystemTime> {
    let entries = std::fs::read_dir(path).ok()?.flatten();
    entries.filter_map(|entry| entry.metadata().ok()?.modified().ok()).max()
}
