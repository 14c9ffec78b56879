//! Snapshots: manifests that stay, under names of their own.
//!
//! A snapshot is made by giving the manifest one more name, so it takes as long as a directory entry takes, whatever
//! the size of the state. Its file is `snapshot.NAME` in the store's directory; what it names is kept by the ledger.

use std::io;
use std::path::{Path, PathBuf};

use crate::directory::{self, MANIFEST};
use crate::error::StoreError;
use crate::manifest::Manifest;

/// What the names of snapshots' files begin with.
pub(crate) const PREFIX: &str = "snapshot.";

/// Longest name of a snapshot, in bytes.
const NAME_MAX: usize = 64;

/// One snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) name: String,
    pub(crate) manifest: Manifest,
}

/// Letters, digits, `-`, `_` and `.`, so that the name can be a file's and typed in any shell.
pub(crate) fn check_name(name: &str) -> Result<(), StoreError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(StoreError::SnapshotName { name: name.to_owned() })
}

/// The name of a snapshot's file.
pub(crate) fn file_name(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// The file of a snapshot of the store in `directory`.
pub(crate) fn path(directory: &Path, name: &str) -> PathBuf {
    directory.join(file_name(name))
}

/// All snapshots of the store in `directory`, by name.
///
/// # Errors
/// [`StoreError::Manifest`] for the first one that cannot be read, [`StoreError::Directory`].
pub(crate) fn list(directory: &Path) -> Result<Vec<Snapshot>, StoreError> {
    let mut snapshots = Vec::new();
    for name in names(directory)? {
        let manifest = directory::read_manifest(&path(directory, &name))?;
        snapshots.push(Snapshot { name, manifest });
    }
    Ok(snapshots)
}

/// The names of all snapshots of the store in `directory`, in order.
pub(crate) fn names(directory: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |source| StoreError::Directory { action: "list", path: directory.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let file = entry.map_err(failed)?.file_name();
        // Files of other names are somebody else's.
        let name = file.to_str().and_then(|file| file.strip_prefix(PREFIX));
        names.extend(name.filter(|name| check_name(name).is_ok()).map(str::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}

/// Gives the manifest one more name.
pub(crate) fn make(directory: &Path, name: &str) -> Result<(), StoreError> {
    let path = path(directory, name);
    match directory::give_another_name(&directory.join(MANIFEST), &path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(StoreError::SnapshotExists { name: name.to_owned(), path: directory.to_owned() })
        }
        linked => linked.map_err(|source| StoreError::Directory { action: "create", path, source }),
    }
}

/// Takes a snapshot's name away.
pub(crate) fn delete(directory: &Path, name: &str) -> Result<(), StoreError> {
    let path = path(directory, name);
    match crate::names::remove(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let known = names(directory)?;
            Err(StoreError::NoSnapshot { name: name.to_owned(), path: directory.to_owned(), known })
        }
        removed => removed.map_err(|source| StoreError::Directory { action: "remove", path, source }),
    }
}
