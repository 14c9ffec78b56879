//! A directory of a store: created, locked and owned by one running process, and removed by name.
//!
//! The lock is an advisory file lock, which the kernel drops with the process, however it dies; so a directory whose
//! lock is free belongs to nobody alive. A directory that is already there is never taken over and never deleted:
//! it may hold the only copy of somebody's run. What is removed at the end are the files this module names, one by
//! one, then the directory itself; a foreign file in it keeps the directory and is left alone. A directory whose owner
//! has ended can be opened again; then it stays. How a directory is looked at without owning it is in [`looking`].
//!
//! The directory is the one that the owner holds open, not whatever its path leads to: people move, remove and replace
//! directories of runs that go on. Where the path leads elsewhere nothing is published, and nothing is removed at the
//! end: what was moved was moved by somebody who may want it, and `gc` finds it there. What is removed or replaced is so
//! in the directory that is held, so that the path may lead elsewhere even between the look and the change: what
//! another's directory can get then is a new file of ours that nobody reads, and the look after the change says so.

mod looking;

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

pub use self::looking::Owner;
pub(crate) use self::looking::{
    Start, check_name, denied, has_lock, has_name, label, lacks_lock, maker, open_as_it_is, owner, read_file,
    read_label, read_manifest, read_start,
};
use self::looking::{open_lock, owner_pid};
use crate::error::{Fallback, StoreError};
use crate::names;

const EPERM: i32 = Errno::PERM.raw_os_error();
const EOPNOTSUPP: i32 = Errno::OPNOTSUPP.raw_os_error();
const ENOSYS: i32 = Errno::NOSYS.raw_os_error();
const EMLINK: i32 = Errno::MLINK.raw_os_error();
const ENOSPC: i32 = Errno::NOSPC.raw_os_error();
const EDQUOT: i32 = Errno::DQUOT.raw_os_error();

/// The extents, or a part of them; further parts in the same directory are numbered.
const DATA: &str = "data";
/// What the extents mean.
pub(crate) const MANIFEST: &str = "manifest";
/// The next manifest, until it is complete.
const MANIFEST_NEW: &str = "manifest.new";
/// The manifest before the current one.
pub(crate) const MANIFEST_PREVIOUS: &str = "manifest.previous";
/// The current manifest, while the next one takes its place.
const MANIFEST_OLD: &str = "manifest.old";
/// A copy of a manifest, until it is complete.
const MANIFEST_COPY: &str = "manifest.copy";
/// Which volume of which store the directory is.
pub(crate) const VOLUME: &str = "volume";
/// Held locked by the owner; its text is the owner's process id.
pub(crate) const LOCK: &str = "lock";

/// For how long, and how often, it is tried again to have a lock that somebody may only be looking at.
const GLANCE: Duration = Duration::from_millis(4);
const GLANCES_MAX: u32 = 50;

/// Longest manifest that is read, in bytes: some eight million tensors.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 1 << 30;

/// How many directories of killed processes may be in the way of one that is made.
const ASIDE_MAX: u32 = 100;

/// Digits of a process id.
const PID_BYTES_MAX: usize = 10;

/// What stands between the name of a directory and the process that makes it, until it is made.
const MAKING: &str = ".new-";

/// A directory that this process created or opened and holds locked.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    /// The directory itself, wherever it is by now.
    held: File,
    /// Keeps the lock; the kernel lets go of it when this closes.
    lock: File,
    kept: AtomicBool,
    /// Names of the files that belong to it.
    files: Mutex<Vec<String>>,
}

impl Directory {
    /// Creates the directory (mode 0700; its parent must exist), in which there will be as many data files, labels it
    /// and locks it. It is made under another name and appears under its own with its lock taken, so that nobody ever
    /// sees it without an owner.
    pub(crate) fn create(path: &Path, data_files: usize, label: &str) -> Result<Self, StoreError> {
        Self::check_free(path)?;
        let failed = |source| StoreError::Directory { action: "create", path: path.to_owned(), source };
        let made = make_aside(path).map_err(failed)?;
        let published = create_lock(&made.join(LOCK)).and_then(|lock| {
            names::write_new(&made.join(VOLUME), label.as_bytes())?;
            let held = hold(&made)?;
            names::publish(&made, path)?;
            Ok((held, lock))
        });
        match published {
            Ok(owned) => Ok(Self::over(path, owned, data_files, AtomicBool::new(false))),
            Err(e) => {
                // Both are ours; if even this fails, the first error is the one that matters.
                drop(std::fs::remove_file(made.join(VOLUME)));
                drop(std::fs::remove_file(made.join(LOCK)));
                drop(std::fs::remove_dir(&made));
                Err(if e.kind() == io::ErrorKind::AlreadyExists { occupied(path) } else { failed(e) })
            }
        }
    }

