//! Snapshots: manifests that stay, under names of their own.
//!
//! A snapshot is made by giving the manifest one more name, so it takes as long as a directory entry takes, whatever
//! the size of the state. Its file is `snapshot.NAME` in the store's directory; what it names is kept by the ledger.
//!
//! A file of such a name that is no manifest, or another store's, is somebody else's: it is neither read as a snapshot
//! nor removed. A manifest of this store that is damaged is a snapshot still: which bytes it kept is not known, so the
//! store is not opened, and written to, before somebody gives that snapshot up.

use std::io;
use std::path::{Path, PathBuf};

use crate::directory::{self, MANIFEST};
use crate::error::{Remedy, StoreError};
use crate::manifest::{Manifest, ManifestError};

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

/// What is found under the name of a snapshot.
#[derive(Debug)]
pub(crate) enum Found {
    /// A snapshot of this store.
    Snapshot(Manifest),
    /// Somebody else's file.
    Foreign,
    /// Nothing.
    Nothing,
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

/// All snapshots of the store with the number `store` in `directory`, by name, and the files that only look like some.
///
/// # Errors
/// [`StoreError::Manifest`] for the first one that cannot be read, [`StoreError::Directory`].
pub(crate) fn list(directory: &Path, store: Option<u64>) -> Result<(Vec<Snapshot>, Vec<String>), StoreError> {
    let (mut snapshots, mut foreign) = (Vec::new(), Vec::new());
    for name in names(directory)? {
        match find(directory, &name, store)? {
            Found::Snapshot(manifest) => snapshots.push(Snapshot { name, manifest }),
            Found::Foreign => foreign.push(file_name(&name)),
            // Somebody deleted it just now.
            Found::Nothing => {}
        }
    }
    Ok((snapshots, foreign))
}

/// What is there of this name.
///
/// # Errors
/// [`StoreError::Manifest`] for a snapshot that is damaged or of an unknown version, [`StoreError::Directory`].
pub(crate) fn find(directory: &Path, name: &str, store: Option<u64>) -> Result<Found, StoreError> {
    let path = path(directory, name);
    match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        // What is no plain file was never made by a store.
        Ok(metadata) if !metadata.is_file() => return Ok(Found::Foreign),
        _ => {}
    }
    match directory::read_manifest(&path) {
        Ok(manifest) if store.is_none_or(|store| store == manifest.store) => Ok(Found::Snapshot(manifest)),
        Ok(_) | Err(StoreError::Manifest { source: ManifestError::NotAManifest, .. }) => Ok(Found::Foreign),
        Err(StoreError::Directory { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Found::Nothing)
        }
        Err(StoreError::Manifest { path, source, .. }) => {
            let remedy = Remedy::DeleteSnapshot { path: directory.to_owned(), name: name.to_owned() };
            Err(StoreError::Manifest { path, source, remedy })
        }
        Err(error) => Err(error),
    }
}

/// The names of all files in `directory` that are named like snapshots, in order.
pub(crate) fn names(directory: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |source| StoreError::Directory { action: "list", path: directory.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let file = entry.map_err(failed)?.file_name();
        names.extend(name_of(file.to_str(), PREFIX));
    }
    names.sort_unstable();
    Ok(names)
}

/// The snapshot that a file is named after. Files of other names are somebody else's.
pub(crate) fn name_of(file: Option<&str>, prefix: &str) -> Option<String> {
    let name = file.and_then(|file| file.strip_prefix(prefix));
    name.filter(|name| check_name(name).is_ok()).map(str::to_owned)
}

/// The names of all snapshots there are, damaged ones included.
pub(crate) fn known(directory: &Path, store: Option<u64>) -> Result<Vec<String>, StoreError> {
    let mut known = names(directory)?;
    known.retain(|name| matches!(find(directory, name, store), Ok(Found::Snapshot(_)) | Err(_)));
    Ok(known)
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

/// Takes a snapshot's name away, damaged or not; what only looks like one stays.
pub(crate) fn delete(directory: &Path, name: &str, store: Option<u64>) -> Result<(), StoreError> {
    let path = path(directory, name);
    let missing = || -> Result<(), StoreError> {
        let known = known(directory, store)?;
        Err(StoreError::NoSnapshot { name: name.to_owned(), path: directory.to_owned(), known })
    };
    match find(directory, name, store) {
        Ok(Found::Nothing | Found::Foreign) => return missing(),
        Ok(Found::Snapshot(_)) | Err(_) => {}
    }
    match crate::names::remove(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => missing(),
        removed => removed.map_err(|source| StoreError::Directory { action: "remove", path, source }),
    }
}
