//! What can go wrong in a store: variants for programs, fields for people.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use overspill_io::{IoError, PoolError};

use crate::manifest::{ManifestError, VERSION};

/// Why a store refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory, or a file in it other than the data, could not be worked on.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Directory {
        /// What was tried: "create", "write", ….
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A store's directory, or a file that it has open there, has lost its name, or the name is another's.
    #[error(
        "{path} is not what this run has open there: it was moved, removed or replaced; put it back and try again, or \
         use another directory",
        path = path.display()
    )]
    Displaced {
        /// The directory, or the file in it.
        path: PathBuf,
    },
    /// The directory belongs to a process that is running.
    #[error("{path} is in use{owner}; give this run another directory", path = path.display(),
        owner = pid.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Its owner's process id, when it could be read.
        pid: Option<u32>,
    },
    /// There is no lock that could be taken in a directory that has other files of a store.
    #[error(
        "cannot open {path}: {source}; a store is opened by locking this file: if no run has the store open, put an \
         empty file in its place",
        path = path.display()
    )]
    NoLock {
        /// The lock's file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The directory exists and nobody alive owns it.
    #[error("{path} already exists{}", occupied(flaw.as_deref()), path = path.display())]
    Leftover {
        /// The directory.
        path: PathBuf,
        /// Why it cannot be gone on from as it is, if it is a store's.
        flaw: Option<Box<StoreError>>,
    },
    /// The file system has less room than the store will need.
    #[error("{path} has {available} bytes free and {needed} are needed", path = path.display())]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// Bytes the store needs.
        needed: u64,
        /// Bytes the file system has left.
        available: u64,
    },
    /// The file system has no room for what has to be written.
    #[error(
        "cannot write {path}: {needed} bytes are needed and {available} are free there \
         (os error {errno}); {fallback}",
        path = path.display()
    )]
    DiskFull {
        /// The file.
        path: PathBuf,
        /// Its length, in bytes.
        needed: u64,
        /// Bytes the file system had left.
        available: u64,
        /// The system's answer: `ENOSPC` or `EDQUOT`.
        errno: i32,
        /// What can be gone on from.
        fallback: Fallback,
    },
    /// A snapshot keeps what the steps after it would overwrite, and there is no room for them beside it.
    #[error(
        "no room for snapshot {name} of {path}: the steps after it need {needed} bytes more, and {available} are free",
        path = path.display()
    )]
    SnapshotRoom {
        /// The name.
        name: String,
        /// The store's directory.
        path: PathBuf,
        /// Bytes that one of its file systems should have free.
        needed: u64,
        /// Bytes that it has.
        available: u64,
    },
    /// There is no room for the steps to come beside what snapshots keep.
    #[error(
        "{source}; {path} keeps the snapshots {}, and `overspill snapshot {path} NAME --delete` gives one up",
        snapshots.join(", "), path = path.display()
    )]
    KeptRoom {
        /// The store's directory.
        path: PathBuf,
        /// Its snapshots.
        snapshots: Vec<String>,
        /// Where how much is missing.
        source: IoError,
    },
    /// The data file was not made for one more tensor.
    #[error("tensor {tensor}: {path} was made for {capacity} bytes, and {needed} are needed", path = path.display())]
    Full {
        /// The tensor that found no room.
        tensor: String,
        /// The data file.
        path: PathBuf,
        /// Bytes that all tensors need with this one.
        needed: u64,
        /// Bytes of the data file.
        capacity: u64,
    },
    /// Two tensors of one store asked for the same name.
    #[error("tensor {tensor} already exists in {path}", path = path.display())]
    DuplicateName {
        /// The name.
        tensor: String,
        /// The store's directory.
        path: PathBuf,
    },
    /// A block does not have the tensor's length.
    #[error("tensor {tensor} has {expected} bytes, the block {found}")]
    WrongLength {
        /// The tensor.
        tensor: String,
        /// Its length, in bytes.
        expected: usize,
        /// The block's length, in bytes.
        found: usize,
    },
    /// What came back is not what was stored.
    #[error(
        "tensor {tensor}: {length} bytes at offset {offset} of {path} are damaged \
         (checksum {found:016x}, stored as {expected:016x})",
        path = path.display()
    )]
    Corrupt {
        /// The tensor.
        tensor: String,
        /// The data file; of several that the tensor is spread over, the one that it begins in.
        path: PathBuf,
        /// Where the tensor begins in that file, in bytes.
        offset: u64,
        /// Length of the tensor, in bytes.
        length: usize,
        /// Checksum (XXH3-64) when it was stored.
        expected: u64,
        /// Checksum of what was read.
        found: u64,
    },
    /// The engine could not move a tensor.
    #[error("tensor {tensor}: {source}")]
    Transfer {
        /// The tensor.
        tensor: String,
        /// What the engine said.
        source: IoError,
    },
    /// A commit found a tensor whose store was never waited for.
    #[error("tensor {tensor} is not stored: its last write failed or was not waited for")]
    Unfinished {
        /// The tensor.
        tensor: String,
    },
    /// There is no such tensor, or nothing was stored for it.
    #[error("{path} has no contents for tensor {tensor}", path = path.display())]
    Missing {
        /// The tensor.
        tensor: String,
        /// The store's directory.
        path: PathBuf,
    },
    /// Somebody has the tensor.
    #[error("tensor {tensor} is in use")]
    InUse {
        /// The tensor.
        tensor: String,
    },
    /// A manifest, or a snapshot's, is not what it should be.
    #[error("{path}: {source}{remedy}", path = path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
        /// What can be done about it.
        remedy: Remedy,
    },
    /// What was to be committed with the tensors could be written, but not be read again.
    #[error("what goes with a commit of {path} is nested in more than {levels_max} levels", path = path.display())]
    MetaDepth {
        /// The store's directory.
        path: PathBuf,
        /// Levels of arrays and objects that it may have.
        levels_max: usize,
    },
    /// The data file is shorter than the manifest says.
    #[error("{path} has {length} bytes, and the committed state needs {needed}: it was cut short", path = path.display())]
    Truncated {
        /// The data file.
        path: PathBuf,
        /// Its length, in bytes.
        length: u64,
        /// Bytes that it should have at least.
        needed: u64,
    },
    /// The state lies in other data files than those that were given.
    #[error(
        "{path} names {} data files ({}), and {found} were given: give all directories, in the same order",
        files.len(), files.join(", "), path = path.display()
    )]
    Volumes {
        /// The manifest.
        path: PathBuf,
        /// The data files that it names.
        files: Vec<String>,
        /// Data files of the directories that were given.
        found: usize,
    },
    /// A directory that was given is no volume of the store, or not the one of this place.
    #[error("{} is not the volume of {} that it was given as: give all directories, in the same order", path.display(), home.display())]
    ForeignVolume {
        /// The directory.
        path: PathBuf,
        /// The store's home.
        home: PathBuf,
    },
    /// Which volume a directory is cannot be read.
    #[error(
        "{path} is missing or damaged, so it is not known whose directory that is; if it is the number {number} of the \
         store in {home}, its text is `{text}`",
        path = path.display(), home = home.display()
    )]
    Label {
        /// The label's file.
        path: PathBuf,
        /// The store's home.
        home: PathBuf,
        /// Which directory it was given as, from 1.
        number: usize,
        /// What the file of that directory says.
        text: String,
    },
    /// A directory other than the first one was given as the store's home.
    #[error(
        "{path} is the directory number {number} of its store: give all its directories, in the order in which they were \
         created",
        path = path.display()
    )]
    Misplaced {
        /// The directory.
        path: PathBuf,
        /// Which one it is, from 1.
        number: usize,
    },
    /// Two of the directories that were given are one.
    #[error("{path} was given twice", path = path.display())]
    GivenTwice {
        /// The directory.
        path: PathBuf,
    },
    /// A directory that was given is not the one that has the store's manifests.
    #[error("{path} is not the first directory of its store, and snapshots are made in that", path = path.display())]
    NotHome {
        /// The directory.
        path: PathBuf,
    },
    /// A name that no snapshot can have.
    #[error(
        "`{name}` is no name for a snapshot: 1 to 64 letters, digits, `-`, `_` or `.`, not beginning with `-` or `.`"
    )]
    SnapshotName {
        /// The name.
        name: String,
    },
    /// A snapshot of this name exists.
    #[error("{path} already has a snapshot {name}", path = path.display())]
    SnapshotExists {
        /// The name.
        name: String,
        /// The store's directory.
        path: PathBuf,
    },
    /// No snapshot has this name.
    #[error("{path} has no snapshot {name}; it has {}", list(known), path = path.display())]
    NoSnapshot {
        /// The name.
        name: String,
        /// The store's directory.
        path: PathBuf,
        /// The snapshots there are.
        known: Vec<String>,
    },
    /// The snapshot that was read was deleted, and another one was made under its name.
    #[error("snapshot {name} of {path} was deleted while it was read, and is another one now", path = path.display())]
    SnapshotReplaced {
        /// The name.
        name: String,
        /// The store's directory.
        path: PathBuf,
    },
    /// There is no generation before the committed one.
    #[error("{path} has no generation before the committed one to go back to", path = path.display())]
    NoPrevious {
        /// The store's directory.
        path: PathBuf,
    },
    /// There is no store.
    #[error("{path} is not a directory of a store", path = path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
    },
    /// A store that is to go is not what it was when that was decided.
    #[error("{path} stays: {reason}", path = path.display())]
    Stays {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// What was to be made the current generation is damaged.
    #[error(
        "{what} is not whole, so nothing was restored: {}; `overspill verify {path}` says what is whole",
        first_of(damaged), path = path.display()
    )]
    NotWhole {
        /// The store's directory.
        path: PathBuf,
        /// Which generation.
        what: String,
        /// What is damaged, each in words.
        damaged: Vec<String>,
    },
    /// Whoever was asked to make a snapshot answered that it cannot be.
    #[error("the process that has {path} open made no snapshot {name}: {reason}", path = path.display())]
    WishRefused {
        /// The name.
        name: String,
        /// The store's directory.
        path: PathBuf,
        /// Its words.
        reason: String,
    },
    /// Somebody else asked for a snapshot of this name.
    #[error("another command waits for snapshot {name} of {path} already", path = path.display())]
    WishExists {
        /// The name.
        name: String,
        /// The store's directory.
        path: PathBuf,
    },
    /// The wish is gone, and there is no snapshot: another command took it away, or the store is gone.
    #[error("the wish for snapshot {name} of {path} was taken away", path = path.display())]
    WishGone {
        /// The name.
        name: String,
        /// The store's directory.
        path: PathBuf,
    },
    /// A wish could not be taken back, because whoever was asked is answering it.
    #[error(
        "whether snapshot {name} of {path} is made is not known yet: its owner is answering; \
         `overspill inspect {path}` shows it later",
        path = path.display()
    )]
    WishPending {
        /// The name.
        name: String,
        /// The store's directory.
        path: PathBuf,
    },
    /// There is no committed state.
    #[error(
        "{path} has no committed state; if its run has ended, `overspill gc {path} --remove` removes it",
        path = path.display()
    )]
    NothingCommitted {
        /// The store's directory.
        path: PathBuf,
    },
    /// There is no manifest, but there are earlier ones or snapshots.
    #[error("{path} is gone{remedy}", path = path.display())]
    ManifestLost {
        /// The manifest.
        path: PathBuf,
        /// What can be done about it.
        remedy: Remedy,
    },
    /// A flush failed earlier: what is on storage is unknown from then on.
    #[error("{path} is unusable: an earlier flush of it failed", path = path.display())]
    Poisoned {
        /// The data file.
        path: PathBuf,
    },
    /// The engine refused to open, allocate or flush the data file.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The pool refused a lease.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

