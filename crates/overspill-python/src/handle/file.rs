//! Files as DeepSpeed names them: by a path, or by a descriptor.
//!
//! A file is opened for one operation. To be written it is made if there is none, readable and writable by its owner, and
//! it is never cut; symbolic links are followed. Of a descriptor the file is opened anew, so that no flag or position of
//! the caller's is changed, and the caller may close it at once. To be validated it is opened a second time, by the first
//! and not by its name: what was moved is compared with the file that it was moved to, wherever that is by then.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use overspill_io::{Direction, Engine, IoError};
use pyo3::exceptions::{PyTypeError, PyUnicodeError};
use pyo3::prelude::*;
use pyo3::types::PyBool;

use super::order::FileKey;
use crate::argument::{shown, whole};
use crate::error::Error;
use crate::tensor::Tensor;

/// What a caller calls a file.
#[derive(Debug)]
pub(super) enum Name {
    Path(PathBuf),
    Descriptor(i32),
}

impl Name {
    /// What Python means by `file`: a path of any kind that `os` knows, or a number.
    ///
    /// # Errors
    /// [`Error::Argument`] for what cannot be the name of a file; whatever else Python raises meanwhile.
    pub(super) fn of(file: &Bound<'_, PyAny>) -> Result<Self, Error> {
        let refused = |reason: &str| Error::Argument(format!("{} is no file: {reason}", shown(file)));
        let is_number =
            !file.is_instance_of::<PyBool>() && file.hasattr("__index__").map_err(Error::Raised)?;
        if is_number {
            return whole("the descriptor", file, 0..=i32::MAX).map(Self::Descriptor);
        }
        let encoded = file.py().import("os").and_then(|os| os.call_method1("fsencode", (file,)));
        let path: Vec<u8> = encoded.and_then(|path| path.extract()).map_err(|error| {
            if error.is_instance_of::<PyUnicodeError>(file.py()) {
                refused("no file system has such characters")
            } else if error.is_instance_of::<PyTypeError>(file.py()) {
                refused("give its path, or its descriptor")
            } else {
                Error::Raised(error)
            }
        })?;
        if path.is_empty() || path.contains(&0) {
            return Err(refused("its path must have characters, and none of them be NUL"));
        }
        Ok(Self::Path(OsString::from_vec(path).into()))
    }
}

/// A file that an engine can use.
pub(super) struct Opened {
    pub(super) file: overspill_io::File,
    pub(super) key: FileKey,
    /// To compare it with a tensor, if that was asked for.
    pub(super) witness: Option<Witness>,
}

/// Opens what `name` means, to move bytes in `direction`.
pub(super) fn open(
    engine: &Engine,
    name: &Name,
    direction: Direction,
    is_validated: bool,
) -> Result<Opened, Error> {
    let (path, told) = match name {
        Name::Path(path) => (path.clone(), path.clone()),
        Name::Descriptor(number) => descriptor(*number, direction)?,
    };
    let failed = |error: io::Error| Error::from(failure("open", &told, &error));
    let file = open_std(&path, direction).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let key = FileKey { device: metadata.dev(), inode: metadata.ino() };
    // What is no file is refused before it is opened again.
    let number = file.as_raw_fd();
    let file = engine.adopt(file, &told)?;
    let witness = if is_validated { Some(Witness::of(number, told)?) } else { None };
    Ok(Opened { file, key, witness })
}

fn open_std(path: &Path, direction: Direction) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // Whoever opens a pipe would wait for its other end.
    options.mode(0o600).custom_flags(libc::O_NONBLOCK);
    if direction == Direction::Read {
        return options.read(true).open(path);
    }
    options.write(true).create(true).truncate(false);
    // What is around an odd end is read before it is written.
    match options.clone().read(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => options.open(path),
        opened => opened,
    }
}

/// The path by which the kernel opens the file of a descriptor of this process, and its name.
fn descriptor(number: i32, direction: Direction) -> Result<(PathBuf, PathBuf), Error> {
    let told = PathBuf::from(format!("file descriptor {number}"));
    let bad = || IoError::File { action: "use", path: told.clone(), errno: libc::EBADF };
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).map_err(|_| bad())?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()).ok_or_else(bad)?;
    let forbidden = if direction == Direction::Read { libc::O_WRONLY } else { libc::O_RDONLY };
    if flags & libc::O_ACCMODE == forbidden {
        return Err(bad().into());
    }
    let path = link(number);
    let told = fs::read_link(&path).unwrap_or(told);
    Ok((path, told))
}

/// A file as everybody reads it, through the page cache.
pub(super) struct Witness {
    file: File,
    path: PathBuf,
}

impl Witness {
    /// Opens the file of a descriptor that is open meanwhile.
    fn of(number: i32, path: PathBuf) -> Result<Self, Error> {
        let mut options = OpenOptions::new();
        let opened = options.read(true).custom_flags(libc::O_NONBLOCK).open(link(number));
        match opened {
            Ok(file) => Ok(Self { file, path }),
            Err(error) => Err(failure("validate", &path, &error).into()),
        }
    }

    /// Compares the file, from `offset` on, with a tensor that was moved.
    pub(super) fn compare(&self, offset: u64, tensor: &Tensor) -> Result<(), Error> {
        const PIECE_BYTES: usize = 1 << 20;
        let failed = |error: io::Error| Error::from(failure("validate", &self.path, &error));
        let mut found = vec![0; PIECE_BYTES.min(tensor.len())];
        for (index, expected) in tensor.bytes().chunks(PIECE_BYTES).enumerate() {
            let found = &mut found[..expected.len()];
            let start = offset + (index * PIECE_BYTES) as u64;
            self.file.read_exact_at(found, start).map_err(failed)?;
            if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
                let (path, at) = (self.path.display(), start + at as u64);
                return Err(Error::Corrupt(format!("{path} is not the tensor from byte {at} on")));
            }
        }
        Ok(())
    }
}

/// The path by which the kernel opens the file of a descriptor, whatever its name.
fn link(number: i32) -> PathBuf {
    format!("/proc/self/fd/{number}").into()
}

fn failure(action: &'static str, path: &Path, error: &io::Error) -> IoError {
    IoError::File { action, path: path.to_owned(), errno: error.raw_os_error().unwrap_or(libc::EIO) }
}
