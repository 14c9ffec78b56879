//! Why a folder could not be read as a model, or a model not be written to a folder.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::unfinished::Writer;
use crate::config::ConfigError;

/// Why a folder could not be read as a model, or a model not be written to a folder.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The system refused something.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: Action,
        /// With which file or folder.
        path: PathBuf,
        /// The system's answer, with its errno.
        source: io::Error,
    },
    /// The file system has no room for the model.
    #[error("{path}: no space left on the file system; the file needs {needed} bytes", path = path.display())]
    NoSpace {
        /// The file that did not fit.
        path: PathBuf,
        /// Its full length, in bytes.
        needed: u64,
    },
    /// Something else than a regular file is where one is needed.
    #[error("{path}: not a regular file", path = path.display())]
    NotAFile {
        /// What is there.
        path: PathBuf,
    },
    /// A text file is far longer than its kind ever is.
    #[error("{path}: {found} bytes is too long; at most {limit} are read", path = path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length, in bytes.
        found: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The model's shape was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The folder has neither weights nor an index of them.
    #[error("{folder}: has neither {single} nor {index}", folder = folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// The file that would have them all.
        single: String,
        /// The index that would list the files that have them.
        index: String,
    },
    /// The file that says what a training state is of is not one.
    #[error("{path}: not the description of a training state: {reason}", path = path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of tensors belongs to another training state.
    #[error("{path}: not of the training state that {of} describes", path = path.display(), of = of.display())]
    OtherState {
        /// The file of tensors.
        path: PathBuf,
        /// The description.
        of: PathBuf,
    },
    /// The numbers of a tensor are not those that were exported.
    #[error(
        "{path}: tensor {tensor} is damaged: its checksum is {found:016x}, and was {expected:016x} when it was exported",
        path = path.display()
    )]
    Damaged {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// What was exported.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// Stored weights are not what the exact ones round to, so no state has both.
    #[error(
        "{path}: the numbers of tensor {tensor} are not those that its exact ones, {masters}, round to",
        path = path.display()
    )]
    NotRounded {
        /// The stored weights.
        tensor: String,
        /// The exact ones.
        masters: String,
        /// The file that holds the stored ones.
        path: PathBuf,
    },
    /// The index does not list shards.
    #[error("{path}: not an index of shards: {reason}", path = path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The index names a shard outside of its folder.
    #[error("{path}: the shard name {name:?} is not a plain file name", path = path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// The header of a safetensors file is malformed.
    #[error("{path}: malformed safetensors header: {reason}", path = path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A safetensors file is cut short, or longer than its header says.
    #[error("{path}: the header describes a file of {expected} bytes, but it has {found}", path = path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// The length that the header describes, in bytes.
        expected: u64,
        /// The length of the file, in bytes.
        found: u64,
    },
    /// A tensor is not where it must be.
    #[error("{path}: tensor {tensor} is missing", path = path.display())]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The file or folder that lacks it.
        path: PathBuf,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("{path}: tensor {tensor} has shape {found:?}, expected {expected:?}", path = path.display())]
    WrongShape {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The elements of a tensor are no numbers that training could start from.
    #[error("{path}: tensor {tensor} has dtype {found}, expected {expected}", path = path.display())]
    WrongDtype {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// What it may be.
        expected: String,
        /// The dtype in the file.
        found: String,
    },
    /// A file holds a tensor that this model has no place for.
    #[error("{path}: tensor {tensor} does not belong to the model that config.json describes", path = path.display())]
    UnexpectedTensor {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
    },
    /// Two shards hold the same tensor.
    #[error("{second}: tensor {tensor} is also in {first}", first = first.display(), second = second.display())]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// The shard that was read first.
        first: PathBuf,
        /// The other one.
        second: PathBuf,
    },
    /// A folder that is not finished is being written.
    #[error(
        "{folder}: is being written{by}",
        folder = folder.display(),
        by = match writer {
            Writer::Process { pid: Some(pid) } => format!(" by process {pid}"),
            Writer::Process { pid: None } | Writer::Dead => String::new(),
        }
    )]
    InUse {
        /// The folder.
        folder: PathBuf,
        /// Who writes to it.
        writer: Writer,
    },
    /// The folder to be written is there already and holds something.
    #[error("{folder}: exists and is not an empty folder", folder = folder.display())]
    NotEmpty {
        /// The folder.
        folder: PathBuf,
    },
    /// The folder is whole and has its name, but the system failed to make the name safe on storage.
    #[error(
        "{folder}: the model is written whole, but its name may be lost if the power fails: cannot sync the folder \
         around it: {source}",
        folder = folder.display()
    )]
    NameNotSynced {
        /// The folder, as it now is.
        folder: PathBuf,
        /// The system's answer, with its errno.
        source: io::Error,
    },
    /// The folder to be written would lie in one that is not there.
    #[error("{parent}: no such folder", parent = parent.display())]
    NoParent {
        /// The missing folder.
        parent: PathBuf,
    },
    /// The folder to be written is a mount point, which nothing can be renamed to.
    #[error("{folder}: is a mount point; name a folder inside of it", folder = folder.display())]
    MountPoint {
        /// The folder.
        folder: PathBuf,
    },
}

/// What was tried with a file or folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open a file, or look at a path.
    Open,
    /// Read from a file.
    Read,
    /// Create a file or folder.
    Create,
    /// Write to a file.
    Write,
    /// Make a file or folder safe on storage.
    Sync,
    /// Give a folder its final name.
    Rename,
    /// List what is in a folder.
    List,
    /// Remove a file or folder.
    Remove,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Create => "create",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Rename => "rename",
            Self::List => "list",
            Self::Remove => "remove",
        })
    }
}

impl Action {
    /// Turns the system's answer into an error that says what was tried with what.
    pub(super) fn failed(self, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
        move |source| CheckpointError::Io { action: self, path: path.to_owned(), source }
    }
}