impl StoreError {
    pub(crate) fn directory(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Directory { action, path: path.to_owned(), source }
    }
}

/// What there is to go on from when the next generation found no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// The last commit.
    LastCommit,
    /// Nothing: there is no commit, or it was overwritten.
    Nothing,
    /// What there was before: nothing was changed.
    Unchanged,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LastCommit => "make room and resume: the last commit is whole",
            Self::Nothing => "there is no commit to resume from: make room before this is run again",
            Self::Unchanged => "make room and try again: nothing was changed",
        })
    }
}

/// What can be done about a manifest that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Nothing that is known.
    None,
    /// Whoever wrote it can read it.
    NewerVersion,
    /// The generation before can be made the current one.
    RestorePrevious {
        /// The store's directory.
        path: PathBuf,
    },
    /// A snapshot can be made the current generation.
    RestoreSnapshot {
        /// The store's directory.
        path: PathBuf,
        /// The newest snapshot that can be read.
        name: String,
    },
    /// What is left has to be looked at.
    Verify {
        /// The store's directory.
        path: PathBuf,
    },
    /// The snapshot can be given up.
    DeleteSnapshot {
        /// The store's directory.
        path: PathBuf,
        /// The snapshot.
        name: String,
    },
}

impl Remedy {
    /// A newer version is no damage: nothing is to be given up for it.
    pub(crate) fn for_manifest(source: &ManifestError, damaged: impl FnOnce() -> Self) -> Self {
        match source {
            ManifestError::UnknownVersion { found } if *found > VERSION => Self::NewerVersion,
            _ => damaged(),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::NewerVersion => f.write_str("; use the newer overspill that wrote it"),
            Self::RestorePrevious { path } => {
                let path = path.display();
                write!(
                    f,
                    "; `overspill restore {path} --previous` goes back to the generation before it, if that is still \
                     whole; `overspill verify {path}` says"
                )
            }
            Self::RestoreSnapshot { path, name } => {
                let path = path.display();
                write!(f, "; `overspill restore {path} {name}` goes back to this snapshot")
            }
            Self::Verify { path } => write!(f, "; `overspill verify {}` says what is left", path.display()),
            Self::DeleteSnapshot { path, name } => {
                let path = path.display();
                write!(f, "; `overspill snapshot {path} {name} --delete` gives this snapshot up")
            }
        }
    }
}

/// What to do about a directory that is in the way. What can be made whole again is not to be removed.
fn occupied(flaw: Option<&StoreError>) -> String {
    match flaw {
        None => "; it may hold an earlier run: resume it, remove it, or give this run another directory"
            .to_owned(),
        Some(flaw) => format!(": {flaw}; or give this run another directory"),
    }
}

/// How many of many things are named.
const NAMED_MAX: usize = 3;

fn first_of(damaged: &[String]) -> String {
    let (first, others) = damaged.split_at(damaged.len().min(NAMED_MAX));
    let others = if others.is_empty() { String::new() } else { format!("; and {} more", others.len()) };
    first.join("; ") + &others
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