    /// Takes over the directory of an owner that has ended, with its data files. It stays when this value is dropped.
    pub(crate) fn open(path: &Path, data_files: usize) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Directory { action: "open", path: path.to_owned(), source };
        let is_directory = std::fs::symlink_metadata(path).map_err(failed)?.is_dir();
        if !is_directory {
            return Err(failed(Errno::NOTDIR.into()));
        }
        let held = hold(path).map_err(failed)?;
        let opened = open_lock(path, OpenOptions::new().read(true).write(true));
        let mut lock = opened.map_err(|source| without_lock(path, source))?;
        let mut glances = GLANCES_MAX;
        loop {
            match lock.try_lock() {
                Err(TryLockError::WouldBlock) if glances == 0 => return Err(locked(path, &mut lock)),
                // Whoever only looks whether there is an owner has the lock for a moment.
                Err(TryLockError::WouldBlock) => std::thread::park_timeout(GLANCE),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
                Ok(()) => break,
            }
            glances -= 1;
        }
        // The owner may have removed the directory, and somebody made it anew, between the two.
        let is_here =
            has_name(&lock, &path.join(LOCK)).and_then(|is_lock| Ok(is_lock && has_name(&held, path)?));
        if !is_here.map_err(failed)? {
            return Err(locked(path, &mut lock));
        }
        Ok(Self::over(path, (held, lock), data_files, AtomicBool::new(true)))
    }

    fn over(path: &Path, (held, lock): (File, File), data_files: usize, kept: AtomicBool) -> Self {
        let fixed = [MANIFEST_COPY, MANIFEST_NEW, MANIFEST_OLD, MANIFEST_PREVIOUS, MANIFEST];
        let mut files: Vec<String> = fixed.map(str::to_owned).into();
        files.extend((0..data_files).map(data_name));
        Self { path: path.to_owned(), held, lock, kept, files: Mutex::new(files) }
    }

    /// Whether its path leads to it, and nobody else's lock is in it. One that has lost its name is no reason to stop: it
    /// is a file that nobody writes for weeks, and such are taken away from folders of temporary files.
    ///
    /// # Errors
    /// [`StoreError::Displaced`], and [`StoreError::Directory`] when it is not known.
    pub(crate) fn check_own(&self) -> Result<(), StoreError> {
        check_name(&self.held, &self.path)?;
        let lock = self.path.join(LOCK);
        match check_name(&self.lock, &lock) {
            Err(StoreError::Displaced { .. }) if std::fs::symlink_metadata(&lock).is_err() => Ok(()),
            checked => checked,
        }
    }

    /// Says in the lock who holds it; only when it is known that the directory is a store, and its own is what was read.
    pub(crate) fn sign(&self) -> Result<(), StoreError> {
        self.check_own()?;
        let sign = || {
            self.lock.set_len(0)?;
            self.lock.write_all_at(std::process::id().to_string().as_bytes(), 0)
        };
        sign().map_err(|source| match source.raw_os_error() {
            Some(errno @ (ENOSPC | EDQUOT)) => {
                let (needed, available) = (PID_BYTES_MAX as u64, self.available());
                let fallback = Fallback::Unchanged;
                StoreError::DiskFull { path: self.path.join(LOCK), needed, available, errno, fallback }
            }
            _ => StoreError::Directory { action: "sign", path: self.path.join(LOCK), source },
        })
    }

    /// Names of all files that belong to it, whether they exist or not.
    pub(crate) fn files(&self) -> Vec<String> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.iter().map(String::as_str).chain([VOLUME, LOCK]).map(str::to_owned).collect()
    }

    /// Adds files that belong to the directory, and go with it.
    pub(crate) fn forget(&self, names: impl Iterator<Item = String>) {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).extend(names);
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

    /// Whether the directory stays when this value is dropped.
    pub(crate) fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// Writes the current manifest: aside, made durable, and renamed, so that a reader finds the old one or the new
    /// one. The old one stays as the previous one.
    pub(crate) fn publish(&self, manifest: &[u8]) -> Result<(), StoreError> {
        self.prepare(manifest, Fallback::Unchanged)?;
        self.check_own()?;
        self.replace()
    }

    /// Writes the next manifest aside, durably, and keeps a name for the current one. Whatever fails, the current one
    /// is the one that is found, which is the `fallback` then, and this can be tried again.
    pub(crate) fn prepare(&self, manifest: &[u8], fallback: Fallback) -> Result<(), StoreError> {
        self.check_own()?;
        let [aside, outgoing, current] =
            [MANIFEST_NEW, MANIFEST_OLD, MANIFEST].map(|name| self.path.join(name));
        let write = || -> io::Result<()> {
            names::remove_in(&self.held, &aside).or_else(tolerate_missing)?;
            names::remove_in(&self.held, &outgoing).or_else(tolerate_missing)?;
            names::write_new(&aside, manifest)?;
            // The previous one goes only after the next one has come: it may be what is restored.
            give_another_name(&current, &outgoing).or_else(tolerate_missing)
        };
        write().map_err(|source| match source.raw_os_error() {
            Some(errno @ (ENOSPC | EDQUOT)) => {
                // What was written of it would be in the way of whoever makes room.
                drop(names::remove_in(&self.held, &aside));
                let (needed, available) = (manifest.len() as u64, self.available());
                StoreError::DiskFull { path: aside.clone(), needed, available, errno, fallback }
            }
            _ => StoreError::Directory { action: "write", path: aside.clone(), source },
        })
    }

    /// Lets the manifest that was prepared take the place of the current one. If this fails, either of them may be
    /// found: it is for the caller to look before whether that can still be.
    pub(crate) fn replace(&self) -> Result<(), StoreError> {
        let replaced = self.replace_manifest();
        // What became durable where the path does not lead is not found again; and if it leads elsewhere by now, that is
        // what has to be told of what failed.
        self.check_own().and(replaced)
    }

    fn replace_manifest(&self) -> Result<(), StoreError> {
        let [aside, outgoing, current, previous] =
            [MANIFEST_NEW, MANIFEST_OLD, MANIFEST, MANIFEST_PREVIOUS].map(|name| self.path.join(name));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Directory { action: "replace", path, source }
        };
        names::rename_in(&self.held, &aside, &current).map_err(failed(&current))?;
        let renamed = names::rename_in(&self.held, &outgoing, &previous);
        renamed.or_else(tolerate_missing).map_err(failed(&previous))?;
        self.sync().map_err(failed(&current))
    }

    /// Writes the label anew; whatever fails, there is the old one or the new one.
    pub(crate) fn relabel(&self, label: &str) -> io::Result<()> {
        let aside = self.path.join(MANIFEST_COPY);
        names::remove_in(&self.held, &aside).or_else(tolerate_missing)?;
        names::write_new(&aside, label.as_bytes())?;
        names::rename_in(&self.held, &aside, &self.path.join(VOLUME))?;
        self.sync()
    }

    /// Bytes that the file system has left; 0 if it does not say.
    fn available(&self) -> u64 {
        rustix::fs::statvfs(&self.path).map_or(0, |space| space.f_bavail.saturating_mul(space.f_frsize))
    }

    /// Takes the manifests away, durably.
    pub(crate) fn withdraw(&self) -> Result<(), StoreError> {
        let withdraw = || {
            for name in [MANIFEST, MANIFEST_OLD, MANIFEST_PREVIOUS] {
                names::remove_in(&self.held, &self.path.join(name)).or_else(tolerate_missing)?;
            }
            self.sync()
        };
        let withdrawn = withdraw();
        // Only where the path leads it became durable.
        self.check_own()?;
        withdrawn.map_err(|source| StoreError::directory("withdraw", &self.path.join(MANIFEST), source))
    }

    /// Makes the names in the directory durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        names::sync(&self.path)
    }

    /// Makes the names in the directory, and its own, durable.
    pub(crate) fn sync_names(&self) -> io::Result<()> {
        self.sync()?;
        File::open(parent(&self.path))?.sync_all()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !self.is_kept() {
            // Nobody is left who could be told; what stays can be found, and removed, by what it holds.
            drop(self.remove());
        }
        // Closing would do, but for a process that was forked meanwhile and has the descriptor, too.
        drop(self.lock.unlock());
    }
}

