//! Snapshots: manifests that stay, under names of their own.
//!
//! A snapshot is made by giving the manifest one more name, so it takes as long as a directory entry takes, whatever
//! the size of the state. Its file is `snapshot.NAME` in the store's directory; what it names is kept by the ledger.
//!
//! A file of such a name that is no manifest, or another store's, is somebody else's: it is neither read as a snapshot
//! nor removed. A manifest of this store that is damaged is a snapshot still: which bytes it kept is not known, so the
//! store is not opened, and written to, before somebody gives that snapshot up. Whose a file is, is seen in its first
//! bytes, so that nothing of somebody else's is read beyond them:
//!
//! - A plain file that begins as manifests do is one, whatever follows.
//! - A private plain file of ours is a damaged one if it begins nearly so, however little there is of it: as a few wrong
//!   bytes, a cut to any length, and a loss of power that leaves zeros make it.
//! - Everything else is somebody else's.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::directory::{self, MANIFEST, MANIFEST_BYTES_MAX, Start};
use crate::error::{Remedy, StoreError};
use crate::manifest::{self, MAGIC, Manifest, ManifestError};

/// What the names of snapshots' files begin with.
pub(crate) const PREFIX: &str = "snapshot.";

/// Longest name of a snapshot, in bytes.
const NAME_MAX: usize = 64;

/// How many of the first bytes of a manifest may be others in one that is damaged: a few, so that no text of somebody
/// else's comes as close.
const WRONG_BYTES_MAX: usize = 4;

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

/// As [`check_name`], for a name that a snapshot is to have: it is no option of a command, and no hidden file.
pub(crate) fn check_new_name(name: &str) -> Result<(), StoreError> {
    check_name(name)?;
    if name.starts_with(['-', '.']) {
        return Err(StoreError::SnapshotName { name: name.to_owned() });
    }
    Ok(())
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
    match directory::read_start(&path, manifest::HEADER_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(source) => return Err(StoreError::directory("read", &path, source)),
        // What is no plain file was never made by a store.
        Ok(None) => return Ok(Found::Foreign),
        Ok(Some(start)) if !is_ours(&start) => return Ok(Found::Foreign),
        Ok(Some(_)) => {}
    }
    match directory::read_manifest(&path) {
        Ok(manifest) if store.is_none_or(|store| store == manifest.store) => Ok(Found::Snapshot(manifest)),
        Ok(_) => Ok(Found::Foreign),
        Err(StoreError::Directory { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Found::Nothing)
        }
        Err(StoreError::Manifest { path, source, .. }) => {
            let remedy = Remedy::for_manifest(&source, || Remedy::DeleteSnapshot {
                path: directory.to_owned(),
                name: name.to_owned(),
            });
            // It was one, by all that is known.
            let source = if source == ManifestError::NotAManifest { ManifestError::Header } else { source };
            Err(StoreError::Manifest { path, source, remedy })
        }
        Err(error) => Err(error),
    }
}

/// Whether a file is a manifest, or was one before it was damaged, as far as its first bytes show it.
fn is_ours(Start { metadata, bytes }: &Start) -> bool {
    if bytes.starts_with(MAGIC.as_bytes()) {
        return true;
    }
    let is_private = |metadata: &Metadata| {
        metadata.mode() & 0o077 == 0 && metadata.uid() == rustix::process::geteuid().as_raw()
    };
    if metadata.len() > MANIFEST_BYTES_MAX || !is_private(metadata) {
        return false;
    }
    let expected = &MAGIC.as_bytes()[..MAGIC.len().min(bytes.len())];
    let wrong = expected.iter().zip(bytes).filter(|(expected, byte)| expected != byte).count();
    // Of a few bytes a few would be all.
    let nearly = wrong <= WRONG_BYTES_MAX.min(expected.len() / 2);
    nearly || bytes.iter().all(|&byte| byte == 0)
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
    known.retain(|name| is_snapshot(&find(directory, name, store)));
    Ok(known)
}

/// Whether a snapshot was found, damaged or not. What cannot be read is not known to be one.
pub(crate) fn is_snapshot(found: &Result<Found, StoreError>) -> bool {
    matches!(found, Ok(Found::Snapshot(_)) | Err(StoreError::Manifest { .. }))
}

/// The manifest of a snapshot.
///
/// # Errors
/// [`StoreError::NoSnapshot`], and those of [`find`].
pub(crate) fn get(directory: &Path, name: &str, store: Option<u64>) -> Result<Manifest, StoreError> {
    match find(directory, name, store)? {
        Found::Snapshot(manifest) => Ok(manifest),
        Found::Foreign | Found::Nothing => Err(missing(directory, name, store)),
    }
}

/// Says that there is no snapshot of this name, and which ones there are.
fn missing(directory: &Path, name: &str, store: Option<u64>) -> StoreError {
    let no = |known| StoreError::NoSnapshot { name: name.to_owned(), path: directory.to_owned(), known };
    known(directory, store).map_or_else(|error| error, no)
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
    let found = find(directory, name, store);
    if !is_snapshot(&found) {
        return Err(found.err().unwrap_or_else(|| missing(directory, name, store)));
    }
    match crate::names::remove(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(missing(directory, name, store)),
        removed => removed.map_err(|source| StoreError::directory("remove", &path, source)),
    }
}
