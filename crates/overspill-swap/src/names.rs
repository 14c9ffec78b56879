//! Names and small files: every change to a store's directory that a crash may meet is made here. What is not is worth
//! nothing after one: what the lock says and what answers to wishes do, and a directory with nothing in it yet, or any
//! more.
//!
//! With the feature `sim` a directory can be one that loses its power; then the changes go through [`outage`], which
//! knows what was not flushed yet.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, RenameFlags};
use rustix::io::Errno;

use crate::steps::{Step, step};

#[cfg(feature = "sim")]
pub(crate) mod outage;

/// Makes a file that does not exist yet, durably but for its name.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    #[cfg(feature = "sim")]
    if let Some(endangered) = outage::of(path) {
        return endangered.write_new(path, bytes);
    }
    step(Step::Create);
    let mut file = open_new(path)?;
    step(Step::Write);
    file.write_all(bytes)?;
    step(Step::Flush);
    file.sync_all()
}

/// Makes a file that does not exist yet, with nothing in it, and opens it for reading and writing.
pub(crate) fn create_empty(path: &Path) -> io::Result<File> {
    #[cfg(feature = "sim")]
    if let Some(endangered) = outage::of(path) {
        return endangered.create_empty(path);
    }
    step(Step::Create);
    open_new(path)
}

fn open_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Lets a file have one more name, which must be free.
pub(crate) fn link(file: &Path, name: &Path) -> io::Result<()> {
    #[cfg(feature = "sim")]
    if let Some(endangered) = outage::of(name) {
        return endangered.link(file, name);
    }
    step(Step::Link);
    std::fs::hard_link(file, name)
}

/// Gives a file another name, which nobody or another file has: from the end of one path to that of the other, in a
/// directory that is held, wherever that is by now.
pub(crate) fn rename_in(directory: &File, from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(feature = "sim")]
    if let Some(endangered) = outage::of(to) {
        return endangered.rename(from, to);
    }
    step(Step::Rename);
    Ok(rustix::fs::renameat(directory, name(from), directory, name(to))?)
}

/// Gives what was made its name, unless somebody has it.
pub(crate) fn publish(made: &Path, path: &Path) -> io::Result<()> {
    #[cfg(feature = "sim")]
    if let Some(endangered) = outage::of(path) {
        check_free(path)?;
        return endangered.rename(made, path);
    }
    step(Step::Rename);
    match rustix::fs::renameat_with(CWD, made, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // A file system without the flag: what comes between the two is replaced, unless it is a directory with a file
        // in it. Who makes names here holds the lock of the directory, or has a name that nobody else would take.
        Err(Errno::INVAL | Errno::NOSYS) => {
            check_free(path)?;
            std::fs::rename(made, path)
        }
        Err(errno) => Err(errno.into()),
    }
}

/// A link that leads nowhere is something, too.
fn check_free(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Takes a file's name away.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    #[cfg(feature = "sim")]
    if let Some(endangered) = outage::of(path) {
        return endangered.remove(path);
    }
    step(Step::Remove);
    std::fs::remove_file(path)
}

/// As [`remove`], of a file at the end of a path, in a directory that is held, wherever that is by now.
pub(crate) fn remove_in(directory: &File, path: &Path) -> io::Result<()> {
    #[cfg(feature = "sim")]
    if let Some(endangered) = outage::of(path) {
        return endangered.remove(path);
    }
    step(Step::Remove);
    Ok(rustix::fs::unlinkat(directory, name(path), AtFlags::empty())?)
}

/// Of a path without one nothing is found.
fn name(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

/// Makes the names in a directory durable.
pub(crate) fn sync(directory: &Path) -> io::Result<()> {
    #[cfg(feature = "sim")]
    if let Some(endangered) = outage::in_directory(directory) {
        return endangered.sync();
    }
    step(Step::FlushNames);
    File::open(directory)?.sync_all()
}