impl Directory {
    /// Removes what is its own, and the directory unless there is something else in it. The label and the lock go last:
    /// as long as anything else of it is left, the directory is recognizably ours.
    ///
    /// # Errors
    /// [`StoreError::Displaced`] when it is not where it was: everything stays then. [`StoreError::Directory`] for the
    /// first file that stays.
    pub(crate) fn remove(&self) -> Result<(), StoreError> {
        self.check_own()?;
        let files = self.files();
        let (first, last) = files.split_last_chunk::<2>().expect("the label and the lock are among them");
        let remove = |name: &String| {
            let path = self.path.join(name);
            let removed = names::remove_in(&self.held, &path).or_else(tolerate_missing);
            removed.map_err(|source| StoreError::directory("remove", &path, source))
        };
        let stays = first.iter().filter_map(|name| remove(name).err()).collect::<Vec<_>>();
        if let Some(stays) = stays.into_iter().next() {
            return Err(stays);
        }
        last.iter().try_for_each(remove)?;
        // Something else in it is nothing that went wrong. If the path leads elsewhere by now, no more than an empty
        // directory can go.
        drop(std::fs::remove_dir(&self.path));
        Ok(())
    }
}

pub(crate) fn data_name(number: usize) -> String {
    if number == 0 { DATA.to_owned() } else { format!("{DATA}.{number}") }
}

