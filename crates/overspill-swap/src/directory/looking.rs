//! What a directory of a store, and any file in it, says to whoever only looks.
//!
//! Nothing here trusts what it finds: links are not followed, nobody at the other end of a pipe is waited for, and no more
//! is read than a file of a store could have. A look leaves everything as it was; that at the lock shares it for a moment,
//! with which [`Directory::open`](super::Directory::open) is patient.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{OFlags, Stat};

use super::{LOCK, MAKING, MANIFEST, MANIFEST_BYTES_MAX, PID_BYTES_MAX, VOLUME};
use crate::error::{Remedy, StoreError};
use crate::manifest::Manifest;

/// Longest label that is read, in bytes.
const LABEL_BYTES_MAX: u64 = 64;

/// Which volume of which store a directory says it is; nothing if it is of a time when they said nothing.
fn label_text(directory: &Path) -> Result<String, StoreError> {
    let path = directory.join(VOLUME);
    match read_file(&path, LABEL_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(StoreError::Directory { action: "read", path, source }),
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

/// Reads a manifest, or a snapshot's.
///
/// # Errors
/// [`StoreError::Directory`] when the file cannot be read, [`StoreError::Manifest`] when it is no sound manifest.
pub(crate) fn read_manifest(path: &Path) -> Result<Manifest, StoreError> {
    let bytes = match read_file(path, MANIFEST_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(source) => return Err(StoreError::Directory { action: "read", path: path.to_owned(), source }),
    };
    let refused = |source| StoreError::Manifest { path: path.to_owned(), source, remedy: Remedy::None };
    Manifest::decode(&bytes).map_err(refused)
}

/// Which volume of which store a label names; `None` for what is no label.
pub(crate) fn read_label(directory: &Path) -> Option<(u64, usize)> {
    let text = label_text(directory).ok()?;
    let (store, index) = text.split_once(' ')?;
    let (store, index) = (u64::from_str_radix(store, 16).ok()?, index.parse().ok()?);
    (label(store, index) == text).then_some((store, index))
}

/// Who has a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Nobody alive.
    Nobody,
    /// A running process.
    Process {
        /// Its id, when it could be read.
        pid: Option<u32>,
    },
}

/// Who has the directory. It is looked at by sharing the lock for a moment, which leaves it as it was;
/// [`Directory::open`] is patient with that.
///
/// # Errors
/// Of the lock's file: there may be none.
pub(crate) fn owner(path: &Path) -> io::Result<Owner> {
    let mut lock = open_lock(path, OpenOptions::new().read(true))?;
    match lock.try_lock_shared() {
        Ok(()) => Ok(Owner::Nobody),
        Err(TryLockError::WouldBlock) => Ok(Owner::Process { pid: owner_pid(&mut lock) }),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// What the lock of a directory says; it is nobody's text if it is not at most a process id.
pub(crate) fn has_lock(path: &Path) -> bool {
    let text = read_file(&path.join(LOCK), LABEL_BYTES_MAX);
    text.is_ok_and(|text| text.len() <= PID_BYTES_MAX && text.iter().all(u8::is_ascii_digit))
}

/// Whether there is no lock, or none that could ever be one: a link, say, or what may not be read.
pub(crate) fn lacks_lock(path: &Path) -> bool {
    !std::fs::symlink_metadata(path.join(LOCK)).is_ok_and(|metadata| metadata.is_file())
        || open_lock(path, OpenOptions::new().read(true)).is_err()
}

/// The system's refusal to show what is in a directory, if it refuses.
pub(crate) fn denied(path: &Path) -> Option<StoreError> {
    let is_denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    let listed = std::fs::read_dir(path).err().map(|error| (path.to_owned(), error));
    let files = [LOCK, VOLUME, MANIFEST].into_iter().filter_map(|name| {
        let file = path.join(name);
        let error = read_start(&file, 1).err()?;
        Some((file, error))
    });
    let (path, source) = listed.into_iter().chain(files).find(|(_, error)| is_denied(error))?;
    Some(StoreError::Directory { action: "open", path, source })
}

/// The process that is making a directory of this name, if that is what the name says.
pub(crate) fn maker(name: &str) -> Option<u32> {
    let (_, text) = name.rsplit_once(MAKING)?;
    let (pid, attempt) = text.split_once('-')?;
    let is_attempt = attempt.parse::<u32>().is_ok_and(|number| number.to_string() == attempt);
    pid.parse().ok().filter(|number: &u32| is_attempt && number.to_string() == pid)
}

/// The whole of a plain file of at most `bytes_max` bytes.
pub(crate) fn read_file(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = open_as_it_is(path, OpenOptions::new().read(true))?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > bytes_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a file of a store"));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What a plain file begins with.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) metadata: Metadata,
    pub(crate) bytes: Vec<u8>,
}

/// The first bytes of a plain file, at most as many; `None` for what is no plain file.
pub(crate) fn read_start(path: &Path, bytes_max: usize) -> io::Result<Option<Start>> {
    // Of what is no file, not even the opening is tried: a device may mind.
    if !std::fs::symlink_metadata(path)?.is_file() {
        return Ok(None);
    }
    let file = open_as_it_is(path, OpenOptions::new().read(true))?;
    let metadata = file.metadata()?;
    let mut bytes = Vec::new();
    file.take(bytes_max as u64).read_to_end(&mut bytes)?;
    Ok(metadata.is_file().then_some(Start { metadata, bytes }))
}

/// What a volume of the store with this number is labelled with.
pub(crate) fn label(store: u64, index: usize) -> String {
    format!("{store:016x} {index}")
}

/// Whether a name is that of an open file. No other file has its number as long as it is open, whatever became of it.
///
/// # Errors
/// Of either: there may be nothing of this name.
pub(crate) fn has_name(file: impl AsFd, path: &Path) -> io::Result<bool> {
    let identity = |stat: Stat| (stat.st_dev, stat.st_ino);
    Ok(identity(rustix::fs::fstat(file)?) == identity(rustix::fs::lstat(path)?))
}

/// Whether a path leads to the open file.
///
/// # Errors
/// [`StoreError::Displaced`] when it does not, [`StoreError::Directory`] when that is not known.
pub(crate) fn check_name(file: impl AsFd, path: &Path) -> Result<(), StoreError> {
    let displaced = || StoreError::Displaced { path: path.to_owned() };
    match has_name(file, path) {
        Ok(true) => Ok(()),
        Ok(false) => Err(displaced()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(displaced())
        }
        Err(source) => Err(StoreError::directory("look at", path, source)),
    }
}

/// Opens the lock of a directory.
pub(super) fn open_lock(directory: &Path, options: &mut OpenOptions) -> io::Result<File> {
    open_as_it_is(&directory.join(LOCK), options)
}

/// Opens a file, but not what a link leads to, and without waiting for somebody at the other end of a pipe.
pub(crate) fn open_as_it_is(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options.custom_flags(flags.bits() as i32).open(path)
}

/// Who says in a lock that it is his.
pub(super) fn owner_pid(lock: &mut File) -> Option<u32> {
    let mut owner = String::new();
    lock.take(LABEL_BYTES_MAX).read_to_string(&mut owner).ok().and_then(|_| owner.trim().parse().ok())
}
