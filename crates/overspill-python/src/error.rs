//! What can go wrong, and the exception of the package that says it.
//!
//! The classes are in `python/overspill/errors.py`; here is which error is told by which.

use std::ffi::OsString;
use std::sync::Arc;

use overspill_io::{Failed, IoError, PoolError};
use overspill_optim::{ApplyError, RecipeError};
use overspill_swap::StoreError;
use overspill_swap::optimizer::{OptimizerError, PassError, TooSmall};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyModule;

/// Anything that a native call can end with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// An argument that cannot be meant.
    #[error("{0}")]
    Argument(String),
    /// Something that is not supported, and never will be half-way.
    #[error("{0}")]
    Unsupported(String),
    /// The object is not in a state in which this can be done.
    #[error("{0}")]
    State(String),
    #[error(
        "this object belongs to process {owner}, not to its fork {current}: make it after forking, or use spawn"
    )]
    Forked { owner: u32, current: u32 },
    #[error(
        "the threads that compute are those of process {owner}, and its fork {current} has none of them: start processes by \
         spawn"
    )]
    ThreadsForked { owner: u32, current: u32 },
    #[error("a bug in overspill, please report it: {0}")]
    Panic(String),
    /// What a signal handler raised, or somebody's code that was called.
    #[error("{0}")]
    Raised(PyErr),
    /// What is stored is not what was written.
    #[error("{0}")]
    Corrupt(String),
    /// Of several things that were waited for together, the first that failed.
    #[error("{first}{}", also(*more))]
    Several { first: Arc<Error>, more: usize },
    #[error(transparent)]
    Io(#[from] IoError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    #[error(transparent)]
    Budget(#[from] TooSmall),
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        Self::Io(failed.error)
    }
}

impl<E: Into<Error>> From<PassError<E>> for Error {
    fn from(error: PassError<E>) -> Self {
        match error {
            PassError::Swapper(error) => error.into(),
            PassError::Compute(error) => error.into(),
        }
    }
}

/// How many more failed.
fn also(more: usize) -> String {
    match more {
        0 => String::new(),
        1 => " (and 1 more operation failed)".to_owned(),
        more => format!(" (and {more} more operations failed)"),
    }
}

/// What the exception for an error of the engine says besides its message.
struct Told {
    class: &'static str,
    errno: Option<i32>,
    /// Not always text; Python has it as `os.fsdecode` does.
    path: Option<OsString>,
}

impl Told {
    fn plain(class: &'static str) -> Self {
        Self { class, errno: None, path: None }
    }

    fn of(error: &Error) -> Self {
        match error {
            Error::Argument(_) | Error::Recipe(_) | Error::Apply(_) => Self::plain("ArgumentError"),
            Error::Unsupported(_) => Self::plain("UnsupportedError"),
            Error::State(_) => Self::plain("StateError"),
            Error::Forked { .. } | Error::ThreadsForked { .. } => Self::plain("ForkError"),
            Error::Panic(_) | Error::Raised(_) => Self::plain("InternalError"),
            Error::Corrupt(_) => Self::plain("CorruptionError"),
            Error::Several { first, .. } => Self::of(first),
            Error::Budget(_) => Self::plain("MemoryBudgetError"),
            Error::Io(error) => Self::of_io(error),
            Error::Pool(_) => Self::plain("MemoryBudgetError"),
            Error::Store(error) | Error::Optimizer(OptimizerError::Store(error)) => Self::of_store(error),
            Error::Optimizer(OptimizerError::Lost | OptimizerError::OtherParameters { .. }) => {
                Self::plain("StateError")
            }
            Error::Optimizer(_) => Self::plain("ArgumentError"),
        }
    }

    fn of_io(error: &IoError) -> Self {
        match error {
            IoError::Transfer { errno, path, .. } | IoError::File { errno, path, .. } => Self {
                class: if is_full(*errno) { "DiskFullError" } else { "StorageError" },
                errno: Some(*errno),
                path: Some(path.as_os_str().to_owned()),
            },
            IoError::Backend { errno, .. } => Self { class: "EngineError", errno: Some(*errno), path: None },
            IoError::NoSpace { path, .. } => {
                let path = Some(path.as_os_str().to_owned());
                Self { class: "DiskFullError", errno: Some(ENOSPC), path }
            }
            IoError::EndOfFile { path, .. } => {
                // No call failed: there were no bytes.
                let path = Some(path.as_os_str().to_owned());
                Self { class: "EndOfFileError", errno: Some(ENODATA), path }
            }
            IoError::WriteZero { path, .. } | IoError::NotAFile { path } => {
                Self { class: "StorageError", errno: Some(EIO), path: Some(path.as_os_str().to_owned()) }
            }
            IoError::Config { .. } | IoError::SpaceOffset { .. } => Self::plain("ArgumentError"),
            _ => Self::plain("EngineError"),
        }
    }

    fn of_store(error: &StoreError) -> Self {
        match error {
            StoreError::Io(error) => Self::of_io(error),
            StoreError::Transfer { source, .. } => Self::of_io(source),
            StoreError::Pool(_) => Self::plain("MemoryBudgetError"),
            StoreError::Directory { path, source, .. } => Self {
                class: "StorageError",
                errno: source.raw_os_error(),
                path: Some(path.as_os_str().to_owned()),
            },
            StoreError::Displaced { path } => {
                let path = Some(path.as_os_str().to_owned());
                Self { class: "StorageError", errno: Some(ENOENT), path }
            }
            StoreError::Locked { .. } | StoreError::NoLock { .. } => Self::plain("LockedError"),
            StoreError::NoSpace { path, .. } | StoreError::DiskFull { path, .. } => {
                let path = Some(path.as_os_str().to_owned());
                Self { class: "DiskFullError", errno: Some(ENOSPC), path }
            }
            StoreError::SnapshotRoom { .. } | StoreError::KeptRoom { .. } => {
                Self { class: "DiskFullError", errno: Some(ENOSPC), path: None }
            }
            StoreError::Corrupt { .. }
            | StoreError::Truncated { .. }
            | StoreError::Manifest { .. }
            | StoreError::ManifestLost { .. }
            | StoreError::Misplaced { .. }
            | StoreError::NotWhole { .. }
            | StoreError::Label { .. } => Self::plain("CorruptionError"),
            StoreError::SnapshotName { .. } => Self::plain("ArgumentError"),
            _ => Self::plain("StateError"),
        }
    }
}

const ENOENT: i32 = 2;
const EIO: i32 = 5;
const ENODATA: i32 = 61;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;
const EFBIG: i32 = 27;

fn is_full(errno: i32) -> bool {
    matches!(errno, ENOSPC | EDQUOT | EFBIG)
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        static CLASSES: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
        if let Error::Raised(raised) = error {
            return raised;
        }
        Python::attach(|py| {
            let told = Told::of(&error);
            let classes = CLASSES.get_or_try_init(py, || py.import("overspill.errors").map(Bound::unbind));
            let class = classes.and_then(|module| module.bind(py).getattr(told.class));
            match class.and_then(|class| class.call1((error.to_string(), told.errno, told.path))) {
                Ok(exception) => PyErr::from_value(exception),
                Err(failure) => failure,
            }
        })
    }
}
