//! A directory of a store: created, locked and owned by one running process, and removed by name.
//!
//! The lock is an advisory file lock, which the kernel drops with the process, however it dies; so a directory whose
//! lock is free belongs to nobody alive. A directory that is already there is never taken over and never deleted:
//! it may hold the only copy of somebody's run. What is removed at the end are the files this module names, one by
//! one, then the directory itself; a foreign file in it keeps the directory and is left alone.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::error::StoreError;

/// The extents, or a part of them; further parts in the same directory are numbered.
const DATA: &str = "data";
/// What the extents mean.
pub(crate) const MANIFEST: &str = "manifest";
/// The next manifest, until it is complete.
pub(crate) const MANIFEST_NEW: &str = "manifest.new";
/// Held locked by the owner; its text is the owner's process id.
const LOCK: &str = "lock";

/// A directory that this process created and holds locked.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    /// Keeps the lock; the kernel lets go of it when this closes.
    _lock: File,
    kept: AtomicBool,
    /// Number of files with extents.
    data_files: usize,
}

impl Directory {
    /// Creates the directory (mode 0700; its parent must exist), in which there will be as many data files, and locks
    /// it. It is made under another name and appears under its own with its lock taken, so that nobody ever sees it
    /// without an owner.
    pub(crate) fn create(path: &Path, data_files: usize) -> Result<Self, StoreError> {
        Self::check_free(path)?;
        let failed = |source| StoreError::Directory { action: "create", path: path.to_owned(), source };
        let made = path.with_added_extension(format!("new-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&made).map_err(failed)?;
        let published = create_lock(&made.join(LOCK)).and_then(|lock| {
            publish(&made, path)?;
            Ok(lock)
        });
        match published {
            Ok(lock) => {
                Ok(Self { path: path.to_owned(), _lock: lock, kept: AtomicBool::new(false), data_files })
            }
            Err(e) => {
                // Both are ours; if even this fails, the first error is the one that matters.
                drop(std::fs::remove_file(made.join(LOCK)));
                drop(std::fs::remove_dir(&made));
                Err(if e.kind() == io::ErrorKind::AlreadyExists { occupied(path) } else { failed(e) })
            }
        }
    }

    /// Says who is in the way, if anybody is. A link that leads nowhere is in the way too.
    pub(crate) fn check_free(path: &Path) -> Result<(), StoreError> {
        match std::fs::symlink_metadata(path) {
            Ok(_) => Err(occupied(path)),
            Err(_) => Ok(()),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The data file of this number.
    pub(crate) fn data(&self, number: usize) -> PathBuf {
        self.path.join(data_name(number))
    }

    /// Leaves the directory on storage when this value is dropped.
    pub(crate) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Makes the names in the directory, and its own, durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()?;
        File::open(parent(&self.path))?.sync_all()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.kept.load(Ordering::Relaxed) {
            return;
        }
        // The lock goes last: as long as anything else is left, the directory is recognizably ours.
        let data = (0..self.data_files).map(data_name);
        let ours =
            [MANIFEST_NEW, MANIFEST].map(str::to_owned).into_iter().chain(data).chain([LOCK.to_owned()]);
        for name in ours {
            drop(std::fs::remove_file(self.path.join(name)));
        }
        drop(std::fs::remove_dir(&self.path));
    }
}

fn data_name(number: usize) -> String {
    if number == 0 { DATA.to_owned() } else { format!("{DATA}.{number}") }
}

/// The directory that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Gives the directory its name, unless somebody has it.
fn publish(made: &Path, path: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, made, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // A file system without the flag: a directory with a file in it is not replaced either.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::rename(made, path),
        Err(errno) => Err(errno.into()),
    }
}

fn create_lock(path: &Path) -> io::Result<File> {
    let mut lock = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    lock.try_lock().map_err(io::Error::from)?;
    write!(lock, "{}", std::process::id())?;
    Ok(lock)
}

/// Says who occupies a directory that already exists.
fn occupied(path: &Path) -> StoreError {
    let leftover = || StoreError::Leftover { path: path.to_owned() };
    let Ok(mut lock) = File::open(path.join(LOCK)) else { return leftover() };
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            let pid = lock.read_to_string(&mut owner).ok().and_then(|_| owner.trim().parse().ok());
            StoreError::Locked { path: path.to_owned(), pid }
        }
        Ok(()) | Err(TryLockError::Error(_)) => leftover(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_living_owner_is_named_and_a_dead_one_is_not_taken_over() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("store");
        let owner = Directory::create(&path, 1).unwrap();
        match Directory::create(&path, 1) {
            Err(StoreError::Locked { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        owner.keep();
        drop(owner);
        assert!(matches!(Directory::create(&path, 1), Err(StoreError::Leftover { .. })));
        assert!(path.join(LOCK).exists());
    }

    #[test]
    fn removal_takes_its_own_files_and_leaves_a_foreign_one() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("store");
        drop(Directory::create(&path, 1).unwrap());
        assert!(!path.exists());

        let directory = Directory::create(&path, 2).unwrap();
        std::fs::write(path.join(DATA), "x").unwrap();
        std::fs::write(path.join("data.1"), "x").unwrap();
        std::fs::write(path.join("data.2"), "of somebody else").unwrap();
        std::fs::write(path.join("thesis.txt"), "dear to somebody").unwrap();
        drop(directory);
        assert!(path.join("thesis.txt").exists());
        assert!(path.join("data.2").exists());
        assert!(!path.join(DATA).exists() && !path.join("data.1").exists());
    }

    #[test]
    fn the_directory_and_the_lock_are_private() {
        let parent = tempfile::tempdir().unwrap();
        let directory = Directory::create(&parent.path().join("store"), 1).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(directory.path()), 0o700);
        assert_eq!(mode(&directory.path().join(LOCK)), 0o600);
    }

    #[test]
    fn a_missing_parent_and_a_symbolic_link_are_typed_errors() {
        let parent = tempfile::tempdir().unwrap();
        let missing = parent.path().join("no/store");
        match Directory::create(&missing, 1) {
            Err(StoreError::Directory { path, source, .. }) => {
                assert_eq!(path, missing);
                assert_eq!(source.kind(), io::ErrorKind::NotFound);
            }
            other => panic!("{other:?}"),
        }
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(parent.path().join("elsewhere"), &link).unwrap();
        assert!(matches!(Directory::create(&link, 1), Err(StoreError::Leftover { .. })));
    }
}