/// The directory that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Holds a directory, so that no other one has its number, without reading it.
fn hold(path: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Makes an empty directory beside `path`. Processes have one number after the other, so there may be some of earlier
/// ones that were killed before they gave theirs its name.
fn make_aside(path: &Path) -> io::Result<PathBuf> {
    let mut attempt = 0;
    loop {
        let made = path.with_added_extension(format!("{}{}-{attempt}", &MAKING[1..], std::process::id()));
        match DirBuilder::new().mode(0o700).create(&made) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < ASIDE_MAX => attempt += 1,
            created => return created.map(|()| made),
        }
    }
}

/// Says that a directory's lock cannot be opened, and what can be done if the rest of a store is there.
fn without_lock(directory: &Path, source: io::Error) -> StoreError {
    let path = directory.join(LOCK);
    let is_there = |name| std::fs::symlink_metadata(directory.join(name)).is_ok();
    if source.kind() == io::ErrorKind::PermissionDenied || ![VOLUME, MANIFEST].into_iter().any(is_there) {
        return StoreError::Directory { action: "open", path, source };
    }
    StoreError::NoLock { path, source }
}

fn tolerate_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Lets a file that nobody will change have one more name, which must be free; on a file system where files have one
/// name only, it is copied.
pub(crate) fn give_another_name(file: &Path, name: &Path) -> io::Result<()> {
    match names::link(file, name) {
        Err(error) if matches!(error.raw_os_error(), Some(EPERM | EOPNOTSUPP | ENOSYS | EMLINK)) => {
            // Under a name that nobody reads until it is whole.
            let aside = file.with_file_name(MANIFEST_COPY);
            names::remove(&aside).or_else(tolerate_missing)?;
            names::write_new(&aside, &read_file(file, MANIFEST_BYTES_MAX)?)?;
            names::publish(&aside, name)
        }
        linked => linked,
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
    let leftover = || StoreError::Leftover { path: path.to_owned(), flaw: None };
    let Ok(mut lock) = open_lock(path, OpenOptions::new().read(true)) else { return leftover() };
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => locked(path, &mut lock),
        Ok(()) | Err(TryLockError::Error(_)) => leftover(),
    }
}

/// Says who holds the lock.
fn locked(path: &Path, lock: &mut File) -> StoreError {
    StoreError::Locked { path: path.to_owned(), pid: owner_pid(lock) }
}

#[cfg(test)]
mod tests;
